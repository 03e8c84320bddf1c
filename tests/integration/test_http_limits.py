"""The limits in front of the HTTP API, each met by a client; requests that two programs could divide differently."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from harpcaller.config import Address, HTTPSettings
from harpcaller.http import server
from support.certificates import server_files
from support.deadline import eventually
from support.dispatcher import host_line
from support.http_api import RunningAPI, running_api
from support.http_streams import ended
from support.peers import Peer
from support.scripted import scripted_harpd

KIB, MIB = 1024, 1024 * 1024
GET = b"GET /api/v1/openapi.json HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("peer")) as peer:
        yield peer


def post(api: RunningAPI, body: bytes = b"", *headers: str, path: str = "/jobs") -> bytes:
    """Return a request with a token; without headers, it has the length of its body."""
    given = headers or (f"Content-Length: {len(body)}",)
    lines = [f"POST /api/v1{path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *given]
    return "\r\n".join([*lines, api.authorization]).encode() + b"\r\n" + body


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1])


def code(response: bytes) -> str:
    found: str = json.loads(response.rpartition(b"\r\n\r\n")[2])["code"]
    return found


async def count_jobs(api: RunningAPI) -> int:
    return len((await api.client.get("/jobs?limit=500")).json()["jobs"])


@asynccontextmanager
async def connected(api: RunningAPI) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_head(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(20):
        return await reader.readuntil(b"\r\n\r\n")


async def test_http_head_has_limits(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        fits = await api.send(GET + b"X: %b\r\nConnection: close\r\n\r\n" % (b"x" * (31 * KIB)))
        assert status(fits) == 200
        for size in (33 * KIB, 50 * MIB):
            refused = await api.send(GET + b"X: %b\r\n\r\n" % (b"x" * size))
            assert (status(refused), code(refused)) == (431, "head_too_long")
        many = await api.send(
            GET + b"".join(b"X: %d\r\n" % number for number in range(98)) + b"Connection: close\r\n\r\n"
        )
        assert status(many) == 200
        refused = await api.send(GET + b"X: 1\r\n" * 100 + b"\r\n")
        assert (status(refused), code(refused)) == (431, "head_too_long")
        endless = await api.send(GET + b"X: 1\r\n" * 1_000_000)
        assert status(endless) == 431
        for size in (9 * KIB, 25 * MIB):
            refused = await api.send(b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"x" * size))
            assert (status(refused), code(refused)) == (414, "url_too_long")
        assert b"harp-request: " in refused.lower()
        assert b"x-content-type-options: nosniff" in refused


async def test_http_silent_and_slow_clients_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(server, "KEEP_ALIVE_SECONDS", 0.5)
    async with running_api(tmp_path, idle_timeout=0.5) as api:
        assert await api.send(b"") == b""  # it never sends anything
        assert await api.send(b"\r\n") == b""

        async def send_slowly() -> bytes:
            async with connected(api) as (reader, writer):
                answer = asyncio.create_task(reader.read())
                for at in range(len(GET)):
                    writer.write(GET[at : at + 1])
                    await asyncio.wait([answer], timeout=0.05)
                return await answer

        async with asyncio.timeout(20):
            refused = await send_slowly()
        assert (status(refused), code(refused)) == (408, "request_timeout")
        refused = await api.send(GET)
        assert (status(refused), code(refused)) == (408, "request_timeout")
        refused = await api.send(post(api, b"", "Content-Length: 100") + b"{")
        assert (status(refused), code(refused)) == (408, "request_timeout")
        body = b'{"host":"a","procedure":"b","arguments":[1,2,3]}'
        async with connected(api) as (reader, writer):
            writer.write(post(api, b"", f"Content-Length: {len(body)}"))
            for at in range(0, len(body), 8):  # slower than `idle_timeout` in all
                writer.write(body[at : at + 8])
                await asyncio.sleep(0.15)
            assert status(await read_head(reader)) == 201
            async with asyncio.timeout(20):
                await reader.read()  # ends when the connection was idle for too long


async def test_http_silent_tls_clients_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    files = server_files(tmp_path)
    http = HTTPSettings(
        listen=(Address("127.0.0.1", 0, tls=True),), certfile=files.certfile, keyfile=files.keyfile, connections=3
    )
    async with running_api(tmp_path, http=http) as api:
        assert await api.send(b"") == b""  # no handshake
        context = ssl.create_default_context(cafile=files.ca_file)
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port, ssl=context)
        async with asyncio.timeout(20):
            assert await reader.read() == b""  # no request
        writer.close()
        # A client in the middle of its handshake gives way to others, and to the end of the server.
        silent = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(6)]
        async with httpx.AsyncClient(verify=context) as client:
            reply = await client.get(f"https://127.0.0.1:{api.port}/api/v1/openapi.json")
            assert reply.status_code == 200
        monkeypatch.setattr(server, "HEAD_SECONDS", 60)
        silent += [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(3)]
        await asyncio.sleep(0.1)
    for _, writer in silent:
        writer.close()


async def test_http_bodies_have_limits(tmp_path: Path) -> None:
    async with running_api(tmp_path, request_line=200 * KIB, request_memory=300 * KIB) as api:
        before_body = await api.send(post(api, b"", "Content-Length: 999999999999"))
        assert (status(before_body), code(before_body)) == (413, "too_long")
        assert b"request_line, which is 204800 bytes" in before_body
        chunk = b"%x\r\n%b\r\n" % (64 * KIB, b" " * 64 * KIB)
        chunked = await api.send(post(api, b"", "Transfer-Encoding: chunked") + chunk * 20)
        assert (status(chunked), code(chunked)) == (413, "too_long")
        text = json.dumps({"host": "a", "procedure": "b", "arguments": ["x" * 190 * KIB]}).encode()
        assert len(text) < 200 * KIB
        async with connected(api) as (reader, writer):
            waiting = []
            for number in range(2):  # each keeps 190 KiB, of which 64 KiB are not counted
                waiting.append(await asyncio.open_connection("127.0.0.1", api.port))
                request = post(api, b"", f"Content-Length: {len(text)}").decode()
                other = api.headers_of(f"other{number}", "admin")["Authorization"]  # each client has its share
                request = request.replace(api.authorization, f"Authorization: {other}\r\n")
                waiting[-1][1].write(request.encode() + text[:-1])
            await eventually(lambda: api.api.service.memory.available < 50 * KIB, what="both bodies")
            writer.write(post(api, text))
            assert status(await read_head(reader)) == 429
            for held, sender in waiting:
                sender.write(text[-1:])
                assert status(await read_head(held)) == 201
                sender.close()
        assert status(await api.send(post(api, text, f"Content-Length: {len(text)}", "Connection: close"))) == 201


async def test_http_connections_of_a_peer_are_limited(tmp_path: Path) -> None:
    async with running_api(tmp_path, http=HTTPSettings(connections_per_peer=3)) as api:
        silent = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(3)]
        refused = await api.send(b"")
        assert (status(refused), code(refused)) == (429, "too_many_connections")
        assert b"Retry-After: " in refused
        for _, writer in silent:
            writer.close()


async def test_http_silent_connections_give_way(tmp_path: Path) -> None:
    async with running_api(tmp_path, http=HTTPSettings(connections=4)) as api:
        silent = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(40)]
        assert (await api.client.get("/jobs")).status_code == 200
        kept = []
        for _ in range(3):
            async with asyncio.timeout(20):
                reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
                writer.write(GET.replace(b"/openapi.json", b"/jobs") + api.authorization.encode() + b"\r\n")
                assert status(await read_head(reader)) == 200
                kept.append(writer)
        refused = await api.send(b"")
        assert (status(refused), code(refused)) == (429, "too_many_connections")
        assert (await api.client.get("/jobs")).status_code == 200  # its connection was kept
        for writer in [*kept, *(writer for _, writer in silent)]:
            writer.close()


async def test_http_client_that_does_not_read_is_disconnected(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port), idle_timeout=0.5) as api:
        job = await ended(api, "echo", "x" * 12 * MIB)
        async with connected(api) as (reader, writer):
            head = GET.replace(b"/openapi.json", f"/jobs/{job}/result".encode())
            writer.write(head + api.authorization.encode() + b"\r\n")
            await read_head(reader)
            await asyncio.sleep(2)  # the reader takes little more without being asked
            received = 0
            async with asyncio.timeout(20):
                while data := await reader.read(MIB):
                    received += len(data)
            assert received < 12 * MIB


async def test_http_client_that_ends_while_it_is_sent_data_is_no_fault(
    tmp_path: Path, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """A transport of asyncio that has closed behind its last data cannot be aborted."""
    async with running_api(tmp_path, host_line(peer.port)) as api:
        call = {"host": "web01", "procedure": "echo", "arguments": ["x" * 12 * MIB]}
        job = (await api.client.post("/jobs?wait=20&payloads=none", json=call)).json()["job"]
        async with connected(api) as (reader, writer):
            head = GET.replace(b"/openapi.json", f"/jobs/{job}/result".encode())
            writer.write(head + api.authorization.encode() + b"\r\n")
            await read_head(reader)
            writer.write_eof()
            async with asyncio.timeout(20):
                await reader.read()
                while api.api.open_connections > 1:  # that of api.client
                    await asyncio.sleep(0.01)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_http_long_responses_wait_for_memory(tmp_path: Path, peer: Peer) -> None:
    async with running_api(tmp_path, host_line(peer.port), reply_memory=MIB) as api:
        job = await ended(api, "echo", "x" * 12 * MIB)
        async with connected(api) as (reader, writer):
            head = GET.replace(b"/openapi.json", f"/jobs/{job}/result".encode())
            writer.write(head + api.authorization.encode() + b"\r\n")
            await read_head(reader)  # and nothing else of it
            second = asyncio.create_task(api.client.get(f"/jobs/{job}/result"))
            await eventually(lambda: api.api.service.streams.memory.has_waiting, what="the wait of the second one")
            assert (await api.client.get("/jobs")).status_code == 200  # short responses need no share
        assert len((await second).content) > 12 * MIB
        assert not api.api.service.streams.memory.has_waiting


BODY = b'{"host":"a","procedure":"b","arguments":[]}'
SMUGGLED = b"0\r\n\r\n" + BODY
#: Header lines and bodies of requests that two programs could divide differently.
AMBIGUOUS = {
    "length and chunked": (b"Content-Length: 43\r\nTransfer-Encoding: chunked\r\n\r\n", SMUGGLED),
    "chunked and length": (b"Transfer-Encoding: chunked\r\nContent-Length: 43\r\n\r\n", SMUGGLED),
    "two lengths": (b"Content-Length: 43\r\nContent-Length: 5\r\n\r\n", BODY),
    "the same length twice": (b"Content-Length: 43\r\nContent-Length: 43\r\n\r\n", BODY),
    "a list of lengths": (b"Content-Length: 43, 43\r\n\r\n", BODY),
    "a signed length": (b"Content-Length: +43\r\n\r\n", BODY),
    "a negative length": (b"Content-Length: -1\r\n\r\n", BODY),
    "two encodings": (b"Transfer-Encoding: gzip, chunked\r\n\r\n", SMUGGLED),
    "identity": (b"Transfer-Encoding: identity\r\n\r\n", BODY),
    "an unknown encoding": (b"Transfer-Encoding: xchunked\r\n\r\n", SMUGGLED),
    "chunked twice": (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", SMUGGLED),
    "a space before the colon": (b"Transfer-Encoding : chunked\r\n\r\n", SMUGGLED),
    "a folded header": (b"X: a\r\n Content-Length: 43\r\n\r\n", BODY),
    "a folded header with a tab": (b"X: a\r\n\tb\r\nContent-Length: 43\r\n\r\n", BODY),
    "a bare line feed": (b"X: a\nContent-Length: 43\r\n\r\n", BODY),
    "a bare carriage return": (b"X: a\rContent-Length: 43\r\n\r\n", BODY),
    "a null byte": (b"X: a\0b\r\nContent-Length: 43\r\n\r\n", BODY),
    "a bare line feed after a chunk size": (b"Transfer-Encoding: chunked\r\n\r\n", b"2b\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk size with a prefix": (b"Transfer-Encoding: chunked\r\n\r\n", b"0x2b\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a long chunk size": (b"Transfer-Encoding: chunked\r\n\r\n", b"1000000000000002b\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a longer chunk": (b"Transfer-Encoding: chunked\r\n\r\n", b"2a\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "trailers": (b"Transfer-Encoding: chunked\r\n\r\n", b"2b\r\n" + BODY + b"\r\n0\r\nContent-Length: 5\r\n\r\n"),
    "endless chunk extensions": (b"Transfer-Encoding: chunked\r\n\r\n", b"2b;" + b"x" * 100_000),
    "two hosts": (b"Host: evil\r\nContent-Length: 43\r\n\r\n", BODY),
}


async def test_http_ambiguous_requests_are_refused(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        head = f"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{api.authorization}"
        for name, (headers, body) in AMBIGUOUS.items():
            answer = await api.send(head.encode() + headers + body + GET + b"\r\n")
            assert status(answer) == 400, name
            assert code(answer) == "invalid_request", name
            assert answer.count(b"HTTP/1.1 ") == 1, name  # nothing after it was taken for a request
        for line in (
            b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n",
            b"GET /\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",  # no host
            b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b'{"harpcaller":1,"get_result":"x"}\n',
        ):
            answer = await api.send(line)
            assert status(answer) == 400, line
        assert await count_jobs(api) == 0


async def test_http_requests_of_one_connection_are_answered_in_order(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        last = GET + b"Connection: close\r\n\r\n"
        first = b"GET /api/v1/nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answers = await api.send(first * 3 + last + first)
        assert [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]] == [404, 404, 404, 200]
        many = await api.send((GET + b"\r\n") * 200)
        assert many.endswith(b"\n")
        assert 1 <= many.count(b"HTTP/1.1 200") < 200  # too many at once: the others are not taken
        upgrade = await api.send(GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\nPRI * HTTP/2.0")
        assert upgrade.count(b"HTTP/1.1 200") == 1
        head = await api.send(last.replace(b"GET", b"HEAD"))
        assert status(head) == 200
        assert head.endswith(b"\r\n\r\n")
        # A body that is not read does not become a request.
        answers = await api.send(GET + b"Content-Length: %d\r\n\r\n" % len(first) + first + last)
        assert answers.count(b"HTTP/1.1 200") == 2
        assert b"HTTP/1.1 404" not in answers


async def test_http_request_behind_a_stream_leaves_no_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harpcaller.http.streaming.HEARTBEAT", 0.1)
    async with running_api(tmp_path) as api:
        kinds = api.api.service.streams.kinds
        async with connected(api) as (reader, writer):
            writer.write(f"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n{api.authorization}\r\n".encode())
            assert status(await read_head(reader)) == 200
            writer.write(GET + b"\r\n")  # its answer would follow the end of the stream
            await eventually(
                lambda: any(getattr(each, "pipeline", None) for each in api.api.server.state.connections), 20
            )
            assert kinds["events"] == 1
            writer.transport.abort()
        await eventually(lambda: not kinds["events"], 20)


async def test_http_invalid_body_behind_a_request_does_not_end_its_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_api(tmp_path) as api:
        job = (await api.client.post("/jobs", json={"host": "x", "procedure": "p", "arguments": []})).json()["job"]
        await api.dispatcher.result(job)
        tag = (await api.client.get(f"/jobs/{job}")).headers["etag"]
        wait = f"GET /api/v1/jobs/{job}?wait=1 HTTP/1.1\r\nHost: localhost\r\nIf-None-Match: {tag}\r\n"
        chunked = b"POST /api/v1/nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        for others in (b"", GET + b"\r\n"):
            sent = f"{wait}{api.authorization}\r\n".encode() + others + chunked + b"no length\r\n"
            answers = await api.send(sent)
            assert [int(each[:3]) for each in answers.split(b"HTTP/1.1 ")[1:]] == [304, *([200] if others else [])]
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_http_request_that_was_answered_gets_no_second_answer(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api, connected(api) as (reader, writer):
        head = b"POST /api/v1/nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"1\r\nx\r\n")
        answer = await read_head(reader)
        assert status(answer) == 404
        writer.write(b"no length\r\n")
        async with asyncio.timeout(20):
            assert b"HTTP/1.1" not in await reader.read()


async def test_http_connection_that_is_reset_during_an_answer_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))  # if the reset arrives in this moment

    async with running_api(tmp_path) as api:
        monkeypatch.setattr("asyncio.selector_events._SelectorSocketTransport.write_eof", fail)
        head = b"POST /api/v1/nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 9\r\n\r\n"
        assert status(await api.send(head + b"x")) == 404
        await eventually(lambda: not api.api.server.acceptor.connections, 20)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
