"""The program's output and its exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

from harp._core.outcomes import Result
from harp.errors import CancelledException, CommunicationError, HarpException, RemoteError, RemoteException


class Exit(IntEnum):
    """The exit codes; `harp --help` explains them."""

    OK = 0
    RAISED = 1
    USAGE = 2
    FAILED = 3
    CANCELLED = 4
    NOT_FINISHED = 5
    UNREACHABLE = 6
    INTERRUPTED = 130


_EXITS = (
    (RemoteException, Exit.RAISED),
    (RemoteError, Exit.FAILED),
    (CancelledException, Exit.CANCELLED),
    (CommunicationError, Exit.UNREACHABLE),
    (HarpException, Exit.USAGE),
)


def print_values(*values: Any) -> Exit:
    """Print each value as a line of JSON."""
    return print_stream(values)


def print_stream(values: Iterable[Any]) -> Exit:
    """Print each value as a line of JSON as soon as it arrives."""
    for value in values:
        print(json.dumps(value.value if isinstance(value, Result) else value), flush=True)
    return Exit.OK


def print_error(error: HarpException) -> Exit:
    """Print an error and return its exit code."""
    data = getattr(error, "data", None)
    print(f"harp: {error}" if data is None else f"harp: {error} {json.dumps(data)}", file=sys.stderr)
    return next(code for kind, code in _EXITS if isinstance(error, kind))
