"""A dispatcher in the event loop of the test: a real store, real sockets to hosts, no API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from harp.protocol.dispatcher import Call, Continue, Queue
from harp.protocol.ends import End
from harp.protocol.json_text import Raw
from harp_daemon.audit import AuditLog
from harpcaller.audit import Audit
from harpcaller.config import Config
from harpcaller.dispatcher import Dispatcher
from harpcaller.metrics import Metrics
from harpcaller.model.jobs import Job
from harpcaller.notifier import RecordBatch
from harpcaller.store import StorageError
from harpcaller.store.sqlite import Store, open_store
from support.deadline import eventually

CREDENTIALS = {"user": "u", "password": "topsecret"}


def raw(value: Any) -> Raw:
    return Raw(json.dumps(value).encode())


def call(procedure: str = "p", host: str = "web01", arguments: Any = (), queue: Any = None, **options: Any) -> Call:
    """Return a call with raw payloads, as the client API passes it; `concurrency` belongs to the queue."""
    concurrency = options.pop("concurrency", 1)
    name = None if queue is None else Queue(raw(queue), concurrency)
    return Call(host, procedure, raw(arguments), queue=name, **options)


def host_line(port: int, hostname: str = "web01", address: str = "127.0.0.1", **more: Any) -> str:
    """Return a host's line of the registry with `CREDENTIALS`, and with further members."""
    members = {"hostname": hostname, "address": address, "port": port, "credentials": CREDENTIALS, **more}
    return json.dumps(members) + "\n"


def hosts_file(directory: Path, *lines: str) -> Path:
    file = directory / "hosts"
    file.write_text("".join(lines))
    return file


@asynccontextmanager
async def running(
    directory: Path, *lines: str, store: Any = None, metrics: Metrics | None = None, **settings: Any
) -> AsyncIterator[Dispatcher]:
    """Run a dispatcher with all files in `directory` and these lines in its hosts file; `metrics` count its changes."""
    settings.setdefault("hosts_file", hosts_file(directory, *lines))
    settings.setdefault("host_db", directory / "hosts.db")
    settings.setdefault("start_within", 0.0)  # most tests of errors need each of them once
    if not settings.keys() & {"ca_file", "known_certs_file"}:
        settings.setdefault("verify", False)
    settings.setdefault("resumable_calls", False)  # the hosts of these tests script connection-bound calls
    config = Config(stream_directory=directory / "store", **settings)
    opened = store or await open_store(config.stream_directory)
    if metrics is not None:
        metrics.stored = await opened.count_stored()
        opened.observe(metrics.observe_changes)
    audit_log = None if config.audit_file is None else AuditLog(config.audit_file)
    try:
        async with Dispatcher(config, opened, audit=Audit(audit_log), metrics=metrics) as dispatcher:
            yield dispatcher
    finally:
        if store is None:
            await opened.close()
        if audit_log is not None:
            await audit_log.close()


async def result(dispatcher: Dispatcher, **options: Any) -> End | None:
    """Submit a call and wait for its end."""
    return await dispatcher.result(await dispatcher.submit(call(**options), "test"))


async def _items(
    dispatcher: Dispatcher, job_id: str, since: int | None, recent: int | None, wait: bool
) -> AsyncGenerator[RecordBatch | End | Continue, None]:
    ready = asyncio.Event()
    stream = dispatcher.stream(job_id, since, recent, wait, ready.set)
    try:
        while True:
            ready.clear()
            item = stream.next_item()
            if item is None:
                await ready.wait()
                continue
            yield item
            if not isinstance(item, RecordBatch):
                return
    finally:
        stream.close()


def follow(
    dispatcher: Dispatcher, job_id: str, since: int | None = None, recent: int | None = None
) -> AsyncGenerator[RecordBatch | End | Continue, None]:
    """Yield the stored and the future records of a job in batches, then its end."""
    return _items(dispatcher, job_id, since, recent, wait=True)


def read(
    dispatcher: Dispatcher, job_id: str, since: int | None = None, recent: int | None = None
) -> AsyncGenerator[RecordBatch | End | Continue, None]:
    """Yield the stored records of a job in batches, then its end or `Continue`."""
    return _items(dispatcher, job_id, since, recent, wait=False)


async def followed(
    dispatcher: Dispatcher, job_id: str, since: int | None = None, recent: int | None = None
) -> tuple[list[tuple[int, Any]], End]:
    """Follow a job to its end; return the numbered, decoded records and the end."""
    records: list[tuple[int, Any]] = []
    async for item in follow(dispatcher, job_id, since, recent):
        if not isinstance(item, RecordBatch):
            assert not isinstance(item, Continue)
            return records, item
        records += decoded(item)
    raise AssertionError("no end")


def decoded(packets: RecordBatch) -> list[tuple[int, Any]]:
    """Return numbered records."""
    return list(enumerate(map(json.loads, packets.records.values), packets.first))


async def collected(
    dispatcher: Dispatcher, job_id: str, since: int | None = None, recent: int | None = None
) -> tuple[list[tuple[int, Any]], End | Continue]:
    """Read the stored records; return them and the closing item."""
    records: list[tuple[int, Any]] = []
    async for item in read(dispatcher, job_id, since, recent):
        if not isinstance(item, RecordBatch):
            return records, item
        records += decoded(item)
    raise AssertionError("no closing item")


async def until(dispatcher: Dispatcher, job_id: str, reached: Callable[[Job], bool], what: str) -> None:
    """Wait until the stored job satisfies a condition."""

    async def looked() -> bool:
        return reached(await dispatcher.get_job(job_id))

    predicate: Callable[[], bool | Awaitable[bool]] = looked
    await eventually(predicate, what=what)


class Switched:
    """A real store with a switch: while it is off, writes fail as on a full disk.

    Args:
        store: the store.
        writes: the verbs that fail.
    """

    def __init__(self, store: Store, *writes: str) -> None:
        self._store = store
        self._writes = writes
        self.off = False
        #: How often a write was refused.
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._store, name)
        if name in ("path", "find_pause"):
            return verb

        async def switched(*arguments: Any, **options: Any) -> Any:
            if self.off and name in self._writes:
                self.refused += 1
                raise StorageError("harpcaller.sqlite: database or disk is full")
            return await verb(*arguments, **options)

        return switched
