"""Keep-alive connections to a harpd: which are used again, which are closed, and that no call is sent twice."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trustme

import harp
from harp import aio
from support.certificates import Certificates
from support.deadline import eventually, wait_until
from support.peers import Peer, PeerConnection, Script, answering, keeping, line_of
from support.shells import Shell

PLAIN = {"harp": 1, "stream_result": False, "keep_alive": 60}
STREAM = {"harp": 1, "stream_result": True, "keep_alive": 60}
FIELD = {"harp": 1, "stream_result": False}
RAISED = {"exception": {"type": "ValueError", "message": "no"}}
FAILED = {"harp": 1, "error": {"type": "timeout", "message": "m"}}
UNKNOWN = "it is not known whether the call ran"


def result(value: object) -> list[object]:
    return [PLAIN, {"result": value}]


def counts(peer: Peer) -> list[int]:
    """Return how many requests were sent on each connection."""
    return [len(conn.received) for conn in peer.connections]


def echoing(conn: PeerConnection) -> None:
    """Return the arguments of each call until the client closes; a script."""
    with suppress(AssertionError):  # it has closed
        while True:
            conn.reply(PLAIN, {"result": conn.expect()["arguments"]})


def wait_until_closed(conn: PeerConnection) -> None:
    """Wait until the peer has closed a connection."""
    wait_until(lambda: conn.sock.fileno() < 0, what="the end of the peer's script")


# Connections that are used again.


def test_keep_alive_changed_ca_file_judges_the_peer_again(
    shell: Shell, tls: ssl.SSLContext, files: Certificates, tmp_path: Path
) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(files.ca_file.read_bytes())
    age = time.monotonic() + 0.1  # until then, the file may change within a tick of its clock
    wait_until(lambda: time.monotonic() > age, what="the age of the file")
    with Peer(always=echoing, tls=tls) as peer:
        server = shell.server(peer, keep_alive=True, ca_file=ca_file)
        assert [server.p(1), server.p(2)] == [[1], [2]]
        assert len(peer.connections) == 1
        other = trustme.CA(key_type=trustme.KeyType.ECDSA)
        ca_file.write_bytes(other.cert_pem.bytes())
        with pytest.raises(harp.CommunicationError, match="certificate is not accepted"):
            server.p(3)
        ca_file.unlink()
        with pytest.raises(harp.HarpException, match="No such file"):
            server.p(4)


def test_keep_alive_sends_calls_on_one_connection(shell: Shell, tls: ssl.SSLContext) -> None:
    with Peer(keeping(result(1), result("two"), result(None)), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        assert [server.p(5), server.p(a=1), server.q()] == [1, "two", None]
    auth = {"user": "u", "password": "secret"}
    assert peer.requests == [
        {"harp": 1, "procedure": "p", "arguments": [5], "auth": auth, "keep_alive": True},
        {"harp": 1, "procedure": "p", "arguments": {"a": 1}, "auth": auth, "keep_alive": True},
        {"harp": 1, "procedure": "q", "arguments": [], "auth": auth, "keep_alive": True},
    ]


def test_client_without_keep_alive_does_not_request_it(shell: Shell, tls: ssl.SSLContext) -> None:
    """Even if harpd grants keep-alive without a request, each call has its own connection."""
    with Peer(keeping(result(1)), keeping(result(2)), tls=tls) as peer:
        server = shell.server(peer, keep_alive=False)
        assert [server.p(), server.p()] == [1, 2]
        assert all(conn.closed.wait(30) for conn in peer.connections)
    assert not any("keep_alive" in request for request in peer.requests)


def test_keep_alive_exception_keeps_the_connection(shell: Shell, tls: ssl.SSLContext) -> None:
    with Peer(keeping([PLAIN, RAISED], [STREAM, {"stream": 1}, RAISED], result(2)), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        with pytest.raises(harp.RemoteException, match="ValueError: no"):
            server.p()
        with pytest.raises(harp.RemoteException, match="ValueError: no"):
            server.p().all()
        assert server.p() == 2
    assert counts(peer) == [3]


def test_keep_alive_stream_returns_connection_at_its_end(shell: Shell, tls: ssl.SSLContext) -> None:
    with Peer(keeping([STREAM, {"stream": 1}, {"result": 2}], result(3)), keeping(result(4)), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        iterator = server.p()
        assert next(iterator) == 1
        assert server.p() == 4  # the first connection is busy
        assert list(iterator) == [harp.Result(2)]
        iterator.close()  # has no effect: the pool has the connection
        assert server.p() == 3
    assert counts(peer) == [2, 1]


def test_keep_alive_uses_most_recent_connection_first(shell: Shell, tls: ssl.SSLContext) -> None:
    streamed: list[object] = [STREAM, {"result": 0}]
    with Peer(keeping(streamed), keeping(streamed, result(1), result(2)), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        first, second = server.p(), server.p()
        assert first.all() == second.all() == [harp.Result(0)]
        assert [server.p(), server.p()] == [1, 2]
    assert counts(peer) == [1, 3]


# Connections that are closed.


def test_keep_alive_legacy_harpd_closes_after_each_call(shell: Shell, tls: ssl.SSLContext) -> None:
    scripts = [answering(FIELD, {"result": number}) for number in range(3)]
    with Peer(*scripts, tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        assert [server.p() for _ in range(3)] == [0, 1, 2]
    assert counts(peer) == [1, 1, 1]


@pytest.mark.parametrize("replies", [[FAILED], [PLAIN, FAILED], [STREAM, {"stream": 1}, FAILED]])
def test_keep_alive_error_closes_the_connection(shell: Shell, tls: ssl.SSLContext, replies: list[object]) -> None:
    with Peer(keeping(result(1), replies), keeping(result(2)), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        assert server.p() == 1
        with pytest.raises(harp.RemoteError, match="timeout: m"):
            list(server.p())
        assert peer.connections[0].closed.wait(30)
        assert server.p() == 2


@pytest.mark.parametrize("how", ["close", "with", "forget"])
def test_keep_alive_stream_closed_early_closes(shell: Shell, tls: ssl.SSLContext, how: str) -> None:
    with Peer(keeping(result(1), [STREAM, {"stream": 1}]), keeping(result(2)), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        assert server.p() == 1
        iterator = server.p()
        assert next(iterator) == 1
        match how:
            case "close":
                iterator.close()
            case "with":
                with iterator:
                    pass
            case "forget":
                del iterator
        assert peer.connections[0].closed.wait(30)
        assert server.p() == 2


def ending_tls(conn: PeerConnection) -> None:
    """Serve one call, then end TLS without waiting for an answer, and the connection; a script."""
    conn.expect()
    conn.reply(*result(1))
    assert isinstance(conn.sock, ssl.SSLSocket)
    conn.sock.setblocking(False)
    with suppress(ssl.SSLWantReadError):
        conn.sock.unwrap()


@pytest.mark.parametrize("script", [answering(*result(1)), ending_tls], ids=["close", "end of TLS"])
def test_keep_alive_connection_closed_by_harpd_is_not_used(shell: Shell, tls: ssl.SSLContext, script: Script) -> None:
    with Peer(script, keeping(result(2)), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        assert server.p() == 1
        wait_until_closed(peer.connections[0])
        assert server.p() == 2
    assert counts(peer) == [1, 1]


@pytest.mark.parametrize("surplus", [{"result": 2}, b"{", FAILED], ids=["line", "part", "error"])
@pytest.mark.parametrize("late", [False, True])
def test_keep_alive_connection_with_extra_data_is_closed(
    shell: Shell, tls: ssl.SSLContext, surplus: object, late: bool
) -> None:
    """Extra data from harpd is never read as the reply to the next call."""
    returned, sent = threading.Event(), threading.Event()

    def script(conn: PeerConnection) -> None:
        conn.expect()
        if late:
            conn.reply(*result(1))
            assert returned.wait(30)
            conn.send(line_of(surplus))
        else:
            conn.send(b"".join(map(line_of, [*result(1), surplus])))
        sent.set()
        conn.until_closed()

    with Peer(script, keeping(result("second")), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        assert server.p() == 1
        returned.set()
        assert sent.wait(30)
        assert server.p() == "second"
        assert peer.connections[0].closed.wait(30)
    assert counts(peer) == [1, 1]


def test_keep_alive_uses_half_of_the_granted_time(shell: Shell, tls: ssl.SSLContext) -> None:
    answer: list[object] = [{**PLAIN, "keep_alive": 1e-6}, {"result": 1}]
    with Peer(keeping(answer), keeping(answer), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        assert [server.p(), server.p()] == [1, 1]
        assert peer.connections[0].closed.wait(30)
    assert counts(peer) == [1, 1]


def test_keep_alive_at_most_32_connections_wait(shell: Shell, tls: ssl.SSLContext) -> None:
    count = 40
    all_here = threading.Barrier(count)

    def script(conn: PeerConnection) -> None:
        conn.expect()
        all_here.wait(30)
        conn.reply(*result(1))
        conn.until_closed()

    with Peer(always=script, tls=tls) as peer:
        with shell.server(peer, keep_alive=True) as server, ThreadPoolExecutor(count) as pool:
            assert [call.result() for call in [pool.submit(server.p) for _ in range(count)]] == [1] * count
            wait_until(lambda: sum(conn.closed.is_set() for conn in peer.connections) == count - 32, what="8 closed")
        assert all(conn.closed.wait(30) for conn in peer.connections)


# No call is sent twice.


BREAKS: list[tuple[str, Callable[[PeerConnection], None]]] = [
    ("close", lambda conn: None),
    ("reset", lambda conn: conn.reset()),
    ("half a reply", lambda conn: conn.send(b'{"harp": 1, "stre')),
]


@pytest.mark.parametrize("end", [found[1] for found in BREAKS], ids=[found[0] for found in BREAKS])
def test_keep_alive_break_before_reply_is_ambiguous(
    shell: Shell, tls: ssl.SSLContext, end: Callable[[PeerConnection], None]
) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(*result(1))
        conn.expect()
        end(conn)

    with Peer(script, keeping(result(3)), tls=tls) as peer, shell.server(peer, keep_alive=True) as server:
        assert server.p() == 1
        with pytest.raises(harp.CommunicationError, match=UNKNOWN) as caught:
            server.p()
        assert str(caught.value).startswith(f"{peer.host}:{peer.port}: ")
        assert isinstance(caught.value.__cause__, (OSError, EOFError))
        assert counts(peer) == [2]  # it was not sent again
        assert server.p() == 3


@pytest.mark.parametrize("sent", [[PLAIN], [STREAM, {"stream": 1}]])
def test_keep_alive_break_after_reply_is_not_ambiguous(shell: Shell, tls: ssl.SSLContext, sent: list[object]) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(*result(1))
        conn.expect()
        conn.reply(*sent)

    with Peer(script, keeping(result(3)), tls=tls) as peer, shell.server(peer, keep_alive=True) as server:
        assert server.p() == 1
        with pytest.raises(harp.CommunicationError, match="before the reply was complete") as caught:
            list(server.p())
        assert UNKNOWN not in str(caught.value)
        assert counts(peer) == [2]
        assert server.p() == 3


def test_keep_alive_break_of_new_connection_is_not_ambiguous(shell: Shell, tls: ssl.SSLContext) -> None:
    with Peer(answering(), tls=tls) as peer:
        with pytest.raises(harp.CommunicationError, match="closed the connection") as caught:
            shell.server(peer, keep_alive=True).p()
        assert UNKNOWN not in str(caught.value)


def test_keep_alive_invalid_reply_is_not_ambiguous(shell: Shell, tls: ssl.SSLContext) -> None:
    with Peer(keeping(result(1), [{"result": 1}]), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        assert server.p() == 1
        with pytest.raises(harp.CommunicationError, match="received while waiting for the acknowledgement") as caught:
            server.p()
        assert UNKNOWN not in str(caught.value)
        assert peer.connections[0].closed.wait(30)


@pytest.mark.parametrize("lines", [[PLAIN, {"stream": 1}], [STREAM, {"stream": 1}, PLAIN], [PLAIN, b"garbage\n"]])
def test_keep_alive_invalid_end_closes_the_connection(shell: Shell, tls: ssl.SSLContext, lines: list[object]) -> None:
    """Its end may still arrive, and must not be read as the end of the next call."""
    with Peer(keeping(lines), keeping(result(2)), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        with pytest.raises(harp.CommunicationError, match=r"received while waiting|column 1"):
            list(server.p())
        assert peer.connections[0].closed.wait(30)
        assert server.p() == 2


def test_keep_alive_invalid_arguments_keep_the_connection(shell: Shell, tls: ssl.SSLContext) -> None:
    with Peer(keeping(result(1), result(2)), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        assert server.p() == 1
        with pytest.raises(harp.HarpException, match="argument 1"):
            server.p({1})
        assert server.p() == 2


# Concurrent calls.


def test_keep_alive_threads_share_a_server(shell: Shell, tls: ssl.SSLContext) -> None:
    threads, calls = 16, 50
    with Peer(always=echoing, tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)

        def work(number: int) -> list[Any]:
            return [server.p(number, call) for call in range(calls)]

        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(work, range(threads)))
        assert found == [[[number, call] for call in range(calls)] for number in range(threads)]
        assert sum(counts(peer)) == threads * calls
        assert len(peer.connections) <= threads
        with server:
            pass
        assert all(conn.closed.wait(30) for conn in peer.connections)


def test_keep_alive_stream_end_races_with_close(tls: ssl.SSLContext) -> None:
    """Either the connection is closed or it goes to the next call; never both."""

    def script(conn: PeerConnection) -> None:
        with suppress(AssertionError, OSError):  # it has closed
            while True:
                kind = STREAM if conn.expect()["procedure"] == "stream" else PLAIN
                conn.reply(kind, {"result": 1})

    with Peer(always=script, tls=tls) as peer:
        server = harp.HarpServer(peer.host, "u", "secret", peer.port, keep_alive=True)
        with server, ThreadPoolExecutor(1) as pool:
            for _ in range(100):
                iterator = server.stream()
                closing = pool.submit(iterator.close)
                assert list(iterator) in ([], [harp.Result(1)])
                assert server.plain() == 1
                closing.result(30)


# The end of the object; its copies.


def test_keep_alive_end_of_with_closes(shell: Shell, tls: ssl.SSLContext) -> None:
    with Peer(keeping(result(1)), keeping(result(2)), tls=tls) as peer:
        with shell.server(peer, keep_alive=True) as server:
            assert server.p() == 1
        assert peer.connections[0].closed.wait(30)
        assert server.p() == 2  # the object can be used afterwards
        with server:
            pass
        assert peer.connections[1].closed.wait(30)


def test_keep_alive_deleted_server_closes(shell: Shell, tls: ssl.SSLContext) -> None:
    with Peer(keeping(result(1)), tls=tls) as peer:
        server = shell.server(peer, keep_alive=True)
        assert server.p() == 1
        del server
        gc.collect()
        assert peer.connections[0].closed.wait(30)


def test_iterator_outlives_its_server(shell: Shell, tls: ssl.SSLContext) -> None:
    with Peer(keeping([STREAM, {"stream": 1}, {"result": 2}]), tls=tls) as peer:
        iterator = shell.server(peer, keep_alive=True).p()
        gc.collect()
        assert list(iterator) == [1, harp.Result(2)]
        del iterator
        gc.collect()
        assert peer.connections[0].closed.wait(30)


COPIES: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, lambda server: pickle.loads(pickle.dumps(server))]


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle"])
def test_keep_alive_copy_has_separate_connections(tls: ssl.SSLContext, copied: Callable[[Any], Any]) -> None:
    with Peer(keeping(result(1), result(3)), keeping(result(2)), tls=tls) as peer:
        server = harp.HarpServer(peer.host, "u", "secret", peer.port, keep_alive=True)
        assert server.p() == 1
        with copied(server) as same:
            assert same.p() == 2
        assert server.p() == 3
        del server, same
    assert counts(peer) == [2, 1]


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle"])
def test_keep_alive_async_copy_has_separate_connections(tls: ssl.SSLContext, copied: Callable[[Any], Any]) -> None:
    async def main(peer: Peer) -> None:
        async with aio.AsyncHarpServer(peer.host, "u", "secret", peer.port, keep_alive=True) as server:
            assert await server.p() == 1
            async with copied(server) as same:
                assert await same.p() == 2
            assert await server.p() == 3

    with Peer(keeping(result(1), result(3)), keeping(result(2)), tls=tls) as peer:
        asyncio.run(main(peer), debug=True)
    assert counts(peer) == [2, 1]


def test_harp_server_has_no_public_attribute() -> None:
    for server in (
        harp.HarpServer("h", "u", "p", keep_alive=True),
        aio.AsyncHarpServer("h", "u", "p", keep_alive=True),
    ):
        assert "keep_alive=True" in repr(server)
        assert not [name for name in dir(server) if not name.startswith("_")]
        for name in ("close", "keep", "idle", "connect"):
            assert isinstance(getattr(server, name), harp.HarpProcedure | aio.AsyncHarpProcedure)


# Processes and event loops.


def run(program: str, peer: Peer) -> None:
    """Run a program that must have no output and no warnings."""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", program, peer.host, str(peer.port)]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


SYNC = """
import gc, os, sys, harp
server = harp.HarpServer(sys.argv[1], "u", "secret", int(sys.argv[2]), keep_alive=True)
call, renew, end = server.p, int, int
"""
AIO = """
import asyncio, gc, logging, os, sys
from harp import aio
logging.getLogger("asyncio").setLevel(logging.ERROR)  # on a busy machine, it warns about slow callbacks
server = aio.AsyncHarpServer(sys.argv[1], "u", "secret", int(sys.argv[2]), keep_alive=True)
runners = [asyncio.Runner()]
call = lambda: runners[-1].run(server.p())
renew = lambda: runners.append(asyncio.Runner())
end = lambda: (runners[-1].run(server.__aexit__(None, None, None)), runners.pop().close())
"""
FORKING = """
assert call() == 1
child = os.fork()
if child == 0:
    try:
        renew()
        assert call() == 2
        end()
        del server, call
        gc.collect()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert call() == 3
