"""One call as the warden sees it: its process, what it says, its limit, and its end.

What the process writes goes to the gate's connection as it comes, through a bounded buffer: while that is full
nothing is read, so that the process waits (back-pressure) and nothing is dropped. The end is decided here, once:

- a limit that fired, a cancel or a shutdown stands, whatever the process says afterwards;
- else the process's own closing line;
- else the process died without one: ``call_died``, and what it left is stopped.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Mapping
from enum import Enum

from harp.protocol.daemon import Acknowledgement, Message, encode_message
from harp.protocol.ends import Failed
from harp.protocol.jsontext import Raw
from harpd.eventloop import READ, WRITE, EventLoop, Timer
from harpd.mark import entry
from harpd.nursery import Offered, Zygote
from harpd.output import Output
from harpd.processes import Process, Tree
from harpd.records import CallRecords
from harpd.stopping import Stopping

__all__ = ["RunningCall", "Stop"]

log = logging.getLogger("harpd.warden")

_READ_SIZE = 1 << 16
#: Descriptors that no call may take, and their most as a share: stopping the others needs some, so do controls.
_RESERVED, _RESERVED_SHARE = 64, 8

_RECORD = b'{"stream":'


class Stop(Enum):
    """Why a call is stopped."""

    TIME_LIMIT = "timeout"
    CANCELLED = "cancelled"
    SHUTDOWN = "shutdown"


class RunningCall:
    """A call from its fork to the death of its processes.

    Args:
        loop: the event loop.
        connection: the gate's connection for this call, non-blocking; owned by this object from now on.
        call_id: the call's id, the gate's choice.
        procedure: its name.
        offered: what the zygote says of the procedure.
        zygote: who forks.
        kill_grace: seconds between the steps of stopping.
        spool: how many bytes may wait for the gate.
        records: where running calls are recorded.
        look: gives all processes as they were at this moment of the monotonic clock, or later.
        output: where the pipes for its stdout and stderr are made.
        on_gone: called once, when nothing of the call is left.
        on_closed: called once, when moreover the gate has been told everything.

    Raises:
        OSError: no descriptor is free; the connection is still the caller's.
    """

    def __init__(
        self,
        loop: EventLoop,
        connection: socket.socket,
        call_id: str,
        procedure: str,
        offered: Offered,
        zygote: Zygote,
        kill_grace: float,
        spool: int,
        records: CallRecords,
        look: Callable[[float], Mapping[int, Process]],
        output: Output,
        on_gone: Callable[[RunningCall], None],
        on_closed: Callable[[RunningCall], None],
    ) -> None:
        self._loop = loop
        self._gate: socket.socket | None = connection
        self.id = call_id
        self._offered = offered
        self._kill_grace = kill_grace
        self._spool = spool
        self._records = records
        self._look = look
        self._output = output
        self._on_gone = on_gone
        self._on_closed = on_closed
        self._fields = {"call": call_id, "procedure": procedure}
        self._to_gate = bytearray()
        self._to_call = memoryview(b"")
        self._from_call = bytearray()
        self._said_end = False
        self._caller_gone = False
        self._stopped: Stop | None = None
        self._limit: Timer | None = None
        self._processes: Stopping | None = None  # None: the zygote has not forked yet
        self._gone = False
        self._channel, self._pipes, theirs = _equip(output, self._fields)
        zygote.fork(call_id, procedure, theirs, self)

    def give(self, arguments: Raw) -> None:
        """Give the process its arguments; once."""
        self._to_call = memoryview(bytes(arguments) + b"\n")
        self._watch()

    # What the zygote says.

    def forked(self, pid: int, start: int) -> None:
        """The process is there: the call is acknowledged."""
        tree = Tree(pid, start, entry(self.id))
        self._processes = Stopping(self._loop, tree, self._kill_grace, self._look, self._leave)
        try:
            self._records.add(self.id, tree)
        except OSError as error:  # it would be missed only if this warden were killed
            log.error("a call can't be recorded", extra={**self._fields, "reason": str(error)})
        log.info("call started", extra={**self._fields, "pid": pid})
        if self._stopped is None:
            self._say(Acknowledgement(self._offered.streaming))
            if self._offered.timeout is not None:
                self._limit = self._loop.after(self._offered.timeout, lambda: self.stop(Stop.TIME_LIMIT))
        else:
            self._processes.begin(interrupt=False)
        self._watch()

    def refused(self, reason: str) -> None:
        """There is no process."""
        self._end(Failed("system_error", reason))
        self._leave()

    def reaped(self, status: int) -> None:
        """The main process has ended: what it has said is read to the end, then its end is known."""
        assert self._processes is not None
        self._read_call()
        self._close_channel()  # a descendant may hold the channel; the call is over all the same
        if self._limit is not None:
            self._limit.cancel()
        if self._said_end:
            self._leave()  # what it left running is not ours to stop
            return
        if self._stopped is Stop.CANCELLED:  # nobody is there to be told
            self._said_end = True
            log.info("call ended", extra={**self._fields, "end": "cancelled"})
        else:
            self._end(self._stopped_end(status))
        self._processes.main_ended()

    # Stopping.

    def stop(self, why: Stop) -> None:
        """Stop the call; the first reason stands. One that has ended by itself is left alone."""
        if self._stopped is not None or self._said_end:
            return
        self._stopped = why
        log.info("call is stopped", extra={**self._fields, "why": why.value})
        if self._processes is not None:
            self._processes.begin(interrupt=why is Stop.TIME_LIMIT)

    def _stopped_end(self, status: int) -> Failed:
        match self._stopped:
            case Stop.TIME_LIMIT:
                return Failed("timeout", f"the procedure took more than its limit of {self._offered.timeout:g} s")
            case Stop.SHUTDOWN:
                return Failed("shutdown", "harpd was stopped while the call ran")
            case _:
                return _died(status)

    # What the process says, and who hears it.

    def _watch(self) -> None:
        """Watch for what can be done now, and for the other sides going away."""
        if self._channel.fileno() >= 0:
            # Nothing is read before the acknowledgement has gone out: it comes first on the wire. And nothing is
            # given before the call is recorded: till then the procedure can't have started anything.
            recorded = self._processes is not None
            reading = recorded and len(self._to_gate) < self._spool
            events = (READ if reading else 0) | (WRITE if recorded and self._to_call else 0)
            if events:
                self._loop.watch(self._channel.fileno(), events, self._on_channel)
            else:  # watched for nothing it would still report its hang-up, again and again
                self._loop.forget(self._channel.fileno())
        if self._gate is not None and not self._caller_gone:
            self._loop.watch(self._gate.fileno(), READ | (WRITE if self._to_gate else 0), self._on_gate)

    def _on_channel(self) -> None:
        if self._to_call:
            try:
                self._to_call = self._to_call[self._channel.send(self._to_call) :] or memoryview(b"")
            except BlockingIOError:
                pass
            except OSError:
                self._to_call = memoryview(b"")
        if self._processes is not None:
            self._read_call(1)
        self._watch()

    def _read_call(self, most: int | None = None) -> None:
        """Read what the process has written; `most` times, or to the end of what is there."""
        while most != 0 and self._channel.fileno() >= 0:
            if len(self._to_gate) >= self._spool and most is not None:
                return
            try:
                data = self._channel.recv(_READ_SIZE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._close_channel()
                return
            self._take(data)
            most = None if most is None else most - 1

    def _take(self, data: bytes) -> None:
        if self._stopped is not None or self._said_end:
            return  # the end is decided
        end = data.rfind(b"\n") + 1
        if not end:
            self._from_call += data
            return
        lines = bytes(self._from_call) + data[:end]
        self._from_call = bytearray(data[end:])
        last = lines.rfind(b"\n", 0, -1) + 1
        if not lines.startswith(_RECORD, last):
            self._said_end = True
            if self._limit is not None:
                self._limit.cancel()
            log.info("call ended", extra={**self._fields, "end": _kind(lines[last:])})
            assert self._processes is not None
            self._processes.expect_exit()
        self._pass_on(lines)

    def _end(self, end: Failed) -> None:
        self._said_end = True
        log.info("call ended", extra={**self._fields, "end": end.type, "reason": end.message})
        self._say(end)

    def _say(self, message: Message) -> None:
        self._pass_on(encode_message(message))

    def _pass_on(self, lines: bytes) -> None:
        if self._gate is not None and not self._caller_gone:
            self._to_gate += lines
            self._send_gate()
            self._watch()

    def _send_gate(self) -> None:
        try:
            while self._to_gate and self._gate is not None:
                del self._to_gate[: self._gate.send(self._to_gate)]
        except BlockingIOError:
            pass
        except OSError:
            self._caller_left()

    def _on_gate(self) -> None:
        self._send_gate()
        if self._gate is None or self._caller_gone:
            return
        try:
            if not self._gate.recv(_READ_SIZE):
                self._caller_left()
                return
        except BlockingIOError:
            pass
        except OSError:
            self._caller_left()
            return
        self._watch()
        self._close_gate_if_done()

    def _caller_left(self) -> None:
        """Nobody wants the call any more. The connection stays open until its processes are gone."""
        if self._gate is not None:
            self._loop.forget(self._gate.fileno())
        self._caller_gone = True
        self._to_gate.clear()
        self.stop(Stop.CANCELLED)
        self._watch()  # what the process still says is read, and dropped
        self._close_gate_if_done()

    # Leaving.

    def _leave(self) -> None:
        """Nothing of the call is left, or nothing that is ours to stop."""
        if self._gone:
            return
        self._gone = True
        if self._limit is not None:
            self._limit.cancel()
        if self._processes is not None:
            self._processes.cancel()
        self._close_channel()
        for pipe in self._pipes:
            self._output.leave(pipe)
        self._records.remove(self.id)
        self._on_gone(self)
        self._close_gate_if_done()

    def _close_channel(self) -> None:
        if self._channel.fileno() >= 0:
            self._loop.forget(self._channel.fileno())
            self._channel.close()

    def _close_gate_if_done(self) -> None:
        if self._gone and not self._to_gate and self._gate is not None:
            self._loop.forget(self._gate.fileno())
            self._gate.close()
            self._gate = None
            self._on_closed(self)


def _equip(output: Output, fields: Mapping[str, str]) -> tuple[socket.socket, tuple[int, int], tuple[int, int, int]]:
    """Make a call's descriptors: our end of its channel, our ends of its pipes, and its three."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    descriptors = [theirs.detach()]
    try:
        pipes = []
        for stream in ("stdout", "stderr"):
            reading, writing = output.open(fields, stream)
            pipes.append(reading)
            descriptors.append(writing)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if max(ours.fileno(), *descriptors, *pipes) >= limit - min(_RESERVED, limit // _RESERVED_SHARE):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    except OSError:
        ours.close()
        for descriptor in descriptors:  # the pipes' other ends see it, and go
            os.close(descriptor)
        raise
    return ours, (pipes[0], pipes[1]), (descriptors[0], descriptors[1], descriptors[2])


def _kind(line: bytes) -> str:
    for kind in ("result", "exception", "error"):
        if line.startswith((f'{{"{kind}"'.encode(), f'{{"harp":1,"{kind}"'.encode())):
            return kind
    return "unknown"


def _died(status: int) -> Failed:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        return Failed("call_died", f"the call's process was ended by {name}", {"signal": name})
    code = os.waitstatus_to_exitcode(status)
    return Failed("call_died", f"the call's process ended without a result, exit code {code}", {"code": code})
