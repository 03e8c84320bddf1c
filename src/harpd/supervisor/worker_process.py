"""A worker process in the supervisor: its channel, its output pipes, its death.

Most workers serve one call and exit with it. Where the procedure allows more, a worker waits for the next call in
`IdleWorkers`. It exits instead in these cases: its call was stopped or died; harpd's own code rejected its call; it
wrote more than its closing line; its zygote has retired. An idle worker does not count as a call. It exits as
soon as its channel closes, or is killed.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import time
from _socket import AF_UNIX, MSG_PEEK, SHUT_WR, SOCK_STREAM, socket, socketpair
from collections.abc import Mapping
from typing import Protocol

from harpd.processes.cgroup import Cgroup
from harpd.processes.process_tree import send_signal
from harpd.supervisor.event_loop import EventLoop
from harpd.supervisor.output import OutputCollector, OutputPipe

log = logging.getLogger("harpd.supervisor")

#: Descriptors that are reserved for stopping calls and for control requests: 64, or one eighth of a low limit.
_RESERVED, _RESERVED_SHARE = 64, 8
#: An idle worker is shut down after this many seconds at least, and after twice as many at most.
_IDLE_TIMEOUT = 10.0
#: Seconds in which an idle worker has to exit by itself before it is killed.
_EXIT_TIMEOUT = 5.0


class WorkerUser(Protocol):
    """The object that is notified of a worker's fork and death: its call."""

    def on_forked(self) -> None:
        """Handle that the worker exists."""

    def on_fork_failed(self, reason: str) -> None:
        """Handle that there is no worker."""

    def on_reaped(self, status: int, cpu: float | None, memory: int | None) -> None:
        """Handle that the worker has ended with this wait status, or was killed with its zygote.

        `cpu`: seconds of processor time of the worker and the children that it waited for; `memory`: maximum resident
        bytes of the largest of these processes; None: not known.
        """


