"""Broken requests, broken clients and broken handlers: the HTTP API answers, or closes, and goes on."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from harpcaller.access.client import Client
from harpcaller.http.app import HTTPApp
from harpcaller.http.operations import Answer, APIRequest, Operation
from support.http_api import RunningAPI, running_api

BODY = b'{"host":"nohost","procedure":"p","arguments":[1.50]}'
PIECES = (
    b"\r\n",
    b"\n",
    b"\0",
    b" ",
    b":",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"\xff",
    b"/",
    b"%",
)


def request(api: RunningAPI) -> bytes:
    head = f"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{api.authorization}"
    return head.encode() + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


async def test_http_broken_requests_are_refused_or_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harpcaller.http.server.HEAD_SECONDS", 0.3)
    monkeypatch.setattr("harpcaller.http.server.KEEP_ALIVE_SECONDS", 0.3)
    async with running_api(tmp_path, idle_timeout=0.3) as api:
        whole = request(api)
        chance = random.Random(1)
        secret = whole.index(api.token.encode())  # wrong tokens are answered late
        places = [*range(secret - 3), *range(secret + len(api.token), len(whole))]
        broken = []
        for _ in range(200):
            text = bytearray(whole)
            for at in sorted(chance.sample(places, chance.randint(1, 3)), reverse=True):
                if chance.random() < 0.5:
                    text[at : at + chance.randint(0, 3)] = chance.choice(PIECES)
                else:
                    text[at] = chance.randrange(256)
            broken.append(bytes(text[: chance.randint(1, len(text))] if chance.random() < 0.2 else text))

        async def send_all(requests: list[bytes]) -> None:
            for sent in requests:
                answer = await api.send(sent)
                assert not answer or 200 <= int(answer[9:12]) < 500, (sent, answer)

        await asyncio.gather(*(send_all(broken[at::10]) for at in range(10)))
        assert (await api.send(whole)).startswith(b"HTTP/1.1 201 ")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_http_requests_may_come_in_any_pieces(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        whole = request(api)

        async def send_in_two(at: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            writer.write(whole[:at])
            await asyncio.sleep(0.02)
            writer.write(whole[at:])
            async with asyncio.timeout(20):
                answer = await reader.read()
            writer.close()
            assert answer.startswith(b"HTTP/1.1 201 "), (at, answer)
            assert b'"arguments":[1.50]' in answer

        places = range(1, len(whole), 3)
        for first in range(0, len(places), 40):
            await asyncio.gather(*map(send_in_two, places[first : first + 40]))
        chunks = b"".join(b"1\r\n%b\r\n" % bytes([byte]) for byte in BODY) + b"0\r\n\r\n"
        length = b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
        answer = await api.send(whole.replace(length, b"Transfer-Encoding: chunked\r\n\r\n" + chunks))
        assert answer.startswith(b"HTTP/1.1 201 ")


async def test_http_client_that_goes_away_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running_api(tmp_path) as api:
        for end in (20, 200, len(request(api)) - 5):
            _, writer = await asyncio.open_connection("127.0.0.1", api.port)
            writer.write(request(api)[:end])
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.transport.abort()
        _, writer = await asyncio.open_connection("127.0.0.1", api.port)
        job = (await api.client.post("/jobs", json={"host": "x", "procedure": "p", "arguments": []})).json()["job"]
        await api.dispatcher.result(job)
        writer.write(f"GET /api/v1/jobs/{job}?wait=60 HTTP/1.1\r\nHost: localhost\r\n{api.authorization}\r\n".encode())
        writer.transport.abort()
        assert (await api.client.get("/me")).status_code == 200
        async with asyncio.timeout(20):
            while len(api.api.server.acceptor.connections) > 1 or api.api.service.waits:
                await asyncio.sleep(0.02)
        assert api.api.service.memory.available == api.dispatcher.config.request_memory
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_http_error_of_a_handler_is_an_internal_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(_: APIRequest) -> Response:
        raise RuntimeError("secret detail")

    operation = Operation("GET", "/x", "get_x", "x", fail, {200: Answer("never")}, is_public=True)
    async with running_api(tmp_path) as api:
        app = HTTPApp(api.api.service, (operation,))

        async def with_client(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = {"client": Client(("anonymous@x",), "127.0.0.1:1", "127.0.0.1:2")}
            await app(scope, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(with_client), base_url="http://localhost") as client:
            reply = await client.get("/api/v1/x")
    assert (reply.status_code, reply.json()["code"]) == (500, "internal_error")
    assert "secret" not in reply.text
    [record] = [record for record in caplog.records if record.getMessage() == "HTTP request failed"]
    assert record.exc_info is not None
    assert record.__dict__["request"] == reply.headers["harp-request"]


async def test_http_long_response_leaves_turns_for_others(tmp_path: Path) -> None:
    body = b"x" * 15_000_000
    turns = 0

    async def answer(_: APIRequest) -> Response:
        return Response(body)

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    pieces: list[tuple[bytes, int]] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            pieces.append((message["body"], turns))

    operation = Operation("GET", "/x", "get_x", "x", answer, {200: Answer("long")}, is_public=True)
    async with running_api(tmp_path) as api:
        client = Client(("anonymous@x",), "127.0.0.1:1", "127.0.0.1:2")
        scope = {"type": "http", "method": "GET", "path": "/api/v1/x", "query_string": b"", "headers": []}
        other = asyncio.create_task(take_turns())
        await HTTPApp(api.api.service, (operation,))({**scope, "state": {"client": client}}, receive, send)
        other.cancel()
    assert b"".join(piece for piece, _ in pieces) == body
    assert max(len(piece) for piece, _ in pieces) <= 256 * 1024
    assert all(after > before for (_, before), (_, after) in pairwise(pieces)), "others have a turn between two"
