"""The certificate that a daemon shows to its clients, and the authorities by which it accepts theirs."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from harp_daemon.regular_files import open_regular
from harp_daemon.settings import ConfigError, set_minimum_version
from harp_daemon.watched_file import WatchedFile


class ServerTLS:
    """The TLS context of a server, whose files are read again when they change.

    The arguments are those of `server_context`. Raises `ConfigError` if it cannot be created.
    """

    def __init__(
        self,
        where: str,
        certfile: Path,
        keyfile: Path,
        minimum: str,
        client_ca_file: Path | None = None,
        crl_file: Path | None = None,
    ) -> None:
        self.files = [file for file in (certfile, keyfile, client_ca_file, crl_file) if file is not None]

        def load(_: bytes) -> ssl.SSLContext:
            try:
                return server_context(where, certfile, keyfile, minimum, client_ca_file, crl_file)
            except ConfigError as error:
                raise ValueError(str(error)) from error

        try:
            load(b"")  # its errors name the file
            self._context = WatchedFile(certfile, load, beside=self.files[1:])
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error

    @property
    def context(self) -> ssl.SSLContext:
        """The context for new connections, after a check for a change."""
        return self._context.value

    @property
    def version(self) -> int:
        """A number that changes with the files in use."""
        return self._context.version


def server_context(
    where: str,
    certfile: Path,
    keyfile: Path,
    minimum: str,
    client_ca_file: Path | None = None,
    crl_file: Path | None = None,
    readable_path: Callable[[Path], AbstractContextManager[Path]] = nullcontext,
) -> ssl.SSLContext:
    """Return the TLS context of a server. May block. Raises `ConfigError`; `where` is the file and the section.

    With `client_ca_file`, a client may show a certificate; one that is invalid ends the handshake. `crl_file` has the
    revocation lists of these authorities. There is no resumption of sessions, which would skip the check of a
    certificate. `readable_path` returns the path by which this process can read certificate and key.
    """
    files = {"certfile": certfile, "keyfile": keyfile, "client_ca_file": client_ca_file, "crl_file": crl_file}
    for key, file in files.items():
        try:
            if file is not None:
                with readable_path(file) as path:
                    os.close(open_regular(path))
        except OSError as error:
            raise ConfigError(f"{where}.{key}: {file}: {error.strerror}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION
    set_minimum_version(context, minimum)
    try:
        # The empty password makes a key with a passphrase fail; without it OpenSSL would prompt on the terminal.
        with readable_path(certfile) as certificate_path, readable_path(keyfile) as key_path:
            context.load_cert_chain(certificate_path, key_path, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            mismatch = f"{keyfile}: expected the key of {certfile}, got another certificate's key"
            raise ConfigError(f"{where}.keyfile: {mismatch}") from error
        expected = f"expected PEM files of a certificate and its key, got {certfile} and {keyfile}"
        raise ConfigError(f"{where}.certfile: {expected} ({_one_line(error)})") from error
    if client_ca_file is not None:
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
        context.verify_mode = ssl.CERT_OPTIONAL
        _load(context, f"{where}.client_ca_file", client_ca_file, "a PEM file of authorities")
    if crl_file is not None:
        authorities = context.cert_store_stats()["x509"]
        _load(context, f"{where}.crl_file", crl_file, "a PEM file of revocation lists")
        if context.cert_store_stats()["x509"] != authorities:
            # OpenSSL would accept them as authorities. The lists are signed, so others may be able to replace the file.
            raise ConfigError(f"{where}.crl_file: expected revocation lists only, got {crl_file} with certificates")
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def _load(context: ssl.SSLContext, where: str, file: Path, expected: str) -> None:
    try:
        context.load_verify_locations(file)
    except OSError as error:  # `ssl.SSLError` too
        raise ConfigError(f"{where}: expected {expected}, got {file} ({_one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
