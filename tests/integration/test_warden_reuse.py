"""Processes that serve many calls: which calls get one, what each call finds there, when there is no further one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.deadline import wait_until
from support.procedures_file import PROCEDURES
from support.warden import Warden, runs

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

OWN = """
import os, subprocess, sys, time
from harpd.proc import Result, procedure, streaming_procedure

calls = 0

def about():
    global calls
    calls += 1
    return {"pid": os.getpid(), "calls": calls, "mark": os.environ["HARPD_CALL"], "uid": os.getuid()}

@procedure(max_calls_per_process=100)
def own():
    return about()

@procedure(max_calls_per_process=100)
def another():
    return about()

@procedure(max_calls_per_process=100, uid="nobody")
def nobodys():
    return about()

@procedure(max_calls_per_process=1, uid="no-such-user-at-all")
def nobody_there():
    open("/proc/self/oom_score_adj").read()
    raise AssertionError("must not run")

@procedure(max_calls_per_process=3)
def thrice():
    return about()

@procedure(max_calls_per_process=100, timeout=0.2)
def limited(seconds):
    time.sleep(seconds)
    return about()

@procedure(max_calls_per_process=100)
def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return about()

@procedure(max_calls_per_process=100)
def fail_reused(text):
    about()
    print("why", text, file=sys.stderr, end="")
    raise ValueError(text)

@procedure(max_calls_per_process=100)
def meet(mine, other):
    open(mine, "w").close()
    while not os.path.exists(other):
        time.sleep(0.01)
    return about()

@procedure(max_calls_per_process=100)
def say_more():
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b'{"result":"false"}\\n{"result":"twice"}\\n')
        except OSError:
            pass

@procedure(max_calls_per_process=100)
def say_more_later():
    if not os.path.exists("PATH") and os.fork() == 0:
        while not os.path.exists("PATH"):
            time.sleep(0.01)
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, b'{"result":"false"}\\n')
            except OSError:
                pass
        open("PATH-said", "w").close()
        os._exit(0)
    return about()

@procedure(max_calls_per_process=100)
def leave_a_child():
    return subprocess.Popen(["sleep", "3600"], start_new_session=True).pid, os.getpid()

@procedure(max_calls_per_process=100)
def leave_reused(code):
    os._exit(code)

@streaming_procedure(max_calls_per_process=100)
def count_reused(most):
    yield from range(most)
    yield Result(about())
