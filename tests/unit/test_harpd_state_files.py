"""State files: orphans that the next supervisor kills and reports, survivors, purposes, damaged files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from harp.protocol.json_text import Raw, dumps
from harpd.processes.cgroup import CallCgroups
from harpd.processes.cookie import cookie_for
from harpd.processes.process_tree import CallTree, start_time, take_snapshot
from harpd.supervisor.state_files import (
    ENTRY_SIZE,
    CleanupResult,
    InvalidEntry,
    Purpose,
    StateFiles,
    decode_entry,
    encode_entry,
    encode_state,
)
from support import full_disk
from support.cgroups import freezer, own_cgroup
from support.deadline import wait_until
from support.hopper import group_lives, hopping
from support.state_entries import read_entries

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Supervisors:
    """Several supervisors in one runtime directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._alive: dict[StateFiles, str] = {}

    def begin(self, name: str) -> StateFiles:
        """Return the state files of a new supervisor."""
        records = StateFiles(self._directory, name)
        self._alive[records] = name
        return records

    def kill(self, records: StateFiles) -> None:
        """Close the locks of a supervisor, as its death does: on its own file and on those of dead supervisors."""
        del self._alive[records]
        calls = self._directory / "calls"
        living = {str(calls / f"{name}.1") for name in self._alive.values()}
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
                target = os.readlink(f"/proc/self/fd/{number}")
                if target.startswith(f"{calls}/") and target not in living:
                    os.close(int(number))

    def kill_all(self) -> None:
        """Close all that are open."""
        for records in tuple(self._alive):
            self.kill(records)


@pytest.fixture
def supervisors(tmp_path: Path) -> Iterator[Supervisors]:
    supervisors = Supervisors(tmp_path)
    yield supervisors
    supervisors.kill_all()


@pytest.fixture
def old(supervisors: Supervisors) -> StateFiles:
    """The state files of a supervisor that will die."""
    return supervisors.begin("old")


@pytest.fixture
def new(supervisors: Supervisors) -> StateFiles:
    """The state files of its successor."""
    return supervisors.begin("new")


@contextlib.contextmanager
def process(call_id: str) -> Iterator[int]:
    """A process with a call's cookie, in its own session; it ignores SIGTERM."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code]
    environment = {"HARPD_CALL": call_id}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            yield child.pid
        finally:
            child.kill()


def lives(pid: int) -> bool:
    found = take_snapshot().get(pid)
    return found is not None and found.alive


def tree(call_id: str, pid: int) -> CallTree:
    return CallTree(pid, start_time(pid), cookie_for(call_id), uid=os.getuid())


def clean_up_fully(records: StateFiles, until_gone: bool = True) -> list[CleanupResult]:
    """Clean up until it need not be repeated soon; return all results."""
    found = [records.clean_up()]
    while until_gone and found[-1].repeat_soon:
        time.sleep(0.02)
        found.append(records.clean_up())
    return found


def test_file_that_a_living_supervisor_creates_again_does_not_make_it_dead(
    old: StateFiles, new: StateFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its removed file has no lock any more, and may be open in a clean-up of another supervisor."""
    lock, file = fcntl.flock, tmp_path / "calls" / "old.1"

    def lock_late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        file.unlink()
        assert old.restore()
        lock(descriptor, operation)

    with process("a") as pid:
        old.write("a", tree("a", pid), Raw(b'{"owner":"o"}'))
        monkeypatch.setattr(fcntl, "flock", lock_late)
        result = new.clean_up()
        assert (result.killed, [*result.calls]) == (0, [])
        assert file.exists()
        assert lives(pid)


def test_clean_up_kills_and_reports_once(
    supervisors: Supervisors, tmp_path: Path, old: StateFiles, new: StateFiles
) -> None:
    with process("a") as pid:
        old.write("a", tree("a", pid), Raw(b'{"owner":"o"}'))
        assert new.clean_up() == CleanupResult()  # the supervisor lives
        supervisors.kill(old)
        found = clean_up_fully(new)
        assert not lives(pid)
        assert sum(result.killed for result in found) == 1
        assert [result.calls["a"].session for result in found if result.calls] == [{"owner": "o"}]
        assert new.clean_up() == CleanupResult()
        assert read_entries(tmp_path) == {}


