"""The program with the frontend: the frontend itself, and the launcher unless another program has it.

If harpd runs as root and has a user for the frontend, the frontend is a process of its own, of that user
(`harpd.frontend.monitor`). Otherwise it runs in the program's process.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from harp_daemon.settings import ConfigError, report_restart_needed
from harp_daemon.sockets import Listener, ListenError, ResolveError, listen_tcp
from harpd.config.loaded import CommandLine, LoadedConfig, SupervisorConfig, load_config, load_supervisor_config
from harpd.config.settings import Network
from harpd.control.launcher import STOP_MARGIN, ServiceRunner, SupervisorLauncher
from harpd.control.supervisor_client import SupervisorClient, runtime_directory
from harpd.frontend.authenticator import BoundedThreadPool, TaskFailed
from harpd.frontend.monitor import SeparateFrontend
from harpd.frontend.server import FrontendServer
from harpd.processes.cgroup import service_cgroup
from harpd.supervisor.runtime_directory import default_runtime_directory

log = logging.getLogger("harpd.frontend")

#: The settings that a reload does not change.
_NEEDING_RESTART = ("metrics", "network.address", "network.port", "runtime_directory", "frontend_user")
#: In a reload: seconds for loading the files, and as many for the reply of the supervisor.
_RELOAD_TIMEOUT = 60.0


def load(options: CommandLine) -> SupervisorConfig:
    """Load what this process needs of the configuration. May block. Raises `ConfigError`.

    If the frontend has a process of its own, certificate and users are loaded there only.
    """
    config = load_supervisor_config(options)
    return load_config(options) if config.frontend_identity() is None else config


async def run(config: SupervisorConfig, on_serving: Callable[[], None], frontend_only: bool) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads. `on_serving` is called when the frontend accepts connections.

    With `frontend_only`, another program launches the supervisor. Otherwise this one does, and its stop ends all calls.

    Raises:
        ConfigError: it cannot listen, or the runtime directory cannot be used.
        SupervisorError: the supervisor did not start; its log gives the reason.
    """
    runner = ServiceRunner()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    roles = ("frontend",) if frontend_only else ("frontend", "launcher")
    with runtime_directory(config, *roles) as client:
        if not isinstance(config, LoadedConfig) and await client.names_without_frontend():
            # Otherwise their calls would be lost: they started before there was a user for the frontend.
            hint = "older supervisors have no socket for its user; restart the supervisor, and harpd when they are gone"
            log.warning("frontend runs as root", extra={"hint": hint})
            config = load_config(config.options)
        listeners = _listen(config.configuration.network, config.options.config)
        service = _FrontendService(config, client, listeners, frontend_only)
        await runner.run(service.start, service.reload, service.stop, on_serving)


class _Frontend(Protocol):
    """The frontend, in this process or in another one."""

    async def start(self) -> None:
        """Accept connections. Raises `ConfigError`."""

    async def prepare(self, config: Any) -> None:
        """Load a configuration for `commit` or `abort`. Raises `ConfigError`."""

    async def commit(self) -> None:
        """Use the prepared configuration for new connections."""

    async def abort(self) -> None:
        """Discard the prepared configuration."""

    async def begin_stop(self, supervisor_stops: bool) -> None:
        """Accept no more connections; see `FrontendServer.begin_stop`."""

    async def finish_stop(self, deadline: float) -> None:
        """Wait for the last replies and calls, and stop; see `FrontendServer.finish_stop`."""


class _OwnFrontend:
    """The frontend in this process."""

    def __init__(self, config: LoadedConfig, client: SupervisorClient, listeners: list[Listener]) -> None:
        self._server = FrontendServer(config, client, listeners)
        self._prepared = config

    async def start(self) -> None:
        self._server.open()

    async def prepare(self, config: LoadedConfig) -> None:
        self._prepared = config

    async def commit(self) -> None:
        self._server.apply(self._prepared)

    async def abort(self) -> None:
        pass

    async def begin_stop(self, supervisor_stops: bool) -> None:
        self._server.begin_stop(supervisor_stops)

    async def finish_stop(self, deadline: float) -> None:
        await self._server.finish_stop(deadline)


