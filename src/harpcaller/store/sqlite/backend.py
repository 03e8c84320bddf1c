"""The store on one SQLite file: every verb runs in the writing thread or in one of the reading threads."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Coroutine
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from harpcaller.store.sqlite import pruning, reads, writes
from harpcaller.store.sqlite.file import FILE_NAME, connect, lock, prepare, storage_errors
from harpcaller.store.sqlite.readers import Readers
from harpcaller.store.sqlite.writer import Writer

P = ParamSpec("P")
T = TypeVar("T")

# Number of reading threads. They hold Python's lock for most of their time, so more would not be faster.
_READERS = 4


async def open_store(directory: Path) -> SQLiteStore:
    """Open the store in a directory; create the directory and the file if they do not exist.

    The time does not depend on the number of jobs that have ended.

    Args:
        directory: directory of the file `FILE_NAME`; private to this user if it is created here.

    Raises:
        StorageError: another store has it open; the file is not HARP's or has a newer schema, and stays untouched; or
            it cannot be created, read or written.
    """
    return await asyncio.to_thread(SQLiteStore, directory, asyncio.get_running_loop())


def _writes(
    verb: Callable[Concatenate[sqlite3.Connection, P], T], last: bool = False
) -> Callable[Concatenate[SQLiteStore, P], Coroutine[Any, Any, T]]:
    """Return a method that runs a verb in the writing thread; with `last`, after the others of its batch."""

    @wraps(verb)
    async def method(self: SQLiteStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._writer.run(lambda db: verb(db, *args, **kwargs), last)

    return method


def _reads(
    verb: Callable[Concatenate[sqlite3.Connection, P], T],
) -> Callable[Concatenate[SQLiteStore, P], Coroutine[Any, Any, T]]:
    """Return a method that runs a verb in a reading thread."""

    @wraps(verb)
    async def method(self: SQLiteStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._readers.run(lambda db: verb(db, *args, **kwargs))

    return method


class SQLiteStore:
    """A `harpcaller.store.Store`, created by `open_store`. Its verbs are called in the loop in which it was created."""

    def __init__(self, directory: Path, loop: asyncio.AbstractEventLoop) -> None:
        path = directory / FILE_NAME
        self._closing = False
        self._lock = lock(directory)
        try:
            prepare(path)
            with storage_errors(path):
                self._readers = Readers(path, _READERS)
                try:
                    self._writer = Writer(path, connect(path), loop)
                except BaseException:
                    self._readers.join()
                    raise
        except BaseException:
            os.close(self._lock)
            raise

    add_job = _writes(writes.add_job)
    add_jobs = _writes(writes.add_jobs)
    claim_jobs = _writes(writes.claim_jobs, last=True)
    append_records = _writes(writes.append_records)
    finish_job = _writes(writes.finish_job)
    cancel_job = _writes(writes.cancel_job)
    cancel_queue = _writes(writes.cancel_queue)
    finalize_stop = _writes(writes.finalize_stop)
    update_metadata = _writes(writes.update_metadata)
    release_slot = _writes(writes.release_slot)
    list_slot_holders = _reads(reads.list_slot_holders)
    get_job = _reads(reads.get_job)
    get_details = _reads(reads.get_details)
    read_records = _reads(reads.read_records)
    get_identity = _reads(reads.get_identity)
    list_jobs = _reads(reads.list_jobs)
    list_queues = _reads(reads.list_queues)

    _delete_jobs = _writes(pruning.delete_jobs)
    _delete_orphaned_records = _writes(pruning.delete_orphaned_records)
    _release_free_pages = _writes(pruning.release_free_pages)
    _checkpoint = _reads(pruning.checkpoint)

    async def prune_jobs(self, ended_before: float, limit: int) -> int:
        """See `Store.prune_jobs`. Each step is a transaction of its own; other verbs run between the steps."""
        pruned = 0
        while deleted := await self._delete_jobs(ended_before, limit - pruned):
            pruned += deleted
        while await self._delete_orphaned_records():
            pass
        while await self._release_free_pages():
            pass
        if pruned:
            await self._checkpoint()
        return pruned

    async def close(self) -> None:
        """See `Store.close`. Closing again does nothing."""
        if not self._closing:
            self._closing = True
            self._writer.stop()
            self._readers.stop()
            await asyncio.to_thread(self._join)

    def _join(self) -> None:
        self._writer.join()
        self._readers.join()
        os.close(self._lock)