def test_clean_up_ignores_state_of_an_earlier_boot(
    supervisors: Supervisors, tmp_path: Path, old: StateFiles, new: StateFiles
) -> None:
    """Its pid may belong to another process now."""
    call_id = str(uuid.uuid4())
    with process(call_id) as pid:
        old.write(call_id, tree(call_id, pid), None)
        content = encode_state(call_id, str(uuid.uuid4()), tree(call_id, pid), None)
        (tmp_path / "calls" / "old.1").write_bytes(encode_entry(Purpose.STOP_AND_REPORT, content))
        supervisors.kill(old)
        result = new.clean_up()
        assert (result.killed, result.calls, lives(pid)) == (0, {}, True)


def test_clean_up_reports_ended_call_without_kill(supervisors: Supervisors, old: StateFiles, new: StateFiles) -> None:
    with process("a") as pid:
        old.write("a", tree("a", pid), None)
        old.mark_ended("a")
        supervisors.kill(old)
        assert list(new.clean_up().calls) == ["a"]
        assert lives(pid)


@pytest.mark.parametrize("is_running", [True, False])
def test_clean_up_interrupted_before_adoption_loses_no_end(
    supervisors: Supervisors, tmp_path: Path, old: StateFiles, new: StateFiles, is_running: bool
) -> None:
    """The second supervisor is killed, too, before it has written its own entries."""
    with process("a") as pid:
        old.write("a", tree("a", pid), None)
        if not is_running:
            old.mark_ended("a")
        supervisors.kill(old)
        before: list[dict[str, Purpose]] = []
        new.clean_up(lambda result: before.append(read_entries(tmp_path)))
        supervisors.kill(new)
    purpose = Purpose.STOP_AND_REPORT if is_running else Purpose.ONLY_REPORT
    assert before == [{"a": purpose}], "a third supervisor would find the call"
    assert read_entries(tmp_path) == {}


def test_clean_up_kills_reported_call_silently(supervisors: Supervisors, old: StateFiles, new: StateFiles) -> None:
    with process("a") as pid:
        old.write("a", tree("a", pid), None)
        old.mark_reported("a")
        supervisors.kill(old)
        found = clean_up_fully(new)
        assert sum(result.killed for result in found) == 1
        assert not any(result.calls for result in found)
        assert not lives(pid)


@pytest.mark.parametrize(
    "order",
    [
        "mark_ended mark_reported",
        "mark_reported mark_ended",
        "remove",
        "mark_ended remove",
        "mark_reported remove",
        "remove mark_ended mark_reported",
    ],
)
def test_entry_is_cleared_when_done(tmp_path: Path, new: StateFiles, order: str) -> None:
    new.write("a", CallTree(2, 2, cookie_for("a")), None)
    for step in order.split():
        getattr(new, step)("a")
    assert read_entries(tmp_path) == {}


def test_close_leaves_survivors_only(supervisors: Supervisors, tmp_path: Path, old: StateFiles) -> None:
    for call_id in ("a", "b", "c"):
        old.write(call_id, CallTree(2, 2, cookie_for(call_id)), None)
    old.mark_ended("b")
    old.mark_reported("c")
    old.close()
    assert read_entries(tmp_path) == {"a": Purpose.STOP_AND_REPORT, "c": Purpose.ONLY_STOP}
    other = supervisors.begin("other")
    other.close()
    assert not (tmp_path / "calls" / "other.1").exists()


@pytest.mark.parametrize("name", [".made", "made.2", "made.10", "made"])
def test_clean_up_leaves_other_files(tmp_path: Path, new: StateFiles, name: str) -> None:
    """A file that is just being created does not belong to a dead supervisor; another version is not read."""
    content = encode_state("a", BOOT, CallTree(2, 2, cookie_for("a")), None)
    (tmp_path / "calls" / name).write_bytes(encode_entry(Purpose.STOP_AND_REPORT, content))
    assert new.clean_up() == CleanupResult()
    assert (tmp_path / "calls" / name).exists()


