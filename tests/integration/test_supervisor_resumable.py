"""Resumable calls in the supervisor: attaching, records, lost contact, stop reports, adoption."""

from __future__ import annotations

import os
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.cgroups import own_cgroup
from support.deadline import wait_until
from support.procedures_file import PROCEDURES
from support.supervisor import DEADLINE, OWNER, SECRET, Channel, Supervisor, is_running

NOBODY = 65534
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

OWN = """
import os, sys, time
from harpd.proc import procedure

@procedure
def wrong(text):
    print("first", text, file=sys.stderr)
    print("not whole", end="", file=sys.stderr)
    raise ValueError(text)

@procedure
def leave_a_service(path):
    if os.fork() == 0:
        os.setsid()
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        os.execvp("sleep", ["sleep", "600"])
    while not os.path.exists(path) or not open(path).read():
        time.sleep(0.01)
    return "left"

@procedure
def leave_a_stranger(path):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            code = "import os, time; open(os.sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
            os.execve(sys.executable, [sys.executable, "-c", code, path], {})
        os._exit(0)
    while not os.path.exists(path):
        time.sleep(0.01)
    os._exit(7)
"""


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    exit_info_settings = {"stderr": True, "traceback": True}
    with Supervisor(
        tmp_path_factory.mktemp("resumable"), PROCEDURES + OWN, kill_grace=0.3, exit_info=exit_info_settings
    ) as supervisor:
        yield supervisor


def read_end(call: Channel) -> tuple[list[Any], dict[str, Any], Any]:
    """Read to the closing line; return the lines before exit info, the exit info, and the closing line."""
    before: list[Any] = []
    while "exit_info" not in (line := call.line()):
        before.append(line)
    return before, line["exit_info"], call.line()


def release(call: Channel) -> list[Any]:
    """Release the call; return the lines after that."""
    call.send({"release": True})
    return call.lines()


def error_of(line: Any) -> str:
    assert line.keys() == {"harp", "error"}, line
    return str(line["error"]["type"])


def refused(call: Channel) -> str:
    (line,) = call.lines()
    return error_of(line)


def test_end_stays_until_released(supervisor: Supervisor) -> None:
    with supervisor.call_resumable("same", 5) as call:
        acknowledgement = call.line()
        assert acknowledgement["call"].keys() == {
            "instance", "disconnect_timeout", "result_ttl", "kill_grace", "elapsed", "records",
        }  # fmt: skip
        before, exit_info, end = read_end(call)
        assert (before, end) == ([], {"result": 5})
        assert (exit_info["exit"], exit_info["signal"], exit_info["by"]) == (0, None, "itself")
        assert exit_info["cpu"] > 0
        assert exit_info["memory"] > 1 << 20
        assert exit_info["started"] <= exit_info["ended"]
        assert 0 <= exit_info["fork"] <= 60
        assert exit_info["authentication"] is None, "the request has no authentication"
        call_id = call.id
    assert call_id in supervisor.list_calls()
    with supervisor.attach(call_id) as call:
        assert call.line()["stream_result"] is False
        assert read_end(call)[2] == {"result": 5}
        assert release(call) == []
    assert call_id not in supervisor.list_calls()
    with supervisor.attach(call_id) as call:
        assert refused(call) == "no_such_call"


