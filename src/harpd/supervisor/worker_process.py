"""A worker process in the supervisor: its channel, its output, its death.

The channel consists of two pipes. A socket would let the worker pass descriptors: one of a socket that lingers, for
example, halts the process that receives it and closes its last copy.

Most workers serve one call and exit with it. Where the procedure allows more, a worker becomes idle and waits for the
next call. It exits instead in these cases: its call was stopped or died; harpd's own code rejected its call; it wrote
more than its closing line; its zygote has retired. An idle worker does not count as a call. It exits as soon as its
channel closes, or is killed.

Each line of its stdout and stderr becomes a log event with the call's id, up to a limit of lines and bytes a second. A
pipe stays open after its call's end while a process has its writing end: a service that a procedure has started must
not be killed by its next message. The number of these pipes is bounded; those of the oldest calls are closed first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from harp_daemon.secret_values import mask_texts
from harpd.processes.cgroup import CallCgroups, Cgroup
from harpd.processes.process_tree import send_signal
from harpd.supervisor.event_loop import READ, EventLoop
from harpd.supervisor.output_limit import OutputLimit

log = logging.getLogger("harpd.supervisor")
output_log = logging.getLogger("harpd.call")

#: Descriptors that are reserved for stopping calls and for control requests: 64, or one eighth of a low limit.
_RESERVED, _RESERVED_SHARE = 64, 8
#: Bytes of the channel that a worker can write while the supervisor does not read.
_CHANNEL_BYTES = 256 * 1024
#: Seconds in which a worker without a call must exit before it is killed.
_EXIT_TIMEOUT = 5.0
#: Bytes per read. They are few, so that a call that prints without pause does not delay other calls.
_OUTPUT_READ_SIZE = 512
#: While lines are dropped: bytes per read, as many as fit into the pipe, and seconds between two reads.
_DROPPED_READ_SIZE, _DROPPED_READ_INTERVAL = 64 * 1024, 0.005
#: The most bytes of a line in one event; a longer line is split into several.
_MAX_LINE_BYTES = 8192
#: How many of the last lines exit info may have, and how many characters of each.
_MAX_LAST_LINES, _MAX_LAST_LINE_LENGTH = 20, 500
#: How many texts of earlier calls of a worker are masked; a value has up to eight.
_MAX_EARLIER_TEXTS = 80
#: How many reads drain a pipe at its call's end.
_MAX_DRAIN_READS = 128


class WorkerUser(Protocol):
    """The call of a worker. It is notified of the fork, or of the reason why there is no worker; then of the end.

    The end has a wait status; `cpu` seconds, with those of the children that it waited for; and `memory`, the maximum
    resident bytes of the largest of these processes. The last two are unknown if it was killed with its zygote.
    """

    def on_forked(self) -> None: ...
    def on_fork_failed(self, reason: str) -> None: ...
    def on_reaped(self, status: int, cpu: float | None, memory: int | None) -> None: ...


class WorkerProcess:
    """A worker from the fork command to its death. Raises OSError if no descriptor is free."""

    def __init__(self, output: OutputCollector) -> None:
        self._loop = output.loop
        self.identity = 0, 0  # its pid and start time; zeros before it was forked
        self.cgroup: Cgroup | None = None
        self.cgroups: CallCgroups | None = None  # those that it is one of
        self.call: WorkerUser | None = None  # None: it is pre-forked or idle, or released
        self.procedure = ""  # that of all its calls
        self.served = 0  # how many calls it was assigned
        self._ended = False
        self._cpu_before = 0.0  # seconds that it had used at the start of the present call
        #: Its channel: the end that it reads its calls from, and the end of its lines; -1: closed.
        self.calls = self.lines = -1
        self.child_descriptors: list[int] = []  # its ends of these, its stdout and its stderr
        self._output = output
        self._limit = OutputLimit(output.loop, output.limits, self._on_output_dropped)
        self._fields: Mapping[str, str] = {}
        self._pipes: list[OutputPipe] = []
        try:
            self._open_channel()
            for stream in ("stdout", "stderr"):
                self._pipes.append(OutputPipe(output, stream, self._limit))
                self.child_descriptors.append(self._pipes[-1].writing_end)
            if max(self.child_descriptors) >= output.first_reserved:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        except OSError:
            self.close()
            for descriptor in self.child_descriptors:  # the reading ends of the pipes see it, and are closed as well
                os.close(descriptor)
            raise

    def _open_channel(self) -> None:
        reading, self.calls = os.pipe2(os.O_CLOEXEC)
        self.child_descriptors.append(reading)
        self.lines, writing = os.pipe2(os.O_CLOEXEC)
        self.child_descriptors.append(writing)
        os.set_blocking(self.calls, False)
        os.set_blocking(self.lines, False)
        with contextlib.suppress(OSError):  # this user has too many pipes
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _CHANNEL_BYTES)

    def assign(self, call: WorkerUser, procedure: str, fields: Mapping[str, str]) -> None:
        """Assign a call to it. `fields`: of the log events of the call's output."""
        self.call, self.procedure = call, procedure
        if self.served:
            self._cpu_before = self._cpu_seconds()
        self.served += 1
        self._limit.reset(self._output.limits)
        self._fields = fields
        for pipe in self._pipes:
            pipe.assign(fields)

    def mask_output(self, texts: Sequence[bytes]) -> None:
        """Mask these texts in the output of the present call."""
        for pipe in self._pipes:
            pipe.mask(texts)

    def on_forked(self, pid: int, start: int) -> None:
        self.identity = pid, start
        if self.call is not None:
            self.call.on_forked()

    def on_fork_failed(self, reason: str) -> None:
        if self.call is None:
            self.release()
        else:
            self.call.on_fork_failed(reason)

    def on_reaped(self, status: int, cpu: float | None, memory: int | None) -> None:
        """Notify its call of the call's part of `cpu`, which is for all calls; see `WorkerUser`."""
        self._ended = True
        if self.call is None:
            self.release()
        else:
            self.call.on_reaped(status, None if cpu is None else self.call_cpu_seconds(cpu), memory)

    def _on_output_dropped(self, lines: int, size: int) -> None:
        output_log.warning("call output dropped", extra={**self._fields, "lines": lines, "bytes": size})

    def call_cpu_seconds(self, cpu: float | None = None) -> float:
        """Return the part of `cpu` that its present call has used; by default of its present time, without children."""
        return round(max((self._cpu_seconds() if cpu is None else cpu) - self._cpu_before, 0.0), 6)

    def _cpu_seconds(self) -> float:
        """Return its processor time. See clock_getcpuclockid(3)."""
        try:
            return time.clock_gettime(~self.identity[0] << 3 | 2)
        except OSError:  # it has just ended
            return self._cpu_before

    def last_errors(self) -> list[str]:
        """Return the last lines of its call's stderr, when the call has just ended."""
        return self._pipes[1].drain()

    def is_quiet(self) -> bool:
        """Return whether it can be assigned a call: it lives, and has not written since its last call."""
        try:
            data = os.read(self.lines, 1)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if data:
            log.warning("idle worker wrote output; not reused", extra={"pid": self.identity[0]})
        return False

    def become_idle(self) -> None:
        """Separate it from its call, which has ended; all output of the call has arrived."""
        self.call = None
        self.unwatch()
        for pipe in self._pipes:
            pipe.drain()
            pipe.flush()
        self._limit.finish()

    def finish_input(self) -> None:
        """Have it exit after its present call: it gets no other one."""
        if self.calls >= 0:
            self._loop.forget(self.calls)
            os.close(self.calls)
            self.calls = -1

    def shut_down(self) -> None:
        """Have a worker without a call exit; it is killed if it does not."""
        self.close()
        self._loop.call_later(_EXIT_TIMEOUT, self._kill_if_alive)

    def _kill_if_alive(self) -> None:
        if self.identity[0] and not self._ended:
            send_signal(signal.SIGKILL, self.identity)

    def unwatch(self) -> None:
        """Watch its channel no more."""
        self._loop.unwatch(self.calls)
        self._loop.unwatch(self.lines)

    def close(self) -> None:
        self.finish_input()
        if self.lines >= 0:
            self._loop.forget(self.lines)
            os.close(self.lines)
            self.lines = -1

    def release(self) -> None:
        """Release its resources; it has ended, or was never forked. Processes that it started may still print."""
        self.call = None
        self.close()
        for pipe in self._pipes:
            pipe.release()
        self._limit.finish()
        if self.cgroup is not None and self.cgroups is not None:
            self.cgroups.release(self.cgroup)


