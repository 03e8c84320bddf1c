"""Which calls run, on disk: so that the next warden can end what a killed one left behind.

One small file per running call, named by its id, in ``calls/`` of the runtime directory. It is not synced: it has to
outlive the warden, not the machine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from pathlib import Path

from harpd.call import CALL_VARIABLE
from harpd.processes import Tree, send, snapshot

__all__ = ["CallRecords"]

log = logging.getLogger("harpd.warden")

#: How often, and how many seconds apart, the sweep looks for what is left.
_SWEEPS, _PAUSE = 100, 0.02


class CallRecords:
    """The records in one runtime directory.

    Args:
        runtime_directory: the directory; ``calls`` is made in it.
    """

    def __init__(self, runtime_directory: Path) -> None:
        self._directory = runtime_directory / "calls"
        self._directory.mkdir(mode=0o700, exist_ok=True)

    def add(self, call_id: str, pid: int, start: int) -> None:
        """Record a running call: its main process's pid and start time."""
        (self._directory / call_id).write_text(json.dumps({"pid": pid, "start": start}))

    def remove(self, call_id: str) -> None:
        """Forget a call: nothing of it is left that is ours to stop."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._directory / call_id)

    def sweep(self) -> int:
        """Kill what is left of the recorded calls, and forget them; return how many processes that was."""
        trees = [tree for path in self._directory.iterdir() if (tree := _read(path)) is not None]
        killed: set[tuple[int, int]] = set()
        for _ in range(_SWEEPS):
            processes = snapshot()
            left = {member.identity for tree in trees for member in tree.members(processes, killed)}
            if not left:
                break
            for identity in left:
                send(signal.SIGKILL, identity)
            killed |= left
            time.sleep(_PAUSE)
        else:
            log.error("processes of dead calls can't be killed", extra={"left": len(left)})
        for path in self._directory.iterdir():
            self.remove(path.name)
        return len(killed)


def _read(path: Path) -> Tree | None:
    try:
        record = json.loads(path.read_text())
        return Tree(int(record["pid"]), int(record["start"]), f"{CALL_VARIABLE}={path.name}".encode())
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("a record of a call can't be read", extra={"file": str(path)})
        return None
