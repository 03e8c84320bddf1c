"""Runs a service of harpd from its start to its stop: signals, reloads, notification of the service manager."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from harp_daemon.process import notify_service_manager
from harp_daemon.settings import ConfigError
from harpd.control.supervisor_client import SupervisorError

log = logging.getLogger("harpd.control")


class Service(Protocol):
    """A service."""

    async def start(self) -> None:
        """Start the service; return when it serves. May raise."""

    async def reload(self) -> None:
        """Load the configuration again and apply all of it, or nothing. May raise."""

    async def stop(self) -> None:
        """Stop within a bounded time; also after a start that failed or did not finish."""


class ServiceRunner:
    """The runner of a service: SIGTERM and SIGINT stop it, SIGHUP reloads it.

    From its creation on, none of these signals kills the process.
    """

    def __init__(self) -> None:
        #: Set it to stop the service.
        self.stop_requested = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop_requested.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)  # nothing to reload yet

    async def run(self, service: Service, on_serving: Callable[[], None]) -> None:
        """Run the service.

        Args:
            service: the service.
            on_serving: called when the service serves.

        Raises:
            Exception: the start raised it.
        """
        reloads = _ReloadQueue(service.reload)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloads.request_reload)
        try:
            starting = asyncio.create_task(service.start())
            ending = asyncio.create_task(self.stop_requested.wait())
            await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                on_serving()
                notify_service_manager("READY=1")
                reloads.allow()
                await ending
            log.info("harpd stops")
            notify_service_manager("STOPPING=1")
            await _cancel_and_wait([starting])
        finally:
            await reloads.cancel()
            await service.stop()
            # Closing the loop restores the default actions: a second signal would change the exit status.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


class _ReloadQueue:
    """Runs reloads one at a time. Requests during the start or a reload cause one more reload after it.

    Args:
        reload: reloads the service.
    """

    def __init__(self, reload: Callable[[], Awaitable[None]]) -> None:
        self._reload = reload
        self._allowed = self._requested = False
        self._running: asyncio.Task[None] | None = None

    def allow(self) -> None:
        """Allow reloads, after the start."""
        self._allowed = True
        self._start_if_possible()

    def request_reload(self) -> None:
        """Request a reload, now or as soon as it is possible."""
        self._requested = True
        self._start_if_possible()

    def _start_if_possible(self) -> None:
        if self._allowed and self._requested and (self._running is None or self._running.done()):
            self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._requested:
            self._requested = False
            try:
                await self._reload()
            except (ConfigError, SupervisorError) as error:
                log.error("reload failed; nothing is changed", extra={"reason": str(error)})
            except Exception:
                log.exception("reload failed; nothing is changed")

    async def cancel(self) -> None:
        """Cancel a running reload and reject further ones."""
        self._allowed = False
        await _cancel_and_wait([self._running])


async def _cancel_and_wait(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """Cancel the tasks that are not done, and wait until they are."""
    pending = [task for task in tasks if task is not None and not task.done()]
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)