class WorkerProcess:
    """A worker from the fork command to its death.

    Args:
        idle_workers: the workers of its zygote that wait for another call.

    Raises:
        OSError: no descriptor is free; nothing has begun.

    Attributes:
        call: its present call; None: it is pre-forked or idle, or released.
        channel: this end of its channel, non-blocking.
        child_descriptors: its own end of the channel, its stdout and its stderr.
        created_at: when it was created, by the clock of the loop.
        identity: its pid and start time; zeros before it was forked.
        procedure: the procedure of its calls; empty before its first call.
        served: how many calls it was assigned.
    """

    def __init__(self, loop: EventLoop, output: OutputCollector, idle_workers: IdleWorkers) -> None:
        self._loop = loop
        self._output = output
        self._idle_workers = idle_workers
        self.created_at = loop.now()
        self.identity = 0, 0
        self.cgroup: Cgroup | None = None
        self.call: WorkerUser | None = None
        self.procedure = ""
        self._max_calls = 0
        self.served = 0
        self._ended = False
        self._cpu_before = 0.0  # seconds that it had used when the present call began
        self.channel, self._pipes, self.child_descriptors = _open_channels(output)

    def assign(self, call: WorkerUser, procedure: str, max_calls: int, fields: Mapping[str, str]) -> None:
        """Assign a call to it.

        Args:
            call: the call, which is notified of its death.
            procedure: the call's procedure, that of all its calls.
            max_calls: how many calls it may serve.
            fields: the fields of the log events of its output.
        """
        self.call, self.procedure, self._max_calls = call, procedure, max_calls
        if self.served:
            self._cpu_before = self._cpu_seconds()
        self.served += 1
        for pipe in self._pipes:
            pipe.assign(fields)

    @property
    def is_forked(self) -> bool:
        """Whether the zygote has forked it."""
        return self.identity[0] != 0

    def on_forked(self, pid: int, start: int) -> None:
        """Record its identity, and notify its call if it has one."""
        self.identity = pid, start
        if self.call is not None:
            self.call.on_forked()

    def on_fork_failed(self, reason: str) -> None:
        """Notify its call, or release its resources: the zygote cannot fork it."""
        if self.call is None:
            self.release()
        else:
            self.call.on_fork_failed(reason)

    def on_reaped(self, status: int, cpu: float | None, memory: int | None) -> None:
        """Notify its call, see `WorkerUser`. `cpu` is that of all its calls; the call gets only its own part."""
        self._ended = True
        if self.call is None:
            self.release()
        else:
            self.call.on_reaped(status, None if cpu is None else self._cpu_since_assigned(cpu), memory)

    def call_cpu_seconds(self) -> float:
        """Return the processor time of its present call so far, without that of the call's children."""
        return self._cpu_since_assigned(self._cpu_seconds())

    def _cpu_since_assigned(self, cpu: float) -> float:
        return round(max(cpu - self._cpu_before, 0.0), 6)

    def _cpu_seconds(self) -> float:
        """Return the processor time that it has used. See clock_getcpuclockid(3)."""
        try:
            return time.clock_gettime(~self.identity[0] << 3 | 2)
        except OSError:  # it has just ended
            return self._cpu_before

    def last_errors(self) -> list[str]:
        """Return the last lines of the present call's stderr, when the call has just ended."""
        return self._output.drain_tail(self._pipes[1])

    def is_quiet(self) -> bool:
        """Return whether it can be assigned a call: it lives, and has written nothing since its last call."""
        try:
            data = self.channel.recv(1, MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if data:
            log.warning("idle worker wrote output; not reused", extra={"pid": self.identity[0]})
        return False

    @property
    def has_calls_left(self) -> bool:
        """Whether it may serve another call."""
        return self.served < self._max_calls and self._idle_workers.accepts

    def become_idle(self) -> None:
        """Wait for another call: the present one has ended, and all its output has arrived."""
        self.call = None
        self._loop.unwatch(self.channel.fileno())
        for pipe in self._pipes:
            self._output.drain_tail(pipe)
            pipe.flush()
        self._idle_workers.add(self)

    def finish_input(self) -> None:
        """Have it exit after its present call: it gets no other one."""
        try:
            self.channel.shutdown(SHUT_WR)
        except OSError:
            pass  # it has exited already

    def shut_down(self) -> None:
        """Have a worker without a call exit; it is killed if it does not."""
        self.close()
        self._loop.call_later(_EXIT_TIMEOUT, self._kill_if_alive)

    def _kill_if_alive(self) -> None:
        if self.is_forked and not self._ended:
            send_signal(signal.SIGKILL, self.identity)

    def close(self) -> None:
        """Close the channel: nothing more is sent or received."""
        if self.channel.fileno() >= 0:
            self._loop.unwatch(self.channel.fileno())
            self.channel.close()

    def release(self) -> None:
        """Release its resources; it has ended, or was never forked. Processes that it left running may still print."""
        self.call = None
        self.close()
        for pipe in self._pipes:
            self._output.release(pipe)
        if self.cgroup is not None:
            self.cgroup.remove()


class IdleWorkers:
    """The workers of one zygote that wait for another call of their procedures; the last one is assigned first.

    Attributes:
        accepts: whether workers may be added.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._idle_since: dict[WorkerProcess, float] = {}  # longest first
        self.accepts = True
        self._check_is_due = False

    def __len__(self) -> int:
        return len(self._idle_since)

    def add(self, worker: WorkerProcess) -> None:
        """Add a worker that has ended its call."""
        self._idle_since[worker] = self._loop.now()
        if not self._check_is_due:
            self._check_is_due = True
            self._loop.call_later(_IDLE_TIMEOUT, self._shut_down_expired)

    def pop(self, procedure: str) -> WorkerProcess | None:
        """Remove and return a worker that can serve a call of the procedure; None if there is none."""
        if not self._idle_since:  # nearly always
            return None
        for worker in [worker for worker in reversed(self._idle_since) if worker.procedure == procedure]:
            del self._idle_since[worker]
            if worker.is_quiet():
                return worker
            worker.shut_down()
        return None

    def shut_down_oldest(self) -> None:
        """Shut down the worker that has waited longest."""
        if self._idle_since:
            self._shut_down(next(iter(self._idle_since)))

    def close(self) -> None:
        """Shut down all, and accept no more."""
        self.accepts = False
        for worker in [*self._idle_since]:
            self._shut_down(worker)

    def _shut_down_expired(self) -> None:
        """Shut down the workers that were idle for too long. One timer serves all: one per worker would cost time."""
        until = self._loop.now() - _IDLE_TIMEOUT
        for worker in [worker for worker, since in self._idle_since.items() if since <= until]:
            self._shut_down(worker)
        self._check_is_due = bool(self._idle_since)
        if self._check_is_due:
            self._loop.call_later(_IDLE_TIMEOUT, self._shut_down_expired)

    def _shut_down(self, worker: WorkerProcess) -> None:
        del self._idle_since[worker]
        worker.shut_down()


def _open_channels(
    output: OutputCollector,
) -> tuple[socket, tuple[OutputPipe, OutputPipe], tuple[int, int, int]]:
    """Create the descriptors of a worker.

    Returns:
        This end of its channel, the reading ends of its pipes, and the three descriptors of the worker.

    Raises:
        OSError: no descriptor is free.
    """
    near, far = socketpair(AF_UNIX, SOCK_STREAM)
    near.setblocking(False)
    descriptors = [far.detach()]
    try:
        stdout, writing_end = output.open_pipe("stdout")
        descriptors.append(writing_end)
        stderr, writing_end = output.open_pipe("stderr")
        descriptors.append(writing_end)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(near.fileno(), stdout.descriptor, stderr.descriptor, *descriptors)
        if highest >= limit - min(_RESERVED, limit // _RESERVED_SHARE):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    except OSError:
        near.close()
        for descriptor in descriptors:  # the reading ends of the pipes see the close, and are closed as well
            os.close(descriptor)
        raise
    return near, (stdout, stderr), (descriptors[0], descriptors[1], descriptors[2])
