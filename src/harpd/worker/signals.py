"""The supervisor's signals in a worker.

They raise exceptions in the procedure's code and nowhere else. While an exception would do harm, within a line or
outside the procedure, signals are deferred. The signal mask cannot do that: a signal that another thread receives
raises in the main thread all the same.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # without the enumerations of `signal`
import os

from harpd.proc import Cancelled, TimeLimit
from harpd.processes.prctl import never_dump_core

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

CALL_SIGNALS = (_signal.SIGXCPU, _signal.SIGTERM)


class SignalGuard:
    """Turns the signals of calls into exceptions. At first, and from `defer` to `deliver`, it stores the last."""

    def __init__(self) -> None:
        self._deferring = True
        self.deferred: int | None = None  #: The signal that is stored.
        self._redirected: Callable[[], None] | None = None
        self._redirected_signal: int | None = None

    def install(self) -> None:
        """Install the handlers: in the zygote, so that no worker has to."""
        for number in CALL_SIGNALS:
            _signal.signal(number, self._handle)

    def defer(self) -> None:
        """Defer signals until `deliver` is called."""
        self._deferring = True

    def deliver(self) -> None:
        """End the deferral; raise the exception of a signal that was deferred."""
        self._deferring = False
        if self.deferred is not None:
            number, self.deferred = self.deferred, None
            self._handle(number)

    def redirect(self, function: Callable[[], None]) -> None:
        """Call this function for the first signal from now on; only `end_redirection` raises its exception."""
        self._redirected = function

    def end_redirection(self) -> None:
        """Raise the exception of a signal that was redirected."""
        self._redirected = None
        if self._redirected_signal is not None:
            number, self._redirected_signal = self._redirected_signal, None
            self._handle(number)

    def _handle(self, number: int, frame: FrameType | None = None) -> None:
        if self._deferring:
            self.deferred = number
        elif self._redirected is not None and self._redirected_signal is None:
            self._redirected_signal = number
            self._redirected()
        elif number == _signal.SIGXCPU:
            raise TimeLimit("the call's time is over")
        else:
            raise Cancelled("the call was cancelled")


def exit_with(interruption: TimeLimit | Cancelled) -> NoReturn:
    """End this process by the signal of this exception, which the supervisor has sent."""
    number = _signal.SIGXCPU if isinstance(interruption, TimeLimit) else _signal.SIGTERM
    never_dump_core()
    _signal.signal(number, _signal.SIG_DFL)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(1)