"""


@pytest.fixture
def go(tmp_path: Path) -> Path:
    return tmp_path / "go"


@pytest.fixture
def warden(tmp_path: Path, go: Path) -> Iterator[Warden]:
    procedures = PROCEDURES + OWN.replace("PATH", str(go))
    with Warden(tmp_path / "warden", procedures, kill_grace=0.5, calls=4) as warden:
        yield warden


def finish(warden: Warden, procedure: str, *arguments: object) -> tuple[dict[str, object], dict[str, object]]:
    """Run a kept call to its end; its evidence and its closing line."""
    with warden.keep(procedure, *arguments) as call:
        lines = [call.line()]
        while not {"result", "exception", "error"} & lines[-1].keys() or len(lines) == 1:
            lines.append(call.line())
        call.send({"release": True})
        assert call.lines() == []
    (evidence,) = [line["exit_info"] for line in lines if "exit_info" in line]
    return evidence, lines[-1]


def test_calls_of_a_procedure_share_a_process_one_at_a_time(warden: Warden) -> None:
    found = [warden.result("own") for _ in range(5)]
    assert [one["calls"] for one in found] == [1, 2, 3, 4, 5]
    assert len({one["pid"] for one in found}) == 1
    assert len({one["mark"] for one in found}) == 5


def test_each_procedure_has_processes_of_its_own(warden: Warden) -> None:
    assert len({warden.result(name)["pid"] for name in ("own", "another", "own", "another")}) == 2


def test_calls_at_once_have_a_process_each(warden: Warden, tmp_path: Path) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    for _ in range(2):
        with warden.call("meet", [one, other]) as first, warden.call("meet", [other, one]) as second:
            found = [first.lines()[-1]["result"], second.lines()[-1]["result"]]
        assert found[0]["pid"] != found[1]["pid"]
        os.unlink(one)
        os.unlink(other)
    assert [one["calls"] for one in found] == [2, 2]


def test_after_that_many_calls_there_is_another_process(warden: Warden) -> None:
    found = [warden.result("thrice") for _ in range(7)]
    assert [one["calls"] for one in found] == [1, 2, 3, 1, 2, 3, 1]
    assert len({one["pid"] for one in found}) == 3


@ROOT
def test_the_user_is_the_procedures_each_time(warden: Warden) -> None:
    found = [warden.result("nobodys") for _ in range(3)]
    assert {one["uid"] for one in found} == {65534}
    assert [one["calls"] for one in found] == [1, 2, 3]


def test_without_its_user_nothing_runs(warden: Warden) -> None:
    for _ in range(2):
        assert warden.end("nobody_there")["error"]["type"] == "system_error"
    assert not warden.events("call printed")


def test_records_come_from_such_a_process_too(warden: Warden) -> None:
    for number in (1, 2):
        *lines, end = warden.lines("count_reused", 2)
        assert lines[1:] == [{"stream": 0}, {"stream": 1}]
        assert end["result"]["calls"] == number


def test_an_exception_does_not_end_it_and_wrong_arguments_do(warden: Warden) -> None:
    first = warden.result("spin", 0)
    assert warden.end("spin", "no number")["exception"]["type"] == "TypeError"
    assert warden.result("spin", 0) == {**first, "calls": 2, "mark": warden.events("call started")[-1]["call"]}
    assert warden.end("spin", 1, 2)["error"]["type"] == "invalid_argument_list"
    assert warden.result("spin", 0)["calls"] == 1


def test_a_stopped_call_ends_its_process_and_the_next_has_another(warden: Warden, tmp_path: Path) -> None:
    first = warden.result("limited", 0)
    assert warden.end("limited", 60)["error"]["type"] == "timeout"
    second = warden.result("limited", 0)
    assert (first["calls"], second["calls"]) == (1, 1)
    assert not psutil.pid_exists(first["pid"])
    path = tmp_path / "there"
    with warden.call("meet", [str(path), str(tmp_path / "never")]) as call:
        call.line()
        wait_until(path.exists)
        pid = warden.events("call started")[-1]["pid"]
        call.stop()
    assert not psutil.pid_exists(pid)


def test_a_process_that_ends_itself_costs_its_own_call(warden: Warden) -> None:
    for _ in range(3):
        assert warden.end("leave_reused", 3)["error"]["data"] == {"code": 3}


def test_one_that_is_killed_while_it_waits_costs_no_call(warden: Warden) -> None:
    for _ in range(5):
        found = warden.result("own")
        assert found["calls"] == 1
        process = psutil.Process(found["pid"])
        process.kill()
        wait_until(lambda: not runs(process), what="its death")  # noqa: B023 - waited for at once


def test_one_that_says_more_than_its_end_is_not_used_again(warden: Warden, go: Path) -> None:
    assert warden.end("say_more")["error"]["type"] == "call_died"
    said = warden.result("say_more_later")
    go.touch()
    wait_until(go.with_name("go-said").exists)
    assert warden.result("say_more_later")["pid"] != said["pid"]
    assert warden.wait_event("idle worker wrote output; not reused", pid=said["pid"])


def test_evidence_is_the_calls_own(tmp_path: Path) -> None:
    evidence = {"stderr": True, "traceback": True}
    with Warden(tmp_path / "supervisor", PROCEDURES + OWN, exit_info=evidence) as warden:
        for text in ("one", "two"):
            found, end = finish(warden, "fail_reused", text)
            assert found["stderr"] == [f"why {text}"]
            assert f"ValueError: {text}" in str(found["traceback"])
            assert (found["exit"], found["signal"], found["by"]) == (None, None, "itself")
            assert end["exception"]["message"] == text  # type: ignore[index]
        used = [finish(warden, "spin", seconds)[0]["cpu"] for seconds in (0.2, 0.0, 0.1)]
        assert 0.2 <= used[0] < 0.3 + used[1]  # type: ignore[operator]
        assert 0.1 <= used[2] < 0.2  # type: ignore[operator]
        events = warden.events("call printed")
        assert [event["text"] for event in events] == ["why one", "why two"]
        assert len({event["call"] for event in events}) == 2


def test_what_earlier_calls_left_goes_on_until_a_later_one_is_stopped(warden: Warden) -> None:
    left, main = warden.result("leave_a_child")
    child = psutil.Process(left)
    assert child.ppid() == main
    assert warden.result("leave_a_child")[1] == main
    assert runs(child)
    os.kill(main, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(main))
    assert runs(child)
    child.kill()


def test_those_that_rest_are_no_calls_and_make_room(warden: Warden, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in "abcd"]
    calls = [warden.call("meet", [path, str(tmp_path / "go")]) for path in paths]
    wait_until(lambda: all(map(os.path.exists, paths)))
    (tmp_path / "go").touch()
    resting = [psutil.Process(call.lines()[-1]["result"]["pid"]) for call in calls]
    for call in calls:
        call.close()
    assert warden.status()["calls"] == 0
    assert all(map(runs, resting))
    warden.result("own")  # with four that rest, and four that may be there
    wait_until(lambda: sum(map(runs, resting)) == 3, what="room for another")


def test_a_reload_ends_those_that_rest_and_those_that_would(warden: Warden, tmp_path: Path) -> None:
    zygote = psutil.Process(warden.status()["zygote"])
    resting = psutil.Process(warden.result("own")["pid"])
    with warden.call("meet", [str(tmp_path / "there"), str(tmp_path / "go")]) as call:
        call.line()
        wait_until((tmp_path / "there").exists)
        busy = psutil.Process(warden.events("call started", procedure="meet")[0]["pid"])
        assert warden.reload() == {"ok": True}
        wait_until(lambda: not runs(resting), what="its end")
        (tmp_path / "go").touch()
        assert call.line()["result"]["pid"] == busy.pid
        assert call.lines() == []
    wait_until(lambda: not runs(busy), what="its end")
    wait_until(lambda: not runs(zygote), what="the end of its zygote")
    assert warden.result("own")["calls"] == 1


def test_with_its_warden_it_goes(tmp_path: Path) -> None:
    warden = Warden(tmp_path / "killed", PROCEDURES + OWN)
    with warden:
        resting = psutil.Process(warden.result("own")["pid"])
        warden.kill()
        wait_until(lambda: not runs(resting), what="its end")


def test_one_that_waits_in_vain_ends(warden: Warden) -> None:
    resting = psutil.Process(warden.result("own")["pid"])
    began = time.monotonic()
    wait_until(lambda: not runs(resting), what="its end")
    assert time.monotonic() - began > 5


def test_a_stop_proves_that_all_is_gone(warden: Warden, tmp_path: Path) -> None:
    """What the calls before have left and what the stopped one did, as its receipt says."""
    first, _ = warden.result("leave_a_child"), warden.result("own")
    path = tmp_path / "there"
    warden.result("meet", str(path), str(path))
    path.unlink()
    with warden.keep("meet", str(path), str(tmp_path / "never")) as call:
        call.line()
        wait_until(path.exists)
        call.send({"stop": {"why": "cancelled"}})
        while "stop_report" not in (line := call.line()):
            pass
        assert (line["stop_report"]["survivors"], line["stop_report"]["complete"]) == ([], True)
        call.send({"release": True})
        call.lines()
    assert psutil.pid_exists(first[0])  # of another process: not the stopped call's
    os.kill(first[0], signal.SIGKILL)
