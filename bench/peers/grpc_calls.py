"""gRPC over TLS with protobuf: one server process with threads; a connection for each call, or a kept one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from bench.load import SETTINGS, calls, fast_records, follow, follow_slowly, slow_records

messages, services = grpc.protos_and_services("bench/peers/record.proto")


class Bench(services.BenchServicer):  # type: ignore[name-defined]
    """The procedures of the server."""

    def Echo(self, request: Any, context: Any) -> Any:
        """Return the value."""
        return request

    def Count(self, request: Any, context: Any) -> Iterator[Any]:
        """Yield records as fast as possible."""
        return (messages.Record(**one) for one in fast_records(request.records))

    def Slowly(self, request: Any, context: Any) -> Iterator[Any]:
        """Yield a record now and then."""
        return (messages.Record(**one) for one in slow_records(request.records, request.pause))


def _serve() -> None:
    server = grpc.server(ThreadPoolExecutor(max_workers=32))
    services.add_BenchServicer_to_server(Bench(), server)
    pair = (Path(SETTINGS["keyfile"]).read_bytes(), Path(SETTINGS["certfile"]).read_bytes())
    server.add_secure_port(f"127.0.0.1:{SETTINGS['port']}", grpc.ssl_server_credentials([pair]))
    server.start()
    server.wait_for_termination()


def _channel() -> Any:
    authority = Path(SETTINGS["ca_file"]).read_bytes()
    return grpc.secure_channel(f"127.0.0.1:{SETTINGS['port']}", grpc.ssl_channel_credentials(authority))


def _echo(stub: Any, value: Any) -> Any:
    flags = [json.dumps(flag) for flag in value["flags"]]
    found = stub.Echo(messages.Call(number=value["number"], name=value["name"], flags=flags, ratio=value["ratio"]))
    flags = [json.loads(flag) for flag in found.flags]
    return {"number": found.number, "name": found.name, "flags": flags, "ratio": found.ratio}


def _fresh() -> Callable[[Any], Any]:
    def call(value: Any) -> Any:
        with _channel() as channel:
            return _echo(services.BenchStub(channel), value)

    return call


def _kept() -> Callable[[Any], Any]:
    return partial(_echo, services.BenchStub(_channel()))


def _stream(records: int) -> Iterator[Any]:
    with _channel() as channel:
        for found in services.BenchStub(channel).Count(messages.Wanted(records=records)):
            yield {"number": found.number, "text": found.text}


def _slow_stream(records: int, pause: float) -> Iterator[Any]:
    with _channel() as channel:
        for found in services.BenchStub(channel).Slowly(messages.Wanted(records=records, pause=pause)):
            yield {"number": found.number, "at": found.at}


FUNCTIONS = {
    "server": _serve,
    "fresh": partial(calls, _fresh),
    "kept": partial(calls, _kept),
    "follow": partial(follow, _stream),
    "follow_slowly": partial(follow_slowly, _slow_stream),
}
