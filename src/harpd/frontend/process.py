"""The process of a frontend that runs as another user than root. `harpd.frontend.monitor` has the protocol.

``python -m harpd.frontend.process COMMANDS REQUESTS UID GID PARENT`` inherits two sockets from the monitor. It starts
as root, imports its modules, and gives up all rights before it reads anything. It exits when the monitor does.
"""

from __future__ import annotations

import _strptime  # type: ignore[import-not-found]
import asyncio
import concurrent.futures.thread
import encodings.idna
import logging
import logging.config
import logging.handlers
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import harpd.auth.inconfig
import harpd.auth.passfile
from harp.protocol.json_text import dumps, loads
from harp_daemon import logs
from harp_daemon.event_loop import run
from harp_daemon.settings import ConfigError
from harp_daemon.sockets import Listener
from harpd.auth.files import Files
from harpd.config.loaded import CommandLine, LoadedConfig, load_config
from harpd.control.supervisor_client import SupervisorClient, SupervisorError
from harpd.frontend.authenticator import BoundedThreadPool, TaskFailed
from harpd.frontend.monitor import MAX_MESSAGE_BYTES
from harpd.frontend.server import FrontendServer
from harpd.processes.capabilities import become_unprivileged
from harpd.processes.prctl import die_with_parent

log = logging.getLogger("harpd.frontend")

#: Modules that are otherwise loaded when they are needed: the user may be unable to read the files of Python then.
PRELOADED = (
    _strptime,
    concurrent.futures.thread,
    encodings.idna,
    harpd.auth.inconfig,
    harpd.auth.passfile,
    logging.handlers,
)

#: Seconds for loading the files: less than the monitor waits.
_LOAD_TIMEOUT = 55.0
#: Seconds for a reply of the monitor.
_REQUEST_TIMEOUT = 5.0
_MAX_LISTENERS = 64


