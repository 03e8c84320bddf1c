"""The client of the supervisors of a runtime directory: finds, connects to and controls them.

One supervisor is active: it accepts new calls, at the socket `ACTIVE_SOCKET`. During an upgrade or after a restart,
older supervisors still hold calls. Each supervisor has its own socket, `SOCKET_PREFIX` + INSTANCE. A socket that
refuses connections belongs to a dead supervisor.

Connections are plain sockets, not asyncio streams: data that a supervisor sent before its death can be read after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import CallList, decode_message
from harp.protocol.json_text import InvalidJSON, dumps, loads
from harp_daemon.sockets import peer_process
from harpd.supervisor.listener import ACTIVE_SOCKET, SOCKET_PREFIX

T = TypeVar("T")

log = logging.getLogger("harpd.control")

#: Seconds that a call waits for a supervisor that is starting: less than the dispatcher waits for harpd.
_START_TIMEOUT = 5.0
#: Seconds for a reply that needs no work.
REPLY_TIMEOUT = 10.0
#: Seconds between two attempts: while a supervisor is starting, and while its backlog of connections is full.
_RETRY_INTERVAL, _BACKLOG_INTERVAL = 0.02, 0.01
#: Seconds for the exit of a process after SIGKILL.
_KILL_TIMEOUT = 10.0

_READ_SIZE = 64 * 1024
#: Seconds between two status requests while the last calls end.
_DRAIN_INTERVAL = 0.2
#: Most bytes of a reply.
_MAX_REPLY_BYTES = 64 * 1024 * 1024


class SupervisorError(Exception):
    """The supervisor cannot be reached, or it rejected the request. The message gives the reason."""


class SupervisorNotRunning(SupervisorError):
    """No process listens at the supervisor's socket."""


class SupervisorDied(Exception):
    """The connection to the supervisor broke: the supervisor is dead."""


