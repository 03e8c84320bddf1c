"""The runtime directory, and the client of its supervisors: finds, connects to and controls them.

One supervisor is active: it accepts new calls, at the socket `ACTIVE_SOCKET`. During an upgrade or after a restart,
older supervisors still have calls. Each supervisor has its own socket, `SOCKET_PREFIX` + INSTANCE. A socket that
refuses connections belongs to a dead supervisor.

Connections are plain sockets, not asyncio streams: data that a supervisor sent before its death can be read after it.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from harp.protocol.harpd import CallList
from harp.protocol.json_text import InvalidJSON, dumps, loads
from harp.protocol.schema import ProtocolError
from harp_daemon.settings import ConfigError
from harp_daemon.sockets import peer_process
from harpd.config.loaded import SupervisorConfig
from harpd.supervisor.listener import ACTIVE_SOCKET, SOCKET_PREFIX
from harpd.supervisor.runtime_directory import (
    FRONTEND_DIRECTORY,
    check_runtime_directory,
    default_runtime_directory,
    identify,
    is_open,
    open_existing_directory,
    open_runtime_directory,
)

T = TypeVar("T")

log = logging.getLogger("harpd.control")

#: Seconds that a call waits for a supervisor that is starting: less than the dispatcher waits for harpd.
_START_TIMEOUT = 5.0
#: Seconds for a reply that needs no work.
REPLY_TIMEOUT = 10.0
#: Seconds between two attempts: while a supervisor is starting, and while its backlog of connections is full.
_RETRY_INTERVAL, _BACKLOG_INTERVAL = 0.02, 0.01
#: Seconds without a change of the directory after which the socket of no running supervisor is missing: two of the
#: intervals in which a supervisor looks after its own.
_SETTLING_TIME = 2.0
#: Seconds for the exit of a process after SIGKILL.
_KILL_TIMEOUT = 10.0
_READ_SIZE = 64 * 1024
#: Most bytes of a reply.
_MAX_REPLY_BYTES = 64 * 1024 * 1024


class SupervisorError(Exception):
    """The supervisor cannot be reached, or it rejected the request. The message gives the reason."""


class SupervisorNotRunning(SupervisorError):
    """No process listens at the supervisor's socket, or it died before it replied."""


