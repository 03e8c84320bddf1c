"""The supervisors of a runtime directory: how they are found, reached and asked.

There is one that takes new calls, at the socket ``warden``; and while an upgrade is under way, or after a restart,
older ones that hold calls still. Each has a socket of its own, ``warden-INCARNATION``. A socket that refuses
connections is a dead supervisor's. What one of them holds, the others don't know: so who looks for a call asks all, and
nobody is told "there is no such call" before every living supervisor has said so.

Connections are plain sockets and not streams: what a supervisor has said before it died can be read after its death.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import CallList, decode_message
from harp.protocol.json_text import InvalidJSON, dumps, loads
from harpd.supervisor.listener import ACTIVE_SOCKET, SOCKET_PREFIX

__all__ = [
    "ACTIVE_SOCKET",
    "AttachReply",
    "SupervisorClient",
    "SupervisorConnection",
    "SupervisorDied",
    "SupervisorError",
    "SupervisorNotRunning",
]

T = TypeVar("T")

log = logging.getLogger("harpd.control")

#: Seconds that a call waits for a supervisor that is being started: less than what a dispatcher waits for harpd.
_START_TIMEOUT = 5.0
#: Seconds for an answer that comes at once.
_REPLY_TIMEOUT = 10.0
#: Seconds between two looks for a supervisor that is being started, and while one has too many connections waiting.
_RETRY_INTERVAL, _BACKLOG_INTERVAL = 0.02, 0.01
#: Seconds for the death of a process that was killed.
_KILL_TIMEOUT = 10.0

_READ_SIZE = 64 * 1024
#: The most bytes of an answer.
_MAX_REPLY_BYTES = 64 * 1024 * 1024
_CREDENTIALS = struct.Struct("3i")


class SupervisorError(Exception):
    """The supervisor is not there, or refused. The message says why."""


class SupervisorNotRunning(SupervisorError):
    """Nobody listens at this socket."""


class SupervisorDied(Exception):
    """The supervisor's connection broke: the supervisor is dead."""


