"""The clients: they submit jobs, follow, cancel and ask, by the real library, and note what they are told.

What cuts a client off (a dispatcher that is away) is no broken promise; it asks again. A submission is never repeated.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import harp
from chaos.census import Census
from chaos.ledger import Entry, Follower, Ledger, end_of
from chaos.orders import Order, order
from chaos.system import HOSTS, System
from harp import aio

T = TypeVar("T")

#: How many clients there are, and how many jobs they submit a second, all together, while nothing holds them up.
_CLIENTS, _RATE = 60, 12.0
#: Seconds until a client asks again that got no answer.
_AGAIN = 0.3
#: How many of a hundred jobs are cancelled, and nobody asks about until the end.
_CANCELLED, _FORGOTTEN = 14, 8
#: How many of a hundred followers use the library's synchronous half.
_SYNCHRONOUS = 40
#: What `cancel` raises when the host has not confirmed that nothing is left.
_NOT_CONFIRMED = frozenset({"stop_failed", "stop_unknown"})


class Clients:
    """All clients.

    Args:
        system: whom they ask.
        ledger: what they note.
        census: whom receipts are held against.
        seed: for what they do.
    """

    def __init__(self, system: System, ledger: Ledger, census: Census, seed: int) -> None:
        self._system = system
        self._ledger = ledger
        self._census = census
        self._seed = seed
        self._numbers = 0
        self._over = asyncio.Event()

    def stop(self) -> None:
        """Submit nothing more."""
        self._over.set()

    async def run(self) -> None:
        """Submit until `stop`, then return once all that was begun is done."""
        async with asyncio.TaskGroup() as group:
            for number in range(_CLIENTS):
                group.create_task(self._run_one(random.Random(f"{self._seed}/{number}")))

    async def _run_one(self, chance: random.Random) -> None:
        while not self._over.is_set():
            self._numbers += 1
            await self._run_job(order(chance, f"t{self._numbers:06}", HOSTS), chance)
            try:
                async with asyncio.timeout(chance.uniform(0, _CLIENTS / _RATE)):
                    await self._over.wait()
            except TimeoutError:
                pass

    async def _run_job(self, job: Order, chance: random.Random) -> None:
        entry = self._ledger.add(job)
        procedure = getattr(self._system.async_rpc.host(job.host, **job.options), job.procedure)
        try:
            call: aio.AsyncRemoteCall = await procedure(*job.arguments)
        except (harp.CommunicationError, harp.RemoteError):
            return  # it may have become a job or not; it has no id that was given out
        entry.id = call.id()
        async with asyncio.TaskGroup() as group:
            if (job.endless and not job.limits) or chance.randrange(100) < _CANCELLED:
                delay = chance.choice((0.0, chance.uniform(0, 0.5), chance.uniform(0, 5)))
                group.create_task(self._cancel(entry, call, delay, wait=chance.random() < 0.5))
            if job.records is not None:
                for _ in range(chance.choice((0, 1, 1, 2))):
                    since = chance.choice((0, 0, None, chance.randrange(job.records + 1)))
                    synchronous = chance.randrange(100) < _SYNCHRONOUS
                    delay = chance.choice((0.0, 0.0, chance.uniform(0, 4)))
                    group.create_task(self._follow(entry, since, delay, synchronous))
            if chance.randrange(100) >= _FORGOTTEN:
                end = await self._insist(lambda: self._ask(call))
                self._ledger.tell(entry, end)

    async def _ask(self, call: aio.AsyncRemoteCall) -> Any:
        return end_of(await call.result(wait=True))

    async def _insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until there is an answer."""
        while True:
            try:
                return await ask()
            except harp.CommunicationError:
                await asyncio.sleep(_AGAIN)
            except harp.RemoteError as error:
                if error.type != "storage_error":
                    raise
                await asyncio.sleep(_AGAIN)

    async def _cancel(self, entry: Entry, call: aio.AsyncRemoteCall, delay: float, wait: bool) -> None:
        await asyncio.sleep(delay)

        async def cancel() -> bool | None:
            entry.cancels += 1
            try:
                return await call.cancel(wait=wait)
            except harp.RemoteError as error:
                if error.type in _NOT_CONFIRMED:
                    return None
                raise

        said = await self._insist(cancel)
        if entry.cancels == 1:
            entry.cancelled = said
        details = await self._insist(call.details)
        while wait and details["stop"] == "pending":  # the answer was lost, and the second cancel found it ended
            await asyncio.sleep(_AGAIN)
            details = await self._insist(call.details)
        entry.stop = details["stop"]
        if entry.stop == "confirmed":
            self._check_receipt(entry)

    def _check_receipt(self, entry: Entry) -> None:
        """A stop is confirmed: so nothing of the job may live now."""
        self._ledger.receipts += 1
        self._census.look()
        if left := self._census.living(entry.order.token):
            pids = ", ".join(str(process.pid) for process in left)
            self._ledger.break_(3, entry.order.token, f"its stop was confirmed while these processes lived: {pids}")

    async def _follow(self, entry: Entry, since: int | None, delay: float, synchronous: bool) -> None:
        await asyncio.sleep(delay)
        assert entry.id is not None
        follower = Follower(entry.order, since)
        entry.followers.append(follower)
        stream: AsyncIterator[Any]
        while True:
            follower.begin()
            try:
                if synchronous:
                    stream = _threaded(self._system.rpc.job(entry.id).follow(since=follower.next, numbered=True))
                else:
                    stream = self._system.async_rpc.job(entry.id).follow(since=follower.next, numbered=True)
                async for number, value in stream:
                    follower.take(number, value)
            except (harp.CommunicationError, harp.RemoteError) as error:
                follower.broke_off(str(error))
                await asyncio.sleep(_AGAIN)
            else:
                follower.ended = True
                return


async def _threaded(items: Any) -> AsyncIterator[Any]:
    """The items of a plain iterator, which a thread takes from it."""
    loop = asyncio.get_running_loop()
    taken: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()

    def hand_over(more: bool, item: Any) -> None:
        loop.call_soon_threadsafe(taken.put_nowait, (more, item))

    def take() -> None:
        try:
            for item in items:
                hand_over(True, item)
            hand_over(False, None)
        except harp.HarpException as error:
            hand_over(False, error)
        except RuntimeError:
            pass  # the loop is closed: the run was broken off

    # A daemon: when a run is broken off, what it reads from ends with the run.
    threading.Thread(target=take, daemon=True).start()
    while True:
        more, item = await taken.get()
        if more:
            yield item
        elif item is None:
            return
        else:
            raise item