class SupervisorClient:
    """The client of one runtime directory; a context manager that closes it. Raises `SupervisorError`.

    The directory is created if `create` is set. A subclass may open and recognise the directory in another way.
    """

    def __init__(self, directory: Path, create: bool = True) -> None:
        self.directory = directory
        # Sockets are opened through this descriptor, because the address of a Unix socket has at most 107 bytes.
        try:
            if create:
                os.close(open_runtime_directory(directory))
            self._descriptor = self._open_directory()
        except OSError as error:
            raise SupervisorError(f"runtime_directory: {directory}: {error.strerror}") from error

    def _open_directory(self) -> int:
        """Return a descriptor of the directory. Raises OSError.

        A missing one is left to the supervisor, which may have another user than this process.
        """
        return open_existing_directory(self.directory)

    def _is_current(self) -> bool:
        """Return whether the directory has its path still."""
        return is_open(self.directory, self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def _follow_directory(self) -> None:
        """Use the directory that has the path now, if the supervisor had to create it again."""
        if not self._is_current():
            with suppress(OSError):
                descriptor = self._open_directory()
                os.dup2(descriptor, self._descriptor, inheritable=False)
                os.close(descriptor)

    def socket_names(self) -> list[str]:
        """Return the names of all supervisors' own sockets, including those of dead supervisors."""
        self._follow_directory()
        names = os.listdir(self._descriptor)
        return sorted(name for name in names if name.startswith(SOCKET_PREFIX) and "." not in name)

    def version(self) -> tuple[int, int]:
        """Return the version of the directory, which changes with each socket that is created or removed."""
        self._follow_directory()
        status = os.fstat(self._descriptor)
        return status.st_ino, status.st_mtime_ns

    async def confirm(self, version: tuple[int, int]) -> bool:
        """Return True if the sockets of this version of the directory were those of all running supervisors.

        Otherwise return False when it is time to ask again. After a clean-up of the directory, each supervisor creates
        its socket again at its own time; before, no list shows that it runs.
        """
        current = self.version()
        age = abs(time.time() - current[1] / 1e9)  # the clock may have been set
        if current == version and age >= _SETTLING_TIME:
            return True
        await asyncio.sleep(max(_SETTLING_TIME - age, 0))
        return False

    def identify(self, name: str = ACTIVE_SOCKET) -> tuple[int, int] | None:
        """Return what identifies a supervisor's socket, the same for both names of the active one; None: no socket."""
        return identify(name, self._descriptor)

    async def connect(self, name: str = ACTIVE_SOCKET) -> socket.socket:
        """Return a non-blocking connection to a supervisor. Raises `SupervisorNotRunning` and `SupervisorError`."""
        with ExitStack() as closing:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            closing.enter_context(connection)
            try:
                async with asyncio.timeout(REPLY_TIMEOUT):
                    # While the backlog is full, connect(2) returns EAGAIN. The event loop's `sock_connect` handles that
                    # as a connection in progress.
                    while True:
                        number = connection.connect_ex(f"/proc/self/fd/{self._descriptor}/{name}")
                        if number != errno.EAGAIN:
                            break
                        await asyncio.sleep(_BACKLOG_INTERVAL)
            except TimeoutError as error:
                raise SupervisorError("cannot connect to the supervisor: too many connections are waiting") from error
            if number in (errno.ENOENT, errno.ECONNREFUSED):
                self._follow_directory()
                raise SupervisorNotRunning("the supervisor does not run")
            if number:
                raise SupervisorError(f"cannot connect to the supervisor: {os.strerror(number)}")
            closing.pop_all()
        return connection

    async def remove_dead_sockets(self) -> None:
        """Remove the sockets of dead supervisors. Only the launcher calls it, while no supervisor is starting."""
        await self._remove_dead_sockets()
        directory = self.directory / FRONTEND_DIRECTORY
        with suppress(SupervisorError):
            if directory.is_dir():
                with SupervisorClient(directory) as client:
                    await client._remove_dead_sockets()

    async def names_without_frontend(self) -> list[str]:
        """Return the names of running supervisors that have no socket for a frontend of another user."""
        directory = self.directory / FRONTEND_DIRECTORY
        have = set(os.listdir(directory)) if directory.is_dir() else set()
        found = []
        for name in self.socket_names():
            if name not in have:
                with suppress(SupervisorError):
                    (await self.connect(name)).close()
                    found.append(name)
        return found

    async def _remove_dead_sockets(self) -> None:
        for name in os.listdir(self._descriptor):
            if name == ACTIVE_SOCKET or name.startswith(SOCKET_PREFIX):
                try:
                    (await self.connect(name)).close()
                except SupervisorNotRunning:
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=self._descriptor)
                except SupervisorError:
                    pass  # the supervisor lives, but cannot accept now

    async def request(
        self, request: dict[str, Any], deadline: float = REPLY_TIMEOUT, name: str = ACTIVE_SOCKET
    ) -> dict[str, Any]:
        """Send a request to the supervisor of a socket; return the reply. Spec: harpd.supervisor.main.

        Raises `SupervisorNotRunning`; `SupervisorError`: it is an error, or missing after `deadline` seconds.
        """
        loop = asyncio.get_running_loop()
        line = bytearray()
        with await self.connect(name) as connection:
            try:
                async with asyncio.timeout(deadline):
                    await loop.sock_sendall(connection, dumps(request) + b"\n")
                    while not line.endswith(b"\n"):
                        data = await loop.sock_recv(connection, _READ_SIZE)
                        line += data
                        if not data or len(line) > _MAX_REPLY_BYTES:
                            raise ConnectionResetError
                reply = loads(bytes(line))
            except TimeoutError as error:
                raise SupervisorError(f"the supervisor did not reply within {deadline:g} s") from error
            except OSError as error:
                raise SupervisorNotRunning("the supervisor sent no reply: it died") from error
            except InvalidJSON as error:
                raise SupervisorError(f"the supervisor sent no reply: {error}") from error
        if not isinstance(reply, dict) or "error" in reply:
            raise SupervisorError(str(reply["error"] if isinstance(reply, dict) else reply))
        return reply

    async def request_all(self, command: str) -> list[dict[str, Any]]:
        """Send a control command to every running supervisor; return the replies. Raises `SupervisorError`."""
        replies = []
        for name in self.socket_names():
            with suppress(SupervisorNotRunning):
                replies.append(await self.request({"control": command}, name=name))
        return replies

    async def read_metrics(self) -> list[dict[str, Any]]:
        """Return the numbers of every running supervisor. Raises `SupervisorError`.

        A supervisor of an earlier version has none: it closes the connection.
        """
        found = []
        for name in self.socket_names():
            with suppress(SupervisorNotRunning):
                reply = await self.request({"metrics": True}, name=name)
                if isinstance(numbers := reply.get("metrics"), dict):
                    found.append(numbers)
        return found

    async def list_calls(self, owner: str) -> CallList:
        """Return the owner's calls in all supervisors, and the instance of the active supervisor.

        Raises `SupervisorError`: no supervisor is active, or one sends no reply. Starts wait for the list, so it is not
        confirmed: from a call that is missing, the dispatcher concludes nothing.
        """
        active = await retry_until_active(partial(self._calls_of, ACTIVE_SOCKET, owner))
        calls = dict.fromkeys(active.calls)
        for name in {*self.socket_names()} - {SOCKET_PREFIX + active.instance}:
            with suppress(SupervisorNotRunning):
                calls |= dict.fromkeys((await self._calls_of(name, owner)).calls)
        return CallList(tuple(calls), active.instance)

    async def _calls_of(self, name: str, owner: str) -> CallList:
        """Return the owner's calls in one supervisor. Raises `SupervisorError`."""
        reply = await self.request({"calls": owner}, name=name)
        try:
            return CallList(tuple(reply["calls"]), reply["instance"])
        except (KeyError, TypeError, ProtocolError) as error:
            raise SupervisorError(f"invalid list of calls from the supervisor: {error!r}") from error

    async def shut_down(self, name: str, deadline: float) -> None:
        """Stop a supervisor and its calls with the error ``shutdown``; kill it after `deadline` seconds."""
        with ExitStack() as closing:
            try:
                connection = closing.enter_context(await self.connect(name))
                pid, _ = peer_process(connection)
                process = os.pidfd_open(pid)  # it never refers to a later process
            except (SupervisorError, ProcessLookupError):
                return
            closing.callback(os.close, process)
            try:
                async with asyncio.timeout(deadline):
                    with suppress(OSError):
                        connection.send(b'{"control":"shutdown"}\n')
                    await _wait_for_exit(process)
            except TimeoutError:
                log.error("supervisor did not stop; killing it", extra={"supervisor": name})
                with suppress(ProcessLookupError, TimeoutError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    async with asyncio.timeout(_KILL_TIMEOUT):
                        await _wait_for_exit(process)


async def retry_until_active(attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeat an attempt that finds no supervisor, for at most `_START_TIMEOUT` seconds. Raises `SupervisorError`."""
    try:
        async with asyncio.timeout(_START_TIMEOUT):
            while True:
                with suppress(SupervisorNotRunning):
                    return await attempt()
                await asyncio.sleep(_RETRY_INTERVAL)
    except TimeoutError as error:
        hint = "the log of harpd shows why"
        raise SupervisorError(f"no supervisor has accepted the call within {_START_TIMEOUT:g} s; {hint}") from error


async def _wait_for_exit(pidfd: int) -> None:
    """Wait until the process of a pidfd has exited."""
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    loop.add_reader(pidfd, exited.set)
    try:
        await exited.wait()
    finally:
        loop.remove_reader(pidfd)


def find_runtime_directory(configured: str | None, file: Path) -> Path:
    """Return the configured or default directory, by which programs find each other. Raises `ConfigError`."""
    found = default_runtime_directory() if configured is None else Path(configured)
    if found is None:
        hint = "frontend and supervisor find each other by it, and XDG_RUNTIME_DIR is not set"
        raise ConfigError(f"{file}: runtime_directory: missing; {hint}")
    return found.absolute()


def check_directory(configured: str | None, file: Path) -> None:
    """Raise `ConfigError` if the configured or default directory cannot be used by `runtime_directory`."""
    if configured is None and default_runtime_directory() is None:
        return  # it is a temporary directory
    path = find_runtime_directory(configured, file)
    try:
        check_runtime_directory(path)
    except OSError as error:
        raise ConfigError(f"{file}: runtime_directory: {path}: {error.strerror}") from error


@contextmanager
def runtime_directory(config: SupervisorConfig, *roles: str) -> Iterator[SupervisorClient]:
    """Create the directory of sockets and state files if it is missing, and lock it; yield the client for it.

    If none is configured, and this user has no default one, it is a temporary directory, which is removed at the end.
    `roles`: ``frontend``, ``launcher`` or both: those of this program. Each has a lock file. Raises `ConfigError`, also
    if a running program has the role.
    """
    configured = config.configuration.runtime_directory
    with ExitStack() as closing:
        if configured is None and default_runtime_directory() is None:
            configured = tempfile.mkdtemp(prefix="harpd-")
            closing.callback(shutil.rmtree, configured, ignore_errors=True)
        path = find_runtime_directory(configured, config.options.config)
        where = f"{config.options.config}: runtime_directory: {path}"
        try:
            client = closing.enter_context(SupervisorClient(path))
            for role in roles:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                descriptor = os.open(path / f"{role}.lock", flags, 0o600)
                closing.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "set another runtime_directory for a second one"
            raise ConfigError(f"{where}: used by another running harpd; {hint}") from error
        except SupervisorError as error:
            raise ConfigError(f"{config.options.config}: {error}") from error
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}") from error
        yield client
