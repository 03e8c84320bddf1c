"""The order of TLS handshakes. Their computations take the event loop's time: about a millisecond for each client.

In each turn of the loop, handshakes get a limited time, in the order in which their data has arrived. So requests are
not delayed by more than that, however many clients connect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_SECONDS_PER_TURN = 0.005


class HandshakeQueue:
    """Steps of handshakes that wait for their turn."""

    def __init__(self) -> None:
        self._steps: dict[Callable[[], None], None] = {}  # in order
        self._is_scheduled = False

    def add(self, step: Callable[[], None]) -> None:
        """Call a function in its turn, once if it is added again before."""
        self._steps[step] = None
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        end = time.monotonic() + _SECONDS_PER_TURN
        try:
            while self._steps and time.monotonic() < end:
                step = next(iter(self._steps))
                del self._steps[step]
                step()
        finally:  # an error in the step of one client stops none of the others
            self._is_scheduled = bool(self._steps)
            if self._is_scheduled:
                asyncio.get_running_loop().call_soon(self._run)
