"""A link with several channels: flow control of each, and of the whole link."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from harpd.supervisor.frames import (
    CLOSED,
    COMMANDS,
    COMMANDS_WINDOW,
    CREDIT,
    ERROR,
    HANG_UP,
    LINES_WINDOW,
    MAX_LINES_BYTES,
    PREFACE,
    START,
    Frame,
    FrameBuffer,
    encode_credit,
    encode_frame,
)
from support.deadline import wait_until
from support.procedures_file import PROCEDURES
from support.supervisor import CHANNEL, DEADLINE, Supervisor

#: Seconds without data after which a channel is paused.
QUIET = 0.5


class Link:
    """The frontend's end of a link; it sends credit only when the test does."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.socket = supervisor.connect().socket
        self.socket.sendall(PREFACE)
        self._buffer = FrameBuffer(1 << 20)

    def start(self, channel: int, procedure: str, *arguments: object) -> None:
        header = json.dumps({"call": f"link-{channel}", "procedure": procedure}).encode()
        self.socket.sendall(encode_frame(channel, START, header + b"\n" + json.dumps(arguments).encode()))

    def frames_until_quiet(self) -> list[Frame]:
        """Return frames until a pause."""
        frames: list[Frame] = []
        self.socket.settimeout(QUIET)
        try:
            while data := self.socket.recv(1 << 20):
                frames += self._buffer.feed(data)
        except TimeoutError:
            pass
        self.socket.settimeout(DEADLINE)
        return frames

    def lines_until_closed(self, channel: int) -> bytes:
        """Return the lines of a channel, and drop the frames of others."""
        lines = b""
        while True:
            for frame in self._buffer.feed(self.socket.recv(1 << 20)):
                if frame.channel == channel and frame.kind == CLOSED:
                    return lines
                lines += frame.body if frame.channel == channel else b""

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    with Supervisor(tmp_path_factory.mktemp("supervisor"), PROCEDURES, kill_grace=0.2) as supervisor:
        yield supervisor


def no_calls(supervisor: Supervisor) -> None:
    wait_until(lambda: supervisor.status()["calls"] == 0, DEADLINE, "the end of the calls")


def size(frames: list[Frame]) -> int:
    return sum(len(frame.body) for frame in frames)


def stands(process: psutil.Process) -> bool:
    """Return whether the process is idle for a time."""
    before = process.cpu_times()
    time.sleep(QUIET)  # the processor time of this interval is measured
    return process.cpu_times().user - before.user < QUIET / 10


def test_channel_without_credit_pauses_its_call_only(supervisor: Supervisor) -> None:
    with Link(supervisor) as link:
        link.start(1, "flood", 100_000)
        first = link.frames_until_quiet()
        assert LINES_WINDOW <= size(first) < LINES_WINDOW + MAX_LINES_BYTES
        link.start(2, "echo", "others continue")
        assert b'{"result":["others continue"]}' in link.lines_until_closed(2)
        link.socket.sendall(encode_frame(1, CREDIT, encode_credit(size(first))))
        second = link.frames_until_quiet()
        assert {frame.channel for frame in second} == {1}
        assert LINES_WINDOW - MAX_LINES_BYTES <= size(second) < LINES_WINDOW + MAX_LINES_BYTES
        link.socket.sendall(encode_frame(1, HANG_UP))
        assert link.lines_until_closed(1) == b""
    no_calls(supervisor)


def test_link_that_is_not_read_uses_little_memory(supervisor: Supervisor) -> None:
    process = psutil.Process(supervisor.status()["supervisor"])
    before = process.memory_info().rss
    with Link(supervisor) as link:
        for channel in range(20):
            link.start(channel, "flood", 100_000)
        wait_until(lambda: supervisor.status()["calls"] == 20, DEADLINE, "the calls")
        assert supervisor.result("echo", 1) == [1]
        wait_until(lambda: stands(process), DEADLINE, "the standstill of all floods")
        # Each call: 1 MiB that waits, 1 MiB in one read at most; and the link's own data.
        assert process.memory_info().rss - before < 20 * (2 << 20) + (8 << 20)
    no_calls(supervisor)


