"""The wardens of a runtime directory: how they are found, reached and asked.

There is one that takes new calls, at the socket ``warden``; and while an upgrade is under way, or after a restart,
older ones that hold calls still. Each has a socket of its own, ``warden-INCARNATION``. A socket that refuses
connections is a dead warden's. What one of them holds, the others don't know: so who looks for a call asks all, and
nobody is told "there is no such call" before every living warden has said so.

Connections are plain sockets and not streams: what a warden has said before it died can be read after its death.
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
from harp.protocol.harpd import Held, decode_message
from harp.protocol.json_text import InvalidJSON, dumps, loads
from harpd.supervisor.listener import ACTIVE_SOCKET, SOCKET_PREFIX

__all__ = ["ACTIVE_SOCKET", "NoWarden", "Reply", "WardenConnection", "WardenError", "WardenLost", "Wardens"]

T = TypeVar("T")

log = logging.getLogger("harpd.control")

#: Seconds that a call waits for a warden that is being started: less than what a dispatcher waits for harpd.
_WAIT = 5.0
#: Seconds for an answer that comes at once.
_ANSWER = 10.0
#: Seconds between two looks for a warden that is being started, and while one has too many connections waiting.
_PAUSE, _FULL_PAUSE = 0.02, 0.01
#: Seconds for the death of a process that was killed.
_DEATH = 10.0

_READ_SIZE = 64 * 1024
#: The most bytes of an answer.
_ANSWER_BYTES = 64 * 1024 * 1024
_CREDENTIALS = struct.Struct("3i")


class WardenError(Exception):
    """The warden is not there, or refused. The message says why."""


class NoWarden(WardenError):
    """Nobody listens at this socket."""


class WardenLost(Exception):
    """The warden's connection broke: the warden is dead."""


class WardenConnection:
    """A connection to a warden; a context manager that closes it.

    Args:
        connection: the socket, which does not block.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        """Send; return when the warden's socket has taken it all. Raises `WardenLost`."""
        try:
            await self._loop.sock_sendall(self._socket, data)
        except OSError as error:
            raise WardenLost from error

    async def receive(self) -> bytes:
        """Receive some bytes; b"" when the warden has closed. Raises `WardenLost`."""
        try:
            return await self._loop.sock_recv(self._socket, _READ_SIZE)
        except OSError as error:
            raise WardenLost from error

    async def first_line(self) -> tuple[bytes, bytes]:
        """Receive until there is a line; return it, line feed included, and what came after it. Raises `WardenLost`."""
        received, searched = bytearray(), 0
        while (end := received.find(b"\n", searched) + 1) == 0:
            searched = len(received)
            data = await self.receive()
            if not data or searched > _ANSWER_BYTES:
                raise WardenLost
            received += data
        return bytes(received[:end]), bytes(received[end:])

    def send_end(self) -> None:
        """Say that nothing more will be sent. Raises `WardenLost`."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise WardenLost from error

    def process(self) -> int:
        """A descriptor of the warden's process: a later process of the same number is never meant. Raises OSError."""
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


