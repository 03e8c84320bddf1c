"""The daemon: opens the sockets and the store, starts the dispatcher and the APIs, handles signals.

Steps that can fail because of the configuration are first: the sockets are opened, then the store. Then the dispatcher
recovers running calls and starts queued jobs. The shutdown has the reverse order: the APIs close, then the dispatcher
stops (see its module), then the store is closed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, closing, suppress
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from harp import __version__
from harp_daemon import logs
from harp_daemon.audit import AuditError, AuditLog
from harp_daemon.audit_file import check_usable
from harp_daemon.expiry import Validity, log_expiry_regularly, read_validities
from harp_daemon.file_modes import describe_reader
from harp_daemon.process import ProcessError, notify_service_manager
from harp_daemon.regular_files import read_regular
from harp_daemon.settings import ConfigError, report_restart_needed
from harp_daemon.sockets import Listener, ListenError, listen_unix
from harpcaller.access.identities import Identities
from harpcaller.access.source import PolicySource
from harpcaller.acting import ActingAs
from harpcaller.api.client_server import ClientServer
from harpcaller.api.control_server import MAX_CONTROL_CONNECTIONS, ControlServer
from harpcaller.audit import Audit, report_missing
from harpcaller.config import Config, file_errors, load
from harpcaller.dispatcher import Dispatcher
from harpcaller.health import Health
from harpcaller.hosts.registry import HostList, read_hosts_file, run_hosts_script
from harpcaller.hosts.script import ScriptFailed
from harpcaller.hosts.tls import HostTLS
from harpcaller.listening import listen
from harpcaller.metrics import Metrics
from harpcaller.monitoring import Limits, Monitor, MonitorSettings
from harpcaller.secret_arguments import read_key_file
from harpcaller.store.sqlite import Store, open_store

if TYPE_CHECKING:
    from harpcaller.http.starting import HTTPAPI

log = logging.getLogger(__name__)

T = TypeVar("T")

_NEEDING_RESTART = (
    "audit_file",
    "audit_file_bytes",
    "listen",
    "stream_directory",
    "request_memory",
)  #: The settings that a reload does not change.
_HTTP_NEEDING_RESTART = "http.listen", "http.base_path", "http.console"  #: The same if both files have the section.
_OWN_DESCRIPTORS = 64  #: Descriptors of the program without those of its connections.


def configure_log(config: Config, debug: bool) -> None:
    """Configure the log; `debug` replaces the configured level. Raises `ConfigError` if syslog cannot be reached."""
    level = "debug" if debug else config.log_level
    try:
        logs.configure(level=level.upper(), form=config.log_format, syslog=config.syslog, name="harpcallerd")
    except OSError as error:
        raise ConfigError(f"{config.file}: syslog: cannot reach syslog: {error.strerror}") from error


def check(config: Config) -> tuple[list[str], list[str]]:
    """Check the certificates and the hosts file, and run the script; return errors and warnings.

    Each rejected line of the hosts is an error.
    """
    errors: list[str] = []
    warnings: list[str] = []

    def collect(use: Callable[[Config], T]) -> T | None:
        try:
            return use(config)
        except ConfigError as error:
            errors.append(str(error))
            return None

    if (tls := collect(HostTLS)) is not None:
        warnings += tls.warnings
    errors += _find_expired(config)
    source = collect(PolicySource)
    uses: tuple[Callable[[Config], object], ...] = read_key_file, Identities, _check_http, _check_audit
    for use in uses:
        collect(use)
    if exposed := ", ".join(map(str, config.unsafe_listeners)):
        lines = "".join(f"\n    {line}" for line in config.safe_lines)
        reason = (
            f"every client of {exposed} may call every procedure; these lines change that, see docs/access.md:{lines}"
        )
        warnings.append(f"{config.file}: access_file: not set: {reason}")
    if config.hosts_file is not None and (readers := describe_reader(config.hosts_file)) is not None:
        warnings.append(f"{config.file}: hosts_file: {readers}")  # it has passwords
    lists = [collect(_read_hosts_file), collect(_run_hosts_script)]
    for key, hosts in zip(("hosts_file", "host_db_script"), lists, strict=True):
        if hosts is not None and not hosts.hosts and not hosts.rejected:
            warnings.append(f"{config.file}: {key}: it has no host; a job for a host that is missing fails")
    if source is not None and not errors:
        known = [host for hosts in lists if hosts for host in hosts.hosts.values()]
        tags = {tag for host in known for tag in host.tags or ()}
        addresses = (*config.listen, *(config.http.listen if config.http is not None else ()))
        warnings += source.describe_unmatched({host.hostname for host in known}, tags, {*map(str, addresses)})
    return [*errors, *(str(line) for hosts in lists if hosts is not None for line in hosts.rejected)], warnings


def _find_expired(config: Config) -> Iterator[str]:
    """Yield an error for each certificate of the dispatcher, or of all its authorities, that is not valid now."""
    now = datetime.now(UTC)
    authorities = [each for each in _validities(config) if each.file == config.ca_file]
    expired = [*filter(None, [each.describe_error(now) for each in authorities])]
    if len(expired) == len(authorities):  # collections of authorities often contain old certificates
        yield from (f"{config.file}: ca_file: {reason}" for reason in expired)
    if config.tls is not None:
        own = [each.describe_error(now) for each in _validities(config) if each.file == config.tls.certfile]
        yield from (f"{config.file}: tls.certfile: {reason}" for reason in filter(None, own))


def _check_http(config: Config) -> None:
    if config.http is not None:
        _import_http(config).check(config.http, config)


def _check_audit(config: Config) -> None:
    try:
        if config.audit_file is not None:
            check_usable(config.audit_file)
    except AuditError as error:
        raise ConfigError(f"{config.file}: audit_file: {error}") from error


def _read_hosts_file(config: Config) -> HostList | None:
    if config.hosts_file is None:
        return None
    with file_errors(config, "hosts_file"):
        return read_hosts_file(config.hosts_file)


def _run_hosts_script(config: Config) -> HostList | None:
    try:
        script = config.host_db_script
        return None if script is None else asyncio.run(run_hosts_script(script, config.host_db_timeout))
    except (ScriptFailed, OSError) as error:
        raise ConfigError(f"{config.file}: host_db_script: {error}") from error


def _validities(config: Config) -> list[Validity]:
    """Return the validity of the certificates that clients see, and of those by which peers are accepted. May block."""
    validities = []
    of_clients = (config.tls.certfile, config.tls.client_ca_file) if config.tls else ()
    for file in (config.ca_file, config.known_certs_file, *of_clients):
        with suppress(OSError):  # the use of the file reports it
            validities += [] if file is None else read_validities(file)
    return validities


async def run(
    config: Config, socket: Path, on_ready: Callable[[], None], debug: bool, wall: Callable[[], float] = time.time
) -> None:
    """Serve until SIGTERM, SIGINT or the command `stop`; SIGHUP reloads the file, SIGUSR1 reopens the log files.

    `on_ready` is called when requests are accepted. `wall` is the wall clock for stored times. Raises `ConfigError` or
    `StorageError`, and `ProcessError` if the control socket cannot be opened: another daemon may be using it.
    """
    stop, reload_requested = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload_requested.set)
    loop.add_signal_handler(signal.SIGUSR1, logs.reopen)
    _raise_descriptor_limit(config)
    try:
        async with AsyncExitStack() as stack:
            control = stack.enter_context(closing(_open_control(socket)))
            identities = Identities(config)
            listeners = listen(config, "listen", config.listen)
            starting = None if config.http is None else _import_http(config)
            http_listeners = [] if config.http is None else listen(config, "http.listen", config.http.listen)
            for listener in (*listeners, *http_listeners):
                stack.callback(listener.close)
            with file_errors(config, "stream_directory"):
                store = await open_store(config.stream_directory)
            stack.push_async_callback(store.close)
            audit = await _open_audit(config, stack)
            await report_missing(audit, store)

            def reopen() -> None:
                logs.reopen()
                audit.reopen()

            loop.add_signal_handler(signal.SIGUSR1, reopen)
            metrics = None if config.http is None else await _begin_metrics(store)
            dispatcher = await stack.enter_async_context(Dispatcher(config, store, wall, audit, metrics))
            health = Health(dispatcher)
            clients = await stack.enter_async_context(aclosing(ClientServer(dispatcher, identities)))
            http, controller = None, None
            if starting is not None and metrics is not None:
                connections = lambda: _count_connections(dispatcher.config, clients, controller, http)  # noqa: E731
                monitor = _make_monitor(dispatcher, clients, metrics, connections)
                stack.push_async_callback(_cancel, asyncio.create_task(metrics.measure_lag()))
                act, current = partial(ActingAs, dispatcher), lambda: dispatcher.config
                of_api = act, current, lambda: clients.identities, clients.memory
                http = starting.HTTPAPI(*of_api, monitor, health, metrics)
                await stack.enter_async_context(aclosing(http))
            reloader = _Reloader(dispatcher, clients, http, debug)
            make_link = None if http is None else http.make_login_link
            controller = ControlServer(
                dispatcher, stop.set, reloader.reload, lambda: clients.identities, make_link, health
            )
            await stack.enter_async_context(aclosing(controller))
            controller.serve([control])
            clients.serve(listeners)
            if http is not None:
                http.serve(http_listeners, listeners)
            audit.report("start", **_describe_program(config, dispatcher))
            on_ready()
            starting_up = asyncio.create_task(health.notify_when_ready())
            reloading = asyncio.create_task(reloader.reload_on_request(reload_requested))
            reporting = asyncio.create_task(log_expiry_regularly(lambda: _validities(dispatcher.config)))
            await stop.wait()
            log.info("harpcallerd stops")
            health.is_stopping = True
            audit.report("stop")
            notify_service_manager("STOPPING=1")
            for task in (starting_up, reloading, reporting):
                task.cancel()
            await asyncio.wait([starting_up, reloading, reporting])
    finally:
        # Closing the loop restores the default actions; then a second signal would change the exit status.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})


class _Reloader:
    """Reloads the configuration file, one reload at a time; `debug` as in `configure_log`."""

    def __init__(self, dispatcher: Dispatcher, clients: ClientServer, http: HTTPAPI | None, debug: bool) -> None:
        self._dispatcher = dispatcher
        self._clients = clients
        self._http = http
        self._debug = debug
        self._at_start = dispatcher.config
        self._lock = asyncio.Lock()

    async def reload_on_request(self, requested: asyncio.Event) -> None:
        """Reload after each request; the results are logged."""
        while await requested.wait():
            requested.clear()
            try:
                await self.reload()
            except ConfigError:
                pass  # already logged
            except Exception:
                log.exception("reload failed; nothing is changed")

    async def reload(self) -> list[str]:
        """Reload; return the changed keys that need a restart. Until then, their old values remain in use.

        Raises `ConfigError` without a change if the file cannot be used.
        """
        async with self._lock:
            notify_service_manager(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            before = self._dispatcher.config
            try:
                config = await asyncio.to_thread(load, before.file)
                identities = Identities(config, self._clients.identities)
                apply_http = self._http.prepare_reload(config) if self._http is not None else lambda: None
                try:
                    configure_log(config, self._debug)
                    await self._dispatcher.reload(config)
                    self._clients.identities = identities
                    apply_http()
                except BaseException:
                    configure_log(before, self._debug)
                    raise
            except Exception as error:
                if self._dispatcher.metrics is not None:
                    self._dispatcher.metrics.record_reload(succeeded=False)
                if isinstance(error, ConfigError):
                    log.error("reload failed; nothing is changed", extra={"reason": str(error)})
                raise
            finally:
                notify_service_manager("READY=1")
            if self._dispatcher.metrics is not None:
                self._dispatcher.metrics.record_reload(succeeded=True)
            log.info("reloaded")
            self._dispatcher.audit.report("reloaded", **_describe_program(config, self._dispatcher))
            needing = ("http",) if None in (self._at_start.http, config.http) else _HTTP_NEEDING_RESTART
            return report_restart_needed(self._at_start, config, (*_NEEDING_RESTART, *needing))


async def _begin_metrics(store: Store) -> Metrics:
    """Count the changes of a store's jobs from now on."""
    metrics = Metrics()
    metrics.stored = await store.count_stored()
    store.observe(metrics.observe_changes)
    store.measure()
    return metrics