def test_clean_up_kills_fork_loop(supervisors: Supervisors, tmp_path: Path, old: StateFiles, new: StateFiles) -> None:
    with hopping(tmp_path, HARPD_CALL="a") as group:
        old.write("a", CallTree(group, 0, cookie_for("a"), uid=os.getuid()), None)
        supervisors.kill(old)
        clean_up_fully(new)
        assert not group_lives(group)
        assert read_entries(tmp_path) == {}


@pytest.mark.root
@ROOT
def test_clean_up_kills_fork_loop_in_cgroup(
    supervisors: Supervisors, tmp_path: Path, old: StateFiles, new: StateFiles
) -> None:
    with own_cgroup() as place, contextlib.ExitStack() as ending:
        group = CallCgroups(str(place)).create("a", os.getpid())
        assert group is not None
        try:
            ending.enter_context(hopping(tmp_path, session=True))
        finally:
            (place.parent / "cgroup.procs").write_text(str(os.getpid()))
        old.write("a", CallTree(os.getpid(), 0, cookie_for("a"), group), None)
        supervisors.kill(old)
        clean_up_fully(new)
        assert not Path(group.path).exists()


@pytest.mark.root
@ROOT
def test_clean_up_survivors_are_reported(
    supervisors: Supervisors, tmp_path: Path, old: StateFiles, new: StateFiles, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "harpd.supervisor")
    with process("a") as pid, process("b") as other, freezer() as cold:
        cold.freeze(pid)
        for call_id, main in (("a", pid), ("b", other)):
            old.write(call_id, tree(call_id, main), None)
        supervisors.kill(old)
        result = new.clean_up()
        assert result.calls.keys() == {"a", "b"}
        assert [one["pid"] for one in result.stop_reports["a"]["survivors"]] == [pid]
        for later in clean_up_fully(new):
            assert (later.killed, later.calls, later.stop_reports.keys() - {"b"}) == (0, {}, set())
        assert not lives(other)
        assert read_entries(tmp_path) == {"a": Purpose.ONLY_STOP}
        wait_until(lambda: new.clean_up() == CleanupResult() and caplog.records, what="the log event")
        assert [event.message for event in caplog.records] == ["cannot kill orphaned processes"]
        for _ in range(3):
            assert new.clean_up() == CleanupResult()
        assert len(caplog.records) == 1
        third = supervisors.begin("third")
        assert third.clean_up() == CleanupResult()  # another supervisor has locked it
        supervisors.kill(new)
        result = third.clean_up()
        assert (result.killed, result.calls, result.stop_reports) == (1, {}, {})
        cold.thaw()
        wait_until(lambda: not third.clean_up().repeat_soon, what="the last one's end")
        wait_until(lambda: third.clean_up() == CleanupResult() and not read_entries(tmp_path), what="no record")


@pytest.mark.root
@ROOT
def test_clean_up_reports_end_of_survivors(supervisors: Supervisors, old: StateFiles, new: StateFiles) -> None:
    with process("a") as pid, freezer() as cold:
        cold.freeze(pid)
        old.write("a", tree("a", pid), None)
        supervisors.kill(old)
        (first,) = clean_up_fully(new, until_gone=False)
        assert [one["pid"] for one in first.stop_reports["a"]["survivors"]] == [pid]
        cold.thaw()
        (last,) = wait_until(
            lambda: [result for result in clean_up_fully(new) if result.stop_reports], what="the last stop report"
        )
        assert (last.calls, last.repeat_soon) == ({}, False)
        stop_report = last.stop_reports["a"]
        assert (stop_report["survivors"], stop_report["complete"]) == ([], False)
        assert (stop_report["processes"][0]["signals"], stop_report["processes"][0]["ended"]) == (
            [signal.SIGKILL.name],
            "gone after SIGKILL",
        )


