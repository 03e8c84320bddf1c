"""The supervisor and hostile procedures: a worker runs the procedure's code, and may write and do anything."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harpd.supervisor.frames import START
from support.deadline import wait_until
from support.lingering import LINGERING
from support.procedures_file import PROCEDURES
from support.supervisor import PLAIN, STREAMS, Channel, Supervisor, is_running
from support.worker_channel import CHANNEL

OWN = (
    CHANNEL
    + """
import os, signal, sys, time
from harpd.proc import procedure, streaming_procedure

def say(path, text):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    ours = channel()
    send_all(ours, text.encode())
    while True:
        time.sleep(60)

say_plainly = procedure(say)
say_streaming = streaming_procedure(say)

@procedure
def talk_without_end(size, path=None):
    ours = channel()
    if path is not None:
        send_all(ours, b"x" * size)
        open(path, "w").close()
    while True:
        send_all(ours, b"x" * size)

@streaming_procedure
def leave_a_writer(path):
    ours = channel()
    yield "begun"
    if os.fork() == 0:
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        while True:
            send_all(ours, b'{"stream":0}\\n' * 1000)
    while not os.path.exists(path) or not open(path).read():
        time.sleep(0.01)
    os._exit(7)
"""
)

PASSING = """
import time
from harpd.proc import procedure

@procedure
def pass_a_descriptor(begin, end):
    while not os.path.exists(begin):
        time.sleep(0.01)
    kept = pass_lingering([*unix_sockets()])
    open(end, "w").close()
    while True:
        time.sleep(60)
