"""Works on a full store: jobs beside those on an empty one, questions of users and administrators, and a start.

`SETTINGS` has under ``empty`` and ``full`` the running dispatchers (port, control socket, store), and under ``queued``
the store that a start is tried with.
"""

from __future__ import annotations

import random
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.clients import Figures, Missing, quantile
from bench.filling import HOSTS, QUEUES, copied
from bench.harp_client import SETTINGS, Client, exchange
from bench.load import jobs as run_jobs
from bench.processes import free_port, program
from bench.simulation import HOST, dispatcher_on_simulated_hosts
from harp.protocol.json_text import loads
from harpcaller.api.control_client import ControlError, Daemon
from harpcaller.store.sqlite.file import FILE_NAME

__all__ = ["WORKS"]

_CLIENTS = 4
#: Jobs that a list is asked for.
_NEWEST = 100

#: What the control socket's command ``list`` is given for each list.
_LISTS: dict[str, dict[str, Any]] = {
    "list": {"all": True, "newest": _NEWEST},
    "host": {"all": True, "newest": _NEWEST, "host": HOSTS[0]},
    "queue": {"all": True, "newest": _NEWEST, "of_queue": QUEUES[0]},
}


@contextmanager
def _database(store: str) -> Iterator[sqlite3.Connection]:
    """The file of a store, to read in beside its dispatcher."""
    with closing(sqlite3.connect(f"file:{Path(store) / FILE_NAME}?mode=ro", uri=True)) as db:
        yield db


def _one(db: sqlite3.Connection, query: str) -> int:
    [(value,)] = db.execute(query).fetchall()
    return int(value)


def _size(store: str) -> int:
    """The bytes that a store takes, without its log of writes, which stays small."""
    with _database(store) as db:
        pages = _one(db, "PRAGMA page_count") - _one(db, "PRAGMA freelist_count")
        return pages * _one(db, "PRAGMA page_size")


def _ids(store: str, count: int) -> list[str]:
    """Ids of ended jobs, from anywhere in the store."""
    with _database(store) as db:
        last = _one(db, "SELECT max(seq) FROM jobs WHERE ended IS NOT NULL")
        places = [random.randint(1, last) for _ in range(2 * count + 10)]  # noqa: S311 - no secret
        found = [db.execute("SELECT id FROM jobs WHERE seq = ? AND ended IS NOT NULL", (at,)) for at in places]
        return [id_ for cursor in found for (id_,) in cursor.fetchall()][:count]


def stored_jobs(jobs: int) -> Figures:
    """The same jobs on a full store and on an empty one: half of the latter before, half after.

    Returns:
        ``rate`` and ``empty``: jobs a second; ``share``: the one divided by the other; ``bytes``: what a job takes of
        the empty store.
    """

    def run(which: str, jobs: int) -> Figures:
        return run_jobs(partial(Client, port=SETTINGS[which]["port"]), _CLIENTS, jobs)

    for which in ("empty", "full"):
        run(which, max(_CLIENTS, jobs // 10))
    before = _size(SETTINGS["empty"]["store"])
    first, filled, second = run("empty", jobs // 2), run("full", jobs), run("empty", jobs // 2)
    taken = _size(SETTINGS["empty"]["store"]) - before
    full, empty = filled["rate"], 2 / (1 / first["rate"] + 1 / second["rate"])
    return {"rate": full, "empty": empty, "share": full / empty, "bytes": taken / (first["count"] + second["count"])}


def query(kind: str, queries: int) -> Figures:
    """Ask one thing of the full store again and again, each time on a connection of its own, on an idle system.

    Returns:
        ``p50`` and ``p99``: milliseconds from connecting to the last byte of the answer.
    """
    full = SETTINGS["full"]
    port: int = full["port"]
    asks: list[Callable[[], object]]
    if kind in _LISTS:
        asks = [partial(_list, Path(full["socket"]), kind)] * (queries + 1)
    else:
        ids = _ids(full["store"], queries + 1)
        asks = [partial(_status if kind == "status" else _result, port, job) for job in ids]
    took = []
    for ask in asks:
        began = time.monotonic()
        ask()
        took.append(time.monotonic() - began)
    return {"p50": 1000 * quantile(took[1:], 0.5), "p99": 1000 * quantile(took[1:], 0.99)}


def _status(port: int, job: str) -> None:
    [answer] = exchange(port, {"get_status": job})
    if "call" not in answer:
        raise RuntimeError(f"expected a status, got {answer!r}")


def _result(port: int, job: str) -> None:
    [answer] = exchange(port, {"get_result": job, "wait": False})
    if "result" not in answer:
        raise RuntimeError(f"expected a result, got {answer!r}")


def _list(socket: Path, kind: str) -> None:
    options = _LISTS[kind]
    try:
        found = [loads(item) for item in Daemon(socket).ask("list", **options)]
    except ControlError as error:
        if any(name in str(error) for name in options):  # it does not know the option
            raise Missing(f"harpcallerd's list has no {' and '.join(list(options)[1:])} yet") from None
        raise
    hosts = {job["call"]["host"] for job in found}
    if len(found) > _NEWEST or not found or (kind == "host" and hosts != {HOSTS[0]}):
        raise RuntimeError(f"expected the newest {_NEWEST} jobs, got {len(found)} of {hosts}")


def start() -> Figures:
    """Start a dispatcher on a full store with queued jobs, which it begins to start at once.

    Returns:
        ``seconds``: until it has answered what the status of an ended job is; ``rate``: queued jobs a second from then
        until all have ended.
    """
    directory = Path(SETTINGS["directory"]) / f"start-{uuid.uuid4()}"
    directory.mkdir()
    store = directory / "jobs"
    copied(Path(SETTINGS["queued"]), store)
    [job] = _ids(str(store), 1)
    with _database(str(store)) as db:
        queued = _one(db, "SELECT count(*) FROM jobs WHERE ended IS NULL")
    port = free_port()
    dispatcher = dispatcher_on_simulated_hosts(directory, SETTINGS["simulated"], [HOST], listen=[f"127.0.0.1:{port}"])

    def answers() -> bool:
        try:
            _status(port, job)
        except ConnectionRefusedError:
            return False
        return True

    command = dispatcher.command("start", f"--config={dispatcher.config_file}")
    began = time.monotonic()
    with program(command, directory / "log", ready=answers):
        answered = time.monotonic()
        with _database(str(store)) as db:
            while _one(db, "SELECT count(*) FROM jobs WHERE ended IS NULL"):
                time.sleep(0.02)
            seconds = time.monotonic() - answered
            failed = _one(db, "SELECT count(*) FROM jobs WHERE state <> 'returned'")
    if failed:
        raise RuntimeError(f"{failed} of {queued} queued jobs did not return")
    return {"seconds": answered - began, "rate": queued / seconds}


#: What the harness can ask for.
WORKS: dict[str, Callable[..., Figures]] = {"stored_jobs": stored_jobs, "query": query, "start": start}