class SupervisorConnection:
    """A connection to a supervisor; a context manager that closes it.

    Args:
        connection: the socket, which does not block.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        """Send; return when the supervisor's socket has taken it all. Raises `SupervisorDied`."""
        try:
            await self._loop.sock_sendall(self._socket, data)
        except OSError as error:
            raise SupervisorDied from error

    async def receive(self) -> bytes:
        """Receive some bytes; b"" when the supervisor has closed. Raises `SupervisorDied`."""
        try:
            return await self._loop.sock_recv(self._socket, _READ_SIZE)
        except OSError as error:
            raise SupervisorDied from error

    async def receive_line(self) -> tuple[bytes, bytes]:
        """Return the first line, including its line feed, and the data after it. Raises `SupervisorDied`."""
        received, searched = bytearray(), 0
        while (end := received.find(b"\n", searched) + 1) == 0:
            searched = len(received)
            data = await self.receive()
            if not data or searched > _MAX_REPLY_BYTES:
                raise SupervisorDied
            received += data
        return bytes(received[:end]), bytes(received[end:])

    def finish_sending(self) -> None:
        """Say that nothing more will be sent. Raises `SupervisorDied`."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise SupervisorDied from error

    def open_pidfd(self) -> int:
        """Return a pidfd of the supervisor's process, which never refers to a later process. Raises OSError."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, _, _ = _CREDENTIALS.unpack(credentials)
        return os.pidfd_open(pid)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SupervisorClient:
    """The supervisors of one runtime directory; a context manager that lets go of it.

    Args:
        directory: the runtime directory.

    Raises:
        OSError: it can't be opened.
    """

    def __init__(self, directory: Path) -> None:
        # By way of the descriptor, for a socket's address has no more than 107 bytes.
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Who is there.

    def socket_names(self) -> list[str]:
        """The names of all supervisors' own sockets, dead ones' too."""
        return sorted(
            name for name in os.listdir(self._directory) if name.startswith(SOCKET_PREFIX) and "." not in name
        )

    def active_socket_inode(self) -> int | None:
        """The number of who takes new calls: another number, another supervisor. None: nobody does."""
        try:
            return os.stat(ACTIVE_SOCKET, dir_fd=self._directory).st_ino
        except FileNotFoundError:
            return None

    async def remove_dead_sockets(self) -> None:
        """Remove the sockets of dead supervisors. Only for who starts supervisors, and while none is being started."""
        for name in os.listdir(self._directory):
            if name == ACTIVE_SOCKET or name.startswith(SOCKET_PREFIX):
                try:
                    (await self.connect(name)).close()
                except SupervisorNotRunning:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=self._directory)
                except SupervisorError:
                    pass  # it lives, but is in trouble

    # One supervisor.

    async def connect(self, name: str = ACTIVE_SOCKET) -> SupervisorConnection:
        """Open a connection to a supervisor.

        Raises:
            NoWarden: nobody is there.
            SupervisorError: there is somebody, but no connection can be made.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            path = f"/proc/self/fd/{self._directory}/{name}"
            try:
                connection.connect(path)
            except BlockingIOError:
                await _retry_connect(connection, path)
            return SupervisorConnection(connection)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            connection.close()
            raise SupervisorNotRunning("the supervisor of the calls does not run") from error
        except OSError as error:
            connection.close()
            reason = error.strerror or "too many connections wait"
            raise SupervisorError(f"no connection to the supervisor of the calls: {reason}") from error
        except BaseException:
            connection.close()
            raise

    async def connect_active(self) -> SupervisorConnection:
        """Open a connection to the supervisor that takes new calls; wait a little for one that is being started.

        Raises:
            SupervisorError: there is none and none comes up.
        """
        return await _retry_until(self._try_connect)

    async def _try_connect(self) -> SupervisorConnection | None:
        with contextlib.suppress(SupervisorNotRunning):
            return await self.connect()
        return None

    async def request(
        self, request: Mapping[str, Any], deadline: float = _REPLY_TIMEOUT, name: str = ACTIVE_SOCKET
    ) -> dict[str, Any]:
        """Send a control request and return the answer.

        Args:
            request: the request, with the key ``control``.
            deadline: seconds for the answer.
            name: whom to ask.

        Raises:
            NoWarden: nobody is there.
            SupervisorError: no answer came, or it is an error.
        """
        try:
            line, _ = await self._exchange(name, dumps(dict(request)) + b"\n", deadline)
            answer = loads(line)
        except (SupervisorDied, InvalidJSON) as error:
            raise SupervisorError(f"the supervisor gave no answer: {error}") from error
        if not isinstance(answer, dict) or "error" in answer:
            raise SupervisorError(str(answer["error"] if isinstance(answer, dict) else answer))
        return answer

    async def _exchange(self, name: str, request: bytes, deadline: float) -> tuple[bytes, bytes]:
        with await self.connect(name) as connection:
            return await _exchange_line(connection, request, deadline)

    async def shut_down(self, name: str, deadline: float) -> None:
        """End a supervisor and all its calls, which end with the error ``shutdown``; kill it after the deadline.

        Args:
            name: whom to end; it may be dead already.
            deadline: seconds for an orderly end.
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
                    await connection.send(b'{"control":"shutdown"}\n')
                    await _wait_for_exit(process)
                    return
            except SupervisorDied:
                pass
            except TimeoutError:
                log.error("supervisor did not end in order; killed", extra={"supervisor": name})
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                async with asyncio.timeout(_KILL_TIMEOUT):
                    await _wait_for_exit(process)

    # All supervisors.

    async def request_all(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Send a control request to all running supervisors; return their replies. Raises `SupervisorError`."""
        answers = []
        for name in self.socket_names():
            with contextlib.suppress(SupervisorNotRunning):
                answers.append(await self.request(request, name=name))
        return answers

    async def list_calls(self, owner: str) -> CallList:
        """The owner's calls in all supervisors, and who takes new ones.

        Raises:
            SupervisorError: there is no supervisor, or one gives no answer: a list with a gap is worse than none.
        """
        request = dumps({"calls": owner}) + b"\n"
        current = await _retry_until(partial(self._calls_of, ACTIVE_SOCKET, request))
        calls = dict.fromkeys(current.calls)
        for name in self._other_sockets(current.instance):
            if (held := await self._calls_of(name, request)) is not None:
                calls |= dict.fromkeys(held.calls)
        return CallList(tuple(calls), current.instance)

    def _other_sockets(self, instance: str) -> list[str]:
        return [name for name in self.socket_names() if name != SOCKET_PREFIX + instance]

    async def _calls_of(self, name: str, request: bytes) -> CallList | None:
        """What one supervisor holds; None when it is dead."""
        try:
            line, _ = await self._exchange(name, request, _REPLY_TIMEOUT)
            held = decode_message(line[:-1])
        except (SupervisorNotRunning, SupervisorDied):
            return None
        except ProtocolError as error:
            raise SupervisorError(f"the supervisor gave no list: {error}") from error
        if not isinstance(held, CallList):
            raise SupervisorError("the supervisor gave no list")
        return held

    async def attach(self, request: bytes) -> AttachReply:
        """Find who holds a call.

        Args:
            request: the line that asks to attach.

        Returns:
            The reply of the supervisor that holds it; when there is none, of the one that takes new calls.

        Raises:
            SupervisorError: a supervisor did not reply, or the active one does not run. Then it is unknown whether the
                call exists.
        """
        return await _retry_until(partial(self._find_call, request))

    async def _find_call(self, request: bytes) -> AttachReply | None:
        """Ask each supervisor once; None when that leaves open who holds the call."""
        current = await self._try_attach(ACTIVE_SOCKET, request)
        if current is not None and current.not_found_by is None:
            return current
        with ExitStack() as closing:
            if current is not None:
                closing.enter_context(current.connection)
            for name in self._other_sockets(current.not_found_by or "" if current else ""):
                other = await self._try_attach(name, request)
                if other is not None and other.not_found_by is None:
                    return other
                if other is not None:
                    other.connection.close()
            closing.pop_all()
        return current

    async def _try_attach(self, name: str, request: bytes) -> AttachReply | None:
        """Ask one supervisor; None when it is dead."""
        with ExitStack() as closing:
            try:
                connection = closing.enter_context(await self.connect(name))
                line, more = await _exchange_line(connection, request, _REPLY_TIMEOUT)
            except (SupervisorNotRunning, SupervisorDied):
                return None
            closing.pop_all()
        return AttachReply(connection, line, more)


@dataclass(frozen=True, slots=True)
class AttachReply:
    """What has come so far on a connection that asks to attach.

    Attributes:
        connection: the connection, for the caller to close.
        line: its first line, line feed included.
        more: what has come after it.
    """

    connection: SupervisorConnection
    line: bytes
    rest: bytes

    @property
    def not_found_by(self) -> str | None:
        """The supervisor that says that there is no such call; None: it says something else."""
        with contextlib.suppress(ProtocolError):
            match decode_message(self.line[:-1]):
                case Failed("no_such_call", _, {"instance": str(supervisor)}):
                    return supervisor
        return None


async def _retry_connect(connection: socket.socket, path: str) -> None:
    """Connect to a socket whose backlog is full. The loop's own connect takes that for a connection under way."""
    async with asyncio.timeout(_REPLY_TIMEOUT):
        while True:
            try:
                connection.connect(path)
            except BlockingIOError:
                await asyncio.sleep(_BACKLOG_INTERVAL)
            else:
                return


async def _retry_until(attempt: Callable[[], Awaitable[T | None]]) -> T:
    """Try until there is an outcome, for as long as a call waits for a supervisor. Raises `SupervisorError`."""
    try:
        async with asyncio.timeout(_START_TIMEOUT):
            while True:
                if (outcome := await attempt()) is not None:
                    return outcome
                await asyncio.sleep(_RETRY_INTERVAL)
    except TimeoutError as error:
        raise SupervisorError("the supervisor of the calls does not run; it is being started again") from error


async def _exchange_line(connection: SupervisorConnection, request: bytes, deadline: float) -> tuple[bytes, bytes]:
    """Send a line; return the first line of the reply and the data after it.

    Raises `SupervisorDied` and `SupervisorError`.
    """
    try:
        async with asyncio.timeout(deadline):
            await connection.send(request)
            return await connection.receive_line()
    except TimeoutError as error:
        raise SupervisorError(f"the supervisor did not answer within {deadline:g} s") from error


async def _wait_for_exit(process: int) -> None:
    """Wait until a process, given by its descriptor, has ended."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(process, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process)
