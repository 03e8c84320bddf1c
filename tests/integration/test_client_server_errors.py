"""Internal errors of the dispatcher: the client gets an error, the log has the traceback."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from harpcaller.access.identities import Identities
from harpcaller.api.client_server import ClientServer
from harpcaller.config import Address
from harpcaller.listening import listen
from harpcaller.store.sqlite import Store, open_store
from support.dispatcher import host_line, running
from support.scripted import scripted_harpd

UNKNOWN = "00000000-0000-4000-8000-000000000000"
INTERNAL_ERROR = [{"error": {"type": "internal_error", "message": "internal error of the dispatcher; see its log"}}]


async def _fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a fault with a secret")


class Faulty:
    """A real store with a failing verb.

    Args:
        store: the store.
        verb: the one that fails.
        sound: how often it does not fail at first.
    """

    def __init__(self, store: Store, verb: str, sound: int) -> None:
        self._store = store
        self._verb = verb
        self._sound = sound

    def __getattr__(self, name: str) -> Any:
        if name == self._verb:
            self._sound -= 1
            if self._sound < 0:
                return _fail
        return getattr(self._store, name)


@asynccontextmanager
async def service(directory: Path, verb: str, sound: int = 0, *hosts: str) -> AsyncIterator[int]:
    """Serve the client API of a dispatcher with a failing store; yield its port."""
    store = await open_store(directory / "store")
    try:
        faulty: Any = Faulty(store, verb, sound)
        async with running(directory, *hosts, store=faulty, listen=(Address("127.0.0.1", 0),)) as dispatcher:
            async with aclosing(ClientServer(dispatcher, Identities(dispatcher.config))) as server:
                (listener,) = listeners = listen(dispatcher.config, "listen", dispatcher.config.listen)
                server.serve(listeners)
                yield int(listener.fields["port"])
    finally:
        await store.close()


async def ask(port: int, **request: Any) -> list[Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(json.dumps({"harpcaller": 1, **request}).encode() + b"\n")
    replies = await reader.read()
    writer.close()
    await writer.wait_closed()
    return [json.loads(line) for line in replies.splitlines()]


@pytest.mark.parametrize("kind", ["get_result", "get_status", "follow_stream", "read_stream"])
async def test_internal_error_hides_its_details(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    async with service(tmp_path, "get_job") as port:
        assert await ask(port, **{kind: UNKNOWN}) == INTERNAL_ERROR
        assert await ask(port, cancel=UNKNOWN) == [{"cancelled": False}]  # the server continues
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.getMessage() == "request failed: internal error"
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "a fault with a secret"


async def test_internal_error_in_a_stream_ends_it(tmp_path: Path) -> None:
    record = "x" * 200_000
    with scripted_harpd(tmp_path) as peer:
        async with service(tmp_path, "read_records", 1, host_line(peer.port)) as port:
            call = {"host": "web01", "procedure": "repeat", "arguments": [3, record]}
            (accepted,) = await ask(port, **call)
            assert await ask(port, get_result=accepted["job_id"]) == [{"result": None}]
            *packets, end = await ask(port, read_stream=accepted["job_id"])
    assert 0 < len(packets) < 3
    assert packets == [{"packet": number, "data": record} for number in range(len(packets))]
    assert [end] == INTERNAL_ERROR
