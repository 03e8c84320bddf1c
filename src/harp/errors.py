"""The exceptions of the client API, and nothing else.

Every exception that `harp` raises derives from `HarpException`. `harp._net.sockets` maps errors of the network, of TLS
and of JSON to them; the original is the cause.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CancelledException", "CommunicationError", "HarpException", "RemoteError", "RemoteException"]


class HarpException(Exception):
    """Base class of all exceptions of this package. Spec: docs/client-api.md, Exceptions."""


class CommunicationError(HarpException):
    """The peer cannot be reached, closed the connection too early, or violated the protocol.

    The message contains host, port and cause. Spec: docs/client-api.md, Exceptions.
    """


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
    """The remote procedure raised an exception: `type` is the name of its class, `message` its text.

    From harpd, `data` is ``{"class": NAME, "module": NAME}``. Spec: docs/client-api.md, Exceptions.
    """


class RemoteError(_Reported):
    """The call failed or was stopped, or the request was refused.

    docs/protocol.md lists each `type` with cause and remedy. Spec: docs/client-api.md, Exceptions.
    """
