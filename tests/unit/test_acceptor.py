"""Accepting connections: pauses, and the end."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import pytest

from harp_daemon.acceptor import Acceptor, network
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
        self.cancelled = self.rejected = False

    async def serve(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled = True
            self.accepted.close()

    async def reject(self) -> None:
        self.rejected = True
        await self.serve()


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


class Crowd:
    """Clients of an acceptor, which come from the addresses of a loopback network."""

    def __init__(self, limit: int, per_peer: int) -> None:
        self.acceptor = Acceptor(Client, Client.serve, Client.reject, lambda: limit, max_per_peer=lambda: per_peer)
        self.listener = listen(socket.socket())
        self.clients: list[socket.socket] = []

    async def __aenter__(self) -> Crowd:
        self.acceptor.open([self.listener])
        return self

    async def __aexit__(self, *_: object) -> None:
        self.acceptor.close_listeners()
        await self.acceptor.drain(0)
        for client in self.clients:
            client.close()

    async def connect(self, address: str) -> Client:
        """Connect from an address; return the acceptor's side."""
        before = set(self.acceptor.connections.values())
        self.clients.append(socket.create_connection(self.listener.socket.getsockname(), source_address=(address, 0)))
        await eventually(lambda: len(set(self.acceptor.connections.values()) - before) == 1, what="the connection")
        [accepted] = set(self.acceptor.connections.values()) - before
        return accepted


async def test_acceptor_at_its_limit_closes_the_oldest_new_connection() -> None:
    async with Crowd(limit=3, per_peer=10) as crowd:
        first, second, third = [await crowd.connect("127.0.0.2") for _ in range(3)]
        crowd.acceptor.confirm(first)
        fourth = await crowd.connect("127.0.0.3")
        await eventually(lambda: second.cancelled, what="the end of the oldest new connection")
        assert not any(client.cancelled for client in (first, third, fourth))
        crowd.acceptor.confirm(third)
        crowd.acceptor.confirm(fourth)
        fifth = await crowd.connect("127.0.0.4")
        await eventually(lambda: fifth.rejected, what="the rejection")  # all others have authenticated
        assert not any(client.cancelled for client in (first, third, fourth))


async def test_acceptor_limits_the_new_connections_of_a_peer() -> None:
    async with Crowd(limit=10, per_peer=2) as crowd:
        _, second = [await crowd.connect("127.0.0.2") for _ in range(2)]
        third, other = await crowd.connect("127.0.0.2"), await crowd.connect("127.0.0.3")
        await eventually(lambda: third.rejected, what="the rejection")
        assert not other.rejected
        crowd.acceptor.confirm(second)  # the peer is known now
        more = [await crowd.connect("127.0.0.2") for _ in range(4)]
        await asyncio.sleep(0)
        assert not any(client.rejected for client in more)


async def test_acceptor_counts_an_ended_connection_no_more() -> None:
    async with Crowd(limit=10, per_peer=1) as crowd:
        for _ in range(3):
            await crowd.connect("127.0.0.2")
            [task] = crowd.acceptor.connections
            task.cancel()
            await eventually(lambda: not crowd.acceptor.connections, what="the end")


async def test_acceptor_keeps_new_connections_of_known_peers_longer() -> None:
    async with Crowd(limit=3, per_peer=10) as crowd:
        crowd.acceptor.confirm(await crowd.connect("127.0.0.2"))
        known = await crowd.connect("127.0.0.2")
        stranger = await crowd.connect("127.0.0.3")
        later = await crowd.connect("127.0.0.4")
        await eventually(lambda: stranger.cancelled, what="the end of the stranger's connection")
        assert not known.cancelled
        crowd.acceptor.confirm(later)
        await crowd.connect("127.0.0.5")
        await eventually(lambda: known.cancelled, what="the end of the known peer's connection")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::1", "::2", False),
        ("fe80::1%1", "fe80::2%1", True),
    ],
)
def test_network_of_a_peer_is_an_address_or_a_64(first: str, second: str, same: bool) -> None:
    assert (network(first) == network(second)) is same
