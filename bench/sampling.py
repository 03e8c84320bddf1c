"""Program and reader: a daemon that is asked, many times a second, where each of its threads is.

`python sampling.py FILE MODULE ARGUMENTS...` runs a module as its program would be; at its end the counts go to
FILE. A call's process is forked elsewhere and is not seen.
"""

from __future__ import annotations

import json
import runpy
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

__all__ = ["summary"]

#: Seconds between two looks.
_PAUSE = 0.004
#: Functions that a summary has.
_TOLD = 25


class Sampler(threading.Thread):
    """Looks at all other threads until it is stopped.

    A function that a thread is in is given the CPU time that the thread has used since the last look.
    """

    def __init__(self) -> None:
        super().__init__(name="sampler", daemon=True)
        self.own: Counter[str] = Counter()
        self.within: Counter[str] = Counter()
        self._spent: dict[int, int] = {}
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look."""
        while not self._stopped.wait(_PAUSE):
            for thread, frame in sys._current_frames().items():
                if thread != self.ident:
                    with suppress(OSError):  # it has just ended
                        self._take(thread, frame)

    def _take(self, thread: int, frame: FrameType | None) -> None:
        now = time.clock_gettime_ns(time.pthread_getcpuclockid(thread))
        spent = now - self._spent.get(thread, now)
        self._spent[thread] = now
        if not spent or frame is None:
            return
        self.own[_name(frame)] += spent
        seen = set()
        while frame is not None:
            seen.add(_name(frame))
            frame = frame.f_back
        for name in seen:
            self.within[name] += spent

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        self.join()


def _name(frame: FrameType) -> str:
    code = frame.f_code
    return f"{'/'.join(Path(code.co_filename).parts[-2:])}:{code.co_qualname}"


def summary(file: Path) -> Iterator[str]:
    """What a daemon was busy with, as text."""
    found = json.loads(file.read_text())
    all_ = max(1, sum(found["own"].values()))
    yield f"{file.stem}: {all_ / 1e9:.2f} s of CPU in {found['seconds']:.2f} s; in itself, and with calls:"
    for name, spent in Counter(found["own"]).most_common(_TOLD):
        yield f"  {100 * spent / all_:6.1f} %{100 * found['within'][name] / all_:8.1f} %  {name}"
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
