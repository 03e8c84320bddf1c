"""Calls in cgroups: limits of a call as a whole, its stop, and what it leaves.

The tests with `delegated_cgroup` need a kernel that gives its controllers to cgroups of version 2.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cgroups import delegated_cgroup, own_cgroup
from support.deadline import wait_until
from support.harpd import Harpd
from support.supervisor import DEADLINE, Channel, Supervisor

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

PROCEDURES = """
import os, subprocess, sys, time
from harpd.proc import procedure

MIB = 1 << 20

@procedure(memory=128 * MIB)
def allocate(processes, mib):
    pids = []
    for _ in range(processes):
        if (pid := os.fork()) == 0:
            data = bytearray(mib * MIB)
            data[::4096] = bytes([1]) * len(data[::4096])
            time.sleep(3600 if processes > 1 else 0)
            os._exit(0)
        pids.append(pid)
    return [os.waitpid(pid, 0)[1] for pid in pids]

@procedure(processes=10)
def fork(count):
    pids = []
    try:
        for _ in range(count):
            if (pid := os.fork()) == 0:
                time.sleep(3600)
                os._exit(0)
            pids.append(pid)
        return len(pids)
    except OSError as error:
        return [len(pids), error.errno]
    finally:
        for pid in pids:
            os.kill(pid, 9)
            os.waitpid(pid, 0)

@procedure(processes=40)
def bomb():
    while True:
        try:
            os.fork()
        except OSError:
            pass

@procedure
def leave(path):
    code = "import os, sys, time\\nwhile os.path.exists(sys.argv[1]): time.sleep(0.01)"
    return subprocess.Popen([sys.executable, "-S", "-c", code, path], start_new_session=True).pid

@procedure
def quick():
    return "done"
