"""Cancel races start and finish, two thousand times: no job starts after a confirmed cancel.

The dispatcher and its SQLite file are real; harpd is a TLS server here that records when it reads a request. Server and
clients share one loop and one clock, so that the order of "read a request" and "read the cancel's reply" is known.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from support.certificates import server_files
from support.harpcallerd import Harpcallerd

#: How many jobs race, by whether the host runs resumable calls.
JOBS = {True: 1_300, False: 700}
AT_ONCE = 32
LEAST_SHARE = 0.05
#: Maximum seconds that the recording harpd waits before its result.
LONGEST_CALL = 0.03


TERMS = {"instance": "w", "disconnect_timeout": 60, "result_ttl": 60, "kill_grace": 1, "elapsed": 0, "records": 0}


class RecordingHarpd:
    """A TLS server that speaks harpd's protocol and records the time at which each job's request was read.

    Args:
        clock: yields the times.
        chance: decides how long calls take.
        resumable: whether it runs resumable calls.
    """

    def __init__(self, clock: itertools.count[int], chance: random.Random, resumable: bool) -> None:
        self._clock = clock
        self._chance = chance
        self._resumable = resumable
        self.started: dict[int, int] = {}
        self.reading: dict[int, asyncio.Event] = {}

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one call."""
        try:
            request = json.loads(await reader.readline())
            if "calls" in request:
                error = {"type": "no_such_procedure", "message": "-"}
                answer = {"calls": [], "instance": "w"} if self._resumable else {"error": error}
                writer.write(json.dumps({"harp": 1, **answer}).encode() + b"\n")
                return
            (number,) = request["arguments"]
            assert number not in self.started, f"job {number} was started twice"
            self.started[number] = next(self._clock)
            self.reading[number].set()
            if self._resumable:
                await self._keep(reader, writer)
                return
            writer.write(b'{"harp":1,"stream_result":false}\n')
            closed = asyncio.ensure_future(reader.read())
            done, _ = await asyncio.wait({closed}, timeout=self._chance.uniform(0, LONGEST_CALL))
            closed.cancel()
            if not done:
                writer.write(b'{"result":null}\n')
        except (ConnectionError, ValueError):
            pass  # cancelled before the request was written
        finally:
            writer.close()

    async def _keep(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Continue until the end is stored; a stop ends the call immediately."""
        writer.write(json.dumps({"harp": 1, "stream_result": False, "call": TERMS}).encode() + b"\n")
        closing = b'{"exit_info":{}}\n{"result":null}\n'
        try:
            async with asyncio.timeout(self._chance.uniform(0, LONGEST_CALL)):
                while "stop" not in json.loads(await reader.readline()):
                    pass
            closing = b'{"exit_info":{}}\n{"harp":1,"error":{"type":"cancelled","message":"stopped"}}\n'
        except TimeoutError:
            pass
        writer.write(closing)
        while "release" not in json.loads(await reader.readline()):
            pass


@asynccontextmanager
async def recording_harpd(directory: Path, harpd: RecordingHarpd) -> AsyncIterator[int]:
    files = server_files(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certfile, files.keyfile)
    server = await asyncio.start_server(harpd.answer, "127.0.0.1", 0, ssl=context, backlog=512)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def ask(port: int, request: dict[str, Any]) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(json.dumps({"harpcaller": 1, **request}).encode() + b"\n")
        reply: dict[str, Any] = json.loads(await reader.readline())
        return reply
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("resumable", [True, False], ids=["resumable", "bound"])
async def test_confirmed_cancel_starts_no_call_afterwards(tmp_path: Path, resumable: bool) -> None:
    jobs = JOBS[resumable]
    chance = random.Random(20261123)
    clock = itertools.count()
    harpd = RecordingHarpd(clock, chance, resumable)
    outcomes: Counter[str] = Counter()
    slots = asyncio.Semaphore(AT_ONCE)

    async def race(port: int, number: int) -> None:
        async with slots:
            harpd.reading[number] = asyncio.Event()
            # Half of the jobs wait in a queue, where a cancel meets a claim; the others start immediately.
            queue = {"name": {"lane": number % 8}, "concurrency": 2} if number % 2 else None
            call = {"host": "h", "procedure": "p", "arguments": [number], "queue": queue}
            job = (await ask(port, call))["job_id"]
            match chance.randrange(4):
                case 0:  # immediately: usually before the start
                    pass
                case 1:  # at the very start
                    await harpd.reading[number].wait()
                case 2:  # somewhere between start and end
                    await harpd.reading[number].wait()
                    await asyncio.sleep(chance.uniform(0, 2 * LONGEST_CALL))
                case 3:  # at any time
                    await asyncio.sleep(chance.uniform(0, LONGEST_CALL))
            cancelled = (await ask(port, {"cancel": job}))["cancelled"]
            confirmed = next(clock)
            end = await ask(port, {"get_result": job, "wait": True})
            assert end == ({"cancelled": True} if cancelled else {"result": None})
            started = harpd.started.get(number)
            if cancelled:
                assert started is None or started < confirmed
            outcomes["finished" if not cancelled else "stopped" if started is not None else "never started"] += 1
            if cancelled and started is None:
                unstarted[number] = confirmed

    unstarted: dict[int, int] = {}
    async with recording_harpd(tmp_path, harpd) as harpd_port:
        with Harpcallerd(tmp_path, hosts={"h": harpd_port}) as dispatcher:
            async with asyncio.TaskGroup() as races:
                for number in range(jobs):
                    races.create_task(race(dispatcher.port, number))
    # Both sides have ended, so all sent data has arrived.
    assert not unstarted.keys() & harpd.started.keys()
    assert sum(outcomes.values()) == jobs
    for outcome in ("never started", "stopped", "finished"):
        assert outcomes[outcome] >= LEAST_SHARE * jobs, outcomes
