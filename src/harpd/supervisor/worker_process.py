"""A process that runs calls, as the warden has it: its channel, its output, its death.

Most processes serve one call and end with it. Where the procedure allows more, a process waits for the next call in
`IdleWorkers`. A process does not wait there when its call was stopped or died, when harpd's own code rejected its
call, when it wrote more than its closing line, or when its zygote has retired. A waiting process does not count as a
call. It ends as soon as its channel closes, or is killed.
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

__all__ = ["ForkListener", "IdleWorkers", "Usage", "WorkerProcess"]

log = logging.getLogger("harpd.supervisor")

#: Descriptors that no call may take, and their most as a share: stopping the others needs some, so do controls.
_RESERVED, _RESERVED_SHARE = 64, 8
#: Seconds that a process rests at least, and twice that at the most, before it is ended.
_REST = 10.0
#: Seconds for a process that rested to end by itself.
_EXIT = 5.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call's main process and the children that it waited for have used; None: not known.

    Attributes:
        cpu: seconds of processor time, of the user's and the system's.
        memory: bytes of memory at the most, of the largest of them.
    """

    cpu: float | None = None
    memory: int | None = None


class ForkListener(Protocol):
    """Who asked for a fork."""

    def on_forked(self, pid: int, start: int) -> None:
        """The process is there."""

    def on_fork_failed(self, reason: str) -> None:
        """There is no process."""

    def on_reaped(self, status: int, usage: Usage) -> None:
        """The process has ended, with this wait status; or its zygote has, and took it along."""


class WorkerProcess:
    """A process from its fork to its death. A `ForkListener`, which tells its present call.

    Args:
        loop: the event loop.
        output: where its pipes are made.
        fields: what the events of its output carry, until it serves another call.
        call: its first call.
        procedure: the name of the procedure that it runs.
        max_calls: how many calls it may serve.
        resting: where it waits between two calls.

    Raises:
        OSError: no descriptor is free; nothing has begun.

    Attributes:
        channel: our end of its channel, non-blocking.
        theirs: what it gets: its end of the channel, stdout, stderr.
        pid, start: which process it is; 0 before it was forked.
        group: its cgroup; None: it has none.
        served: how many calls it has got.
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
        resting: IdleWorkers,
    ) -> None:
        self._loop = loop
        self._output = output
        self._procedure = procedure
        self._max_calls = max_calls
        self._resting = resting
        self.pid = self.start = 0
        self.cgroup: Cgroup | None = None
        self.served = 1
        self.ended = False
        self._call: ForkListener | None = call
        self._cpu = 0.0  # what it had used when the present call began
        self.channel, self._pipes, self.child_descriptors = _equip(output, fields)

    def assign(self, call: ForkListener, fields: Mapping[str, str]) -> None:
        """Rest no more, and belong to another call."""
        self._call = call
        self.served += 1
        self._cpu = self._clock()
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
        cpu = None if usage.cpu is None else round(max(usage.cpu - self._cpu, 0.0), 6)
        self._call.on_reaped(status, Usage(cpu, usage.memory))

    @property
    def identity(self) -> tuple[int, int]:
        """Its pid and start time."""
        return self.pid, self.start

    def usage(self) -> Usage:
        """What its present call has used so far; not what children of the call have, nor how much memory."""
        return Usage(round(max(self._clock() - self._cpu, 0.0), 6), None)

    def _clock(self) -> float:
        """Seconds of processor time that it has used. See clock_getcpuclockid(3)."""
        try:
            return time.clock_gettime(~self.pid << 3 | 2)
        except OSError:  # it has just ended
            return self._cpu

    def last_errors(self) -> list[str]:
        """The last lines of the present call's stderr, when the call has just ended."""
        return self._output.drain_tail(self._pipes[1])

    def is_quiet(self) -> bool:
        """Whether it waits for a call, as it should: it lives, and has said nothing since its last one."""
        try:
            said = self.channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            said = b""
        if said:
            log.warning("a process has spoken after its call's end; it gets no other", extra={"pid": self.pid})
        return False

    @property
    def has_calls_left(self) -> bool:
        """Whether it may serve another call."""
        return self.served < self._max_calls and self._resting.open

    def become_idle(self) -> None:
        """Wait for another call: the present one has ended, and all that it has printed is there."""
        self._call = None
        self._loop.unwatch(self.channel.fileno())
        for pipe in self._pipes:
            self._output.drain_tail(pipe)
            pipe.flush()
        self._resting.add(self._procedure, self)

    def finish_input(self) -> None:
        """It gets no call any more: have it end by itself, once it has ended its last."""
        try:
            self.channel.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has gone already

    def shut_down(self) -> None:
        """End a process that rests. It is killed if it goes on."""
        self.close()
        self._loop.call_later(_EXIT, lambda: None if self.ended else self._kill())

    def _kill(self) -> None:
        send_signal(signal.SIGKILL, self.identity)

    def close(self) -> None:
        """Close the channel: the process is told nothing more, nor heard."""
        if self.channel.fileno() >= 0:
            self._loop.unwatch(self.channel.fileno())
            self.channel.close()

    def release(self) -> None:
        """It has ended, or never began. What it has left running may go on printing."""
        self._call = None
        self.close()
        for pipe in self._pipes:
            self._output.release(pipe)
        if self.cgroup is not None:
            self.cgroup.remove()


