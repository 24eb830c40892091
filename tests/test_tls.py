from __future__ import annotations

import gc
import os
import smtplib
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage

from django_async_smtp import Backend, SMTPError, errors
from django_async_smtp.tls import client_context

from .conftest import MakeBackend, configure, default_backend
from .servers import (
    PASSWORD,
    USERNAME,
    MailServer,
    Script,
    ScriptedServer,
    wait_until,
)

FILES = ("certfile", "keyfile", "cafile")
KINDS = pytest.mark.parametrize("kind", ["use_tls", "use_ssl"])


def message() -> EmailMessage:
    return EmailMessage("Hello", "Body", "from@example.com", ["to@example.com"])


def scripted(tls: ssl.SSLContext, kind: str, **more: Any) -> ScriptedServer:
    return ScriptedServer(tls=tls, implicit=kind == "use_ssl", **more)


def server_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    return context


@dataclass
class Files:
    """A client's certificate, its key, and the issuers that it trusts."""

    certfile: Path
    keyfile: Path
    cafile: Path

    def write(self, ca: trustme.CA) -> None:
        """Write new ones that this authority issued."""
        certificate = ca.issue_cert("client@example.com")
        certificate.cert_chain_pems[0].write_to_path(self.certfile)
        certificate.private_key_pem.write_to_path(self.keyfile)
        ca.cert_pem.write_to_path(self.cafile)

    def context(self) -> ssl.SSLContext:
        return client_context(*map(str, (self.certfile, self.keyfile, self.cafile)))

    def options(self) -> dict[str, str]:
        return {f"ssl_{name}": str(path) for name, path in vars(self).items()}


@pytest.fixture
def files(ca: trustme.CA, tmp_path: Path) -> Files:
    found = Files(*(tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem")))
    found.write(ca)
    return found


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def test_the_context_verifies_the_server(files: Files) -> None:
    for context in (client_context(), files.context()):
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname


def test_the_context_is_built_once(files: Files) -> None:
    assert client_context() is client_context()
    assert client_context("", None, "") is client_context()
    assert files.context() is files.context()
    assert files.context() is not client_context()
    assert client_context(cafile=str(files.cafile)) is not files.context()


def test_the_context_is_built_once_for_all_threads(files: Files) -> None:
    with ThreadPoolExecutor(8) as threads:
        contexts = [threads.submit(files.context) for _ in range(32)]
    assert len({id(context.result()) for context in contexts}) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_changed_is_read_again(name: str, files: Files) -> None:
    before = files.context()
    touch(getattr(files, name))
    after = files.context()
    assert after is not before
    assert files.context() is after


def test_a_file_behind_a_link_that_moved_is_read_again(
    files: Files, tmp_path: Path
) -> None:
    link, other = tmp_path / "link.pem", tmp_path / "other.pem"
    other.write_bytes(files.cafile.read_bytes())
    os.utime(other, ns=(0, files.cafile.stat().st_mtime_ns))
    link.symlink_to(files.cafile)
    before = client_context(cafile=str(link))
    link.unlink()
    link.symlink_to(other)
    assert client_context(cafile=str(link)) is not before


def encrypt(path: Path) -> None:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"a password")
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )
    )


def spoil(path: Path) -> None:
    path.write_text("junk")


@pytest.mark.parametrize("fail_silently", [False, True])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, change) for name in FILES for change in (Path.unlink, spoil)),
        ("keyfile", encrypt),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_that_names_it(
    name: str,
    change: Callable[[Path], object],
    fail_silently: bool,
    files: Files,
    server_tls: ssl.SSLContext,
    make_backend: MakeBackend,
    capfd: pytest.CaptureFixture[str],
) -> None:
    change(getattr(files, name))
    with ScriptedServer(tls=server_tls) as server:
        options = {"use_tls": True, **files.options()}
        backend = make_backend(server, fail_silently=fail_silently, **options)
        for call in (backend.open, lambda: backend.send_messages([message()])):
            with pytest.raises(OSError, match=str(getattr(files, name))) as raised:
                call()
            assert not isinstance(raised.value, SMTPError)
        assert server.connections == 0
    assert "pass phrase" not in capfd.readouterr().err, "nobody is asked for one"


def test_a_key_without_a_certificate_is_an_error(make_backend: MakeBackend) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"needs ssl_certfile beside it\."):
        make_backend(host="127.0.0.1", use_tls=True, ssl_keyfile="key.pem")


