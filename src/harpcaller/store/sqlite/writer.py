"""The thread that writes, and its group commit.

Theory of operation: a commit waits for the disk, so its cost is shared. All verbs that are called during a commit are
one batch: one transaction and one wait. Verbs that are called in two successive turns of the event loop are also one
batch. If a member of a batch fails, the transaction is rolled back and each member runs in a separate transaction, so
that only the failed member has no effect. A refusal, which clients can cause, is not a failure: the transaction
continues. If the commit fails, for example because the disk is full, all members get the error.

Long payloads are written separately. Verbs with more than `_LONG_BYTES`, such as the records of fast streams, alternate
with all others, about `_BATCH_BYTES` at a time. A short verb therefore waits for at most one such batch. After it, long
ones pause if others are present: see `find_pause`.

Another thread copies the log into the file, see `checkpoints`. The writer copies the rest between two transactions.

A step of pruning that failed, for example on a full disk, is repeated immediately with the space of the reserve. Pages
are freed and the reserve is filled again before the next batch, so that no other write uses the space.

The outcome of a member is published after the commit, never before. A member with a cancelled awaiter is still
executed; its outcome is ignored.

Observers get the changes of all jobs after the commit, each once and in the order of commits, before the outcomes are
published. No change is collected while there is no observer.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from operator import attrgetter
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from harp_daemon.event_loop import UrgentWork
from harp_daemon.outcome import Outcome
from harpcaller.model.changes import Change
from harpcaller.store import StorageError, SubmissionRefused
from harpcaller.store.measurements import StoreMeasurements
from harpcaller.store.sqlite.checkpoints import FULL_LOG_PAGES, Checkpointer, copy_log
from harpcaller.store.sqlite.file import connect, to_storage_error
from harpcaller.store.sqlite.reserve import Reserve
from harpcaller.store.sqlite.writes import PAYLOAD_BYTES, PRUNING, Writes

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_MEMBERS = 500  # Limit of a batch, so that its first member does not wait for an unlimited number of others.
_LONG_BYTES = 64 * 1024  # The verbs that are called in the same turns are long if their payloads have more bytes.
_SHORT_BYTES = 4 * 1024  # A verb of less is no part of a flood.
_BATCH_BYTES = 256 * 1024  # A batch of long verbs ends when their payloads have this size.
_SEPARATE = Writes.append_records, Writes.insert_staged
_SHARED_FOR = 0.5  # Seconds between two submissions, and after them, in which floods share the daemon with others.
_PAUSES = 3.0  # The pauses of a flood, compared with the time that it uses.
_MAX_USED = 0.05  # Most seconds of one step that count: the disk may be slow.


class _Member(NamedTuple):
    verb: Callable[..., Any]
    args: Sequence[Any]
    options: Mapping[str, Any]
    future: Outcome[Any]
    last: bool
    size: int  # bytes of its payloads, if they may be long


_size_of = attrgetter("size")


class Writer:
    """The thread that runs the verbs that write, batch by batch.

    Only `connection` writes; the thread closes it at its end. `path` is the file, for messages and for the reserve in
    its directory; `loop` is the event loop in which outcomes are awaited.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, loop: asyncio.AbstractEventLoop) -> None:
        self._path = path
        self._reserve = Reserve(path.parent)
        self._reserve.fill()
        self._connection = connection
        self._checkpointer = Checkpointer(connect(path))
        connection.execute(f"PRAGMA wal_autocheckpoint = {FULL_LOG_PAGES}")
        # SQLite notes how to undo a statement: otherwise in a file in /var/tmp, if it changes many pages.
        connection.execute("PRAGMA temp_store = MEMORY")
        self._writes = Writes(connection)
        self._loop = loop
        self._next_members: list[_Member] = []  # called in this turn of the loop and the next
        self._queue: SimpleQueue[Sequence[_Member]] = SimpleQueue()  # an empty sequence ends the thread
        # Groups of verbs that were called in the same turns, moved here by the thread; long groups with their sizes.
        self._short: deque[Sequence[_Member]] = deque()
        self._long: deque[tuple[Sequence[_Member], int]] = deque()
        self._long_is_next = self._ending = False
        self._is_long = False  # of the batch
        self._long_at = 0.0  # monotonic time at which the next long batch may begin
        # Monotonic times of the last submission of a job, and of the last one that followed another one soon: a single
        # one may be that of the flood.
        self._submitted_at = self._others_at = float("-inf")
        self._observers: list[Callable[[Sequence[Change]], object]] = []
        self._committed: list[Change] = []  # the changes of the last batch
        #: Called in the thread before each transaction.
        self.before_commit: Callable[[], object] = lambda: None
        self.measurements: StoreMeasurements | None = None  #: None: nothing is measured.
        self.committed_at = float("-inf")  #: Monotonic time of the last commit.
        # A daemon thread, so that a program that fails before it closes the store can exit.
        self._thread = threading.Thread(target=self._run_batches, name="store-writer", daemon=True)
        self._thread.start()

    def run(self, verb: Callable[..., T], last: bool, args: Sequence[Any], options: Mapping[str, Any]) -> Outcome[T]:
        """Run a verb within a transaction, with `last` after the other members of its batch, to see their changes.

        The future has the verb's result when its changes are on stable storage. Otherwise the verb had no effect: the
        future has a `StorageError` if the transaction failed, or the exception of the verb.
        """
        if not self._next_members:
            # After the next turn, so that the batch includes verbs that are called there, such as a claim.
            self._loop.call_soon(self._loop.call_soon, self._flush)
        future: Outcome[T] = Outcome(self._loop)
        count_bytes = PAYLOAD_BYTES.get(verb)
        size = 0 if count_bytes is None else count_bytes(*args, **options)
        self._next_members.append(_Member(verb, args, options, future, last, size))
        return future

    def observe(self, observer: Callable[[Sequence[Change]], object]) -> Callable[[], None]:
        """Pass the changes of each later commit to a function in the loop's thread; return a function that ends it."""

        def end() -> None:
            self._observers.remove(observer)
            self._writes.is_observed = bool(self._observers)

        self._observers.append(observer)
        self._writes.is_observed = True
        return end

    def find_pause(self, seconds: float) -> float:
        """Return for how many seconds a flood pauses after it has used `seconds`: 0 if nobody else submits jobs.

        So it leaves most of the time to others. Otherwise each of their steps would wait for a step of the flood.
        """
        return _PAUSES * min(seconds, _MAX_USED) if time.monotonic() - self._others_at < _SHARED_FOR else 0.0

    def _notify_observers(self, changes: Sequence[Change]) -> None:
        for observer in self._observers.copy():
            try:
                observer(changes)
            except Exception:
                log.exception("an observer of jobs failed: internal error")

    def _flush(self) -> None:
        """Pass the verbs that were called in these two turns to the thread, with one wakeup."""
        if self._next_members:
            self._queue.put(self._next_members)
            self._next_members = []

    def stop(self) -> None:
        """End the thread after the accepted verbs. Called in the loop's thread, like `run`, which must not follow."""
        self._flush()
        self._queue.put(())

    def join(self) -> None:
        """Wait until all accepted verbs are done and the connection is closed. Blocks."""
        self._thread.join()

    def _run_batches(self) -> None:
        urgent = UrgentWork()
        with closing(self._connection):
            while batch := self._next_batch():
                urgent.begin()
                batch.sort(key=attrgetter("last"))
                self.before_commit()
                began_at = time.monotonic()
                outcomes = self._commit(batch)
                for index, (member, outcome) in enumerate(zip(batch, outcomes, strict=True)):
                    if isinstance(outcome, StorageError) and member.verb in PRUNING:
                        with self._checkpointer.copying:
                            outcomes[index] = self._commit_with_reserve(member)
                now = time.monotonic()
                if self._is_long:
                    self._long_at = now + self.find_pause(now - began_at)
                elif any(member.verb is Writes.add_job for member in batch):
                    if now - self._submitted_at < _SHARED_FOR:
                        self._others_at = now
                    self._submitted_at = now
                changes, self._committed = self._committed, []
                # The loop may be closed when the program ends without closing the store.
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._publish, batch, outcomes, changes)
                if self._checkpointer.take_rest():
                    copy_log(self._connection)
                self._checkpointer.count(len(batch), sum(map(_size_of, batch)))
                urgent.end()
            self._checkpointer.end()

    def _next_batch(self) -> list[_Member]:
        """Wait for members; return groups of short and of long verbs alternately. An empty list ends the thread."""
        while not (self._ending or (self._queue.empty() and (self._short or self._is_long_due()))):
            try:
                members = self._queue.get(timeout=max(0.0, self._long_at - time.monotonic()) if self._long else None)
            except Empty:
                continue
            if members:
                self._add_called(members)
            else:
                self._ending = True
        batch: list[_Member] = []
        self._is_long = not self._short or (self._long_is_next and self._is_long_due())
        if not self._is_long:
            self._long_is_next = True
            while self._short and len(batch) < _MAX_MEMBERS:
                batch += self._short.popleft()
            return batch
        self._long_is_next = False
        room = _BATCH_BYTES
        while self._long and room > 0:
            members, size = self._long.popleft()
            batch += members
            room -= size
        return batch

    def _is_long_due(self) -> bool:
        return bool(self._long) and time.monotonic() >= self._long_at

    def _add_called(self, members: Sequence[_Member]) -> None:
        """Add the verbs that were called in the same turns. A claim stays in the group of the jobs that it starts.

        The verbs of `_SEPARATE`, of which floods consist, are separated from others that were called with them, also
        from the few records of other jobs.
        """
        if sum(map(_size_of, members)) <= _LONG_BYTES:
            self._short.append(members)
            return
        floods = [member for member in members if member.verb in _SEPARATE and member.size > _SHORT_BYTES]
        self._long += [((member,), member.size) for member in floods]
        if others := [member for member in members if member.verb not in _SEPARATE or member.size <= _SHORT_BYTES]:
            size = sum(map(_size_of, others))
            if size > _LONG_BYTES:
                self._long.append((others, size))
            else:
                self._short.append(others)

    def _commit(self, batch: Sequence[_Member]) -> list[Any]:
        """Run a batch; return the result of each member, or the exception that it raised."""
        outcomes: list[Any] = []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._writes.begin_transaction()
            for verb, args, options, *_ in batch:
                try:
                    outcomes.append(verb(self._writes, *args, **options))
                except SubmissionRefused as refusal:
                    outcomes.append(refusal)
            self._writes.flush()
            self._execute_commit()
        except Exception as failure:  # noqa: BLE001 - the members get it; the thread continues
            error = to_storage_error(failure, self._path)
            # A failed member leaves a transaction to roll back; a full or locked file leaves no transaction.
            is_member_failed = self._connection.in_transaction
            self._writes.discard_changes()
            if is_member_failed:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
            if len(batch) == 1 or not is_member_failed:
                return [error] * len(batch)
            return [outcome for member in batch for outcome in self._commit([member])]
        if self._writes.changes:
            self._committed += self._writes.changes
            self._writes.changes.clear()
        return outcomes

    def _execute_commit(self) -> None:
        began_at = time.monotonic()
        self._connection.execute("COMMIT")
        self.committed_at = time.monotonic()
        if self.measurements is not None:
            self.measurements.commit_seconds.observe(self.committed_at - began_at)

    def _commit_with_reserve(self, member: _Member) -> Any:
        """Run a step of pruning with the space of the reserve; return its outcome.

        A deletion of jobs is repeated until it has freed enough space for the reserve; then the outcome is the total.
        """
        deleted = 0
        while True:
            self._reserve.release()
            copy_log(self._connection)  # so that the log is overwritten from its start and does not grow
            [outcome] = self._commit([member])
            for verb in (Writes.delete_orphaned_records, Writes.release_free_pages):
                while self._commit([member._replace(verb=verb, args=(), options={})]) == [True]:
                    pass
            copy_log(self._connection)
            is_full = self._reserve.fill()
            if member.verb is not Writes.delete_jobs:
                return outcome
            if isinstance(outcome, Exception):
                return deleted or outcome
            deleted += outcome
            if is_full or not outcome:
                return deleted

    def _publish(self, batch: Sequence[_Member], outcomes: Sequence[Any], changes: Sequence[Change]) -> None:
        if changes:
            self._notify_observers(changes)
        if self.measurements is not None:
            for member, outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, StorageError):
                    self.measurements.record_error(member.verb.__name__)
        _resolve_futures(batch, outcomes)


def _resolve_futures(batch: Sequence[_Member], outcomes: Sequence[Any]) -> None:
    for member, outcome in zip(batch, outcomes, strict=True):
        future = member.future
        if future.done():  # its awaiter was cancelled
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
