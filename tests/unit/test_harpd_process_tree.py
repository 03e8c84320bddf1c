"""The processes of a call, complete snapshots, signals by identity; the event loop's timers; output pipes."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harpd.processes.cgroup import Cgroup
from harpd.processes.cookie import cookie_for
from harpd.processes.process_tree import (
    STEP_PROCESSES,
    CallTree,
    Process,
    Scan,
    Snapshot,
    kill_group,
    send_signal,
    start_time,
    take_snapshot,
)
from harpd.supervisor.event_loop import EventLoop, Timer
from harpd.supervisor.output_limit import OutputLimit
from harpd.supervisor.worker_process import OutputCollector, OutputPipe
from support.deadline import wait_until
from support.hopper import group_lives, hopping, is_hopper

#: A tree whose main process is 100; no process of this system has this start time and environment.
UID = 1000
TREE = CallTree(100, 50, b"HARPD_CALL=none of this system", uid=UID)


def table(*processes: Process) -> Snapshot:
    return Snapshot({process.pid: process for process in processes})


def members(processes: dict[int, Process], *previous: tuple[int, int], ignore_session: bool = False) -> set[int]:
    return {process.pid for process in TREE.members(processes, previous, ignore_session)}


def process(
    pid: int,
    start: int = 60,
    state: str = "S",
    has_cookie: bool = False,
    parent: int = 0,
    group: int = 0,
    session: int = 0,
    uid: int = UID,
) -> Process:
    cookies = frozenset({TREE.cookie} if has_cookie else ())
    return Process(pid, start, parent, group, session, state, cookies=cookies, uid=uid if has_cookie else None)


MAIN = process(100, 50, group=100, session=100)


def test_members_by_parent_session_and_group() -> None:
    others = [process(1, 0), process(7, 20, session=7), process(200, parent=7, session=7)]
    in_session = process(101, session=100, parent=1)
    in_group = process(102, group=100, parent=1)
    child = process(103, parent=100, session=103)
    grandchild = process(104, parent=103, session=104)
    zombie = process(105, parent=100, state="Z")
    all_of_them = table(MAIN, in_session, in_group, child, grandchild, zombie, *others)
    assert members(all_of_them) == {100, 101, 102, 103, 104}


def test_members_by_cookie() -> None:
    has_cookie = process(300, has_cookie=True, session=300, parent=1)
    older = process(301, 49, has_cookie=True, session=301, parent=1)
    assert members(table(has_cookie, older, process(302, parent=300))) == {300, 302}


def test_members_by_cookie_are_of_the_same_user() -> None:
    forged = process(300, has_cookie=True, uid=UID + 1, session=300, parent=1)
    assert members(table(forged, process(301, parent=300))) == set()
    main_of_other_user = process(100, 50, has_cookie=True, uid=UID + 1, group=100, session=100)
    assert members(table(main_of_other_user, forged)) == {100, 300}
    tree = CallTree(TREE.pid, TREE.start, TREE.cookie)
    assert tree.members(table(process(300, has_cookie=True, parent=1))) == []


def test_members_of_previous_scan_stay_with_children() -> None:
    escaped = process(300, 60, session=300, parent=1)
    later = process(301, 70, session=301, parent=300)
    assert members(table(escaped, later)) == set()
    assert members(table(escaped, later), (300, 60)) == {300, 301}
    assert members(table(escaped, later), (300, 59)) == set()


@pytest.mark.parametrize("ignore_session", [False, True])
def test_members_exclude_reused_pid(ignore_session: bool) -> None:
    stranger = process(100, 51, group=100, session=100)
    assert members(table(stranger, process(101, session=100, parent=100)), ignore_session=ignore_session) == set()


def test_members_of_session_without_leader() -> None:
    child, has_cookie = process(101, session=100, parent=1), process(102, has_cookie=True, session=100, parent=1)
    assert members(table(child, has_cookie)) == {101, 102}
    assert members(table(child, has_cookie), ignore_session=True) == {102}
    assert members(table(MAIN, child, has_cookie), ignore_session=True) == {100, 101, 102}


ZYGOTE = process(7, 20, session=7)
#: The cookies of an earlier call and of a concurrent one.
OTHERS = frozenset({cookie_for("other"), cookie_for("earlier")})


def escaped(*processes: Process, complete: bool = True) -> bool:
    look = table(ZYGOTE, *processes)
    look.complete = complete
    return TREE.has_possible_escapes(ZYGOTE.pid, look, {(400, 70)}, OTHERS)


def child(pid: int = 300, start: int = 60, state: str = "S", threads: int = 1, cookie_id: str | None = None) -> Process:
    """Return a child of the zygote."""
    cookies = frozenset(() if cookie_id is None else {cookie_for(cookie_id)})
    return Process(pid, start, ZYGOTE.pid, pid, pid, state, threads=threads, cookies=cookies)


def test_escape_possible_for_unknown_zygote_child() -> None:
    assert escaped(child())
    assert escaped(child(state="Z", threads=2))
    assert not escaped(child(state="Z"))
    assert not escaped(child(start=49))
    assert not escaped(child(400, 70))
    assert not escaped(process(300, parent=1), process(301, parent=400))


def test_escape_ignores_cookies_of_unknown_calls() -> None:
    assert not escaped(child(cookie_id="other"))
    assert escaped(child(cookie_id="made up"))


def test_escape_possible_without_complete_snapshot() -> None:
    assert not escaped()
    assert escaped(complete=False)
    assert TREE.has_possible_escapes(ZYGOTE.pid, table(MAIN), (), ())


def test_escape_possible_from_cgroup(tmp_path: Path) -> None:
    """`su` with PAM moves the program that it executes into another cgroup."""
    tree = CallTree(TREE.pid, TREE.start, TREE.cookie, Cgroup(str(tmp_path)))
    assert tree.has_possible_escapes(ZYGOTE.pid, table(ZYGOTE, child()), (), ())


def test_process_without_first_thread_is_alive() -> None:
    headless = Process(101, 60, 1, 100, 100, "Z", threads=2)
    assert members(table(headless)) == {101}
    assert members(table(Process(101, 60, 1, 100, 100, "Z", threads=1))) == set()


def groups(*found: Process, others: tuple[Process, ...] = ()) -> set[int]:
    return TREE.process_groups(found, {one.identity for one in found}, table(*found, *others))


def test_process_groups_of_members() -> None:
    before = process(100, 50, group=7, session=7)  # right after the fork
    assert groups(before) == set()
    assert groups(MAIN, process(101, group=100), process(102, group=102)) == {100, 102}
    assert groups(process(103, group=0), process(104, group=1)) == set()


def test_process_groups_with_other_processes_are_excluded() -> None:
    member = process(300, has_cookie=True, group=40, session=40)
    service = process(40, 10, group=40, session=40)
    assert groups(MAIN, member, others=(service,)) == {100}
    assert groups(MAIN, member, others=(process(40, 10, "Z", group=40, session=40),)) == {100, 40}


HEADLESS = """
import ctypes, os, platform, threading, time
threading.Thread(target=time.sleep, args=(3600,)).start()
print(flush=True)
number = {"x86_64": 60}.get(platform.machine(), 93)  # exit(2), of this thread alone
ctypes.CDLL(None).syscall(number, 0)
"""


def test_snapshot_has_process_without_first_thread() -> None:
    environment = {"HARPD_CALL": "headless"}
    with subprocess.Popen([sys.executable, "-c", HEADLESS], stdout=subprocess.PIPE, env=environment) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            wait_until(lambda: take_snapshot()[child.pid].state == "Z", what="the first thread's end")
            found = take_snapshot()[child.pid]
            assert found.alive
            assert found.cookies == {cookie_for("headless")}
            assert send_signal(signal.SIGKILL, found.identity)
        finally:
            child.kill()


#: Waits for a vfork child, which waits for data in a pipe before it executes a program.
DEEP_SLEEP = """
import os, sys
os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 5, sys.argv[1], os.O_RDONLY, 0)])
"""


@pytest.mark.parametrize("session", [False, True])
def test_snapshot_complete_has_fork_loop(tmp_path: Path, session: bool) -> None:
    with hopping(tmp_path, session, HARPD_CALL="hopper") as group:
        for _ in range(100):
            look = take_snapshot()
            assert any(is_hopper(p, group) for p in look.values()) or not look.complete


#: Takes a snapshot while a process forks and exits at the worst time: from a high pid to a low one, after the list of
#: /proc has passed the low pids and before it reaches the high ones. The argument is the number of that list.
WRAPPING = """
import os, signal, sys, time
from pathlib import Path
from harpd.processes.process_tree import take_snapshot

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # this is the first process of its container: it would have to reap
limit, last = int(Path("/proc/sys/kernel/pid_max").read_text()), Path("/proc/sys/kernel/ns_last_pid")
(commands, command), (pids, answer) = os.pipe(), os.pipe()
if not os.fork():
    while os.read(commands, 1):
        if os.fork():
            os._exit(0)
        os.write(answer, b"%d\\n" % os.getpid())

