"""The daemon: opens the sockets and the store, starts the dispatcher and the APIs, handles signals.

Steps that can fail because of the configuration come first: the sockets are opened before the store, and the store
before the dispatcher, which recovers running calls and starts queued jobs. The shutdown has the reverse order: the APIs
close, then the dispatcher stops (see its module), then the store is closed.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harp_daemon import logs
from harp_daemon.listeners import Listener, ListenError, listen_unix
from harp_daemon.process import ProcessError, notify_service_manager
from harpcaller.api.client_server import ClientServer, listen
from harpcaller.api.control_server import ControlServer
from harpcaller.config import Config, ConfigError, file_errors, load
from harpcaller.dispatcher import Dispatcher
from harpcaller.store import Store
from harpcaller.store.sqlite import open_store

log = logging.getLogger(__name__)

#: Permissions of the control socket: only the daemon's user.
_CONTROL_MODE = 0o600

#: The settings that a reload does not change.
_NEEDING_RESTART = ("listen", "stream_directory", "request_memory")

#: Descriptors of the program beside those of its connections.
_OWN_DESCRIPTORS = 64


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line.

    Attributes:
        config: the configuration file.
        socket: the control socket.
        debug: whether to log at debug level, regardless of the configuration.
    """

    config: Path
    socket: Path
    debug: bool = False


def configure_log(options: Options, config: Config) -> None:
    """Configure the log.

    Raises:
        ConfigError: syslog cannot be reached.
    """
    level = "debug" if options.debug else config.log_level
    try:
        logs.configure(level=level.upper(), form=config.log_format, syslog=config.syslog, name="harpcallerd")
    except OSError as error:
        raise ConfigError(f"{config.file}: syslog: cannot reach syslog: {error.strerror}") from error


async def run(
    options: Options, config: Config, on_ready: Callable[[], None], wall: Callable[[], float] = time.time
) -> None:
    """Serve until SIGTERM, SIGINT or the command `stop`; SIGHUP reloads, SIGUSR1 reopens the log files.

    Args:
        options: the command line.
        config: the configuration loaded from `options.config`.
        on_ready: called when requests are accepted.
        wall: the wall clock for stored times; Unix seconds.

    Raises:
        ConfigError: the configuration cannot be used.
        ProcessError: the control socket cannot be opened; another daemon may be using it.
        StorageError: the store cannot be opened.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_unexpected)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # These signals must not end the process during the start.
    for number in (signal.SIGHUP, signal.SIGUSR1):
        loop.add_signal_handler(number, _ignore_signal)
    _raise_descriptor_limit(config)
    try:
        async with AsyncExitStack() as stack:
            control = stack.enter_context(closing(_open_control(options.socket)))
            listeners = listen(config)
            for listener in listeners:
                stack.callback(listener.close)
            store = await _open_store(config)
            stack.push_async_callback(store.close)
            dispatcher = await stack.enter_async_context(Dispatcher(config, store, wall))
            server = await stack.enter_async_context(ClientServer(dispatcher))
            program = _DaemonControl(options, dispatcher, stop)
            await stack.enter_async_context(ControlServer(dispatcher, program, control))
            loop.add_signal_handler(signal.SIGHUP, program.reload_by_signal)
            loop.add_signal_handler(signal.SIGUSR1, program.reopen_logs)
            server.serve(listeners)
            on_ready()
            notify_service_manager("READY=1")
            await stop.wait()
            log.info("harpcallerd stops")
            notify_service_manager("STOPPING=1")
            await program.cancel_reloads()
    finally:
        # Closing the loop restores the default actions: a second signal would change the exit status.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})


async def _open_store(config: Config) -> Store:
    with file_errors(config, "stream_directory"):
        return await open_store(config.stream_directory)


def _ignore_signal() -> None:
    """Ignore a signal that arrives during the start."""


class _DaemonControl:
    """Controls the daemon on behalf of signals and the control API.

    Args:
        options: the command line.
        dispatcher: the dispatcher.
        stop: set to stop the daemon.
    """

    def __init__(self, options: Options, dispatcher: Dispatcher, stop: asyncio.Event) -> None:
        self._options = options
        self._dispatcher = dispatcher
        self._stop = stop
        self._at_start = dispatcher.config
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Start to stop."""
        self._stop.set()

    def reopen_logs(self) -> None:
        """Reopen the log files."""
        logs.reopen()
        log.info("log files reopened")

    def reload_by_signal(self) -> None:
        """Start to reload; the result is logged."""
        task = asyncio.create_task(self._logged_reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _logged_reload(self) -> None:
        try:
            await self.reload()
        except ConfigError:
            pass  # already logged

    async def reload(self) -> list[str]:
        """Reload the configuration file, all or nothing.

        Returns:
            The changed keys that need a restart; their old values remain in use.

        Raises:
            ConfigError: the file cannot be used; nothing has changed.
        """
        async with self._reloading:
            notify_service_manager(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                needing_restart = await self._reload()
            except ConfigError as error:
                log.error("reload failed; nothing is changed", extra={"reason": str(error)})
                raise
            finally:
                notify_service_manager("READY=1")
            log.info("reloaded")
            for key in needing_restart:
                log.warning("a changed setting needs a restart", extra={"key": key})
            return needing_restart

    async def _reload(self) -> list[str]:
        before = self._dispatcher.config
        config = await asyncio.to_thread(load, self._options.config)
        try:
            configure_log(self._options, config)
            await self._dispatcher.reload(config)
        except BaseException:
            configure_log(self._options, before)
            raise
        return [key for key in _NEEDING_RESTART if getattr(config, key) != getattr(self._at_start, key)]

    async def cancel_reloads(self) -> None:
        """Cancel all reloads."""
        for task in self._reloads:
            task.cancel()
        await asyncio.gather(*self._reloads, return_exceptions=True)


def _open_control(path: Path) -> Listener:
    try:
        return listen_unix(path, _CONTROL_MODE)
    except ListenError as error:
        if error.in_use and path.is_socket():
            raise ProcessError(f"a harpcallerd is already running on {path}") from error
        if error.in_use:
            raise ProcessError(f"control socket {path}: the existing file is not a socket") from error
        raise ProcessError(f"control socket {path}: {error}") from error


def _raise_descriptor_limit(config: Config) -> None:
    """Raise the limit of open files, and log if it is too low for the configured limits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError):
        pass  # the limit remains
    needed = config.max_connections + config.max_calls + _OWN_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        log.warning(
            "limit of open files too low",
            extra={"limit": soft, "needed": needed},
        )


def _log_unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    log.error("unexpected error", exc_info=error, extra={"where": context.get("message")})