class MonitorFiles(Files):
    """The files of the configuration, which the monitor opens. The methods may be called in any thread."""

    def __init__(self, requests: socket.socket) -> None:
        requests.settimeout(_REQUEST_TIMEOUT)
        self._requests = requests
        self._lock = threading.Lock()
        self._last_id = 0

    def open(self, path: Path) -> int:
        """Return a descriptor for reading a file."""
        return self._request({"open": str(path)})

    def open_directory(self) -> int:
        """Return a descriptor of the directory with the sockets of supervisors."""
        return self._request({"directory": True})

    def stat(self, path: Path) -> os.stat_result:
        """Return the status of a file. A file in a directory that this user may search costs no request."""
        try:
            return os.stat(path)
        except PermissionError:
            descriptor = self.open(path)
            try:
                return os.fstat(descriptor)
            finally:
                os.close(descriptor)

    @contextmanager
    def readable_path(self, path: Path) -> Iterator[Path]:
        """Yield the path of a copy in memory: the descriptor of the monitor cannot be opened again."""
        content = self.read(path)
        with os.fdopen(os.memfd_create("file"), "wb", buffering=0) as copy:
            copy.write(content)
            yield Path(f"/proc/self/fd/{copy.fileno()}")

    def _request(self, message: dict[str, Any]) -> int:
        with self._lock:
            self._last_id += 1
            self._requests.send(dumps({"id": self._last_id, **message}))
            while True:  # earlier replies were too late
                data, descriptors, _, _ = socket.recv_fds(self._requests, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
                reply = loads(data or b'{"id":0}')
                if not data or reply["id"] == self._last_id:
                    break
                for descriptor in descriptors:
                    os.close(descriptor)
        if not descriptors:
            number = reply.get("error", 0)
            raise OSError(number, os.strerror(number))
        return descriptors[0]


class _MonitorClient(SupervisorClient):
    """The client of the supervisors, in the directory of sockets that the monitor opens."""

    def __init__(self, files: MonitorFiles) -> None:
        self._files = files
        super().__init__(Path("frontend"), create=False)

    def _open_directory(self) -> int:
        return self._files.open_directory()

    def _is_current(self) -> bool:
        return os.fstat(self._descriptor).st_nlink > 0


class _FrontendProcess:
    """The process: handles the commands of the monitor, one after another."""

    def __init__(self, commands: socket.socket, requests: socket.socket) -> None:
        self._commands = commands
        self._files = MonitorFiles(requests)
        self._received: asyncio.Queue[tuple[dict[str, Any], list[int]]] = asyncio.Queue()
        self._load_thread = BoundedThreadPool(1)
        self._config: LoadedConfig
        self._prepared: LoadedConfig | None = None
        self._server: FrontendServer

    async def run(self) -> None:
        """Handle the commands until the last one."""
        self._commands.setblocking(False)
        asyncio.get_running_loop().add_reader(self._commands, self._on_readable)
        while True:
            message, descriptors = await self._received.get()
            try:
                await self._handle(message, descriptors)
                reply: dict[str, Any] = {"ok": True}
            except (ConfigError, SupervisorError) as error:
                reply = {"error": str(error)}
            self._commands.send(dumps(reply))
            if "finish_stop" in message:
                return

    def _on_readable(self) -> None:
        data, descriptors, _, _ = socket.recv_fds(
            self._commands, MAX_MESSAGE_BYTES, _MAX_LISTENERS, socket.MSG_CMSG_CLOEXEC
        )
        if not data:  # the monitor has exited
            logs.flush()
            os._exit(1)
        self._received.put_nowait((loads(data), descriptors))

    async def _handle(self, message: dict[str, Any], descriptors: list[int]) -> None:
        """Handle a command. Raises `ConfigError` and `SupervisorError`."""
        match message:
            case {"start": options}:
                self._options = _decode_options(options)
                self._config = await self._load()
                self._config.configure_log()
                listeners = [Listener(socket.socket(fileno=descriptor)) for descriptor in descriptors]
                self._server = FrontendServer(self._config, _MonitorClient(self._files), listeners)
                self._server.open()
            case {"prepare": _}:
                self._prepared = await self._load()
                try:
                    self._prepared.configure_log()
                except ConfigError:
                    self._config.configure_log()
                    raise
            case {"commit": _}:
                if self._prepared is not None:
                    self._config, self._prepared = self._prepared, None
                    self._server.apply(self._config)
            case {"abort": _}:
                if self._prepared is not None:
                    self._prepared = None
                    self._config.configure_log()
            case {"begin_stop": supervisor_stops}:
                self._server.begin_stop(supervisor_stops)
            case {"finish_stop": deadline}:
                await self._server.finish_stop(deadline)

    async def _load(self) -> LoadedConfig:
        try:
            return await self._load_thread.run(partial(load_config, self._options, self._files), _LOAD_TIMEOUT)
        except TimeoutError as error:
            raise ConfigError(f"{self._options.config}: loading took longer than {_LOAD_TIMEOUT:g} s") from error
        except TaskFailed as error:
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from None
            raise ConfigError(f"{self._options.config}: loading failed: {error.__cause__!r}") from error


def _decode_options(options: dict[str, Any]) -> CommandLine:
    paths = ("config", "procedures", "logging", "pidfile")
    decoded = {name: Path(options[name]) if options[name] is not None else None for name in paths}
    return CommandLine(**{**options, **decoded, "search_path": tuple(options["search_path"])})


def main() -> NoReturn:
    """Run the frontend."""
    commands, requests, uid, gid, parent = map(int, sys.argv[1:])
    for descriptor in (commands, requests):
        os.set_inheritable(descriptor, False)
    become_unprivileged(uid, gid)
    die_with_parent(parent)  # after the change of user, which would undo it
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the monitor handles signals to all of harpd
        signal.signal(number, signal.SIG_IGN)
    sys.setrecursionlimit(10_000)  # values may be nested as deeply as the protocol allows
    run(_FrontendProcess(socket.socket(fileno=commands), socket.socket(fileno=requests)).run())
    logs.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
