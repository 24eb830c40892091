"""A private Postfix on free loopback ports; needs root, leaves the system's alone."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Self

import trustme

from tests.servers import free_port, is_listening, wait_until

USERNAME = "alice@postfix.test"
PASSWORD = "correct horse battery"
_NEEDED = ("postfix", "postconf", "saslpasswd2")
_SERVICES = """\
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
proxymap unix - - n - - proxymap
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"""


def why_missing() -> str | None:
    """Return what keeps Postfix from being run here, if anything does."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return None if os.geteuid() == 0 else "Postfix needs root"


class Postfix:
    """
    Takes mail for example.com, after STARTTLS (``port``) or over TLS (``tls_port``),
    and a login on either, into one maildir.
    """

    def __init__(self, folder: Path, ca: trustme.CA) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.tls_port = free_port()
        self._folder = folder
        self._conf = folder / "conf"
        self._maildir = folder / "mail" / "all"
        self._ca = ca

    def __enter__(self) -> Self:
        # The spool belongs to the user postfix, who must be able to reach it.
        self._folder.chmod(0o755)
        for name in ("conf", "queue", "data", "log", "mail", "conf/sasl"):
            (self._folder / name).mkdir()
        user = pwd.getpwnam("postfix")
        for name in ("data", "mail"):
            os.chown(self._folder / name, user.pw_uid, user.pw_gid)
        self._make_login(user.pw_gid)
        self._write_main(user.pw_uid, user.pw_gid)
        self._write_master()
        self._postfix("start")
        for port in (self.port, self.tls_port):
            wait_until(partial(is_listening, port))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._postfix("stop")

    @property
    def messages(self) -> list[bytes]:
        """The messages in the maildir, with CRLF, in no order."""
        return [
            path.read_bytes().replace(b"\n", b"\r\n")
            for path in self._maildir.glob("new/*")
        ]

    @property
    def log(self) -> str:
        """What Postfix logged."""
        return (self._folder / "log" / "maillog").read_text()

    def _postfix(self, action: str) -> None:
        subprocess.run(
            ["postfix", "-c", str(self._conf), action],
            check=True,
            capture_output=True,
            timeout=30,
        )

    def _make_login(self, group: int) -> None:
        database = self._conf / "sasl" / "sasldb2"
        name, _, realm = USERNAME.partition("@")
        subprocess.run(
            ["saslpasswd2", "-p", "-c", "-f", str(database), "-u", realm, name],
            input=PASSWORD.encode(),
            check=True,
            timeout=30,
        )
        os.chown(database, 0, group)
        database.chmod(0o640)
        (self._conf / "sasl" / "smtpd.conf").write_text(
            "pwcheck_method: auxprop\nauxprop_plugin: sasldb\n"
            f"sasldb_path: {database}\nmech_list: PLAIN LOGIN CRAM-MD5\n"
        )

    def _write_main(self, user: int, group: int) -> None:
        certificate = self._folder / "conf" / "server.pem"
        self._ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
            certificate
        )
        certificate.chmod(0o600)
        allow = "permit_sasl_authenticated, reject"
        main = {
            "compatibility_level": "3.6",
            "queue_directory": self._folder / "queue",
            "data_directory": self._folder / "data",
            "maillog_file": self._folder / "log" / "maillog",
            "maillog_file_prefixes": self._folder,
            "inet_interfaces": "127.0.0.1",
            "inet_protocols": "ipv4",
            "myhostname": "mx.postfix.test",
            "mydestination": "",
            "alias_maps": "",
            "alias_database": "",
            "default_transport": "discard:",
            "relay_transport": "discard:",
            "virtual_mailbox_domains": "example.com",
            "virtual_mailbox_base": self._folder / "mail",
            "virtual_mailbox_maps": "static:all/",
            "virtual_uid_maps": f"static:{user}",
            "virtual_gid_maps": f"static:{group}",
            "virtual_minimum_uid": "1",
            "virtual_mailbox_limit": "0",
            "mailbox_size_limit": "0",
            "message_size_limit": "52428800",
            "smtpd_relay_restrictions": (
                "permit_sasl_authenticated, reject_unauth_destination"
            ),
            "smtpd_sender_restrictions": (
                "check_sender_access inline:{refused@example.com=REJECT}"
            ),
            "smtpd_recipient_restrictions": (
                f"check_recipient_access inline:{{nouser@example.com=REJECT}}, {allow}"
            ),
            "smtpd_peername_lookup": "no",
            "smtputf8_enable": "yes",
            "smtpd_sasl_auth_enable": "yes",
            "smtpd_sasl_path": "smtpd",
            "smtpd_sasl_local_domain": "postfix.test",
            "smtpd_sasl_security_options": "noanonymous",
            "smtpd_tls_cert_file": certificate,
            "smtpd_tls_security_level": "may",
            "smtpd_tls_auth_only": "yes",
        }
        lines = (f"{key} = {value}\n" for key, value in main.items())
        (self._conf / "main.cf").write_text("".join(lines))

    def _write_master(self) -> None:
        (self._conf / "master.cf").write_text(
            f"127.0.0.1:{self.port} inet n - n - - smtpd\n"
            f"127.0.0.1:{self.tls_port} inet n - n - - smtpd\n"
            "  -o smtpd_tls_wrappermode=yes\n" + _SERVICES
        )
