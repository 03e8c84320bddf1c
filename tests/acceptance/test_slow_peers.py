"""A slow or hostile peer at each buffer of the table "Flow control" in docs/architecture.md.

While it lasts, memory stays within the bound of the buffer, and the calls of others keep their usual speed. Each test
first waits until the peer has filled its buffer, or for a certain amount of its work. Memory is the growth of the peak
of a process, which the kernel records; a process needs some of it for its usual work, too.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import harp
from support.certificates import server_files
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.harpcallerd import LineClient as DispatcherClient
from support.harpd import Harpd, LineClient
from support.peers import Peer, PeerConnection, server_context
from support.resumable_host import NO_SUCH_CALL, TERMS
from support.system import System
from support.worker_channel import CHANNEL

PROCEDURES = """
import os, socket, stat, struct, time
from harpd.proc import procedure, streaming_procedure

@procedure(max_calls_per_process=100000)
def same(value):
    return value

@streaming_procedure
def torrent(path, size):
    # Its file has the number of the sent records.
    with open(path, "wb", buffering=0) as file:
        number = 0
        while True:
            yield "x" * size
            number += 1
            os.pwrite(file.fileno(), struct.pack("q", number), 0)

@streaming_procedure
def records(count, size):
    for number in range(count):
        yield "x" * size

@procedure
def hang():
    time.sleep(600)

@procedure
def endless_line(path):
    open(path, "w").close()
    while True:
        send_all(channel(), b"x" * 65536)
