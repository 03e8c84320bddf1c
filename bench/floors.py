"""Floors: what the same machine does with less than a daemon needs. Ratios to them hold on any machine.

F1: CPU of a bare fork. F2: a zygote without a daemon around it: CPU and rate of calls that have their own process, two
at a time. F3: calls a second of JSON over TLS in one asyncio process.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import select
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from bench.load import SETTINGS, Figures, calls, costs, less, of_each, payload

_FORKS = 400
#: A program of its own, so that the parent is as small as the smallest server in Python.
_FORK = """
import gc, json, os, resource, signal, socket, sys
def cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
gc.collect(); gc.freeze()
before, forks = cpu(), int(sys.argv[1])
for _ in range(forks):
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
print(1000 * (cpu() - before) / forks)
"""
#: A program that is run without the project.
_ZYGOTE = Path(__file__).with_name("floor_zygote.py")
#: Calls that F2 has at the same time.
_AT_ONCE = 2


def _fork(**_: Any) -> Figures:
    """Return the CPU milliseconds of fork and exit, as ``harpd``: the figure of a call that they are compared with."""
    command = [sys.executable, "-S", "-I", "-c", _FORK, str(_FORKS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return {"harpd": float(done.stdout)}


def _zygote(seconds: float, **_: Any) -> Figures:
    """Return the ``rate`` of calls, and the CPU milliseconds of zygote and children for one, as ``harpd``."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-S", "-I", str(_ZYGOTE), str(theirs.fileno())]
    environment = {**os.environ, "LD_BIND_NOW": "1", "HARPD_CALL": ""}
    with ours, subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        SETTINGS["pids"] = {"zygote": process.pid, "workers": -process.pid}
        _ask_zygote(ours, 0.1 * seconds)  # it starts, and copies the pages that it writes to
        before = costs()
        rate, count = _ask_zygote(ours, seconds)
        each = of_each(less(costs(), before), count)
        ours.shutdown(socket.SHUT_RDWR)
    return {"rate": rate, "harpd": each["cpu zygote"] + each["cpu workers"], **each}


def _ask_zygote(zygote: socket.socket, seconds: float) -> tuple[float, int]:
    """Keep `_AT_ONCE` calls running for some time; return their rate and number."""
    poll = select.poll()
    poll.register(zygote, select.POLLIN)
    outputs: deque[int] = deque()  # of the calls that have not been reaped, two for each
    count = running = 0
    began = now = time.monotonic()
    while running or not count:
        while running < _AT_ONCE and now < began + seconds:
            zygote.send(b".")
            running += 1
        for descriptor, _ in poll.poll():
            if descriptor != zygote.fileno():  # a call has ended
                poll.unregister(descriptor)
                if json.loads(os.read(descriptor, 65536)) != {"result": payload(1)}:
                    raise RuntimeError("a call of the floor's zygote has another result")
                os.close(descriptor)
                continue
            event, descriptors, _, _ = socket.recv_fds(zygote, 1, 3)
            if event == b"f":
                channel, *pipes = descriptors
                os.write(channel, f"{uuid.uuid4()} {json.dumps([payload(1)])}".encode())
                poll.register(channel, select.POLLIN)
                outputs.extend(pipes)
            else:
                os.close(outputs.popleft())
                os.close(outputs.popleft())
                running -= 1
                count += 1
                now = time.monotonic()
    return count / (now - began), count


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
    encode = json.JSONEncoder(separators=(",", ":")).encode

    def call(value: Any) -> Any:
        sock.sendall(f'{{"harp":1,"procedure":"echo","arguments":{encode([value])}}}\n'.encode())
        data = b""
        while data.count(b"\n") < 2:
            data += sock.recv(65536)
        return json.loads(data.split(b"\n")[1])["result"]

    return call


def _echo(clients: int, seconds: float) -> Figures:
    reader, writer = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("fork").Process(target=_serve, args=(writer,), daemon=True)
    server.start()
    SETTINGS["pids"] = {"server": server.pid}
    try:
        return calls(partial(_connect, reader.recv()), clients, seconds)
    finally:
        server.kill()


FUNCTIONS: dict[str, Callable[..., Figures]] = {"fork": _fork, "zygote": _zygote, "echo": _echo}
