"""Responses of the HTTP API that go on: jobs that stream, and the lines and events of a response."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from support.daemonlog import DEADLINE
from support.dispatcher import call
from support.http_api import RunningAPI
from support.peers import Peer, PeerConnection
from support.scripted import connection_of


async def submit(api: RunningAPI, procedure: str, *arguments: Any) -> str:
    return await api.dispatcher.submit(call(procedure, arguments=arguments), "test")


async def ended(api: RunningAPI, procedure: str, *arguments: Any) -> str:
    """Submit a call and wait for its end."""
    job = await submit(api, procedure, *arguments)
    async with asyncio.timeout(DEADLINE):
        await api.dispatcher.result(job)
    return job


async def feeding(api: RunningAPI, peer: Peer, *records: Any) -> tuple[str, PeerConnection]:
    """Start a job that streams these records, and later what its connection replies."""
    job = await submit(api, "feed", *records)
    async with asyncio.timeout(DEADLINE):
        while (await api.dispatcher.get_job(job)).records < len(records):
            await asyncio.sleep(0.01)
    return job, connection_of(peer, *records)


class Response:
    """A response that goes on: its lines, as they come."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def line(self) -> str:
        async with asyncio.timeout(DEADLINE):
            return await anext(self._lines)

    async def message(self) -> Any:
        """Return the next JSON line that is not a heartbeat."""
        while not (line := await self.line()):
            pass
        return json.loads(line)

    async def event(self) -> dict[str, str]:
        """Return the fields of the next event."""
        fields: dict[str, str] = {}
        while True:
            line = await self.line()
            if not line and "data" in fields:
                return fields
            if line and not line.startswith(":"):
                key, _, value = line.partition(": ")
                fields[key] = value

    async def rest(self) -> list[str]:
        async with asyncio.timeout(DEADLINE):
            return [line async for line in self._lines]


@asynccontextmanager
async def opened(api: RunningAPI, path: str, **headers: str) -> AsyncIterator[Response]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with api.client.stream("GET", path, headers=named) as response:
        assert response.status_code == 200, await response.aread()
        yield Response(response)
