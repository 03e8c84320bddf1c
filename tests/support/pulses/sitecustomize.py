"""Python executes this at the start of a daemon that `support.delays.measured` has started: it measures its event loop.

Every few milliseconds, the loop of a daemon notes how much processor time the process has used since the last note. An
event of another peer would have waited for as long. Unlike a delay, this hardly depends on what else the machine does.
"""

from __future__ import annotations

import os
import sys

if {"harpd.cli", "harpcaller.cli"} & set(sys.orig_argv):  # and no supervisor, zygote or worker
    import asyncio
    import time

    _INTERVAL = 0.002  # seconds
    #: Seconds of processor time that are noted, in a line of a file.
    _LEAST = 0.005
    _run_forever = asyncio.BaseEventLoop.run_forever

    def _measured(loop: asyncio.BaseEventLoop) -> None:
        file = open(os.path.join(os.environ["HARP_TEST_PULSES"], str(os.getpid())), "a", buffering=1)  # noqa: SIM115
        file.write("0\n")
        last = time.process_time()

        def note() -> None:
            nonlocal last
            now = time.process_time()
            if now - last > _LEAST:
                file.write(f"{now - last:.4f}\n")
            last = time.process_time()
            loop.call_later(_INTERVAL, note)

        loop.call_soon(note)
        with file:
            _run_forever(loop)

    asyncio.BaseEventLoop.run_forever = _measured  # type: ignore[method-assign, assignment]
