"""Names of hosts that hang, and addresses that do not answer: they delay no other host."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Failed, Returned
from harp_daemon.timer_wheel import TimerWheel
from harpcaller.config import Config
from harpcaller.hosts import resolving
from harpcaller.hosts.connecting import connect_first, open_connection
from harpcaller.hosts.registry import Host
from harpcaller.hosts.resolving import AddressInfo, Resolver
from harpcaller.hosts.tls import HostTLS
from support.blackhole import black_hole
from support.certificates import server_files
from support.deadline import eventually
from support.dispatcher import call, host_line, running
from support.peers import Peer, PeerConnection, server_context


class NameService:
    """The name service of the test: names that begin with ``hang`` have no answer until `release` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.release = threading.Event()
        self.asked: list[str] = []
        self.addresses: dict[str, list[AddressInfo]] = {}
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, name: str, port: int, *arguments: Any, **options: Any) -> Any:
        self.asked.append(name)
        if name.startswith("hang"):
            assert self.release.wait(60)
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self.addresses.get(name) or self._real(name, port, *arguments, **options)


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> Any:
    service = NameService(monkeypatch)
    yield service
    service.release.set()
    own = "harpcaller resolver"
    await eventually(lambda: not any(thread.name == own for thread in threading.enumerate()), what="the lookups' end")


async def test_lookups_that_hang_delay_no_other_host(tmp_path: Path, names: NameService) -> None:
    def answer(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "stream_result": False}, {"result": 1})

    hanging = [f"hang{number}" for number in range(60)]
    with Peer(always=answer, tls=server_context(server_files(tmp_path))) as peer:
        lines = [host_line(1, name, name) for name in hanging]
        async with running(tmp_path, *lines, host_line(peer.port, "good", "localhost")) as dispatcher:
            bad = [await dispatcher.submit(call(host=name), "test") for name in hanging]
            await eventually(lambda: len(names.asked) == 60, what="the lookups")
            assert await dispatcher.result(await dispatcher.submit(call(host="good"), "test")) == Returned(b"1")
            many = await dispatcher.submit_many([call(host="good")] * 20, "test")
            assert [await dispatcher.result(job_id) for job_id in many] == [Returned(b"1")] * 20
            assert all([(await dispatcher.get_job(job_id)).end is None for job_id in bad])
            names.release.set()
            ends = [await dispatcher.result(job_id) for job_id in bad]
    assert {end.type for end in ends if isinstance(end, Failed)} == {"network_error"}
    assert len(ends) == 60


async def test_lookup_has_a_deadline_and_one_thread_per_name(names: NameService) -> None:
    resolver = Resolver()
    errors = await asyncio.gather(*(resolver.resolve("hang", 1, 0.05) for _ in range(10)), return_exceptions=True)
    for error in errors:
        assert isinstance(error, socket.gaierror)
        assert error.errno == socket.EAI_AGAIN
        assert "not answered within 0.05 s" in str(error)
    assert names.asked == ["hang"]
    found = await resolver.resolve("localhost", 7, 30.0)
    assert {address[4][1] for address in found} == {7}


async def test_lookup_without_a_thread_fails_and_can_be_repeated(names: NameService) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    resolver = Resolver()
    with pytest.MonkeyPatch.context() as full:
        full.setattr(threading.Thread, "start", no_thread)
        for outcome in await asyncio.gather(
            *(resolver.resolve(name, 1, 60) for name in ("localhost", "other", "localhost")), return_exceptions=True
        ):
            assert isinstance(outcome, OSError)
            assert outcome.errno == errno.ENOMEM
    assert await resolver.resolve("localhost", 1, 60)


async def test_lookups_of_slow_names_have_a_share(names: NameService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "_MAX_THREADS", 4)
    monkeypatch.setattr(resolving, "_MAX_SLOW_THREADS", 2)
    resolver = Resolver()
    slow = [f"hang{number}" for number in range(6)]
    first = await asyncio.gather(*(resolver.resolve(name, 1, 0.05) for name in slow), return_exceptions=True)
    assert all(isinstance(error, socket.gaierror) for error in first)
    assert names.asked == slow[:4]  # the others were not started in time, and are forgotten
    names.release.set()
    await eventually(lambda: threading.active_count() < 4, what="the end of the lookups")
    names.release.clear()
    second = [asyncio.create_task(resolver.resolve(name, 1, 30.0)) for name in slow]
    await eventually(lambda: len(names.asked) == 6, what="the lookups")
    assert await resolver.resolve("localhost", 7, 30.0)
    assert len(names.asked) == 7
    names.release.set()
    ends = await asyncio.gather(*second, return_exceptions=True)
    assert [str(end) for end in ends] == ["[Errno -2] Name or service not known"] * 6


def info(port: int, family: socket.AddressFamily = socket.AF_INET) -> AddressInfo:
    return family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port)


async def test_address_that_does_not_answer_is_overtaken(tmp_path: Path, names: NameService) -> None:
    def wait(conn: PeerConnection) -> None:
        conn.until_closed()

    with ExitStack() as stack:
        hole = stack.enter_context(black_hole())
        peer = stack.enter_context(Peer(always=wait, tls=server_context(server_files(tmp_path))))
        names.addresses["web01"] = [info(hole), info(hole), info(peer.port)]
        config = Config(connect_timeout=3600.0, verify=False)
        host = Host("web01", "web01", 1, "u", "p")
        conn = await open_connection(host, HostTLS(config), config, TimerWheel(), Resolver())
        conn.abort()


async def test_connect_first_prefers_the_first_and_closes_the_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [server.getsockname()[1] for server in (first, second)]
        connection = await connect_first([info(port) for port in ports])
        assert connection.getpeername()[1] == ports[0]
        connection.close()


async def test_connect_first_reports_an_error_if_all_refuse() -> None:
    with closed_port() as port:
        with pytest.raises(ConnectionRefusedError):
            await connect_first([info(port)] * 3)
    with black_hole() as hole:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.6):
                await connect_first([info(hole)] * 3)


@contextmanager
def closed_port() -> Iterator[int]:
    """Yield a port without a listener that no other process gets."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
