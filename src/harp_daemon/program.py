"""What the command lines of the daemons share: the version, numbers, and a write that fails."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from harp import __version__

#: Maximum number of an option: functions of the system reject more than 25 days in seconds.
_MOST = 1_000_000
NOT_WRITTEN = 3  #: The exit status of a program whose output cannot be written.


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--version``."""
    parser.add_argument("--version", action="version", version=f"{parser.prog} {__version__}", help="print the version")


def parse_number(text: str) -> float:
    """Return the number of an option, from 0 to a million. Raises `ArgumentTypeError`."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= _MOST:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to {_MOST}, got {text!r}")
    return number


@contextmanager
def written_output(program: str) -> Iterator[None]:
    """Flush the output of the block; exit with `NOT_WRITTEN` if this fails, and with 0 if the reader has closed it."""
    if sys.stdout is None:  # it is closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the exit
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no data is written at the exit
        if isinstance(error, BrokenPipeError):
            raise SystemExit(0) from None
        print(f"{program}: cannot write the output: {error.strerror}", file=sys.stderr)
        raise SystemExit(NOT_WRITTEN) from None
