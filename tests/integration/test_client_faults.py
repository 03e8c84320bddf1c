"""Faults of the network and the peer: the client never raises an error of socket, ssl or json."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

import harp
from harp import aio
from harp._net import sockets
from support.blackhole import black_hole
from support.certificates import Certificates, server_files
from support.deadline import eventually, wait_until
from support.peers import Peer, PeerConnection, Script, answering, resetting, server_context, silent
from support.shells import Shell

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"


class Nowhere(Peer):
    """An address without a server."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def half_a_line(conn: PeerConnection) -> None:
    conn.expect()
    conn.send(b'{"result": "')
    conn.reset()


def too_long(conn: PeerConnection) -> None:
    conn.expect()
    piece = b"x" * (1024 * 1024)
    try:
        for _ in range(sockets.REPLY_LIMIT // len(piece) + 1):
            conn.send(piece)
    except OSError:
        conn.until_closed()


#: The behaviour of the peer, and the client's error.
FAULTS: list[tuple[str, Script, str]] = [
    ("closes at once", lambda conn: None, "closed the connection before|reset by peer|Broken pipe"),
    ("resets at once", lambda conn: conn.reset(), "reset by peer|Broken pipe|closed the connection"),
    ("closes after the request", answering(), "closed the connection before the reply was complete"),
    ("resets after the request", resetting, "reset by peer"),
    ("resets in the middle of a line", half_a_line, "reset by peer"),
    ("is not JSON", answering(b"SSH-2.0-OpenSSH_9.2\r\n"), "column 1"),
    ("is not UTF-8", answering(b'{"result": "\xff"}\n'), "not UTF-8"),
    ("is NaN", answering(b'{"result": NaN}\n'), "NaN is not JSON"),
    ("is no object", answering([1]), "expected an object"),
    ("repeats a key", answering(b'{"result": 1, "result": 2}\n'), "repeated key"),
    ("is nested too deep", answering(b'{"result": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"), "nested deeper"),
    ("has too many digits", answering(b'{"result": ' + b"9" * 5000 + b"}\n"), "digits"),
    ("is no reply", answering({"hello": "world"}), "not a reply of the protocol"),
    ("is another reply", answering({"job_id": JOB}), "does not answer this request"),
    ("lacks a part", answering({"exception": {"type": "E"}}), "message: missing"),
    ("is an empty line", answering(b"\n"), "column 1"),
    ("is binary", answering(bytes(range(256)) + b"\n"), "not UTF-8|column"),
    ("is endless", too_long, "a line is longer than 67108864 bytes"),
]


@pytest.mark.parametrize(("script", "message"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_connection_fault_is_a_communication_error(shell: Shell, script: Script, message: str) -> None:
    with Peer(script, script) as peer:
        job = shell.caller(peer, reconnect=0).job(JOB)
        with pytest.raises(harp.CommunicationError, match=message) as caught:
            job.get()
        assert str(caught.value).startswith(f"127.0.0.1:{peer.port}: ")
        assert caught.value.__cause__ is not None or "closed" in str(caught.value)
        assert isinstance(job.result(wait=True), harp.CommunicationError)


OPERATIONS = [
    "host",
    "start_time",
    "end_time",
    "cancel",
    "details",
    "why",
    "get",
    "follow",
    "stream",
    "submit",
    "request",
    "direct",
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("127.0.0.1", "cannot connect: Connection refused"),
        ("localhost", "cannot connect: .*Connection refused"),
        ("no-such-host.invalid", "cannot resolve the name: "),
        ("a" * 300, "cannot resolve the name: "),
        ("null\0byte", "cannot resolve the name: "),
        ("..", "cannot resolve the name: |cannot connect"),
    ],
)
def test_unreachable_dispatcher_fails_every_operation(shell: Shell, operation: str, host: str, message: str) -> None:
    nowhere = Nowhere(host, closed_port())
    rpc = shell.caller(nowhere)
    job = rpc.job(JOB)
    operations = {
        "submit": rpc.web01.p,
        "request": lambda: rpc.request({}),
        "direct": lambda: shell.server(nowhere).p(),
        "follow": lambda: list(job.follow()),
        "stream": lambda: list(job.stream()),
    }
    run = operations.get(operation) or getattr(job, operation)
    with pytest.raises(harp.CommunicationError, match=message) as caught:
        run()
    assert str(caught.value).startswith(f"{host}:{nowhere.port}: ")
    assert isinstance(caught.value.__cause__, (OSError, ValueError))


def saying(data: bytes) -> Script:
    def script(conn: PeerConnection) -> None:
        with contextlib.suppress(OSError):  # the client may have closed already
            conn.send(data)
            conn.sock.shutdown(socket.SHUT_WR)
        conn.until_closed()

    return script


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (saying(b"SSH-2.0-OpenSSH_9.2\r\n"), "it does not speak TLS"),
        (saying(b"\x16\x03\x03\xff\xff" + b"\0" * 64), "TLS handshake: "),
        (saying(b"\0" * 1000), "TLS handshake: "),
        (lambda conn: None, "TLS handshake: "),
        (lambda conn: conn.reset(), "TLS handshake: |cannot connect: "),  # the first detection wins
    ],
    ids=["text", "garbage", "zeros", "close", "reset"],
)
def test_tls_with_invalid_server_raises(shell: Shell, script: Script, message: str) -> None:
    with Peer(script) as peer:
        with pytest.raises(harp.CommunicationError, match=message) as caught:
            shell.server(peer).p()
        assert isinstance(caught.value.__cause__, OSError)


def test_tls_reset_before_handshake_closes_the_socket() -> None:
    """The socket is closed; no data is sent without encryption."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        wait_until(lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET)
        with pytest.raises(ConnectionResetError):
            sockets.tls_context(None).wrap_socket(sock)


def test_plain_request_to_tls_server_fails(shell: Shell, files: Certificates) -> None:
    with Peer(silent, tls=server_context(files)) as peer:
        assert isinstance(shell.caller(peer).job(JOB).result(), harp.CommunicationError)


@pytest.mark.parametrize("tls", [False, True])
def test_refusal_of_unread_request_is_received(shell: Shell, files: Certificates, tls: bool) -> None:
    """The peer refuses a long request before it has read all of it; the client still receives the reply."""
    refusal = {"error": {"type": "invalid_request", "message": "a line is longer than 16777216 bytes"}}
    if tls:
        refusal["harp"] = 1  # type: ignore[assignment]

    def script(conn: PeerConnection) -> None:
        conn.sock.recv(1024)
        conn.reply(refusal)
        conn.sock.shutdown(socket.SHUT_WR)
        conn.until_closed()

    with Peer(script, tls=server_context(files) if tls else None) as peer:
        procedure = shell.server(peer).p if tls else shell.caller(peer).web01.p
        with pytest.raises(harp.RemoteError if tls else harp.RequestRefused, match="invalid_request: a line is longer"):
            procedure("x" * 20_000_000)


def test_tls_handshake_with_silent_server_times_out(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "CONNECT_TIMEOUT", 0.3)
    with Peer(silent) as peer:
        with pytest.raises(harp.CommunicationError, match=r"TLS handshake: .*timed out"):
            shell.server(peer).p()
        assert peer.connections[0].closed.wait(30)


def test_connect_to_silent_host_times_out(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "CONNECT_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        full = []
        try:
            for _ in range(4):  # nothing accepts: the queue is full, further connections wait
                full.append(socket.socket())
                full[-1].setblocking(False)
                full[-1].connect_ex(listener.getsockname())
            error = shell.caller(Nowhere(*listener.getsockname())).job(JOB).result()
        finally:
            for sock in full:
                sock.close()
    assert isinstance(error, harp.CommunicationError)
    assert "cannot connect: timed out" in str(error)


def test_connect_with_slow_resolver_times_out(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt ends in time; the resolver has no time limit."""
    resolved = threading.Event()

    def resolve(*args: Any, flags: int = 0, **kwargs: Any) -> list[Any]:
        if flags == socket.AI_NUMERICHOST:
            raise socket.gaierror
        assert resolved.wait(30)
        return []

    monkeypatch.setattr(sockets, "CONNECT_TIMEOUT", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    error = shell.caller(Nowhere("slow.invalid", 1)).job(JOB).result()
    assert not resolved.is_set()
    resolved.set()
    assert isinstance(error, harp.CommunicationError)
    assert str(error) == "slow.invalid:1: cannot resolve the name: timed out"
    wait_until(lambda: not any(thread.name == "harp resolver" for thread in threading.enumerate()))


async def test_lookups_that_hang_do_not_delay_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take no thread of the executor, whose other work would wait."""
    release = threading.Event()
    resolve = socket.getaddrinfo

    def hang(host: str, *args: Any, flags: int = 0, **kwargs: Any) -> Any:
        if flags == socket.AI_NUMERICHOST or host == "localhost":
            return resolve(host, *args, **{**kwargs, "flags": flags})
        assert release.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    waiting = [asyncio.create_task(aio.AsyncHarpCaller(f"hang{number}").job(JOB).result()) for number in range(60)]
    try:
        with Peer(answering({"result": 1})) as peer:
            assert await aio.AsyncHarpCaller("localhost", peer.port).job(JOB).get() == 1
        assert await asyncio.to_thread(int, "5") == 5
        assert not any(task.done() for task in waiting)
    finally:
        release.set()
        results = await asyncio.gather(*waiting)
    assert all("the name has no address" in str(error) for error in results)
    await eventually(lambda: not any(thread.name == "harp resolver" for thread in threading.enumerate()))


def test_connect_tries_every_address(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address refuses the connection, the second accepts it."""
    with Peer(answering({"result": 1}), address="127.0.0.1") as peer:
        family, kind = socket.AF_INET, socket.SOCK_STREAM
        found = [(family, kind, 6, "", (address, peer.port)) for address in ("127.0.0.2", "127.0.0.1")]
        found.insert(0, (socket.AF_PACKET, kind, 6, "", ("of no family here", peer.port)))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        peer.host = "two-addresses.invalid"
        try:
            assert shell.caller(peer).job(JOB).get() == 1
        finally:
            peer.host = "127.0.0.1"
            monkeypatch.undo()


def test_connect_is_not_delayed_by_a_silent_address(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "CONNECT_TIMEOUT", 3600.0)
    family, kind = socket.AF_INET, socket.SOCK_STREAM
    with black_hole() as hole, Peer(answering({"result": 1})) as peer:
        found = [(family, kind, 6, "", (peer.host, port)) for port in (hole, hole, peer.port)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        assert shell.caller(peer).job(JOB).get() == 1


def test_connect_uses_the_first_address_that_answers(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    with Peer(answering({"result": 1})) as first, socket.create_server(("127.0.0.1", 0)) as second:
        addresses = [(first.host, first.port), second.getsockname()]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        assert shell.caller(first).job(JOB).get() == 1


@pytest.mark.parametrize("kind", ["connecting", "handshake"])
def test_close_wakes_a_connecting_thread(kind: str) -> None:
    with ExitStack() as stack:
        if kind == "connecting":
            port = stack.enter_context(black_hole())
        else:
            port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        conn = harp.JSONSSLConnection.__new__(harp.JSONSSLConnection)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        opening = pool.submit(conn.__init__, "127.0.0.1", port)  # type: ignore[misc]  # it connects
        wait_until(lambda: connecting(port), what="the attempt")
        while not opening.done():  # the thread may not be waiting yet
            conn.close()
            time.sleep(0.01)
        with pytest.raises(harp.CommunicationError, match="not connected: the connection was closed on this side"):
            opening.result()


def connecting(port: int) -> bool:
    return any(found.raddr and found.raddr[1] == port for found in psutil.Process().net_connections())


def test_connect_error_lists_all_attempts(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, closed_port())) for address in ("127.0.0.2", "127.0.0.3")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    error = shell.caller(Nowhere("two-addresses.invalid", 1)).job(JOB).result()
    monkeypatch.undo()
    assert "127.0.0.2: Connection refused; 127.0.0.3: Connection refused" in str(error)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_connect_over_ipv6(shell: Shell, tmp_path: Any) -> None:
    files = server_files(tmp_path, ("::1",))
    with Peer(answering({"result": 1}), address="::1") as peer:
        assert shell.caller(peer).job(JOB).get() == 1
    script = answering({"harp": 1, "stream_result": False}, {"result": 1})
    with Peer(script, address="::1", tls=server_context(files)) as peer:
        assert shell.server(peer, ca_file=files.ca_file).p() == 1
    error = shell.caller(Nowhere("::1", closed_port())).job(JOB).result()
    assert str(error).startswith("[::1]:")


def test_connect_to_name_with_two_families(shell: Shell) -> None:
    with Peer(answering({"result": 1})) as peer:  # listens on 127.0.0.1; localhost may be ::1 first
        peer.host = "localhost"
        try:
            assert shell.caller(peer).job(JOB).get() == 1
        finally:
            peer.host = "127.0.0.1"


def test_socket_has_keepalive_and_nodelay() -> None:
    with Peer(silent, silent, tls=None) as peer:
        with harp.JSONConnection(peer.host, peer.port) as conn:
            conn.send({})
            (descriptor,) = [
                found.fd
                for found in psutil.Process().net_connections()
                if found.raddr == (peer.host, peer.port) and found.status == psutil.CONN_ESTABLISHED
            ]
            with socket.socket(fileno=os.dup(descriptor)) as sock:
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert os.get_blocking(descriptor)  # without a timeout: results may take hours
        with harp.JSONConnection(peer.host, peer.port):
            pass


def test_value_without_json_form_is_not_sent() -> None:
    with Peer(answering({"ok": 1})) as peer:
        with harp.JSONConnection(peer.host, peer.port) as conn:
            with pytest.raises(harp.HarpException, match=r"cannot be sent as JSON: at \['a'\]\[1\]: type set"):
                conn.send({"a": [0, {1}]})
            conn.send({"a": 1})
            assert conn.receive() == {"ok": 1}


# asyncio only: cancelled tasks.


async def wait_for_cancel(task: asyncio.Task[Any], peer: Peer) -> None:
    """Cancel a task after it has sent its request; the peer must see the connection close."""
    await eventually(lambda: peer.requests, what="the request")
    await asyncio.sleep(0)  # a task that has not started has no connection
    conn = peer.connections[0]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(conn.closed.wait, 30)


def replying(*replies: object) -> Script:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(*replies)
        conn.until_closed()

    return script


async def test_cancelled_task_closes_its_connection(files: Certificates) -> None:
    with Peer(replying()) as peer:
        rpc = aio.AsyncHarpCaller(peer.host, peer.port)
        await wait_for_cancel(asyncio.create_task(rpc.job(JOB).get()), peer)
    with Peer(replying()) as peer:
        rpc = aio.AsyncHarpCaller(peer.host, peer.port)
        await wait_for_cancel(asyncio.create_task(rpc.job(JOB).follow(since=0).all()), peer)
    for replies in ([], [{"harp": 1, "stream_result": False}]):
        with Peer(replying(*replies), tls=server_context(files)) as peer:
            server = aio.AsyncHarpServer(peer.host, "u", "p", peer.port)
            await wait_for_cancel(asyncio.create_task(server.p()), peer)
    with Peer(replying({"harp": 1, "stream_result": True}), tls=server_context(files)) as peer:
        iterator = await aio.AsyncHarpServer(peer.host, "u", "p", peer.port).p()
        await wait_for_cancel(asyncio.create_task(iterator.all()), peer)


async def test_task_cancelled_in_handshake_closes_its_connection() -> None:
    with Peer(silent) as peer:
        task = asyncio.create_task(aio.AsyncHarpServer(peer.host, "u", "p", peer.port).p())
        await eventually(lambda: peer.connections, what="the connection")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(peer.connections[0].closed.wait, 30)


async def test_deleted_iterator_closes_its_connection(files: Certificates) -> None:
    with Peer(replying({"packet": 0, "data": 1})) as peer:
        async for item in aio.AsyncHarpCaller(peer.host, peer.port).job(JOB).follow(since=0):
            assert item == 1
            break
        gc.collect()
        assert await asyncio.to_thread(peer.connections[0].closed.wait, 30)
    with Peer(replying({"harp": 1, "stream_result": True}, {"stream": 1}), tls=server_context(files)) as peer:
        async for item in await aio.AsyncHarpServer(peer.host, "u", "p", peer.port).p():
            assert item == 1
            break
        gc.collect()
        assert await asyncio.to_thread(peer.connections[0].closed.wait, 30)


async def test_unused_iterator_has_no_connection() -> None:
    with Peer() as peer:
        iterator = aio.AsyncHarpCaller(peer.host, peer.port).job(JOB).follow()
        await iterator.close()
        assert await iterator.all() == []


async def test_concurrent_calls_return_their_results() -> None:
    def script(conn: PeerConnection) -> None:
        request = conn.expect()
        conn.reply({"result": request["get_result"]})

    count = 200
    with Peer(always=script) as peer:
        rpc = aio.AsyncHarpCaller(peer.host, peer.port, keep_alive=False)
        found = await asyncio.gather(*(rpc.job(f"job-{number}").get() for number in range(count)))
    assert found == [f"job-{number}" for number in range(count)]


async def test_tasks_share_an_iterator() -> None:
    lines = [{"packet": number, "data": number} for number in range(500)]
    with Peer(answering(*lines, {"result": 1})) as peer:
        iterator = aio.AsyncHarpCaller(peer.host, peer.port).job(JOB).follow(since=0)
        parts = await asyncio.gather(*(iterator.all() for _ in range(5)))
    assert sorted(item for part in parts for item in part) == list(range(500))


async def test_slow_reader_slows_the_sender() -> None:
    """Records that are not read are not buffered: the peer's sending blocks."""
    sent: list[int] = []

    def script(conn: PeerConnection) -> None:
        conn.expect()
        for number in range(200):
            conn.reply({"packet": number, "data": "x" * 1_000_000})
            sent.append(number)
        conn.reply({"result": 1})

    with Peer(script) as peer:
        iterator = aio.AsyncHarpCaller(peer.host, peer.port).job(JOB).follow(since=0)
        assert len(await anext(iterator)) == 1_000_000
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(sent) < 100
        assert len(await iterator.all()) == 199


async def test_slow_reader_of_timed_records_slows_the_sender() -> None:
    """Timed records are read line by line; the buffers of the network have at most about 10 MB."""
    sent: list[int] = []

    def script(conn: PeerConnection) -> None:
        conn.expect()
        with contextlib.suppress(OSError):  # the client has closed
            for number in range(40_000):
                conn.reply({"packet": number, "time": 1.5, "data": "x" * 1000})
                sent.append(number)

    with Peer(script) as peer:
        async with aio.AsyncHarpCaller(peer.host, peer.port).job(JOB).follow(since=0, timed=True) as records:
            for number in range(1000):
                assert (await anext(records))[0] == number
                await asyncio.sleep(0.001)  # the sender has the time to send all
            assert len(sent) < 25_000


def test_async_json_connection_sends_and_receives(files: Certificates) -> None:
    async def main() -> None:
        with Peer(answering({"a": 1}), answering({"b": 2})) as peer:
            async with aio.AsyncJSONConnection(peer.host, peer.port) as conn:
                await conn.send([1])
                assert await conn.receive() == {"a": 1}
                await conn.connect()
                await conn.send([2])
                assert await conn.receive() == {"b": 2}
            with pytest.raises(harp.CommunicationError, match="not connected"):
                await conn.receive()
        with Peer(answering({"a": 1}), tls=server_context(files)) as peer:
            async with aio.AsyncJSONSSLConnection("localhost", peer.port, files.ca_file) as conn:
                assert repr(conn) == f"<AsyncJSONSSLConnection localhost:{peer.port} connected>"
                await conn.send([1])
                assert await conn.receive() == {"a": 1}
                with pytest.raises(TypeError, match="cannot be copied"):
                    conn.__reduce__()

    asyncio.run(main(), debug=True)


def test_async_connection_is_used_in_a_second_loop() -> None:
    def stays_open(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"reply": True})
        conn.until_closed()

    with Peer(always=stays_open) as peer:
        conn = aio.AsyncJSONConnection(peer.host, peer.port)

        async def exchange() -> Any:
            await conn.connect()
            await conn.send({"request": True})
            return await conn.receive()

        for _ in range(3):  # the connection is still open when its loop ends
            assert asyncio.run(asyncio.wait_for(exchange(), 20)) == {"reply": True}
        asyncio.run(conn.close())


@pytest.mark.parametrize("tls", [False, True])
def test_close_ends_connection_shared_with_a_fork(shell: Shell, files: Certificates, tls: bool) -> None:
    """A forked child has the descriptor, too; the peer is notified all the same, so that a direct call is cancelled."""

    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(*([{"harp": 1, "stream_result": True}, {"stream": 1}] if tls else [{"packet": 0, "data": 1}]))
        conn.until_closed()

    with Peer(script, tls=server_context(files) if tls else None) as peer:
        iterator = shell.server(peer).p() if tls else shell.caller(peer).job(JOB).follow(since=0)
        assert next(iterator) == 1
        parent_is_done, done = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(done)
            os.read(parent_is_done, 1)
            os._exit(0)
        try:
            iterator.close()
            assert peer.connections[0].closed.wait(30)
        finally:
            os.close(done)
            os.close(parent_is_done)
            os.waitpid(child, 0)
