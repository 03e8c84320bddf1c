"""Runs the frontend in a process of its own, as another user. This process, the *monitor*, stays root.

The frontend reads what strangers send, so it has no rights: `harpd.processes.capabilities`. It inherits the listening
sockets from the monitor, and two socket pairs. Messages are JSON objects, one in each packet:

    commands, monitor -> frontend, each with one reply, {"ok": true} or {"error": MESSAGE}
        {"start": OPTIONS, "background": BOOL}, with the listening sockets    load all files, and accept connections
        {"prepare": true}                       load all files again
        {"commit": true} or {"abort": true}     use what was loaded, or discard it
        {"begin_stop": BOOL}                    accept no more connections; whether the supervisor stops, too
        {"finish_stop": SECONDS}                wait for the last replies, and exit
    requests, frontend -> monitor, each with one reply, {"id": NUMBER} and a descriptor, or "error": ERRNO
        {"id": NUMBER, "open": PATH}            a file of the configuration, for reading
        {"id": NUMBER, "directory": true}       the directory with the sockets of supervisors

So key and users file need not be readable by the frontend's user, and a reload reads the files of that time. Of all
files, the monitor opens only those that the configuration names: the frontend has their contents in any case.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from harp.protocol.json_text import InvalidJSON, dumps, loads
from harp_daemon import logs
from harp_daemon.process import describe_exit
from harp_daemon.settings import ConfigError
from harp_daemon.sockets import Listener
from harp_daemon.timer_wheel import Backoff
from harp_daemon.unix_sockets import UnixSocket
from harpd.config.loaded import CommandLine, SupervisorConfig
from harpd.processes.cgroup import Cgroup
from harpd.supervisor.runtime_directory import open_frontend_directory

log = logging.getLogger("harpd.frontend")

#: Seconds for the reply to a command; loading the files may take as long.
_REPLY_TIMEOUT = 60.0
#: Seconds for the exit after its sockets were closed.
_EXIT_TIMEOUT = 5.0
#: Seconds between two starts of a frontend that dies: the first delay, and the longest.
_MIN_DELAY, _MAX_DELAY = 0.1, 30.0
#: A frontend that ran this many seconds resets the delay.
_STABLE_TIME = 10.0
#: How often, and after how many seconds each, processes that a frontend has left are looked for.
_LEFT_CHECKS, _LEFT_INTERVAL = 10, 0.1
#: The most bytes of a message.
MAX_MESSAGE_BYTES = 1 << 16


class FrontendDied(Exception):
    """The process has exited. The message describes how."""


class SeparateFrontend:
    """The frontend in a process of another user, which is started again when it dies.

    `identity`: the user and the group; `directory`: the runtime directory; `service`: the cgroup in which there are
    this process and those of the frontend only.
    """

    def __init__(
        self,
        config: SupervisorConfig,
        identity: tuple[int, int],
        directory: Path,
        listeners: list[Listener],
        service: Cgroup | None = None,
    ) -> None:
        self._config = config
        self._prepared: SupervisorConfig | None = None
        self._identity = identity
        self._directory = directory
        self._listeners = listeners
        self._service = service
        self._process: _FrontendProcess | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._stopping = False
        self._started_at = 0.0
        self._backoff = Backoff(_MIN_DELAY, _MAX_DELAY)

    async def start(self) -> None:
        """Start the process; return when it accepts connections. Raises `ConfigError`."""
        try:
            await self._launch()
        except FrontendDied as error:
            raise ConfigError(f"{self._config.options.config}: frontend_user: {error}") from error

    async def _launch(self) -> None:
        options = self._config.options
        process = _FrontendProcess(self._identity, options.daemon, self._open, self._on_exit)
        start = {"start": _encode_options(options)}
        try:
            await process.request(start, descriptors=[listener.socket.fileno() for listener in self._listeners])
            process.check()
        except BaseException:
            await process.end()
            raise
        self._process = process
        self._started_at = time.monotonic()

    def _on_exit(self, process: _FrontendProcess, status: int) -> None:
        if process is self._process:
            self._process = None
            if not self._stopping:
                log.error("frontend died", extra={"status": describe_exit(status)})
                if time.monotonic() - self._started_at > _STABLE_TIME:
                    self._backoff.reset()
                self._restarting = asyncio.create_task(self._restart_until_ready())

    async def _restart_until_ready(self) -> None:
        while self._process is None:
            delay = self._backoff.next_delay()
            await asyncio.sleep(delay)
            self._backoff.record_attempt()
            await self._end_left_processes()
            try:
                await self._launch()
            except (ConfigError, FrontendDied, OSError) as error:
                log.error("cannot start frontend; retrying", extra={"reason": str(error)})

    async def _end_left_processes(self) -> None:
        """End this service if a frontend has left processes, which its successor would share its rights with.

        The service manager then kills them all, and starts the service again.
        """
        for _ in range(_LEFT_CHECKS):  # a command of the service manager ends soon
            if self._service is None or self._service.pids() <= {os.getpid()}:
                return
            await asyncio.sleep(_LEFT_INTERVAL)
        log.error("frontend has left processes; exiting")
        logs.flush()
        os._exit(1)

    async def prepare(self, config: SupervisorConfig) -> None:
        """Have it load a configuration. Raises `ConfigError`."""
        self._prepared = config
        await self._command({"prepare": True})

    async def commit(self) -> None:
        """Have it use the prepared configuration for new connections."""
        assert self._prepared is not None
        self._config, self._prepared = self._prepared, None
        with suppress(ConfigError):  # it has died, and the next one loads the files
            await self._command({"commit": True})

    async def abort(self) -> None:
        """Have it discard the prepared configuration."""
        self._prepared = None
        with suppress(ConfigError):
            await self._command({"abort": True})

    async def _command(self, message: dict[str, Any], deadline: float = _REPLY_TIMEOUT) -> None:
        try:
            if self._process is None:
                raise FrontendDied("the frontend does not run")
            await self._process.request(message, deadline)
        except FrontendDied as error:
            raise ConfigError(str(error)) from error

    async def begin_stop(self, supervisor_stops: bool) -> None:
        """Have it accept no more connections."""
        self._stopping = True
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait([self._restarting])
        for listener in self._listeners:
            listener.close()
        with suppress(ConfigError):
            await self._command({"begin_stop": supervisor_stops}, _EXIT_TIMEOUT)

    async def finish_stop(self, deadline: float) -> None:
        """Wait until it has exited, for about this number of seconds; then kill it."""
        process = self._process
        if process is not None:
            with suppress(ConfigError):
                await self._command({"finish_stop": deadline}, deadline + _EXIT_TIMEOUT)
            await process.end()

    def _open(self, request: dict[str, Any]) -> int:
        """Return the descriptor that the frontend requests. Raises OSError."""
        if "directory" in request:
            return open_frontend_directory(self._directory)
        path = request["open"]
        if path not in {name for config in (self._config, self._prepared) for name in _files_of(config)}:
            raise PermissionError(errno.EACCES, "not a file of the configuration")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)


def _files_of(config: SupervisorConfig | None) -> Iterable[str]:
    """Return the paths of the files that the frontend may read."""
    if config is None:
        return ()
    options, configuration = config.options, config.configuration
    names = options.config, options.logging, configuration.network.certfile, configuration.network.keyfile
    users = configuration.authentication.get("file")
    return [str(Path(name)) for name in (*names, users) if isinstance(name, (str, Path))]


def _encode_options(options: CommandLine) -> dict[str, Any]:
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


class _FrontendProcess:
    """The process. `open_file` returns a descriptor for a request; it raises OSError. Raises OSError."""

    def __init__(
        self,
        identity: tuple[int, int],
        background: bool,
        open_file: Callable[[dict[str, Any]], int],
        on_exit: Callable[[_FrontendProcess, int], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._open_file = open_file
        self._notify_exit = on_exit
        self._replies: list[asyncio.Future[None]] = []  # in the order of their commands
        self._ending: asyncio.Task[None] | None = None  # after invalid messages, or the end of its sockets
        own, commands = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._commands = UnixSocket(own)  # what the frontend sends is not trusted
        own, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests = UnixSocket(own)
        passed = (commands.fileno(), requests.fileno())
        with commands, requests:
            # -P: do not import modules from the working directory. It gives up root itself, before it reads anything:
            # so it need not be able to read the files of Python.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "harpd.frontend.process", *map(str, (*passed, *identity, os.getpid()))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if background else None,
                pass_fds=passed,
                start_new_session=True,  # ^C in a terminal goes to this process, which then stops the frontend
                env={name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},
            )
        self._exited = asyncio.Event()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)
        for own, on_readable in ((self._commands, self._on_reply), (self._requests, self._on_request)):
            own.setblocking(False)
            self._loop.add_reader(own, on_readable)

    async def request(
        self, message: dict[str, Any], deadline: float = _REPLY_TIMEOUT, descriptors: Iterable[int] = ()
    ) -> None:
        """Send a command; return when it is done. Raises `ConfigError` and `FrontendDied`."""
        reply: asyncio.Future[None] = self._loop.create_future()
        try:
            socket.send_fds(self._commands, [dumps(message)], [*descriptors])
        except OSError as error:
            raise FrontendDied("the frontend has exited") from error
        self._replies.append(reply)
        try:
            async with asyncio.timeout(deadline):
                await asyncio.shield(reply)
        except TimeoutError as error:
            raise ConfigError(f"the frontend did not reply within {deadline:g} s") from error

    def check(self) -> None:
        """Raise `FrontendDied` if it has exited."""
        if self._exited.is_set():
            raise FrontendDied("the frontend exited after its start; its log shows why")

    def _on_reply(self) -> None:
        try:
            data = self._commands.recv(MAX_MESSAGE_BYTES)
            reply = loads(data) if data else None
        except BlockingIOError:
            return
        except (OSError, InvalidJSON):
            reply = None
        if not isinstance(reply, dict) or not self._replies:  # the process exits, or it was taken over
            self._close()
            self._ending = self._loop.create_task(self.end())
            return
        future = self._replies.pop(0)
        if "error" in reply:
            future.set_exception(ConfigError(str(reply["error"])))
            future.exception()  # perhaps nobody waits for it any more
        else:
            future.set_result(None)

    def _on_request(self) -> None:
        """Handle one request. What the frontend sends is not trusted."""
        try:
            request = loads(self._requests.recv(MAX_MESSAGE_BYTES) or b"null")
            if not isinstance(request, dict) or type(request.get("id")) is not int:
                raise InvalidJSON("expected an object with an id")
        except BlockingIOError:
            return
        except (OSError, InvalidJSON):
            self._close()
            self._ending = self._loop.create_task(self.end())
            return
        with suppress(OSError):  # it has died, or does not read
            try:
                descriptor = self._open_file(request)
            except (OSError, KeyError, TypeError, ValueError) as error:
                number = error.errno if isinstance(error, OSError) else errno.EINVAL
                self._requests.send(dumps({"id": request["id"], "error": number}))
            else:
                try:
                    socket.send_fds(self._requests, [dumps({"id": request["id"]})], [descriptor])
                finally:
                    os.close(descriptor)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._process.wait()
        self._close()
        self._exited.set()
        died = FrontendDied(f"the frontend exited early ({describe_exit(status)}); its log shows why")
        for future in self._replies:
            if not future.done():
                future.set_exception(died)
                future.exception()
        self._replies.clear()
        self._notify_exit(self, status)

    async def end(self) -> None:
        """Have it exit, if it still runs, and wait for that; kill it if it takes too long."""
        self._close()
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT):
                await self._exited.wait()
        except TimeoutError:
            log.error("frontend did not stop; killing it")
            self._kill()
            await self._exited.wait()

    def _kill(self) -> None:
        try:
            self._process.kill()
        except ProcessLookupError:
            pass
        except PermissionError:  # without CAP_KILL, as in the shipped unit, whose service manager kills what is left
            log.error("cannot kill frontend; exiting")
            logs.flush()
            os._exit(1)

    def _close(self) -> None:
        """Close the sockets, whereupon it exits."""
        for own in (self._commands, self._requests):
            if own.fileno() >= 0:
                self._loop.remove_reader(own)
                own.close()
