"""The exceptions of the client API. The original error of the network, of TLS or of JSON is the cause of each."""

from __future__ import annotations

from typing import Any

__all__ = [
    "AccessDenied",
    "AuthenticationFailed",
    "CancelledException",
    "CommunicationError",
    "HarpException",
    "NotSupported",
    "RateLimited",
    "RemoteError",
    "RemoteException",
    "RequestRefused",
]


class HarpException(Exception):
    """Base class of all exceptions of this package. Spec: docs/client-api.md, Exceptions."""


class CommunicationError(HarpException):
    """The peer cannot be reached, closed too early or violated the protocol. Spec: docs/client-api.md, Exceptions."""


class NotSupported(CommunicationError):
    """The dispatcher is too old for the request, or probably is. Spec: docs/client-api.md, Exceptions."""


class CancelledException(HarpException):
    """The job has no result because it was cancelled. Spec: docs/client-api.md, Exceptions."""


class _Reported(HarpException):
    """An error that the peer reported: identifier of its kind, complete message, and any JSON value or None."""

    def __init__(self, type: str, message: str, data: Any = None) -> None:
        super().__init__(type, message, data)
        self.type = type
        self.message = message
        self.data = data

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type


class RemoteException(_Reported):
    """The procedure raised an exception: `type` is the name of its class. Spec: docs/client-api.md, Exceptions."""


class RemoteError(_Reported):
    """The call failed or was stopped, or the job is unknown, or a request id was reused. Spec: docs/protocol.md."""


class RequestRefused(CommunicationError, _Reported):
    """The dispatcher refused the request; this is never how a job ended. Spec: docs/client-api.md, Exceptions."""

    #: Seconds until another attempt can succeed, where the dispatcher has reported them; otherwise None.
    retry_after: float | None = None


class AuthenticationFailed(RequestRefused):
    """The dispatcher does not accept the token, for example a revoked one. Spec: docs/client-api.md, TLS and tokens."""


class AccessDenied(RequestRefused):
    """No rule of the dispatcher allows the request. Spec: docs/client-api.md, TLS and tokens."""


class RateLimited(RequestRefused):
    """The request exceeds a limit; `retry_after`: seconds to wait. Spec: docs/client-api.md, TLS and tokens."""
