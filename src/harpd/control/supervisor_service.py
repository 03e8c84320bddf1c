"""The service `harpd supervisor`: keeps the wardens, and with them the calls, apart from the gate.

SIGTERM ends all calls. SIGHUP puts a new warden, with what is then installed and configured, in the place of the old
one, which retires. SIGUSR1 ends this program alone: the wardens go on, and retire when it is started again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harpd.config.loaded import Options, Plan, configure_log, make_plan, warden_settings
from harpd.config.settings import ConfigError
from harpd.control.launcher import STOP_MARGIN, Keeper
from harpd.control.lifecycle import Program
from harpd.control.runtime_directory import Part, runtime_directory
from harpd.control.supervisor_client import Wardens

__all__ = ["run"]

log = logging.getLogger("harpd.control")


async def run(options: Options, plan: Plan, serving: Callable[[], None]) -> None:
    """Keep wardens until SIGTERM, SIGINT or SIGUSR1.

    Args:
        options: the command line.
        plan: what `make_plan` made of it; it has a runtime directory.
        serving: called once a warden takes calls.

    Raises:
        ConfigError: the runtime directory can't be used.
        WardenError: the warden did not start; its log says why.
    """
    program = Program()
    configured = plan.configuration.runtime_directory
    with runtime_directory(configured, options.config, Part.KEEPER) as directory, Wardens(directory) as wardens:
        calls = Calls(options, plan, directory, wardens)

        def leave() -> None:
            calls.leaving = True
            program.ending.set()

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, leave)
        await program.run(calls, serving)


class Calls:
    """The running service. A `harpd.control.lifecycle.Service`.

    Args:
        options: the command line.
        plan: what the first warden starts with.
        directory: the runtime directory.
        wardens: the way to its wardens.
    """

    def __init__(self, options: Options, plan: Plan, directory: Path, wardens: Wardens) -> None:
        self._options = options
        self._plan = plan
        self._directory = directory
        self._keeper = Keeper(wardens, options.background, self._settings)
        #: Whether the wardens go on at the end.
        self.leaving = False

    def _settings(self) -> dict[str, Any]:
        """What the next warden starts with: what the files say now, or said when they were last in order.

        The gate may have reloaded meanwhile, and have given the warden that has died what the files say now.
        """
        try:
            self._plan = make_plan(self._options)
        except ConfigError as error:
            log.error("the configuration has a fault; the last one counts", extra={"reason": str(error)})
        return warden_settings(self._options, self._plan, self._directory, outlive=True)

    async def start(self) -> None:
        """Start the first warden. Raises `WardenError`."""
        await self._keeper.start()
        log.info("harpd keeps calls")

    async def reload(self) -> None:
        """Put a new warden in the place of the old one. Raises `ConfigError` and `WardenError`."""
        old, new = self._plan, make_plan(self._options)
        try:
            configure_log(self._options, new)
            await self._keeper.start()
        except BaseException:
            configure_log(self._options, old)
            raise
        log.info("reloaded")
        if new.configuration.runtime_directory != old.configuration.runtime_directory:
            log.warning("a changed setting needs a restart", extra={"key": "runtime_directory"})

    async def stop(self) -> None:
        """End all calls with ``shutdown``, and the wardens; or leave them alone."""
        if self.leaving:
            await self._keeper.leave()
        else:
            await self._keeper.stop(2 * self._plan.configuration.limits.kill_grace + STOP_MARGIN)
