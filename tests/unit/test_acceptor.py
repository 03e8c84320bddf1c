"""Accepting connections: pauses, and the end."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

from harp_daemon.acceptor import Acceptor
from harp_daemon.sockets import Listener
from support.deadline import eventually


class ExhaustedSocket(socket.socket):
    """A listening socket on a machine without free descriptors."""

    attempts = 0

    def accept(self) -> Any:
        self.attempts += 1
        raise OSError(errno.EMFILE, "Too many open files")


class Client:
    """A connection whose task ends only when it is cancelled."""

    def __init__(self, accepted: socket.socket, name: str, listener: Listener) -> None:
        self.accepted = accepted
        self.cancelled = False

    async def serve(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled = True
            self.accepted.close()


def listen(sock: socket.socket) -> Listener:
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    sock.setblocking(False)
    return Listener(sock)


def connect(listener: Listener) -> socket.socket:
    return socket.create_connection(listener.socket.getsockname())


async def test_acceptor_closed_during_a_pause_does_not_resume() -> None:
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    acceptor = Acceptor(Client, Client.serve, Client.serve, lambda: 10)
    exhausted = ExhaustedSocket()
    listener = listen(exhausted)
    acceptor.open([listener])
    with connect(listener):
        await eventually(lambda: exhausted.attempts == 1, what="the pause")
        acceptor.close_listeners()
        await asyncio.sleep(0.3)  # a later timer than the end of the pause
    assert (errors, exhausted.attempts) == ([], 1)


async def test_acceptor_drain_cancels_tasks_after_its_time() -> None:
    acceptor = Acceptor(Client, Client.serve, Client.serve, lambda: 10)
    listener = listen(socket.socket())
    acceptor.open([listener])
    with connect(listener):
        await eventually(lambda: len(acceptor.connections) == 1, what="the connection")
        [client] = acceptor.connections.values()
        acceptor.close_listeners()
        await asyncio.wait_for(acceptor.drain(0.01), 30)
        assert client.cancelled
        assert not acceptor.connections
