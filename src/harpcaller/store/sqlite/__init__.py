"""The embedded store: one SQLite file, one thread that writes, a few that read.

- `file` creates, recognizes, locks and migrates the file, and maps the errors of SQLite.
- `writer` is the thread that writes: everything that arrives during a commit goes into the next one.
- `writes`, `pruning` and `reads` are the verbs on a connection; their SQL is in ``queries.sql``.
- `active` holds the lanes and slots of the active jobs in memory, so that writes read nothing back.
- `rows` converts jobs, metadata and records to columns and back.
- `backend` combines these and the threads that read into a `harpcaller.store.Store`.
"""

from harpcaller.store.sqlite.backend import SQLiteStore, open_store
from harpcaller.store.sqlite.file import FILE_NAME

__all__ = ["FILE_NAME", "SQLiteStore", "open_store"]
