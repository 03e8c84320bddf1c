"""The thread that copies the write-ahead log into the store's file, so that no commit waits for it.

SQLite would do so within a commit, once in about 4 MiB of the log: 10 ms and more, for which the verbs of others wait.
The thread copies while others commit. What they add meanwhile is little; the writer copies it between two transactions,
because only a log that is copied as a whole is overwritten from its start. Above `FULL_LOG_PAGES`, for example because
the thread has no processor, the commit copies the log as before, so it does not grow without limit.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing, suppress

FULL_LOG_PAGES = 2048  #: Of 4 KiB. On a full disk, the reserve has to be enough to copy them.
_LOG_BYTES = 4 * 1024 * 1024  # written since the last copy, about, when the next one begins
_VERB_BYTES = 16 * 1024  # that a verb writes beside its payload, about: some pages of tables and indexes
_PASSES = 2  # the second one copies what was added during the first one, so that less is left


class Checkpointer:
    """The thread; the writer calls the methods. It closes `connection` at its end."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        #: Held during a copy; the writer holds it while it needs the space of the reserve, which a copy would use.
        self.copying = threading.Lock()
        self._written = 0  # bytes, about
        self._is_due = threading.Event()
        self._is_copying = self._is_rest_due = self._ending = False
        self._thread = threading.Thread(target=self._run, name="store-checkpointer", daemon=True)
        self._thread.start()

    def count(self, verbs: int, payload_bytes: int) -> None:
        """Count what a transaction has written; begin to copy if it is enough."""
        self._written += payload_bytes + verbs * _VERB_BYTES
        if self._written >= _LOG_BYTES and not self._is_copying:
            self._written = 0
            self._is_copying = True
            self._is_due.set()

    def take_rest(self) -> bool:
        """Return, once after each copy, that the writer has to copy the rest."""
        is_rest_due, self._is_rest_due = self._is_rest_due, False
        return is_rest_due

    def end(self) -> None:
        """End the thread after the copy that it makes."""
        self._ending = True
        self._is_due.set()
        self._thread.join()

    def _run(self) -> None:
        with closing(self._connection):
            while True:
                self._is_due.wait()
                self._is_due.clear()
                if self._ending:
                    return
                with self.copying:
                    for _ in range(_PASSES):
                        copy_log(self._connection)
                self._is_rest_due = True
                self._is_copying = False


def copy_log(connection: sqlite3.Connection) -> None:
    """Copy the log into the file, as far as other connections allow it without waiting.

    The connection has no transaction. If it fails, for example because the disk is full, a later one copies the log.
    """
    with suppress(sqlite3.Error):
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
