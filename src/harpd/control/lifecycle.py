"""Runs a service of harpd from its start to its stop: signals, reloads, notification of the service manager."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import NoReturn, Protocol

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
        self._reload_requested = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop_requested.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_requested.set)

    async def run(self, service: Service, on_serving: Callable[[], None]) -> None:
        """Run the service.

        Args:
            service: the service.
            on_serving: called when the service serves.

        Raises:
            Exception: the start raised it.
        """
        serving = asyncio.create_task(self._serve(service, on_serving))
        stopping = asyncio.create_task(self.stop_requested.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            log.info("harpd stops")
            notify_service_manager("STOPPING=1")
        finally:
            serving.cancel()
            stopping.cancel()
            await asyncio.gather(serving, stopping, return_exceptions=True)
            await service.stop()
            # Closing the loop restores the default actions: a second signal would change the exit status.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

    async def _serve(self, service: Service, on_serving: Callable[[], None]) -> NoReturn:
        """Start the service; then reload it at each request. Requests during the start or a reload cause one reload."""
        await service.start()
        on_serving()
        notify_service_manager("READY=1")
        while True:
            await self._reload_requested.wait()
            self._reload_requested.clear()
            try:
                await service.reload()
            except (ConfigError, SupervisorError) as error:
                log.error("reload failed; nothing is changed", extra={"reason": str(error)})
            except Exception:
                log.exception("reload failed; nothing is changed")
