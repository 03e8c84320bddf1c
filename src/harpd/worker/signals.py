"""What the warden's signals do in a call's process: they raise in the procedure's code and nowhere else.

Where an exception would do harm, in the middle of a line or after the procedure's end, signals are held back. That
is not done by the signal mask: a signal that another thread takes raises in the main thread all the same.
"""

from __future__ import annotations

import os
import signal

from harpd.proc import Cancelled, TimeLimit
from harpd.processes.prctl import never_dump_core

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType
    from typing import NoReturn

__all__ = ["SignalGuard", "install"]

_RAISED: Mapping[int, tuple[type[BaseException], str]] = {
    signal.SIGXCPU: (TimeLimit, "the call's time is over"),
    signal.SIGTERM: (Cancelled, "the call was cancelled"),
}


#: What the signals of this process go to.
_current: SignalGuard | None = None


def install() -> None:
    """Install the handlers, in the process that calls are forked from: so no call has to. There they do nothing."""
    for number in _RAISED:
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _current is not None:
        _current.handle(number)


class SignalGuard:
    """Turns signals into exceptions. Between `hold` and `release` they wait."""

    def __init__(self) -> None:
        self._holding = 0
        self._waiting: int | None = None

    def activate(self) -> None:
        """From now on the signals raise in this process, once they are not blocked any more."""
        global _current
        _current = self

    def defer(self) -> None:
        """Let signals wait from now on, for good unless `release` follows."""
        self._holding += 1

    def deliver(self) -> None:
        """Let signals raise again; one that has waited does now."""
        self._holding -= 1
        if self._waiting is not None and not self._holding:
            number, self._waiting = self._waiting, None
            self.handle(number)

    def handle(self, number: int) -> None:
        """Raise what this signal means, now or when it may."""
        if self._holding:
            self._waiting = number
            return
        kind, message = _RAISED[number]
        raise kind(message)

    def exit_with(self, limit: TimeLimit | Cancelled) -> NoReturn:
        """End this process by the signal that raised: the warden knows whether it sent it."""
        number = signal.SIGXCPU if isinstance(limit, TimeLimit) else signal.SIGTERM
        never_dump_core()
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
        os._exit(1)
