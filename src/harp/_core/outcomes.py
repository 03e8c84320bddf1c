"""The outcomes of calls, as Python values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

from harp.errors import RemoteError, RemoteException
from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned


@final
class _Sentinel:
    """A unique value that stays the same object when it is copied or pickled."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text

    def __repr__(self) -> str:
        return self._text

    def __reduce__(self) -> str:
        return self._name


#: Returned instead of a result while the call has not ended. Spec: docs/client-api.md, RemoteCall.
CALL_NOT_FINISHED: Final = _Sentinel("CALL_NOT_FINISHED", "<CallNotFinished>")

#: Returned as the result of a call that was cancelled. Spec: docs/client-api.md, RemoteCall.
CALL_CANCELLED: Final = _Sentinel("CALL_CANCELLED", "<CallCancelled>")


@dataclass(frozen=True, slots=True)
class Result:
    """The end result of a streaming procedure, the last item of a `HarpStreamIterator`.

    Args:
        value: the procedure's return value, any JSON value.

    Spec: docs/client-api.md, Direct calls.
    """

    value: Any


def error_of(report: Failed) -> RemoteError:
    """Return the exception for an error that the dispatcher or harpd reports."""
    return RemoteError(report.type, report.message, report.data)


def outcome_of(end: End) -> Any:
    """Return the value of `result()` for an end."""
    match end:
        case Returned(result):
            return result
        case Raised(kind, message, data):
            return RemoteException(kind, message, data)
        case Failed():
            return error_of(end)
        case Cancelled():
            return CALL_CANCELLED
