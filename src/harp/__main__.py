"""The program `harp`, also as ``python -m harp``."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the program and return its exit code. Ctrl-C ends it without a traceback also while its modules load."""
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else a shell has it ignored
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from harp.cli import main as run

    if is_usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
