"""Workers that serve many calls: which calls share a worker, the effects of earlier calls, and when a worker ends."""

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
from support.supervisor import Supervisor, is_running

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

OWN = """
import os, subprocess, sys, time
from harpd.proc import Result, procedure, streaming_procedure

calls = 0

def about():
    global calls
    calls += 1
    return {"pid": os.getpid(), "calls": calls, "cookie": os.environ["HARPD_CALL"], "uid": os.getuid()}

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
def fill_reused(size):
    yield "x" * size
    time.sleep(0.2)
    yield "x" * size
    yield Result("end")

@streaming_procedure(max_calls_per_process=100)
def count_reused(most):
    yield from range(most)
    yield Result(about())
"""


@pytest.fixture
def go(tmp_path: Path) -> Path:
    return tmp_path / "go"


@pytest.fixture
def supervisor(tmp_path: Path, go: Path) -> Iterator[Supervisor]:
    procedures = PROCEDURES + OWN.replace("PATH", str(go))
    with Supervisor(tmp_path / "supervisor", procedures, kill_grace=0.5, max_calls=4) as supervisor:
        yield supervisor


def finish(supervisor: Supervisor, procedure: str, *arguments: object) -> tuple[dict[str, object], dict[str, object]]:
    """Run a resumable call to its end; return its exit info and its closing line."""
    with supervisor.call_resumable(procedure, *arguments) as call:
        lines = [call.line()]
        while not {"result", "exception", "error"} & lines[-1].keys() or len(lines) == 1:
            lines.append(call.line())
        call.send({"release": True})
        assert call.lines() == []
    (exit_info,) = [line["exit_info"] for line in lines if "exit_info" in line]
    return exit_info, lines[-1]


def test_worker_serves_calls_in_succession(supervisor: Supervisor) -> None:
    found = [supervisor.result("own") for _ in range(5)]
    assert [one["calls"] for one in found] == [1, 2, 3, 4, 5]
    assert len({one["pid"] for one in found}) == 1
    assert len({one["cookie"] for one in found}) == 5


def test_worker_serves_one_procedure_only(supervisor: Supervisor) -> None:
    assert len({supervisor.result(name)["pid"] for name in ("own", "another", "own", "another")}) == 2


def test_concurrent_calls_have_a_worker_each(supervisor: Supervisor, tmp_path: Path) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    for _ in range(2):
        with supervisor.call("meet", [one, other]) as first, supervisor.call("meet", [other, one]) as second:
            found = [first.lines()[-1]["result"], second.lines()[-1]["result"]]
        assert found[0]["pid"] != found[1]["pid"]
        os.unlink(one)
        os.unlink(other)
    assert [one["calls"] for one in found] == [2, 2]


def test_worker_exits_after_max_calls(supervisor: Supervisor) -> None:
    found = [supervisor.result("thrice") for _ in range(7)]
    assert [one["calls"] for one in found] == [1, 2, 3, 1, 2, 3, 1]
    assert len({one["pid"] for one in found}) == 3


@ROOT
def test_worker_runs_each_call_as_procedure_user(supervisor: Supervisor) -> None:
    found = [supervisor.result("nobodys") for _ in range(3)]
    assert {one["uid"] for one in found} == {65534}
    assert [one["calls"] for one in found] == [1, 2, 3]


def test_worker_without_its_user_rejects_the_call(supervisor: Supervisor) -> None:
    for _ in range(2):
        assert supervisor.closing_line("nobody_there")["error"]["type"] == "system_error"
    assert not supervisor.events("call printed")


def test_worker_serves_streaming_calls(supervisor: Supervisor) -> None:
    for number in (1, 2):
        *lines, end = supervisor.lines("count_reused", 2)
        assert lines[1:] == [{"stream": 0}, {"stream": 1}]
        assert end["result"]["calls"] == number


def test_worker_survives_exception_not_wrong_arguments(supervisor: Supervisor) -> None:
    first = supervisor.result("spin", 0)
    assert supervisor.closing_line("spin", "no number")["exception"]["type"] == "TypeError"
    with supervisor.call("spin", [0]) as call:
        assert call.lines()[-1]["result"] == {**first, "calls": 2, "cookie": call.id}
    assert supervisor.closing_line("spin", 1, 2)["error"]["type"] == "invalid_argument_list"
    assert supervisor.result("spin", 0)["calls"] == 1


def test_stop_ends_worker(supervisor: Supervisor, tmp_path: Path) -> None:
    first = supervisor.result("limited", 0)
    assert supervisor.closing_line("limited", 60)["error"]["type"] == "timeout"
    second = supervisor.result("limited", 0)
    assert (first["calls"], second["calls"]) == (1, 1)
    assert not psutil.pid_exists(first["pid"])
    path = tmp_path / "there"
    with supervisor.call("meet", [str(path), str(tmp_path / "never")]) as call:
        call.line()
        wait_until(path.exists)
        pid = supervisor.wait_event("call started", call=call.id)["pid"]
        call.stop()
    assert not psutil.pid_exists(pid)


def test_worker_exiting_fails_its_call_only(supervisor: Supervisor) -> None:
    for _ in range(3):
        assert supervisor.closing_line("leave_reused", 3)["error"]["data"] == {"code": 3}


def test_idle_worker_killed_fails_no_call(supervisor: Supervisor) -> None:
    for _ in range(5):
        found = supervisor.result("own")
        assert found["calls"] == 1
        process = psutil.Process(found["pid"])
        process.kill()
        wait_until(lambda: not is_running(process), what="its death")  # noqa: B023 - waited for at once