def hop():
    global hopper
    before = hopper
    os.write(command, b".")
    hopper = int(os.read(pids, 20))
    while before and os.path.exists(f"/proc/{before}"):
        time.sleep(0.001)

def list_slowly(path):
    global lists
    lists += 1
    if lists > int(sys.argv[1]):
        return list_at_once(path)
    if lists < int(sys.argv[1]):
        found = list_at_once(path)
        hop()  # listed, and ended when it is read
        return found
    low = [name for name in list_at_once(path) if name.isdecimal() and int(name) < limit // 2]
    last.write_text(str(limit - 1))
    hop()
    return low + [name for name in list_at_once(path) if name.isdecimal() and int(name) >= limit // 2]

hopper = lists = 0
last.write_text(str(limit - 10))
hop()
assert hopper > limit // 2
list_at_once, os.listdir = os.listdir, list_slowly
look = take_snapshot()
assert hopper < limit // 2
assert hopper in look and look.complete, (hopper, look)
print("held")
"""


@pytest.mark.root
@pytest.mark.parametrize("number", [1, 2])
def test_snapshot_complete_has_process_with_wrapped_pid(number: int) -> None:
    contained = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*contained, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs to make a PID namespace")
    if not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK):
        pytest.skip("needs a kernel that can set the last pid")
    command = [*contained, sys.executable, "-c", WRAPPING, str(number)]
    looked = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert looked.stdout.strip() == "held", looked.stderr


def test_kill_group_ends_fork_loop(tmp_path: Path) -> None:
    with hopping(tmp_path) as group:
        wait_until(lambda: group_lives(group), what="a look that finds it")  # an incomplete snapshot may miss it
        kill_group(group, None)
        wait_until(lambda: not group_lives(group), what="the group's end")
        kill_group(group, None)


def test_kill_group_spares_a_later_group_of_its_id() -> None:
    """A process that has the pid of the leader, but is not the one of the snapshot, leads another group."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as later:
        leader = take_snapshot()[later.pid]
        for earlier in (None, replace(leader, start=leader.start - 1)):
            kill_group(later.pid, earlier)
            assert take_snapshot()[later.pid].alive
        kill_group(later.pid, leader)
        assert later.wait(60) == -signal.SIGKILL


def test_snapshot_with_zombie_becomes_complete() -> None:
    with subprocess.Popen(["true"]) as child:
        wait_until(lambda: take_snapshot()[child.pid].state == "Z", what="the child's end")
        wait_until(lambda: (look := take_snapshot()).complete and child.pid in look, what="a complete snapshot")


def test_snapshot_skips_cookie_of_uninterruptible_process(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", DEEP_SLEEP, str(tmp_path / "pipe")]
    with subprocess.Popen(command, env={"HARPD_CALL": "deep"}) as child:
        wait_until(lambda: take_snapshot()[child.pid].state == "D", what="deep sleep")
        assert not take_snapshot()[child.pid].cookies
        os.close(os.open(tmp_path / "pipe", os.O_WRONLY))
        assert child.wait() == 0


def test_scan_reads_few_processes_in_each_step(sleeper: subprocess.Popen[bytes]) -> None:
    scan, before, steps = Scan(), 0, 1
    while not scan.step():
        assert len(scan.snapshot) - before <= STEP_PROCESSES
        before, steps = len(scan.snapshot), steps + 1
    assert sleeper.pid in scan.snapshot
    assert steps >= len(scan.snapshot) // STEP_PROCESSES


def test_scan_reads_no_cookie_of_older_process(sleeper: subprocess.Popen[bytes]) -> None:
    started = start_time(sleeper.pid)
    found = [take_snapshot(since)[sleeper.pid] for since in (started, started + 1)]
    assert [bool(process.cookies) for process in found] == [True, False]
    assert found[0].identity == found[1].identity


def test_scan_soon_after_another_reads_only_later_processes(sleeper: subprocess.Popen[bytes]) -> None:
    started = start_time(sleeper.pid)
    earlier = complete_snapshot()
    found = finished(Scan(started, earlier))
    kept = [pid for pid, process in found.items() if process is earlier.get(pid)]
    assert os.getpid() in kept
    assert all(found[pid].start < started for pid in kept)
    assert found[sleeper.pid].cookies


@pytest.mark.parametrize("change", [{"started_at": 0.0}, {"last_pid": 0}, {"last_pid": 1 << 30}])
def test_scan_after_pids_may_be_reused_reads_all(change: dict[str, Any]) -> None:
    """The earlier snapshot is old or was not complete, or pids started again at the lowest."""
    earlier = complete_snapshot()
    vars(earlier).update(change)
    found = finished(Scan(1 << 60, earlier))
    assert not any(process is earlier.get(pid) for pid, process in found.items())


def test_scan_reads_pids_that_were_assigned_since() -> None:
    """After a wrap, an older process may have a pid that is assigned next."""
    earlier = complete_snapshot()
    earlier.last_pid = os.getpid() - 1
    found = finished(Scan(1 << 60, earlier))
    assert found[os.getpid()] is not earlier[os.getpid()]
    assert found[os.getppid()].identity == earlier[os.getppid()].identity


def complete_snapshot() -> Snapshot:
    """Return a complete snapshot that seems to have been started just now."""
    found = take_snapshot()
    while not found.complete:
        found = take_snapshot()
    found.started_at = time.monotonic()
    return found


def finished(scan: Scan) -> Snapshot:
    while not scan.step():
        pass
    return scan.snapshot


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "3600"], env={"HARPD_CALL": "sleeper"}) as child:
        yield child
        child.kill()


def test_snapshot_and_send_signal(sleeper: subprocess.Popen[bytes]) -> None:
    found = take_snapshot()[sleeper.pid]
    assert (found.parent, found.start) == (os.getpid(), start_time(sleeper.pid))
    assert found.cookies == {cookie_for("sleeper")}
    assert not send_signal(signal.SIGKILL, (sleeper.pid, found.start + 1))
    assert sleeper.poll() is None
    assert send_signal(signal.SIGKILL, found.identity)
    sleeper.wait()
    assert not send_signal(signal.SIGKILL, found.identity)
    assert start_time(sleeper.pid) == 0


#: Takes a snapshot with its own child, as the first process of a container, whose session is from outside.
CONTAINED = """
import os, subprocess
from harpd.processes.process_tree import take_snapshot
with subprocess.Popen(["sleep", "3600"], env={"HARPD_CALL": "inside"}, stdout=subprocess.DEVNULL) as child:
    found = take_snapshot()[child.pid]
    print(found.session, *found.cookies)
    child.kill()
"""


@pytest.mark.root
def test_snapshot_in_container_has_cookie() -> None:
    contained = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*contained, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs to make a PID namespace")
    looked = subprocess.run([*contained, sys.executable, "-c", CONTAINED], check=True, capture_output=True, text=True)
    assert looked.stdout.split() == ["0", str(cookie_for("inside"))]


def test_snapshot_with_any_command_name() -> None:
    program = "open('/proc/self/comm', 'w').write('a) S 1 (b\\n'); print(flush=True); import time; time.sleep(3600)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert take_snapshot()[child.pid].parent == os.getpid()
        child.kill()


def fail() -> None:
    raise RuntimeError


def test_timers_run_in_order_unless_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    loop, fired = EventLoop(), list[int]()
    for number in (3, 1, 2):
        loop.call_later(number / 1000, lambda number=number: fired.append(number))  # type: ignore[misc]
    loop.call_later(0.0015, lambda: fired.append(9)).cancel()
    for seconds in (1.0, 1e9):
        loop.call_later(seconds, lambda: fired.append(9))
    loop.call_later(0, fail)  # must not stop the others
    loop.call_later(0.004, loop.stop)
    loop.run()
    assert fired == [1, 2, 3]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    caplog.clear()  # the traceback of the failure refers to the loop, and so to its descriptor


def test_cancelled_timers_do_not_accumulate() -> None:
    loop = EventLoop()
    pending = [loop.call_later(3600, loop.stop) for _ in range(10)]
    for _ in range(10_000):
        timer = loop.call_later(3600, loop.stop)
        timer.cancel()
        timer.cancel()
    assert sum(isinstance(one, Timer) for one in gc.get_objects()) < 300
    for timer in pending:
        timer.cancel()
    loop.call_later(0, loop.stop)
    loop.run()


def printed(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.__dict__["text"] for record in caplog.records]


def test_output_pipe_splits_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loop = EventLoop()
    output = OutputCollector(loop, 1, (1000, 262144))
    limit = OutputLimit(loop, output.limits, lambda lines, size: None)
    pipes = [OutputPipe(output, "stdout", limit) for _ in range(3)]
    for number, pipe in enumerate(pipes):
        os.write(pipe.writing_end, f"begun {number}".encode())
    os.write(pipes[0].writing_end, b"\n\nnext\nrest")

    def go_on() -> None:
        assert printed(caplog) == ["begun 0", "", "next"]
        for pipe in pipes[:2]:
            pipe.release()  # above the limit: the first one is closed
        assert printed(caplog)[3:] == ["rest"]
        with pytest.raises(BrokenPipeError):
            os.write(pipes[0].writing_end, b"more")
        os.write(pipes[1].writing_end, b"!\n")
        for pipe in pipes:
            os.close(pipe.writing_end)
        loop.call_later(0.01, loop.stop)  # the pipes are read before timers run

    loop.call_later(0.01, go_on)
    loop.call_later(30, loop.stop)
    loop.run()
    assert sorted(printed(caplog)[4:]) == ["begun 1!", "begun 2"]
