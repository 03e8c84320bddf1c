"""The embedded store: one SQLite file, one thread that writes, some that read.

- `file` makes, recognises, locks and migrates the file, and maps what SQLite raises.
- `writer` is the thread that writes: everything that arrived while the last commit ran goes into the next.
- `readers` are the threads that read, each with a connection of its own; they never wait for the writer.
- `writes`, `pruning` and `reads` are the verbs as functions on a connection; their SQL is in ``queries.sql``.
- `rows` turns jobs, facts and records into columns and back.
- `backend` puts it together as a `harpcaller.store.Store`.
"""

from harpcaller.store.sqlite.backend import SQLiteStore, open_store
from harpcaller.store.sqlite.file import FILE_NAME

__all__ = ["FILE_NAME", "SQLiteStore", "open_store"]
