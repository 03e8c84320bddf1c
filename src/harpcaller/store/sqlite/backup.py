"""Backup and restore of the store's file, by another program than the dispatcher.

A backup is a copy in which SQLite's write-ahead log is disabled. This distinguishes it from a store in use, and the
next start recognizes a restored store (`file.prepare`).
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from harpcaller.store import StorageError
from harpcaller.store.sqlite.file import FILE_NAME, QUERIES, connect, is_copy, lock, prepare, storage_errors
from harpcaller.store.sqlite.writes import insert_staged_jobs


def back_up(store: Path, target: Path) -> None:
    """Copy a consistent snapshot of a store's file, while a dispatcher may be using it.

    The target appears complete or not at all; only this user can read it. It replaces an earlier backup. Raises
    `StorageError`, also if the target exists and is not a backup.
    """
    partial = target.with_name(target.name + ".partial")
    with storage_errors(target):
        if not target.parent.is_dir():
            raise StorageError(f"{target}: its directory does not exist; make it, or choose another file")
        if target.exists() and not is_copy(target):
            raise StorageError(f"{target}: exists, and is not a backup; choose another file")
        partial.unlink(missing_ok=True)
        partial.touch(0o600, exist_ok=False)
        try:
            with closing(sqlite3.connect(f"{store.absolute().as_uri()}?mode=ro", uri=True)) as source:
                with closing(sqlite3.connect(partial)) as copy:
                    source.backup(copy)  # in one step: otherwise each commit of the dispatcher restarts it
                    copy.execute("PRAGMA journal_mode = DELETE").fetchall()
            _sync(partial)
            partial.rename(target)
            _sync(target.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def restore(backup: Path, directory: Path, queued: str | None, now: float) -> int:
    """Copy a backup to a directory without a store; return the number of jobs that are queued in it.

    `queued` is ``cancel`` or ``run``, for the queued jobs: those that ran after the backup would run again. The owner
    of the directory will own the file. Raises `StorageError`, also if jobs are queued and `queued` is None, if the
    directory has a store, or if a dispatcher uses it.
    """
    path = directory / FILE_NAME
    new_path = path.with_name(path.name + ".new")
    with storage_errors(backup):
        if not is_copy(backup):
            raise StorageError(f"{backup}: not a backup of a store")
        descriptor = lock(directory)
        try:
            for existing in (path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))):
                if existing.exists():
                    raise StorageError(f"{existing}: exists; move it away")
            new_path.unlink(missing_ok=True)
            new_path.touch(0o600)
            try:
                shutil.copyfile(backup, new_path)
                prepare(new_path)
                jobs = _handle_queued(backup, new_path, queued, now)
                owner = os.fstat(descriptor)
                os.chown(new_path, owner.st_uid, owner.st_gid)
                _sync(new_path)
                new_path.rename(path)
                os.fsync(descriptor)
            except BaseException:
                for file in directory.glob(f"{new_path.name}*"):
                    file.unlink()
                raise
        finally:
            os.close(descriptor)
    return jobs


def _handle_queued(backup: Path, path: Path, queued: str | None, now: float) -> int:
    with closing(connect(path)) as db:
        insert_staged_jobs(db)
        [(jobs,)] = db.execute(QUERIES["count_queued"]).fetchall()
        if jobs and queued is None:
            raise StorageError(
                f"{backup}: {jobs} jobs are queued in it; those that ran after the backup would run again; choose "
                "--queued=cancel or --queued=run"
            )
        if jobs and queued == "cancel":
            db.execute("BEGIN IMMEDIATE")
            db.execute(QUERIES["cancel_all_queued"], {"now": now})
            db.execute(QUERIES["erase_secrets_of_ended"])
            db.execute(QUERIES["delete_empty_queues"])
            db.execute("COMMIT")
    return int(jobs)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
