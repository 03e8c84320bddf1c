"""RPyC over TLS. As it comes, its server forks a process for each connection; or threads, with TCP_NODELAY set by hand.

Arguments and results go as JSON text: RPyC would hand out references to objects, and ask back for each item.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import rpyc
from rpyc.core.stream import SocketStream
from rpyc.utils.authenticators import SSLAuthenticator
from rpyc.utils.server import ForkingServer, ThreadedServer

from bench.load import calls, follow, follow_slowly, record
from bench.peers import SETTINGS


class Service(rpyc.Service):
    """What the server offers."""

    def exposed_echo(self, text: str) -> str:
        """The call."""
        return json.dumps(json.loads(text))

    def exposed_count(self, records: int) -> Iterator[str]:
        """The stream."""
        for number in range(records):
            yield json.dumps(record(number))

    def exposed_slowly(self, records: int, pause: float) -> Iterator[str]:
        """The slow stream."""
        for number in range(records):
            time.sleep(pause)
            yield json.dumps({"number": number, "at": time.time()})


def _connect() -> Any:
    connection = rpyc.ssl_connect("127.0.0.1", SETTINGS["port"], ca_certs=SETTINGS["ca_file"])
    if SETTINGS["threads"]:
        _without_delay(connection._channel.stream)
    return connection


def _without_delay(stream: SocketStream) -> None:
    stream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _fresh() -> Callable[[Any], Any]:
    def call(value: Any) -> Any:
        connection = _connect()
        try:
            return json.loads(connection.root.echo(json.dumps(value)))
        finally:
            connection.close()

    return call


def _kept() -> Callable[[Any], Any]:
    echo = _connect().root.echo
    return lambda value: json.loads(echo(json.dumps(value)))


def _stream(records: int) -> Iterator[Any]:
    return map(json.loads, _connect().root.count(records))


def _slow_stream(records: int, pause: float) -> Iterator[Any]:
    return map(json.loads, _connect().root.slowly(records, pause))


class _Authenticator(SSLAuthenticator):
    def __call__(self, sock: socket.socket) -> Any:
        if SETTINGS["threads"]:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return super().__call__(sock)


def _serve() -> None:
    kind = ThreadedServer if SETTINGS["threads"] else ForkingServer
    authenticator = _Authenticator(SETTINGS["keyfile"], SETTINGS["certfile"])
    kind(Service, hostname="127.0.0.1", port=SETTINGS["port"], backlog=128, authenticator=authenticator).start()


WORKS = {
    "fresh": partial(calls, _fresh),
    "reused": partial(calls, _kept),
    "follow": partial(follow, _stream),
    "follow_slowly": partial(follow_slowly, _slow_stream),
}

if __name__ == "__main__" and sys.argv[1:] == ["server"]:
    _serve()
