"""How clients prove who they are: by a token, by a certificate, as a user of a Unix socket, or not at all.

Spec: docs/access.md, Principals.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from harp_daemon.file_modes import describe_reader
from harp_daemon.server_tls import ServerTLS, server_context
from harp_daemon.settings import ConfigError
from harp_daemon.sockets import Listener
from harpcaller.access import AuthError
from harpcaller.access.accounts import Accounts
from harpcaller.access.attempts import FailedAttempts, peer_of
from harpcaller.access.client import Client
from harpcaller.access.tokens import Token, TokenError, TokenStore, parse_token, read_tokens
from harpcaller.config import Config

log = logging.getLogger(__name__)

#: The kinds of alternative names that are principals, and the form of each. Rules tell the kinds apart by their forms
#: only, and an authority may let clients choose their addresses and URIs.
_NAME_FORMS = {"DNS": re.compile(r"[^@:/]+"), "email": re.compile(r"[^@:/]+@[^@:/]+"), "URI": re.compile(r"[^:/]+:.+")}
#: The names that are principals: rules and logs show them as they are.
_NAME = re.compile(r"[!-~]{1,255}", re.ASCII)
_MAX_NAMES = 100

#: Why proofs become void although nobody has revoked them. A client may connect again.
CERTIFICATES_CHANGED = "the certificates that the dispatcher accepts have changed; connect again"
CERTIFICATE_EXPIRED = "the certificate of the client has expired"
USER_CHANGED = "the name or the groups of the client's user have changed; connect again"


class Identities:
    """The proofs that a configuration accepts. Raises `ConfigError` if one of its files cannot be used.

    `before` are those before a reload: files that are the same stay open, so that no connection is closed.
    """

    def __init__(self, config: Config, before: Identities | None = None) -> None:
        self.config = config
        self.tls: ServerTLS | None = None  #: The TLS context of the listeners; None without TLS.
        self.tokens: TokenStore | None = None  #: None: there are no tokens.
        self._accounts: Accounts = before._accounts if before is not None else Accounts()
        self._attempts: FailedAttempts = before._attempts if before is not None else FailedAttempts()
        if (tls := config.tls) is not None:
            files = tls.certfile, tls.keyfile, tls.minimum, tls.client_ca_file, tls.crl_file
            where = f"{config.file}: tls"
            if (reason := describe_reader(tls.keyfile)) is not None:
                raise ConfigError(f"{where}.keyfile: {reason}")
            if before is not None and before.config.tls == tls and before.tls is not None:
                server_context(where, *files)  # raises if the files are invalid now
                self.tls = before.tls
            else:
                self.tls = ServerTLS(where, *files)
        if (file := config.tokens_file) is not None:
            try:
                if before is not None and before.tokens is not None and before.tokens.file == file:
                    read_tokens(file)
                    self.tokens = before.tokens
                else:
                    self.tokens = TokenStore(file)
            except TokenError as error:
                raise ConfigError(f"{config.file}: tokens_file: {error}") from error

    def refresh(self) -> None:
        """Read changed files again."""
        if self.tls is not None:
            _ = self.tls.context
        if self.tokens is not None:
            self.tokens.refresh()

    def of_user(self, client: Client) -> Client | None:
        """Return a client of a Unix socket with the principals of its user; None: `look_up_user` must be awaited."""
        principals = self._accounts.get_cached(_user_of(client))
        return None if principals is None else _with(client, principals)

    async def look_up_user(self, client: Client) -> Client:
        """Return a client of a Unix socket with the principals of its user."""
        uid = _user_of(client)
        try:
            return _with(client, await asyncio.shield(self._accounts.look_up(uid)))
        except OSError as error:
            log.warning("cannot look up user", extra={"uid": uid, "reason": error.strerror})
            return _with(client, (f"uid:{uid}",))

    def find_user_error(self, client: Client, principals: tuple[str, ...]) -> str | None:
        """Return why the principals of a Unix socket's client are void now; None: they are not.

        They were found when it connected. They are looked up again, in a thread, at most every few seconds.
        """
        uid = _user_of(client)
        present = self._accounts.get_cached(uid)
        if present is None:
            self._accounts.renew(uid)
            return None
        return None if _with(client, present).principals == principals else USER_CHANGED

    def of_token(self, client: Client, text: str) -> tuple[Client, Token]:
        """Return a client with the principal of its token, and the token. Raises `AuthError`."""
        if self.tokens is None:
            raise AuthError("this dispatcher has no tokens: tokens_file is not set")
        name, digest = parse_token(text) or ("", "")
        token = self.tokens.find(name, digest) if digest else None
        if not _is_private(client):
            if token is not None:
                log.warning("token sent in clear text; revoke it", extra={"token": name, "client": client.peer})
            raise AuthError(
                "a token is accepted over TLS, Unix sockets and from loopback addresses only, because others can read "
                "it on the way; use an address of listen that begins with tls:, and a new token",
                token=name,
            )
        peer = peer_of(client)
        if token is None:
            delay = self._attempts.record_failure(peer, name)
            reason = "no such token, or its secret is wrong, or it has expired" if digest else "it is not a token"
            raise AuthError("the token is unknown, revoked or expired", reason, name, delay)
        self.confirm_token(client, token)
        return replace(_with(client, (f"token:{name}",)), authenticated=True, roles=token.roles), token

    def confirm_token(self, client: Client, token: Token) -> None:
        """Note that a client has sent a right token."""
        self._attempts.reset(peer_of(client), token.name)
        if self.tokens is not None:
            self.tokens.record_use(token)


class UnreadableCertificate(Exception):
    """A certificate of a client with a name that Python cannot decode."""


def anonymous(peer: str, listener: Listener) -> Client:
    """Return a client that has proven nothing. `peer` is its address or user, for logs."""
    return Client((f"anonymous@{listener.name}",), listener.name, peer)


def find_expiry(connection: ssl.SSLSocket | ssl.SSLObject) -> float | None:
    """Return the Unix time at which the certificate that a client has shown expires; None: it has shown none.

    Raises `UnreadableCertificate`.
    """
    certificate = _read_certificate(connection)
    return ssl.cert_time_to_seconds(str(certificate["notAfter"])) if certificate else None


def certified(client: Client, connection: ssl.SSLSocket | ssl.SSLObject) -> Client:
    """Return a client with the names of the certificate that it has shown, if any. Raises `UnreadableCertificate`."""
    certificate = _read_certificate(connection)
    return replace(_with(client, _names(certificate)), authenticated=True) if certificate else client


def _read_certificate(connection: ssl.SSLSocket | ssl.SSLObject) -> dict[str, Any] | None:
    try:
        return connection.getpeercert()
    except (ValueError, ssl.SSLError) as error:
        raise UnreadableCertificate("the certificate of the client has a name that is not valid text") from error


def _with(client: Client, principals: tuple[str, ...]) -> Client:
    """Return a client with stronger principals before its own."""
    return replace(client, principals=(*principals, *client.principals))


def _names(certificate: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the principals of a certificate, as `getpeercert` shows it, each once."""
    names = [
        name.lower() if kind == "DNS" else name
        for kind, name in certificate.get("subjectAltName", ())
        if kind in _NAME_FORMS and _NAME_FORMS[kind].fullmatch(name) and _NAME.fullmatch(name)
    ]
    return tuple(f"cert:{name}" for name in dict.fromkeys(names[:_MAX_NAMES]))


def _user_of(client: Client) -> int:
    return int(client.peer.removeprefix("uid:"))


def _is_private(client: Client) -> bool:
    """Return whether nobody can read what the client sends on its way."""
    if client.listener.startswith(("tls:", "unix:")):
        return True
    host = client.peer.rpartition(":")[0].strip("[]")
    return ip_address(host.partition("%")[0]).is_loopback
