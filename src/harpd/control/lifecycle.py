"""How a service of harpd runs: what signals do, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from harp_daemon.process import notify_service_manager
from harpd.config.settings import ConfigError
from harpd.control.supervisor_client import SupervisorError

log = logging.getLogger("harpd.control")


class Service(Protocol):
    """What runs."""

    async def start(self) -> None:
        """Start; return once it serves. May raise."""

    async def reload(self) -> None:
        """Read everything again; all of it takes effect, or nothing. May raise."""

    async def stop(self) -> None:
        """End, within bounds; also what did not start or has failed to."""


class Program:
    """Runs a service until SIGTERM or SIGINT; SIGHUP reloads. From its making on no signal ends the program at once."""

    def __init__(self) -> None:
        #: Set it to end the service.
        self.ending = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.ending.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)  # there is nothing to reload yet
        loop.set_exception_handler(_log_unexpected)

    async def run(self, service: Service, serving: Callable[[], None]) -> None:
        """Run the service.

        Args:
            service: the service.
            serving: called once it serves.

        Raises:
            Exception: what its start raised.
        """
        reloads = _Reloads(service.reload)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloads.ask)
        try:
            starting = asyncio.create_task(service.start())
            ending = asyncio.create_task(self.ending.wait())
            await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                serving()
                notify_service_manager("READY=1")
                reloads.allow()
                await ending
            log.info("harpd stops")
            notify_service_manager("STOPPING=1")
            await end([starting])
        finally:
            await reloads.end()
            await service.stop()
            # The loop's end brings back the signals' usual effect: a second one would now spoil the exit status.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


class _Reloads:
    """Reloads, one at a time: what is asked for during a start or a reload follows it, once.

    Args:
        reload: does it.
    """

    def __init__(self, reload: Callable[[], Awaitable[None]]) -> None:
        self._reload = reload
        self._allowed = self._asked = False
        self._running: asyncio.Task[None] | None = None

    def allow(self) -> None:
        """The start is done."""
        self._allowed = True
        self._begin()

    def ask(self) -> None:
        """Begin a reload, now or as soon as that is possible."""
        self._asked = True
        self._begin()

    def _begin(self) -> None:
        if self._allowed and self._asked and (self._running is None or self._running.done()):
            self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._asked:
            self._asked = False
            try:
                await self._reload()
            except (ConfigError, SupervisorError) as error:
                log.error("reload failed; nothing is changed", extra={"reason": str(error)})
            except Exception:
                log.exception("reload failed; nothing is changed")

    async def end(self) -> None:
        """Give up what is under way."""
        self._allowed = False
        await end([self._running])


async def end(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """Cancel what of these is not done, and wait for its end."""
    pending = [task for task in tasks if task is not None and not task.done()]
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)


def _log_unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    log.error("unexpected error", exc_info=error, extra={"where": context.get("message")})
