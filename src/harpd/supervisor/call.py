"""A call in the supervisor: its worker process, its output, its limit, and its end.

Theory of operation
===================

`Call.start` gives a worker its arguments, once the worker exists and the state file has the call (`Call.on_forked`).
The output goes to the call's session (`Call._handle_output`). While the session is full, the call does not read. So the
worker waits (back-pressure) and no output is lost. The end is decided once, by the first of these events:

- a limit, a cancellation or a shutdown (`Call.stop`): output that the worker writes later does not count;
- the worker's closing line (`Call._handle_closing`);
- the worker's death without a closing line, or invalid output: ``call_died``, and its other processes are stopped.

A worker runs the procedure's code and is not trusted: each line must be a record, a traceback,
or the closing line, which is the last. It cannot send the messages that only the supervisor sends.

When the worker and all stopped processes have ended, the session receives exit info, and the stop report of a stopped
call. See `Call.on_reaped` and `TerminationSequence`.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from harp.protocol.call_output import RECORD_PREFIX
from harp.protocol.ends import Failed
from harp.protocol.harpd import encode_message
from harp.protocol.json_text import InvalidJSON, Raw, dumps, loads
from harp_daemon.secret_values import mask_texts
from harpd.auth.rights import UserRights
from harpd.processes.cgroup import CallCgroups, delegated_cgroup
from harpd.processes.cookie import cookie_for
from harpd.processes.core_dumps import never_dump_core_of
from harpd.processes.process_tree import CallTree, Scan, Snapshot, send_signal
from harpd.supervisor.audit import CallAudit
from harpd.supervisor.dynamic_uids import DynamicUids
from harpd.supervisor.event_loop import READ, WRITE, EventLoop, Timer
from harpd.supervisor.fair_shares import Account
from harpd.supervisor.spool import GUARANTEED_BYTES, SpoolQuota
from harpd.supervisor.state_files import StateFiles
from harpd.supervisor.termination import TerminationSequence
from harpd.supervisor.zygote_client import ZygoteClient

log = logging.getLogger("harpd.supervisor")

_READ_SIZE = 1 << 16
#: The most characters of a traceback.
_MAX_TRACEBACK_LENGTH = 16 * 1024
#: Seconds for which records of a fast stream are gathered before they are read.
_GATHER_SECONDS = 0.002
#: How many reads drain the channel before a stop and after the end: as much as fits into the channel.
_MAX_DRAIN_READS = 16
#: The most bytes of a line; no client reads a longer one.
_MAX_LINE_BYTES = 64 * 1024 * 1024
#: How many bytes of an invalid line are in the error message.
_MAX_SHOWN_BYTES = 60
#: Seconds for which a snapshot of all processes can be shared.
_SNAPSHOT_MAX_AGE = 0.02
#: Seconds after which a scan that has failed is repeated.
_SCAN_RETRY = 0.5
#: How many cookies of ended calls are stored.
_MAX_RECENT_COOKIES = 1000

_TRACEBACK_PREFIX = b'{"traceback":'
#: The prefix of a closing line that is an error, as `encode_message` writes it; the prefixes of all closing lines.
ERROR_PREFIX = b'{"harp":1,"error":'
_CLOSING_PREFIXES = {b'{"result":': "result", b'{"exception":': "exception", ERROR_PREFIX: "error"}


class StopReason(Enum):
    """Why a call is stopped: `by` in exit info, type and message of the error. The log has the name."""

    TIMEOUT = "limit", "timeout", "the procedure took more than its limit of {}"
    MAX_EXEC_TIME = "limit", "timeout", "maximum execution time: the call took more than {}"
    SILENCE = "limit", "timeout", "reading the result: the call sent nothing for {}"
    CANCELLED = "cancel", "cancelled", "the caller stopped the call{}"
    SHUTDOWN = "shutdown", "shutdown", "harpd was stopped while the call ran"
    LOST_CONTACT = "lost_contact", "lost_contact", "the dispatcher was away for longer than the call may run without it"
    PROTOCOL_VIOLATION = "itself", "call_died", "the call was stopped: {}"


class Session:
    """The client's side of a call: it receives output and end of the call. See `harpd.supervisor.sessions`."""

    account: Account  # whose call it is
    stored: Raw | None = None  # for a later supervisor, a JSON object; None: no dispatcher attaches to it
    call: Call | None = None  # until it is closed

    @property
    def full(self) -> bool:
        """Whether the call should pause its output; the session calls `resume_reading` once it has room."""
        raise NotImplementedError

    def on_started(self) -> None:
        """Send the acknowledgement: the worker exists. If it cannot, only `on_end` and `on_closed` follow."""

    def on_records(self, lines: bytes, count: int) -> None:
        """Handle the lines of `count` records."""

    def on_end(self, line: bytes) -> None:
        """Handle the closing line: the end is decided."""

    def on_exit(self, exit_info: Callable[[], Raw], stop_report: Mapping[str, Any] | None) -> None:
        """Handle that the worker and all stopped processes have ended, or are listed as survivors.

        `exit_info` is slow: call it only if it is needed. `stop_report` is None if no process had to be stopped.
        """

    def on_closed(self, stop_report: Mapping[str, Any] | None) -> None:
        """Separate from the call: no process remains to be stopped. `stop_report`: of survivors that have ended now."""

    def stop(self, stop_reason: StopReason, detail: str | None = None, user: str | None = None) -> None:
        if self.call is not None:
            self.call.stop(stop_reason, detail, user)

    def resume_reading(self) -> None:
        if self.call is not None:
            self.call.update_watch()


