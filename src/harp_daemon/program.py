"""The output of a daemon's command line: its version, and a write that fails."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from harp import __version__

NOT_WRITTEN = 3  #: The exit status of a program whose output cannot be written.


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--version``."""
    parser.add_argument("--version", action="version", version=f"{parser.prog} {__version__}", help="print the version")


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