def test_attach_sends_records_from_number_until_ack(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor.call_resumable("count", 6, str(tmp_path / "go")) as call:
        call_id = call.id
        call.line()
        numbers: list[int] = []
        while numbers != list(range(6)):
            line = call.line()
            if "stream" in line:
                numbers.append(line["stream"])
            else:
                assert line.keys() == {"at"}
    for since in (0, 3, 6):
        with supervisor.attach(call_id, since) as call:
            assert call.line()["call"]["records"] == 6
            call.send({"heartbeat": 0})
            received = []
            while "heartbeat" not in (line := call.line()):
                received += [line["stream"]] if "stream" in line else []
            assert received == list(range(since, 6))
    with supervisor.attach(call_id, 6) as call:
        call.line()
        call.send({"ack": 6})
        (tmp_path / "go").touch()
        assert read_end(call)[2] == {"result": 6}
    with supervisor.attach(call_id, 2) as call:
        (line,) = call.lines()
        assert (error_of(line), line["error"]["data"]) == ("records_gone", {"first": 6, "end": 6})
    with supervisor.attach(call_id, 6) as call:
        call.line()
        read_end(call)
        release(call)


def test_attach_replaces_earlier_connection(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor.call_resumable("wait_for", str(tmp_path / "go")) as first:
        first.line()
        with supervisor.attach(first.id) as second:
            second.line()
            assert first.lines() == []  # closed
            (tmp_path / "go").touch()
            assert read_end(second)[2] == {"result": "there"}
            release(second)


def test_attach_needs_owner_and_secret(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor.call_resumable("wait_for", str(tmp_path / "go")) as call:
        call.line()
        for owner, secret in (("owner-2", SECRET), (OWNER, "secret-2"), (SECRET, OWNER)):
            with supervisor.attach(call.id, owner=owner, secret=secret) as other:
                assert refused(other) == "no_such_call"
        assert supervisor.list_calls("owner-2") == []
        assert call.id in supervisor.list_calls()
        (tmp_path / "go").touch()
        assert read_end(call)[2] == {"result": "there"}
        release(call)


def test_start_after_no_such_call_is_rejected(supervisor: Supervisor) -> None:
    call_id = str(uuid.uuid4())
    with supervisor.attach(call_id) as call:
        (line,) = call.lines()
        assert line["error"]["data"] == {"instance": supervisor.status()["instance"]}
    with supervisor.call_resumable("same", 1, call_id=call_id) as call:
        assert refused(call) == "call_refused"
    with supervisor.call_resumable(
        "same", 1, call_id=call_id, owner="owner-2"
    ) as call:  # the tombstone counts for its own owner only
        call.line()
        read_end(call)
        release(call)


def test_start_for_other_instance_is_rejected(supervisor: Supervisor) -> None:
    with supervisor.call_resumable("same", 1, instance="another") as call:
        (line,) = call.lines()
        assert (error_of(line), line["error"]["data"]["instance"]) == (
            "wrong_instance",
            supervisor.status()["instance"],
        )


@pytest.mark.parametrize(("age", "disconnect_timeout"), [(125, 3600), (65, 60)])
def test_start_delayed_too_long_is_rejected(supervisor: Supervisor, age: float, disconnect_timeout: float) -> None:
    """The tombstone of its id may have expired by then, or its dispatcher may have declared the host lost."""
    received = time.clock_gettime(time.CLOCK_BOOTTIME) - age
    terms: dict[str, Any] = {"received": received, "disconnect_timeout": disconnect_timeout}
    with supervisor.call_resumable("same", 1, **terms) as call:
        (line,) = call.lines()
        assert (error_of(line), line["error"]["data"]) == ("call_refused", {"reason": "delayed"})
        assert call.id not in supervisor.list_calls()


def test_start_with_too_many_unfetched_ends_is_rejected(tmp_path: Path) -> None:
    with Supervisor(tmp_path, PROCEDURES + OWN, max_calls=1, spool_memory=10_000) as supervisor:
        held = []
        for _ in range(2):
            with supervisor.call_resumable("same", "x" * 15_000) as call:
                held.append(call.id)
                call.line()
                read_end(call)
        with supervisor.call_resumable("same", 1) as call:
            assert refused(call) == "too_many_calls"
        for call_id in held:
            with supervisor.attach(call_id) as call:
                call.line()
                read_end(call)
                release(call)
        with supervisor.call_resumable("same", 1) as call:
            call.line()
            read_end(call)
            release(call)


def test_start_with_used_id_is_rejected(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor.call_resumable("wait_for", str(tmp_path / "go")) as call:
        call.line()
        with supervisor.call_resumable("same", 1, call_id=call.id) as again:
            assert refused(again) == "call_refused"
        (tmp_path / "go").touch()
        read_end(call)
        release(call)
    with supervisor.call_resumable("same", 1, call_id=call.id) as again:
        assert refused(again) == "call_refused"


def test_start_failed_creates_no_session(supervisor: Supervisor) -> None:
    with supervisor.call_resumable("nowhere") as call:
        assert refused(call) == "no_such_procedure"
        assert call.id not in supervisor.list_calls()


def test_call_without_contact_is_stopped_and_end_stays(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor.call_resumable("resist", str(tmp_path / "pids"), disconnect_timeout=0.2) as call:
        call.line()
        call_id = call.id  # it stays attached: an open connection does not prove contact
        _, exit_info, end = read_end(call)
        assert error_of(end) == "lost_contact"
        assert exit_info["by"] == "lost_contact"
    with supervisor.attach(call_id) as call:
        call.line()
        before, _, end = read_end(call)
        assert before[0]["stop_report"]["survivors"] == []
        assert error_of(end) == "lost_contact"
        release(call)


def test_contact_counts_from_echoed_time(supervisor: Supervisor, tmp_path: Path) -> None:
    """A late heartbeat proves no newer contact, and a time in the future is an error."""
    with supervisor.call_resumable("wait_for", str(tmp_path / "go"), disconnect_timeout=0.5) as call:
        call.line()
        line = {"heartbeat": 0}
        while "heartbeat" in line:
            call.send({"heartbeat": 0})
            line = call.line()
        assert "stop_report" in line
        assert error_of(read_end(call)[2]) == "lost_contact"
        release(call)
    with supervisor.call_resumable("same", 1) as call:
        call.line()
        read_end(call)
        call.send({"heartbeat": 1e6})
        assert call.lines() == []
    with supervisor.attach(call.id) as call:
        call.line()
        read_end(call)
        release(call)


def test_call_with_contact_continues(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor.call_resumable("wait_for", str(tmp_path / "go"), disconnect_timeout=0.4) as call:
        peer_time = call.line()["call"]["elapsed"]
        while peer_time < 1.2:
            call.send({"heartbeat": peer_time})
            peer_time = call.line()["heartbeat"]
        (tmp_path / "go").touch()
        assert read_end(call)[2] == {"result": "there"}
        release(call)


def test_end_unfetched_is_discarded_after_result_ttl(supervisor: Supervisor) -> None:
    with supervisor.call_resumable("same", 1, result_ttl=0.1) as call:
        call.line()
        read_end(call)
        assert call.lines() == []  # closed by the supervisor
    supervisor.wait_event("discarding unfetched end of call", call=call.id)
    assert call.id not in supervisor.list_calls()


def test_limits_of_request_stop_call(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor.call_resumable("wait_for", str(tmp_path / "go"), max_exec_time=0.1) as call:
        call.line()
        before, exit_info, end = read_end(call)
        assert (error_of(end), exit_info["by"]) == ("timeout", "limit")
        assert "maximum execution time" in end["error"]["message"]
        assert before[0]["stop_report"]["processes"][0]["signals"] == ["SIGTERM"]
        release(call)
    with supervisor.call_resumable("count", 3, str(tmp_path / "go"), timeout=0.1) as call:
        call.line()
        before, _, end = read_end(call)
        assert error_of(end) == "timeout"
        assert "reading the result" in end["error"]["message"]
        assert [line["stream"] for line in before if "stream" in line] == [0, 1, 2]
        release(call)


def test_spool_full_pauses_procedure_and_drops_no_record(tmp_path: Path) -> None:
    most, size = 400, 10_000
    with Supervisor(tmp_path / "supervisor", PROCEDURES + OWN, spool=100_000) as supervisor:
        with supervisor.call_resumable("long_records", most, size, timeout=0.5) as call:
            call.line()
            first = [call.line() for _ in range(2)]
        process = psutil.Process(supervisor.wait_event("call started", call=call.id)["pid"])

        def waits() -> bool:
            return process.status() == psutil.STATUS_SLEEPING and supervisor.status()["calls"] == 1

        wait_until(waits, DEADLINE, "the procedure waiting")
        with pytest.raises(psutil.TimeoutExpired):
            process.wait(1.0)  # longer than its timeout, which does not count while it cannot write
        assert "at" in first[0]
        with supervisor.attach(call.id) as again:
            assert again.line()["call"]["records"] < most
            numbers: list[int] = []
            while "exit_info" not in (line := again.line()):
                if "stream" in line:
                    numbers.append(line["stream"][0])
                    again.send({"ack": len(numbers)})
            assert numbers == list(range(most))
            assert again.line() == {"result": None}
            release(again)


def test_commands_after_request_line_are_handled(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor.call_resumable("wait_for", str(tmp_path / "never")) as call:
        call.line()
    with supervisor.attach(call.id, behind=b'{"heartbeat":0}\n{"stop":{"why":"cancelled"}}\n{"hea') as again:
        again.send(b'rtbeat":0}\n')
        before, _, end = read_end(again)
        assert error_of(end) == "cancelled"
        assert [line for line in before if "heartbeat" in line][1:] or again.line().keys() == {"heartbeat"}
        release(again)


def test_command_invalid_closes_connection_only(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor.call_resumable("wait_for", str(tmp_path / "go")) as call:
        call.line()
    for garbage in (b"garbage\n", b"{}\n", b'{"ack":1}\n', b'{"release":true}\n', b"x" * 5000):
        with supervisor.attach(call.id) as other:
            other.line()
            other.send(garbage)
            assert other.lines() == []
    (tmp_path / "go").touch()
    with supervisor.attach(call.id) as other:
        other.line()
        assert read_end(other)[2] == {"result": "there"}
        release(other)


def test_exit_info_of_exception_has_traceback(supervisor: Supervisor) -> None:
    with supervisor.call_resumable("wrong", "text") as call:
        call.line()
        _, exit_info, end = read_end(call)
        data = {"class": "ValueError", "module": "builtins"}
        assert end == {"exception": {"type": "ValueError", "message": "text", "data": data}}
        assert exit_info["stderr"] == ["first text", "not whole"]
        assert exit_info["traceback"].endswith("ValueError: text\n")
        assert "in wrong" in exit_info["traceback"]
        release(call)


def test_exit_info_has_output_only_if_configured(tmp_path: Path) -> None:
    with Supervisor(tmp_path, PROCEDURES + OWN) as supervisor, supervisor.call_resumable("wrong", "text") as call:
        call.line()
        _, exit_info, _ = read_end(call)
        assert not {"stderr", "traceback"} & exit_info.keys()
        release(call)


def test_exit_info_of_death_has_signal_or_code(supervisor: Supervisor) -> None:
    with supervisor.call_resumable("die", int(signal.SIGKILL)) as call:
        call.line()
        before, exit_info, end = read_end(call)
        assert error_of(end) == "call_died"
        assert (exit_info["exit"], exit_info["signal"], exit_info["by"]) == (None, "SIGKILL", "unknown")
        assert [line["stop_report"]["survivors"] for line in before] == [[]]
        release(call)


def five(path: Path) -> list[str]:
    """Wait for the pids of the five processes of the resisting call."""
    wait_until(lambda: len(path.read_text().split()) == 5, DEADLINE, "five processes")
    return path.read_text().split()


def stop_resisting(supervisor: Supervisor, path: Path) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """Stop the resisting call; return its stop report, its exit info and the pids of its processes."""
    with supervisor.call_resumable("resist", str(path)) as call:
        call.line()
        pids = five(path)
        call.send({"stop": {"why": "cancelled", "by": "somebody"}})
        before, exit_info, end = read_end(call)
        assert error_of(end) == "cancelled"
        release(call)
    return before[-1]["stop_report"], exit_info, [int(pid) for pid in pids]


def dead(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and is_running(psutil.Process(pid)) for pid in pids)


def test_stop_sends_report(supervisor: Supervisor, tmp_path: Path) -> None:
    (tmp_path / "pids").touch()
    stop_report, exit_info, pids = stop_resisting(supervisor, tmp_path / "pids")
    assert dead(pids)
    assert {one["pid"] for one in stop_report["processes"]} == set(pids)
    assert all(one["signals"] == ["SIGTERM", "SIGKILL"] for one in stop_report["processes"])
    assert all("SIGKILL" in one["ended"] for one in stop_report["processes"])
    assert (stop_report["found"], stop_report["survivors"], stop_report["complete"]) == (5, [], True)
    assert stop_report["began"] <= stop_report["ended"]
    assert (exit_info["signal"], exit_info["by"], exit_info["by_whom"]) == ("SIGKILL", "cancel", "somebody")


def test_stop_with_possible_escape_is_incomplete(supervisor: Supervisor, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with supervisor.call_resumable("leave_a_stranger", str(path)) as call:
        call.line()
        before, _, end = read_end(call)
        assert error_of(end) == "call_died"
        stop_report = before[-1]["stop_report"]
        release(call)
    pid = int(path.read_text())
    if not dead([pid]):
        assert stop_report["complete"] is False
        os.kill(pid, signal.SIGKILL)


@pytest.mark.root
@ROOT
def test_stop_in_cgroup_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with (
        own_cgroup() as group,
        Supervisor(tmp_path / "supervisor", PROCEDURES + OWN, kill_grace=0.3, cgroup=str(group)) as supervisor,
    ):
        with supervisor.call_resumable("leave_a_stranger", str(path)) as call:
            call.line()
            before, _, _ = read_end(call)
            stop_report = before[-1]["stop_report"]
            assert (stop_report["survivors"], stop_report["complete"]) == ([], True)
            pid = int(path.read_text())
            assert dead([pid])
            assert pid in {one["pid"] for one in stop_report["processes"]}
            release(call)
        (tmp_path / "pids").touch()
        stop_report, _, pids = stop_resisting(supervisor, tmp_path / "pids")
        assert dead(pids)
        assert not list(group.glob("call-*"))


@pytest.mark.root
@ROOT
def test_stop_survivors_are_reported_and_watched(tmp_path: Path) -> None:
    """A process in a frozen version 1 cgroup dies only when it is thawed."""
    freezer = Path("/sys/fs/cgroup/freezer")
    if not (freezer / "tasks").exists():
        pytest.skip("there is no freezer of the old kind here")
    frozen = freezer / f"harpd-test-{uuid.uuid4().hex}"
    frozen.mkdir()
    try:
        with Supervisor(tmp_path / "supervisor", PROCEDURES + OWN, kill_grace=0.2) as supervisor:
            with supervisor.call_resumable("wait_for", str(tmp_path / "never")) as call:
                call.line()
                pid = supervisor.wait_event("call started", call=call.id)["pid"]
                (frozen / "tasks").write_text(str(pid))
                (frozen / "freezer.state").write_text("FROZEN")
                call.send({"stop": {"why": "cancelled"}})
                before, exit_info, end = read_end(call)
                stop_report = before[-1]["stop_report"]
                assert [one["pid"] for one in stop_report["survivors"]] == [pid]
                assert (error_of(end), exit_info["exit"], exit_info["signal"]) == ("cancelled", None, None)
                assert supervisor.status()["calls"] == 1
                (frozen / "freezer.state").write_text("THAWED")
                stop_report = call.line()["stop_report"]
                assert (stop_report["survivors"], stop_report["processes"][0]["ended"]) == ([], "SIGKILL")
                assert release(call) == []
            wait_until(lambda: supervisor.status()["calls"] == 0, DEADLINE, "the call gone")
    finally:
        (frozen / "freezer.state").write_text("THAWED")
        wait_until(lambda: not (frozen / "tasks").read_text(), DEADLINE, "an empty cgroup")
        frozen.rmdir()


def test_supervisor_killed_calls_are_adopted_as_dead(tmp_path: Path) -> None:
    (tmp_path / "pids").touch()
    supervisor = Supervisor(tmp_path / "supervisor", PROCEDURES + OWN).start()
    with supervisor.call_resumable("resist", str(tmp_path / "pids")) as call:
        call.line()
        pids = five(tmp_path / "pids")
        supervisor.kill()
    with supervisor:
        assert dead([int(pid) for pid in pids])
        assert supervisor.list_calls() == [call.id]
        with supervisor.attach(call.id, secret="guessed") as other:
            assert refused(other) == "no_such_call"
        with supervisor.attach(call.id, 12) as again:  # for any number, there are no more records
            again.line()
            before, _, end = read_end(again)
            assert (before, error_of(end)) == ([], "call_died")
            release(again)
        assert supervisor.list_calls() == []


def test_supervisor_killed_ended_call_stops_no_process(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    supervisor = Supervisor(tmp_path / "supervisor", PROCEDURES + OWN).start()
    with supervisor.call_resumable("leave_a_service", str(path)) as call:
        call.line()
        assert read_end(call)[2] == {"result": "left"}
        supervisor.kill()
    service = int(path.read_text())
    try:
        with supervisor, supervisor.attach(call.id) as again:
            again.line()
            assert error_of(read_end(again)[2]) == "call_died"
            release(again)
            assert not dead([service])
    finally:
        os.kill(service, signal.SIGKILL)


def test_retire_rejects_calls_and_exits_after_last(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "supervisor", PROCEDURES + OWN).start()
    with supervisor.call_resumable("wait_for", str(tmp_path / "go")) as call:
        call.line()
        assert supervisor.control("retire") == {"ok": True}
        assert supervisor.status()["accepting"] is False
        with supervisor.call_resumable("same", 1) as other:
            assert refused(other) == "wrong_instance"
        (tmp_path / "go").touch()
        assert read_end(call)[2] == {"result": "there"}
        assert supervisor.status()["resumable"] == 1
        assert release(call) == []
    assert supervisor.wait() == 0
    assert not supervisor.logged_bugs()


def test_drain_rejects_calls_until_resume(supervisor: Supervisor) -> None:
    assert supervisor.control("drain") == {"ok": True}
    assert supervisor.closing_line("same", 1)["error"]["type"] == "shutdown"
    with supervisor.call_resumable("same", 1) as call:
        assert refused(call) == "shutdown"
    assert supervisor.control("resume") == {"ok": True}
    assert supervisor.result("same", 1) == 1


def test_lifeline_closed_continues_until_idle(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "supervisor", PROCEDURES + OWN, outlive=True).start()
    with supervisor.call_resumable("wait_for", str(tmp_path / "go")) as call:
        call.line()
        supervisor.close_lifeline()
        closed_at = time.monotonic()
        supervisor.wait_event("launcher exited; resumable calls continue")
        (tmp_path / "go").touch()
        assert read_end(call)[2] == {"result": "there"}
        assert release(call) == []
    assert supervisor.wait() == 0
    assert time.monotonic() - closed_at > 9  # another launcher has 10 s to replace it; it accepts calls until then


def test_shutdown_sends_end_to_attached(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "supervisor", PROCEDURES + OWN).start()
    with supervisor.call_resumable("wait_for", str(tmp_path / "never")) as call:
        call.line()
        with supervisor.connect() as control:
            control.send({"control": "shutdown"})
            before, exit_info, end = read_end(call)
            assert (error_of(end), exit_info["by"]) == ("shutdown", "shutdown")
            assert before[-1]["stop_report"]["survivors"] == []
            assert release(call) == []
            assert control.lines() == [{"ok": True}]
    assert supervisor.wait() == 0


@pytest.mark.root
@ROOT
def test_stop_without_root_sends_report(tmp_path: Path) -> None:
    """As an ordinary user, who may see and signal his own processes: that is sufficient."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        supervisor = Supervisor(Path(place) / "supervisor", PROCEDURES + OWN, kill_grace=0.3)
        supervisor.user = NOBODY
        for path in (supervisor.directory, supervisor.runtime_directory, supervisor.procedures_file):
            os.chown(path, NOBODY, NOBODY)
        pids_file = supervisor.directory / "pids"
        pids_file.touch()
        os.chown(pids_file, NOBODY, NOBODY)
        with supervisor:
            assert psutil.Process(supervisor.status()["supervisor"]).uids().effective == NOBODY
            stop_report, _, pids = stop_resisting(supervisor, pids_file)
        assert dead(pids)
        assert (stop_report["found"], stop_report["survivors"], stop_report["complete"]) == (5, [], True)


def test_start_with_huge_integer_limits_is_accepted(supervisor: Supervisor) -> None:
    limits: dict[str, Any] = dict.fromkeys(("disconnect_timeout", "result_ttl", "timeout", "max_exec_time"), 10**400)
    with supervisor.call_resumable("same", 5, **limits) as call:
        assert call.line()["stream_result"] is False
        assert read_end(call)[-1] == {"result": 5}
        assert release(call) == []
