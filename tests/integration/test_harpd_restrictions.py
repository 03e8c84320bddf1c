"""What a procedure restricts for its calls: resources, umask, working directory, variables, privileges."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harpd.processes.cgroup import CallCgroups, Cgroup
from support.calls import error, result
from support.harpd import Harpd

PROCEDURES = """
import os, resource, subprocess, sys
from harpd.proc import procedure

MIB = 1 << 20

@procedure(memory=256 * MIB)
def allocate(mib, in_child):
    if not in_child:
        return len(bytearray(mib * MIB)) // MIB
    code = f"print(len(bytearray({mib} * {MIB})) // {MIB})"
    return subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True).stdout.strip()

@procedure(files=32)
def open_files():
    opened = []
    try:
        while True:
            opened.append(open("/dev/null"))
    except OSError as error:
        return [len(opened), error.errno]

@procedure(uid=54322, processes=8)
def fork():
    pids = []
    try:
        while len(pids) < 50:
            pid = os.fork()
            if pid == 0:
                os.read(0, 1)
                import time
                time.sleep(60)
                os._exit(0)
            pids.append(pid)
    except OSError as error:
        return [len(pids), error.errno]
    finally:
        for pid in pids:
            os.kill(pid, 9)
            os.waitpid(pid, 0)

@procedure(umask=0o077, cwd="/usr", environment={"SITE": "blog", "HOME": "/nowhere"}, max_calls_per_process=100)
def surroundings():
    mask = os.umask(0)
    os.umask(mask)
    in_child = subprocess.run(["sh", "-c", "echo $SITE; echo $HOME"], capture_output=True, text=True).stdout.split()
    return [mask, os.getcwd(), os.environ["SITE"], in_child, os.getpid()]

def privileges():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("NoNewPrivs"))

with_privileges = procedure(privileges)
without_privileges = procedure(no_new_privs=True)(privileges)
without_privileges_as_nobody = procedure(no_new_privs=True, uid="nobody")(privileges)

@procedure(cwd="/nonexistent/directory")
def nowhere():
    return "ran"

@procedure
def unrestricted():
    mask = os.umask(0)
    os.umask(mask)
    return [mask, os.getcwd(), "SITE" in os.environ, len(bytearray(300 * MIB)) // MIB]
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


@pytest.fixture(scope="module")
def harpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    with Harpd(tmp_path_factory.mktemp("harpd"), PROCEDURES) as running:
        yield running


def test_memory_of_each_process_is_limited(harpd: Harpd) -> None:
    assert result(harpd, "allocate", 20, False) == 20
    assert result(harpd, "allocate", 20, True) == "20"
    *_, last = harpd.call("allocate", 300, False)
    assert last["exception"]["type"] == "MemoryError"
    assert result(harpd, "allocate", 300, True) == "", "the child fails, too"


def test_open_files_are_limited(harpd: Harpd) -> None:
    count, number = result(harpd, "open_files")
    assert (0 < count < 32, number) == (True, 24)


@pytest.mark.root
@needs_root
def test_processes_of_the_user_are_limited(harpd: Harpd) -> None:
    count, number = result(harpd, "fork")
    assert (0 < count <= 8, number) == (True, 11)


def test_umask_directory_and_variables_are_set(harpd: Harpd) -> None:
    first, second = result(harpd, "surroundings"), result(harpd, "surroundings")
    assert first == second, "also for a later call of the process"
    assert first[:-1] == [0o077, "/usr", "blog", ["blog", "/nowhere"]]
    assert result(harpd, "unrestricted") == [0o022, "/", False, 300]


@pytest.mark.root
@needs_root
def test_programs_gain_no_privileges(harpd: Harpd) -> None:
    assert result(harpd, "with_privileges") == 0
    assert result(harpd, "without_privileges") == result(harpd, "without_privileges_as_nobody") == 1


def test_restriction_that_fails_is_system_error(harpd: Harpd) -> None:
    failed = error(harpd, "nowhere")
    assert (failed["type"], "cwd /nonexistent/directory" in failed["message"]) == ("system_error", True)


@pytest.mark.parametrize(
    "option",
    [
        "memory=1000",
        "memory='1 GiB'",
        "memory=True",
        "processes=0",
        "files=3",
        "umask=0o1000",
        "umask='077'",
        "cwd='relative'",
        "cwd=7",
        "no_new_privs=1",
        "environment={'A=B': 'x'}",
        "environment={'HARPD_CALL': 'x'}",
        "environment={'A': 7}",
        "environment=['A']",
    ],
)
def test_invalid_option_is_error(tmp_path: Path, option: str) -> None:
    file = tmp_path / "procedures.py"
    file.write_text(f"from harpd.proc import procedure\n@procedure({option})\ndef one(): pass\n")
    code = "import sys; from harpd.worker.procedures import load_procedures; load_procedures(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, f"{option.partition('=')[0]}: expected" in done.stderr) == (1, True), done.stderr


@pytest.mark.root
@needs_root
def test_check_warns_of_processes_of_root(tmp_path: Path) -> None:
    text = "from harpd.proc import procedure\n@procedure(processes=9{})\ndef one(): pass\n"
    harpd = Harpd(tmp_path / "harpd", text.format(""))
    for option, warned in (("", True), (", uid='nobody'", False)):
        harpd.procedures_file.write_text(text.format(option))
        done = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
        assert (done.returncode, "one: processes restricts no call" in done.stderr) == (0, warned), done.stderr


def test_cgroup_limits_are_written_where_the_kernel_has_them(tmp_path: Path) -> None:
    group = tmp_path / "call-1"
    group.mkdir()
    for file in (group / "memory.max", group / "memory.oom.group", tmp_path / "cgroup.subtree_control"):
        file.touch()
    CallCgroups(str(tmp_path)).limit(Cgroup(str(group)), memory=1 << 30, processes=10)
    assert (group / "memory.max").read_text() == str(1 << 30)
    assert (group / "memory.oom.group").read_text() == "1"
    assert not (group / "pids.max").exists(), "without its controller"
