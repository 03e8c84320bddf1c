"""Both shells of the client behind one interface, for tests that use both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import harp
from harp import aio
from support.blocking import Blocking, LoopThread
from support.peers import Peer


class Shell(Protocol):
    """The classes of one shell; those of asyncio are wrapped to behave like the synchronous ones."""

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
        return harp.HarpCaller(host, port, **kwargs)

    def server(self, peer: Peer, **kwargs: Any) -> Any:
        return harp.HarpServer(**{"host": peer.host, "port": peer.port, "user": "u", "password": "secret", **kwargs})


class AioShell:
    def __init__(self, thread: LoopThread) -> None:
        self._thread = thread

    def caller(self, peer: Peer, **kwargs: Any) -> Any:
        return self.caller_at(peer.host, peer.port, **kwargs)

    def caller_at(self, host: str, port: int, **kwargs: Any) -> Any:
        return Blocking(aio.AsyncHarpCaller(host, port, **kwargs), self._thread)

    def server(self, peer: Peer, **kwargs: Any) -> Any:
        arguments = {"host": peer.host, "port": peer.port, "user": "u", "password": "secret", **kwargs}
        return Blocking(aio.AsyncHarpServer(**arguments), self._thread)


@contextmanager
def shell_of(kind: str) -> Iterator[Shell]:
    """Provide the shell ``sync`` or ``aio``, and assert that it leaves no task."""
    if kind == "sync":
        yield SyncShell()
    else:
        with LoopThread() as thread:
            yield AioShell(thread)
