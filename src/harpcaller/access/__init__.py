"""Who may do what: the identities of clients, their tokens, and the refusals of their requests."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio  # the commands of harpcallerd should not wait for this import


class Refusal(Exception):
    """A request that is refused because of its client."""

    recorded: asyncio.Future[None] | None = None  #: The entry of the audit file, which the reply waits for.
    fields: Mapping[str, Any] = MappingProxyType({})  #: More fields of the entry, such as the rule.


class AuthError(Refusal):
    """A request whose `auth` proves no identity. The message is for the client.

    `reason` is for the log, and `token` the name in the token, if it has the form of one: neither contains its secret.
    `delay`: seconds until the request may be refused.
    """

    def __init__(self, message: str, reason: str = "", token: str = "", delay: float = 0.0) -> None:
        super().__init__(message)
        self.reason = reason or message
        self.token = token
        self.delay = delay


class AccessDenied(Refusal):
    """An action that no rule allows. The message is for the client."""


class RateLimited(Refusal):
    """A request above a limit of its client.

    `retry_after`: seconds until another attempt can succeed; None: no attempt can.
    """

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
