"""A daemon as a service manager runs it: started again when it dies, unless that was wanted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from chaos.marks import now

#: Seconds until a daemon that has ended is started again.
_RESTART = 0.3
#: Seconds that a daemon has to end when it is asked to.
_PATIENCE = 60.0
#: The statuses that follow a signal. TERM finds a daemon that has just been executed without its handler.
_ENDS = {signal.SIGKILL: {-signal.SIGKILL}, signal.SIGTERM: {0, -signal.SIGTERM}, signal.SIGUSR1: {0}}
#: Signals that a service manager sends to a daemon that has come up.
_FOR_THE_READY = frozenset({signal.SIGHUP, signal.SIGUSR1})


class Service:
    """A daemon.

    Args:
        name: for messages.
        command: its command line.
        environment: entries on top of this process's.
        log: the file that takes its stdout and stderr.

    Attributes:
        deaths: each end that nobody here caused, or with a status that its cause does not explain, as text.
        excused: until when it may fail to start.
        away: the times (from, to) in which it was down or halted, for whatever reason.
    """

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.deaths: list[str] = []
        self.excused = 0.0
        self.away: list[tuple[float, float]] = []
        self._command = command
        self._environment = {**os.environ, **environment}
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._expected: set[int] = set()
        self._pause = _RESTART
        self._halted: float | None = None
        self._down: float | None = now()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Keep it running from now on."""
        self._task = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        while True:
            with self._log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment,
                    start_new_session=True,  # ^C is for the harness, which then ends everything in order
                )
            self._expected = set()
            status = await self._process.wait()
            self._process = None
            excused = self._down is not None and now() < self.excused
            if self._down is None:
                self._down = now()
            self._resumed()
            if status not in self._expected and not excused:
                self.deaths.append(f"{self.name} ended with status {status}")
            await asyncio.sleep(self._pause)
            self._pause = _RESTART

    def serves(self) -> None:
        """Note that it has been seen at work."""
        if self._down is not None and self._halted is None:
            self.away.append((self._down, now()))
            self._down = None

    def away_since(self, moment: float) -> float:
        """For how many seconds it has been down or halted since then."""
        open_ones = [(since, now()) for since in (self._down, self._halted) if since is not None]
        return sum(max(0.0, to - max(since, moment)) for since, to in [*self.away, *open_ones])

    @property
    def pid(self) -> int | None:
        """Its process; None: it does not run now."""
        return None if self._process is None else self._process.pid

    def send(self, number: signal.Signals, pause: float = _RESTART) -> bool:
        """Send it a signal; False: it does not run, or is not ready for this one.

        Args:
            number: KILL, TERM, USR1, or HUP, which ends nothing.
            pause: seconds that it stays away if that ends it.
        """
        if self._process is None or (number in _FOR_THE_READY and not _catches(self._process.pid, number)):
            return False
        if number is not signal.SIGHUP:
            self._expected |= _ENDS[number]
            self._pause = pause
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        return True

    def halt(self) -> bool:
        """Stop it as SIGSTOP does; False: it does not run, or is halted already."""
        if self._process is None or self._halted is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGSTOP)
        self._halted = now()
        return True

    def resume(self) -> None:
        """Let it go on."""
        if self._process is not None and self._halted is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)
        self._resumed()

    def _resumed(self) -> None:
        if self._halted is not None:
            self.away.append((self._halted, now()))
            self._halted = None

    async def stop(self) -> int | None:
        """End it for good by TERM; return its exit status, None: it was not running.

        One that does not end in time is killed; its status says so.
        """
        if self._task is not None:
            self.resume()
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        process = self._process
        if process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_PATIENCE):
                return await process.wait()
        except TimeoutError:
            process.kill()
            return await process.wait()


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) & 1 << number - 1)
