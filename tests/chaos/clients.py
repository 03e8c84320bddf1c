"""The clients: they submit, follow and cancel jobs with the real library, and store the replies.

An unreachable dispatcher is not a violation; the client retries. It never repeats a submission without a request id.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import harp
from chaos.job_specs import JobSpec, random_spec
from chaos.observations import Follower, Observations, ObservedJob, end_of
from chaos.process_tracker import ProcessTracker
from chaos.system import HOSTS, System
from harp import aio

T = TypeVar("T")

#: Number of clients, and of jobs that all of them together submit per second without delays.
_CLIENTS, _RATE = 60, 12.0
#: Seconds before a client retries a request without a reply.
_RETRY_DELAY = 0.3
#: Percentage of jobs that are cancelled, and of jobs without a request for the result before the end of the run.
_CANCELLED, _NOT_AWAITED = 14, 8
#: Percentage of followers that use the synchronous client, and of submissions with a request id.
_SYNCHRONOUS = 40
#: Percentage of submissions with a request id that two clients send at the same time.
_TWICE = 30
#: Errors of `cancel` if the host has not confirmed the stop.
_NOT_CONFIRMED = frozenset({"stop_failed", "stop_unknown"})


class Clients:
    """All clients.

    Args:
        system: the system.
        observations: receives the replies.
        tracker: has the processes, to check stop reports.
        seed: for random choices.
    """

    def __init__(self, system: System, observations: Observations, tracker: ProcessTracker, seed: int) -> None:
        self._system = system
        self._observations = observations
        self._tracker = tracker
        self._seed = seed
        self._numbers = 0
        self._over = asyncio.Event()

    def stop(self) -> None:
        """Submit no further jobs."""
        self._over.set()

    async def run(self) -> None:
        """Submit jobs until `stop`; return when all requests are done."""
        async with asyncio.TaskGroup() as group:
            for number in range(_CLIENTS):
                group.create_task(self._run_one(random.Random(f"{self._seed}/{number}")))

    async def _run_one(self, rng: random.Random) -> None:
        while not self._over.is_set():
            self._numbers += 1
            await self._run_job(random_spec(rng, f"t{self._numbers:06}", HOSTS), rng)
            try:
                async with asyncio.timeout(rng.uniform(0, _CLIENTS / _RATE)):
                    await self._over.wait()
            except TimeoutError:
                pass

    async def _run_job(self, spec: JobSpec, rng: random.Random) -> None:
        job = self._observations.add(spec)
        if spec.request_id is None:
            try:
                job.id = await self._submit(job, synchronous=False)
            except harp.CommunicationError:
                return  # the job may exist or not; no id was returned
        else:
            times = 2 if rng.randrange(100) < _TWICE else 1
            kinds = [rng.randrange(100) < _SYNCHRONOUS for _ in range(times)]
            ids = await asyncio.gather(*(self._retry(partial(self._submit, job, kind)) for kind in kinds))
            job.id = ids[0]
            if len(set(ids)) > 1:
                self._observations.add_violation(8, spec.token, f"two submissions returned {' and '.join(ids)}")
        call = self._system.async_rpc.job(job.id)
        async with asyncio.TaskGroup() as group:
            if (spec.endless and not spec.limits) or rng.randrange(100) < _CANCELLED:
                delay = rng.choice((0.0, rng.uniform(0, 0.5), rng.uniform(0, 5)))
                group.create_task(self._cancel(job, call, delay, wait=rng.random() < 0.5))
            if spec.records is not None:
                for _ in range(rng.choice((0, 1, 1, 2))):
                    since = rng.choice((0, 0, None, rng.randrange(spec.records + 1)))
                    synchronous = rng.randrange(100) < _SYNCHRONOUS
                    delay = rng.choice((0.0, 0.0, rng.uniform(0, 4)))
                    group.create_task(self._follow(job, since, delay, synchronous))
            if rng.randrange(100) >= _NOT_AWAITED:
                end = await self._retry(lambda: self._ask(call))
                self._observations.record_end(job, end)

    async def _submit(self, job: ObservedJob, synchronous: bool) -> str:
        """Submit a job; return its id."""
        job.submissions += 1
        spec = job.spec
        if synchronous:
            procedure = getattr(self._system.rpc.host(spec.host, **spec.options), spec.procedure)
            [job_id] = [job_id async for job_id in _threaded(procedure(*spec.arguments).id() for _ in range(1))]
            return str(job_id)
        call = await getattr(self._system.async_rpc.host(spec.host, **spec.options), spec.procedure)(*spec.arguments)
        return str(call.id())

    async def _ask(self, call: aio.AsyncRemoteCall) -> Any:
        return end_of(await call.result(wait=True))

    async def _retry(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Repeat a request until there is a reply."""
        while True:
            try:
                return await ask()
            except harp.CommunicationError:
                await asyncio.sleep(_RETRY_DELAY)

    async def _cancel(self, job: ObservedJob, call: aio.AsyncRemoteCall, delay: float, wait: bool) -> None:
        await asyncio.sleep(delay)

        async def cancel() -> bool | None:
            job.cancels += 1
            try:
                return await call.cancel(wait=wait)
            except harp.RemoteError as error:
                if error.type in _NOT_CONFIRMED:
                    return None
                raise

        reply = await self._retry(cancel)
        if job.cancels == 1:
            job.cancelled = reply
        details = await self._retry(call.details)
        while wait and details["stop"] == "pending":  # the reply was lost, and the second cancel found the job ended
            await asyncio.sleep(_RETRY_DELAY)
            details = await self._retry(call.details)
        job.stop = details["stop"]
        if job.stop == "confirmed":
            self._check_stop_report(job)

    def _check_stop_report(self, job: ObservedJob) -> None:
        """Check that no process of a job with a confirmed stop lives."""
        self._observations.stop_reports_checked += 1
        self._tracker.update()
        if left := self._tracker.living(job.spec.token):
            pids = ", ".join(str(process.pid) for process in left)
            self._observations.add_violation(
                3, job.spec.token, f"its stop was confirmed while these processes lived: {pids}"
            )

    async def _follow(self, job: ObservedJob, since: int | None, delay: float, synchronous: bool) -> None:
        await asyncio.sleep(delay)
        assert job.id is not None
        follower = Follower(job.spec, since)
        job.followers.append(follower)
        stream: AsyncIterator[Any]
        while True:
            follower.on_connect()
            try:
                if synchronous:
                    stream = _threaded(self._system.rpc.job(job.id).follow(since=follower.next, numbered=True))
                else:
                    stream = self._system.async_rpc.job(job.id).follow(since=follower.next, numbered=True)
                async for number, value in stream:
                    follower.on_record(number, value)
            except (harp.CommunicationError, harp.RemoteError) as error:
                follower.on_interrupted(str(error))
                await asyncio.sleep(_RETRY_DELAY)
            else:
                follower.ended = True
                return


async def _threaded(items: Any) -> AsyncIterator[Any]:
    """Yield the items of a synchronous iterator, which a thread reads."""
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
            pass  # the loop is closed: the run was interrupted

    # A daemon thread: if the run is interrupted, the system that it reads from ends with the run.
    try:
        threading.Thread(target=take, daemon=True).start()
    except RuntimeError as error:  # the machine has no room for a thread at the moment
        raise harp.CommunicationError(str(error)) from error
    while True:
        more, item = await taken.get()
        if more:
            yield item
        elif item is None:
            return
        else:
            raise item