"""


class ServiceHarpd(Harpd):
    """A harpd whose supervisor systemd has started with ``Delegate=yes`` and ``DelegateSubgroup=supervisor``."""

    cgroup = Path()

    def command(self, *options: str) -> list[str]:
        command = super().command(*options)
        if options[:1] != ("supervisor",):
            return command
        return ["sh", "-c", f'echo $$ > {self.cgroup}/supervisor/cgroup.procs && exec "$@"', "sh", *command]


@pytest.fixture
def cgroup() -> Iterator[Path]:
    with delegated_cgroup() as place:
        yield place


@pytest.fixture
def supervisor(cgroup: Path, tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(tmp_path / "supervisor", PROCEDURES, kill_grace=0.3, cgroup=str(cgroup)) as running:
        yield running


def end_of(call: Channel) -> tuple[dict[str, Any], Any]:
    """Return exit info and closing line of a call, and release it."""
    while "exit_info" not in (line := call.line()):
        pass
    end = call.line()
    call.send({"release": True})
    call.lines()
    return line["exit_info"], end


def test_service_limits_a_call_as_a_whole(cgroup: Path, tmp_path: Path) -> None:
    harpd = ServiceHarpd(tmp_path / "harpd", PROCEDURES, services=True)
    harpd.cgroup = cgroup
    with harpd:
        assert harpd.call("fork", 20)[-1] == {"result": [9, 11]}, "RLIMIT_NPROC does not restrict root"
        assert harpd.call("fork", 9)[-1] == {"result": 9}
        assert harpd.events("cannot limit calls as a whole") == []


def test_memory_of_all_processes_is_limited(supervisor: Supervisor, cgroup: Path) -> None:
    with supervisor.call_resumable("allocate", 1, 40) as call:
        assert end_of(call)[1] == {"result": [0]}
    with supervisor.call_resumable("allocate", 4, 40) as call:
        exit_info, end = end_of(call)
        assert (exit_info["signal"], exit_info["by"]) == ("SIGKILL", "out_of_memory")
        message = "the call's process was ended by SIGKILL: it is out of memory"
        assert (end["error"]["type"], end["error"]["message"]) == ("call_died", message)
    wait_until(lambda: not list(cgroup.glob("call-*")), DEADLINE, "the end of all processes")
    assert supervisor.result("quick") == "done"


def test_limited_memory_has_no_swap(supervisor: Supervisor, cgroup: Path) -> None:
    with supervisor.call_resumable("allocate", 2, 20) as call:
        call.line()
        group = wait_until(lambda: list(cgroup.glob("call-*")), DEADLINE, "the cgroup")[0]
        wait_until(lambda: (group / "memory.max").read_text() == f"{128 << 20}\n", DEADLINE, "its limit")
        if not (group / "memory.swap.max").exists():
            pytest.skip("this kernel has no swap")
        assert (group / "memory.swap.max").read_text() == "0\n"
        call.send({"stop": {"why": "cancelled"}})
        end_of(call)


def test_fork_bomb_leaves_time_to_others_and_is_stopped(supervisor: Supervisor, cgroup: Path) -> None:
    with supervisor.call_resumable("bomb") as call:
        call.line()
        group = cgroup / f"call-{call.id}"
        wait_until(lambda: "max 0" not in (group / "pids.events").read_text(), DEADLINE, "the limit")
        assert "cpu" in (cgroup / "cgroup.subtree_control").read_text(), "all calls get equal shares"
        assert supervisor.result("quick") == "done"
        call.send({"stop": {"why": "cancelled"}})
        lines = []
        while "exit_info" not in (line := call.line()):
            lines.append(line)
        report = lines[-1]["stop_report"]
        assert (report["survivors"], report["complete"]) == ([], True)
        call.line()
        call.send({"release": True})
        call.lines()
    wait_until(lambda: not group.exists(), DEADLINE, "no cgroup")


def test_killed_supervisor_leaves_no_cgroup(cgroup: Path, tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "supervisor", PROCEDURES, kill_grace=0.3, cgroup=str(cgroup)).start()
    with supervisor.call_resumable("bomb") as call:
        call.line()
        group = cgroup / f"call-{call.id}"
        wait_until(lambda: "max 0" not in (group / "pids.events").read_text(), DEADLINE, "the limit")
        supervisor.kill()
    with supervisor:
        wait_until(lambda: not group.exists(), DEADLINE, "no cgroup")
        with supervisor.attach(call.id) as later:
            assert end_of(later)[1]["error"]["type"] == "call_died"


def test_limit_that_cannot_be_set_is_logged_once(tmp_path: Path) -> None:
    with own_cgroup() as place:
        with Supervisor(tmp_path / "supervisor", PROCEDURES, cgroup=str(place)) as supervisor:
            (place / "inside").mkdir()
            own = f"{place}/cgroup.procs"
            Path(own).write_text(str(supervisor.status()["supervisor"]))  # a cgroup with processes limits none below
            for _ in range(2):
                assert supervisor.result("fork", 9) == 9
            [event] = supervisor.wait_events(1, "cannot limit calls as a whole")
            assert (event["controller"], event["directory"]) == ("pids", str(place))
            Path(f"{place.parent}/cgroup.procs").write_text(str(supervisor.status()["supervisor"]))


def test_cgroup_of_a_left_process_is_removed_later(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    with own_cgroup() as place:
        with Supervisor(tmp_path / "supervisor", PROCEDURES, cgroup=str(place)) as supervisor:
            supervisor.result("leave", str(flag))
            assert supervisor.result("quick") == "done"
            [group] = place.glob("call-*")
            flag.unlink()
            wait_until(lambda: not (group / "cgroup.procs").read_text(), DEADLINE, "the end of the process")
            assert supervisor.result("quick") == "done"
            assert not group.exists()


def test_next_supervisor_removes_old_cgroups(tmp_path: Path) -> None:
    with own_cgroup() as place:
        old, new, other = place / "call-old", place / "call-new", place / "other"
        for group in (old, new, other):
            group.mkdir()
        for group in (old, other):
            os.utime(group, (time.time() - 100,) * 2)
        with Supervisor(tmp_path / "supervisor", PROCEDURES, cgroup=str(place)) as supervisor:
            supervisor.status()
            assert [group.exists() for group in (old, new, other)] == [False, True, True]
