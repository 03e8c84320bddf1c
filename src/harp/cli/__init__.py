"""The program `harp`: submit calls, manage jobs, call a harpd directly. Results go to standard output as JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from harp.cli.arguments import make_parser
from harp.cli.commands import COMMANDS
from harp.cli.output import Exit, print_error
from harp.errors import HarpException

__all__ = ["Exit", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    sys.setrecursionlimit(10_000)  # values may be nested as deeply as the protocol allows
    options = make_parser(__doc__, COMMANDS).parse_args(arguments)
    try:
        return Exit(options.run(options))
    except HarpException as error:
        return print_error(error)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
