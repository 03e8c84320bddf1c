"""A worker process as the supervisor has it: its channel, its output pipes, its death.

Most workers serve one call and exit with it. Where the procedure allows more, a worker waits for the next call in
`IdleWorkers`. It does not wait there if its call was stopped or died, if harpd's own code rejected its call, if it
wrote more than its closing line, or if its zygote has retired. An idle worker does not count as a call. It exits as
soon as its channel closes, or is killed.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from harpd.processes.cgroup import Cgroup
from harpd.processes.process_tree import send_signal
from harpd.supervisor.event_loop import EventLoop
from harpd.supervisor.output import OutputCollector, OutputPipe

log = logging.getLogger("harpd.supervisor")

#: Descriptors that no call may use, and their largest share: to stop other calls and to answer control requests.
_RESERVED, _RESERVED_SHARE = 64, 8
#: A worker is idle for at least so many seconds, and for twice as long at most, before it is shut down.
_IDLE_TIMEOUT = 10.0
#: Seconds in which an idle worker has to exit by itself before it is killed.
_EXIT_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Usage:
    """The resources that a call's main process and the children that it waited for have used; None: not known.

    Attributes:
        cpu: seconds of processor time, of user and system.
        memory: maximum resident bytes of the largest of these processes.
    """

    cpu: float | None = None
    memory: int | None = None


class ForkListener(Protocol):
    """The object that is notified of a worker's fork and death."""

    def on_forked(self, pid: int, start: int) -> None:
        """Handle that the worker exists."""

    def on_fork_failed(self, reason: str) -> None:
        """Handle that there is no worker."""

    def on_reaped(self, status: int, usage: Usage) -> None:
        """Handle that the worker has ended with this wait status, or was killed with its zygote."""


class WorkerProcess:
    """A worker from its fork to its death. A `ForkListener`, which notifies its present call.

    Args:
        loop: the event loop.
        output: creates its pipes.
        fields: the fields of the log events of its output, until it is assigned another call.
        call: its first call.
        procedure: the name of its procedure.
        max_calls: how many calls it may serve.
        idle_workers: the workers of its zygote that wait for another call.

    Raises:
        OSError: no descriptor is free; nothing has begun.

    Attributes:
        channel: this end of its channel, non-blocking.
        child_descriptors: its own end of the channel, its stdout and its stderr.
        pid, start: its pid and start time; 0 before it was forked.
        cgroup: its cgroup; None: it has none.
        served: how many calls it was assigned.
        ended: whether it was reaped.
    """

    def __init__(
        self,
        loop: EventLoop,
        output: OutputCollector,
        fields: Mapping[str, str],
        call: ForkListener,
        procedure: str,
        max_calls: int,
        idle_workers: IdleWorkers,
    ) -> None:
        self._loop = loop
        self._output = output
        self._procedure = procedure
        self._max_calls = max_calls
        self._idle_workers = idle_workers
        self.pid = self.start = 0
        self.cgroup: Cgroup | None = None
        self.served = 1
        self.ended = False
        self._call: ForkListener | None = call
        self._cpu_before = 0.0  # seconds that it had used when the present call began
        self.channel, self._pipes, self.child_descriptors = _open_channels(output, fields)

    def assign(self, call: ForkListener, fields: Mapping[str, str]) -> None:
        """Assign another call to an idle worker."""
        self._call = call
        self.served += 1
        self._cpu_before = self._cpu_seconds()
        for pipe in self._pipes:
            pipe.assign(fields)

    def on_forked(self, pid: int, start: int) -> None:
        """See `ForkListener`."""
        self.pid, self.start = pid, start
        if self._call is not None:
            self._call.on_forked(pid, start)

    def on_fork_failed(self, reason: str) -> None:
        """See `ForkListener`."""
        if self._call is not None:
            self._call.on_fork_failed(reason)

    def on_reaped(self, status: int, usage: Usage) -> None:
        """See `ForkListener`. After several calls, `usage` is that of the last one, as far as it is known."""
        self.ended = True
        if self._call is None:
            self.release()
            return
        cpu = None if usage.cpu is None else round(max(usage.cpu - self._cpu_before, 0.0), 6)
        self._call.on_reaped(status, Usage(cpu, usage.memory))

    @property
    def identity(self) -> tuple[int, int]:
        """Its pid and start time."""
        return self.pid, self.start

    def usage(self) -> Usage:
        """Return the processor time of its present call so far, without that of the call's children."""
        return Usage(round(max(self._cpu_seconds() - self._cpu_before, 0.0), 6), None)

    def _cpu_seconds(self) -> float:
        """Return the processor time that it has used. See clock_getcpuclockid(3)."""
        try:
            return time.clock_gettime(~self.pid << 3 | 2)
        except OSError:  # it has just ended
            return self._cpu_before

    def last_errors(self) -> list[str]:
        """Return the last lines of the present call's stderr, when the call has just ended."""
        return self._output.drain_tail(self._pipes[1])

    def is_quiet(self) -> bool:
        """Return whether it can be assigned a call: it lives, and has written nothing since its last call."""
        try:
            data = self.channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if data:
            log.warning("idle worker wrote output; not reused", extra={"pid": self.pid})
        return False

    @property
    def has_calls_left(self) -> bool:
        """Whether it may serve another call."""
        return self.served < self._max_calls and self._idle_workers.accepts

    def become_idle(self) -> None:
        """Wait for another call: the present one has ended, and all its output has arrived."""
        self._call = None
        self._loop.unwatch(self.channel.fileno())
        for pipe in self._pipes:
            self._output.drain_tail(pipe)
            pipe.flush()
        self._idle_workers.add(self._procedure, self)

    def finish_input(self) -> None:
        """Have it exit after its present call: it gets no other one."""
        try:
            self.channel.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has exited already

    def shut_down(self) -> None:
        """Have an idle worker exit; it is killed if it does not."""
        self.close()
        self._loop.call_later(_EXIT_TIMEOUT, self._kill_if_alive)

    def _kill_if_alive(self) -> None:
        if not self.ended:
            send_signal(signal.SIGKILL, self.identity)

    def close(self) -> None:
        """Close the channel: nothing more is sent or received."""
        if self.channel.fileno() >= 0:
            self._loop.unwatch(self.channel.fileno())
            self.channel.close()

    def release(self) -> None:
        """Release its resources; it has ended, or was never forked. Processes that it left running may still print."""
        self._call = None
        self.close()
        for pipe in self._pipes:
            self._output.release(pipe)
        if self.cgroup is not None:
            self.cgroup.remove()


