"""The audit log of a daemon: entries of actions, in the file before their replies, in groups.

`harp_daemon.audit_file` has the format, `harp_daemon.audit_reading` finds changes, `harp_daemon.audit_commands` are
the commands.

Theory of operation. All entries that are recorded during one wait for the disk are the next group, with one wait.
`AuditLog` belongs to an asyncio loop. A group is written by its own thread, or by another thread that is about to
store what the entries describe: then they are in the file before that is stored, and a process that is killed loses
nothing. Such entries do not wait for the disk: after a power failure, they are made again from what was stored.
`DirectAuditLog`, for a loop without futures, writes what was recorded in a turn of the loop before anything is sent
that tells of it; the wait for the disk is in a thread, soon after.

While the file has a `problem`, for example a full disk, entries of new jobs are refused. Entries with `must` cannot be
refused, because what they describe has happened: they are written into the room that was allocated for them. If even
that is used up, a limited number waits in memory. An entry ``audit-lost`` has the number of those that were discarded.

Entries that anybody can cause are bounded: the first `_MAX_SINGLE` with the same key in a minute have entries, the
others of that minute share one, with a count.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from harp_daemon.audit_file import AuditError, AuditFile

if TYPE_CHECKING:  # large, and harpd's supervisor has another loop
    import asyncio

__all__ = ["AuditError", "AuditLog", "DirectAuditLog"]

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_MAX_BYTES = 100 * 1024 * 1024  #: The default size from which on a file is rotated.
_REPORT_DELAY = 0.1  #: Seconds until an entry is written that nobody waits for: each wakeup of the thread costs time.
_SYNC_DELAY = 0.2  #: Seconds in which entries are collected for one wait for the disk, if nothing waits for them.
_RETRY_INTERVAL = 1.0  #: Seconds between two attempts to write, or to allocate room.
_MAX_WAITING = 20_000  #: Maximum number of entries with `must` in memory while they cannot be written.
_WINDOW, _MAX_SINGLE = 60.0, 10  #: Seconds of a window, and the entries of a key in it before the shared one.
_MAX_KEYS = 1000  #: Maximum number of keys in a window; all others share one for each action and decision.
_OF_FIRST = frozenset({"time", "peer"})  #: Fields that a shared entry has of the first one; ports of a peer differ.


class Recorded:
    """An entry that was recorded; `must` as in `AuditLog.record`."""

    __slots__ = ("error", "fields", "future", "is_done", "must")

    def __init__(self, fields: dict[str, Any], must: bool, future: asyncio.Future[None] | None = None) -> None:
        self.fields = fields
        self.must = must
        self.future = future  #: Is done when the entry is on stable storage, or has an error; None: nobody waits.
        self.is_done = False  #: Whether it is in the file, or has an error.
        self.error: AuditError | None = None  #: Why it is not.


class _Repetitions:
    """The entries of the present minute that anybody can cause, by their keys."""

    def __init__(self) -> None:
        self._ends_at = 0.0
        # By key, the number of entries, and what is the same in all of those that were only counted.
        self._counts: dict[Hashable, tuple[int, dict[str, Any]]] = {}

    def admit(self, key: Hashable, fields: dict[str, Any], now: float) -> bool:
        """Return whether an entry is written now; otherwise it is counted."""
        if not self._counts:
            self._ends_at = now + _WINDOW
        if key not in self._counts and len(self._counts) >= _MAX_KEYS:
            key = fields["action"], fields["decision"]
            fields = {name: fields[name] for name in ("time", "action", "decision")} | {"peer": "others"}
        count, shared = self._counts.get(key, (0, fields))
        if count <= _MAX_SINGLE:
            shared = fields
        elif any(name not in fields or fields[name] != shared[name] for name in shared.keys() - _OF_FIRST):
            shared = {name: value for name, value in shared.items() if name in _OF_FIRST or fields.get(name) == value}
        self._counts[key] = count + 1, shared
        return count < _MAX_SINGLE

    def end_window(self, now: float) -> list[dict[str, Any]]:
        """Return the shared entries of a window that has ended; with infinity as `now`, of any window."""
        if not self._counts or now < self._ends_at:
            return []
        counts, self._counts = self._counts, {}
        return [
            {**shared, "time": time.time(), "count": count - _MAX_SINGLE, "since": shared["time"]}
            for count, shared in counts.values()
            if count > _MAX_SINGLE
        ]


class _Waiting(deque[T]):
    """Entries that cannot be written yet. Beyond `_MAX_WAITING`, the oldest are discarded and counted."""

    discarded = 0

    def add(self, entries: Iterable[T]) -> None:
        self.extend(entries)
        while len(self) > _MAX_WAITING:
            self.popleft()
            self.discarded += 1

    def describe_discarded(self) -> list[dict[str, Any]]:
        """Return the entry about those that were discarded, if any."""
        return [{"time": time.time(), "action": "audit-lost", "count": self.discarded}] if self.discarded else []

    def clear(self) -> None:
        super().clear()
        self.discarded = 0


class AuditLog:
    """An audit log whose entries are recorded in the loop in which it was made. Raises `AuditError`."""

    def __init__(self, path: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        import asyncio

        self.path = path
        self._file = AuditFile(path, max_bytes)
        self._loop = asyncio.get_running_loop()
        self._repetitions = _Repetitions()
        self._window: asyncio.TimerHandle | None = None
        self._recorded: deque[Recorded] = deque()  # not written yet
        self._is_awaited = False  # whether there is an entry among them that is written before a commit
        self._waiting = _Waiting[dict[str, Any]]()  # with `must`, while they cannot be written
        self._wakeups: SimpleQueue[bool] = SimpleQueue()  # of the thread; true: the log ends
        self._wakeup_is_due = self._wakeup_is_planned = False
        self._closed = False
        self._problem_logged: str | None = None
        self._awaited: list[Recorded] = []  # written; their futures wait for the disk
        self._sync_at: float | None = None  # monotonic time; None: the end of the file is on stable storage
        self.entries = self.write_errors = 0  #: Number of written entries, and of failed writes.
        self._writing = threading.Lock()  # held by the thread that writes
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """Why new jobs are to be refused; None: entries can be written."""
        return self._file.problem

    def record(
        self, action: str, decision: str | None, *, repeats: Hashable = None, must: bool = False, **fields: Any
    ) -> asyncio.Future[None]:
        """Record an entry; return a future that is done when it is on stable storage, or has an `AuditError`.

        With `must`, an entry that cannot be written now is written later, in spite of the error. `repeats`: the entry
        is one of a kind that anybody can cause, with this key; if it is only counted, the future is done. A field with
        None is omitted. The entry has a digest of ``arguments``, which are bytes.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        entry = Recorded({"time": time.time(), "action": action, "decision": decision, **fields}, must, future)
        if self._admit(entry, repeats):
            self._add(entry)
        elif entry.error is None:
            future.set_result(None)
        else:
            future.set_exception(entry.error)
        return future

    def record_before_commit(self, fields: dict[str, Any], *, repeats: Hashable = None, must: bool = False) -> Recorded:
        """Record an entry as `record` does, for the next `write_before_commit`, which must follow.

        `fields` are ``time``, ``action``, ``decision`` and others.
        """
        entry = Recorded(fields, must)
        if self._admit(entry, repeats):
            self._recorded.append(entry)
            self._is_awaited = True  # after the entry: a thread that writes now may have found none
        return entry

    def write_before_commit(self) -> None:
        """Write all recorded entries, if some were recorded for this. Another thread than the loop's may call it.

        They are on stable storage 0.2 s later.
        """
        with self._writing:  # until a group that is being written is
            if self._is_awaited:
                is_thread_idle = self._sync_at is None
                self._write_recorded()
                if is_thread_idle:
                    self._wakeups.put(False)

    def record_all(self, entries: Sequence[dict[str, Any]]) -> asyncio.Future[None]:
        """Record entries with ``action`` and other fields, together, as `record` with `must`."""
        future: asyncio.Future[None] = self._loop.create_future()
        now = time.time()
        *others, last = ({"time": now, **fields} for fields in entries)
        self._add(*(Recorded(fields, True) for fields in others), Recorded(last, True, future))
        return future

    def report(self, action: str, **fields: Any) -> None:
        """Record an entry about something that has happened. It is written with others, at the latest after 0.1 s."""
        self._recorded.append(Recorded({"time": time.time(), "action": action, **fields}, True))
        if not self._wakeup_is_planned:
            self._wakeup_is_planned = True
            self._loop.call_later(_REPORT_DELAY, self._on_report_delay)

    def read_recent(self) -> list[dict[str, Any]]:
        """Return the entries of the last 8 MiB. May block. Raises OSError."""
        return self._file.read_recent()

    def reopen(self) -> None:
        """Continue in another file if the file was renamed. Otherwise that happens within a second."""
        self._file.reopen()
        self._wakeups.put(False)

    async def close(self) -> None:
        """Write all entries and close the file."""
        if not self._closed:
            self._closed = True
            if self._window is not None:
                self._window.cancel()
            self._end_window(float("inf"))
            self._wakeups.put(True)
            await self._loop.run_in_executor(None, self._thread.join)

    def _admit(self, entry: Recorded, repeats: Hashable) -> bool:
        """Return whether an entry is to be written; otherwise its outcome is set."""
        fields = entry.fields
        if repeats is not None:
            now = time.monotonic()  # before the timer begins, so that the window has ended when it runs
            if self._window is None:
                self._window = self._loop.call_later(_WINDOW, self._on_window_end)
            if not self._repetitions.admit((fields["action"], fields["decision"], repeats), fields, now):
                entry.is_done = True
                return False
        if self._closed or not (entry.must or self._file.has_room):
            entry.error = AuditError(self.problem or f"{self.path}: it is closed")
            entry.is_done = True
            return False
        return True

    def _on_window_end(self) -> None:
        self._window = None
        self._end_window(time.monotonic())

    def _end_window(self, now: float) -> None:
        self._add(*(Recorded(fields, True) for fields in self._repetitions.end_window(now)))

    def _add(self, *entries: Recorded) -> None:
        self._recorded += entries
        if entries and not self._wakeup_is_due:
            self._wakeup_is_due = True
            self._loop.call_soon(self._wake)

    def _on_report_delay(self) -> None:
        self._wakeup_is_planned = False
        self._wake()

    def _wake(self) -> None:
        self._wakeup_is_due = False
        if self._recorded:
            self._wakeups.put(False)

    # The thread.

    def _run(self) -> None:
        ended = False
        while not ended:
            with suppress(Empty):  # it is time for another attempt
                ended = self._wakeups.get(timeout=self._find_timeout())
            with self._writing:
                if self._recorded or self._waiting or self._file.problem is not None:
                    self._write_recorded()
                awaited, self._awaited = self._awaited, []
                is_due = self._sync_at is not None and (awaited or ended or time.monotonic() >= self._sync_at)
                if is_due:
                    self._sync_at = None
            if is_due:
                self._sync(awaited)
        with self._writing:
            self._file.close()

    def _find_timeout(self) -> float | None:
        """Return how many seconds the thread waits for entries; None: until there are some."""
        if self._sync_at is not None:
            return max(0.0, self._sync_at - time.monotonic())
        return _RETRY_INTERVAL if self._waiting or self._file.problem is not None else None

    def _sync(self, awaited: Sequence[Recorded]) -> None:
        """Wait for the disk. Others can write meanwhile."""
        error = None
        try:
            self._file.sync()
        except AuditError as failure:
            error = failure
        with self._writing:
            if error is not None:
                self.write_errors += 1
                self._sync_at = time.monotonic() + _RETRY_INTERVAL
            self._log_problem()
        self._finish(awaited, error)

    # With the lock.

    def _write_recorded(self) -> None:
        """Write all recorded entries. Those with futures are done when they are synchronized; or they have an error."""
        self._is_awaited = False
        group = [self._recorded.popleft() for _ in range(len(self._recorded))]
        try:
            self._write_group(group)
        except AuditError as error:
            self.write_errors += 1
            self._finish(group, error)
        else:
            for entry in group:
                if entry.future is None:
                    entry.is_done = True
                else:
                    self._awaited.append(entry)
        self._log_problem()

    def _write_group(self, group: Sequence[Recorded]) -> None:
        if self._file.problem is not None:
            self._file.check_room()
        has_room = self._file.has_room
        entries = [entry.fields for entry in group if has_room or entry.must]
        if entries or self._waiting:
            waiting = [*self._waiting.describe_discarded(), *self._waiting] if self._waiting else []
            try:
                self._file.append(waiting + entries)
            except AuditError:
                self._waiting.add(entry.fields for entry in group if entry.must)
                raise
            self.entries += len(self._waiting) + len(entries)
            self._waiting.clear()
        if self._sync_at is None and group:
            self._sync_at = time.monotonic() + _SYNC_DELAY
        if len(entries) < len(group):
            raise AuditError(self._file.problem or f"{self.path}: no room")

    def _finish(self, entries: Sequence[Recorded], error: AuditError | None) -> None:
        futures = [entry.future for entry in entries if entry.future is not None]
        for entry in entries:
            entry.error = error
            entry.is_done = True
        if futures:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(_resolve, futures, error)

    def _log_problem(self) -> None:
        problem = self._file.problem
        if problem != self._problem_logged:
            if problem is None:
                log.info("audit file can be written again", extra={"file": str(self.path)})
            else:
                log.error("audit file has no room; jobs refused", extra={"reason": problem})
            self._problem_logged = problem