# Damaged and hostile files.

#: Call ids of an intact file, in the order of its entries.
IDS = ("first", "second", "third")


def intact_file() -> bytes:
    """Return a state file of three calls without processes."""
    contents = [encode_state(one, BOOT, CallTree(2**22 + 1, 5, cookie_for(one)), None) for one in IDS]
    return b"".join(encode_entry(Purpose.STOP_AND_REPORT, content).ljust(ENTRY_SIZE, b"\0") for content in contents)


def read_calls(supervisors: Supervisors, tmp_path: Path, data: bytes) -> set[str]:
    """Return the ids of the calls that a new supervisor finds in a state file."""
    name = str(uuid.uuid4())
    found = supervisors.begin(name)
    file = tmp_path / "calls" / "dead.1"
    file.write_bytes(data)
    result = found.clean_up()
    assert result.killed == 0
    assert not file.exists()
    found.close()
    return set(result.calls)


def damaged_files() -> Iterator[tuple[str, bytes, set[str]]]:
    """Yield files, each with the ids of the calls that have to be found in it."""
    intact, generator = intact_file(), random.Random(11)
    length = intact.index(b"\0")
    yield "intact", intact, set(IDS)
    for at in (0, 1, 5, length - 2, length - 1, length, ENTRY_SIZE, ENTRY_SIZE + 9, 2 * ENTRY_SIZE + length - 1):
        yield f"cut at {at}", intact[:at], {one for n, one in enumerate(IDS) if at >= n * ENTRY_SIZE + length}
    for _ in range(30):
        at, size = generator.randrange(length), generator.choice([1, 2, 8, 100, ENTRY_SIZE - length])
        torn = bytearray(intact)
        torn[ENTRY_SIZE + at : ENTRY_SIZE + at + size] = generator.randbytes(size)
        yield f"torn at {at}", bytes(torn), {"first", "third", *(["second"] if torn == intact else [])}
    yield "random", generator.randbytes(5 * ENTRY_SIZE), set()
    yield "text", b"pid = 1\n" * 5000, set()
    yield "shifted", b"\0" + intact, set()
    yield "duplicated", intact + intact, set(IDS)


def test_clean_up_reads_valid_entries_beside_damaged_entries(supervisors: Supervisors, tmp_path: Path) -> None:
    for what, data, expected in damaged_files():
        if what.startswith("torn"):  # a change of the zeros behind the entry does not count
            assert read_calls(supervisors, tmp_path, data) >= {"first", "third"}, what
        else:
            assert read_calls(supervisors, tmp_path, data) == expected, what


def test_decode_entry_rejects_every_flipped_bit_and_cut() -> None:
    whole = encode_entry(Purpose.ONLY_STOP, encode_state("a", BOOT, CallTree(2, 2, cookie_for("a")), None))
    for at in range(len(whole)):
        damaged = [whole[:at], *(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for bit in range(8))]
        for data in damaged:
            with contextlib.suppress(InvalidEntry):
                assert decode_entry(data, BOOT) is None, (at, data)


def test_decode_entry_random_bytes_are_rejected() -> None:
    generator = random.Random(5)
    for _ in range(20_000):
        data = generator.choice([b"", b"R ", b"E 00000000 ", b"S 1234abcd {}"]) + generator.randbytes(30)
        with contextlib.suppress(InvalidEntry):
            assert decode_entry(data, BOOT) is None, data


VALID = {"call": "a", "boot": BOOT, "pid": 2, "start": 3}


