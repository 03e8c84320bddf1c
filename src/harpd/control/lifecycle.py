"""How a service of harpd runs: its runtime directory, signals, reloads, notification of the service manager."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn, Protocol

from harp_daemon.process import notify_service_manager
from harp_daemon.settings import ConfigError
from harpd.config.loaded import SupervisorConfig
from harpd.control.supervisor_client import SupervisorClient, SupervisorError

log = logging.getLogger("harpd.control")


class Service(Protocol):
    """A service: the frontend or the launcher."""

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
        """Run the service; call `on_serving` when it serves. Raises the exception of a start that fails."""
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


@contextmanager
def runtime_directory(config: SupervisorConfig, *roles: str) -> Iterator[SupervisorClient]:
    """Create the directory of sockets and state files if it is missing, and lock it; yield the client for it.

    If none is configured, it is a temporary directory, which is removed at the end. `roles`: ``frontend``, ``launcher``
    or both: those of this program. Each role has a lock file.

    Raises:
        ConfigError: the directory cannot be used, or a running program has one of the roles.
    """
    configured = config.configuration.runtime_directory
    path = Path(tempfile.mkdtemp(prefix="harpd-") if configured is None else configured).absolute()
    with ExitStack() as closing:
        if configured is None:
            closing.callback(shutil.rmtree, path, ignore_errors=True)
        where = f"{config.options.config}: runtime_directory: {path}"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.stat()
            # A user who can write there can impersonate the supervisor.
            if status.st_uid not in (0, os.geteuid()):
                hint = "change the owner to the user that harpd runs as"
                raise ConfigError(f"{where}: owned by user {status.st_uid}; {hint}")
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ConfigError(f"{where}: other users can write there; run chmod go-w")
            for role in roles:
                descriptor = os.open(path / f"{role}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                closing.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{where}: used by another running harpd") from error
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}") from error
        yield closing.enter_context(SupervisorClient(path))
