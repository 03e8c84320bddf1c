"""Program: hosts that need no machine. One process is the harpd of each, on an address of its own in 127.0.0.0/8.

`python -m bench.simulated CERTIFICATE KEY HOSTS FILE` listens, then writes the addresses to FILE: a JSON array of
pairs of address and port. It speaks harpd's side of the wire with the protocol's own messages, for tied and kept
calls and on kept connections. A call costs no process: what is measured is who calls.

Procedures: `echo(value)`; `gather(count)`, of which each call ends once so many are under way in all hosts; `watch()`,
which gives one record and does not end by itself.

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

from harp.protocol.ends import Failed, Raised, Returned
from harp.protocol.harpd import (
    Acknowledgement,
    Alive,
    AnyRequest,
    Attach,
    Done,
    Evidence,
    Held,
    KeptTerms,
    ListCalls,
    Message,
    Order,
    Receipt,
    Record,
    RecordsAt,
    Request,
    StopCall,
    Stored,
    decode_order,
    decode_request,
    encode_message,
)
from harp.protocol.json_text import dumps
from harp_daemon.event_loop import run

__all__ = ["address_of"]

#: Seconds for which a connection is kept; that a call of `gather` waits for the others; that it takes from then on.
_KEEP, _PATIENCE, _PAUSE = 60.0, 60.0, 0.1


def address_of(number: int) -> str:
    """The address of a host."""
    return f"127.0.{1 + number // 250}.{1 + number % 250}"


class _Gathering:
    """The calls that wait until there are enough of them."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def join(self, count: int, end: Callable[[], None]) -> None:
        """Call `end` once there are so many."""
        self._waiting.append(end)
        if len(self._waiting) >= count:
            loop = asyncio.get_running_loop()
            for one in self._waiting:
                loop.call_later(_PAUSE, one)
            self._waiting.clear()


class _Connection(asyncio.Protocol):
    """A connection to a host: one request after the other.

    Args:
        warden: the warden's incarnation.
        gathering: those of all hosts.
    """

    def __init__(self, warden: str, gathering: _Gathering) -> None:
        self._warden = warden
        self._gathering = gathering
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._request: Request | None = None
        self._began = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._forget()

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._request is None:
                self._on_request(decode_request(line))
            else:
                self._on_order(decode_order(line))

    def _say(self, *messages: Message) -> None:
        if self._transport is not None:
            self._transport.write(b"".join(map(encode_message, messages)))

    def _over(self, keep: bool) -> None:
        """A request is done with."""
        self._forget()
        if not keep and self._transport is not None:
            self._transport.close()

    def _forget(self) -> None:
        self._request = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_request(self, request: AnyRequest) -> None:
        keep = _KEEP if request.keep else None
        match request:
            case ListCalls():
                self._say(Held((), self._warden, keep))
                self._over(request.keep)
            case Attach():
                self._say(Failed("no_such_call", "simulated hosts hold nothing"))
                self._over(False)
            case Request(procedure="echo" | "gather" | "watch", call=terms):
                self._request, self._began = request, time.monotonic()
                kept = None
                if terms is not None:
                    kept = KeptTerms(terms.warden, terms.keep_running, terms.linger, 5.0, 0.0, 0)
                self._say(Acknowledgement(request.procedure == "watch", kept, keep))
                self._start(request)
            case Request(procedure):
                self._say(Failed("no_such_procedure", procedure))
                self._over(False)

    def _start(self, request: Request) -> None:
        assert isinstance(request.arguments, list)
        match request.procedure, request.arguments:
            case "echo", [value]:
                self._end(request, Returned(value))
            case "gather", [int(count)]:
                late = Raised("TimeoutError", f"{count} calls did not come together", {"class": "TimeoutError"})
                self._timer = asyncio.get_running_loop().call_later(_PATIENCE, self._end, request, late)
                self._gathering.join(count, partial(self._end, request, Returned(None)))
            case _:
                at = () if request.call is None else (RecordsAt(time.time()),)
                self._say(*at, Record("about to wait"))

    def _end(self, request: Request, end: Returned | Raised | Failed) -> None:
        if self._request is not request:  # it was given up
            return
        if request.call is None:
            self._say(end)
            self._over(request.keep)
            return
        now = time.time()
        seen: dict[str, Any] = {"exit": 0, "by": "itself", "cpu": 0.001, "memory": 10_000_000}
        self._say(Evidence(dumps({**seen, "started": now, "ended": now})), end)

    def _on_order(self, order: Order) -> None:
        assert self._request is not None
        match order:
            case Alive():
                self._say(Alive(time.monotonic() - self._began))
            case StopCall(why):
                now = time.time()
                receipt = {"processes": [], "found": 0, "survivors": [], "surviving": 0, "complete": True}
                self._say(Receipt(dumps({**receipt, "began": now, "ended": now})))
                self._end(self._request, Failed(why, "stopped"))
            case Done():
                self._over(self._request.keep)
            case Stored():
                pass


async def _serve(certificate: str, key: str, hosts: int, file: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    loop = asyncio.get_running_loop()
    gathering = _Gathering()
    places = []
    for number in range(hosts):
        make = partial(_Connection, f"simulated-{number}", gathering)
        server = await loop.create_server(make, address_of(number), 0, ssl=context, backlog=1024)
        places.append(server.sockets[0].getsockname())
    making = file.with_suffix(".new")
    making.write_text(json.dumps(places))
    making.rename(file)
    await asyncio.get_running_loop().create_future()  # until a signal ends the program


if __name__ == "__main__":
    run(_serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