class _FrontendService:
    """The running service; `harpd.control.launcher.ServiceRunner` describes its steps."""

    def __init__(
        self, config: SupervisorConfig, client: SupervisorClient, listeners: list[Listener], frontend_only: bool
    ) -> None:
        self._client = client
        self._config = self._initial_config = config
        self._prepared: SupervisorConfig | None = None  # during a reload
        self._reload_thread = BoundedThreadPool(1)
        self._launcher: SupervisorLauncher | None = None
        if not frontend_only:
            background = config.options.daemon
            self._launcher = SupervisorLauncher(client, background, self._settings, self._settings)
        identity = config.frontend_identity()
        self._frontend: _Frontend
        if isinstance(config, LoadedConfig):
            self._load: Callable[[CommandLine], SupervisorConfig] = load_config
            self._frontend = _OwnFrontend(config, client, listeners)
        else:
            assert identity is not None
            self._load = load_supervisor_config
            service = service_cgroup() if frontend_only else None
            self._frontend = SeparateFrontend(config, identity, client.directory, listeners, service)

    async def start(self) -> None:
        """Start the supervisor unless another program does; then accept connections. Raises `SupervisorError`."""
        if self._launcher is not None:
            await self._launcher.start()
        await self._frontend.start()
        self._log_warnings()

    def _settings(self) -> dict[str, Any]:
        config = self._prepared or self._config
        configured = self._initial_config.configuration.runtime_directory
        outlive = configured is not None or default_runtime_directory() is not None
        return config.supervisor_settings(self._client.directory, outlive)

    async def reload(self) -> None:
        """Load the files again and apply them all or none. Raises `ConfigError` and `SupervisorError`."""
        old = self._config
        try:
            new = await self._reload_thread.run(partial(self._load, old.options), _RELOAD_TIMEOUT)
        except TimeoutError as error:
            raise ConfigError(f"{old.options.config}: loading took longer than {_RELOAD_TIMEOUT:g} s") from error
        except TaskFailed as error:
            raise error.__cause__ or error from None
        try:
            new.configure_log()
            await self._frontend.prepare(new)
            self._prepared = new
            await self._client.request({"control": "reload"}, _RELOAD_TIMEOUT)
        except BaseException:
            old.configure_log()
            await self._frontend.abort()
            raise
        finally:
            self._prepared = None
        self._config = new
        await self._frontend.commit()
        log.info("reloaded")
        report_restart_needed(self._initial_config.configuration, new.configuration, _NEEDING_RESTART)
        self._log_warnings()

    def _log_warnings(self) -> None:
        if warning := self._config.frontend_warning():
            log.warning("frontend runs as root", extra={"hint": warning})
        for problem in (*self._config.writable_files(), *self._config.readable_files()):
            log.warning("configuration has a mistake", extra={"problem": problem})

    async def stop(self) -> None:
        """Stop within a bounded time. If this program launches the supervisor, all calls end with ``shutdown``.

        Otherwise only connection-bound calls end; resumable calls continue without a connection.
        """
        await self._frontend.begin_stop(supervisor_stops=self._launcher is not None)
        deadline = 2 * self._config.configuration.limits.kill_grace + STOP_MARGIN
        if self._launcher is not None:
            await self._launcher.stop(deadline)
        await self._frontend.finish_stop(deadline)


def _listen(network: Network, file: Path) -> list[Listener]:
    try:
        return listen_tcp(network.address, network.port)
    except ResolveError as error:
        raise ConfigError(f"{file}: network.address: {error}") from error
    except ListenError as error:
        endpoint = f"{network.address or 'any address'}, port {network.port}"
        raise ConfigError(f"{file}: network.address: cannot listen on {endpoint}: {error}") from error