class IdleWorkers:
    """The workers of one zygote that wait for another call of their procedures; the last one is assigned first.

    Args:
        loop: the event loop.

    Attributes:
        accepts: whether workers may be added.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._by_procedure: dict[str, list[tuple[float, WorkerProcess]]] = {}
        self.accepts = True
        self._check_is_due = False

    def __len__(self) -> int:
        return sum(map(len, self._by_procedure.values()))

    def identities(self) -> set[tuple[int, int]]:
        """Return the pids and start times of all."""
        return {worker.identity for workers in self._by_procedure.values() for _, worker in workers}

    def add(self, procedure: str, worker: WorkerProcess) -> None:
        """Add a worker that has ended its call."""
        self._by_procedure.setdefault(procedure, []).append((self._loop.now(), worker))
        if not self._check_is_due:
            self._check_is_due = True
            self._loop.call_later(_IDLE_TIMEOUT, self._shut_down_expired)

    def pop(self, procedure: str) -> WorkerProcess | None:
        """Remove and return a worker that can serve a call of the procedure; None if there is none."""
        workers = self._by_procedure.get(procedure)
        while workers:
            _, worker = workers.pop()
            if worker.ended:
                continue
            if worker.is_quiet():
                return worker
            worker.shut_down()
        return None

    def shut_down_oldest(self) -> None:
        """Shut down the worker that has waited longest."""
        waiting = [workers for workers in self._by_procedure.values() if workers]
        if waiting:
            _, worker = min(waiting, key=lambda workers: workers[0][0]).pop(0)
            worker.shut_down()

    def close(self) -> None:
        """Shut down all, and accept no more."""
        self.accepts = False
        for workers in self._by_procedure.values():
            for _, worker in workers:
                worker.shut_down()
        self._by_procedure.clear()

    def _shut_down_expired(self) -> None:
        """Shut down the workers that were idle for too long. One timer serves all: one per worker would cost time."""
        until = self._loop.now() - _IDLE_TIMEOUT
        for workers in self._by_procedure.values():
            while workers and workers[0][0] <= until:
                workers.pop(0)[1].shut_down()
        self._check_is_due = bool(len(self))
        if self._check_is_due:
            self._loop.call_later(_IDLE_TIMEOUT, self._shut_down_expired)


def _open_channels(
    output: OutputCollector, fields: Mapping[str, str]
) -> tuple[socket.socket, tuple[OutputPipe, OutputPipe], tuple[int, int, int]]:
    """Create the descriptors of a worker.

    Returns:
        This end of its channel, the reading ends of its pipes, and the three descriptors of the worker.

    Raises:
        OSError: no descriptor is free.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    near.setblocking(False)
    descriptors = [far.detach()]
    try:
        pipes: list[OutputPipe] = []
        for stream in ("stdout", "stderr"):
            pipe, writing_end = output.open_pipe(fields, stream)
            pipes.append(pipe)
            descriptors.append(writing_end)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if max(near.fileno(), *descriptors, *(pipe.descriptor for pipe in pipes)) >= limit - min(
            _RESERVED, limit // _RESERVED_SHARE
        ):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    except OSError:
        near.close()
        for descriptor in descriptors:  # the reading ends of the pipes see the close, and are closed as well
            os.close(descriptor)
        raise
    return near, (pipes[0], pipes[1]), (descriptors[0], descriptors[1], descriptors[2])