def _resolve(futures: Sequence[asyncio.Future[None]], error: AuditError | None) -> None:
    for future in futures:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(AuditError(str(error)))


class DirectAuditLog:
    """An audit log that writes at once; a thread waits for the disk. Other processes may write the same file.

    `call_soon` calls a function at the end of this turn of the program's loop, `call_later` after a number of seconds.
    Raises `AuditError`.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        call_soon: Callable[[Callable[[], None]], object],
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self.path = path
        self._file = AuditFile(path, max_bytes, shared=True)
        self._call_soon = call_soon
        self._call_later = call_later
        self._recorded: list[dict[str, Any]] = []  # in this turn; not written yet
        self._repetitions = _Repetitions()
        self._waiting = _Waiting[dict[str, Any]]()
        self._timer_at = math.inf  # monotonic time
        self._written = threading.Event()
        self._is_sync_requested = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._sync_repeatedly, name="audit-sync", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """Why new calls are to be refused; None: entries can be written."""
        return self._file.problem

    def record(self, entry: dict[str, Any], *, repeats: Hashable = None) -> None:
        """Record an entry with ``time``, ``action``, ``decision`` and others, as `AuditLog.record` with `must`.

        It is written at the end of this turn. Call `write` before anything is sent earlier that tells of it.
        """
        if repeats is not None:
            now = time.monotonic()  # before the timer begins, so that the window has ended when it runs
            self._set_timer(_WINDOW)
            if not self._repetitions.admit((entry["action"], entry.get("decision"), repeats), entry, now):
                return
        if not self._recorded:
            self._call_soon(self.write)
        self._recorded.append(entry)

    def write(self) -> None:
        """Write the recorded entries."""
        if self._recorded:
            entries, self._recorded = self._recorded, []
            self._write_waiting(entries)

    def check_room(self) -> None:
        """Find out whether a full disk has room again."""
        if self._file.problem is not None:
            self._file.check_room()

    def reopen(self) -> None:
        """Continue in another file if the file was renamed. Otherwise that happens within a second."""
        self._file.reopen()
        with suppress(AuditError):
            self._file.append([])

    def close(self) -> None:
        """Write all entries and close the file."""
        self._write_waiting([*self._recorded, *self._repetitions.end_window(float("inf"))])
        self._recorded = []
        self._closing.set()
        self._written.set()
        self._thread.join()
        self._file.close()

    def _set_timer(self, seconds: float) -> None:
        at = time.monotonic() + seconds
        if at < self._timer_at:
            self._timer_at = at
            self._call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer_at = math.inf
        self._write_waiting(self._repetitions.end_window(time.monotonic()))

    def _write_waiting(self, entries: list[dict[str, Any]]) -> None:
        """Write entries that cannot be refused, after those that wait. If that fails, they wait, too."""
        group = [*self._waiting.describe_discarded(), *self._waiting, *entries] if self._waiting else entries
        if not group:
            return
        try:
            self._file.append(group)
        except AuditError:
            self._waiting.add(entries)
            self._set_timer(_RETRY_INTERVAL)
        else:
            if self._waiting:
                self._waiting.clear()
            if not self._is_sync_requested:
                self._request_sync()

    def _request_sync(self) -> None:
        """Have the thread wait for the disk soon, after a write."""
        self._is_sync_requested = True
        self._written.set()

    def _sync_repeatedly(self) -> None:
        while not self._closing.is_set():
            self._written.wait()
            self._closing.wait(_SYNC_DELAY)
            self._written.clear()
            self._is_sync_requested = False  # before the wait: an entry that is written meanwhile requests another
            with suppress(AuditError):
                self._file.sync()
