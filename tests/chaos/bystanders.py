"""Bystanders: processes of the same user that do not belong to HARP. HARP must not kill them.

The dangerous bystanders have the pid of a process of HARP that has just died: a daemon that kills by a stored pid would
hit them. The program of this module creates them:

    python -P -m chaos.bystanders

It reads a pid a line from stdin and creates a process with this pid, if it can choose the pid of a process. It writes
one line for each bystander that has died: its pid, and its status. When there are many, the oldest end, except
the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

#: The file with the pid of the process that was created last, in this namespace of pids.
_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
#: Maximum number of bystanders; seconds between two checks of them.
_MOST, _PAUSE = 40, 0.05


class Bystanders:
    """The bystanders of a run.

    Attributes:
        reused: number of pids of dead processes that were requested.
        killed: a text for each bystander that was killed.
    """

    def __init__(self) -> None:
        self.reused = 0
        self.killed: list[str] = []
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        #: The pid of the first bystander, after `start`.
        self.first = 0

    async def start(self) -> None:
        """Start the program, and a first bystander."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "chaos.bystanders"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.first = int(await self._process.stdout.readline())
        self._task = asyncio.create_task(self._read(self._process.stdout))

    async def _read(self, stdout: asyncio.StreamReader) -> None:
        while line := await stdout.readline():
            self.killed.append(line.decode().strip())

    def reuse(self, pid: int) -> None:
        """Create a bystander with the pid of a process that has died."""
        if self._process is not None and self._process.stdin is not None:
            self.reused += 1
            self._process.stdin.write(b"%d\n" % pid)

    async def stop(self) -> None:
        """End all bystanders."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()
        if self._task is not None:
            await self._task


class _Family:
    """The bystanders, in their creator: each ends when its pipe is closed."""

    def __init__(self) -> None:
        self._pipes: deque[tuple[int, int]] = deque()

    def create(self, pid: int = 0) -> int:
        """Create a bystander, with a pid if possible; return its pid, or 0 if the pid is not available."""
        if pid:
            try:
                _LAST_PID.write_text(str(pid - 1))
            except OSError:
                return 0
        mine, its = os.pipe()
        created = os.fork()
        if not created:
            os.close(its)
            self._be_one(mine)
        os.close(mine)
        if pid and created != pid:
            os.close(its)
            os.waitpid(created, 0)
            return 0
        self._pipes.append((created, its))
        if len(self._pipes) > _MOST:
            oldest = self._pipes[1]  # the first one lives until the end: a procedure may break a promise with its pid
            del self._pipes[1]
            self._end(*oldest)
        return created

    def _be_one(self, pipe: int) -> None:
        for _, other in self._pipes:
            os.close(other)
        os.setsid()
        os.read(pipe, 1)
        os._exit(0)

    def _end(self, pid: int, pipe: int) -> None:
        os.close(pipe)
        self._check(pid, os.waitpid(pid, 0)[1])

    @staticmethod
    def _check(pid: int, status: int) -> None:
        if status:
            how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
            os.write(1, f"the unrelated process {pid} ended with {how}\n".encode())

    def check(self) -> None:
        """Report the bystanders that have died."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                self._check(*found)
                for entry in list(self._pipes):
                    if entry[0] == found[0]:
                        self._pipes.remove(entry)
                        os.close(entry[1])

    def end_all(self) -> None:
        """End all."""
        self.check()
        while self._pipes:
            self._end(*self._pipes.popleft())


def main() -> None:
    """Create bystanders until the end of stdin."""
    family = _Family()
    os.write(1, b"%d\n" % family.create())
    text = b""
    while True:
        family.check()
        if not select.select([0], [], [], _PAUSE)[0]:
            continue
        received = os.read(0, 4096)
        if not received:
            break
        *lines, text = (text + received).split(b"\n")
        for line in lines:
            family.create(int(line))
    family.end_all()


if __name__ == "__main__":
    main()