def test_without_tls_the_files_are_not_read(
    server: MailServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(server, ssl_certfile="nowhere.pem", ssl_keyfile="no.pem")
    assert backend.send_messages([message()]) == 1


@KINDS
def test_mail_goes_over_tls_with_a_private_authority(
    kind: str,
    server_tls: ssl.SSLContext,
    cafile: Path,
    make_backend: MakeBackend,
) -> None:
    with MailServer(tls=server_tls, implicit=kind == "use_ssl") as server:
        backend = make_backend(server, ssl_cafile=str(cafile), **{kind: True})
        assert backend.send_messages([message()]) == 1
    assert [received.tls for received in server.received] == [True]


@KINDS
def test_a_login_goes_over_tls(
    kind: str,
    server_tls: ssl.SSLContext,
    cafile: Path,
    make_backend: MakeBackend,
) -> None:
    login = {"username": USERNAME, "password": PASSWORD, "ssl_cafile": str(cafile)}
    with scripted(server_tls, kind, extensions=("AUTH PLAIN",)) as server:
        make_backend(server, **{kind: True}, **login).send_messages([message()])
    verbs = [line.split()[0] for line in server.lines]
    start = [b"EHLO", b"STARTTLS"] if kind == "use_tls" else []
    assert verbs[: len(start) + 2] == [*start, b"EHLO", b"AUTH"]
    (received,) = server.received
    assert (received.tls, received.login) == (True, True)


@KINDS
def test_a_context_and_a_connection_serve_many_messages(
    kind: str,
    server_tls: ssl.SSLContext,
    cafile: Path,
    make_backend: MakeBackend,
) -> None:
    options = {kind: True, "ssl_cafile": str(cafile)}
    with scripted(server_tls, kind) as server:
        contexts = set()
        for _ in range(3):
            backend = make_backend(server, **options)
            assert backend.send_messages([message(), message()]) == 2
            contexts.add(backend.ssl_context)
        assert server.connections == 1
    assert len(contexts) == 1
    assert len(server.received) == 6


def expired(ca: trustme.CA) -> trustme.LeafCert:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    return ca.issue_cert("127.0.0.1", not_after=yesterday)


@KINDS
@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        (lambda ca: trustme.CA().issue_cert("127.0.0.1"), "unable to get local issuer"),
        (lambda ca: ca.issue_cert("other.example"), "IP address mismatch"),
        (expired, "certificate has expired"),
    ],
    ids=["unknown issuer", "other name", "expired"],
)
def test_a_certificate_that_is_not_valid_is_refused(
    kind: str,
    certificate: Callable[[trustme.CA], trustme.LeafCert],
    reason: str,
    ca: trustme.CA,
    cafile: Path,
    make_backend: MakeBackend,
) -> None:
    with scripted(server_context(certificate(ca)), kind) as server:
        backend = make_backend(server, ssl_cafile=str(cafile), **{kind: True})
        with pytest.raises(errors.CertificateError, match=reason) as raised:
            backend.send_messages([message()])
        assert server.commands(b"MAIL") == []
    assert isinstance(raised.value, ssl.SSLCertVerificationError)
    assert raised.value.stage == "tls"


@KINDS
def test_an_authority_that_the_system_does_not_know_is_refused(
    kind: str, server_tls: ssl.SSLContext, make_backend: MakeBackend
) -> None:
    with scripted(server_tls, kind) as server:
        backend = make_backend(server, **{kind: True})
        with pytest.raises(errors.CertificateError, match="certificate"):
            backend.send_messages([message()])
        assert server.commands(b"MAIL") == []


@KINDS
def test_the_clients_certificate_is_presented(
    kind: str, ca: trustme.CA, files: Files, make_backend: MakeBackend
) -> None:
    context = server_context(ca.issue_cert("127.0.0.1"))
    ca.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    with scripted(context, kind) as server:
        backend = make_backend(server, **{kind: True}, **files.options())
        assert backend.send_messages([message()]) == 1
        backend.ssl_certfile = backend.ssl_keyfile = None
        with pytest.raises(SMTPError):
            backend.send_messages([message()])
    assert len(server.received) == 1


@KINDS
def test_renewed_files_count_without_a_restart(
    kind: str, files: Files, make_backend: MakeBackend
) -> None:
    new = trustme.CA()
    context = server_context(new.issue_cert("127.0.0.1"))
    new.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    with scripted(context, kind) as server:
        backend = make_backend(server, **{kind: True}, **files.options())
        with pytest.raises(errors.CertificateError):
            backend.send_messages([message()])
        files.write(new)
        assert backend.send_messages([message()]) == 1


class WithProperty(Backend):
    context: ClassVar[ssl.SSLContext]

    @property
    def ssl_context(self) -> ssl.SSLContext:
        return self.context


class WithCachedProperty(Backend):
    context: ClassVar[ssl.SSLContext]

    @cached_property
    def ssl_context(self) -> ssl.SSLContext:
        return self.context


