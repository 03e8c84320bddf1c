"""The network frontend of harpd: accepts TLS connections, authenticates requests, passes calls to the supervisor.

It runs no procedure and stores no state of a call. Slow or blocking work runs elsewhere: password checks in threads,
calls in processes of the supervisor. Each connection has its own task and a deadline for every phase.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harp_daemon.acceptor import Acceptor
from harp_daemon.expiry import log_expiry_regularly
from harp_daemon.memory_quota import MemoryQuota
from harp_daemon.settings import ConfigError, report_restart_needed
from harp_daemon.sockets import Listener, ListenError, ResolveError, listen_tcp
from harp_daemon.timer_wheel import TimerWheel
from harpd.config.loaded import LoadedConfig, load_config
from harpd.config.settings import Network
from harpd.control.launcher import STOP_MARGIN, ServiceRunner, SupervisorLauncher
from harpd.control.supervisor_client import SupervisorClient, runtime_directory
from harpd.frontend.authenticator import Authenticator, BoundedThreadPool, TaskFailed
from harpd.frontend.connection import ArrivalClock, Connection, ConnectionContext
from harpd.frontend.link import SupervisorLinks
from harpd.supervisor.runtime_directory import default_runtime_directory

log = logging.getLogger("harpd.frontend")

#: The settings that a reload does not change.
_NEEDING_RESTART = ("network.address", "network.port", "runtime_directory")
#: In a reload: seconds for loading the files, and as many for the reply of the supervisor.
_RELOAD_TIMEOUT = 60.0
#: Seconds for the last replies to clients at the stop.
_FINAL_REPLY_TIMEOUT = 5.0


async def run(config: LoadedConfig, on_serving: Callable[[], None], frontend_only: bool) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads. `on_serving` is called when the frontend accepts connections.

    With `frontend_only`, another program launches the supervisor. Otherwise this one does, and its stop ends all calls.

    Raises:
        ConfigError: it cannot listen, or the runtime directory cannot be used.
        SupervisorError: the supervisor did not start; its log gives the reason.
    """
    runner = ServiceRunner()
    configuration = config.configuration
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    roles = ("frontend",) if frontend_only else ("frontend", "launcher")
    with runtime_directory(config, *roles) as client:
        listeners = _listen(configuration.network, config.options.config)
        server = FrontendServer(config, client, listeners, frontend_only)
        await runner.run(server.start, server.reload, server.stop, on_serving)


class FrontendServer:
    """The running frontend; `harpd.control.launcher.ServiceRunner` describes its steps."""

    def __init__(
        self, config: LoadedConfig, client: SupervisorClient, listeners: list[Listener], frontend_only: bool
    ) -> None:
        self._client = client
        self._listeners = listeners
        self._launcher: SupervisorLauncher | None = None
        if not frontend_only:
            self._launcher = SupervisorLauncher(client, config.options.daemon, lambda: self._settings(self._config))
        self._reload_thread = BoundedThreadPool(1)
        self._links = SupervisorLinks(client)
        self._arrival_clock = ArrivalClock()
        self._timers = TimerWheel()
        self._expiry_report: asyncio.Task[None] | None = None
        self._initial_config = config
        self._apply_config(config)
        self._acceptor = Acceptor(
            lambda accepted, peer, _: Connection(accepted, peer, self._context),
            serve=Connection.serve,
            reject=partial(Connection.serve, rejected=True),
            max_connections=lambda: self._config.configuration.limits.max_connections,
            max_per_peer=lambda: self._config.configuration.limits.max_connections_per_peer,
        )

    async def start(self) -> None:
        """Start the supervisor unless another program does; then accept connections. Raises `SupervisorError`."""
        if self._launcher is not None:
            await self._launcher.start()
        self._arrival_clock.run()
        self._acceptor.open(self._listeners)
        for listener in self._listeners:
            log.info("harpd is serving", extra=listener.fields)
        self._log_problems()

    def _settings(self, config: LoadedConfig) -> dict[str, Any]:
        configured = self._initial_config.configuration.runtime_directory
        outlive = configured is not None or default_runtime_directory() is not None
        return config.supervisor_settings(self._client.directory, outlive)

    def _apply_config(self, config: LoadedConfig) -> None:
        """Use this configuration for new connections; existing connections continue with theirs."""
        self._config = config
        self._context = ConnectionContext(
            config=config,
            authenticator=Authenticator(config),
            quota=MemoryQuota(config.configuration.limits.request_memory),
            links=self._links,
            arrival_clock=self._arrival_clock,
            timers=self._timers,
            confirm=lambda connection: self._acceptor.confirm(connection),
        )

    async def reload(self) -> None:
        """Load the files again and apply them all or none. Raises `ConfigError` and `SupervisorError`."""
        old = self._config
        try:
            new = await self._reload_thread.run(partial(load_config, old.options), _RELOAD_TIMEOUT)
        except TimeoutError as error:
            raise ConfigError(f"{old.options.config}: loading took longer than {_RELOAD_TIMEOUT:g} s") from error
        except TaskFailed as error:
            raise error.__cause__ or error from None
        try:
            new.configure_log()
            await self._client.request({"control": "reload", "settings": self._settings(new)}, _RELOAD_TIMEOUT)
        except BaseException:
            old.configure_log()
            raise
        self._apply_config(new)
        log.info("reloaded")
        report_restart_needed(self._initial_config.configuration, new.configuration, _NEEDING_RESTART)
        self._log_problems()

    def _log_problems(self) -> None:
        """Log a warning for each problem of the configuration, which is used nevertheless."""
        version = str(self._config.configuration.network.tls_minimum)
        if version in ("1.0", "1.1"):
            log.warning("TLS versions below 1.2 are allowed", extra={"tls_minimum": version})
        for problem in self._config.problems:
            log.warning("configuration has a mistake", extra={"problem": problem})
        if self._expiry_report is not None:
            self._expiry_report.cancel()
        self._expiry_report = asyncio.create_task(log_expiry_regularly(lambda: self._config.validities))

    async def stop(self) -> None:
        """Stop within a bounded time. If this program launches the supervisor, all calls end with ``shutdown``.

        Otherwise only connection-bound calls end; resumable calls continue without a connection.
        """
        self._acceptor.close_listeners()
        for listener in self._listeners:  # also those that were never opened, when the start failed
            listener.close()
        for connection in self._acceptor.connections.values():
            connection.stop(supervisor_stops=self._launcher is not None)
        deadline = 2 * self._config.configuration.limits.kill_grace + STOP_MARGIN
        if self._launcher is not None:
            await self._launcher.stop(deadline)
        else:
            await self._links.wait_until_unused(deadline)
        await self._acceptor.drain(_FINAL_REPLY_TIMEOUT)
        self._links.close()
        self._timers.close()
        if self._expiry_report is not None:
            self._expiry_report.cancel()
            await asyncio.wait([self._expiry_report])


def _listen(network: Network, file: Path) -> list[Listener]:
    try:
        return listen_tcp(network.address, network.port)
    except ResolveError as error:
        raise ConfigError(f"{file}: network.address: {error}") from error
    except ListenError as error:
        endpoint = f"{network.address or 'any address'}, port {network.port}"
        raise ConfigError(f"{file}: network.address: cannot listen on {endpoint}: {error}") from error
