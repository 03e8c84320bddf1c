"""Both shells of the client behind one interface, for tests that use both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import harp
from harp import aio
from support.blocking import Blocking, LoopThread
from support.peers import Peer

#: The default of both shells: a script of a peer has one connection for each request.
_WITHOUT_KEEP_ALIVE: dict[str, Any] = {"keep_alive": False}


def _server_arguments(peer: Peer) -> dict[str, Any]:
    return {"host": peer.host, "port": peer.port, "user": "u", "password": "secret", **_WITHOUT_KEEP_ALIVE}


class Shell(Protocol):
    """The classes of one shell; those of asyncio are wrapped to behave like the synchronous classes."""

    def caller(self, peer: Peer, **kwargs: Any) -> Any:
        """Return a HarpCaller for a peer."""

    def caller_at(self, host: str, port: int, **kwargs: Any) -> Any:
        """Return a HarpCaller."""

    def server(self, peer: Peer, **kwargs: Any) -> Any:
        """Return a HarpServer for a peer."""


class SyncShell:
    def caller(self, peer: Peer, **kwargs: Any) -> Any:
        return self.caller_at(peer.host, peer.port, **kwargs)

    def caller_at(self, host: str, port: int, **kwargs: Any) -> Any:
        return harp.HarpCaller(host, port, **_WITHOUT_KEEP_ALIVE | kwargs)

    def server(self, peer: Peer, **kwargs: Any) -> Any:
        return harp.HarpServer(**_server_arguments(peer) | kwargs)


class AioShell:
    def __init__(self, thread: LoopThread) -> None:
        self._thread = thread

    def caller(self, peer: Peer, **kwargs: Any) -> Any:
        return self.caller_at(peer.host, peer.port, **kwargs)

    def caller_at(self, host: str, port: int, **kwargs: Any) -> Any:
        return Blocking(aio.AsyncHarpCaller(host, port, **_WITHOUT_KEEP_ALIVE | kwargs), self._thread)

    def server(self, peer: Peer, **kwargs: Any) -> Any:
        return Blocking(aio.AsyncHarpServer(**_server_arguments(peer) | kwargs), self._thread)


@contextmanager
def shell_of(kind: str) -> Iterator[Shell]:
    """Provide the shell ``sync`` or ``aio``, and assert that it leaves no task."""
    if kind == "sync":
        yield SyncShell()
    else:
        with LoopThread() as thread:
            yield AioShell(thread)
