"""One call as the warden sees it: its process, what it says, its limit, and its end.

What the process writes goes to its audience (`harpd.supervisor.bound_session`,
`harpd.supervisor.resumable_session`); while that is full nothing is read, so that
the process waits (back-pressure) and nothing is dropped. The end is decided here, once:

- a limit that fired, a cancel or a shutdown stands, whatever the process says afterwards;
- else the process's own closing line;
- else the process died without one, or said what no call may say: ``call_died``, and what it left is stopped.

The process is the procedure's, and no more trusted than that: each of its lines is a record, a traceback if these are
evidence, or the closing line, which is the last. What only the warden may say it can't say.

Then the audience is told what is known of the process's death (evidence), and how a stop turned out (receipt).
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from harp.protocol.call_output import RECORD_PREFIX
from harp.protocol.ends import Failed
from harp.protocol.harpd import encode_message
from harp.protocol.json_text import InvalidJSON, Raw, dumps, loads
from harpd.processes.cgroup import Cgroups
from harpd.processes.cookie import cookie_for
from harpd.processes.process_tree import CallTree, Snapshot
from harpd.supervisor.event_loop import READ, WRITE, EventLoop, Timer
from harpd.supervisor.output import OutputCollector
from harpd.supervisor.spool import GUARANTEED_BYTES, SpoolQuota
from harpd.supervisor.state_files import CallState, StateDir
from harpd.supervisor.termination import TerminationSequence
from harpd.supervisor.worker_process import Usage
from harpd.supervisor.zygote_client import ProcedureInfo, ZygoteClient

__all__ = ["Call", "CallContext", "CallObserver", "StopReason"]

log = logging.getLogger("harpd.supervisor")

_READ_SIZE = 1 << 16
#: The most characters of a traceback.
_LONGEST_TRACEBACK = 16 * 1024
#: Seconds in which what a call says fast is gathered.
_GATHER = 0.002
#: How often what a call has said is read before it is stopped, and when it has ended: as much as its channel holds.
_LAST_READS = 16
#: The most bytes of a line; no client takes a longer one.
_LONGEST_LINE = 64 * 1024 * 1024
#: How many bytes of a line that is none are shown.
_SHOWN = 60

_TRACEBACK = b'{"traceback":'
#: What a closing line begins with.
_CLOSINGS = {b'{"result":': "result", b'{"exception":': "exception", b'{"harp":1,"error":': "error"}


class StopReason(Enum):
    """Why a call is stopped: the word for the log, and who does it by way of the evidence."""

    TIME_LIMIT = "timeout", "limit"
    MAX_EXEC_TIME = "max_exec_time", "limit"
    SILENCE = "silence", "limit"
    CANCELLED = "cancelled", "cancel"
    SHUTDOWN = "shutdown", "shutdown"
    LOST_CONTACT = "lost_contact", "lost_contact"
    PROTOCOL_VIOLATION = "garbled", "itself"

    def __init__(self, why: str, by: str) -> None:
        self.why = why
        self.by = by


class CallObserver(Protocol):
    """Who hears a call."""

    @property
    def full(self) -> bool:
        """Whether nothing more should be said now; `Call.resume` is called once more may be."""

    def on_started(self) -> None:
        """The process exists. Comes first, unless there is a refusal."""

    def on_rejected(self, end: Failed) -> None:
        """There is no process; nothing but `gone` follows."""

    def on_records(self, lines: bytes, count: int) -> None:
        """The process has said `count` records."""

    def on_end(self, line: bytes) -> None:
        """The end is decided: this is the closing line."""

    def on_exit(self, evidence: Callable[[], Raw], receipt: Raw | None) -> None:
        """The main process has ended, and what was to be stopped is gone, or survives as the receipt says.

        Evidence is made when it is asked for, now: most of it costs something, and not every audience wants it.
        """

    def on_closed(self, receipt: Raw | None) -> None:
        """Nothing of the call is left, or nothing that is ours to stop. A receipt: of survivors that are gone now."""


@dataclass(frozen=True, slots=True)
class CallContext:
    """What all calls share.

    Attributes:
        loop: the event loop.
        kill_grace: seconds between the steps of stopping.
        records: where running calls are recorded.
        look: gives all processes as they were at this moment of the monotonic clock, or later.
        strays: whether among these processes is one that may be a call's of this age and can't be told to be.
        output: where the pipes for stdout and stderr are made.
        cgroups: where calls get a cgroup, if that is possible here.
        memory: what all calls hold together; lines that are not whole yet count too.
        keep_stderr: whether the last lines of stderr are evidence.
        keep_tracebacks: whether the traceback of an exception is.
    """

    loop: EventLoop
    kill_grace: float
    state_dir: StateDir
    take_snapshot: Callable[[float], Snapshot]
    has_possible_escapes: Callable[[Snapshot, CallTree], bool]
    output: OutputCollector
    cgroups: Cgroups
    quota: SpoolQuota
    keep_stderr: bool
    keep_tracebacks: bool


class Call:
    """A call from its beginning to the death of its processes; or, in a process that rests then, to its closing line.

    Args:
        around: what it shares with the others.
        call_id: its id.
        procedure: its procedure's name.
        offered: what the zygote says of the procedure.
        zygote: who forks.
        audience: who hears it.
        record: what else its record on disk says, for the next warden; empty: there is nobody to be told of its end.
        on_gone: called once, when nothing of the call is left; the audience knows by then.

    Raises:
        OSError: no descriptor is free; nothing has begun.
    """

    def __init__(
        self,
        around: CallContext,
        call_id: str,
        procedure: str,
        offered: ProcedureInfo,
        zygote: ZygoteClient,
        audience: CallObserver,
        record: Mapping[str, Any],
        on_gone: Callable[[Call], None],
    ) -> None:
        self._around = around
        self._loop = around.loop
        self.id = call_id
        self._offered = offered
        self._audience = audience
        self._record = record
        self._on_gone = on_gone
        self._fields = {"call": call_id, "procedure": procedure}
        self._to_call = memoryview(b"")
        self._from_call = bytearray()
        self._said_end = False
        self._stopped: StopReason | None = None
        self._stopped_by: tuple[str | None, str | None] = (None, None)
        self._limit: Timer | None = None
        self._processes: TerminationSequence | None = None  # None: the zygote has not forked yet
        self._tree: CallTree | None = None
        self._status: int | None = None
        self._usage = Usage()
        self._traceback: str | None = None
        self._began = time.time()
        self._asked = time.monotonic()
        self._authentication: float | None = None
        self._fork: float | None = None  # seconds until the process was there
        self._looked_at = 0.0
        self._over = False
        self._gone = False
        self._process = zygote.assign(self, call_id, procedure, around.output, self._fields)

    def send_arguments(self, arguments: Raw, authentication: float | None) -> None:
        """Give the process its arguments; once. `authentication`: seconds that it took, for the evidence."""
        self._authentication = authentication
        self._to_call = memoryview(f"{self.id} ".encode() + bytes(arguments) + b"\n")
        if self._process.pid:  # an idle process; the zygote announces a new one
            self.on_forked(*self._process.identity)

    @property
    def main_process(self) -> tuple[int, int] | None:
        """Pid and start time of the main process; None: there is none yet."""
        return None if self._tree is None else (self._tree.pid, self._tree.start)

    # What the zygote says.

    def on_forked(self, pid: int, start: int) -> None:
        """The process is there: the call is acknowledged."""
        process = self._process
        if process.served == 1:
            process.cgroup = self._around.cgroups.create(self.id, pid)
        self._fork = time.monotonic() - self._asked
        self._tree = CallTree(pid, start, cookie_for(self.id), process.cgroup)
        around = self._around
        self._processes = TerminationSequence(
            around.loop,
            self._tree,
            around.kill_grace,
            around.take_snapshot,
            around.has_possible_escapes,
            self._survived,
            self._leave,
        )
        try:
            around.state_dir.write(self.id, CallState(self._tree, self._record))
        except OSError as error:  # it would be missed only if this warden were killed
            log.error("a call can't be recorded", extra={**self._fields, "reason": str(error)})
        log.info("call started", extra={**self._fields, "pid": pid})
        self._audience.on_started()
        if self._stopped is None:
            if self._offered.timeout is not None:
                self._limit = self._loop.call_later(self._offered.timeout, lambda: self.stop(StopReason.TIME_LIMIT))
        else:
            self._processes.start(interrupt=False)
        self._send_arguments()  # at once: the process waits for nothing else
        self._watch()

    def on_fork_failed(self, reason: str) -> None:
        """There is no process."""
        log.info("call ended", extra={**self._fields, "end": "system_error", "reason": reason})
        self._said_end = self._over = True
        self._audience.on_rejected(Failed("system_error", reason))
        self._leave()

    def on_reaped(self, status: int, usage: Usage) -> None:
        """The main process has ended: what it has said is read to the end, then its end is known."""
        assert self._processes is not None
        self._status, self._usage = status, usage
        self._read_call(_LAST_READS, waiting=False)  # all that it has said; a descendant may go on without end
        self._close_channel()
        if self._limit is not None:
            self._limit.cancel()
        if self._said_end and self._stopped is None:
            self._unrecord()  # before anybody knows: from now on nothing of it may be taken for left over
            self._finish(None)
            self._leave()  # what it left running is not ours to stop
            return
        self._decide_end()
        self._processes.on_main_exit(status)

    # Stopping.

    def stop(self, why: StopReason, reason: str | None = None, by: str | None = None) -> None:
        """Stop the call; the first reason stands. One that has ended by itself is left alone.

        Args:
            why: what kind of stop it is.
            reason: the caller's word for it.
            by: who asked the caller.
        """
        if not self._decided:
            self._read_call(_LAST_READS, waiting=False)  # what it has said before the stop counts
        if not self._decided:
            self._begin_stop(why, reason, by)

    def _begin_stop(self, why: StopReason, reason: str | None, by: str | None) -> None:
        self._stopped = why
        self._stopped_by = reason, by
        self._to_call = memoryview(b"")  # a procedure that has no arguments yet never begins
        self._drop_line()
        log.info("call is stopped", extra={**self._fields, "why": why.why, "reason": reason})
        if self._processes is not None:
            self._processes.start(interrupt=why is StopReason.TIME_LIMIT)

    def _decide_end(self) -> None:
        if not self._said_end:
            self._said_end = True
            end = self._stopped_end()
            log.info("call ended", extra={**self._fields, "end": end.type, "reason": end.message})
            self._audience.on_end(encode_message(end))

    def _stopped_end(self) -> Failed:
        reason, _ = self._stopped_by
        match self._stopped:
            case StopReason.TIME_LIMIT:
                return Failed("timeout", f"the procedure took more than its limit of {self._offered.timeout:g} s")
            case StopReason.MAX_EXEC_TIME:
                return Failed("timeout", f"maximum execution time: the call took more than {reason}")
            case StopReason.SILENCE:
                return Failed("timeout", f"reading the result: the call said nothing for {reason}")
            case StopReason.CANCELLED:
                return Failed("cancelled", f"its caller stopped the call{f' ({reason})' if reason else ''}")
            case StopReason.SHUTDOWN:
                return Failed("shutdown", "harpd was stopped while the call ran")
            case StopReason.LOST_CONTACT:
                return Failed("lost_contact", "its dispatcher was away for longer than the call may run without it")
            case StopReason.PROTOCOL_VIOLATION:
                return Failed("call_died", f"the call was stopped: {reason}")
            case None:
                assert self._status is not None
                return _died(self._status)

    def _survived(self) -> None:
        """Killed, and still there: that is what there is to say, for now."""
        self._decide_end()
        assert self._processes is not None
        receipt = self._processes.stop_report()
        log.error("processes of a call can't be killed", extra={**self._fields, "stop_report": receipt})
        self._finish(receipt)

    def _finish(self, receipt: dict[str, Any] | None) -> None:
        """Tell what is known at the call's end; once."""
        if self._over:
            return
        self._over = True
        self._audience.on_exit(self._evidence, None if receipt is None else dumps(receipt))

    def _evidence(self) -> Raw:
        try:
            return dumps(self._facts())
        except Exception:  # what is beside the end must not cost the end
            log.exception("the evidence of a call is lost", extra=self._fields)
            return dumps({"by": "unknown"})

    def _facts(self) -> dict[str, Any]:
        status = self._status
        signalled = status is not None and os.WIFSIGNALED(status)
        _, by_whom = self._stopped_by
        evidence: dict[str, Any] = {
            "exit": None if status is None or signalled else os.waitstatus_to_exitcode(status),
            "signal": _signal_name(status) if signalled and status is not None else None,
            "by": self._ended_by(signalled),
            "by_whom": by_whom,
            "cpu": self._usage.cpu,
            "memory": self._usage.memory,
            "started": self._began,
            "ended": time.time(),
            "authentication": self._authentication,
            "fork": None if self._fork is None else round(self._fork, 6),
        }
        if self._around.keep_stderr:
            evidence["stderr"] = self._process.last_errors()
        if self._traceback is not None and self._around.keep_tracebacks:
            evidence["traceback"] = self._traceback
        return evidence

    def _ended_by(self, signalled: bool) -> str:
        if self._stopped is not None:
            return self._stopped.by
        if not signalled:
            return "itself"
        group = self._tree.cgroup if self._tree is not None else None
        return "out_of_memory" if group is not None and group.out_of_memory() else "unknown"

    # What the process says.

    def resume_reading(self) -> None:
        """More may be said again, or nobody wants to hear it any more."""
        self._watch()

    def _watch(self) -> None:
        """Watch for what can be done now, and for the process going away."""
        if not self._listening:
            return
        # Nothing is read before the acknowledgement has gone out: it comes first on the wire. And nothing is
        # given before the call is recorded: till then the procedure can't have started anything.
        recorded = self._processes is not None
        reading = recorded and (self._decided or not self._audience.full)
        events = (READ if reading else 0) | (WRITE if recorded and self._to_call else 0)
        if events:
            self._loop.watch(self._process.channel.fileno(), events, self._on_channel)
        else:  # watched for nothing it would still report its hang-up, again and again
            self._loop.unwatch(self._process.channel.fileno())

    @property
    def _listening(self) -> bool:
        """Whether the channel is there, and not another call's by now."""
        return not self._gone and self._process.channel.fileno() >= 0

    @property
    def _decided(self) -> bool:
        """Whether what the process still says does not count."""
        return self._stopped is not None or self._said_end

    def _send_arguments(self) -> None:
        if self._to_call:
            try:
                self._to_call = self._to_call[self._process.channel.send(self._to_call) :] or memoryview(b"")
            except BlockingIOError:
                pass
            except OSError:
                self._to_call = memoryview(b"")

    def _on_channel(self) -> None:
        self._send_arguments()
        if self._processes is not None:
            self._read_call(1)
        if self._hurries():
            self._loop.unwatch(self._process.channel.fileno())
            self._loop.call_later(_GATHER, self._watch)
        else:
            self._watch()

    def _hurries(self) -> bool:
        """Whether it says records so fast that it is worth while to wait for more of them: each look costs as much."""
        if not self._offered.streaming or self._decided or self._to_call or not self._listening:
            return False
        before, self._looked_at = self._looked_at, self._loop.now()
        return self._looked_at - before < _GATHER

    def _read_call(self, most: int | None = None, waiting: bool = True) -> None:
        """Read what the process has written; `most` times, or to the end of what is there.

        `waiting`: not while the audience is full.
        """
        while most != 0 and self._listening:
            if most is not None and waiting and not self._decided and self._audience.full:
                return
            try:
                data = self._process.channel.recv(_READ_SIZE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._close_channel()
                return
            if not self._decided:
                self._take(data)
            most = None if most is None else most - 1

    def _take(self, data: bytes) -> None:
        end = data.rfind(b"\n") + 1
        if not end:
            self._begin_line(data)
            return
        lines = bytes(self._from_call) + data[:end]
        self._drop_line()
        self._begin_line(data[end:])
        last = lines.rfind(b"\n", 0, -1) + 1
        if lines.startswith(RECORD_PREFIX, last):
            self._take_records(lines)
            return
        records, closing = lines[:last], lines[last:]
        if closing.startswith(_TRACEBACK):  # the closing line itself is still to come
            self._traceback, closing = _traceback(closing), b""
        else:
            before = records.rfind(b"\n", 0, -1) + 1
            if records.startswith(_TRACEBACK, before):
                self._traceback, records = _traceback(records[before:]), records[:before]
        if self._take_records(records) and closing:
            self._close_saying(closing)

    def _begin_line(self, data: bytes) -> None:
        """Keep what may become a line, if there is room for it."""
        self._from_call += data
        self._around.quota.reserve(len(data))
        if len(self._from_call) > _LONGEST_LINE:
            self._garbled(f"it wrote a line longer than {_LONGEST_LINE} bytes")
        elif len(self._from_call) > GUARANTEED_BYTES and self._around.quota.exhausted:
            self._garbled("it wrote a long line, and the calls of this host hold as much as they may")

    def _drop_line(self) -> None:
        self._around.quota.release(len(self._from_call))
        self._from_call = bytearray()

    def _take_records(self, lines: bytes) -> bool:
        """Hand on what must be records, each of them; whether it was."""
        if not lines:
            return True
        count = lines.count(b"\n")
        # JSON on a line has no line feed: so this counts the lines that begin as records do.
        if lines.startswith(RECORD_PREFIX) + lines.count(b"\n" + RECORD_PREFIX) != count:
            wrong = next(line for line in lines.split(b"\n") if not line.startswith(RECORD_PREFIX))
            self._garbled(f"it wrote what is no record: {wrong[:_SHOWN]!r}")
            return False
        if not self._offered.streaming:
            self._garbled("it wrote records, and its procedure is not a streaming one")
            return False
        self._audience.on_records(lines, count)
        return True

    def _close_saying(self, closing: bytes) -> None:
        kind = next((kind for start, kind in _CLOSINGS.items() if closing.startswith(start)), None)
        if kind is None:
            self._garbled(f"it wrote what is no end: {closing[:_SHOWN]!r}")
            return
        self._said_end = True
        if self._limit is not None:
            self._limit.cancel()
        log.info("call ended", extra={**self._fields, "end": kind})
        assert self._processes is not None
        # An error is harpd's own code's, which may have failed halfway.
        if kind != "error" and not (self._from_call or self._to_call) and self._process.has_calls_left:
            self._unrecord()  # before anybody knows, as when it is reaped
            self._audience.on_end(closing)
            self._usage = self._process.usage()
            self._finish(None)
            self._leave(rests=True)
            return
        self._process.finish_input()
        self._processes.expect_exit()
        self._audience.on_end(closing)

    def _garbled(self, what: str) -> None:
        """It has said what no call may say: what came before stands, and nothing after it counts."""
        self._begin_stop(StopReason.PROTOCOL_VIOLATION, what, None)

    # Leaving.

    def _leave(self, rests: bool = False) -> None:
        """Nothing of the call is left, or nothing that is ours to stop. `rests`: its process goes on, without it."""
        if self._gone:
            return
        self._gone = True
        if self._limit is not None:
            self._limit.cancel()
        receipt: dict[str, Any] | None = None
        late = self._over
        if self._processes is not None:
            self._processes.cancel()
            receipt = self._processes.stop_report()
        self._finish(receipt)
        self._drop_line()
        if rests:
            self._process.become_idle()
        else:
            self._process.release()
            self._unrecord()
        self._audience.on_closed(dumps(receipt) if late and receipt is not None else None)
        self._on_gone(self)

    def _unrecord(self) -> None:
        """Nothing of the call is ours to stop any more; its audience may still need the record, and removes it then."""
        if self._record:
            self._around.state_dir.mark_ended(self.id)
        else:
            self._around.state_dir.remove(self.id)

    def _close_channel(self) -> None:
        self._drop_line()
        self._process.close()


def _traceback(line: bytes) -> str | None:
    """The traceback in a line that the call's process wrote; None: it wrote something else."""
    try:
        found = loads(line)["traceback"]
    except (InvalidJSON, LookupError, TypeError):
        return None
    return found[-_LONGEST_TRACEBACK:] if isinstance(found, str) else None


def _signal_name(status: int) -> str:
    number = os.WTERMSIG(status)
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)


def _died(status: int) -> Failed:
    if os.WIFSIGNALED(status):
        name = _signal_name(status)
        return Failed("call_died", f"the call's process was ended by {name}", {"signal": name})
    code = os.waitstatus_to_exitcode(status)
    return Failed("call_died", f"the call's process ended without a result, exit code {code}", {"code": code})
