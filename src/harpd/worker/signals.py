"""Signals in a worker: the supervisor's signals raise exceptions in the procedure's code and nowhere else.

While an exception would do harm, within a line or after the procedure's end, signals are deferred. The signal mask
cannot do that: a signal that another thread receives raises in the main thread all the same.
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

_EXCEPTIONS: Mapping[int, tuple[type[BaseException], str]] = {
    signal.SIGXCPU: (TimeLimit, "the call's time is over"),
    signal.SIGTERM: (Cancelled, "the call was cancelled"),
}

#: The guard that handles the signals of this process.
_active: SignalGuard | None = None


def install() -> None:
    """Install the handlers in the zygote, so that no worker has to. They have no effect there."""
    for number in _EXCEPTIONS:
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _active is not None:
        _active.handle(number)


class SignalGuard:
    """Turns signals into exceptions. Between `defer` and `deliver`, it stores the last signal instead."""

    def __init__(self) -> None:
        self._deferrals = 0
        self._deferred: int | None = None

    def activate(self) -> None:
        """Handle the signals of this process from now on."""
        global _active
        _active = self

    def defer(self) -> None:
        """Defer signals until `deliver` is called as often as this method."""
        self._deferrals += 1

    def deliver(self) -> None:
        """End a deferral; raise the exception of a signal that was deferred."""
        self._deferrals -= 1
        if self._deferred is not None and not self._deferrals:
            number, self._deferred = self._deferred, None
            self.handle(number)

    def handle(self, number: int) -> None:
        """Raise the exception of a signal, now or when signals are delivered."""
        if self._deferrals:
            self._deferred = number
            return
        kind, message = _EXCEPTIONS[number]
        raise kind(message)

    def exit_with(self, interruption: TimeLimit | Cancelled) -> NoReturn:
        """End this process by the signal of this exception: the supervisor knows which signals it has sent."""
        number = signal.SIGXCPU if isinstance(interruption, TimeLimit) else signal.SIGTERM
        never_dump_core()
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
        os._exit(1)