end()
"""


@pytest.mark.parametrize("shell_program", [SYNC, AIO], ids=["sync", "aio"])
def test_keep_alive_fork_has_separate_connections(tls: ssl.SSLContext, shell_program: str) -> None:
    """The child does not end the connections of its parent."""
    with Peer(keeping(result(1), result(3)), keeping(result(2)), tls=tls) as peer:
        run(shell_program + FORKING, peer)
    assert counts(peer) == [2, 1]


def test_keep_alive_unclosed_server_does_not_warn(tls: ssl.SSLContext) -> None:
    with Peer(keeping(result(1), result(2)), tls=tls) as peer:
        run(SYNC + "assert [call(), call()] == [1, 2]", peer)
        assert peer.connections[0].closed.wait(30)


ENDED_LOOP = """
import asyncio, logging, sys
from harp import aio
logging.getLogger("asyncio").setLevel(logging.ERROR)  # on a busy machine, it warns about slow callbacks
async def main():
    assert [await server.p(), await server.p()] == [1, 2]
server = aio.AsyncHarpServer(sys.argv[1], "u", "secret", int(sys.argv[2]), keep_alive=True)
asyncio.run(main())
"""


def test_keep_alive_unclosed_async_server_does_not_warn(tls: ssl.SSLContext) -> None:
    with Peer(keeping(result(1), result(2)), tls=tls) as peer:
        run(ENDED_LOOP, peer)
        assert peer.connections[0].closed.wait(30)


def test_keep_alive_deleted_async_server_does_not_warn(tls: ssl.SSLContext) -> None:
    async def main(peer: Peer) -> None:
        server = aio.AsyncHarpServer(peer.host, "u", "secret", peer.port, keep_alive=True)
        assert [await server.p(), await server.p()] == [1, 2]

    with Peer(keeping(result(1), result(2)), tls=tls) as peer:
        asyncio.run(main(peer), debug=True)
        assert peer.connections[0].closed.wait(30)


def test_keep_alive_event_loops_have_their_own_connections(tls: ssl.SSLContext) -> None:
    with Peer(keeping(result(1)), keeping(result(2)), tls=tls) as peer:
        server = aio.AsyncHarpServer(peer.host, "u", "secret", peer.port, keep_alive=True)
        with asyncio.Runner(debug=True) as one, asyncio.Runner(debug=True) as other:
            assert one.run(server.p()) == 1
            assert other.run(server.p()) == 2
            other.run(server.__aexit__(None, None, None))
            one.run(eventually(peer.connections[0].closed.is_set, what="the end of what the other loop can't use"))


def test_keep_alive_connections_of_ended_loop_are_skipped(tls: ssl.SSLContext) -> None:
    with Peer(keeping(result(1)), keeping(result(2)), tls=tls) as peer:
        server = aio.AsyncHarpServer(peer.host, "u", "secret", peer.port, keep_alive=True)
        assert asyncio.run(server.p()) == 1
        in_another_loop(server)


def in_another_loop(server: aio.AsyncHarpServer) -> None:
    async def main() -> None:
        async with server:
            assert await server.p() == 2

    asyncio.run(main())
    gc.collect()


def test_keep_alive_connection_of_stopped_loop_does_not_warn(tls: ssl.SSLContext) -> None:
    with Peer(keeping(result(1)), keeping(result(2)), tls=tls) as peer:
        server = aio.AsyncHarpServer(peer.host, "u", "secret", peer.port, keep_alive=True)
        with asyncio.Runner() as one:
            assert one.run(server.p()) == 1
            in_another_loop(server)  # cannot close the other connection before its loop runs
        gc.collect()
        assert peer.connections[0].closed.wait(30)


async def test_keep_alive_cancelled_task_closes_its_connection(tls: ssl.SSLContext) -> None:
    with Peer(keeping(result(1), []), keeping(result(2)), tls=tls) as peer:
        async with aio.AsyncHarpServer(peer.host, "u", "secret", peer.port, keep_alive=True) as server:
            assert await server.p() == 1
            task = asyncio.create_task(server.p())
            await eventually(lambda: counts(peer) == [2], what="the request")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(peer.connections[0].closed.wait, 30)
            assert await server.p() == 2