class Wardens:
    """The wardens of one runtime directory; a context manager that lets go of it.

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

    def names(self) -> list[str]:
        """The names of all wardens' own sockets, dead ones' too."""
        return sorted(
            name for name in os.listdir(self._directory) if name.startswith(SOCKET_PREFIX) and "." not in name
        )

    def current(self) -> int | None:
        """The number of who takes new calls: another number, another warden. None: nobody does."""
        try:
            return os.stat(ACTIVE_SOCKET, dir_fd=self._directory).st_ino
        except FileNotFoundError:
            return None

    async def remove_dead(self) -> None:
        """Remove the sockets of dead wardens. Only for who starts wardens, and while none is being started."""
        for name in os.listdir(self._directory):
            if name == ACTIVE_SOCKET or name.startswith(SOCKET_PREFIX):
                try:
                    (await self.open(name)).close()
                except NoWarden:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=self._directory)
                except WardenError:
                    pass  # it lives, but is in trouble

    # One warden.

    async def open(self, name: str = ACTIVE_SOCKET) -> WardenConnection:
        """Open a connection to a warden.

        Raises:
            NoWarden: nobody is there.
            WardenError: there is somebody, but no connection can be made.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            path = f"/proc/self/fd/{self._directory}/{name}"
            try:
                connection.connect(path)
            except BlockingIOError:
                await _connect_when_there_is_room(connection, path)
            return WardenConnection(connection)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            connection.close()
            raise NoWarden("the warden of the calls does not run") from error
        except OSError as error:
            connection.close()
            reason = error.strerror or "too many connections wait"
            raise WardenError(f"no connection to the warden of the calls: {reason}") from error
        except BaseException:
            connection.close()
            raise

    async def reach(self) -> WardenConnection:
        """Open a connection to the warden that takes new calls; wait a little for one that is being started.

        Raises:
            WardenError: there is none and none comes up.
        """
        return await _patiently(self._opened)

    async def _opened(self) -> WardenConnection | None:
        with contextlib.suppress(NoWarden):
            return await self.open()
        return None

    async def ask(
        self, request: Mapping[str, Any], deadline: float = _ANSWER, name: str = ACTIVE_SOCKET
    ) -> dict[str, Any]:
        """Send a control request and return the answer.

        Args:
            request: the request, with the key ``control``.
            deadline: seconds for the answer.
            name: whom to ask.

        Raises:
            NoWarden: nobody is there.
            WardenError: no answer came, or it is an error.
        """
        try:
            line, _ = await self._first_line(name, dumps(dict(request)) + b"\n", deadline)
            answer = loads(line)
        except (WardenLost, InvalidJSON) as error:
            raise WardenError(f"the warden gave no answer: {error}") from error
        if not isinstance(answer, dict) or "error" in answer:
            raise WardenError(str(answer["error"] if isinstance(answer, dict) else answer))
        return answer

    async def _first_line(self, name: str, request: bytes, deadline: float) -> tuple[bytes, bytes]:
        with await self.open(name) as connection:
            return await _answered(connection, request, deadline)

    async def end(self, name: str, deadline: float) -> None:
        """End all calls of a warden with the error ``shutdown``, then the warden; by force when it takes longer.

        Args:
            name: whom to end; it may be dead already.
            deadline: seconds for an orderly end.
        """
        with ExitStack() as closing:
            try:
                connection = closing.enter_context(await self.open(name))
                process = connection.process()
            except (WardenError, ProcessLookupError):
                return
            closing.callback(os.close, process)
            try:
                async with asyncio.timeout(deadline):
                    await connection.send(b'{"control":"shutdown"}\n')
                    await _death(process)
                    return
            except WardenLost:
                pass
            except TimeoutError:
                log.error("warden did not end in order; killed", extra={"warden": name})
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                async with asyncio.timeout(_DEATH):
                    await _death(process)

    # All wardens.

    async def ask_all(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Make a control request of all living wardens; return the answers. Raises `WardenError` for one without."""
        answers = []
        for name in self.names():
            with contextlib.suppress(NoWarden):
                answers.append(await self.ask(request, name=name))
        return answers

    async def held(self, owner: str) -> Held:
        """The owner's calls in all wardens, and who takes new ones.

        Raises:
            WardenError: there is no warden, or one gives no answer: a list with a gap is worse than none.
        """
        request = dumps({"calls": owner}) + b"\n"
        current = await _patiently(partial(self._held_by, ACTIVE_SOCKET, request))
        calls = dict.fromkeys(current.calls)
        for name in self._others(current.warden):
            if (held := await self._held_by(name, request)) is not None:
                calls |= dict.fromkeys(held.calls)
        return Held(tuple(calls), current.warden)

    def _others(self, warden: str) -> list[str]:
        return [name for name in self.names() if name != SOCKET_PREFIX + warden]

    async def _held_by(self, name: str, request: bytes) -> Held | None:
        """What one warden holds; None when it is dead."""
        try:
            line, _ = await self._first_line(name, request, _ANSWER)
            held = decode_message(line[:-1])
        except (NoWarden, WardenLost):
            return None
        except ProtocolError as error:
            raise WardenError(f"the warden gave no list: {error}") from error
        if not isinstance(held, Held):
            raise WardenError("the warden gave no list")
        return held

    async def attach(self, request: bytes) -> Reply:
        """Find who holds a call.

        Args:
            request: the line that asks to attach.

        Returns:
            The reply of the warden that holds it; when there is none, of the one that takes new calls.

        Raises:
            WardenError: a warden gave no answer, or the one that takes new calls is not there: that nobody holds
                the call is then not known.
        """
        return await _patiently(partial(self._find, request))

    async def _find(self, request: bytes) -> Reply | None:
        """Ask each warden once; None when that leaves open who holds the call."""
        current = await self._reply(ACTIVE_SOCKET, request)
        if current is not None and current.unknown_to is None:
            return current
        with ExitStack() as closing:
            if current is not None:
                closing.enter_context(current.connection)
            for name in self._others(current.unknown_to or "" if current else ""):
                other = await self._reply(name, request)
                if other is not None and other.unknown_to is None:
                    return other
                if other is not None:
                    other.connection.close()
            closing.pop_all()
        return current

    async def _reply(self, name: str, request: bytes) -> Reply | None:
        """Ask one warden; None when it is dead."""
        with ExitStack() as closing:
            try:
                connection = closing.enter_context(await self.open(name))
                line, more = await _answered(connection, request, _ANSWER)
            except (NoWarden, WardenLost):
                return None
            closing.pop_all()
        return Reply(connection, line, more)


@dataclass(frozen=True, slots=True)
class Reply:
    """What has come so far on a connection that asks to attach.

    Attributes:
        connection: the connection, for the caller to close.
        line: its first line, line feed included.
        more: what has come after it.
    """

    connection: WardenConnection
    line: bytes
    more: bytes

    @property
    def unknown_to(self) -> str | None:
        """The warden that says that there is no such call; None: it says something else."""
        with contextlib.suppress(ProtocolError):
            match decode_message(self.line[:-1]):
                case Failed("no_such_call", _, {"warden": str(warden)}):
                    return warden
        return None


async def _connect_when_there_is_room(connection: socket.socket, path: str) -> None:
    """Connect to a socket whose backlog is full. The loop's own connect takes that for a connection under way."""
    async with asyncio.timeout(_ANSWER):
        while True:
            try:
                connection.connect(path)
            except BlockingIOError:
                await asyncio.sleep(_FULL_PAUSE)
            else:
                return


async def _patiently(attempt: Callable[[], Awaitable[T | None]]) -> T:
    """Try until there is an outcome, for as long as a call waits for a warden. Raises `WardenError`."""
    try:
        async with asyncio.timeout(_WAIT):
            while True:
                if (outcome := await attempt()) is not None:
                    return outcome
                await asyncio.sleep(_PAUSE)
    except TimeoutError as error:
        raise WardenError("the warden of the calls does not run; it is being started again") from error


async def _answered(connection: WardenConnection, request: bytes, deadline: float) -> tuple[bytes, bytes]:
    """Send a line; return the first that comes back, and what came after it. Raises `WardenLost` and `WardenError`."""
    try:
        async with asyncio.timeout(deadline):
            await connection.send(request)
            return await connection.first_line()
    except TimeoutError as error:
        raise WardenError(f"the warden did not answer within {deadline:g} s") from error


async def _death(process: int) -> None:
    """Wait until a process, given by its descriptor, has ended."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(process, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process)
