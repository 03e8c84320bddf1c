"""The network frontend of harpd: accepts TLS connections, authenticates requests, passes calls to the supervisor.

It runs no procedure and stores no state of a call. Slow or blocking work runs elsewhere: password checks in threads,
calls in processes of the supervisor. Each connection has its own task and a deadline for every phase.
`harpd.frontend.service` runs it, in the program's own process or in a process of another user.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial

from harp_daemon.acceptor import Acceptor
from harp_daemon.expiry import log_expiry_regularly
from harp_daemon.exposition import counter, gauge, read_process, render
from harp_daemon.memory_quota import MemoryQuota
from harp_daemon.settings import ConfigError
from harp_daemon.sockets import Listener, ListenError, listen_tcp
from harp_daemon.timer_wheel import TimerWheel
from harpd.config.loaded import LoadedConfig
from harpd.control.metrics import certificate_family, supervisor_families
from harpd.control.supervisor_client import SupervisorClient, SupervisorError
from harpd.frontend.authenticator import Authenticator
from harpd.frontend.connection import ArrivalClock, Connection, ConnectionContext
from harpd.frontend.link import SupervisorLinks
from harpd.frontend.login_reports import LoginReports
from harpd.frontend.metrics_listener import MetricsListener

log = logging.getLogger("harpd.frontend")

#: Seconds for the last replies to clients at the stop.
_FINAL_REPLY_TIMEOUT = 5.0


class FrontendServer:
    """The running frontend."""

    def __init__(self, config: LoadedConfig, client: SupervisorClient, listeners: list[Listener]) -> None:
        self._listeners = listeners
        self._links = SupervisorLinks(client)
        self._login_reports = LoginReports(client)
        self._arrival_clock = ArrivalClock()
        self._timers = TimerWheel()
        self._expiry_report: asyncio.Task[None] | None = None
        self._client = client
        self._auth_failures = 0
        self._metrics: MetricsListener | None = None
        self._apply_config(config)
        self._acceptor = Acceptor(
            lambda accepted, peer, _: Connection(accepted, peer, self._context),
            serve=Connection.serve,
            reject=partial(Connection.serve, rejected=True),
            max_connections=lambda: self._config.configuration.limits.max_connections,
            max_per_peer=lambda: self._config.configuration.limits.max_connections_per_peer,
        )

    def open(self) -> None:
        """Accept connections. Raises `ConfigError` if the address of the metrics cannot be used."""
        self._open_metrics()
        self._arrival_clock.run()
        self._acceptor.open(self._listeners)
        for listener in self._listeners:
            log.info("harpd is serving", extra=listener.fields)
        self._log_problems()

    def _apply_config(self, config: LoadedConfig) -> None:
        self._config = config
        self._context = ConnectionContext(
            config=config,
            authenticator=Authenticator(config),
            quota=MemoryQuota(config.configuration.limits.request_memory),
            links=self._links,
            arrival_clock=self._arrival_clock,
            timers=self._timers,
            confirm=lambda connection: self._acceptor.confirm(connection),
            report_login=self._report_login,
        )

    def _report_login(self, user: str, address: str, reason: str) -> None:
        self._auth_failures += 1
        if self._config.configuration.audit_file:
            self._login_reports.add(user, address, reason)

    def _open_metrics(self) -> None:
        settings = self._config.configuration.metrics
        if settings is None:
            return
        try:
            listeners = listen_tcp(settings.address, settings.port)
        except ListenError as error:
            where = f"{settings.address}, port {settings.port}"
            file = self._config.options.config
            raise ConfigError(f"{file}: metrics.address: cannot listen on {where}: {error}") from error
        self._metrics = MetricsListener(listeners, self._scrape)
        self._metrics.open()

    async def _scrape(self, openmetrics: bool) -> bytes:
        """Return the metrics of all supervisors, and of this process."""
        supervisors = []
        with suppress(SupervisorError):
            supervisors = await self._client.read_metrics()
        limit = self._config.configuration.limits.max_connections
        own = [
            gauge("harpd_connections", "Open connections.", len(self._acceptor.connections)),
            gauge("harpd_connections_limit", "Limit of these, limits.max_connections.", limit),
            counter("harpd_auth_failures_total", "Requests with a wrong user or password.", self._auth_failures),
        ]
        families = [*supervisor_families(supervisors), certificate_family(self._config.validities), *own]
        return render([*families, *read_process()], openmetrics)

    def apply(self, config: LoadedConfig) -> None:
        """Use this configuration for new connections; existing connections continue with theirs."""
        self._apply_config(config)
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

    def begin_stop(self, supervisor_stops: bool) -> None:
        """Accept no more connections, and end the open ones soon; see `Connection.stop`."""
        self._acceptor.close_listeners()
        for listener in self._listeners:  # also those that were never opened, when the start failed
            listener.close()
        for connection in self._acceptor.connections.values():
            connection.stop(supervisor_stops)

    async def finish_stop(self, deadline: float) -> None:
        """Wait until connection-bound calls have ended, for at most this number of seconds; close all connections."""
        if self._metrics is not None:
            await self._metrics.aclose()
        await self._login_reports.close()
        await self._links.wait_until_unused(deadline)
        await self._acceptor.drain(_FINAL_REPLY_TIMEOUT)
        self._links.close()
        self._timers.close()
        if self._expiry_report is not None:
            self._expiry_report.cancel()
            await asyncio.wait([self._expiry_report])
