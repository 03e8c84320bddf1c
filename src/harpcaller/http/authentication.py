"""Who sends a request: by a token, by the cookie of a session, by a certificate, or as a user of a Unix socket.

The first of these that a request has decides: a wrong token is refused, even beside a valid cookie. Nobody else gets
anything but what is public. Each proof can become void later, when a token is revoked or a session ends: requests in
progress are then ended, see `HTTPService.watch`.

Spec: docs/http-api.md, Authentication.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from hmac import compare_digest
from typing import TYPE_CHECKING

from harpcaller.access import AuthError
from harpcaller.access.client import Client
from harpcaller.http.guards import check_origin
from harpcaller.http.proofs import KnownToken, Proof

if TYPE_CHECKING:
    from starlette.requests import Request

    from harpcaller.http.operations import APIRequest
    from harpcaller.http.service import HTTPService

PLAIN_COOKIE, SECURE_COOKIE = "harp", "__Host-harp"  #: The names of the cookie without and with TLS.
_BEARER = re.compile(r"Bearer +(\S{1,200})", re.IGNORECASE)
_HINT = "on the dispatcher's machine, `harpcallerd token add NAME --role=operator` makes a token"
_NO_PROOF = f"the request needs the header `Authorization: Bearer TOKEN`, or the cookie of a session; {_HINT}"


class NoProof(AuthError):
    """A request without anything that could prove who its client is."""


async def authenticate(request: Request, service: HTTPService) -> Proof:
    """Return the proof of a request. Raises `AuthError`, and `CrossOrigin` if a foreign page may have caused it."""
    header = request.headers.get("authorization")
    if header is not None and (known := _repeat_token(request, header, service)) is not None:
        return known
    connection = await identify_connection(request, service)
    find_connection_error = _watch_connection(request, connection, service)
    cookie = cookie_of(request, service)
    if (header is not None or cookie is not None) and find_connection_error() is not None:
        connection = replace(connection, principals=connection.principals[-1:])  # the other proof counts alone
        find_connection_error = _watch_connection(request, connection, service)
    if header is not None:
        if (found := _BEARER.fullmatch(header)) is None:
            raise AuthError(f'Authorization: expected "Bearer TOKEN"; {_HINT}')
        client, token = service.identities().of_token(connection, found[1])

        def find_token_error() -> str | None:
            tokens = service.identities().tokens
            is_current = tokens is not None and tokens.is_current(token)
            return find_connection_error() if is_current else "the token was revoked, or has expired"

        proof = Proof(client, find_token_error)
        if not connection.listener.startswith("unix:"):  # the groups of its user may change
            request.state.connection.token_proof = KnownToken(header.encode("latin-1"), token, proof)
        return proof
    check_request_origin(request, service)
    if cookie is not None:
        return _of_session(connection, cookie, service, find_connection_error)
    if len(connection.principals) == 1:
        raise NoProof(_NO_PROOF)
    if (error := find_connection_error()) is not None:
        raise AuthError(error)
    return Proof(replace(connection, authenticated=True), find_connection_error)


def _watch_connection(request: Request, client: Client, service: HTTPService) -> Callable[[], str | None]:
    """Return a function that returns why what a connection proves of a client is void; None: it is not."""
    bare: Client = request.state.client
    find_certificate_error: Callable[[], str | None] = request.state.connection.find_error

    def find_error() -> str | None:
        if len(client.principals) == 1:  # it proves nothing
            return None
        if client.listener.startswith("unix:"):
            return service.identities().find_user_error(bare, client.principals)
        return find_certificate_error()

    return find_error


def _repeat_token(request: Request, header: str, service: HTTPService) -> Proof | None:
    """Return the proof of the last request of the connection with a token, if this one has the same; else None."""
    known: KnownToken | None = request.state.connection.token_proof
    if known is None or not compare_digest(known.header, header.encode("latin-1")):
        return None
    if known.proof.find_error() is not None:
        return None
    service.identities().confirm_token(known.proof.client, known.token)
    return known.proof


def _of_session(
    connection: Client, cookie: str, service: HTTPService, find_connection_error: Callable[[], str | None]
) -> Proof:
    sessions = service.sessions
    session = sessions.find(cookie)
    if session is None:
        raise AuthError("the session has ended; log in again")
    token = sessions.get_token(session)
    roles = session.roles if token is None else token.roles
    principals = (session.principal, *connection.principals)
    client = replace(connection, principals=principals, authenticated=True, roles=roles)

    def find_error() -> str | None:
        present = sessions.get_token(session)
        is_same = present is None or present.roles == roles
        is_valid = sessions.is_current(session) and is_same
        return find_connection_error() if is_valid else "the session has ended; log in again"

    return Proof(client, find_error, session)


async def identify_connection(request: Request, service: HTTPService) -> Client:
    """Return the client with what its connection proves: its certificate, or the user of a Unix socket."""
    client: Client = request.state.client
    if client.listener.startswith("unix:"):
        identities = service.identities()
        client = identities.of_user(client) or await identities.look_up_user(client)
    return replace(client, needs_role=True)


def check_request_origin(request: Request, service: HTTPService) -> None:
    """Raise `CrossOrigin` if a foreign page may have caused a request without a token."""
    scheme = "https" if is_secure(request, service) else "http"
    has_cookie = cookie_of(request, service) is not None
    check_origin(request.method, scheme, request.headers, has_cookie)


def is_secure(request: Request, service: HTTPService) -> bool:
    """Return whether the browser speaks TLS with the dispatcher, or with a proxy in front of it."""
    return request.url.scheme == "https" or service.settings.behind_proxy


def cookie_name(request: Request, service: HTTPService) -> str:
    """Return the name of the cookie. With TLS, no other server of the same domain can set one of this name."""
    return SECURE_COOKIE if is_secure(request, service) else PLAIN_COOKIE


def cookie_of(request: Request, service: HTTPService) -> str | None:
    """Return the secret in the cookie of a request; None: it has no cookie of a session."""
    return request.cookies.get(cookie_name(request, service))


def repeat_authentication(request: APIRequest) -> Callable[[], Awaitable[bool]]:
    """Return a function that returns whether the client of a request still has the proof of its identity."""
    proof: Proof = request.http.state.proof

    async def is_same() -> bool:
        return proof.find_error() is None

    return is_same
