"""Frontend and supervisor as two programs: each is stopped, killed, restarted or replaced while calls run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd, LineClient, is_dead
from support.procedures_file import BROKEN, CHANGED, PROCEDURES

ACKNOWLEDGED = {"harp": 1, "stream_result": False}


@pytest.fixture
def harpd(tmp_path: Path) -> Iterator[Harpd]:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES, services=True)
    with harpd:
        yield harpd


def version(harpd: Harpd) -> Any:
    return harpd.call("version")[-1]


def records(client: LineClient, most: int | None = None) -> list[Any]:
    """Return the next `count` records, or all records; then the exit info is read, too."""
    found: list[Any] = []
    while most is None or len(found) < most:
        line = client.message()
        if "exit_info" in line:
            break
        if "stream" in line:
            found.append(line["stream"])
    return found


def pid_of(path: Path) -> int:
    return int(wait_until(lambda: path.exists() and path.read_text(), DEADLINE, "the call's process"))


def begin(harpd: Harpd, path: Path) -> tuple[str, int]:
    """Start a resumable call that waits, and detach; return its id and its process."""
    with harpd.start_resumable("pid_then_wait", str(path)) as client:
        client.message()
        return client.call, pid_of(path)


def finish(harpd: Harpd, call: str, path: Path) -> Any:
    """End the call; return its closing line."""
    with harpd.attach(call) as client:
        client.message()
        path.with_name(f"{path.name}.go").touch()
        return client.closing_line()


def run(harpd: Harpd, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(harpd.command(*options), capture_output=True, text=True, timeout=DEADLINE)


def test_stream_survives_sigkill_of_the_frontend(harpd: Harpd, tmp_path: Path) -> None:
    seen: list[int] = []
    client = harpd.start_resumable("count_until", str(tmp_path / "go"))
    for _ in range(3):
        with client:
            client.message()
            seen += records(client, 20)
            harpd.kill()
        harpd.start()
        client = harpd.attach(client.call, len(seen))
    (tmp_path / "go").touch()
    with client:
        client.message()
        seen += records(client)
        assert client.closing_line() == {"result": len(seen)}
    assert seen == list(range(len(seen)))


def test_frontend_stop_ends_connection_bound_calls_only(harpd: Harpd, tmp_path: Path) -> None:
    call, process_of_resumable = begin(harpd, tmp_path / "resumable")
    with harpd.connect() as bound, harpd.attach(call) as attached, harpd.connect() as waiting:
        bound.send(harpd.request("pid_then_wait", [str(tmp_path / "bound")]))
        attached.message()
        assert bound.message() == ACKNOWLEDGED
        process = pid_of(tmp_path / "bound")
        assert harpd.stop_frontend() == 0
        for client in (bound, waiting):
            (last,) = client.lines()
            assert last["error"]["type"] == "shutdown"
        assert attached.lines() == []  # no message: the call continues
        assert is_dead(process)
        assert not is_dead(process_of_resumable)
    harpd.start()
    assert finish(harpd, call, tmp_path / "resumable") == {"result": "seen"}


def test_upgrade_does_not_affect_running_calls(harpd: Harpd, tmp_path: Path) -> None:
    old = harpd.status()["instance"]
    call, process = begin(harpd, tmp_path / "old")
    harpd.procedures_file.write_text(CHANGED)
    assert harpd.reload(launcher=True)["event"] == "reloaded"
    new = harpd.status()["instance"]
    assert {status["instance"]: status["accepting"] for status in harpd.statuses()} == {old: False, new: True}
    assert version(harpd) == {"result": 2}
    with harpd.start_resumable("version", instance=old) as rejected:
        (rejection,) = rejected.lines()
        assert rejection["error"]["type"] == "wrong_instance"
        assert rejection["error"]["data"] == {"instance": new}
    other, _ = begin(harpd, tmp_path / "new")
    calls = harpd.list_calls()
    assert (sorted(calls["calls"]), calls["instance"]) == (sorted((call, other)), new)
    assert not is_dead(process)
    assert finish(harpd, call, tmp_path / "old") == {"result": "seen"}
    wait_until(lambda: len(harpd.statuses()) == 1, DEADLINE, "the end of the older supervisor")
    harpd.wait_event("older supervisor exited", status="exit status 0")
    assert finish(harpd, other, tmp_path / "new") == {"result": "seen"}
    assert not harpd.events("supervisor died")


def test_call_that_an_older_supervisor_adopts_is_not_denied(harpd: Harpd, tmp_path: Path) -> None:
    """Of two older supervisors, the first one has replied that it has no such call. Then the second one dies, which had
    it, and the first one finds its state file before the active one does."""
    calls = {}
    for path in (tmp_path / "one", tmp_path / "two"):
        call, _ = begin(harpd, path)
        calls[harpd.status()["instance"]] = call
        harpd.reload(launcher=True)
    asked_first, victim = sorted(calls)
    active, pids = harpd.supervisor, {status["instance"]: status["supervisor"] for status in harpd.statuses()}
    harpd.stop_frontend()
    harpd.start_frontend()
    changed_at = harpd.runtime_directory.stat().st_mtime
    wait_until(lambda: time.time() - changed_at > 2.5, DEADLINE, "a directory without changes")
    os.kill(pids[victim], signal.SIGSTOP)
    with harpd.attach(calls[victim]) as client:
        sockets = Path("/proc/net/unix")
        is_asked = lambda: sockets.read_text().count(f"/supervisor-{victim}\n") == 2  # noqa: E731 - and the listener
        wait_until(is_asked, DEADLINE, "the request to the supervisor")
        os.kill(active, signal.SIGSTOP)
        os.kill(pids[victim], signal.SIGKILL)
        adopted = lambda: harpd.ask({"control": "status"}, f"supervisor-{asked_first}")["resumable"] == 2  # noqa: E731
        wait_until(adopted, DEADLINE, "the adoption")
        os.kill(active, signal.SIGCONT)
        assert client.closing_line()["error"]["type"] == "call_died"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_calls_survive_sigkill_of_the_launcher(harpd: Harpd, tmp_path: Path, number: signal.Signals) -> None:
    call, process = begin(harpd, tmp_path / "old")
    old = harpd.status()["instance"]
    harpd.stop_launcher(number)
    assert version(harpd) == {"result": 1}  # the supervisor continues
    harpd.start_launcher()
    assert harpd.status()["instance"] != old
    assert len(harpd.statuses()) == 2
    assert not is_dead(process)
    assert finish(harpd, call, tmp_path / "old") == {"result": "seen"}
    wait_until(lambda: len(harpd.statuses()) == 1, DEADLINE, "the end of the older supervisor")


def test_launcher_stop_ends_all_calls(harpd: Harpd, tmp_path: Path) -> None:
    old, first = begin(harpd, tmp_path / "old")
    harpd.reload(launcher=True)
    new, second = begin(harpd, tmp_path / "new")
    with harpd.attach(old) as one, harpd.attach(new) as other:
        for client in (one, other):
            client.message()
        assert harpd.stop_launcher() == 0
        assert [client.lines()[-1]["error"]["type"] for client in (one, other)] == ["shutdown", "shutdown"]
    assert is_dead(first)
    assert is_dead(second)
    assert harpd.statuses() == []
    assert not list(harpd.runtime_directory.glob("supervisor*"))
    harpd.start_launcher()
    assert version(harpd) == {"result": 1}


def test_broken_procedures_file_replaces_no_supervisor(harpd: Harpd, tmp_path: Path) -> None:
    before = harpd.status()["supervisor"]
    harpd.procedures_file.write_text(BROKEN)
    assert harpd.reload(launcher=True)["event"] == "reload failed; nothing is changed"
    assert harpd.reload()["event"] == "reload failed; nothing is changed"
    assert harpd.status()["supervisor"] == before
    assert version(harpd) == {"result": 1}
    harpd.procedures_file.write_text(CHANGED)
    assert harpd.reload(launcher=True)["event"] == "reloaded"
    assert version(harpd) == {"result": 2}
    assert harpd.status()["supervisor"] != before


def test_frontend_reload_reaches_the_supervisor(harpd: Harpd) -> None:
    before = harpd.status()["supervisor"]
    harpd.procedures_file.write_text(CHANGED)
    harpd.configure({"limits": {"kill_grace": 7}})
    assert harpd.reload()["event"] == "reloaded"
    assert version(harpd) == {"result": 2}
    assert harpd.status()["supervisor"] == before
    with harpd.start_resumable("version") as client:
        assert client.message()["call"]["kill_grace"] == 7
        client.closing_line()


def test_dead_supervisor_is_replaced_with_current_settings(harpd: Harpd) -> None:
    harpd.configure({"limits": {"kill_grace": 7}})
    harpd.reload()
    subprocess.run(["kill", "-9", str(harpd.supervisor)], check=True)
    harpd.wait_event("supervisor died", status="signal 9")
    assert version(harpd) == {"result": 1}
    with harpd.start_resumable("version") as client:
        assert client.message()["call"]["kill_grace"] == 7
        client.closing_line()


def test_frontend_without_supervisor_waits_then_replies_error(harpd: Harpd) -> None:
    harpd.stop_launcher()
    (rejection,) = harpd.call("version")
    assert rejection["error"]["type"] == "procedure_loading_error"
    with harpd.connect() as client:
        client.send(harpd.request("version", []))
        harpd.start_launcher()
        reply = client.lines()
    if reply == [rejection]:  # this machine needs longer for the start than the frontend waits
        reply = harpd.call("version")
    assert reply == [ACKNOWLEDGED, {"result": 1}]


def test_status_drain_and_resume_commands(harpd: Harpd, tmp_path: Path) -> None:
    call, _ = begin(harpd, tmp_path / "call")
    harpd.reload(launcher=True)
    outcome = run(harpd, "status")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    supervisors = {status["accepting"]: status for status in map(json.loads, outcome.stdout.splitlines())}
    assert supervisors[True]["instance"] == harpd.status()["instance"]
    assert (supervisors[False]["calls"], supervisors[False]["resumable"]) == (1, 1)

    outcome = run(harpd, "drain", "--timeout", "0.1")
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (1, "", "")
    with harpd.start_resumable("version") as rejected:
        (rejection,) = rejected.lines()
        assert rejection["error"]["type"] == "shutdown"
    assert version(harpd)["error"]["type"] == "shutdown"
    draining = subprocess.Popen(harpd.command("drain"), stderr=subprocess.PIPE)
    assert finish(harpd, call, tmp_path / "call") == {"result": "seen"}
    _, output = draining.communicate(timeout=DEADLINE)
    assert (draining.returncode, output) == (0, b"")

    assert run(harpd, "resume").returncode == 0
    assert version(harpd) == {"result": 1}


def test_drain_does_not_end_while_the_socket_of_a_supervisor_is_missing(harpd: Harpd, tmp_path: Path) -> None:
    call, _ = begin(harpd, tmp_path / "call")
    draining = subprocess.Popen(harpd.command("drain"), stderr=subprocess.PIPE)
    harpd.wait_event("rejecting new calls")
    for path in harpd.runtime_directory.glob("supervisor*"):
        path.unlink()
    harpd.wait_event("runtime directory was cleaned; files created again")
    with pytest.raises(subprocess.TimeoutExpired):
        draining.wait(1)
    assert finish(harpd, call, tmp_path / "call") == {"result": "seen"}
    _, output = draining.communicate(timeout=DEADLINE)
    assert (draining.returncode, output) == (0, b"")


def test_drain_continues_in_the_successor_of_a_supervisor_that_died(harpd: Harpd, tmp_path: Path) -> None:
    """It rejects new calls, too, and has the end of a call that a dispatcher has to fetch."""
    call, _ = begin(harpd, tmp_path / "call")
    draining = subprocess.Popen(harpd.command("drain"), stderr=subprocess.PIPE)
    harpd.wait_event("rejecting new calls")
    os.kill(harpd.supervisor, signal.SIGKILL)
    harpd.wait_events(2, "rejecting new calls")
    assert version(harpd)["error"]["type"] == "shutdown"
    assert draining.poll() is None
    with harpd.attach(call) as client:
        assert client.closing_line()["error"]["type"] == "call_died"
        client.send({"release": True})
    _, output = draining.communicate(timeout=DEADLINE)
    assert (draining.returncode, output) == (0, b"")


def test_resume_reaches_the_active_supervisor_when_its_socket_is_missing(harpd: Harpd, tmp_path: Path) -> None:
    """An older supervisor has created its socket again before, and has replied."""
    call, _ = begin(harpd, tmp_path / "call")
    harpd.reload(launcher=True)
    active = harpd.supervisor
    assert run(harpd, "drain", "--timeout", "0.1").returncode == 1
    os.kill(active, signal.SIGSTOP)
    for path in harpd.runtime_directory.glob("supervisor*"):
        path.unlink()
    harpd.wait_event("runtime directory was cleaned; files created again")
    resuming = subprocess.Popen(harpd.command("resume"), stderr=subprocess.PIPE)
    harpd.wait_event("accepting new calls again")
    os.kill(active, signal.SIGCONT)
    _, output = resuming.communicate(timeout=DEADLINE)
    assert (resuming.returncode, output) == (0, b"")
    assert version(harpd) == {"result": 1}
    assert finish(harpd, call, tmp_path / "call") == {"result": "seen"}


def test_commands_without_supervisor_report_it(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES)
    outcome = run(harpd, "status")
    assert outcome.returncode == 1
    assert "runtime_directory: " in outcome.stderr
    harpd.runtime_directory.mkdir()
    for command in ("status", "drain", "resume"):
        outcome = run(harpd, command)
        assert (outcome.returncode, outcome.stdout, outcome.stderr) == (1, "", "harpd: the supervisor does not run\n")


@pytest.mark.parametrize("command", ["frontend", "supervisor", "status", "drain", "resume"])
def test_commands_without_runtime_directory_report_it(tmp_path: Path, command: str) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES).without_runtime_directory()
    outcome = run(harpd, command)
    assert outcome.returncode == 1
    (line,) = outcome.stderr.splitlines()
    hint = "frontend and supervisor find each other by it, and XDG_RUNTIME_DIR is not set"
    assert line.endswith(f"harpd.conf: runtime_directory: missing; {hint}")


@pytest.mark.parametrize("command", ["frontend", "supervisor", None])
def test_second_program_with_the_same_role_is_rejected(harpd: Harpd, command: str | None) -> None:
    outcome = run(harpd, *([command] if command else []))
    assert outcome.returncode == 1
    assert "used by another running harpd" in outcome.stderr
    assert version(harpd) == {"result": 1}


def test_calls_survive_sigkill_of_the_single_program(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES)
    harpd.start()
    call, process = begin(harpd, tmp_path / "call")
    harpd.kill()
    assert not is_dead(process)
    with harpd:
        assert len(harpd.statuses()) == 2
        assert finish(harpd, call, tmp_path / "call") == {"result": "seen"}
        wait_until(lambda: len(harpd.statuses()) == 1, DEADLINE, "the end of the older supervisor")


def test_temporary_runtime_directory_ends_calls_with_harpd(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES).without_runtime_directory()
    harpd.start()
    with harpd.connect() as client:
        client.send(harpd.request("pid_then_wait", [str(tmp_path / "call")]))
        process = pid_of(tmp_path / "call")
        harpd.kill()
        wait_until(lambda: is_dead(process), DEADLINE, "the call's death")


def test_timeout_option_is_rejected_outside_drain(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES)
    assert run(harpd, "status", "--timeout", "1").returncode == 2
    assert run(harpd, "drain", "--timeout", "x").returncode == 2
    assert run(harpd, "drain", "--timeout", "-1").returncode == 2
    assert run(harpd, "nonsense").returncode == 2