def _make_monitor(
    dispatcher: Dispatcher, clients: ClientServer, metrics: Metrics, connections: Callable[[], Mapping[str, Limits]]
) -> Monitor:
    used = partial(_measure_memory, dispatcher.config.request_memory, clients)
    validities = lambda: _validities(dispatcher.config)  # noqa: E731
    shown = lambda: _monitor_settings(dispatcher.config)  # noqa: E731
    return Monitor(dispatcher, metrics, connections, used, validities, shown)


def _count_connections(
    config: Config, clients: ClientServer, controller: ControlServer | None, http: HTTPAPI | None
) -> dict[str, Limits]:
    counts = {"client": Limits(len(clients.acceptor.connections), config.max_connections)}
    if controller is not None:
        counts["control"] = Limits(len(controller.acceptor.connections), MAX_CONTROL_CONNECTIONS)
    if http is not None:
        counts["http"] = Limits(http.open_connections, http.service.settings.connections)
    return counts


def _measure_memory(limit: int, clients: ClientServer) -> Limits:
    return Limits(limit - clients.memory.available, limit)


def _monitor_settings(config: Config) -> MonitorSettings:
    http = config.http
    return MonitorSettings() if http is None else MonitorSettings(http.metrics_hosts, http.metrics_queues)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _import_http(config: Config) -> ModuleType:
    """Return the module that starts the HTTP API. Raises `ConfigError` if a package of the extra `web` is missing.

    Without section `http`, these packages are not imported.
    """
    try:
        from harpcaller.http import starting
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("harp", "harp_daemon", "harpcaller"):
            raise
        missing = f"expected the packages of the extra web, got no package {error.name}; pip install 'harpcaller[web]'"
        raise ConfigError(f"{config.file}: http: {missing}") from error
    return starting


