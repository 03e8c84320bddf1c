"""Program and reader: a daemon that is asked, many times a second of CPU, where each of its threads is.

`python sampling.py FILE MODULE ARGUMENTS...` runs a module as its program would be; at its end the counts go to FILE.
The asking is done by a signal, so it finds the main thread, where the event loop is, at any bytecode; other threads it
finds where they let go of Python's lock. A call's process is forked elsewhere and is not seen.
"""

from __future__ import annotations

import json
import runpy
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

__all__ = ["summary"]

#: Seconds of the process's CPU between two looks.
_PAUSE = 0.002
#: Functions that each list of a summary has.
_TOLD = 20
#: In a stack that has this a module is being loaded, which is no work of the daemon's.
_LOADING = "importlib."
#: What our functions' names begin with.
_OURS = ("harp.", "harpd.", "harpcaller.")


class Sampler:
    """Gives the CPU time that a thread has used since the last look to the function that it is in now."""

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self.within: Counter[str] = Counter()
        self._spent: dict[int, int] = {}

    def start(self) -> None:
        """Look from now on."""
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, _PAUSE, _PAUSE)

    def stop(self) -> None:
        """Look no more."""
        signal.setitimer(signal.ITIMER_PROF, 0)

    def _look(self, number: int, interrupted: FrameType | None) -> None:
        main = threading.main_thread().ident
        for thread, frame in sys._current_frames().items():
            with suppress(OSError):  # it has just ended
                self._take(thread, interrupted if thread == main else frame)

    def _take(self, thread: int, frame: FrameType | None) -> None:
        now = time.clock_gettime_ns(time.pthread_getcpuclockid(thread))
        spent = now - self._spent.get(thread, now)
        self._spent[thread] = now
        stack = []
        while frame is not None:
            stack.append(_name(frame))
            frame = frame.f_back
        if spent > 0 and stack and not any(name.startswith(_LOADING) for name in stack):
            self.own[stack[0]] += spent
            for name in set(stack):
                if name.startswith(_OURS):
                    self.within[name] += spent


def _name(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"


def summary(file: Path) -> Iterator[str]:
    """What a daemon was busy with, as text."""
    found = json.loads(file.read_text())
    own, within = Counter[str](found["own"]), Counter[str](found["within"])
    whole = max(1, own.total())
    yield f"{file.stem}: {whole / 1e9:.2f} s of CPU, without start, in {found['seconds']:.2f} s"
    for title, counts in (("in a function itself", own), ("in a function of ours and what it calls", within)):
        yield f"  {title}:"
        for name, spent in counts.most_common(_TOLD):
            yield f"    {100 * spent / whole:5.1f} %  {name}"
    yield ""


def main() -> None:
    """Run the module and write down where it was."""
    file, module, *arguments = sys.argv[1:]
    sampler = Sampler()
    sampler.start()
    began = time.monotonic()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sampler.stop()
        counts = {"own": sampler.own, "within": sampler.within}
        Path(file).write_text(json.dumps({"seconds": time.monotonic() - began, **counts}))


if __name__ == "__main__":
    main()