"""

RECORD = '{"stream":1}'


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    with Supervisor(tmp_path_factory.mktemp("hostile"), PROCEDURES + OWN, kill_grace=0.3) as supervisor:
        yield supervisor


def read_end(call: Channel) -> tuple[list[Any], Any]:
    """Return the lines before the exit info, and the closing line."""
    before: list[Any] = []
    while "exit_info" not in (line := call.line()):
        before.append(line)
    return before, call.line()


@pytest.mark.parametrize(
    ("lines", "record_count", "reason"),
    [
        ([RECORD, '{"result":"forged"}', RECORD], 0, "invalid record: b'{\"result"),
        ([RECORD, '{"stop_report":{"survivors":[]}}', RECORD], 0, "invalid record: b'{\"stop_report"),
        ([RECORD, '{"exit_info":{"exit":0}}', '{"result":"forged"}'], 0, "invalid record: b'{\"exit_info"),
        (['{"harp":1,"error":{"type":"t","message":"m"}}', '{"result":1}'], 0, "invalid record: b'{\"harp"),
        ([RECORD, '{"heartbeat":1}'], 1, "invalid end: b'{\"heartbeat"),
        (['{"at":1}'], 0, "invalid end: b'{\"at"),
        (["", RECORD], 0, "invalid record: b''"),
        (['{"traceback":"a"}', '{"traceback":"b"}', '{"result":1}'], 0, "invalid record: b'{\"traceback"),
        ([RECORD, "x" * 1000], 1, "invalid end: b'" + "x" * 60 + "'"),
        ([' {"stream":1}', RECORD], 0, "invalid record: b' {"),
    ],
)
def test_output_invalid_ends_resumable_call(
    supervisor: Supervisor, tmp_path: Path, lines: list[str], record_count: int, reason: str
) -> None:
    """A call that writes other lines among its records is stopped, and its end names the line."""
    with supervisor.call_resumable(
        "say_streaming", str(tmp_path / "pid"), "".join(f"{line}\n" for line in lines)
    ) as call:
        assert call.line()["stream_result"] is True
        before, end = read_end(call)
        assert [line for line in before if "stream" in line] == [json.loads(RECORD)] * record_count
        assert end["error"]["type"] == "call_died"
        assert reason in end["error"]["message"]
        assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
        stop_report = next(line["stop_report"] for line in before if "stop_report" in line)
        assert stop_report["survivors"] == []
        call.send({"release": True})
        assert call.lines() == []


@pytest.mark.parametrize(
    "members",
    [
        {"caller": {"principal": float("inf")}},
        {"keep_alive": float("inf")},
        {"authentication": float("inf")},
        {"authentication": -1},
        {"received": float("inf")},
        {"received": 1e12},
    ],
)
def test_start_with_impossible_numbers_leaves_no_call(supervisor: Supervisor, members: dict[str, Any]) -> None:
    status = supervisor.status()
    terms = {"owner": "o", "secret": "s", "disconnect_timeout": 60, "result_ttl": 60, "timeout": 60}
    terms |= {"max_exec_time": 60, "received": time.clock_gettime(time.CLOCK_BOOTTIME), "instance": status["instance"]}
    for resumable in (None, terms):
        header = {"call": f"impossible-{resumable is None}", "procedure": "echo", "user": "u", **members}
        if resumable is not None:
            header["resumable"] = terms | {key: value for key, value in members.items() if key == "received"}
        elif "received" in members:
            continue
        text = json.dumps(header).replace("Infinity", "1e999").encode()  # which decoders accept, unlike Infinity
        with supervisor.open_channel(START, text, b"[1]") as stranger:
            assert stranger.lines() == []
    assert supervisor.result("echo", 1) == [1]
    after = supervisor.status()
    assert (after["calls"], after["resumable"]) == (status["calls"], status["resumable"])


def test_start_with_a_long_header_is_refused(supervisor: Supervisor) -> None:
    header = {"call": "long", "procedure": "echo", "user": "u", "peer": "x" * 1024 * 1024}
    with supervisor.open_channel(START, header, b"[1]") as stranger:
        assert stranger.lines() == []


def test_output_invalid_ends_bound_call(supervisor: Supervisor, tmp_path: Path) -> None:
    lines = supervisor.lines("say_streaming", str(tmp_path / "pid"), '{"stream":1}\n{"result":1}\n{"stream":2}\n')
    assert (lines[0], lines[1]["error"]["type"], len(lines)) == (STREAMS, "call_died", 2)


def test_output_records_of_plain_procedure_end_call(supervisor: Supervisor, tmp_path: Path) -> None:
    lines = supervisor.lines("say_plainly", str(tmp_path / "pid"), '{"stream":1}\n')
    assert (lines[0], len(lines)) == (PLAIN, 2)
    assert "not a streaming one" in lines[1]["error"]["message"]


def test_output_line_too_long_ends_call(supervisor: Supervisor) -> None:
    error = supervisor.closing_line("talk_without_end", 1 << 20)["error"]
    assert (error["type"], error["message"]) == (
        "call_died",
        "the call was stopped: it wrote a line longer than 67108864 bytes",
    )


def test_output_long_lines_count_against_quota(tmp_path: Path) -> None:
    with Supervisor(tmp_path / "supervisor", PROCEDURES + OWN, kill_grace=0.3, spool_memory=1 << 20) as supervisor:
        error = supervisor.closing_line("talk_without_end", 1 << 20)["error"]
        assert "the calls of this host have used up spool_memory" in error["message"]
        assert supervisor.result("same", "x" * (1 << 20)) == "x" * (1 << 20)  # and its memory is released


def test_output_of_endless_child_does_not_delay_end(supervisor: Supervisor, tmp_path: Path) -> None:
    lines = supervisor.lines("leave_a_writer", str(tmp_path / "pid"))
    assert lines[-1]["error"]["data"] == {"code": 7}
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_zygote_hanging_is_replaced_and_calls_continue(tmp_path: Path) -> None:
    """An abandoned start never happens, even when the zygote continues."""
    with Supervisor(tmp_path / "supervisor", PROCEDURES + OWN, kill_grace=0.3) as supervisor:
        zygote = psutil.Process(supervisor.status()["zygote"])
        with supervisor.call_resumable("wait_for", str(tmp_path / "go")) as before:
            before.line()
            pid = supervisor.wait_event("call started", call=before.id)["pid"]
            zygote.suspend()
            try:
                # Until it has stopped, it may fork one more.
                wait_until(lambda: zygote.status() == psutil.STATUS_STOPPED, what="the halt of the zygote")
                preforked = [process for process in zygote.children() if process.pid != pid]
                for process in preforked:
                    process.kill()
                wait_until(lambda: not any(map(is_running, preforked)), what="their deaths")
                with supervisor.call_resumable("mark", str(tmp_path / "started"), "x") as late:
                    (line,) = late.lines()
                    assert line["error"]["type"] == "system_error"
                    assert "did not answer within" in line["error"]["message"]
                assert wait_until(
                    lambda: supervisor.status()["zygote"] not in (None, zygote.pid), what="another zygote"
                )
                assert supervisor.result("same", 1) == 1
            finally:
                zygote.resume()
            (tmp_path / "go").touch()
            assert read_end(before)[1] == {"result": "there"}
            before.send({"release": True})
            before.lines()
        wait_until(lambda: not is_running(zygote), what="the end of the first zygote")
        assert not (tmp_path / "started").exists()


def test_start_without_contact_is_stopped_after_fork(supervisor: Supervisor, tmp_path: Path) -> None:
    """Contact counts from the arrival of the connection, even if the start was delayed for long."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    with supervisor.call_resumable("wait_for", str(tmp_path / "go"), disconnect_timeout=5, received=now - 6) as call:
        (line,) = call.lines()
        assert line["error"]["type"] == "call_refused"
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    with supervisor.call_resumable(
        "wait_for", str(tmp_path / "go"), disconnect_timeout=1000, received=now - 60
    ) as call:
        assert "call" in call.line()
        call.send({"stop": {"why": "cancelled"}})
        assert read_end(call)[1]["error"]["type"] == "cancelled"
        call.send({"release": True})
    began = time.clock_gettime(time.CLOCK_BOOTTIME) - 80
    with supervisor.call_resumable("wait_for", str(tmp_path / "go"), disconnect_timeout=83, received=began) as call:
        line = call.line()
        if "error" in line:  # the machine was very slow
            assert line["error"]["type"] == "call_refused"
        else:
            assert read_end(call)[1]["error"]["type"] == "lost_contact"
            call.send({"release": True})


