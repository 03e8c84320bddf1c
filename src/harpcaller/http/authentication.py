"""How a client of the HTTP API proves who it is. Spec: docs/http-api.md, Authentication."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from harpcaller.access import AuthError
from harpcaller.access.client import Client

if TYPE_CHECKING:
    from starlette.requests import Request

    from harpcaller.http.operations import APIRequest
    from harpcaller.http.service import HTTPService

_BEARER = re.compile(r"Bearer +(\S{1,200})", re.IGNORECASE)


async def authenticate(request: Request, service: HTTPService) -> Client:
    """Return the client of a request. Raises `AuthError`."""
    client: Client = request.state.client
    header = request.headers.get("authorization")
    if header is None:
        raise AuthError("the request needs an Authorization header with a bearer token")
    found = _BEARER.fullmatch(header)
    if found is None:
        raise AuthError('Authorization: expected "Bearer TOKEN"')
    return service.identities().of_token(client, found[1])[0]


def repeat_authentication(request: APIRequest) -> Callable[[], Awaitable[bool]]:
    """Return a function that returns whether the client of a request is still the same."""

    async def is_same() -> bool:
        return await authenticate(request.http, request.service) == request.client

    return is_same