def test_frontend_that_reads_no_replies_loses_its_link(supervisor: Supervisor) -> None:
    """Each start without a reply needs memory of the supervisor, which has all calls of the host."""
    process = psutil.Process(supervisor.status()["supervisor"])
    before = process.memory_info().rss
    with Link(supervisor) as link:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for channel in range(200_000):
                link.start(channel, "no such procedure")
        assert process.memory_info().rss - before < 200 << 20
    assert supervisor.result("echo", 1) == [1]
    no_calls(supervisor)


def test_links_of_a_frontend_share_their_memory(tmp_path: Path) -> None:
    """One link holds a frame of up to 96 MiB, and a frontend that was taken over may have any number of links."""
    mib = 1 << 20
    with Supervisor(tmp_path, PROCEDURES, request_line=4 * mib, request_memory=16 * mib) as supervisor:
        process = psutil.Process(supervisor.status()["supervisor"])
        before = process.memory_info().rss
        with ExitStack() as stack:
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                for _ in range(20):
                    link = stack.enter_context(Link(supervisor))
                    link.socket.sendall(encode_frame(1, START, b"x" * 20 * mib)[: 16 * mib])
            assert process.memory_info().rss - before < 100 * mib
            assert supervisor.result("echo", 1) == [1]
        assert supervisor.result("echo", "x" * 3 * mib) == ["x" * 3 * mib]


def test_unused_links_give_way(supervisor: Supervisor) -> None:
    """A frontend that was taken over cannot use up the descriptors of the supervisor by links."""
    with Link(supervisor) as used, ExitStack() as stack:
        used.start(1, "echo")
        used.start(2, "sleep", 600)
        first, *_ = [stack.enter_context(Link(supervisor)) for _ in range(257)]
        assert first.socket.recv(1) == b""
        assert supervisor.result("echo", 1) == [1]
        assert b'{"result":[]}' in used.lines_until_closed(1)


def test_call_with_tiny_limits_costs_no_time_while_it_is_stopped(tmp_path: Path) -> None:
    procedures = """
import signal, time
from harpd.proc import procedure

@procedure()
def stubborn(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(path, "w").close()
    while True:
        time.sleep(600)
"""
    mark = tmp_path / "started"
    with Supervisor(tmp_path, procedures, kill_grace=3) as supervisor:
        process = psutil.Process(supervisor.status()["supervisor"])
        with supervisor.call_resumable("stubborn", str(mark), result_ttl=1e-9, timeout=1.0):
            wait_until(mark.exists, DEADLINE, "the start")
            supervisor.wait_event("stopping call")
            assert stands(process)


def test_commands_are_credited_after_the_requests_of_others(supervisor: Supervisor) -> None:
    """A client that sends commands without end has a bounded share of the supervisor's time."""
    heartbeats = COMMANDS_WINDOW // 16 * b'{"heartbeat":0}\n'
    assert len(heartbeats) == 512
    with supervisor.call_resumable("sleep", 600) as call:
        assert call.line()["stream_result"] is False
        other, request = CHANNEL + 1, json.dumps({"call": "other", "procedure": "unknown"}).encode() + b"\n[]"
        call.socket.sendall(encode_frame(CHANNEL, COMMANDS, heartbeats) + encode_frame(other, START, request))
        frames: list[Frame] = []
        buffer = FrameBuffer(1 << 20)
        while not frames or frames[-1].kind != CREDIT:
            frames += buffer.feed(call.socket.recv(1 << 20))
        kinds = [(frame.channel, frame.kind) for frame in frames]
        assert kinds[-3:] == [(other, ERROR), (other, CLOSED), (CHANNEL, CREDIT)]
        assert frames[-1].body == encode_credit(len(heartbeats))
        assert sum(frame.body.count(b"heartbeat") for frame in frames) == len(heartbeats) // 16
        call.send({"stop": {"why": "cancelled"}})
    no_calls(supervisor)