@pytest.mark.parametrize(
    "members",
    [
        [],
        "text",
        {},
        {**VALID, "pid": 1},
        {**VALID, "pid": 0},
        {**VALID, "pid": -5},
        {**VALID, "pid": True},
        {**VALID, "pid": "2"},
        {**VALID, "start": -1},
        {**VALID, "start": 3.0},
        {**VALID, "call": ""},
        {**VALID, "call": 5},
        {**VALID, "call": "../a"},
        {**VALID, "call": "a" * 37},
        {**VALID, "cgroup": "/sys/fs/cgroup"},
        {**VALID, "cgroup": "/sys/fs/cgroup/call-b"},
        {**VALID, "cgroup": 5},
        {key: value for key, value in VALID.items() if key != "boot"},
    ],
)
def test_decode_entry_hostile_content_is_rejected(members: object) -> None:
    with pytest.raises(InvalidEntry):
        decode_entry(encode_entry(Purpose.ONLY_STOP, json.dumps(members).encode()), BOOT)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 2000, b'{"pid": NaN}'])
def test_decode_entry_no_json_is_rejected(content: bytes) -> None:
    with pytest.raises(InvalidEntry):
        decode_entry(encode_entry(Purpose.ONLY_STOP, content), BOOT)


def test_clean_up_other_start_time_or_cookie_kills_no_process(
    supervisors: Supervisors, tmp_path: Path, new: StateFiles
) -> None:
    with process("a") as pid:
        states = [
            ("a", CallTree(pid, start_time(pid) + 1, cookie_for("a"), uid=os.getuid())),
            ("b", CallTree(pid, start_time(pid) - 1, cookie_for("b"), uid=os.getuid())),
        ]
        contents = [encode_state(call_id, BOOT, other, None) for call_id, other in states]
        data = [encode_entry(Purpose.STOP_AND_REPORT, content).ljust(ENTRY_SIZE, b"\0") for content in contents]
        (tmp_path / "calls" / "dead.1").write_bytes(b"".join(data))
        result = new.clean_up()
        assert (result.killed, sorted(result.calls)) == (0, ["a", "b"])
        assert lives(pid)


def test_clean_up_huge_sparse_file_is_read_in_part(supervisors: Supervisors, tmp_path: Path, new: StateFiles) -> None:
    file = tmp_path / "calls" / "dead.1"
    with file.open("wb") as stream:
        stream.write(intact_file())
        stream.truncate(1 << 30)
    assert set(new.clean_up().calls) == set(IDS)
    assert not file.exists()


@pytest.mark.parametrize("kind", ["directory", "symlink", "fifo"])
def test_clean_up_ignores_other_kinds_of_files(tmp_path: Path, new: StateFiles, kind: str) -> None:
    path = tmp_path / "calls" / "dead.1"
    match kind:
        case "directory":
            path.mkdir()
        case "symlink":
            path.symlink_to(tmp_path / "calls" / "new.1")
        case _:
            os.mkfifo(path)
    assert new.clean_up() == CleanupResult()


# A full disk.


def test_entries_are_reserved_in_a_file_without_holes(tmp_path: Path, new: StateFiles) -> None:
    new.reserve("a")
    found = os.stat(tmp_path / "calls" / "new.1")
    assert found.st_blocks * 512 >= found.st_size > 0


def test_entries_are_used_again(tmp_path: Path, new: StateFiles) -> None:
    for number in range(1000):
        call_id = f"call-{number}"
        new.write(call_id, CallTree(2, 2, cookie_for(call_id)), None)
        new.remove(call_id)
    assert os.stat(tmp_path / "calls" / "new.1").st_size <= 64 * ENTRY_SIZE


def test_state_too_long_for_its_entry_is_an_error(tmp_path: Path, new: StateFiles) -> None:
    with pytest.raises(OSError, match="at most 4096 bytes"):
        new.write("a", CallTree(2, 2, cookie_for("a")), dumps("x" * ENTRY_SIZE))
    new.mark_ended("a")
    new.remove("a")
    assert read_entries(tmp_path) == {}


@pytest.mark.parametrize("how", [pytest.param("mount", marks=pytest.mark.root), "limit"])
def test_full_disk_refuses_new_entries_and_keeps_stored_entries(tmp_path: Path, how: str) -> None:
    private = ["unshare", "-m"] if how == "mount" else []
    if private and subprocess.run([*private, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs to be root, with the right to mount")
    command = [*private, sys.executable, "-P", full_disk.__file__, f"states-{how}", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