class OutputCollector:
    """The state that all pipes share. `max_released_pipes`: how many pipes of ended calls may stay open.

    `limits`: how many lines and bytes a second a new call may print.
    """

    def __init__(self, loop: EventLoop, max_released_pipes: int, limits: tuple[int, int]) -> None:
        self.limits = limits
        self.loop = loop
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        #: Workers use the descriptors below this one.
        self.first_reserved = limit - min(_RESERVED, limit // _RESERVED_SHARE)
        self.max_released_pipes = max_released_pipes
        self.released_pipes: dict[OutputPipe, None] = {}  # pipes of ended calls, oldest first


class OutputPipe:
    """The pipe of a process's stdout or stderr (`stream`). Raises OSError if no descriptor is free.

    Each line becomes an `event` if the limit accepts it.
    """

    def __init__(
        self, collector: OutputCollector, stream: str, limit: OutputLimit, event: str = "call printed"
    ) -> None:
        self._limit = limit
        self._event = event
        self._collector = collector
        self._descriptor, self.writing_end = os.pipe2(os.O_CLOEXEC)  # the creator closes the writing end
        os.set_blocking(self._descriptor, False)
        self._fields: Mapping[str, str] = {"stream": stream}
        self._partial_line = b""
        self._recent_texts: Sequence[bytes] = ()  # texts that are masked in its lines, those of the last call first
        self._masked_texts: Sequence[bytes] = ()  # the same, the longest first
        self._overlap = 0  # bytes of the longest of these texts that may be missing
        self._is_empty = False  # the last line is empty; of such lines in a row, the first is logged
        self._is_cut = False  # the beginning of the present line was dropped, and so is its rest
        self._last: deque[bytes] = deque(maxlen=_MAX_LAST_LINES)
        self._watch()

    def assign(self, fields: Mapping[str, str]) -> None:
        self._fields = {**fields, "stream": self._fields["stream"]}
        self._last.clear()
        self._is_empty = self._is_cut = False

    def mask(self, texts: Sequence[bytes]) -> None:
        """Mask these texts in the lines from now on, and those of earlier calls: their processes may still print."""
        earlier = [text for text in self._recent_texts if text not in texts][:_MAX_EARLIER_TEXTS]
        self._recent_texts = [*texts, *earlier]
        self._masked_texts = sorted(self._recent_texts, key=len, reverse=True)
        self._overlap = max(map(len, texts), default=1) - 1

    def drain(self) -> list[str]:
        """Read all output of a call that has just ended; return its last lines. Long lines are cut."""
        for _ in range(_MAX_DRAIN_READS):
            if not self._read():
                break
        lines = [*self._last, self._partial_line] if self._partial_line else list(self._last)
        return [self._text(line)[:_MAX_LAST_LINE_LENGTH] for line in lines[-_MAX_LAST_LINES:]]

    def release(self) -> None:
        """Release the pipe of an ended call; it stays open for processes that still print."""
        if self._descriptor >= 0:
            released_pipes = self._collector.released_pipes
            released_pipes[self] = None
            while len(released_pipes) > self._collector.max_released_pipes:
                next(iter(released_pipes))._close()

    def _read(self) -> bool:
        """Read once, and log the lines that are complete; return whether there was data."""
        if self._descriptor < 0:
            return False
        dropping = self._limit.is_dropping
        try:
            data = os.read(self._descriptor, _DROPPED_READ_SIZE if dropping else _OUTPUT_READ_SIZE)
        except BlockingIOError:
            return False
        if not data:
            self._close()
            return False
        if dropping:
            self._drop(data)
            return True
        if self._is_cut:
            _, line_feed, data = data.partition(b"\n")
            self._is_cut = not line_feed
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        for line in lines:
            self._log(self._log_beginning(line, _MAX_LINE_BYTES))
        # A text that is masked may still be incomplete.
        self._partial_line = self._log_beginning(self._partial_line, _MAX_LINE_BYTES + self._overlap)
        return True

    def _log_beginning(self, line: bytes, most: int) -> bytes:
        """Log pieces of a line while it has more bytes than these; return its rest. No piece ends in a masked text."""
        while len(line) > most:
            line = mask_texts(line, self._masked_texts)
            if len(line) > most:
                cut = _character_start(line, _MAX_LINE_BYTES)
                self._log(line[:cut])
                line = line[cut:]
        return line

    def _drop(self, data: bytes) -> None:
        """Drop lines, without the cost of handling each; then pause, so that the flood costs others little time."""
        complete_lines, line_feed, self._partial_line = (self._partial_line + data).rpartition(b"\n")
        if line_feed:
            self._limit.drop(complete_lines.count(b"\n") + 1, len(complete_lines) + 1)
            last = complete_lines.rsplit(b"\n", _MAX_LAST_LINES)[-_MAX_LAST_LINES:]
            self._last.extend(line[:_MAX_LINE_BYTES] for line in last)
            self._is_cut = False
        if self._is_cut or len(self._partial_line) > _MAX_LINE_BYTES:
            self._limit.drop(1, len(self._partial_line))
            self._last.append(self._partial_line[:_MAX_LINE_BYTES])
            self._partial_line, self._is_cut = b"", True
        self._collector.loop.unwatch(self._descriptor)
        self._collector.loop.call_later(_DROPPED_READ_INTERVAL, self._watch)

    def _watch(self) -> None:
        if self._descriptor >= 0:
            self._collector.loop.watch(self._descriptor, READ, self._read)

    def flush(self) -> None:
        if self._partial_line:
            self._log(self._log_beginning(self._partial_line, _MAX_LINE_BYTES))
            self._partial_line = b""

    def _close(self) -> None:
        self.flush()
        self._collector.released_pipes.pop(self, None)
        self._collector.loop.forget(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1

    def _log(self, line: bytes) -> None:
        self._last.append(line)
        is_repeated, self._is_empty = self._is_empty and not line, not line
        if not is_repeated and self._limit.accept(len(line) + 1):
            output_log.info(self._event, extra={**self._fields, "text": self._text(line)})

    def _text(self, line: bytes) -> str:
        return mask_texts(line, self._masked_texts).decode("utf-8", "backslashreplace")


def _character_start(text: bytes, at: int) -> int:
    """Return the last index up to `at` at which a UTF-8 character begins; `at` if none begins near it."""
    for start in range(at, at - 4, -1):
        if text[start] & 0xC0 != 0x80:
            return start
    return at
