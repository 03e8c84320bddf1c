"""The outcomes of calls, as Python values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from harp.errors import RemoteError, RemoteException
from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned


class _Sentinel(Enum):
    """Unique values, which stay the same objects when they are copied or pickled."""

    CALL_NOT_FINISHED = "<CallNotFinished>"
    CALL_CANCELLED = "<CallCancelled>"

    def __str__(self) -> str:
        return self.value

    __repr__ = __str__


#: Returned instead of a result while the call has not ended. Spec: docs/client-api.md, RemoteCall.
CALL_NOT_FINISHED: Final = _Sentinel.CALL_NOT_FINISHED

#: Returned as the result of a call that was cancelled. Spec: docs/client-api.md, RemoteCall.
CALL_CANCELLED: Final = _Sentinel.CALL_CANCELLED


@dataclass(frozen=True, slots=True)
class Result:
    """The return value of a streaming procedure, any JSON value: the last item of a `HarpStreamIterator`.

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
