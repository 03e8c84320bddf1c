"""Calls with user ids of their own: they cannot reach each other, and an id is free when its last process has ended."""

from __future__ import annotations

import ctypes
import errno
import grp
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from harpd.processes.ipc import remove_ipc
from harpd.supervisor.dynamic_uids import DynamicUids, NoFreeUid
from support.deadline import wait_until
from support.harpd import Harpd
from support.supervisor import DEADLINE, PLAIN, Channel, Supervisor, is_running

FIRST = 254321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")

PROCEDURES = """
import os, shutil, subprocess, time
from harpd.proc import procedure, streaming_procedure

@streaming_procedure(uid="dynamic")
def stay():
    yield {"uid": os.getresuid(), "gid": os.getresgid(), "groups": os.getgroups(), "pid": os.getpid()}
    time.sleep(600)

@procedure(uid="dynamic")
def reach(pid):
    refused = []
    for attempt in (lambda: os.kill(pid, 0), lambda: open(f"/proc/{pid}/mem", "rb"),
                    lambda: open(f"/proc/{pid}/environ", "rb").read(), lambda: os.listdir(f"/proc/{pid}/fd")):
        try:
            attempt()
        except PermissionError:
            refused.append(True)
        else:
            refused.append(False)
    return [os.getuid(), refused]

@procedure(uid="dynamic", gid=["nogroup"])
def ids():
    import resource
    return [os.getuid(), os.getgid(), os.environ["HOME"], "USER" in os.environ, resource.getrlimit(4)]

@procedure(uid="dynamic")
def plant(path):
    shutil.copyfile("/usr/bin/id", path)
    file = os.open(path, os.O_RDONLY)
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    name, make = os.path.basename(path), os.O_WRONLY | os.O_CREAT
    attempts = [
        lambda: os.chmod(path, 0o4755),
        lambda: os.chmod(path, 0o2755),
        lambda: os.chmod(name, 0o4755, dir_fd=directory),
        lambda: os.fchmod(file, 0o6755),
        lambda: os.open(path + "1", make, 0o4755),
        lambda: os.open("2", make, 0o2755, dir_fd=directory),
        lambda: os.open(os.path.dirname(path), os.O_TMPFILE | os.O_WRONLY, 0o4755),
        lambda: os.mknod(path + "3", 0o104755),
        lambda: subprocess.run(["chmod", "u+s", path], check=True, stderr=subprocess.DEVNULL),
    ]
    refused = 0
    for attempt in attempts:
        try:
            attempt()
        except (PermissionError, subprocess.CalledProcessError):
            refused += 1
    os.chmod(path, 0o1755)
    os.close(os.open(path + "4", make, 0o755))
    os.close(os.open(path, os.O_RDONLY, 0o7777))
    return [os.getuid(), refused == len(attempts), os.stat(path).st_mode & 0o7777]

@procedure(uid="dynamic")
def share(name):
    import ctypes
    libc = ctypes.CDLL(None)
    made = [libc.shmget(0, 4096, 0o1600), libc.msgget(0, 0o1600), libc.semget(0, 1, 0o1600)]
    open("/dev/shm/" + name, "w").close()
    return [os.getuid(), made]

def keep(ring, name):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 248, "aarch64": 217}[os.uname().machine]
    if libc.syscall(number, b"user", name, b"secret", 6, ctypes.c_int(ring)) < 0:
        return ctypes.get_errno()
    return "kept"

def find(name):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
    found = [libc.syscall(number, 10, ctypes.c_int(ring), b"user", name, 0) for ring in (-3, -4, -5)]
    return max(found) > 0

@procedure(uid="nobody")
def keep_key_in_session():
    return [keep(-3, b"harpd-test"), find(b"harpd-test")]

@procedure(uid=64399)
def find_key():
    return find(b"harpd-test")

@procedure(uid="dynamic")
def keep_keys():
    return [os.getuid(), [keep(ring, b"harpd-test") for ring in (-3, -4, -5)], find(b"harpd-test")]

@procedure(uid="dynamic")
def open_queue():
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mq_open(b"/harpd-test", os.O_RDWR | os.O_CREAT, 0o600, None) < 0:
        return [os.getuid(), ctypes.get_errno()]
    return [os.getuid(), "opened"]

@procedure(uid="dynamic")
def execute(path):
    return [os.getuid(), int(subprocess.run([path, "-u"], capture_output=True, check=True).stdout)]

@procedure(uid="dynamic")
def leave():
    null = subprocess.DEVNULL
    child = subprocess.Popen(["sleep", "600"], stdin=null, stdout=null, stderr=null, start_new_session=True)
    return [os.getuid(), child.pid]
"""
pytestmark = pytest.mark.root


def supervisor(directory: Path, ids: int) -> Supervisor:
    return Supervisor(directory / "supervisor", PROCEDURES, kill_grace=0.3, dynamic_uids=[FIRST, FIRST + ids - 1])


