"""The start, the reload and the end of the HTTP API in the daemon."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harp_daemon.memory_quota import MemoryQuota
from harp_daemon.server_tls import ServerTLS
from harp_daemon.settings import ConfigError
from harp_daemon.sockets import Listener
from harpcaller.access.client import Client
from harpcaller.access.identities import Identities
from harpcaller.access.tokens import TokenError
from harpcaller.access.users import Users
from harpcaller.acting import ActingAs
from harpcaller.config import Config, HTTPSettings
from harpcaller.health import Health
from harpcaller.http.app import OPERATIONS, HTTPApp
from harpcaller.http.console import Console
from harpcaller.http.docs_pages import DocsPages
from harpcaller.http.monitoring import MonitoringRoutes
from harpcaller.http.server import HTTPServer, open_tls
from harpcaller.http.service import HTTPService
from harpcaller.http.sessions import Sessions
from harpcaller.metrics import Metrics
from harpcaller.monitoring import Monitor

__all__ = ["HTTPAPI", "check"]


def check(http: HTTPSettings, config: Config) -> None:
    """Check the files of the settings. Raises `ConfigError`."""
    open_tls(config, http)
    _open_users(config)


def _open_users(config: Config) -> Users | None:
    """Return the users with passwords; None: there is no file of them. Raises `ConfigError`."""
    if config.http is None or config.http.users_file is None:
        return None
    try:
        return Users(config.http.users_file)
    except TokenError as error:
        raise ConfigError(f"{config.file}: http.users_file: {error}") from error


class HTTPAPI:
    """The HTTP API. `acting_as` returns the verbs of the dispatcher for a client; `memory` is for request bodies.

    Raises `ConfigError` if a file of the settings cannot be used.
    """

    def __init__(
        self,
        acting_as: Callable[[Client], ActingAs],
        config: Callable[[], Config],
        identities: Callable[[], Identities],
        memory: MemoryQuota,
        monitor: Monitor,
        health: Health,
        metrics: Metrics,
    ) -> None:
        sessions = Sessions(
            config().stream_directory / "sessions",
            lambda: self.service.settings.session_idle,
            lambda: self.service.settings.session_age,
            lambda: identities().tokens,
            users=lambda: self.service.users,
        )
        self.service = HTTPService(acting_as, config, identities, memory, sessions, monitor, health, metrics)
        self.service.users = _open_users(config())
        self._listeners: Sequence[Listener] = ()
        tls, self._files = self._open_tls(config()), _files_of(config())
        settings = self.service.settings
        routes = MonitoringRoutes(self.service).routes()
        routes += DocsPages(self.service, OPERATIONS).routes()
        if settings.console:
            console = Console(settings.base_path)
            app = HTTPApp(self.service, routes=[*routes, *console.routes()], find_page=console.find_unknown)
        else:
            app = HTTPApp(self.service, routes=routes)
        self.server = HTTPServer(app, lambda: self.service.settings, lambda: config().idle_timeout, tls)

    @property
    def open_connections(self) -> int:
        """The number of open connections."""
        return len(self.server.acceptor.connections)

    @staticmethod
    def _open_tls(config: Config) -> ServerTLS | None:
        return None if config.http is None else open_tls(config, config.http)

    def serve(self, listeners: Sequence[Listener], calls: Sequence[Listener] = ()) -> None:
        """Accept connections from the listeners. `calls` are those of the client API."""
        self._listeners, self.service.calls = listeners, calls
        self.server.serve(listeners)

    def prepare_reload(self, config: Config) -> Callable[[], None]:
        """Check a new configuration; return a function that applies it. Raises `ConfigError`."""
        tls, files, users = self._open_tls(config), _files_of(config), _open_users(config)
        # The context in use, and the users, read changed files by themselves.
        keeps_tls = tls is None or files == self._files
        before = self.service.users
        if before is not None and users is not None and before.file == users.file:
            users = before

        def apply() -> None:
            self.service.users = users
            if not keeps_tls:
                self.server.tls, self._files = tls, files

        return apply

    async def aclose(self) -> None:
        """End waits and streams, stop accepting connections, and wait a limited time for requests in progress."""
        self.service.close()
        await self.server.aclose()
        await self.service.sessions.aclose()

    def make_login_link(self, name: str, roles: tuple[str, ...], seconds: float | None) -> str:
        """Return a link that begins a session once. Raises ValueError."""
        return f"{self._find_address()}/login#k={self.service.sessions.add_link(name, roles, seconds)}"

    def _find_address(self) -> str:
        """Return the address of the console for browsers. Raises ValueError if it has no address."""
        settings = self.service.settings
        public = f"[{name}]" if ":" in (name := next(iter(settings.hosts), "")) else name
        if settings.behind_proxy and public:
            return f"https://{public}{settings.base_path}"
        for listener in self._listeners:
            if listener.path is None:
                scheme = "https" if listener.is_tls else "http"
                local, port = str(listener.fields["address"]), listener.fields["port"]
                host = public if listener.is_tls and public else _host_of(local)
                return f"{scheme}://{host}:{port}{settings.base_path}"
        raise ValueError("no address for browsers: set http.hosts and http.behind_proxy, or add one to http.listen")


def _host_of(address: str) -> str:
    """Return the host of a local address in a URL; an address that means all is that of this machine."""
    if address in ("0.0.0.0", "::"):  # noqa: S104 - it is compared, not opened
        return "localhost"
    return f"[{address}]" if ":" in address else address


def _files_of(config: Config) -> tuple[object, ...]:
    if (http := config.http) is None:
        return ()
    return http.certfile, http.keyfile, http.tls_minimum, http.client_ca_file, http.crl_file
