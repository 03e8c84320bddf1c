"""What the warden's signals do in a call's process: they raise in the procedure's code and nowhere else.

Where an exception would do harm, in the middle of a line or after the procedure's end, signals are held back. That
is not done by the signal mask: a signal that another thread takes raises in the main thread all the same.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from types import FrameType
from typing import NoReturn

from harpd.prctl import never_dump_core
from harpd.proc import Cancelled, TimeLimit

__all__ = ["Limits"]

_RAISED: Mapping[int, tuple[type[BaseException], str]] = {
    signal.SIGXCPU: (TimeLimit, "the call's time is over"),
    signal.SIGTERM: (Cancelled, "the call was cancelled"),
}


class Limits:
    """Turns signals into exceptions. A context in which they wait; they are raised at its end."""

    def __init__(self) -> None:
        self._holding = 0
        self._waiting: int | None = None

    def install(self) -> None:
        """From now on the signals raise."""
        for number in _RAISED:
            signal.signal(number, self._take)

    def hold(self) -> None:
        """Let signals wait from now on, for good unless `__exit__` follows."""
        self._holding += 1

    def __enter__(self) -> None:
        self.hold()

    def __exit__(self, *_: object) -> None:
        self._holding -= 1
        if self._waiting is not None and not self._holding:
            number, self._waiting = self._waiting, None
            self._take(number, None)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._waiting = number
            return
        kind, message = _RAISED[number]
        raise kind(message)

    def die_of(self, limit: TimeLimit | Cancelled) -> NoReturn:
        """End this process by the signal that raised: the warden knows whether it sent it."""
        number = signal.SIGXCPU if isinstance(limit, TimeLimit) else signal.SIGTERM
        never_dump_core()
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
        os._exit(1)
