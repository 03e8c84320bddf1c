"""The ends of a call: the closing lines that both protocols share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, TypeAlias

from harp.protocol.schema import Payload, WireObject


class Returned(WireObject):
    """The procedure returned; `result` is its value."""

    result: Payload


class Raised(WireObject):
    """The procedure raised an exception."""

    type: Annotated[str, "exception.type"]
    message: Annotated[str, "exception.message"]
    data: Annotated[Payload, "exception.data"] = None


class Failed(WireObject):
    """The call could not be carried out or was cut short. Also the rejection of a request."""

    type: Annotated[str, "error.type"]
    message: Annotated[str, "error.message"]
    data: Annotated[Payload, "error.data"] = None


class Cancelled(WireObject):
    """The call was cancelled before it returned."""

    CONSTANTS: ClassVar = {"cancelled": True}


End: TypeAlias = Returned | Raised | Failed | Cancelled

#: The ends of a procedure that was called, by the key that identifies their line.
CALL_ENDS: Mapping[str, type[Returned | Raised | Failed]] = {"result": Returned, "exception": Raised, "error": Failed}