def test_worker_writing_after_end_is_not_reused(supervisor: Supervisor, go: Path) -> None:
    assert supervisor.closing_line("say_more")["error"]["type"] == "call_died"
    found = supervisor.result("say_more_later")
    go.touch()
    wait_until(go.with_name("go-said").exists)
    assert supervisor.result("say_more_later")["pid"] != found["pid"]
    assert supervisor.wait_event("idle worker wrote output; not reused", pid=found["pid"])


def test_exit_info_of_reused_worker_counts_its_call_only(tmp_path: Path) -> None:
    exit_info_settings = {"stderr": True, "traceback": True}
    with Supervisor(tmp_path / "supervisor", PROCEDURES + OWN, exit_info=exit_info_settings) as supervisor:
        for text in ("one", "two"):
            found, end = finish(supervisor, "fail_reused", text)
            assert found["stderr"] == [f"why {text}"]
            assert f"ValueError: {text}" in str(found["traceback"])
            assert (found["exit"], found["signal"], found["by"]) == (None, None, "itself")
            assert end["exception"]["message"] == text  # type: ignore[index]
        used = [finish(supervisor, "spin", seconds)[0]["cpu"] for seconds in (0.2, 0.0, 0.1)]
        assert 0.2 <= used[0] < 0.3 + used[1]  # type: ignore[operator]
        assert 0.1 <= used[2] < 0.2  # type: ignore[operator]
        events = supervisor.wait_events(2, "call printed")
        assert [event["text"] for event in events] == ["why one", "why two"]
        assert len({event["call"] for event in events}) == 2


def test_children_of_earlier_calls_continue(supervisor: Supervisor) -> None:
    left, main = supervisor.result("leave_a_child")
    child = psutil.Process(left)
    assert child.ppid() == main
    later, same_main = supervisor.result("leave_a_child")
    assert same_main == main
    assert is_running(child)
    os.kill(main, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(main))
    assert is_running(child)
    child.kill()
    os.kill(later, signal.SIGKILL)


def test_idle_workers_make_room_for_calls(supervisor: Supervisor, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in "abcd"]
    calls = [supervisor.call("meet", [path, str(tmp_path / "go")]) for path in paths]
    wait_until(lambda: all(map(os.path.exists, paths)))
    (tmp_path / "go").touch()
    idle = [psutil.Process(call.lines()[-1]["result"]["pid"]) for call in calls]
    for call in calls:
        call.close()
    assert supervisor.status()["calls"] == 0
    assert all(map(is_running, idle))
    supervisor.result("own")  # with four idle workers, which is the limit
    wait_until(lambda: sum(map(is_running, idle)) == 3, what="room for another")


def test_reload_ends_idle_workers(supervisor: Supervisor, tmp_path: Path) -> None:
    zygote = psutil.Process(supervisor.status()["zygote"])
    idle = psutil.Process(supervisor.result("own")["pid"])
    with supervisor.call("meet", [str(tmp_path / "there"), str(tmp_path / "go")]) as call:
        call.line()
        wait_until((tmp_path / "there").exists)
        busy = psutil.Process(supervisor.wait_event("call started", procedure="meet")["pid"])
        assert supervisor.reload() == {"ok": True}
        wait_until(lambda: not is_running(idle), what="its end")
        (tmp_path / "go").touch()
        assert call.line()["result"]["pid"] == busy.pid
        assert call.lines() == []
    wait_until(lambda: not is_running(busy), what="its end")
    wait_until(lambda: not is_running(zygote), what="the end of its zygote")
    assert supervisor.result("own")["calls"] == 1


def test_idle_worker_ends_with_supervisor(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "killed", PROCEDURES + OWN)
    with supervisor:
        idle = psutil.Process(supervisor.result("own")["pid"])
        supervisor.kill()
        wait_until(lambda: not is_running(idle), what="its end")


def test_idle_worker_ends_after_timeout(supervisor: Supervisor) -> None:
    idle = psutil.Process(supervisor.result("own")["pid"])
    began = time.monotonic()
    wait_until(lambda: not is_running(idle), what="its end")
    assert time.monotonic() - began > 5


def test_stop_of_reused_worker_kills_earlier_children(supervisor: Supervisor, tmp_path: Path) -> None:
    """The stop report lists processes of earlier calls and of the stopped call."""
    first, _ = supervisor.result("leave_a_child"), supervisor.result("own")
    path = tmp_path / "there"
    supervisor.result("meet", str(path), str(path))
    path.unlink()
    with supervisor.call_resumable("meet", str(path), str(tmp_path / "never")) as call:
        call.line()
        wait_until(path.exists)
        call.send({"stop": {"why": "cancelled"}})
        while "stop_report" not in (line := call.line()):
            pass
        assert (line["stop_report"]["survivors"], line["stop_report"]["complete"]) == ([], True)
        call.send({"release": True})
        call.lines()
    assert psutil.pid_exists(first[0])  # a child of another worker
    os.kill(first[0], signal.SIGKILL)


def test_limit_reached_behind_full_spool_finds_end(tmp_path: Path) -> None:
    """The end that waits behind a full spool counts, and is discarded once."""
    with (
        Supervisor(tmp_path / "supervisor", PROCEDURES + OWN, spool=1000) as supervisor,
        supervisor.call_resumable("fill_reused", 1000, max_exec_time=1, result_ttl=1) as call,
    ):
        lines = [call.line() for _ in range(7)]
        assert "exit_info" in lines[5]
        assert lines[6] == {"result": "end"}
        call.send({"release": True})
        assert call.lines() == []
        time.sleep(1.5)  # until the end would be discarded
