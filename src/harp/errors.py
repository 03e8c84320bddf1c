"""The exceptions of the client API, and nothing else.

Everything that `harp` raises derives from `HarpException`. Errors of the network, of TLS and of JSON
are mapped to these once, where they come in; the original is kept as the cause.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CancelledException", "CommunicationError", "HarpException", "RemoteError", "RemoteException"]


class HarpException(Exception):
    """Base class of all exceptions of this package. Spec: docs/client-api.md, Exceptions."""


class CommunicationError(HarpException):
    """The peer could not be reached, closed too early, or did not speak the protocol.

    The message names host, port and cause. Spec: docs/client-api.md, Exceptions.
    """


class CancelledException(HarpException):
    """The job has no result because it was cancelled. Spec: docs/client-api.md, Exceptions."""


class _Reported(HarpException):
    """What the other side reported: a type, a message and perhaps data.

    Args:
        type: identifier of the kind of error, for example ``"unknown_host"`` or ``"ValueError"``.
        message: the complete message.
        data: any JSON value, None when the other side gave none.
    """

    def __init__(self, type: str, message: str, data: Any = None) -> None:
        super().__init__(type, message, data)
        self.type = type
        self.message = message
        self.data = data

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type


class RemoteException(_Reported):
    """The remote procedure raised an exception. Spec: docs/client-api.md, Exceptions.

    Args:
        type: name of the exception's class.
        message: the exception's text.
        data: any JSON value; from harpd ``{"class": NAME, "module": NAME}``. None when there is none.
    """


class RemoteError(_Reported):
    """The call could not be carried out or was cut short. Spec: docs/client-api.md, Exceptions.

    Args:
        type: the error type of the wire; docs/protocol.md lists each with its cause and cure.
        message: the complete message.
        data: any JSON value, None when there is none.
    """
