"""Signals in a worker: the supervisor's signals raise exceptions in the procedure's code and nowhere else.

While an exception would do harm, within a line or outside the procedure, signals are deferred. The signal mask cannot
do that: a signal that another thread receives raises in the main thread all the same.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # without the enumerations of `signal`
import os

from harpd.proc import Cancelled, TimeLimit
from harpd.processes.prctl import never_dump_core

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

#: The signals of calls.
CALL_SIGNALS = (_signal.SIGXCPU, _signal.SIGTERM)


class SignalGuard:
    """Turns the signals of calls into exceptions. Between `defer` and `deliver`, it stores the last signal instead.

    Signals are deferred at first. The zygote installs the handlers, so that no worker has to.
    """

    def __init__(self) -> None:
        self._deferrals = 1
        self._deferred: int | None = None

    def install(self) -> None:
        """Install the handlers."""
        for number in CALL_SIGNALS:
            _signal.signal(number, self._handle)

    def forget(self) -> None:
        """Forget the signal that is stored: it was sent to the zygote, before it forked this process."""
        self._deferred = None

    def defer(self) -> None:
        """Defer signals until `deliver` is called as often as this method."""
        self._deferrals += 1

    def deliver(self) -> None:
        """End a deferral; raise the exception of a signal that was deferred."""
        self._deferrals -= 1
        if self._deferred is not None and not self._deferrals:
            number, self._deferred = self._deferred, None
            self._handle(number)

    def _handle(self, number: int, frame: FrameType | None = None) -> None:
        if self._deferrals:
            self._deferred = number
        elif number == _signal.SIGXCPU:
            raise TimeLimit("the call's time is over")
        else:
            raise Cancelled("the call was cancelled")

    def exit_with(self, interruption: TimeLimit | Cancelled) -> NoReturn:
        """End this process by the signal of this exception: the supervisor knows which signals it has sent."""
        number = _signal.SIGXCPU if isinstance(interruption, TimeLimit) else _signal.SIGTERM
        never_dump_core()
        _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
        os._exit(1)
