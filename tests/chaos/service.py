"""A daemon as a service manager runs it: it is restarted when it exits, and its log is read from a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
import signal
from collections.abc import Mapping
from pathlib import Path

from chaos.marks import now

#: Seconds until a daemon that has exited is restarted.
_RESTART = 0.3
#: Seconds in which a daemon has to exit after SIGTERM.
_STOP_TIMEOUT = 60.0
#: The exit statuses after a signal. A daemon that has just been executed has no handler for SIGTERM yet.
_EXPECTED_STATUSES = {signal.SIGKILL: {-signal.SIGKILL}, signal.SIGTERM: {0, -signal.SIGTERM}, signal.SIGUSR1: {0}}
#: Bytes of one read of the log; the byte that fills its pipe, which no log has.
_LOG_CHUNK, _BALLAST = 1 << 16, b"\0"
#: Signals that are sent only to a daemon that has a handler for them.
_NEEDING_HANDLER = frozenset({signal.SIGHUP, signal.SIGUSR1})


class Service:
    """A daemon.

    Args:
        name: for messages.
        command: its command line.
        environment: additional entries of its environment.
        log: the file for its stdout and stderr.

    Attributes:
        unexpected_exits: each exit without a fault, or with another status than the fault explains, as text.
        may_fail_until: until when its start may fail.
        absences: the periods (from, to) in which it did not run or was suspended.
        downtimes: the periods in which it did not run, each until it has served a request.
    """

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.unexpected_exits: list[str] = []
        self.may_fail_until = 0.0
        self.absences: list[tuple[float, float]] = []
        self.downtimes: list[tuple[float, float]] = []
        self._command = command
        self._environment = {**os.environ, **environment}
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._expected: set[int] = set()
        self._pause = _RESTART
        self._suspended_at: float | None = None
        self._down_since: float | None = now()
        self._task: asyncio.Task[None] | None = None
        # The pipe is the same for all of its processes, as that of a service manager.
        self._log_reader, self._log_writer = os.pipe()
        os.set_blocking(self._log_reader, False)
        self._unread = 0

    def start(self) -> None:
        """Start it, and restart it whenever it exits."""
        asyncio.get_running_loop().add_reader(self._log_reader, self._read_log)
        self._task = asyncio.create_task(self._restart_forever())

    async def _restart_forever(self) -> None:
        while True:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=self._log_writer,
                stderr=self._log_writer,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is handled by this program, which then stops everything in order
            )
            self._expected = set()
            status = await self._process.wait()
            self._process = None
            excused = self._down_since is not None and now() < self.may_fail_until
            if self._down_since is None:
                self._down_since = now()
            self._on_resumed()
            if status not in self._expected and not excused:
                self.unexpected_exits.append(f"{self.name} ended with status {status}")
            await asyncio.sleep(self._pause)
            self._pause = _RESTART

    def _read_log(self) -> None:
        with contextlib.suppress(BlockingIOError), self._log.open("ab") as log:
            while text := os.read(self._log_reader, _LOG_CHUNK):
                log.write(text.replace(_BALLAST, b""))

    def leave_log_unread(self) -> None:
        """Stop reading its log, and fill the pipe, until `read_log` was called as often."""
        self._unread += 1
        asyncio.get_running_loop().remove_reader(self._log_reader)
        # Opened again: the flag O_NONBLOCK of the other descriptor would be that of the daemon, too.
        pipe = os.open(f"/proc/self/fd/{self._log_writer}", os.O_WRONLY | os.O_NONBLOCK)
        try:
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(pipe, _BALLAST * select.PIPE_BUF)
        finally:
            os.close(pipe)

    def read_log(self) -> None:
        """Read its log again."""
        self._unread = max(0, self._unread - 1)
        if not self._unread:
            asyncio.get_running_loop().add_reader(self._log_reader, self._read_log)

    @property
    def is_suspended(self) -> bool:
        """Whether it is suspended."""
        return self._suspended_at is not None

    def on_serving(self) -> None:
        """Record that it has served a request."""
        if self._down_since is not None and self._suspended_at is None:
            self.absences.append((self._down_since, now()))
            self.downtimes.append((self._down_since, now()))
            self._down_since = None

    def was_down(self, since: float, to: float) -> bool:
        """Return whether it was down at some time of a period: it may have started then."""
        periods = [*self.downtimes, (math.inf if self._down_since is None else self._down_since, math.inf)]
        return any(begin <= to and since <= end for begin, end in periods)

    def absent_since(self, time: float) -> float:
        """Return for how many seconds it did not run or was suspended since a time."""
        open_ones = [(since, now()) for since in (self._down_since, self._suspended_at) if since is not None]
        return sum(max(0.0, to - max(since, time)) for since, to in [*self.absences, *open_ones])

    @property
    def pid(self) -> int | None:
        """Its pid; None: it does not run."""
        return None if self._process is None else self._process.pid

    def send(self, number: signal.Signals, pause: float = _RESTART) -> bool:
        """Send it a signal; return False if it does not run or has no handler for it.

        Args:
            number: SIGKILL, SIGTERM, SIGUSR1, or SIGHUP, which does not end it.
            pause: seconds until it is restarted if the signal ends it.
        """
        if self._process is None or (number in _NEEDING_HANDLER and not _has_handler(self._process.pid, number)):
            return False
        if number is not signal.SIGHUP:
            self._expected |= _EXPECTED_STATUSES[number]
            self._pause = pause
        _send_signal(self._process, number)
        return True

    def expect_kill(self) -> None:
        """Note that it will be killed."""
        self._expected |= _EXPECTED_STATUSES[signal.SIGKILL]

    def suspend(self) -> bool:
        """Send it SIGSTOP; return False if it does not run or is suspended already."""
        if self._process is None or self._suspended_at is not None:
            return False
        _send_signal(self._process, signal.SIGSTOP)
        self._suspended_at = now()
        return True

    def resume(self) -> None:
        """Send it SIGCONT if it is suspended."""
        if self._process is not None and self._suspended_at is not None:
            _send_signal(self._process, signal.SIGCONT)
        self._on_resumed()

    def _on_resumed(self) -> None:
        if self._suspended_at is not None:
            self.absences.append((self._suspended_at, now()))
            self._suspended_at = None

    async def stop(self) -> int | None:
        """Stop it with SIGTERM and do not restart it; return its exit status, None: it was not running.

        It is killed if it does not exit in time.
        """
        if self._task is not None:
            self.resume()
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        process = self._process
        if process is None:
            return None
        _send_signal(process, signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_TIMEOUT):
                return await process.wait()
        except TimeoutError:
            _send_signal(process, signal.SIGKILL)
            return await process.wait()
        finally:
            self._read_log()


def _send_signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send a signal to a process that was not reaped.

    `Process.send_signal` reaps a process that has just died, and asyncio then reports the exit status 255.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _has_handler(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) & 1 << number - 1)