"""

KIB, MIB = 1 << 10, 1 << 20
#: Settings of the host: the spool of a call, and of all calls together.
SPOOL, SPOOL_MEMORY = 2 * MIB, 16 * MIB
#: Settings: the longest request, all long requests together, the longest line from a host.
REQUEST_LINE, REQUEST_MEMORY, RECORD_LINE = 8 * MIB, 24 * MIB, 8 * MIB
#: The window of unacknowledged records, and a chunk beyond it.
WINDOW, CHUNK = MIB, 64 * KIB
#: Memory of a process for its usual work, and of one connection.
USUAL, CONNECTION = 12 * MIB, 400 * KIB
#: Memory that the daemons do not return to the system when they have freed it.
FREED = 64 * MIB
#: Number of calls of others that are compared, and seconds by which a busy machine may delay one of them.
CALLS, BUSY = 100, 1.0
#: Length of a record of a procedure that sends without end.
RECORD = 1000
#: Seconds without progress after which a peer's work stands still.
STILL = 0.7


@pytest.fixture(scope="module")
def hostile() -> HostileHost:
    return HostileHost()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, hostile: HostileHost) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("slow")
    limits = {"spool": SPOOL, "spool_memory": SPOOL_MEMORY, "write_timeout": 600, "kill_grace": 0.3}
    limits |= {"request_line": REQUEST_LINE, "request_memory": REQUEST_MEMORY}
    with (
        Harpd(directory / "harpd", CHANNEL + PROCEDURES, {"limits": limits}, services=True) as harpd,
        Peer(always=hostile.play, tls=server_context(server_files(directory / "harpd"))) as peer,
    ):
        settings = {"ca_file": str(harpd.ca_file), "record_line": RECORD_LINE, "request_line": REQUEST_LINE}
        settings |= {"request_memory": REQUEST_MEMORY}
        hosts = {"web01": harpd.port, "hostile": peer.port}
        with Harpcallerd(directory / "harpcallerd", hosts, (harpd.user, harpd.password), settings) as dispatcher:
            yield System(harpd, dispatcher)


# The requests of other clients at the same time.


class Others:
    """The calls of others: short calls, directly or as jobs; each must return its value.

    Args:
        call: calls the procedure `same` with a value, and returns its result.
    """

    def __init__(self, call: Callable[[int], Any]) -> None:
        self._call = call
        self.measure()  # also opens connections and starts workers
        self._usual = self.measure()

    def measure(self) -> float:
        """Make calls; return the time in seconds within which 99 of 100 have returned."""
        times = []
        for number in range(CALLS):
            began = time.monotonic()
            assert self._call(number) == number
            times.append(time.monotonic() - began)
        return sorted(times)[math.ceil(0.99 * CALLS) - 1]

    def check(self) -> None:
        """Check that they are not much slower than usual. Repeated, because the machine has other work, too."""
        for _ in range(3):
            meanwhile = self.measure()
            if meanwhile <= 2 * self._usual + BUSY:
                break
        print(f"99 of 100 calls of others: {1000 * self._usual:.1f} ms usually, {1000 * meanwhile:.1f} ms meanwhile")
        assert meanwhile <= 2 * self._usual + BUSY


@pytest.fixture
def direct(system: System) -> Iterator[Others]:
    """The direct calls of others."""
    with system.server as server:
        yield Others(server.same)


@pytest.fixture
def rpc(system: System) -> Iterator[harp.HarpCaller]:
    with system.rpc as rpc:
        yield rpc


@pytest.fixture
def jobs(rpc: harp.HarpCaller) -> Others:
    """The jobs of others."""
    return Others(lambda value: rpc.web01.same(value).get())


@contextmanager
def bounded(**processes: tuple[int, int]) -> Iterator[None]:
    """Check that the peak memory of processes grows by at most some bytes. Each is given by its pid and the bytes."""
    before = {}
    for name, (pid, _) in processes.items():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is the present size
        before[name] = memory(pid, "VmHWM")
    yield
    grown = {name: memory(pid, "VmHWM") - before[name] for name, (pid, _) in processes.items()}
    print(
        *(f"{name}: grown by {grown[name] / MIB:.1f} MiB of {most / MIB:.1f}" for name, (_, most) in processes.items())
    )
    for name, (_, most) in processes.items():
        assert grown[name] <= most, f"{name} has grown by {grown[name] / MIB:.1f} MiB, the bound is {most / MIB:.1f}"


def memory(pid: int, which: str) -> int:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * KIB


# A client that does not read, or does not acknowledge.


def wait_until_still(progress: list[Path]) -> None:
    """Wait until procedures have passed on records and have paused."""

    def numbers() -> list[bytes]:
        return [path.read_bytes() if path.exists() else b"" for path in progress]

    last, since = numbers(), time.monotonic()
    while time.monotonic() - since < STILL or not all(last):
        assert time.monotonic() - since < DEADLINE
        time.sleep(0.02)
        if (now := numbers()) != last:
            last, since = now, time.monotonic()


@pytest.mark.parametrize("kind", ["bound", "resumable", "resumable, acknowledges"])
def test_clients_that_do_not_read_pause_their_calls(system: System, direct: Others, tmp_path: Path, kind: str) -> None:
    """More calls than the memory of all spools: each may have 1 MiB, and what is on its way to the client.

    A client that acknowledges records without reading them never fills the window: they wait behind it.
    """
    harpd, count = system.harpd, 24
    bound = count * (MIB + 2 * CHUNK + 256 * KIB) + USUAL
    frontend = harpd.pid, count * CONNECTION + USUAL
    files = [tmp_path / str(number) for number in range(count)]
    with bounded(supervisor=(harpd.supervisor, bound), frontend=frontend), ExitStack() as stack:
        clients = [stack.enter_context(start_torrent(harpd, file, kind)) for file in files]
        if kind == "resumable, acknowledges":
            wait_until(lambda: all(map(passed_on, files)), DEADLINE, "the first records")
            with busy(lambda: acknowledge_blindly(clients, files)):
                direct.check()
        else:
            wait_until_still(files)
            direct.check()
        assert harpd.status()["calls"] >= count
        if kind != "bound":
            for client in clients:
                client.send({"stop": {"why": "cancelled", "by": "test"}})
            wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the end of the calls")
    wait_until(
        lambda: not any(harpd.status()[name] for name in ("calls", "resumable")), DEADLINE, "the memory's return"
    )


def start_torrent(harpd: Harpd, file: Path, kind: str) -> LineClient:
    """Start a call that sends records without end; return its client, which has read the acknowledgement."""
    if kind == "bound":
        client = harpd.connect()
        client.send(harpd.request("torrent", [str(file), RECORD]))
    else:
        client = harpd.start_resumable("torrent", str(file), RECORD, result_ttl=1)
    assert client.message()["stream_result"] is True
    return client


def passed_on(file: Path) -> int:
    """Return how many records a procedure has passed on."""
    return int.from_bytes(file.read_bytes(), sys.byteorder) if file.exists() else 0


def acknowledge_blindly(clients: list[LineClient], files: list[Path]) -> None:
    """Acknowledge what the supervisor has received: without the records that may still be in the channel."""
    for client, file in zip(clients, files, strict=True):
        if (number := passed_on(file) - MIB // RECORD) > 0:
            client.send({"ack": number})
    time.sleep(0.02)


def received_records(client: LineClient) -> tuple[int, int]:
    """Send a heartbeat; return number and bytes of the records that arrive before the reply."""
    client.send({"heartbeat": 0})
    count = size = 0
    while b'"heartbeat"' not in (line := client.line()):
        if line.startswith(b'{"stream"'):
            count += 1
            size += len(line) + 1
    return count, size


def test_window_ahead_of_ack_is_one_mebibyte(system: System) -> None:
    """Records are sent until 1 MiB is not acknowledged; heartbeats pass, and each `ack` lets further ones pass."""
    with system.harpd.start_resumable("records", 5_000, 1000) as client:
        assert client.message()["stream_result"] is True
        count = size = 0

        def read() -> None:
            nonlocal count, size
            more = received_records(client)
            count, size = count + more[0], size + more[1]

        def read_until_still() -> None:
            last, since = count, time.monotonic()
            while time.monotonic() - since < STILL or not count:
                read()
                if count != last:
                    last, since = count, time.monotonic()
                time.sleep(0.02)

        read_until_still()
        assert WINDOW <= size <= WINDOW + CHUNK
        before = size
        client.send({"ack": count // 2})
        read_until_still()
        assert before + WINDOW // 2 - CHUNK <= size <= WINDOW + CHUNK + before // 2 + CHUNK
        while count < 5_000:
            client.send({"ack": count})
            line = client.message()
            if "stream" in line:
                count += 1
        while not client.message().keys() & {"result", "error"}:
            pass
        client.send({"release": True})
        assert client.lines() == []


def test_window_accepts_one_longer_record(system: System) -> None:
    with system.harpd.start_resumable("records", 3, 3 * MIB) as client:
        client.message()
        for number in range(3):
            assert [received_records_until_one(client), received_records(client)[0]] == [1, 0], number
            client.send({"ack": number + 1})


def received_records_until_one(client: LineClient) -> int:
    """Return the number of records that have arrived with the first one."""
    while not (count := received_records(client)[0]):
        time.sleep(0.01)
    return count


# A procedure that writes no complete line.


def test_lines_without_end_stay_within_the_memory_of_all_spools(system: System, direct: Others, tmp_path: Path) -> None:
    """At twice the memory of all spools, a line may have 1 MiB; the calls with longer lines are stopped."""
    harpd, count = system.harpd, 6
    # A line grows by pieces of 64 KiB, and is copied when it is put together.
    bound = 2 * SPOOL_MEMORY + count * (MIB + CHUNK) + 2 * SPOOL_MEMORY + USUAL
    with bounded(supervisor=(harpd.supervisor, bound)), ExitStack() as stack:
        clients = []
        for number in range(count):
            file = tmp_path / str(number)
            clients.append(stack.enter_context(harpd.connect()))
            clients[-1].send(harpd.request("endless_line", [str(file)]))
        direct.check()
        for client in clients:
            assert client.lines()[-1]["error"]["type"] == "call_died"


@contextmanager
def busy(work: Callable[[], None], threads: int = 1) -> Iterator[list[int]]:
    """Repeat work in threads; yield the number of times, as a list with one item."""
    over = threading.Event()
    done = [0]

    def run() -> None:
        while not over.is_set():
            work()
            done[0] += 1

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield done
    finally:
        over.set()
        for thread in running:
            thread.join()


# Clients that send commands without end, or long requests.


def test_commands_without_end_delay_no_other(system: System, direct: Others) -> None:
    harpd = system.harpd
    line = b'{"heartbeat":0}\n'
    bound = 4 * CONNECTION + USUAL
    with (
        bounded(frontend=(harpd.pid, bound), supervisor=(harpd.supervisor, bound)),
        harpd.start_resumable("hang", result_ttl=1) as client,
    ):
        client.message()
        with busy(lambda: client.send(1000 * line)) as sent:
            direct.check()
            wait_until(lambda: sent[0] >= 100, DEADLINE, "many commands")
        client.send({"stop": {"why": "cancelled"}})
        wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the end of the call")
    wait_until(lambda: harpd.status()["resumable"] == 0, DEADLINE, "the end's expiry")


def test_commands_to_a_suspended_supervisor_are_not_read(system: System) -> None:
    harpd = system.harpd
    supervisor = harpd.supervisor
    sent = 0
    with bounded(frontend=(harpd.pid, USUAL)):
        client = harpd.start_resumable("same", 1, result_ttl=1)
        os.kill(supervisor, signal.SIGSTOP)
        try:
            client.socket.settimeout(STILL)
            with contextlib.suppress(TimeoutError):
                while sent < 100 * MIB:
                    client.send(4000 * b'{"heartbeat":0}\n')
                    sent += 64_000
        finally:
            os.kill(supervisor, signal.SIGCONT)
            client.close()
    assert sent < 20 * MIB  # the size of the buffers of the two sockets
    wait_until(lambda: harpd.status()["resumable"] == 0, DEADLINE, "the end of the call")


def test_long_requests_that_stop_in_the_middle_share_a_limit(system: System, direct: Others) -> None:
    harpd = system.harpd
    start = b'{"harp":1,"arguments":["' + b"x" * (REQUEST_LINE - 1000)
    with bounded(frontend=(harpd.pid, REQUEST_MEMORY + FREED + USUAL)), ExitStack() as stack:
        for _ in range(12):
            client = stack.enter_context(harpd.connect())
            with contextlib.suppress(OSError):  # the limit is reached
                client.send(start)
        direct.check()


def test_long_requests_without_password_delay_no_other(system: System, direct: Others) -> None:
    """Long lines are decoded, piece by piece or in a thread, before the password is checked."""
    harpd = system.harpd
    values = [[number, {"key": "x" * 20, "more": [1.5, None, True]}] for number in range(40_000)]
    auth = {"user": harpd.user, "password": "wrong"}
    line = json.dumps({"harp": 1, "procedure": "same", "arguments": [values], "auth": auth}).encode() + b"\n"
    assert MIB < len(line) < REQUEST_LINE

    def send() -> None:
        with harpd.connect() as client, contextlib.suppress(OSError):
            client.send(line)
            client.lines()

    with bounded(frontend=(harpd.pid, REQUEST_MEMORY + FREED + USUAL)), busy(send) as sent:
        direct.check()
        wait_until(lambda: sent[0] >= 2, DEADLINE, "two long requests")


def test_long_job_requests_delay_no_other(system: System, jobs: Others) -> None:
    values = [[number, {"key": "x" * 20, "more": [1.5, None, True]}] for number in range(40_000)]
    request = {"harpcaller": 1, "host": "nowhere", "procedure": "p", "arguments": [values]}
    line = json.dumps(request).encode() + b"\n"
    pid = system.dispatcher.pid

    def send() -> None:
        assert b"job_id" in system.transcript(line)[0]

    with bounded(dispatcher=(pid, REQUEST_MEMORY + FREED + USUAL)), busy(send) as sent:
        jobs.check()
        wait_until(lambda: sent[0] >= 2, DEADLINE, "two long requests")


# A host that sends without end.


class HostileHost:
    """A host that sends records, or one line, without end, and does not wait for acknowledgements."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.over.set()

    def play(self, conn: PeerConnection) -> None:
        """Serve a connection; a script of a `Peer`."""
        with contextlib.suppress(AssertionError, OSError):
            request = conn.expect()
            if "calls" in request:
                conn.reply({"harp": 1, "calls": [], "instance": "w1"})
                conn.until_closed()
            elif "attach" in request:
                conn.reply(NO_SUCH_CALL)
            else:
                conn.reply({"harp": 1, "stream_result": True, "call": TERMS})
                self._flood(conn, *request["arguments"])

    def _flood(self, conn: PeerConnection, size: int) -> None:
        record = json.dumps({"stream": "x" * size}).encode() + b"\n"
        data = record * max(1, CHUNK // len(record)) if size else b"x" * CHUNK
        while not self.over.is_set():
            conn.send(data)


@pytest.fixture
def flooding(hostile: HostileHost) -> Iterator[None]:
    """While it lasts, the hostile host sends."""
    hostile.over.clear()
    yield
    hostile.over.set()


@pytest.mark.parametrize("size", [100, 10_000, 1_000_000])
@pytest.mark.usefixtures("flooding")
def test_host_that_floods_delays_no_other(system: System, jobs: Others, rpc: harp.HarpCaller, size: int) -> None:
    """Its records wait for the store within 8 MiB and the longest record, for any window."""
    bound = 2 * (8 * MIB + MIB + 160 * KIB) + MIB + FREED + USUAL  # and the batch that is being committed
    with bounded(dispatcher=(system.dispatcher.pid, bound)):
        flood = rpc.hostile.flood(size)
        wait_until(lambda: flood.details()["records"]["count"] > 5, DEADLINE, "the first records")
        before = flood.details()["records"]["count"]
        jobs.check()
        assert flood.details()["records"]["count"] > before
    flood.cancel()


@pytest.mark.usefixtures("flooding")
def test_host_with_endless_lines_costs_only_its_jobs(system: System, jobs: Others, rpc: harp.HarpCaller) -> None:
    count = 4
    with bounded(dispatcher=(system.dispatcher.pid, 2 * count * RECORD_LINE + USUAL)):
        lines = [rpc.hostile.flood(0) for _ in range(count)]
        jobs.check()
        for job in lines:
            error = job.result(wait=True)
            assert isinstance(error, harp.RemoteError)
            assert error.type == "protocol_error"


# Followers, and clients that do not read their reply.


def never_reading(system: System, request: dict[str, Any]) -> DispatcherClient:
    """Return a client that sends a request and does not read; its buffer is small."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(DEADLINE)
    connection.connect(("127.0.0.1", system.dispatcher.port))
    client = DispatcherClient(connection)
    client.send({"harpcaller": 1, **request})
    return client


@pytest.mark.parametrize("size", [200, 300_000])
def test_followers_that_do_not_read_delay_no_other(
    system: System, jobs: Others, rpc: harp.HarpCaller, size: int
) -> None:
    """Each has one batch of about 64 KiB or one record, and the data in its socket."""
    total, count = 6 * MIB, 40
    job = rpc.web01.records(total // size, size)
    assert job.get() is None
    assert sum(1 for _ in job.follow(since=0)) == total // size  # the store's caches are full
    bound = count * (2 * max(64 * KIB, size) + 64 * KIB) + USUAL
    with bounded(dispatcher=(system.dispatcher.pid, bound)), ExitStack() as stack:
        for _ in range(count):
            client = never_reading(system, {"follow_stream": job.id(), "since": 0})
            stack.enter_context(client)
            assert client.socket.recv(1)
        jobs.check()
        with_all = sum(1 for _ in rpc.job(job.id()).follow(since=0))
        assert with_all == total // size