class IdleWorkers:
    """The processes of one zygote that wait for a further call of their procedures; the last one goes first.

    Args:
        loop: the event loop.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._by_procedure: dict[str, list[tuple[float, WorkerProcess]]] = {}
        self._open = True
        self._looking = False

    def __len__(self) -> int:
        return sum(map(len, self._by_procedure.values()))

    def identities(self) -> set[tuple[int, int]]:
        """Which processes rest."""
        return {process.identity for resting in self._by_procedure.values() for _, process in resting}

    @property
    def open(self) -> bool:
        """Whether processes may rest."""
        return self._open

    def add(self, procedure: str, process: WorkerProcess) -> None:
        """Let a process rest."""
        self._by_procedure.setdefault(procedure, []).append((self._loop.now(), process))
        if not self._looking:
            self._looking = True
            self._loop.call_later(_REST, self._look)

    def pop(self, procedure: str) -> WorkerProcess | None:
        """A process for a call; None: none rests that could serve it."""
        resting = self._by_procedure.get(procedure)
        while resting:
            _, process = resting.pop()
            if process.ended:
                continue
            if process.is_quiet():
                return process
            process.shut_down()
        return None

    def shut_down_oldest(self) -> None:
        """End the process that has rested longest, to make room."""
        waiting = [resting for resting in self._by_procedure.values() if resting]
        if waiting:
            _, process = min(waiting, key=lambda resting: resting[0][0]).pop(0)
            process.shut_down()

    def close(self) -> None:
        """End all, and let none rest any more."""
        self._open = False
        for resting in self._by_procedure.values():
            for _, process in resting:
                process.shut_down()
        self._by_procedure.clear()

    def _look(self) -> None:
        """End those that have rested for long. One look for all: a timer for each would cost each call."""
        until = self._loop.now() - _REST
        for resting in self._by_procedure.values():
            while resting and resting[0][0] <= until:
                resting.pop(0)[1].shut_down()
        self._looking = bool(len(self))
        if self._looking:
            self._loop.call_later(_REST, self._look)


def _equip(
    output: OutputCollector, fields: Mapping[str, str]
) -> tuple[socket.socket, tuple[OutputPipe, OutputPipe], tuple[int, int, int]]:
    """Make a process's descriptors: our end of its channel, our ends of its pipes, and its three."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    descriptors = [theirs.detach()]
    try:
        pipes: list[OutputPipe] = []
        for stream in ("stdout", "stderr"):
            pipe, writing = output.open_pipe(fields, stream)
            pipes.append(pipe)
            descriptors.append(writing)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if max(ours.fileno(), *descriptors, *(pipe.descriptor for pipe in pipes)) >= limit - min(
            _RESERVED, limit // _RESERVED_SHARE
        ):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    except OSError:
        ours.close()
        for descriptor in descriptors:  # the pipes' other ends see it, and go
            os.close(descriptor)
        raise
    return ours, (pipes[0], pipes[1]), (descriptors[0], descriptors[1], descriptors[2])
