"""How long the event loop of a daemon was busy at once: the delay that another peer has at most, in processor time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_STARTUP = Path(__file__).parent / "pulses"


class Delays:
    """The processor time that daemons have used between two turns of their event loops."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: dict[int, int] = {}

    def forget(self, pid: int) -> None:
        """Forget what was measured before."""
        self._seen[pid] = len(self._read(pid))

    def longest(self, pid: int) -> float:
        """Return the longest delay in seconds since `forget`."""
        return max(self._read(pid)[self._seen[pid] :], default=0.0)

    def _read(self, pid: int) -> list[float]:
        return [
            float(line) for line in (self._directory / str(pid)).read_text().splitlines(keepends=True) if "\n" in line
        ]


@contextmanager
def measured() -> Iterator[Delays]:
    """Measure the daemons that are started meanwhile."""
    with tempfile.TemporaryDirectory(prefix="harp-test-") as directory, pytest.MonkeyPatch.context() as patch:
        path = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", f"{_STARTUP}{os.pathsep + path if path else ''}")
        patch.setenv("HARP_TEST_PULSES", directory)
        yield Delays(Path(directory))