def stay(running: Supervisor, closing: ExitStack) -> tuple[Channel, dict[str, Any]]:
    """Start a call that stays; return its channel, and what it says of itself."""
    call = closing.enter_context(running.call("stay"))
    call.line()
    return call, call.line()["stream"]


@needs_root
def test_calls_of_one_procedure_cannot_reach_each_other(tmp_path: Path) -> None:
    with supervisor(tmp_path, 10) as running, ExitStack() as closing:
        _, one = stay(running, closing)
        _, other = stay(running, closing)
        assert one["uid"][0] != other["uid"][0]
        for found in (one, other):
            uid = found["uid"][0]
            assert FIRST <= uid < FIRST + 10
            assert (found["uid"], found["gid"], found["groups"]) == ([uid] * 3, [uid] * 3, [uid])
            reaching, refused = running.result("reach", found["pid"])
            assert reaching != uid
            assert refused == [True] * 4
        uid, gid, home, has_user, core = running.result("ids")
        assert (gid, home, has_user, core) == (65534, "/", False, [1, 1])


@needs_root
def test_call_does_not_become_another_user_by_setuid_program(tmp_path: Path) -> None:
    with supervisor(tmp_path, 2) as running, tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o777)
        planted = Path(shared, "id")
        shutil.copyfile("/usr/bin/id", planted)  # as a call on an older harpd could
        os.chown(planted, FIRST + 1, FIRST + 1)
        planted.chmod(0o6755)
        uid, effective = running.result("execute", str(planted))
        assert uid == FIRST
        assert effective == uid


@needs_root
def test_call_with_dynamic_uid_makes_no_setuid_program(tmp_path: Path) -> None:
    with supervisor(tmp_path, 1) as running, tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o777)
        assert running.result("plant", f"{shared}/id") == [FIRST, True, 0o1755]
        assert [file.name for file in Path(shared).rglob("*") if file.stat().st_mode & 0o6000] == []


@needs_root
def test_shared_memory_and_queues_of_a_call_are_removed(tmp_path: Path) -> None:
    name = f"harpd-test-{os.getpid()}"
    with supervisor(tmp_path, 1) as running:
        uid, made = running.result("share", name)
        assert (uid, min(made) >= 0) == (FIRST, True)
        assert running.result("ids")[0] == FIRST, "the only id is free again"
        assert not Path(f"/dev/shm/{name}").exists()
        for kind, number in zip(("shm", "msg", "sem"), made, strict=True):
            rows = [line.split() for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]]
            assert str(number) not in {row[1] for row in rows}, kind


@needs_root
def test_calls_of_different_users_share_no_session_keyring(tmp_path: Path) -> None:
    """A service of systemd has such a keyring, and so have all of its processes."""
    number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
    if ctypes.CDLL(None).syscall(number, 1, 0) < 0:
        pytest.skip("keyrings are refused here")
    with supervisor(tmp_path, 1) as running:
        assert running.result("keep_key_in_session") == ["kept", True]
        assert running.result("find_key") is False


@needs_root
def test_call_with_dynamic_uid_leaves_no_key_and_no_queue(tmp_path: Path) -> None:
    """The kernel keeps both for a user without processes, and they have no name in a file system that must exist."""
    with supervisor(tmp_path, 1) as running:
        uid, kept, is_found = running.result("keep_keys")
        assert (uid, kept, is_found) == (FIRST, [errno.ENOSYS] * 3, False)
        assert running.result("open_queue") == [FIRST, errno.ENOSYS]


@needs_root
def test_id_that_an_account_has_is_given_to_no_call(tmp_path: Path) -> None:
    """It was added after the start of harpd, or `harpd --test` could not list it. A group counts, too."""
    used = {0, *(process.uids().real for process in psutil.process_iter())}
    uids = {entry.pw_uid: f"user {entry.pw_name}" for entry in pwd.getpwall() if entry.pw_uid not in used}
    gids = {entry.gr_gid: f"group {entry.gr_name}" for entry in grp.getgrall() if entry.gr_gid not in {*used, *uids}}
    for ids in (uids, gids):
        number, name = next(iter(ids.items()))
        directory = tmp_path / str(number)
        with Supervisor(directory, PROCEDURES, dynamic_uids=[number, number]) as running:
            error = running.closing_line("ids")["error"]
        assert error["type"] == "system_error"
        assert f"id {number} of dynamic_uids is that of {name}" in error["message"]


@needs_root
def test_many_objects_of_a_call_are_removed_in_steps() -> None:
    uid = FIRST + 7777
    names = [Path(f"/dev/shm/harpd-test-{os.getpid()}-{number}") for number in range(1200)]
    for name in names:
        name.touch()
        os.chown(name, uid, uid)
    assert remove_ipc(uid) is False
    assert 0 < sum(name.exists() for name in names) < len(names)
    assert remove_ipc(uid) is True
    assert not any(name.exists() for name in names)


