"""The threads that read. Each read has a connection of its own and never waits for the writer."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from harpcaller.store import StorageError
from harpcaller.store.sqlite.file import connect, storage_errors

T = TypeVar("T")


class Readers:
    """A bounded pool of reading connections and as many threads.

    Args:
        path: the file.
        count: number of reads that run at once; more wait in order.
    """

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        self._idle: SimpleQueue[sqlite3.Connection] = SimpleQueue()
        self._open = 0
        self._stopped = False
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="store-reader")
        try:
            for _ in range(count):
                self._idle.put(connect(path, query_only=True))
                self._open += 1
        except BaseException:
            self.join()
            raise

    async def run(self, verb: Callable[[sqlite3.Connection], T]) -> T:
        """Run a verb in one of the threads. Raises `StorageError`, and what the verb raises."""
        if self._stopped:
            raise StorageError(f"{self._path}: the store is closed")

        def read() -> T:
            connection = self._idle.get()
            try:
                with storage_errors(self._path):
                    return verb(connection)
            finally:
                self._idle.put(connection)

        return await asyncio.get_running_loop().run_in_executor(self._threads, read)

    def stop(self) -> None:
        """Reject further verbs. Called in the loop's thread, like `run`."""
        self._stopped = True

    def join(self) -> None:
        """Wait until all accepted verbs are done, and close the connections. Blocks."""
        self._threads.shutdown()
        for _ in range(self._open):
            self._idle.get().close()
        self._open = 0