class SupervisorConnection:
    """A connection to a supervisor; a context manager that closes it.

    Args:
        connection: the non-blocking socket, connected.
    """

    def __init__(self, connection: socket.socket) -> None:
        #: The name of the supervisor's own socket, also if it was found as `ACTIVE_SOCKET`.
        self.socket_name = os.path.basename(connection.getpeername())
        self.socket = connection
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        """Send all data. Raises `SupervisorDied`."""
        try:
            await self._loop.sock_sendall(self.socket, data)
        except OSError as error:
            raise SupervisorDied from error

    async def receive(self) -> bytes:
        """Receive some bytes; return b"" when the supervisor has closed. Raises `SupervisorDied`."""
        try:
            return await self._loop.sock_recv(self.socket, _READ_SIZE)
        except OSError as error:
            raise SupervisorDied from error

    async def exchange(self, request: bytes, deadline: float) -> bytes:
        """Send a request; return the data received until the first line of the reply is complete.

        Raises:
            SupervisorDied: it died, or the line is too long.
            SupervisorError: the line is not complete after this number of seconds.
        """
        received = bytearray()
        try:
            async with asyncio.timeout(deadline):
                await self.send(request)
                while b"\n" not in (data := await self.receive()):
                    received += data
                    if not data or len(received) > _MAX_REPLY_BYTES:
                        raise SupervisorDied
        except TimeoutError as error:
            raise SupervisorError(f"the supervisor did not reply within {deadline:g} s") from error
        return bytes(received + data)

    def open_pidfd(self) -> int:
        """Return a pidfd of the supervisor's process, which never refers to a later process. Raises OSError."""
        pid, _ = peer_process(self.socket)
        return os.pidfd_open(pid)

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SupervisorClient:
    """The client of one runtime directory; a context manager that closes the directory.

    Args:
        directory: the runtime directory.

    Raises:
        SupervisorError: the directory cannot be opened.
    """

    def __init__(self, directory: Path) -> None:
        # Sockets are opened through this descriptor, because the address of a Unix socket has at most 107 bytes.
        try:
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise SupervisorError(f"runtime_directory: {directory}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._directory)

    # Sockets.

    def socket_names(self) -> list[str]:
        """Return the names of all supervisors' own sockets, including those of dead supervisors."""
        return sorted(
            name for name in os.listdir(self._directory) if name.startswith(SOCKET_PREFIX) and "." not in name
        )

    def inode(self, name: str = ACTIVE_SOCKET) -> int | None:
        """Return the inode of a socket, which is the same for both names of the active supervisor; None: no socket."""
        try:
            return os.stat(name, dir_fd=self._directory).st_ino
        except FileNotFoundError:
            return None

    async def remove_dead_sockets(self) -> None:
        """Remove the sockets of dead supervisors. Only the launcher calls it, while no supervisor is starting."""
        for name in os.listdir(self._directory):
            if name == ACTIVE_SOCKET or name.startswith(SOCKET_PREFIX):
                try:
                    (await self.connect(name)).close()
                except SupervisorNotRunning:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=self._directory)
                except SupervisorError:
                    pass  # the supervisor lives, but cannot accept now

    # One supervisor.

    async def connect(self, name: str = ACTIVE_SOCKET) -> SupervisorConnection:
        """Open a connection to a supervisor.

        Raises:
            SupervisorNotRunning: no process listens at the socket.
            SupervisorError: a process listens, but the connection fails.
        """
        with ExitStack() as closing:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            closing.enter_context(connection)
            try:
                async with asyncio.timeout(REPLY_TIMEOUT):
                    await _connect(connection, f"/proc/self/fd/{self._directory}/{name}")
            except (FileNotFoundError, ConnectionRefusedError) as error:
                raise SupervisorNotRunning("the supervisor does not run") from error
            except OSError as error:
                reason = error.strerror or "too many connections are waiting"
                raise SupervisorError(f"cannot connect to the supervisor: {reason}") from error
            closing.pop_all()
        return SupervisorConnection(connection)

    async def request(
        self, request: dict[str, Any], deadline: float = REPLY_TIMEOUT, name: str = ACTIVE_SOCKET
    ) -> dict[str, Any]:
        """Send a control request; return the reply.

        Args:
            request: the request, with the key ``control``.
            deadline: seconds for the reply.
            name: the supervisor's socket.

        Raises:
            SupervisorNotRunning: no process listens at the socket.
            SupervisorError: there is no reply, or it is an error.
        """
        try:
            with await self.connect(name) as connection:
                reply = loads(await connection.exchange(dumps(request) + b"\n", deadline))
        except (SupervisorDied, InvalidJSON) as error:
            raise SupervisorError(f"the supervisor sent no reply: {error}") from error
        if not isinstance(reply, dict) or "error" in reply:
            raise SupervisorError(str(reply["error"] if isinstance(reply, dict) else reply))
        return reply

    async def shut_down(self, name: str, deadline: float) -> None:
        """Stop a supervisor and all its calls, which end with the error ``shutdown``; kill it after the deadline.

        Args:
            name: the supervisor's socket; the supervisor may be dead.
            deadline: seconds for an orderly stop.
        """
        with ExitStack() as closing:
            try:
                connection = closing.enter_context(await self.connect(name))
                process = connection.open_pidfd()
            except (SupervisorError, ProcessLookupError):
                return
            closing.callback(os.close, process)
            try:
                async with asyncio.timeout(deadline):
                    with contextlib.suppress(SupervisorDied):
                        await connection.send(b'{"control":"shutdown"}\n')
                    await _wait_for_exit(process)
            except TimeoutError:
                log.error("supervisor did not stop; killing it", extra={"supervisor": name})
                with contextlib.suppress(ProcessLookupError, TimeoutError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    async with asyncio.timeout(_KILL_TIMEOUT):
                        await _wait_for_exit(process)

    # All supervisors.

    async def request_all(self, command: str) -> list[dict[str, Any]]:
        """Send a control command to every running supervisor; return the replies.

        Args:
            command: ``status``, ``drain`` or ``resume``; see `harpd.supervisor.main`.

        Raises:
            SupervisorError: a supervisor sent no reply.
        """
        replies = []
        for name in self.socket_names():
            with contextlib.suppress(SupervisorNotRunning):
                replies.append(await self.request({"control": command}, name=name))
        return replies

    async def wait_until_drained(self, deadline: float | None) -> bool:
        """Wait until no call runs and no dispatcher has a result to fetch.

        Args:
            deadline: most seconds to wait; None: no limit.

        Returns:
            False if calls remain after the deadline.

        Raises:
            SupervisorError: a supervisor sent no reply.
        """
        try:
            async with asyncio.timeout(deadline):
                while True:
                    if not any(status["calls"] + status["resumable"] for status in await self.request_all("status")):
                        return True
                    await asyncio.sleep(_DRAIN_INTERVAL)
        except TimeoutError:
            return False

    async def list_calls(self, owner: str) -> CallList:
        """Return the owner's calls in all supervisors, and the instance of the active supervisor.

        Raises:
            SupervisorError: no supervisor is active, or one sends no reply. An incomplete list is not returned: the
                dispatcher would take the missing calls for ended ones.
        """
        request = dumps({"calls": owner}) + b"\n"
        active = await retry_until_active(partial(self._calls_of, ACTIVE_SOCKET, request))
        calls = dict.fromkeys(active.calls)
        for name in {*self.socket_names()} - {SOCKET_PREFIX + active.instance}:
            with contextlib.suppress(SupervisorNotRunning, SupervisorDied):
                calls |= dict.fromkeys((await self._calls_of(name, request)).calls)
        return CallList(tuple(calls), active.instance)

    async def _calls_of(self, name: str, request: bytes) -> CallList:
        """Return the calls of one supervisor. Raises `SupervisorError` and `SupervisorDied`."""
        with await self.connect(name) as connection:
            line = await connection.exchange(request, REPLY_TIMEOUT)
        try:
            call_list = decode_message(line.removesuffix(b"\n"))
        except ProtocolError as error:
            raise SupervisorError(f"invalid list of calls from the supervisor: {error}") from error
        if not isinstance(call_list, CallList):
            raise SupervisorError("invalid list of calls from the supervisor")
        return call_list


async def _connect(connection: socket.socket, path: str) -> None:
    """Connect to a socket; wait while its backlog is full.

    The event loop's `sock_connect` cannot do it: it takes EAGAIN of a Unix socket for a connection in progress.
    """
    while True:
        try:
            connection.connect(path)
        except BlockingIOError:
            await asyncio.sleep(_BACKLOG_INTERVAL)
        else:
            return


async def retry_until_active(attempt: Callable[[], Awaitable[T]]) -> T:
    """Repeat an attempt that finds no supervisor, for at most `_START_TIMEOUT` seconds. Raises `SupervisorError`."""
    try:
        async with asyncio.timeout(_START_TIMEOUT):
            while True:
                with contextlib.suppress(SupervisorNotRunning, SupervisorDied):
                    return await attempt()
                await asyncio.sleep(_RETRY_INTERVAL)
    except TimeoutError as error:
        raise SupervisorError("the supervisor does not run; it is being restarted") from error


async def _wait_for_exit(pidfd: int) -> None:
    """Wait until the process of a pidfd has exited."""
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    loop.add_reader(pidfd, exited.set)
    try:
        await exited.wait()
    finally:
        loop.remove_reader(pidfd)
