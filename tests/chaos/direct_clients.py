"""The clients of direct calls: they call the hosts without a dispatcher, while the processes there are killed."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import harp
from chaos.marks import now
from chaos.observations import DirectCall, End, Observations
from chaos.system import HOSTS, System
from harp import aio
from support.harpd import Harpd

#: Number of clients, and the maximum seconds between two calls of one.
_CLIENTS, _PAUSE = 6, 0.6
#: Seconds for a call; none takes so long.
_DEADLINE = 60.0
#: Seconds until a client calls again after it could not connect.
_RETRY_DELAY = 0.3


class DirectClients:
    """All clients of direct calls.

    Args:
        system: the system.
        observations: receives the calls.
        seed: for random choices.
    """

    def __init__(self, system: System, observations: Observations, seed: int) -> None:
        self._system = system
        self._observations = observations
        self._seed = seed
        self._over = False
        self._numbers = 0

    def stop(self) -> None:
        """Make no further calls."""
        self._over = True

    async def run(self) -> None:
        """Make calls until `stop`; return when all have ended."""
        async with asyncio.TaskGroup() as group:
            for number in range(_CLIENTS):
                group.create_task(self._run_one(number, random.Random(f"{self._seed}/direct/{number}")))

    async def _run_one(self, number: int, rng: random.Random) -> None:
        host = self._system.hosts[HOSTS[number % len(HOSTS)]]
        keep_alive = bool(number // len(HOSTS) % 2)
        server = aio.AsyncHarpServer(
            "127.0.0.1",
            Harpd.user,
            Harpd.password,
            port=host.port,
            ca_file=str(host.ca_file),
            keep_alive=keep_alive,
        )
        while not self._over:
            self._numbers += 1
            call = DirectCall(f"d{self._numbers:06}", host.name)
            self._observations.direct_calls[call.token] = call
            try:
                async with asyncio.timeout(_DEADLINE):
                    call.end = await self._call(server, call, rng)
            except harp.CommunicationError as error:
                call.end = End("broken", str(error))
                await asyncio.sleep(_RETRY_DELAY)
            except harp.RemoteException as error:
                call.end = End("raised", error.type)
            except harp.RemoteError as error:
                call.end = End("failed", error.type)
            except TimeoutError:
                self._observations.add_violation(2, call.token, f"a direct call took more than {_DEADLINE:g} s")
            call.ended = now()
            await asyncio.sleep(rng.uniform(0, _PAUSE))

    @staticmethod
    async def _call(server: aio.AsyncHarpServer, call: DirectCall, rng: random.Random) -> End:
        kind = rng.choice(("work", "work", "share", "share", "stream", "fail"))
        seconds = rng.choice((0.0, 0.0, rng.uniform(0, 0.5)))
        if kind != "stream":
            return End("returned", await getattr(server, kind)(call.token, seconds))
        call.record_size = rng.randrange(400)
        value: Any = None
        async for item in await server.stream(call.token, rng.randrange(40), call.record_size, seconds / 10):
            if isinstance(item, harp.Result):
                value = item.value
            else:
                call.on_record(item)
        return End("returned", value)