async def _open_audit(config: Config, stack: AsyncExitStack) -> Audit:
    if config.audit_file is None:
        return Audit()
    try:
        audit_log = AuditLog(config.audit_file, config.audit_file_bytes)
    except AuditError as error:
        raise ConfigError(f"{config.file}: audit_file: {error}") from error
    stack.push_async_callback(audit_log.close)
    return Audit(audit_log)


def _describe_program(config: Config, dispatcher: Dispatcher) -> dict[str, Any]:
    """Return the fields of an entry about the daemon and its settings."""
    digest = None
    with suppress(OSError):
        digest = sha256(read_regular(config.file)).hexdigest()
    listeners = [str(address) for address in config.listen]
    settings = {"config": str(config.file), "config_sha256": digest, **dispatcher.access.source.describe_version()}
    return {"version": __version__, "pid": os.getpid(), "listen": listeners, **settings}


def _open_control(path: Path) -> Listener:
    try:
        return listen_unix(path, 0o600)  # only the daemon's user may connect
    except ListenError as error:
        if error.in_use and path.is_socket():
            raise ProcessError(f"a harpcallerd is already running on {path}") from error
        if error.in_use:
            raise ProcessError(f"control socket {path}: the existing file is not a socket") from error
        raise ProcessError(f"control socket {path}: {error}") from error


def _raise_descriptor_limit(config: Config) -> None:
    """Raise the limit of open files, and log if it is too low for the configured limits."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # the limit remains
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.max_connections + config.max_calls + _OWN_DESCRIPTORS
    needed += 0 if config.http is None else config.http.connections
    if soft != resource.RLIM_INFINITY and soft < needed:
        log.warning("limit of open files too low", extra={"limit": soft, "needed": needed})
