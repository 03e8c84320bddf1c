"""The store's file: creation, recognition, lock, migration, connections; its SQL; SQLite's errors as `StorageError`.

The file appears complete or not at all: it is created under another name and renamed. So an existing file without
HARP's application id belongs to another program, and is not touched.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.resources import files
from pathlib import Path

from harp.protocol.json_text import Raw
from harp_daemon.stable_files import sync_directory
from harpcaller.model.jobs import State
from harpcaller.store import StorageError

_FOLDER = files(__package__)
_, *_PARTS = (_FOLDER / "queries.sql").read_text("utf-8").split("-- name: ")

QUERIES = dict(part.split("\n", 1) for part in _PARTS)  #: The statements of queries.sql by their names.
#: The migration from the previous version of the schema to each version, by number, in order.
MIGRATIONS = dict(sorted((int(file.name[:-4]), file.read_text("utf-8")) for file in (_FOLDER / "migrations").iterdir()))
MAX_INTEGER = 2**63 - 1  #: The largest integer of SQLite.
FILE_NAME = "harpcaller.sqlite"  #: The name of the file in the store's directory.
_READER_CACHE_KIB = 8192  # Of the pages of each connection that reads.
_APPLICATION_ID = b"HARP"
_APPLICATION_ID_AT = slice(68, 72)  # in SQLite's header
_LOG_FORMAT_AT, _LOG_FORMAT = 18, 2  # of a file with a write-ahead log
BUSY_TIMEOUT = 5000  #: Milliseconds to wait for another program that locks the file, such as a backup.
#: The write-ahead log is truncated to this size if it has grown beyond it. It is copied into the file after about 4 MiB
#: (see `checkpoints`) and then overwritten in place, which costs the file system less than growing a file.
LOG_BYTES = 16 * 1024 * 1024

# Without an adapter for a type, the driver looks for one in three places, for each value: 0.8 us for None or bytes. A
# job has thirteen such values. These adapters return the value, or the same one of a basic type.
sqlite3.register_adapter(type(None), dict[None, None]().get)
sqlite3.register_adapter(bytes, bytes)
sqlite3.register_adapter(Raw, bytes)
sqlite3.register_adapter(bool, int)
sqlite3.register_adapter(State, str.__str__)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Map errors of SQLite and the system to `StorageError`, which names the file and the cause."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        found = to_storage_error(error, path)
        raise found from found.__cause__


def to_storage_error(error: Exception, path: Path) -> Exception:
    """Return an error of SQLite or of the system as a `StorageError`, whose cause it is; another one unchanged."""
    if isinstance(error, (sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.IntegrityError)):
        return error  # an error of the program, not of the storage
    if isinstance(error, sqlite3.Error):
        name = getattr(error, "sqlite_errorname", None)
        found = StorageError(f"{path}: {error}" + (f" ({name})" if name else ""))
    elif isinstance(error, OSError):
        found = StorageError(f"{error.filename or path}: {error.strerror}")
    else:
        return error
    found.__cause__ = error
    return found


@contextmanager
def snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """Let several statements read the same state."""
    db.execute("BEGIN")
    try:
        yield
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def lock(directory: Path) -> int:
    """Lock the directory for this store, and create it, private to this user, if it does not exist.

    Closing the returned descriptor releases the lock. Raises `StorageError` if another store has locked it.
    """
    with storage_errors(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise StorageError(f"{directory / FILE_NAME}: another dispatcher uses it") from error
            raise
    return descriptor


def prepare(path: Path) -> int:
    """Create the file, or check that it is HARP's, make it private and migrate it to the newest schema.

    Returns the number of queued jobs if the file is a copy, for example a restored backup; jobs that ran after the
    copy will run again. The caller has locked the directory. Raises `StorageError`; a file that is not HARP's, or has a
    newer schema, is not changed.
    """
    with storage_errors(path):
        if not path.exists() or path.stat().st_size == 0:
            _create(path)
            return 0
        # Read before SQLite opens the file, because closing a descriptor releases all locks of the process on its file.
        header = _read_header(path)
        if not _is_store(header):
            raise StorageError(f"{path}: not a store of harpcallerd; move it away, or choose another stream_directory")
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            [(version,)] = connection.execute("SELECT max(version) FROM schema_version").fetchall()
        newest = max(MIGRATIONS)
        if version > newest:
            raise StorageError(
                f"{path}: schema version {version} is newer than {newest}, the newest that this harpcallerd supports; "
                "use the newer harpcallerd, or restore a backup"
            )
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        with closing(connect(path)) as connection:
            _migrate(connection, version)
            [(queued,)] = connection.execute(QUERIES["count_queued"]).fetchall()
        return 0 if header[_LOG_FORMAT_AT] == _LOG_FORMAT else int(queued)


def is_copy(path: Path) -> bool:
    """Return whether a file is a copy of a store made by SQLite: its write-ahead log is disabled."""
    header = _read_header(path)
    return _is_store(header) and header[_LOG_FORMAT_AT] != _LOG_FORMAT


def _read_header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_APPLICATION_ID_AT.stop)


def _is_store(header: bytes) -> bool:
    return header.startswith(b"SQLite format 3\0") and header[_APPLICATION_ID_AT] == _APPLICATION_ID


def connect(path: Path, *, query_only: bool = False) -> sqlite3.Connection:
    """Return a new connection in autocommit mode, for use by one thread at a time."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        connection.execute("PRAGMA foreign_keys = ON")
        # Some builds overwrite deleted data, which would make pruning as costly as writing the data again.
        connection.execute("PRAGMA secure_delete = OFF")
        connection.execute(f"PRAGMA query_only = {query_only:d}")
        if query_only:  # a search reads rows of many pages
            connection.execute(f"PRAGMA cache_size = -{_READER_CACHE_KIB}")
    except BaseException:
        connection.close()
        raise
    return connection


def _create(path: Path) -> None:
    new_path = path.with_name(path.name + ".new")
    for stale in (new_path, *_side_files(new_path), *_side_files(path)):
        stale.unlink(missing_ok=True)
    new_path.touch(0o600, exist_ok=False)  # SQLite gives its side files the same mode
    with closing(connect(new_path)) as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute(f"PRAGMA application_id = {int.from_bytes(_APPLICATION_ID, 'big')}")
        _migrate(connection, 0)
    new_path.rename(path)
    sync_directory(path.parent)


def _side_files(path: Path) -> tuple[Path, ...]:
    return tuple(path.with_name(path.name + suffix) for suffix in ("-journal", "-wal", "-shm"))


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    """Migrate the schema from this version to the newest, each step in a separate transaction, and enable the log.

    The log is disabled in a file that was restored from a copy made by SQLite. A missing identity is created here, not
    by the migration that creates its table, so that an interrupted migration is completed.
    """
    for number, statements in MIGRATIONS.items():
        if number <= version:
            continue
        connection.executescript(  # closing the connection rolls back a failed migration
            "BEGIN IMMEDIATE;\n"
            "CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY);\n"
            f"{statements}\n"
            f"INSERT INTO schema_version VALUES ({number});\n"
            "COMMIT;"
        )
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    if not connection.execute(QUERIES["get_identity"]).fetchall():
        identity = {"owner": secrets.token_hex(16), "key": secrets.token_bytes(32)}
        connection.execute(QUERIES["add_identity"], identity)