class CallContext:
    """The state that all calls of a supervisor share."""

    def __init__(self, loop: EventLoop, instance: str, settings: Mapping[str, Any]) -> None:
        self.loop = loop
        self.instance = instance
        self.settings = settings  # for new calls, see `harpd.config.loaded`; a call has those of its start
        self.rights = UserRights(settings["rights"])
        self.audit = CallAudit(loop, settings)
        self.dynamic_uids = DynamicUids(Path(settings["runtime_directory"]))
        self.calls: dict[str, Call] = {}  # the running calls, by id
        self.started = 0  # how many calls were started
        self.ended: Counter[str] = Counter()  # how many have ended, by their end
        self.rejected: Counter[str] = Counter()  # how many starts were rejected, by type of the error
        self.shutting_down = False
        self.quota = SpoolQuota(settings["spool_memory"])
        self.state_files = StateFiles(Path(settings["runtime_directory"]), instance)
        directory = settings["cgroup"] or delegated_cgroup()
        self.cgroups = None if directory is None else CallCgroups(directory)
        self._snapshot = Snapshot()  # the last snapshot
        self._scan: Scan | None = None  # of the next snapshot, until all waiting calls have it
        self._waiting: list[tuple[float, Callable[[Snapshot], None]]] = []
        # Cookies of ended calls: they may have started services that still run.
        self._recent_cookies = deque[bytes](maxlen=_MAX_RECENT_COOKIES)

    def remove(self, call: Call) -> None:
        """Remove a call of which no process remains to be stopped."""
        del self.calls[call.id]
        self._recent_cookies.append(cookie_for(call.id))

    def take_snapshot(self, at: float, receive: Callable[[Snapshot], None]) -> None:
        """Pass all processes at this monotonic time or later, at most 0.02 s before now, to a function.

        Many calls share a snapshot. Each turn of the loop runs one step of its scan.
        """
        at = max(at, time.monotonic() - _SNAPSHOT_MAX_AGE)
        if self._snapshot.started_at >= at:
            receive(self._snapshot)
            return
        self._waiting.append((at, receive))
        if self._scan is None:
            self._begin_scan()

    def _begin_scan(self) -> None:
        since = min((call.start_ticks for call in self.calls.values()), default=0)
        self._scan = Scan(since, earlier=self._snapshot)
        self.loop.call_later(0, self._continue_scan)

    def _continue_scan(self) -> None:
        assert self._scan is not None
        try:
            finished = self._scan.step()
        except OSError as error:  # for example, no descriptor is free
            log.error("cannot read processes; retrying", extra={"reason": str(error)})
            self.loop.call_later(_SCAN_RETRY, self._begin_scan)
            return
        if not finished:
            self.loop.call_later(0, self._continue_scan)
            return
        self._snapshot = self._scan.snapshot
        self._deliver_snapshot()

    def _deliver_snapshot(self) -> None:
        """Pass the snapshot to one call in each turn of the loop; then start the next scan if it is needed."""
        for number, (at, receive) in enumerate(self._waiting):
            if self._snapshot.started_at >= at:
                self.loop.call_later(0, self._deliver_snapshot)
                del self._waiting[number]
                receive(self._snapshot)
                return
        self._scan = None
        if self._waiting:
            self._begin_scan()

    def has_possible_escapes(self, zygote: ZygoteClient, processes: Snapshot, tree: CallTree) -> bool:
        """Return whether an unknown process may belong to a call whose worker has ended."""
        cookies = {*self._recent_cookies, *map(cookie_for, self.calls)}
        return tree.has_possible_escapes(zygote.pid, processes, zygote.worker_identities(), cookies)


