"""A store with a million jobs, in minutes: some jobs that really ran, and copies of their rows.

`TEMPLATES` jobs are submitted to a real dispatcher, and a real harpd runs them. Then, with both ended, SQLite copies
their rows, table by table: all columns as they are but for the place in the order, the id, and the times. So a copy's
rows have the shape that the dispatcher gives them, whatever the schema is; a test holds both against each other.

A store is kept from run to run. It appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import harp
from harpcaller.store.sqlite.file import FILE_NAME
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd

__all__ = ["HOSTS", "QUEUES", "RECORDS", "TEMPLATES", "full_store", "queued_store"]

#: Jobs that really ran. They are spread over the hosts and queues.
TEMPLATES = 50
#: Records of each.
RECORDS = 10
HOSTS = tuple(f"stored{number:02}" for number in range(20))
#: Every other job has one of these.
QUEUES = tuple({"service": number} for number in range(5))

#: Copies of all templates in a statement.
_COPIES = 500
#: Seconds before now in which the jobs ran: they are not yet to be pruned.
_SPAN = 20 * 86_400.0

#: As `harpcaller.model.ids` makes them, of a job's time in the statement below.
_ID = "printf('%s-%s-7%s-%s-%s', substr({0}, 1, 8), substr({0}, 9, 4), {1}, {2}, {3})".format(
    "printf('%012x', CAST({submitted} * 1000 AS INTEGER))",
    "printf('%03x', CAST({submitted} * 4096000 AS INTEGER) & 4095)",
    "printf('%04x', 32768 | (random() & 16383))",
    "lower(hex(randomblob(6)))",
)


def full_store(shared: Path, procedures: str, jobs: int) -> Path:
    """The directory of a store with so many ended jobs, each with `RECORDS` records; made if it is not there.

    Args:
        shared: where it is, or is to be.
        procedures: the procedures file.
        jobs: how many; at least `TEMPLATES`, and a multiple of it.
    """
    with _made(shared / f"full-{jobs}") as making:
        if making is not None:
            with Harpd(making / "harpd", procedures) as harpd:
                _run_templates(making, harpd)
            multiply(making / "jobs" / FILE_NAME, jobs // TEMPLATES)
    return shared / f"full-{jobs}" / "jobs"


def queued_store(shared: Path, full: Path, host: str, queued: int) -> Path:
    """The directory of such a store with jobs on top that wait: submitted for this host, and none was started.

    Args:
        shared: where it is, or is to be.
        full: the store to copy.
        host: the host that the jobs are for.
        queued: how many.
    """
    with _made(shared / f"queued-{full.parent.name}-{queued}") as making:
        if making is not None:
            copied(full, making / "jobs")
            # While the script that lists the hosts runs for the first time, jobs wait.
            script = making / "hosts-script"
            script.write_text("#!/bin/sh\nexec sleep 1000000\n")
            script.chmod(0o755)
            settings = {"hosts_file": None, "host_db_script": str(script), "log_level": "info"}
            with Harpcallerd(making, settings=settings) as dispatcher:
                rpc = harp.HarpCaller("127.0.0.1", dispatcher.port)
                for number in range(queued):
                    rpc.host(host).echo(number)
    return shared / f"queued-{full.parent.name}-{queued}" / "jobs"


def copied(store: Path, directory: Path) -> None:
    """Copy a store that no dispatcher uses; the copy is on the disk when this returns."""
    directory.mkdir(mode=0o700)
    shutil.copyfile(store / FILE_NAME, directory / FILE_NAME)
    with (directory / FILE_NAME).open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _made(directory: Path) -> Iterator[Path | None]:
    """A directory to fill, which takes its name once it is filled; None: it is there."""
    if directory.exists():
        yield None
        return
    making = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    yield making
    making.rename(directory)


def _run_templates(directory: Path, harpd: Harpd) -> None:
    settings = {"ca_file": str(harpd.ca_file), "log_level": "info"}
    hosts = dict.fromkeys(HOSTS, harpd.port)
    with Harpcallerd(directory, hosts, (harpd.user, harpd.password), settings) as dispatcher:
        rpc = harp.HarpCaller("127.0.0.1", dispatcher.port)
        jobs = []
        for number in range(TEMPLATES):
            queue = QUEUES[number // 2 % len(QUEUES)] if number % 2 else None
            jobs.append(rpc.host(HOSTS[number % len(HOSTS)], queue=queue).count(RECORDS))
        for job in jobs:
            job.get()


def multiply(file: Path, times: int) -> None:
    """Have each of the jobs of a store so many times: of each, all rows but its place, its id and its times are equal.

    Args:
        file: the store's file, which no dispatcher uses. Its jobs have ended, and are the first that it has had.
        times: how many of each there are then, with itself.
    """
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        # If this is cut short the file is made again.
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = OFF", "synchronous = OFF", "cache_size = -500000"):
            db.execute(f"PRAGMA {pragma}").fetchall()
        [(templates, first, last)] = db.execute("SELECT count(*), min(seq), max(seq) FROM jobs").fetchall()
        if not first == 1 <= last == templates:
            raise ValueError(f"{file}: expected jobs at the places from 1 on, without a gap")
        step = _SPAN / times
        db.execute(
            "UPDATE jobs SET submitted = submitted - :span, started = started - :span, ended = ended - :span",
            {"span": _SPAN},
        )
        db.execute("CREATE TEMP TABLE copies (number INTEGER PRIMARY KEY)")
        tables = _tables(db)
        for begin in range(1, times, _COPIES):
            db.execute("BEGIN")
            db.execute("DELETE FROM copies")
            numbers = ((number,) for number in range(begin, min(begin + _COPIES, times)))
            db.executemany("INSERT INTO copies VALUES (?)", numbers)
            for table, key, columns in tables:
                moments = {time: f"(t.{time} + {step} * copies.number)" for time in ("submitted", "started", "ended")}
                place = f"t.{key} + {templates} * copies.number"
                replaced = {key: place, "id": _ID.format(**moments), **moments}
                values = ", ".join(replaced.get(column, f"t.{column}") for column in columns)
                db.execute(
                    f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values} "  # noqa: S608 - names of the schema
                    f"FROM copies CROSS JOIN {table} AS t WHERE t.{key} <= {templates} ORDER BY copies.number, t.{key}"
                )
            db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = WAL").fetchall()
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tables(db: sqlite3.Connection) -> list[tuple[str, str, list[str]]]:
    """The tables that have rows of a job, the jobs first: name, the column that is the job's place, all columns."""
    found = []
    for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall():
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})").fetchall()]
        key = "seq" if table == "jobs" else "job"
        if key in columns:
            found.append((table, key, columns))
    return sorted(found, key=lambda one: one[0] != "jobs")
