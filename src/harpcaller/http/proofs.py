"""A client of the HTTP API, with how it has proven who it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from harpcaller.access.client import Client
from harpcaller.access.tokens import Token
from harpcaller.http.sessions import Session


class Proof(NamedTuple):
    """A client, and why its proof is void now; None: it is not."""

    client: Client
    find_error: Callable[[], str | None]
    session: Session | None = None


class KnownToken(NamedTuple):
    """What the last request of a connection with a right token has proven."""

    header: bytes  # of the request, with the token
    token: Token
    proof: Proof
