"""SQLite's log of writes: kept at its size, and brought into the file by a thread of its own.

Theory: a commit is appended to the log and synced. While the log grows, each sync has the file system write its own
journal, too; a log that is overwritten in place costs a fraction of that. So the log is filled with zeros when it is
opened, which SQLite takes for its end, and is never cut below this size. What it holds is brought into the file
(a checkpoint) beside the commits. SQLite begins the log anew with the first write that finds all of it brought in; when
the writes leave no such moment, the log grows to some multiple, and then one write waits.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path

from harpcaller.store import StorageError
from harpcaller.store.sqlite.file import connect, storage_errors

__all__ = ["LOG_BYTES", "WriteLog"]

_LOG = logging.getLogger("harpcaller.store")

#: The size that the log is kept at.
LOG_BYTES = 4 * 1024 * 1024

# A log of this size is brought in before the next write.
_MOST_LOG_BYTES = 4 * LOG_BYTES

# So many commits of small jobs fit in the log with room to spare; larger ones are seen by its size.
_COMMITS = 64


class WriteLog:
    """Takes care of the log of writes.

    Args:
        path: the store's file.
        writing: the connection that writes; it makes no checkpoints any more.
    """

    def __init__(self, path: Path, writing: sqlite3.Connection) -> None:
        self._path = path
        self._file = path.with_name(path.name + "-wal")
        self._connection = connect(path)
        self._using = threading.Lock()
        self._commits = 0
        self._due = threading.Event()
        self._closing = False
        try:
            with storage_errors(path):
                writing.execute("PRAGMA wal_autocheckpoint = 0").fetchall()
                writing.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}").fetchall()
                self._connection.execute("SELECT * FROM schema_version").fetchall()  # this makes the log
                self._connection.execute("PRAGMA busy_timeout = 0")
        except BaseException:
            self._connection.close()
            raise
        self._fill()
        self._thread = threading.Thread(target=self._work, name="store-log", daemon=True)
        self._thread.start()

    def written(self) -> None:
        """A batch is committed. Called by the thread that writes."""
        self._commits += 1
        size = self._size()
        if size > _MOST_LOG_BYTES:
            self._checkpoint("PASSIVE")
        elif size > LOG_BYTES or self._commits >= _COMMITS:
            self._commits = 0
            self._due.set()

    def bring_in(self) -> bool:
        """Bring in all of it, as nothing is written; cut what it has beyond its size. False: somebody is in the way.

        Called by the thread that writes.
        """
        self._commits = 0
        if self._size() <= LOG_BYTES:
            return self._checkpoint("PASSIVE")
        done = self._checkpoint("TRUNCATE")
        if done:
            self._fill()
        return done

    def close(self) -> None:
        """End the thread. What is in the log is brought in when the last connection is closed."""
        self._closing = True
        self._due.set()
        self._thread.join()
        self._connection.close()

    def _work(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            if self._closing:
                return
            self._checkpoint("PASSIVE")

    def _size(self) -> int:
        try:
            return self._file.stat().st_size
        except OSError:
            return 0

    def _fill(self) -> None:
        """Give the log its size. Without it, writes are slower: nothing else depends on it."""
        with suppress(OSError), self._file.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                os.pwrite(file.fileno(), bytes(max(0, LOG_BYTES - size)), size)
                os.fdatasync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)

    def _checkpoint(self, mode: str) -> bool:
        """Bring the log into the file, as far as readers and writers let it. Returns whether all of it is in."""
        try:
            with self._using, storage_errors(self._path):
                [(busy, pages, done)] = self._connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
        except StorageError as error:
            # Nothing is lost: the log stays. Tried again after the next writes.
            _LOG.warning("checkpoint failed", extra={"file": str(self._path), "reason": str(error)})
            return True
        return not busy and pages == done
