"""Which calls run, on disk: so that the next warden can end what a killed one left behind.

One small file per running call, named by its id, in ``calls/`` of the runtime directory. It is not synced: it has to
outlive the warden, not the machine. A record may be old when it is read, and its numbers may be others' by then: so
it counts only before the system starts anew, and finds only what is surely the call's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from harpd.mark import entry
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
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def add(self, call_id: str, tree: Tree) -> None:
        """Record a running call. Raises OSError."""
        record = {"boot": self._boot, "pid": tree.pid, "start": tree.start}
        (self._directory / call_id).write_text(json.dumps(record))

    def remove(self, call_id: str) -> None:
        """Forget a call: nothing of it is left that is ours to stop."""
        with contextlib.suppress(OSError):
            os.unlink(self._directory / call_id)

    def sweep(self) -> int:
        """Kill what is left of the recorded calls, and forget them; return how many processes that was."""
        names = os.listdir(self._directory)
        trees = list(self._read(names))
        killed: set[tuple[int, int]] = set()
        for _ in range(_SWEEPS if trees else 0):
            processes = snapshot()
            left = {member.identity for tree in trees for member in tree.members(processes, killed, late=True)}
            if not left:
                break
            for number in (signal.SIGSTOP, signal.SIGKILL):  # none forks while the others are killed
                for identity in left:
                    send(number, identity)
            killed |= left
            time.sleep(_PAUSE)
        else:
            if trees:
                log.error("processes of dead calls can't be killed", extra={"left": len(left)})
        for name in names:
            self.remove(name)
        return len(killed)

    def _read(self, names: list[str]) -> Iterator[Tree]:
        for name in names:
            try:
                record = json.loads((self._directory / name).read_text())
                tree = Tree(int(record["pid"]), int(record["start"]), entry(name))
                if record["boot"] == self._boot:
                    yield tree
            except (OSError, ValueError, KeyError, TypeError):
                log.warning("a record of a call can't be read", extra={"call": name})
