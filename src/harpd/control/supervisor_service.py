"""The service `harpd supervisor`: launches the supervisor, independently of the frontend.

SIGTERM ends all calls. SIGHUP replaces the supervisor by a new one, with the code and the configuration of now; the old
one retires. SIGUSR1 ends only this program: supervisors continue, and retire when the service starts again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harp_daemon.settings import ConfigError, report_restart_needed
from harpd.config.loaded import (
    CommandLine,
    SupervisorConfig,
    configure_log,
    load_supervisor_config,
    supervisor_settings,
)
from harpd.control.launcher import STOP_MARGIN, SupervisorLauncher
from harpd.control.lifecycle import ServiceRunner
from harpd.control.runtime_directory import runtime_directory
from harpd.control.supervisor_client import SupervisorClient

log = logging.getLogger("harpd.control")


async def run(options: CommandLine, config: SupervisorConfig, on_serving: Callable[[], None]) -> None:
    """Run the service until SIGTERM, SIGINT or SIGUSR1.

    Args:
        options: the command line.
        config: the loaded configuration; it has a runtime directory.
        on_serving: called when a supervisor is active.

    Raises:
        ConfigError: the runtime directory cannot be used.
        SupervisorError: the supervisor did not start; its log gives the reason.
    """
    runner = ServiceRunner()
    configured = config.configuration.runtime_directory
    with (
        runtime_directory(configured, options.config, "launcher") as directory,
        SupervisorClient(directory) as client,
    ):
        service = SupervisorService(options, config, directory, client)

        def detach() -> None:
            service.detaching = True
            runner.stop_requested.set()

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, detach)
        await runner.run(service, on_serving)


class SupervisorService:
    """The running service. Implements `harpd.control.lifecycle.Service`.

    Args:
        options: the command line.
        config: the configuration of the first supervisor.
        directory: the runtime directory.
        client: the client of the runtime directory.
    """

    def __init__(
        self, options: CommandLine, config: SupervisorConfig, directory: Path, client: SupervisorClient
    ) -> None:
        self._options = options
        self._config = config
        self._directory = directory
        self._launcher = SupervisorLauncher(client, options.daemon, self._settings)
        #: Whether `stop` leaves the supervisors running.
        self.detaching = False

    def _settings(self) -> dict[str, Any]:
        """Return the settings for the next supervisor, from the files; if they are invalid, from the last valid ones.

        The files are read each time, because a reload of the frontend changes the settings of the running supervisor.
        """
        try:
            self._config = load_supervisor_config(self._options)
        except ConfigError as error:
            log.error("invalid configuration; using the previous one", extra={"reason": str(error)})
        return supervisor_settings(self._options, self._config, self._directory, outlive=True)

    async def start(self) -> None:
        """Start the first supervisor. Raises `SupervisorError`."""
        await self._launcher.start()
        log.info("supervisor is serving")

    async def reload(self) -> None:
        """Replace the supervisor by a new one. Raises `ConfigError` and `SupervisorError`."""
        old, new = self._config, load_supervisor_config(self._options)
        try:
            configure_log(self._options, new)
            await self._launcher.start()
        except BaseException:
            configure_log(self._options, old)
            raise
        log.info("reloaded")
        report_restart_needed(old.configuration, new.configuration, ["runtime_directory"])

    async def stop(self) -> None:
        """Stop the supervisors and all calls, which end with ``shutdown``; leave both running after SIGUSR1."""
        if self.detaching:
            await self._launcher.detach()
        else:
            await self._launcher.stop(2 * self._config.configuration.limits.kill_grace + STOP_MARGIN)
