"""The warden against its calls: a call's process is its procedure's, and may say and do anything."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.deadline import wait_until
from support.procedures_file import PROCEDURES
from support.warden import PLAIN, STREAMS, Conversation, Warden, runs

OWN = """
import os, signal, socket, stat, sys, time
from harpd.proc import procedure, streaming_procedure

def channel():
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                return socket.socket(fileno=number)
        except OSError:
            pass

def say(path, text):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    ours = channel()
    ours.setblocking(True)
    ours.sendall(text.encode())
    while True:
        time.sleep(60)

say_plainly = procedure(say)
say_streaming = streaming_procedure(say)

@procedure
def talk_without_end(size, path=None):
    ours = channel()
    ours.setblocking(True)
    if path is not None:
        ours.sendall(b"x" * size)
        open(path, "w").close()
    while True:
        ours.sendall(b"x" * size)

@streaming_procedure
def leave_a_talker(path):
    ours = channel()
    ours.setblocking(True)
    yield "begun"
    if os.fork() == 0:
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        while True:
            ours.sendall(b'{"stream":0}\\n' * 1000)
    while not os.path.exists(path) or not open(path).read():
        time.sleep(0.01)
    os._exit(7)
"""

RECORD = '{"stream":1}'


@pytest.fixture(scope="module")
def warden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warden]:
    with Warden(tmp_path_factory.mktemp("hostile"), PROCEDURES + OWN, kill_grace=0.3) as warden:
        yield warden


def read_end(call: Conversation) -> tuple[list[Any], Any]:
    """What came before the evidence, and the closing line."""
    before: list[Any] = []
    while "exit_info" not in (line := call.line()):
        before.append(line)
    return before, call.line()


@pytest.mark.parametrize(
    ("lines", "told", "reason"),
    [
        ([RECORD, '{"result":"forged"}', RECORD], 0, "no record: b'{\"result"),
        ([RECORD, '{"stop_report":{"survivors":[]}}', RECORD], 0, "no record: b'{\"stop_report"),
        ([RECORD, '{"exit_info":{"exit":0}}', '{"result":"forged"}'], 0, "no record: b'{\"exit_info"),
        (['{"harp":1,"error":{"type":"t","message":"m"}}', '{"result":1}'], 0, "no record: b'{\"harp"),
        ([RECORD, '{"heartbeat":1}'], 1, "no end: b'{\"heartbeat"),
        (['{"at":1}'], 0, "no end: b'{\"at"),
        (["", RECORD], 0, "no record: b''"),
        (['{"traceback":"a"}', '{"traceback":"b"}', '{"result":1}'], 0, "no record: b'{\"traceback"),
        ([RECORD, "x" * 1000], 1, "no end: b'" + "x" * 60 + "'"),
        ([' {"stream":1}', RECORD], 0, "no record: b' {"),
    ],
)
def test_a_call_says_records_and_an_end_and_nothing_else(
    warden: Warden, tmp_path: Path, lines: list[str], told: int, reason: str
) -> None:
    """What is not a record may not stand among them; the call that tries is stopped, and its end says so."""
    with warden.keep("say_streaming", str(tmp_path / "pid"), "".join(f"{line}\n" for line in lines)) as call:
        assert call.line()["stream_result"] is True
        before, end = read_end(call)
        assert [line for line in before if "stream" in line] == [json.loads(RECORD)] * told
        assert end["error"]["type"] == "call_died"
        assert reason in end["error"]["message"]
        assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
        receipt = next(line["stop_report"] for line in before if "stop_report" in line)
        assert receipt["survivors"] == []
        call.send({"release": True})
        assert call.lines() == []


def test_a_direct_caller_gets_no_forged_line_either(warden: Warden, tmp_path: Path) -> None:
    lines = warden.lines("say_streaming", str(tmp_path / "pid"), '{"stream":1}\n{"result":1}\n{"stream":2}\n')
    assert (lines[0], lines[1]["error"]["type"], len(lines)) == (STREAMS, "call_died", 2)


def test_only_a_streaming_procedure_has_records(warden: Warden, tmp_path: Path) -> None:
    lines = warden.lines("say_plainly", str(tmp_path / "pid"), '{"stream":1}\n')
    assert (lines[0], len(lines)) == (PLAIN, 2)
    assert "not a streaming one" in lines[1]["error"]["message"]


def test_a_line_without_end_ends_its_call(warden: Warden) -> None:
    error = warden.end("talk_without_end", 1 << 20)["error"]
    assert (error["type"], error["message"]) == (
        "call_died",
        "the call was stopped: it wrote a line longer than 67108864 bytes",
    )


def test_long_lines_count_for_what_all_calls_hold(tmp_path: Path) -> None:
    with Warden(tmp_path / "warden", PROCEDURES + OWN, kill_grace=0.3, spool_memory=1 << 20) as warden:
        error = warden.end("talk_without_end", 1 << 20)["error"]
        assert "the calls of this host hold as much as they may" in error["message"]
        assert warden.result("same", "x" * (1 << 20)) == "x" * (1 << 20)  # and what it held is given back


def test_a_child_that_talks_without_end_keeps_no_call_from_ending(warden: Warden, tmp_path: Path) -> None:
    lines = warden.lines("leave_a_talker", str(tmp_path / "pid"))
    assert lines[-1]["error"]["data"] == {"code": 7}
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_zygote_that_stands_still_is_replaced_and_its_calls_go_on(tmp_path: Path) -> None:
    """A start that it was asked for never happens, even when it wakes."""
    with Warden(tmp_path / "warden", PROCEDURES + OWN, kill_grace=0.3) as warden:
        zygote = psutil.Process(warden.status()["zygote"])
        with warden.keep("wait_for", str(tmp_path / "go")) as before:
            before.line()
            zygote.suspend()
            try:
                with warden.keep("mark", str(tmp_path / "started"), "x") as late:
                    (line,) = late.lines()
                    assert line["error"]["type"] == "system_error"
                    assert "did not answer within" in line["error"]["message"]
                assert wait_until(lambda: warden.status()["zygote"] not in (None, zygote.pid), what="another zygote")
                assert warden.result("same", 1) == 1
            finally:
                zygote.resume()
            (tmp_path / "go").touch()
            assert read_end(before)[1] == {"result": "there"}
            before.send({"release": True})
            before.lines()
        wait_until(lambda: not runs(zygote), what="the end of the first zygote")
        assert not (tmp_path / "started").exists()


def test_a_start_that_its_dispatcher_may_have_given_up_does_not_go_on(warden: Warden, tmp_path: Path) -> None:
    """Contact counts from the arrival of the connection, wherever the start has been since then."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    with warden.keep("wait_for", str(tmp_path / "go"), disconnect_timeout=5, begun=now - 6) as call:
        (line,) = call.lines()
        assert line["error"]["type"] == "call_refused"
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    with warden.keep("wait_for", str(tmp_path / "go"), disconnect_timeout=1000, begun=now - 60) as call:
        assert "call" in call.line()
        call.send({"stop": {"why": "cancelled"}})
        assert read_end(call)[1]["error"]["type"] == "cancelled"
        call.send({"release": True})
    begun = time.clock_gettime(time.CLOCK_BOOTTIME) - 80
    with warden.keep("wait_for", str(tmp_path / "go"), disconnect_timeout=83, begun=begun) as call:
        line = call.line()
        if "error" in line:  # the machine was very slow
            assert line["error"]["type"] == "call_refused"
        else:
            assert read_end(call)[1]["error"]["type"] == "lost_contact"
            call.send({"release": True})


def test_a_call_of_a_warden_that_has_just_died_is_not_said_never_to_have_been(tmp_path: Path) -> None:
    """Nor is it forgotten when the next one dies at once, too."""
    first = Warden(tmp_path / "warden", PROCEDURES + OWN).start()
    with first.keep("wait_for", str(tmp_path / "go")) as call:
        call.line()
        second = Warden(tmp_path / "warden", PROCEDURES + OWN).start()
        first.kill()
        assert second.held() == [call.id]
        second.kill()
    with Warden(tmp_path / "warden", PROCEDURES + OWN) as third, third.attach(call.id) as again:
        again.line()
        assert read_end(again)[1]["error"]["type"] == "call_died"
        again.send({"release": True})
        again.lines()
