"""The steps of pruning, as functions on the writing connection. Each step is short, so that other verbs wait briefly.

Jobs are deleted first, then their records, which are orphaned until then, then the free pages of the file.
"""

from __future__ import annotations

import sqlite3

from harpcaller.store.sqlite.sql import QUERIES

# Approximate limits of one step.
_STEP_JOBS = 100
_STEP_BYTES = 8 * 1024 * 1024
_STEP_CHUNKS = 4096
_STEP_PAGES = 512


def delete_jobs(db: sqlite3.Connection, ended_before: float, limit: int) -> int:
    """Delete a few jobs that ended before a time and hold no slot, orphan their records; return how many."""
    found = {"before": ended_before, "limit": min(limit, _STEP_JOBS)}
    deleted = 0
    room = _STEP_BYTES
    for seq, size in db.execute(QUERIES["old_jobs"], found).fetchall():
        if room <= 0:
            break
        db.execute(QUERIES["orphan_records"], {"seq": seq})
        db.execute(QUERIES["delete_job"], {"seq": seq})
        room -= size
        deleted += 1
    return deleted


def delete_orphaned_records(db: sqlite3.Connection) -> bool:
    """Delete some records of deleted jobs; return whether there may be more."""
    [(seq,)] = db.execute(QUERIES["first_orphaned_records"]).fetchall()
    if seq is None:
        return False
    step = {"seq": seq, "limit": _STEP_CHUNKS}
    room = _STEP_BYTES
    for rowid, size in db.execute(QUERIES["orphaned_chunks"], step).fetchall():
        if room <= 0:
            break
        db.execute(QUERIES["delete_chunk"], {"rowid": rowid})
        room -= size
    db.execute(QUERIES["forget_orphaned_records"], {"seq": seq})
    return True


def release_free_pages(db: sqlite3.Connection) -> bool:
    """Remove some free pages from the file, which becomes shorter at the next checkpoint.

    Returns whether more pages may be free.
    """
    before = _free_pages(db)
    for _ in range(min(before, _STEP_PAGES)):
        db.execute("PRAGMA incremental_vacuum(1)")  # one page each: the driver executes only one step of this statement
    return 0 < _free_pages(db) < before


def checkpoint(db: sqlite3.Connection) -> None:
    """Copy the write-ahead log into the file, as far as other connections allow it without waiting.

    It runs on a connection that has no transaction. The next write checkpoints again if this one was incomplete.
    """
    db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


def _free_pages(db: sqlite3.Connection) -> int:
    [(pages,)] = db.execute("PRAGMA freelist_count").fetchall()
    return int(pages)
