"""One call as the warden sees it: its process, what it says, its limit, and its end.

What the process writes goes to the gate's connection as it comes, through a bounded buffer: while that is full
nothing is read, so that the process waits (back-pressure) and nothing is dropped. The end is decided here, once:

- a limit that fired, a cancel or a shutdown stands, whatever the process says afterwards;
- else the process's own closing line;
- else the process died without one: ``call_died``.

Stopping: SIGXCPU to the main process for a limit, which may clean up; then SIGTERM to the tree, then SIGKILL to the
tree until it is empty, `kill_grace` seconds between the steps. The main process is stopped first and killed last in
each sweep: as their subreaper it keeps the others findable.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from enum import Enum

from harp.protocol.daemon import Acknowledgement, Message, encode_message
from harp.protocol.ends import Failed
from harp.protocol.jsontext import Raw
from harpd.call import CALL_VARIABLE
from harpd.eventloop import READ, WRITE, EventLoop, Timer
from harpd.nursery import Offered, Zygote
from harpd.output import Output
from harpd.processes import Process, Tree, send
from harpd.records import CallRecords

__all__ = ["RunningCall", "Stop"]

log = logging.getLogger("harpd.warden")

_READ_SIZE = 1 << 16
#: Seconds between two looks whether a stopped call's processes are gone.
_LOOK = 0.05

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
        on_gone: called once, when nothing of the call is left.
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
    ) -> None:
        self._loop = loop
        self._gate: socket.socket | None = connection
        self.id = call_id
        self._procedure = procedure
        self._offered = offered
        self._kill_grace = kill_grace
        self._spool = spool
        self._records = records
        self._look = look
        self._on_gone = on_gone
        self._fields = {"call": call_id, "procedure": procedure}
        self._to_gate = bytearray()
        self._from_call = bytearray()
        self._said_end = False
        self._stopping: Stop | None = None
        self._stopped_at = 0.0
        self._step: Timer | None = None
        self._limit: Timer | None = None
        self._tree: Tree | None = None
        self._known: set[tuple[int, int]] = set()
        self._status: int | None = None
        self._eof = False
        self._gone = False
        self._caller_gone = False
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel.setblocking(False)
        stdout, stderr = output.open(self._fields, "stdout"), output.open(self._fields, "stderr")
        self._to_call = memoryview(b"")
        zygote.fork(call_id, procedure, (theirs.detach(), stdout, stderr), self)

    def give(self, arguments: Raw) -> None:
        """Give the process its arguments; once."""
        self._to_call = memoryview(bytes(arguments) + b"\n")
        self._watch()

    # What the zygote says.

    def forked(self, pid: int, start: int) -> None:
        """The process is there: the call is acknowledged."""
        self._tree = Tree(pid, start, f"{CALL_VARIABLE}={self.id}".encode())
        self._records.add(self.id, pid, start)
        log.info("call started", extra={**self._fields, "pid": pid})
        if self._stopping is None:
            self._say(Acknowledgement(self._offered.streaming))
            if self._offered.timeout is not None:
                self._limit = self._loop.after(self._offered.timeout, lambda: self.stop(Stop.TIME_LIMIT))
            self._watch()
        else:
            self._begin_stop()

    def refused(self, reason: str) -> None:
        """There is no process."""
        self._end(Failed("system_error", reason))
        self._close_channel()
        self._leave()

    def reaped(self, status: int) -> None:
        """The main process has ended: what it has said is read to the end, then its end is known."""
        self._status = status
        self._read_call()
        if not self._eof:
            self._close_channel()  # a descendant holds the channel; the call is over all the same
        if self._limit is not None:
            self._limit.cancel()
        if not self._said_end:
            self._end(self._stopped_end() or _died(status))  # a caller who has left does not hear it
        if self._stopping is None:
            self._leave()
        else:
            self._look_for_survivors()

    # Stopping.

    def stop(self, why: Stop) -> None:
        """Stop the call; the first reason stands."""
        if self._stopping is not None or self._gone:
            return
        if self._said_end:
            return  # it has ended by itself; what it left running is not ours to stop
        self._stopping, self._stopped_at = why, time.monotonic()
        log.info("call is stopped", extra={**self._fields, "why": why.value})
        if self._tree is not None:
            self._begin_stop()

    def _begin_stop(self) -> None:
        assert self._tree is not None
        if self._stopping is Stop.TIME_LIMIT:
            send(signal.SIGXCPU, (self._tree.pid, self._tree.start))
            self._step = self._loop.after(self._kill_grace, self._terminate)
        else:
            # In the next turn, so that all calls that are stopped in this one share a look at the processes.
            self._step = self._loop.after(0, self._terminate)

    def _terminate(self) -> None:
        for member in self._members():
            send(signal.SIGTERM, member.identity)
        self._step = self._loop.after(self._kill_grace, self._kill)
        self._loop.after(_LOOK, self._look_for_survivors)

    def _kill(self) -> None:
        """Kill what is left, again and again until nothing is."""
        assert self._tree is not None
        main = (self._tree.pid, self._tree.start)
        send(signal.SIGSTOP, main)
        for member in self._members():
            if member.identity != main:
                send(signal.SIGKILL, member.identity)
        if all(member.identity == main for member in self._members(time.monotonic())):
            send(signal.SIGKILL, main)
        self._step = self._loop.after(_LOOK, self._kill)

    def _members(self, moment: float = 0.0) -> list[Process]:
        assert self._tree is not None
        members = self._tree.members(self._look(max(self._stopped_at, moment)), self._known)
        self._known.update(member.identity for member in members)
        return members

    def _look_for_survivors(self) -> None:
        if self._gone or self._status is None:
            return
        if self._members():
            self._loop.after(_LOOK, self._look_for_survivors)
        else:
            self._leave()

    def _stopped_end(self) -> Failed | None:
        """The end of a call that was stopped; None: it was not, or nobody is there to hear it."""
        match self._stopping:
            case Stop.TIME_LIMIT:
                return Failed("timeout", f"the procedure took more than its limit of {self._offered.timeout:g} s")
            case Stop.SHUTDOWN:
                return Failed("shutdown", "harpd was stopped while the call ran")
            case _:
                return None

    # What the process says, and who hears it.

    def _watch(self) -> None:
        """Watch for what can be done now, and for the other sides going away."""
        if self._channel.fileno() >= 0:
            # Nothing is read before the acknowledgement has gone out: it comes first on the wire.
            reading = self._tree is not None and len(self._to_gate) < self._spool
            events = (READ if reading else 0) | (WRITE if self._to_call else 0)
            if events:
                self._loop.watch(self._channel.fileno(), events, self._on_channel)
            else:  # watched for nothing it would still report its hang-up, again and again
                self._loop.forget(self._channel.fileno())
        if self._gate is not None and not self._caller_gone:
            self._loop.watch(self._gate.fileno(), READ | (WRITE if self._to_gate else 0), self._on_gate)

    def _on_channel(self) -> None:
        if self._to_call:
            try:
                self._to_call = self._to_call[self._channel.send(self._to_call) :]
            except BlockingIOError:
                pass
            except OSError:
                self._to_call = memoryview(b"")
        if self._tree is not None:
            self._read_call(1)
        self._watch()

    def _read_call(self, most: int | None = None) -> None:
        """Read what the process has written; `most` times, or to the end of what is there."""
        while most != 0 and not self._eof and self._channel.fileno() >= 0:
            if len(self._to_gate) >= self._spool and most is not None:
                return
            try:
                data = self._channel.recv(_READ_SIZE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._eof = True
                self._close_channel()
                return
            self._take(data)
            most = None if most is None else most - 1

    def _take(self, data: bytes) -> None:
        self._from_call += data
        end = self._from_call.rfind(b"\n") + 1
        if not end:
            return
        lines = bytes(self._from_call[:end])
        del self._from_call[:end]
        if self._stopping is not None or self._said_end:
            return  # the end is decided
        last = lines.rfind(b"\n", 0, end - 1) + 1
        self._pass_on(lines)
        if not lines.startswith(_RECORD, last):
            self._said_end = True
            if self._limit is not None:
                self._limit.cancel()
            log.info("call ended", extra={**self._fields, "end": _kind(lines[last:])})

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
        if self._gone:
            self._close_gate()

    # Leaving.

    def _leave(self) -> None:
        """Nothing of the call is left, or nothing that is ours to stop."""
        if self._gone:
            return
        self._gone = True
        if self._step is not None:
            self._step.cancel()
        self._close_channel()
        self._records.remove(self.id)
        self._close_gate_if_done()
        self._on_gone(self)

    def _close_channel(self) -> None:
        if self._channel.fileno() >= 0:
            self._loop.forget(self._channel.fileno())
            self._channel.close()

    def _close_gate_if_done(self) -> None:
        if self._gone and not self._to_gate:
            self._close_gate()

    def _close_gate(self) -> None:
        if self._gate is not None:
            self._loop.forget(self._gate.fileno())
            self._gate.close()
            self._gate = None


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