class Call:
    """A call, until its processes are dead; or until its closing line, if its worker becomes idle.

    The constructor raises OSError if no descriptor is free; no worker is assigned then.
    """

    def __init__(
        self,
        context: CallContext,
        zygote: ZygoteClient,
        call_id: str,
        procedure: str,
        session: Session,
        dynamic_uid: int | None,
    ) -> None:
        self._context = context
        self._loop = context.loop
        self._settings = context.settings
        self._zygote = zygote
        self.id = call_id
        self._info = zygote.procedures[procedure]
        self._session = session
        self._dynamic_uid = dynamic_uid
        self._fields = {"call": call_id, "procedure": procedure}
        self._unsent = memoryview(b"")
        self._partial_line = bytearray()
        self._has_closing_line = False
        self._stop_reason: StopReason | None = None
        self._stop_detail: str | None = None
        self._stopped_by_user: str | None = None
        self._deadline: Timer | None = None  # the procedure's limit, then that of the worker's exit
        self._tree: CallTree | None = None  # None: the worker does not exist yet
        self._termination: TerminationSequence | None = None  # None: no process had to be stopped
        self._exit_code: int | None = None  # of the worker; below 0: the signal that has killed it
        self._cpu: float | None = None
        self._memory: int | None = None
        self._traceback: str | None = None
        self._has_secrets = False
        self._secret_texts: Sequence[bytes] = ()
        self._began, self._began_at = time.time(), self._loop.now()
        self._requested_at = time.monotonic()
        self._authentication_seconds: float | None = None
        self._fork_seconds: float | None = None
        self._last_read = 0.0
        self._exit_reported = False
        self._worker = zygote.assign(self, call_id, procedure)

    def start(
        self,
        arguments: Raw,
        authentication: float | None,
        caller: Raw | None,
        secret_texts: Sequence[bytes] | None = None,
    ) -> None:
        """Send the worker its arguments; once.

        Args:
            arguments: an array or an object.
            authentication: its duration in seconds, for exit info.
            caller: an object for `harpd.proc.caller`; None: the call has no known caller.
            secret_texts: texts that are masked in the log and in exit info; None: no argument is secret.
        """
        self._authentication_seconds = authentication
        if secret_texts is not None:
            self._has_secrets, self._secret_texts = True, secret_texts
            self._worker.mask_output(secret_texts)
        uid = b"-" if self._dynamic_uid is None else b"%d" % self._dynamic_uid
        head = self.id.encode(), self._info.number, uid, b"-" if caller is None else caller
        self._unsent = memoryview(b"%b %d %b %b\t%b\n" % (*head, arguments))
        if self._worker.identity[0]:  # else the zygote announces it
            self.on_forked()

    def on_forked(self) -> None:
        """Write the state of the call and acknowledge it, then send the arguments: the worker exists."""
        worker = self._worker
        pid, start = worker.identity
        context = self._context
        if worker.served == 1 and context.cgroups is not None:
            worker.cgroups, worker.cgroup = context.cgroups, context.cgroups.create(self.id, pid)
            if worker.cgroup is not None:
                context.cgroups.limit(worker.cgroup, self._info.memory, self._info.processes)
        self._fork_seconds = time.monotonic() - self._requested_at
        uid = self._info.uid if self._dynamic_uid is None else self._dynamic_uid
        self._tree = CallTree(pid, start, cookie_for(self.id), worker.cgroup, uid)
        try:
            context.state_files.write(self.id, self._tree, self._session.stored)
        except OSError as error:  # it is needed only if this supervisor is killed
            log.error("cannot write state of call", extra={**self._fields, "reason": str(error)})
        log.info("call started", extra={**self._fields, "pid": pid})
        if self._stop_reason is not None:
            self._terminate().start(interrupt=False)
        self._session.on_started()
        if self._stop_reason is None and self._info.timeout is not None:
            self._deadline = self._loop.call_later(self._info.timeout, lambda: self.stop(StopReason.TIMEOUT))
        if self._has_secrets:
            never_dump_core_of(pid)
        self._flush_arguments()  # immediately: the worker waits for them
        self.update_watch()

    def on_fork_failed(self, reason: str) -> None:
        log.info("call ended", extra={**self._fields, "end": "system_error", "reason": reason})
        self._record_end("system_error")
        self._has_closing_line = self._exit_reported = True
        self._session.on_end(encode_message(Failed("system_error", reason)))
        self._close()

    def _flush_arguments(self) -> None:
        self._context.audit.write()
        try:
            if self._unsent:
                self._unsent = self._unsent[os.write(self._worker.calls, self._unsent) :] or memoryview(b"")
        except BlockingIOError:
            pass
        except OSError:
            self._unsent = memoryview(b"")

    @property
    def start_ticks(self) -> float:
        """The start time of the main process in clock ticks since boot; infinite: it does not exist yet."""
        return math.inf if self._tree is None else self._tree.start

    # The worker's output.

    @property
    def _decided(self) -> bool:
        """Whether the end is decided, so that further output does not count."""
        return self._stop_reason is not None or self._has_closing_line

    def update_watch(self) -> None:
        """Watch the channel for what can be done now. The session calls it when it has room."""
        # Output is read after the acknowledgement was sent, which is the client's first line. Arguments are sent after
        # the state was written: before that, the procedure cannot have started any process.
        worker, loop = self._worker, self._loop
        if worker.lines >= 0 and self._tree is not None and not self._has_closing_line:
            if self._decided or not self._session.full:
                loop.watch(worker.lines, READ, self._on_channel_ready)
            else:  # a watch without events would still report a hang-up, again and again
                loop.unwatch(worker.lines)
            if self._unsent:
                loop.watch(worker.calls, WRITE, self._on_channel_ready)
            else:
                loop.unwatch(worker.calls)

    def _on_channel_ready(self) -> None:
        if self._unsent:
            self._flush_arguments()
        if self._decided or not self._session.full:
            self._read()
        before, self._last_read = self._last_read, self._loop.now()
        is_fast = self._info.streaming and self._last_read - before < _GATHER_SECONDS
        if is_fast and not (self._decided or self._unsent):  # each read has a fixed cost: gather records
            self._loop.unwatch(self._worker.lines)
            self._loop.call_later(_GATHER_SECONDS, self.update_watch)
        else:
            self.update_watch()

    def _drain(self) -> None:
        """Read the output that has arrived, also if the session is full."""
        for _ in range(_MAX_DRAIN_READS):  # a descendant may write without end
            if not self._read():
                break

    def _read(self) -> bool:
        try:
            data = os.read(self._worker.lines, _READ_SIZE)
        except BlockingIOError:
            return False
        except OSError:  # perhaps it is closed
            data = b""
        if not data:
            self._close_channel()
        elif not self._decided:
            self._handle_output(data)
        return bool(data)

    def _handle_output(self, data: bytes) -> None:
        end = data.rfind(b"\n") + 1
        if not end:
            self._buffer_partial(data)
            return
        lines = data[:end]
        if self._partial_line:
            lines = bytes(self._partial_line) + lines
            self._discard_partial()
        if end < len(data):
            self._buffer_partial(data[end:])
        last = lines.rfind(b"\n", 0, -1) + 1
        if lines.startswith(RECORD_PREFIX, last):
            self._handle_records(lines)
            return
        records, closing = lines[:last], lines[last:]
        if closing.startswith(_TRACEBACK_PREFIX):  # the closing line has not arrived yet
            traceback, closing = closing, b""
        else:
            last_record = records.rfind(b"\n", 0, -1) + 1
            traceback = records[last_record:] if records.startswith(_TRACEBACK_PREFIX, last_record) else b""
            records = records.removesuffix(traceback)
        if traceback:
            self._traceback = _decode_traceback(traceback, self._secret_texts)
        if (not records or self._handle_records(records)) and closing:
            self._handle_closing(closing)

    def _buffer_partial(self, data: bytes) -> None:
        self._partial_line += data
        self._context.quota.reserve(self._session.account, len(data))
        if len(self._partial_line) > _MAX_LINE_BYTES:
            self._stop(StopReason.PROTOCOL_VIOLATION, f"it wrote a line longer than {_MAX_LINE_BYTES} bytes")
        elif len(self._partial_line) > GUARANTEED_BYTES and self._context.quota.is_exhausted(self._session.account):
            violation = "it wrote a long line, and the calls of this host have used up spool_memory"
            self._stop(StopReason.PROTOCOL_VIOLATION, violation)

    def _discard_partial(self) -> None:
        if self._partial_line:
            self._context.quota.release(self._session.account, len(self._partial_line))
            self._partial_line = bytearray()

    def _handle_records(self, lines: bytes) -> bool:
        """Pass on lines that must all be records; return whether they are."""
        count = lines.count(b"\n")
        # A JSON text in a line has no line feed, so this counts the lines that start like records.
        if lines.startswith(RECORD_PREFIX) + lines.count(b"\n" + RECORD_PREFIX) != count:
            invalid = next(line for line in lines.split(b"\n") if not line.startswith(RECORD_PREFIX))
            self._stop(StopReason.PROTOCOL_VIOLATION, f"it wrote an invalid record: {invalid[:_MAX_SHOWN_BYTES]!r}")
            return False
        if not self._info.streaming:
            self._stop(StopReason.PROTOCOL_VIOLATION, "it wrote records, and its procedure is not a streaming one")
            return False
        self._session.on_records(lines, count)
        return True

    def _handle_closing(self, closing: bytes) -> None:
        kinds = [kind for prefix, kind in _CLOSING_PREFIXES.items() if closing.startswith(prefix)]
        if not kinds:
            self._stop(StopReason.PROTOCOL_VIOLATION, f"it wrote an invalid end: {closing[:_MAX_SHOWN_BYTES]!r}")
            return
        if self._deadline is not None:
            self._deadline.cancel()
        if kinds[0] == "exception":
            log.warning("procedure raised", extra={**self._fields, "traceback": self._traceback})
        log.info("call ended", extra={**self._fields, "end": kinds[0]})
        self._record_end(kinds[0])
        worker = self._worker
        # After an error of harpd's own code, the worker may be in an undefined state.
        reuse = kinds[0] != "error" and not (self._partial_line or self._unsent) and self._zygote.may_reuse(worker)
        worker.unwatch()  # further output does not count
        self._has_closing_line = True
        if reuse:
            self._release_state()
            self._session.on_end(closing)
            self._cpu = worker.call_cpu_seconds()
            self._close(reuse_worker=True)
        else:
            if worker.served < self._info.max_calls:  # else it exits anyway
                worker.finish_input()
            self._deadline = self._loop.call_later(self._settings["kill_grace"], self._end_worker)
            self._session.on_end(closing)

    def _end_worker(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal a worker that has written its closing line but does not exit: threads or exit handlers still run."""
        log.warning("process does not exit; sending signal", extra={**self._fields, "signal": number.name})
        if number is not signal.SIGKILL:  # first, because the signal fails if no descriptor is free
            kill_worker = partial(self._end_worker, signal.SIGKILL)
            self._deadline = self._loop.call_later(self._settings["kill_grace"], kill_worker)
        send_signal(number, self._worker.identity)

    # The end.

    def stop(self, stop_reason: StopReason, detail: str | None = None, user: str | None = None) -> None:
        """Stop the call. Only the first stop counts. No effect if the call has ended before.

        `detail` is the caller's text for the error message, `user` the user who requested the stop.
        """
        if not self._decided:
            self._drain()  # output from before the stop counts
        if not self._decided:
            self._stop(stop_reason, detail, user)

    def _stop(self, stop_reason: StopReason, detail: str | None, user: str | None = None) -> None:
        self._stop_reason, self._stop_detail, self._stopped_by_user = stop_reason, detail, user
        self._unsent = memoryview(b"")  # a procedure without its arguments does not start
        self._discard_partial()
        log.info("stopping call", extra={**self._fields, "why": stop_reason.name.lower(), "reason": detail})
        if self._tree is not None:
            self._terminate().start(interrupt=stop_reason is StopReason.TIMEOUT)
            self.update_watch()

    def kill(self) -> None:
        """Kill all processes immediately, if the call is being stopped: skip the earlier steps."""
        if self._termination is not None:
            self._termination.kill()

    def _terminate(self) -> TerminationSequence:
        """Return the termination sequence of this call; create it at first."""
        if self._termination is None:
            assert self._tree is not None
            context = self._context
            self._termination = TerminationSequence(
                context.loop,
                self._tree,
                self._settings["kill_grace"],
                context.take_snapshot,
                partial(context.has_possible_escapes, self._zygote),
                self._report_survivors,
                self._close,
            )
        return self._termination

    def on_reaped(self, status: int, cpu: float | None, memory: int | None) -> None:
        """Read the worker's last output and decide the end: the worker has ended."""
        self._exit_code, self._cpu, self._memory = os.waitstatus_to_exitcode(status), cpu, memory
        if not self._has_closing_line:
            self._drain()
        self._close_channel()
        if self._deadline is not None:
            self._deadline.cancel()
        if self._has_closing_line and self._stop_reason is None:
            self._close()  # processes that it started and did not wait for are not stopped
        else:
            self._decide_end()
            self._terminate().on_main_exit(status)

    def _decide_end(self) -> None:
        if not self._has_closing_line:
            self._has_closing_line = True
            end = self._failure()
            log.info("call ended", extra={**self._fields, "end": end.type, "reason": end.message})
            self._record_end(end.type)
            self._session.on_end(encode_message(end))

    def _record_end(self, end: str) -> None:
        by = None if self._stop_reason is None else self._stop_reason.value[0]
        self._context.ended[end] += 1
        self._context.audit.record_end(self._fields, end, by, self._stopped_by_user)

    def _failure(self) -> Failed:
        code, detail = self._exit_code, self._stop_detail
        if self._stop_reason is None:
            assert code is not None
            if code < 0:
                name = _signal_name(-code)
                why = ": it is out of memory" if self._is_out_of_memory() else ""
                return Failed("call_died", f"the call's process was ended by {name}{why}", {"signal": name})
            message = f"the call's process ended without a result, exit code {code}"
            return Failed("call_died", message, {"code": code})
        if self._stop_reason is StopReason.TIMEOUT:
            detail = f"{self._info.timeout:g} s"
        elif self._stop_reason is StopReason.CANCELLED:
            detail = f" ({detail})" if detail else ""
        _, error_type, message = self._stop_reason.value
        return Failed(error_type, message.format(detail))

    def _report_survivors(self) -> None:
        """Report the end although killed processes survive."""
        self._decide_end()
        stop_report = self._terminate().stop_report()
        log.error("cannot kill processes of call", extra={**self._fields, "stop_report": stop_report})
        self._exit_reported = True
        self._session.on_exit(self._exit_info, stop_report)

    def _close(self, reuse_worker: bool = False) -> None:
        """Close the call: no process remains to be stopped. `reuse_worker`: the worker waits for another call."""
        self._release_state()
        stop_report = None if self._termination is None else self._termination.stop_report()
        if not self._exit_reported:
            self._session.on_exit(self._exit_info, stop_report)
        if reuse_worker:
            self._zygote.add_idle(self._worker)
        else:
            self._worker.release()
        self._session.call = None
        self._session.on_closed(stop_report if self._exit_reported else None)
        self._context.remove(self)
        if self._dynamic_uid is not None:
            self._context.dynamic_uids.release(self._dynamic_uid)

    def _release_state(self) -> None:
        """Release the state, before the end is reported: from now on, processes of the call are not orphans."""
        if self._session.stored is not None:  # needed until the end is reported
            self._context.state_files.mark_ended(self.id)
        else:
            self._context.state_files.remove(self.id)

    def _close_channel(self) -> None:
        self._discard_partial()
        self._worker.close()

    def _is_out_of_memory(self) -> bool:
        """Return whether the kernel has killed a process of the call for lack of memory; False if that is unknown."""
        return self._worker.cgroup is not None and self._worker.cgroup.out_of_memory()

    def _exit_info(self) -> Raw:
        code = self._exit_code
        signal_name = _signal_name(-code) if code is not None and code < 0 else None
        by = "itself"
        if self._stop_reason is not None:
            by = self._stop_reason.value[0]
        elif signal_name is not None:
            by = "out_of_memory" if self._is_out_of_memory() else "unknown"
        exit_info: dict[str, Any] = {
            "exit": code if signal_name is None else None,
            "signal": signal_name,
            "by": by,
            "by_whom": self._stopped_by_user,
            "cpu": self._cpu,
            "memory": self._memory,
            "started": self._began,
            "ended": self._began + self._loop.now() - self._began_at,  # never before its start: the clock may be set
            "authentication": self._authentication_seconds,
            "fork": None if self._fork_seconds is None else round(self._fork_seconds, 6),
        }
        if self._settings["exit_info"]["stderr"]:
            exit_info["stderr"] = self._worker.last_errors()
        if self._traceback is not None and self._settings["exit_info"]["traceback"]:
            exit_info["traceback"] = self._traceback
        return dumps(exit_info)


def _decode_traceback(line: bytes, secret_texts: Sequence[bytes]) -> str | None:
    """Return the traceback in a line of the worker, masked; None if the line is invalid."""
    try:
        found = loads(line)["traceback"]
    except (InvalidJSON, LookupError, TypeError):
        return None
    if not isinstance(found, str):
        return None
    masked = mask_texts(found.encode("utf-8", "surrogatepass"), secret_texts).decode("utf-8", "surrogatepass")
    if secret_texts and len(found) >= _MAX_TRACEBACK_LENGTH:  # its beginning is missing, perhaps of a masked text
        masked = masked[max(map(len, secret_texts)) - 1 :]
    return masked[-_MAX_TRACEBACK_LENGTH:]


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)