@KINDS
@pytest.mark.parametrize("cls", [WithProperty, WithCachedProperty])
def test_a_subclass_may_bring_its_own_context(
    cls: type[WithProperty | WithCachedProperty],
    kind: str,
    server_tls: ssl.SSLContext,
    cafile: Path,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = ssl.create_default_context(cafile=str(cafile))
    monkeypatch.setattr(cls, "context", context, raising=False)
    with scripted(server_tls, kind) as server:
        options = {"host": server.host, "port": server.port, kind: True}
        configure(settings, f"{__name__}.{cls.__name__}", **options)
        for _ in range(2):
            backend = default_backend()
            assert backend.send_messages([message()]) == 1
            assert backend.ssl_context is context
        # A context that each instance keeps for itself is not known to be shared.
        assert server.connections == (1 if cls is WithProperty else 2)
    assert all(received.tls for received in server.received)


class WithOwnContext(Backend):
    cafile: ClassVar[str]

    @cached_property
    def ssl_context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.cafile)


def test_connections_with_a_context_of_one_instance_end_with_it(
    server_tls: ssl.SSLContext,
    cafile: Path,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(WithOwnContext, "cafile", str(cafile), raising=False)
    with scripted(server_tls, "use_tls") as server:
        options = {"host": server.host, "port": server.port, "use_tls": True}
        configure(settings, f"{__name__}.WithOwnContext", **options)
        for _ in range(3):
            assert default_backend().send_messages([message()]) == 1
        gc.collect()
        wait_until(lambda: server.open_connections == 0)
        assert server.connections == 3


@pytest.mark.parametrize("fail_silently", [False, True])
@pytest.mark.parametrize(
    "script",
    [
        {},
        {"ehlo": b"250-test\r\n250 STARTTLS\r\n", "starttls": b"454 4.7.0 later\r\n"},
        {"ehlo": b"250-test\r\n250 STARTTLS\r\n", "starttls": b"502 unknown\r\n"},
        {"ehlo": b"500 what?\r\n"},
    ],
    ids=["not offered", "refused", "unknown", "no EHLO"],
)
def test_use_tls_never_sends_in_plaintext(
    script: Script, fail_silently: bool, make_backend: MakeBackend
) -> None:
    options = {"use_tls": True, "username": USERNAME, "password": PASSWORD}
    with ScriptedServer(scripts=(script,)) as server:
        backend = make_backend(server, fail_silently=fail_silently, **options)
        if fail_silently:
            assert backend.send_messages([message()]) == 0
        else:
            with pytest.raises(SMTPError) as raised:
                backend.send_messages([message()])
            assert raised.value.stage == "tls"
            assert isinstance(raised.value, smtplib.SMTPException)
        assert server.commands(b"MAIL") == server.commands(b"AUTH") == []
    assert server.received == []


def test_use_ssl_never_speaks_to_a_server_without_tls(
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer() as server:
        backend = make_backend(server, use_ssl=True)
        with pytest.raises(errors.TLSError):
            backend.send_messages([message()])
        assert server.commands(b"MAIL") == server.commands(b"EHLO") == []


INJECTED = b"250-evil\r\n250-SIZE 5\r\n250 AUTH PLAIN\r\n"


@pytest.fixture
def injecting(server_tls: ssl.SSLContext) -> Iterator[ScriptedServer]:
    """A server in front of which somebody adds plaintext to the STARTTLS reply."""
    script: Script = {"starttls": b"220 go\r\n" + INJECTED}
    with ScriptedServer(scripts=(script,), tls=server_tls, extensions=()) as server:
        yield server


def test_plaintext_behind_the_starttls_reply_is_no_answer(
    injecting: ScriptedServer, cafile: Path, make_backend: MakeBackend
) -> None:
    backend = make_backend(injecting, use_tls=True, ssl_cafile=str(cafile))
    assert backend.send_messages([message()]) == 1
    assert len(injecting.commands(b"EHLO")) == 2
    assert injecting.commands(b"MAIL") == [b"MAIL FROM:<from@example.com>"]
    assert [received.tls for received in injecting.received] == [True]


def test_plaintext_behind_the_starttls_reply_gets_no_password(
    injecting: ScriptedServer, cafile: Path, make_backend: MakeBackend
) -> None:
    options = {"use_tls": True, "ssl_cafile": str(cafile)}
    login = {"username": USERNAME, "password": PASSWORD}
    backend = make_backend(injecting, **options, **login)
    with pytest.raises(errors.NotSupported, match="AUTH is not offered"):
        backend.send_messages([message()])
    assert injecting.commands(b"AUTH") == []


def test_what_is_half_renewed_leaves_the_context_as_it_was(files: Files) -> None:
    options = {"certfile": str(files.certfile), "keyfile": str(files.keyfile)}
    context = client_context(**options)
    files.keyfile.write_text("half a key")
    assert client_context(**options) is context
