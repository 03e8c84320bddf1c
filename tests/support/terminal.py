"""A program on a terminal of its own: what a person would see and type."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

DEADLINE = 60.0
_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>()][0-9A-Za-z]?|\r")


class Terminal:
    """A context manager that runs a command on a terminal of a size.

    Args:
        command: the program and its arguments.
        environment: its whole environment.
        columns: the width of the terminal.
        lines: its height.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], columns: int = 140, lines: int = 40
    ) -> None:
        self._main, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        sized = {**environment, "COLUMNS": str(columns), "LINES": str(lines), "TERM": "xterm-256color"}
        try:
            # A session of its own, whose terminal this is.
            own = ["setsid", "--ctty", *command]
            self._process = subprocess.Popen(own, stdin=other, stdout=other, stderr=other, env=sized)
        finally:
            os.close(other)
        #: Everything that was printed, with control sequences.
        self.printed = ""

    def press(self, text: str) -> None:
        """Type a text."""
        os.write(self._main, text.encode())

    @property
    def text(self) -> str:
        """Everything that was printed, without control sequences."""
        return _SEQUENCE.sub("", self.printed)

    def read_until(self, expected: str, since: int = 0) -> str:
        """Wait until a text is printed behind a number of characters of `text`; return the text from there on."""
        end = time.monotonic() + DEADLINE
        while expected not in self.text[since:]:
            remaining = end - time.monotonic()
            assert remaining > 0, f"expected {expected!r}, got {self.text[since:]!r}"
            assert self._read(remaining), f"expected {expected!r}, it ended after {self.text[since:]!r}"
        return self.text[since:]

    def read_all(self) -> str:
        """Wait until the program has ended; return `text`."""
        while self._read(DEADLINE):
            pass
        self._process.wait(DEADLINE)
        return self.text

    def _read(self, seconds: float) -> bool:
        """Read more; return False at the end."""
        if not select.select([self._main], [], [], seconds)[0]:
            raise AssertionError(f"nothing was printed for {seconds:.0f} s after {self.text!r}")
        try:
            data = os.read(self._main, 65536)
        except OSError:  # the program has closed the terminal
            return False
        self.printed += data.decode("utf-8", "replace")
        return bool(data)

    def interrupt(self) -> int:
        """Press Ctrl-C; return the exit status."""
        self.press("\x03")
        self.read_all()
        return self._process.returncode

    @property
    def status(self) -> int | None:
        """The exit status."""
        return self._process.poll()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._main)
