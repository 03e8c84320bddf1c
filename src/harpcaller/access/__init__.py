"""Who may do what: the identities of clients, their tokens, and the refusals of their requests."""

from __future__ import annotations


class AuthError(Exception):
    """A request whose `auth` proves no identity. The message is for the client; it contains no part of the token."""


class AccessDenied(Exception):
    """An action that no rule allows. The message is for the client."""


class RateLimited(Exception):
    """A request above a limit of its client. `retry_after`: seconds until another attempt can succeed."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
