"""Program: simulated hosts. One process is the harpd of each host, on an address of its own in 127.0.0.0/8.

`python -m bench.simulated CERTIFICATE KEY HOSTS FILE` listens, then writes a JSON array of pairs of address and port
to FILE. It serves resumable calls with keep-alive. A call has no process: what is measured is the dispatcher.

Procedures: `echo(value)`; `count(records)`, a stream; `gather(count)`, which returns once so many calls of it run on
all hosts together; `watch()`, which produces one record and runs until it is stopped.

Spec: docs/protocol.md, harpd.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from harp.protocol import harpd as wire
from harp.protocol.ends import Failed, Raised, Returned
from harp.protocol.json_text import dumps
from harp_daemon.event_loop import run

#: Seconds: of keep-alive; that a call of `gather` waits for the others; from the last of them to the results.
_KEEP_ALIVE, _PATIENCE, _PAUSE = 60.0, 60.0, 0.1


def address_of(number: int) -> str:
    """Return the address of a host."""
    return f"127.0.{1 + number // 250}.{1 + number % 250}"


class _Connection(asyncio.Protocol):
    """A connection to a host: one request after the other.

    Args:
        instance: instance id of the host's supervisor.
        gathering: ends the waiting calls of `gather`, of all hosts.
    """

    def __init__(self, instance: str, gathering: list[Callable[[], None]]) -> None:
        self._instance = instance
        self._gathering = gathering
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._request: wire.Request | None = None
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = self._request = None

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._request is None:
                self._on_request(wire.decode_request(line))
            else:
                self._on_command(wire.decode_command(line))

    def _send(self, *messages: wire.Message) -> None:
        if self._transport is not None:
            self._transport.write(b"".join(map(wire.encode_message, messages)))

    def _on_request(self, request: wire.AnyRequest) -> None:
        keep_alive = _KEEP_ALIVE if request.keep_alive else None
        match request:
            case wire.ListCalls():
                self._send(wire.CallList((), self._instance, keep_alive))
            case wire.Request(procedure="echo" | "count" | "gather" | "watch", call=terms) if terms is not None:
                self._request, self._began = request, time.monotonic()
                granted = wire.GrantedTerms(terms.instance, terms.disconnect_timeout, terms.result_ttl, 5.0, 0.0, 0)
                self._send(wire.Acknowledgement(request.procedure in ("count", "watch"), granted, keep_alive))
                self._start(request)
            case wire.Attach():
                self._send(Failed("no_such_call", "simulated hosts hold no calls"))
            case _:
                self._send(Failed("no_such_procedure", "simulated hosts do not have it"))

    def _start(self, request: wire.Request) -> None:
        match request.procedure, cast(list[Any], request.arguments):
            case "echo", [value]:
                self._end(request, Returned(value))
            case "count", [records]:
                self._send(wire.RecordTime(time.time()), *map(wire.Record, range(records)))
                self._end(request, Returned(None))
            case "gather", [count]:
                late = Raised("TimeoutError", f"fewer than {count} calls", {"class": "TimeoutError"})
                asyncio.get_running_loop().call_later(_PATIENCE, self._end, request, late)
                self._gathering.append(partial(self._end, request, Returned(None)))
                if len(self._gathering) >= count:
                    for end in self._gathering:
                        asyncio.get_running_loop().call_later(_PAUSE, end)
                    self._gathering.clear()
            case _:
                self._send(wire.RecordTime(time.time()), wire.Record("running"))

    def _end(self, request: wire.Request, end: Returned | Raised | Failed) -> None:
        if self._request is request:  # else it has ended, or the dispatcher has disconnected
            now = time.time()
            exit_info = {"exit": 0, "by": "itself", "cpu": 0.001, "memory": 10_000_000, "started": now, "ended": now}
            self._send(wire.ExitInfo(dumps(exit_info)), end)

    def _on_command(self, command: wire.Command) -> None:
        match command:
            case wire.Heartbeat():
                self._send(wire.Heartbeat(time.monotonic() - self._began))
            case wire.StopCall(reason):
                now = time.time()
                report = {"processes": [], "found": 0, "survivors": [], "surviving": 0, "complete": True}
                self._send(wire.StopReport(dumps({**report, "began": now, "ended": now})))
                self._end(cast(wire.Request, self._request), Failed(reason, "stopped"))
            case wire.Release():
                self._request = None


async def _serve(certificate: str, key: str, hosts: int, file: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    gathering: list[Callable[[], None]] = []
    addresses = []
    for number in range(hosts):
        make = partial(_Connection, f"simulated-{number}", gathering)
        server = await asyncio.get_running_loop().create_server(make, address_of(number), 0, ssl=context, backlog=1024)
        addresses.append(server.sockets[0].getsockname())
    partial_file = file.with_suffix(".new")
    partial_file.write_text(json.dumps(addresses))
    partial_file.rename(file)
    await asyncio.get_running_loop().create_future()  # until a signal ends the program


if __name__ == "__main__":
    run(_serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
