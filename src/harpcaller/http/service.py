"""What the handlers of the HTTP API share."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from harp_daemon.memory_quota import MemoryQuota, Reservation
from harp_daemon.outcome import Outcome, when_done
from harp_daemon.sockets import Listener
from harpcaller.access.client import Client
from harpcaller.access.enforcement import Rates
from harpcaller.access.identities import Identities
from harpcaller.access.rules import Rate
from harpcaller.access.users import Users
from harpcaller.acting import ActingAs
from harpcaller.config import Config, HTTPSettings
from harpcaller.health import Health
from harpcaller.http.problems import Problem
from harpcaller.http.proofs import Proof
from harpcaller.http.sessions import Sessions
from harpcaller.http.streaming import Streams
from harpcaller.metrics import Metrics
from harpcaller.monitoring import Monitor
from harpcaller.shared_answers import SharedReads

T = TypeVar("T")

_CHECK_EVERY = 0.25  #: Seconds between two checks whether clients with a request in progress have lost their rights.


class HTTPService:
    """What the handlers share: the verbs of the dispatcher for a client, the settings, and the limits.

    `memory` is the quota of all bodies that are being read; the client API has the same one.
    """

    def __init__(
        self,
        acting_as: Callable[[Client], ActingAs],
        config: Callable[[], Config],
        identities: Callable[[], Identities],
        memory: MemoryQuota,
        sessions: Sessions,
        monitor: Monitor,
        health: Health,
        metrics: Metrics,
    ) -> None:
        self.acting_as = acting_as
        self.config = config
        self.identities = identities
        self.memory = memory
        self.sessions = sessions
        self.users: Users | None = None  #: Those who log in by a password; None: nobody does.
        self.monitor = monitor  #: The source of the metrics.
        self.health = health  #: The checks of readiness.
        self.metrics = metrics  #: What is counted.
        self.pages = SharedReads()  #: The pages of lists that are being read.
        self.calls: Sequence[Listener] = ()  #: The addresses of the client API.
        self.waits = 0  #: Number of requests that wait for a job.
        self._waits_of: Counter[str] = Counter()  # by principal
        self._rates = Rates()  # of requests
        #: By principal, the quota of its bodies that are being read, and their number.
        self.bodies_of: dict[str, tuple[MemoryQuota, int]] = {}
        self.stopping = asyncio.Event()  #: Set when the server closes: waits and streams end.
        self._settings = config().http or HTTPSettings()
        self.base_path = self._settings.base_path  #: It is that of the start until a restart.
        self.streams = Streams(lambda: self.settings, lambda: config().reply_memory, self.stopping)
        self._proofs: dict[object, tuple[Proof, Callable[[], object]]] = {}  # of the requests in progress
        self._check: asyncio.TimerHandle | None = None

    @property
    def settings(self) -> HTTPSettings:
        """The current section `http`; the last one, if a reload has removed it."""
        self._settings = self.config().http or self._settings
        return self._settings

    @contextmanager
    def watch(self, proof: Proof, on_void: Callable[[], object]) -> Iterator[None]:
        """Call a function once if a proof becomes void inside the context, at the latest after `_CHECK_EVERY`."""
        key = object()
        self._proofs[key] = proof, on_void
        if self._check is None:
            self._check = asyncio.get_running_loop().call_later(_CHECK_EVERY, self._check_proofs)
        try:
            yield
        finally:
            self._proofs.pop(key, None)

    def _check_proofs(self) -> None:
        self._check = None
        for key, (proof, on_void) in list(self._proofs.items()):
            if proof.find_error() is not None:
                del self._proofs[key]
                on_void()
        if self._proofs:
            self._check = asyncio.get_running_loop().call_later(_CHECK_EVERY, self._check_proofs)

    def close(self) -> None:
        """End waits and streams."""
        self.stopping.set()
        if self._check is not None:
            self._check.cancel()

    def check_rate(self, client: Client) -> None:
        """Count a request of a client. Raises `Problem` if it has sent too many in the last seconds."""
        most = self.settings.requests_per_client
        delay = self._rates.take({(client.owner, Rate(2 * most, 2)): 1}, time.monotonic())
        if delay:
            detail = f"you have sent more than {most} requests in a second; the limit is http.requests_per_client"
            raise Problem("too_many_requests", detail, retry_after=round(delay, 3))

    def check_waits(self, client: Client, seconds: float) -> None:
        """Raise `Problem` if no further request of this client may wait, and this one wants to."""
        if seconds <= 0:
            return
        settings, owner = self.settings, client.owner
        if self.waits >= settings.waits:
            raise Problem("too_many_requests", f"{self.waits} requests wait; the limit is http.waits", retry_after=1)
        if (waits := self._waits_of[owner]) >= settings.waits_per_client:
            detail = f"{waits} of your requests wait; the limit is http.waits_per_client"
            raise Problem("too_many_requests", detail, retry_after=1)

    async def wait(
        self, request: Request, client: Client, waiting: asyncio.Future[T] | Outcome[T], seconds: float
    ) -> T | None:
        """Wait for a future; return its result, or None if it is not done after some seconds.

        Raises what the future raises, and `ClientDisconnect`. The caller cancels the future, and calls `check_waits`
        before a request that has an effect.
        """
        disconnect = asyncio.ensure_future(wait_disconnected(request))
        stopping = asyncio.ensure_future(self.stopping.wait())
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        when_done(waiting, lambda _: ended.cancel())
        owner = client.owner
        self.waits += 1
        self._waits_of[owner] += 1
        request.state.waits = True
        try:
            futures: set[asyncio.Future[Any]] = {ended, disconnect, stopping}
            await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.waits -= 1
            self._waits_of[owner] -= 1
            if not self._waits_of[owner]:
                del self._waits_of[owner]
            for task in (disconnect, stopping):
                task.cancel()
        if waiting.done():
            return waiting.result()
        if disconnect.done() and not disconnect.cancelled():
            raise ClientDisconnect
        return None


class BodyReservation:
    """The memory for a body that is being read: of all clients together, and of its client.

    A client may use a quarter of `request_memory`, or the memory of one body of the greatest length.
    """

    def __init__(self, service: HTTPService, owner: str) -> None:
        self._service = service
        self._owner = owner
        self._parts: tuple[Reservation, Reservation] | None = None  # of its client, and of all; None: nothing yet

    def grow(self, size: int) -> bool:
        """Reserve more bytes; return False if there is no memory for them."""
        if self._parts is None:
            config, bodies_of = self._service.config(), self._service.bodies_of
            most = max(config.request_line, config.request_memory // 4)
            quota, number = bodies_of.get(self._owner, (MemoryQuota(most), 0))
            bodies_of[self._owner] = quota, number + 1
            self._parts = Reservation(quota), Reservation(self._service.memory)
        return all(part.grow(size) for part in self._parts)

    def release(self) -> None:
        """Release all bytes; releasing again has no effect."""
        parts, self._parts = self._parts, None
        if parts is None:
            return
        for part in parts:
            part.release()
        quota, number = self._service.bodies_of.pop(self._owner)
        if number > 1:
            self._service.bodies_of[self._owner] = quota, number - 1


async def wait_disconnected(request: Request) -> None:
    """Wait until the client has disconnected, or its response is complete. Its body is discarded."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
