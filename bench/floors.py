"""Floors: what the same machine does with less than a daemon needs. Ratios to them hold on any machine.

F1: CPU of a bare fork. F3: calls a second of JSON over TLS in one asyncio process.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, cast

from bench.load import SETTINGS, Figures, calls

_FORKS = 500
#: A program of its own, so that the forked process is bare.
_FORK = """
import os, resource, sys
def cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
before, forks = cpu(), int(sys.argv[1])
for _ in range(forks):
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
print(1000 * (cpu() - before) / forks)
"""


def _fork(**_: Any) -> Figures:
    """Return the CPU milliseconds of fork and exit, as ``harpd``: the figure of a call that they are compared with."""
    done = subprocess.run([sys.executable, "-c", _FORK, str(_FORKS)], stdout=subprocess.PIPE, check=True)
    return {"harpd": float(done.stdout)}


class _Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        [value] = json.loads(data)["arguments"]
        self._transport.write(b'{"harp":1}\n' + json.dumps({"result": value}).encode() + b"\n")


def _serve(ready: Connection) -> None:
    async def serve() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(SETTINGS["certfile"], SETTINGS["keyfile"])
        server = await asyncio.get_running_loop().create_server(_Echo, "127.0.0.1", 0, ssl=context)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def _connect(port: int) -> Callable[[Any], Any]:
    context = ssl.create_default_context(cafile=SETTINGS["ca_file"])
    sock = context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="127.0.0.1")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call(value: Any) -> Any:
        sock.sendall(json.dumps({"harp": 1, "procedure": "echo", "arguments": [value]}).encode() + b"\n")
        data = b""
        while data.count(b"\n") < 2:
            data += sock.recv(65536)
        return json.loads(data.split(b"\n")[1])["result"]

    return call


def _echo(clients: int, seconds: float) -> Figures:
    reader, writer = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("fork").Process(target=_serve, args=(writer,), daemon=True)
    server.start()
    try:
        return calls(partial(_connect, reader.recv()), clients, seconds)
    finally:
        server.kill()


FUNCTIONS: dict[str, Callable[..., Figures]] = {"fork": _fork, "echo": _echo}
