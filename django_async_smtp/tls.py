"""SSL contexts, built once and kept until a file behind them changes."""

from __future__ import annotations

import logging
import os
import ssl
import threading
from pathlib import Path
from typing import NamedTuple

from .logs import log


class _Files(NamedTuple):
    certfile: str | None
    keyfile: str | None
    cafile: str | None


_Version = tuple[tuple[int, int, int], ...]

_contexts: dict[_Files, tuple[_Version, ssl.SSLContext]] = {}
_lock = threading.Lock()


def client_context(
    certfile: str | None = None, keyfile: str | None = None, cafile: str | None = None
) -> ssl.SSLContext:
    """
    Return a context that verifies the server's certificate and host name.

    Building one takes 70 to 100 ms of CPU with a system's CA bundle. The same one
    is returned until a file has another modification time.

    :param certfile: the client's certificate chain, in PEM.
    :param keyfile: its key, where it is not in ``certfile``.
    :param cafile: the issuers to trust, in PEM, instead of the system's.
    :raises OSError: a file cannot be read (``ssl.SSLError``: or used), and could not
        before.
    """
    files = _Files(certfile or None, keyfile or None, cafile or None)
    with _lock:
        known = _contexts.get(files)
        try:
            version = _version(files)
            if known is None or known[0] != version:
                known = _contexts[files] = version, _build(files)
        except OSError as error:
            if known is None:
                raise
            # Half renewed: a certificate and its key are not replaced as one.
            log(logging.WARNING, "TLS goes on with files read before: %s", error)
        return known[1]


def _build(files: _Files) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=files.cafile)
        if files.certfile or files.keyfile:
            # With a password, lest OpenSSL asks the terminal for the one of the key.
            context.load_cert_chain(files.certfile or "", files.keyfile, password="")
    except OSError as error:
        names = ", ".join(f"ssl_{k}={v!r}" for k, v in files._asdict().items() if v)
        raise type(error)(error.errno, f"{error}: cannot use {names}") from error
    return context


def _version(files: _Files) -> _Version:
    cafile = files.cafile or ssl.get_default_verify_paths().cafile
    found = []
    for name in (files.certfile, files.keyfile, cafile):
        if name:
            status = Path(name).stat()
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def _renew_lock_in_child() -> None:
    # Another thread of the parent may have held it.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock_in_child)