@needs_root
def test_uid_is_free_after_its_call(tmp_path: Path) -> None:
    with supervisor(tmp_path, 2) as running:
        with ExitStack() as closing:
            calls = [stay(running, closing) for _ in range(2)]
            refused = running.closing_line("ids")["error"]
            assert (refused["type"], "dynamic_uids" in refused["message"]) == ("too_many_calls", True)
            for call, _ in calls:
                call.stop()
        found = {running.result("ids")[0] for _ in range(6)}
        assert found == {FIRST, FIRST + 1}, "one after the other"


@needs_root
def test_uid_stays_in_use_while_a_process_has_it(tmp_path: Path) -> None:
    with supervisor(tmp_path, 1) as running:
        uid, pid = running.result("leave")
        assert uid == FIRST
        left = psutil.Process(pid)
        try:
            assert running.closing_line("ids")["error"]["type"] == "too_many_calls"
            assert is_running(left)
        finally:
            left.kill()
        wait_until(lambda: not is_running(left), DEADLINE, "its end")
        wait_until(lambda: "result" in running.closing_line("ids"), DEADLINE, "the id")


@needs_root
def test_uid_is_not_reused_while_processes_have_it(tmp_path: Path) -> None:
    running = supervisor(tmp_path, 1)
    with running:
        _, pid = running.result("leave")
        running.kill()
        running.start()
        left = psutil.Process(pid)
        try:
            assert is_running(left), "a service of an ended call"
            assert running.closing_line("ids")["error"]["type"] == "too_many_calls"
        finally:
            left.kill()
        wait_until(lambda: "result" in running.closing_line("ids"), DEADLINE, "the id")


@needs_root
def test_call_with_dynamic_uid_is_stopped_with_all_its_processes(tmp_path: Path) -> None:
    with supervisor(tmp_path, 1) as running:
        with running.call("stay") as call:
            assert call.line() == {**PLAIN, "stream_result": True}
            process = psutil.Process(call.line()["stream"]["pid"])
            call.stop()
            assert not is_running(process)
        assert running.result("ids")[0] == FIRST


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_two_supervisors_never_give_out_the_same_uid(directory: Path) -> None:
    """The call of the other one may not have taken its id yet, so that no process shows it."""
    ours, (reading, writing) = DynamicUids(directory), os.pipe()
    child = os.fork()
    if child == 0:
        theirs = DynamicUids(directory)
        os.write(writing, b",".join(b"%d" % theirs.allocate(FIRST, FIRST + 3) for _ in range(2)))
        signal.pause()
    try:
        taken = {int(uid) for uid in os.read(reading, 100).split(b",")}
        assert taken == {FIRST, FIRST + 1}
        assert {ours.allocate(FIRST, FIRST + 3) for _ in range(2)} == {FIRST + 2, FIRST + 3}
        with pytest.raises(NoFreeUid):
            ours.allocate(FIRST, FIRST + 3)
        ours.release(FIRST + 2)
        assert ours.allocate(FIRST, FIRST + 3) == FIRST + 2
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    assert ours.allocate(FIRST, FIRST + 3) in taken
    ours.close()


@pytest.mark.parametrize("text", ["200000", "10-20", "5-4", "200000-900000", "200000-2147483648", "a-b", "-5-7"])
def test_invalid_range_is_error(tmp_path: Path, text: str) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES, {"dynamic_uids": text})
    done = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
    assert (done.returncode, "dynamic_uids: expected a range" in done.stderr) == (1, True), done.stderr


def test_range_with_an_account_is_error(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody").pw_uid
    harpd = Harpd(tmp_path / "harpd", PROCEDURES, {"dynamic_uids": f"{nobody - 5}-{nobody}"})
    done = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
    assert (done.returncode, "has an id of this range" in done.stderr) == (1, True), done.stderr


def test_missing_range_is_error_of_check_and_reload(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", "from harpd.proc import procedure\n") as harpd:
        harpd.procedures_file.write_text(PROCEDURES)
        done = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
        assert (done.returncode, "dynamic_uids: missing" in done.stderr) == (1, True), done.stderr
        outcome = harpd.reload()
        assert (outcome["event"], "dynamic_uids" in outcome["reason"]) == ("reload failed; nothing is changed", True)
        harpd.configure({"dynamic_uids": f"{FIRST}-{FIRST + 9}"})
        assert harpd.reload()["event"] == "reloaded"


def test_dynamic_uid_with_many_calls_per_process_is_error(tmp_path: Path) -> None:
    text = PROCEDURES.replace('@procedure(uid="dynamic")', '@procedure(uid="dynamic", max_calls_per_process=2)')
    harpd = Harpd(tmp_path / "harpd", text, {"dynamic_uids": f"{FIRST}-{FIRST + 9}"})
    done = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
    assert (done.returncode, "max_calls_per_process: expected 1" in done.stderr) == (1, True), done.stderr