def test_attach_after_supervisor_death_finds_call(tmp_path: Path) -> None:
    """The call is found even if the next supervisor dies immediately."""
    first = Supervisor(tmp_path / "supervisor", PROCEDURES + OWN).start()
    with first.call_resumable("wait_for", str(tmp_path / "go")) as call:
        call.line()
        second = Supervisor(tmp_path / "supervisor", PROCEDURES + OWN).start()
        first.kill()
        assert second.list_calls() == [call.id]
        second.kill()
    with Supervisor(tmp_path / "supervisor", PROCEDURES + OWN) as third, third.attach(call.id) as again:
        again.line()
        assert read_end(again)[1]["error"]["type"] == "call_died"
        again.send({"release": True})
        again.lines()


def test_worker_halts_nobody_by_a_descriptor(tmp_path: Path) -> None:
    """The kernel closes a passed descriptor in the process that receives it, which may take as long as a peer likes."""
    text = PROCEDURES + LINGERING + PASSING
    with Supervisor(tmp_path / "supervisor", text, kill_grace=0.3) as supervisor:
        begin, end = tmp_path / "begin", tmp_path / "end"
        with supervisor.call("pass_a_descriptor", [str(begin), str(end)]) as call:
            call.line()
            process = psutil.Process(supervisor.status()["supervisor"])
            process.suspend()  # so that it receives the last copy
            begin.touch()
            wait_until(end.exists, what="the attempt")
            process.resume()
            assert supervisor.result("same", 5) == 5
        assert supervisor.result("same", 6) == 6
