"""RPyC over TLS. Its server forks a process for each connection.

Arguments and results are JSON text: RPyC would pass references to objects, and fetch each member separately.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import rpyc
from rpyc.utils.authenticators import SSLAuthenticator
from rpyc.utils.server import ForkingServer

from bench.load import SETTINGS, calls, fast_records, follow, follow_slowly, slow_records


class Service(rpyc.Service):
    """The procedures of the server."""

    def exposed_echo(self, text: str) -> str:
        """Return the value."""
        return json.dumps(json.loads(text))

    def exposed_count(self, records: int) -> Iterator[str]:
        """Yield records as fast as possible."""
        return map(json.dumps, fast_records(records))

    def exposed_slowly(self, records: int, pause: float) -> Iterator[str]:
        """Yield a record now and then."""
        return map(json.dumps, slow_records(records, pause))


def _serve() -> None:
    authenticator = SSLAuthenticator(SETTINGS["keyfile"], SETTINGS["certfile"])
    ForkingServer(
        Service, hostname="127.0.0.1", port=SETTINGS["port"], backlog=128, authenticator=authenticator
    ).start()


def _connect() -> Any:
    return rpyc.ssl_connect("127.0.0.1", SETTINGS["port"], ca_certs=SETTINGS["ca_file"])


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


FUNCTIONS = {
    "server": _serve,
    "fresh": partial(calls, _fresh),
    "kept": partial(calls, _kept),
    "follow": partial(follow, lambda records: map(json.loads, _connect().root.count(records))),
    "follow_slowly": partial(
        follow_slowly, lambda records, pause: map(json.loads, _connect().root.slowly(records, pause))
    ),
}
