"""Runs services of harpd. Launches the supervisor: starts it, restarts it when it dies, replaces it at a reload.

`harpd.supervisor.main` describes a supervisor's arguments, settings and lifeline. A supervisor creates its own sockets
and can outlive its launcher. At its start and at each reload, the launcher makes older supervisors *retire*: they
accept no new calls and exit after their last one. A full stop ends all supervisors.

The launcher runs in the frontend's process (``harpd`` without a command), or as the service ``harpd supervisor``. In
the service, SIGTERM ends all calls. SIGHUP starts a new supervisor with the code and the configuration that are
installed now. SIGUSR1 ends only the service: supervisors continue, and retire when the service starts again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from harp.protocol.json_text import dumps
from harp_daemon.process import describe_exit, notify_service_manager
from harp_daemon.settings import ConfigError, report_restart_needed
from harp_daemon.timer_wheel import Backoff
from harpd.config.loaded import SupervisorConfig, load_supervisor_config
from harpd.control.supervisor_client import (
    SupervisorClient,
    SupervisorError,
    SupervisorNotRunning,
    runtime_directory,
)

log = logging.getLogger("harpd.control")

#: Seconds for a supervisor to load the procedures file and to become active.
_START_TIMEOUT = 60.0
#: Seconds for a supervisor to stop, beyond the calls' two grace periods.
STOP_MARGIN = 5.0
#: Seconds between two starts of a supervisor that dies: the first delay, and the longest.
_MIN_DELAY, _MAX_DELAY = 0.1, 30.0
#: A supervisor that ran this many seconds resets the delay.
_STABLE_TIME = 10.0
_READ_SIZE = 100

#: A step of a service. It may raise.
_Step = Callable[[], Awaitable[None]]
#: Returns the settings of a supervisor.
_Settings = Callable[[], dict[str, Any]]


class ServiceRunner:
    """The runner of a service: SIGTERM and SIGINT stop it, SIGHUP reloads it, already before it starts."""

    def __init__(self) -> None:
        self.stop_requested = asyncio.Event()  #: Set it to stop the service.
        self._reload_requested = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop_requested.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_requested.set)

    async def run(self, start: _Step, reload: _Step, stop: _Step, on_serving: Callable[[], None]) -> None:
        """Run a service; call `on_serving` when it serves, after `start`. Raises the exception of a start that fails.

        `reload` loads the configuration again and applies all of it, or rejects all. `stop` stops the service within a
        bounded time; also after a start that failed or did not finish.
        """
        serving = asyncio.create_task(self._serve(start, reload, on_serving))
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
            await stop()
            # Closing the loop restores the default actions: a second signal would change the exit status.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

    async def _serve(self, start: _Step, reload: _Step, on_serving: Callable[[], None]) -> NoReturn:
        """Start the service; then reload it at each request. Requests during the start or a reload cause one reload."""
        await start()
        on_serving()
        notify_service_manager("READY=1")
        while True:
            await self._reload_requested.wait()
            self._reload_requested.clear()
            try:
                await reload()
            except (ConfigError, SupervisorError) as error:
                log.error("reload failed; nothing is changed", extra={"reason": str(error)})
            except Exception:
                log.exception("reload failed; nothing is changed")


class SupervisorLauncher:
    """The launcher of supervisors; in the background, they have no stderr.

    `settings` returns their settings, `reload_settings` those that a supervisor requests for a reload. The second one
    raises `ConfigError`.
    """

    def __init__(self, client: SupervisorClient, background: bool, settings: _Settings, reload_settings: _Settings):
        self._client = client
        self._stderr = subprocess.DEVNULL if background else None
        self._settings, self._reload_settings = settings, reload_settings
        self._active: SupervisorProcess | None = None
        self._processes: set[SupervisorProcess] = set()  # all, also those that start or retire
        self._starting = asyncio.Lock()
        self._restarting: asyncio.Task[None] | None = None
        self._backoff = Backoff(_MIN_DELAY, _MAX_DELAY)

    async def start(self) -> None:
        """Start a supervisor; return when it is active. Older supervisors retire.

        Raises `SupervisorError`: it exited or did not reply; its log gives the reason. An older one stays active.
        """
        async with self._starting:
            await self._client.remove_dead_sockets()
            child = SupervisorProcess(self._settings(), self._reload_settings, self._stderr)
            self._processes.add(child)
            child.exit_status.add_done_callback(lambda _: self._processes.discard(child))
            outcomes: set[asyncio.Future[Any]] = {child.instance, child.exit_status}
            try:
                await asyncio.wait(outcomes, timeout=_START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not child.instance.done():
                    child.process.kill()
            if not child.instance.done():
                if child.exit_status.done():
                    exited = describe_exit(child.exit_status.result())
                    raise SupervisorError(f"the supervisor exited before it was ready ({exited})")
                raise SupervisorError(f"the supervisor did not reply within {_START_TIMEOUT:g} s")
            if self._active is not None:
                self._active.retired = True
            self._active = child
            child.exit_status.add_done_callback(partial(self._on_exit, child))
            log.info("supervisor started", extra={"supervisor": child.process.pid})
            for name in self._client.socket_names():
                if name.endswith(child.instance.result()):
                    continue
                try:
                    await self._client.request({"control": "retire"}, name=name)
                except SupervisorNotRunning:
                    pass
                except SupervisorError as error:
                    log.error("cannot retire an older supervisor", extra={"supervisor": name, "reason": str(error)})

    def _on_exit(self, child: SupervisorProcess, ended: asyncio.Future[int]) -> None:
        """Handle the exit of a supervisor; if it was the active supervisor, start its successor."""
        log_fields = {"supervisor": child.process.pid, "status": describe_exit(ended.result())}
        if child is self._active:
            log.error("supervisor died", extra=log_fields)
            if time.monotonic() - child.started > _STABLE_TIME:
                self._backoff.reset()
            self._active = None
            if self._restarting is None or self._restarting.done():
                self._restarting = asyncio.create_task(self._restart_until_ready())
        elif child.retired:
            log.info("older supervisor exited", extra=log_fields)

    async def _restart_until_ready(self) -> None:
        delay = self._backoff.next_delay()
        while self._active is None:
            await asyncio.sleep(delay)
            self._backoff.record_attempt()
            delay = self._backoff.next_delay()
            try:
                await self.start()
            except (ConfigError, SupervisorError, OSError) as error:  # ConfigError: a user has been deleted
                fields = {"reason": str(error), "retry_in": round(delay, 1)}
                log.error("cannot start supervisor; retrying", extra=fields)

    async def detach(self) -> None:
        """Stop restarting supervisors; running supervisors and their calls continue."""
        self._active = None
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait({self._restarting})

    async def stop(self, deadline: float) -> None:
        """End all calls with the error ``shutdown``, then all supervisors; kill those that run after these seconds."""
        await self.detach()
        await asyncio.gather(*(self._client.shut_down(name, deadline) for name in self._client.socket_names()))
        exits = [child.exit_status for child in self._processes]
        for child in self._processes:  # still starting, without a socket
            child.process.kill()
        if exits:
            await asyncio.wait(exits)
        await self._client.remove_dead_sockets()


class SupervisorProcess:
    """The process of a supervisor. `stderr`: its descriptor; None: that of this process. Raises OSError.

    `harpd.supervisor.main` describes the lifeline.
    """

    def __init__(self, settings: dict[str, Any], reload_settings: _Settings, stderr: int | None) -> None:
        loop = asyncio.get_running_loop()
        self.started = time.monotonic()
        self.retired = False
        self._reload_settings = reload_settings
        self.instance: asyncio.Future[str] = loop.create_future()  #: Its instance id, once it is active.
        self.exit_status: asyncio.Future[int] = loop.create_future()
        self._lifeline, inherited = socket.socketpair()
        with inherited, os.fdopen(os.memfd_create("settings"), "w+b") as stdin:
            stdin.write(dumps(settings))
            stdin.seek(0)
            # -P: do not import modules from the working directory.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "harpd.supervisor.main", str(inherited.fileno())],
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(inherited.fileno(),),
                start_new_session=True,  # ^C in a terminal goes to the launcher, which then stops the supervisor
                env={name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},
            )
        loop.add_reader(self._lifeline, self._on_lifeline)

    def _on_lifeline(self) -> None:
        """Receive the instance id, or a request; or the end of the lifeline: the supervisor has exited."""
        try:
            received = self._lifeline.recv(_READ_SIZE)
        except ConnectionError:
            received = b""
        if received:
            for text in received.decode().split():
                if text == "reload":
                    self._send_settings()
                else:
                    self.instance.set_result(text)
            return
        asyncio.get_running_loop().remove_reader(self._lifeline)
        self._lifeline.close()
        self.exit_status.set_result(self.process.wait())

    def _send_settings(self) -> None:
        try:
            reply = self._reload_settings()
        except ConfigError as error:
            reply = {"error": str(error)}
        with suppress(OSError):  # it has died
            self._lifeline.sendall(dumps(reply) + b"\n")


async def run(config: SupervisorConfig, on_serving: Callable[[], None]) -> None:
    """Run the service until SIGTERM, SIGINT or SIGUSR1; call `on_serving` when a supervisor is active.

    Raises `ConfigError`: the runtime directory cannot be used; `SupervisorError`: the supervisor did not start.
    """
    runner = ServiceRunner()
    with runtime_directory(config, "launcher") as client:
        service = _SupervisorService(config, client, runner)
        await runner.run(service.start, service.reload, service.stop, on_serving)


class _SupervisorService:
    """The running service."""

    def __init__(self, config: SupervisorConfig, client: SupervisorClient, runner: ServiceRunner) -> None:
        self._config = config
        self._directory = client.directory
        background = config.options.daemon
        self._launcher = SupervisorLauncher(client, background, self._settings, self._reload_settings)
        self._runner = runner
        self._detaching = False  # whether supervisors continue after `stop`
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._detach)

    def _detach(self) -> None:
        self._detaching = True
        self._runner.stop_requested.set()

    def _settings(self) -> dict[str, Any]:
        """Return the settings from the files; if they are invalid, the last valid settings.

        The files are read each time, because a reload of the frontend changes the settings of the running supervisor.
        """
        try:
            self._config = load_supervisor_config(self._config.options)
        except ConfigError as error:
            log.error("invalid configuration; using the previous one", extra={"reason": str(error)})
        return self._config.supervisor_settings(self._directory, outlive=True)

    def _reload_settings(self) -> dict[str, Any]:
        """Return the settings from the files. Raises `ConfigError`."""
        self._config = load_supervisor_config(self._config.options)
        return self._config.supervisor_settings(self._directory, outlive=True)

    async def start(self) -> None:
        """Start the first supervisor. Raises `SupervisorError`."""
        await self._launcher.start()
        log.info("supervisor is serving")

    async def reload(self) -> None:
        """Replace the active supervisor. Raises `ConfigError` and `SupervisorError`."""
        old, new = self._config, load_supervisor_config(self._config.options)
        try:
            new.configure_log()
            await self._launcher.start()
        except BaseException:
            old.configure_log()
            raise
        log.info("reloaded")
        report_restart_needed(old.configuration, new.configuration, ["runtime_directory"])

    async def stop(self) -> None:
        """Stop the supervisors and all calls, which end with ``shutdown``; after SIGUSR1, both continue."""
        if self._detaching:
            await self._launcher.detach()
        else:
            await self._launcher.stop(2 * self._config.configuration.limits.kill_grace + STOP_MARGIN)
