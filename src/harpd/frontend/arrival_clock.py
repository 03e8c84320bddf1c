"""When did received data arrive? The clock gives a time before the arrival, even after a suspension of the process.

Data that was sent to a suspended process is read after it continues. A request in this data is as old as the
suspension, and its dispatcher may have abandoned it. So a start that is delayed for too long must be recognised.

Each heartbeat records the time. Data that is read in the same or in the next turn of the event loop may have arrived
before it: the present turn may have looked for data before the heartbeat. Data of later turns arrived after it.
"""

from __future__ import annotations

import asyncio
import time

#: Seconds between two heartbeats. After twice this time without one, the process was suspended.
_INTERVAL = 0.5


def boottime() -> float:
    """Return the seconds since the system's start, including the time in which it was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class ArrivalClock:
    """The heartbeats of one event loop."""

    def __init__(self) -> None:
        self._confirmed = self._recorded = boottime()

    def run(self) -> None:
        """Record a heartbeat now and after each interval."""
        self._record()
        asyncio.get_running_loop().call_later(_INTERVAL, self.run)

    def earliest_arrival(self) -> float:
        """Return a time before the arrival of the data that is read in this turn; usually half a second before."""
        if boottime() - self._recorded > 2 * _INTERVAL:
            self._record()  # after a suspension, so that later requests count as new ones
        return self._confirmed

    def _record(self) -> None:
        loop = asyncio.get_running_loop()
        self._recorded = recorded = boottime()
        # Callbacks run before the reads of their turn.
        loop.call_soon(loop.call_soon, self._confirm, recorded)

    def _confirm(self, recorded: float) -> None:
        self._confirmed = recorded
