"""What a store measures while somebody asks for it: commits, reads and errors."""

from __future__ import annotations

import threading
from collections import Counter

from harp_daemon.exposition import Histogram

_COMMIT_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_READ_BOUNDS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)


class StoreMeasurements:
    """The measurements since they began."""

    def __init__(self) -> None:
        self.commit_seconds = Histogram(*_COMMIT_BOUNDS)  #: Changed by the writing thread.
        self.read_seconds: dict[str, Histogram] = {}  #: By verb.
        self.errors: Counter[tuple[str, ...]] = Counter()  #: Number of failed operations, by verb.
        self._lock = threading.Lock()  # several threads read

    def record_read(self, verb: str, seconds: float, failed: bool) -> None:
        """Record that a verb has read, in any thread."""
        with self._lock:
            histogram = self.read_seconds.get(verb)
            if histogram is None:
                # Another mapping, because another thread may read the present one.
                self.read_seconds = {**self.read_seconds, verb: (histogram := Histogram(*_READ_BOUNDS))}
            histogram.observe(seconds)
            if failed:
                self.errors[(verb,)] += 1

    def record_error(self, verb: str) -> None:
        """Record that a verb could not write, in any thread."""
        with self._lock:
            self.errors[(verb,)] += 1
