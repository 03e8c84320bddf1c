"""A process that runs calls, as the warden has it: its channel, its output, its death.

Most processes serve one call and end with it. Where the procedure allows more calls per process, a process waits for
the next call in `Resting`. A process does not wait there when its call was stopped or died, when harpd's own code
rejected its call, when it wrote more than its closing line, or when its zygote has retired. A waiting process does not
count as a call. It ends as soon as its channel closes, or is killed.
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
from harpd.processes.process_tree import send
from harpd.supervisor.event_loop import EventLoop
from harpd.supervisor.output import Output, Pipe

__all__ = ["CallProcess", "Parent", "Resting", "Usage"]

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


class Parent(Protocol):
    """Who asked for a fork."""

    def forked(self, pid: int, start: int) -> None:
        """The process is there."""

    def refused(self, reason: str) -> None:
        """There is no process."""

    def reaped(self, status: int, usage: Usage) -> None:
        """The process has ended, with this wait status; or its zygote has, and took it along."""


class CallProcess:
    """A process from its fork to its death. A `Parent`, which tells its present call.

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
        output: Output,
        fields: Mapping[str, str],
        call: Parent,
        procedure: str,
        max_calls: int,
        resting: Resting,
    ) -> None:
        self._loop = loop
        self._output = output
        self._procedure = procedure
        self._max_calls = max_calls
        self._resting = resting
        self.pid = self.start = 0
        self.group: Cgroup | None = None
        self.served = 1
        self.ended = False
        self._call: Parent | None = call
        self._cpu = 0.0  # what it had used when the present call began
        self.channel, self._pipes, self.theirs = _equip(output, fields)

    def serve(self, call: Parent, fields: Mapping[str, str]) -> None:
        """Rest no more, and belong to another call."""
        self._call = call
        self.served += 1
        self._cpu = self._clock()
        for pipe in self._pipes:
            pipe.begin(fields)

    def forked(self, pid: int, start: int) -> None:
        """See `Parent`."""
        self.pid, self.start = pid, start
        if self._call is not None:
            self._call.forked(pid, start)

    def refused(self, reason: str) -> None:
        """See `Parent`."""
        if self._call is not None:
            self._call.refused(reason)

    def reaped(self, status: int, usage: Usage) -> None:
        """See `Parent`. Of one that has served many calls the usage is the last one's, as far as that is known."""
        self.ended = True
        if self._call is None:
            self.dispose()
            return
        cpu = None if usage.cpu is None else round(max(usage.cpu - self._cpu, 0.0), 6)
        self._call.reaped(status, Usage(cpu, usage.memory))

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
        return self._output.tail(self._pipes[1])

    def says_nothing(self) -> bool:
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

    def rest(self) -> None:
        """Wait for another call: the present one has ended, and all that it has printed is there."""
        self._call = None
        self._loop.forget(self.channel.fileno())
        for pipe in self._pipes:
            self._output.tail(pipe)
            pipe.end()
        self._resting.put(self._procedure, self)

    def leave(self) -> None:
        """It gets no call any more: have it end by itself, once it has ended its last."""
        try:
            self.channel.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has gone already

    def end(self) -> None:
        """End a process that rests. It is killed if it goes on."""
        self.close()
        self._loop.after(_EXIT, lambda: None if self.ended else self._kill())

    def _kill(self) -> None:
        send(signal.SIGKILL, self.identity)

    def close(self) -> None:
        """Close the channel: the process is told nothing more, nor heard."""
        if self.channel.fileno() >= 0:
            self._loop.forget(self.channel.fileno())
            self.channel.close()

    def dispose(self) -> None:
        """It has ended, or never began. What it has left running may go on printing."""
        self._call = None
        self.close()
        for pipe in self._pipes:
            self._output.leave(pipe)
        if self.group is not None:
            self.group.remove()


class Resting:
    """The processes of one zygote that wait for a further call of their procedures; the last one goes first.

    Args:
        loop: the event loop.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._by_procedure: dict[str, list[tuple[float, CallProcess]]] = {}
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

    def put(self, procedure: str, process: CallProcess) -> None:
        """Let a process rest."""
        self._by_procedure.setdefault(procedure, []).append((self._loop.now(), process))
        if not self._looking:
            self._looking = True
            self._loop.after(_REST, self._look)

    def take(self, procedure: str) -> CallProcess | None:
        """A process for a call; None: none rests that could serve it."""
        resting = self._by_procedure.get(procedure)
        while resting:
            _, process = resting.pop()
            if process.ended:
                continue
            if process.says_nothing():
                return process
            process.end()
        return None

    def end_oldest(self) -> None:
        """End the process that has rested longest, to make room."""
        waiting = [resting for resting in self._by_procedure.values() if resting]
        if waiting:
            _, process = min(waiting, key=lambda resting: resting[0][0]).pop(0)
            process.end()

    def close(self) -> None:
        """End all, and let none rest any more."""
        self._open = False
        for resting in self._by_procedure.values():
            for _, process in resting:
                process.end()
        self._by_procedure.clear()

    def _look(self) -> None:
        """End those that have rested for long. One look for all: a timer for each would cost each call."""
        until = self._loop.now() - _REST
        for resting in self._by_procedure.values():
            while resting and resting[0][0] <= until:
                resting.pop(0)[1].end()
        self._looking = bool(len(self))
        if self._looking:
            self._loop.after(_REST, self._look)


def _equip(output: Output, fields: Mapping[str, str]) -> tuple[socket.socket, tuple[Pipe, Pipe], tuple[int, int, int]]:
    """Make a process's descriptors: our end of its channel, our ends of its pipes, and its three."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    descriptors = [theirs.detach()]
    try:
        pipes: list[Pipe] = []
        for stream in ("stdout", "stderr"):
            pipe, writing = output.open(fields, stream)
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
