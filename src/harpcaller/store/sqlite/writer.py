"""The thread that writes, and its group commit.

Theory: a commit waits for the disk, so its cost is shared. Whatever arrived while the last commit ran is one batch:
one transaction, one wait; and so is whatever is asked for in one turn of the event loop. When a member fails, all is
taken back and run again, each within a savepoint: then a member that fails takes back its own changes and nobody
else's. Only when the transaction itself fails (the disk is full, the file can't be written) does the whole batch fail:
nothing of it happened, and every member is told so. The thread goes on with the next batch; once the cause is gone,
writing works again.

A member's outcome is told after the commit, never before. A member whose awaiter has gone runs all the same: nobody
is told its outcome.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from harpcaller.store import StorageError
from harpcaller.store.sqlite.file import storage_errors

__all__ = ["Writer"]

T = TypeVar("T")

# A batch is bounded, so that its first member does not wait for a flood behind it.
_MAX_MEMBERS = 500


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    verb: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    last: bool


@dataclass(frozen=True, slots=True)
class _Done:
    value: Any


_Outcome: TypeAlias = _Done | Exception


class Writer:
    """Runs verbs that write, one batch after the other, in one thread.

    Args:
        path: the file, for messages.
        connection: the only one that writes; closed by the thread at its end.
        loop: the event loop of those who await the outcomes.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, loop: asyncio.AbstractEventLoop) -> None:
        self._path = path
        self._connection = connection
        self._loop = loop
        self._next_members: list[_Member] = []  # in this turn of the loop
        self._queue: SimpleQueue[Sequence[_Member]] = SimpleQueue()  # an empty one: there will be no more
        self._closing = False
        # As a daemon, so that a program which fails before it closes the store can end.
        self._thread = threading.Thread(target=self._run_batches, name="store-writer", daemon=True)
        self._thread.start()

    async def run(self, verb: Callable[[sqlite3.Connection], T], last: bool = False) -> T:
        """Run a verb; it is on stable storage when this returns.

        Args:
            verb: what to do, on the connection, within a transaction.
            last: whether it runs behind the others of its batch, to see what they do.

        Raises:
            StorageError: it did not happen.
            Exception: what the verb raised; it did not happen either.
        """
        if self._closing:
            raise StorageError(f"{self._path}: the store is closed")
        if not self._next_members:
            self._loop.call_soon(self._flush)
        future: asyncio.Future[T] = self._loop.create_future()
        self._next_members.append(_Member(verb, future, last))
        return await future

    def _flush(self) -> None:
        """Give the thread what was asked for in this turn of the loop: one batch, and one wakeup."""
        if self._next_members:
            self._queue.put(self._next_members)
            self._next_members = []

    def stop(self) -> None:
        """Take nothing more. Called in the loop's thread, as `run` is: so nothing comes in behind this."""
        self._closing = True
        self._flush()
        self._queue.put(())

    def join(self) -> None:
        """Wait until all that was taken is done and the connection closed. Blocks."""
        self._thread.join()

    def _run_batches(self) -> None:
        open_ = True
        while open_:
            batch, open_ = self._next_batch()
            if batch:
                batch.sort(key=attrgetter("last"))
                outcomes = self._commit(batch)
                # The loop may be gone when the program ends without closing the store.
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(_resolve_futures, batch, outcomes)
        self._connection.close()

    def _next_batch(self) -> tuple[list[_Member], bool]:
        """Wait for members and take all that are there; False once there will be none any more."""
        batch: list[_Member] = []
        while asked := self._queue.get():
            batch += asked
            if len(batch) >= _MAX_MEMBERS or self._queue.empty():
                return batch, True
        return batch, False

    def _commit(self, batch: Sequence[_Member]) -> list[_Outcome]:
        outcomes: list[_Outcome]
        try:
            with storage_errors(self._path):
                try:
                    self._connection.execute("BEGIN IMMEDIATE")
                    outcomes = [_Done(member.verb(self._connection)) for member in batch]
                except Exception:  # noqa: BLE001 - whose fault it was is found by running each apart
                    self._roll_back()
                    self._connection.execute("BEGIN IMMEDIATE")
                    outcomes = [self._run_in_savepoint(member) for member in batch]
                self._connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - each member is told, and the thread goes on
            self._roll_back()
            return [_copy_error(error) for _ in batch]
        return outcomes

    def _run_in_savepoint(self, member: _Member) -> _Outcome:
        """Run a member within a savepoint. Raises only when the whole transaction is lost."""
        self._connection.execute("SAVEPOINT member")
        outcome: _Outcome
        try:
            with storage_errors(self._path):
                outcome = _Done(member.verb(self._connection))
        except Exception as error:
            if not self._connection.in_transaction:  # SQLite has taken it all back
                raise
            self._connection.execute("ROLLBACK TO member")
            outcome = error
        self._connection.execute("RELEASE member")
        return outcome

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")


def _copy_error(error: Exception) -> Exception:
    """The same error for one more awaiter: each gets its own, as each adds its own traceback."""
    if not isinstance(error, StorageError):
        return error
    copy = StorageError(*error.args)
    copy.__cause__ = error.__cause__
    return copy


def _resolve_futures(batch: Sequence[_Member], outcomes: Sequence[_Outcome]) -> None:
    for member, outcome in zip(batch, outcomes, strict=True):
        if member.future.done():  # its awaiter was cancelled
            continue
        match outcome:
            case _Done(value):
                member.future.set_result(value)
            case _:
                member.future.set_exception(outcome)
