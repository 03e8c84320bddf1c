"""gRPC over TLS: one server process with threads; a connection per call or a kept one; protobuf or JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from bench.load import TEXT, calls, follow, follow_slowly, record
from bench.peers import SETTINGS

messages, services = grpc.protos_and_services("bench/peers/record.proto")


class Bench(services.BenchServicer):  # type: ignore[name-defined]
    """What the server offers."""

    def Echo(self, request: Any, context: Any) -> Any:
        """The call."""
        return request

    def Count(self, request: Any, context: Any) -> Iterator[Any]:
        """The stream."""
        for number in range(request.records):
            yield messages.Record(number=number, text=TEXT)

    def Slowly(self, request: Any, context: Any) -> Iterator[Any]:
        """The slow stream."""
        for number in range(request.records):
            time.sleep(request.pause)
            yield messages.Record(number=number, at=time.time())


def _count_json(request: bytes, context: Any) -> Iterator[bytes]:
    for number in range(json.loads(request)["records"]):
        yield json.dumps(record(number)).encode()


def _channel() -> Any:
    authority = Path(SETTINGS["ca_file"]).read_bytes()
    return grpc.secure_channel(f"127.0.0.1:{SETTINGS['port']}", grpc.ssl_channel_credentials(authority))


def _echo(stub: Any, value: Any) -> Any:
    flags = [json.dumps(flag) for flag in value["flags"]]
    call = messages.Call(number=value["number"], name=value["name"], flags=flags, ratio=value["ratio"])
    found = stub.Echo(call)
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


def _json_stream(records: int) -> Iterator[Any]:
    with _channel() as channel:
        yield from map(json.loads, channel.unary_stream("/bench.JSON/Count")(json.dumps({"records": records}).encode()))


def _serve() -> None:
    server = grpc.server(ThreadPoolExecutor(max_workers=32))
    services.add_BenchServicer_to_server(Bench(), server)
    handlers = {"Count": grpc.unary_stream_rpc_method_handler(_count_json)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.JSON", handlers),))
    pair = (Path(SETTINGS["keyfile"]).read_bytes(), Path(SETTINGS["certfile"]).read_bytes())
    server.add_secure_port(f"127.0.0.1:{SETTINGS['port']}", grpc.ssl_server_credentials([pair]))
    server.start()
    server.wait_for_termination()


WORKS = {
    "fresh": partial(calls, _fresh),
    "reused": partial(calls, _kept),
    "follow": partial(follow, _stream),
    "follow_json": partial(follow, _json_stream),
    "follow_slowly": partial(follow_slowly, _slow_stream),
}

if __name__ == "__main__" and sys.argv[1:] == ["server"]:
    _serve()
