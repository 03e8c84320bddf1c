"""The audit file: every change of its lines is found, and its chain survives rotation and torn lines."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harp_daemon import audit_reading
from harp_daemon.audit_file import AuditError, AuditFile, Position, check_usable, format_time, hash_line, head_file
from harp_daemon.audit_reading import Cursor, read_page, search, verify

LARGE = 1 << 30


def write(path: Path, count: int, max_bytes: int = LARGE, start: int = 0) -> None:
    file = AuditFile(path, max_bytes)
    for number in range(start, start + count):
        file.append([{"time": 1000.0 + number, "action": "call", "decision": "allowed", "job": f"job-{number}"}])
    file.sync()
    file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def test_audit_untouched_file_is_complete(path: Path) -> None:
    write(path, 5)
    report = verify(path)
    assert (report.problems, report.notes, report.first, report.last.entry) == ([], [], 1, 6)
    assert path.stat().st_mode & 0o777 == 0o600


def test_audit_chain_continues_after_reopening(path: Path) -> None:
    write(path, 3)
    write(path, 3, start=3)
    assert verify(path).problems == []
    assert [entry["job"] for entry, _ in search(path, {"action": "call"}, None)] == [f"job-{n}" for n in range(6)]


def read_pages(path: Path, limit: int, **options: Any) -> tuple[list[int], set[str | None]]:
    """Return the numbers of the entries of all pages, and the problems."""
    entries, problems, cursor = [], set(), None
    while True:
        page = read_page(path, {"action": "call"}, cursor=cursor, limit=limit, **options)
        entries += [entry["entry"] for entry in page.entries]
        problems.add(page.problem)
        if page.next is None:
            return entries, problems
        cursor = page.next


def test_audit_pages_have_each_entry_once_newest_first(path: Path) -> None:
    write(path, 400, max_bytes=20_000)
    assert len(list(path.parent.glob("audit.jsonl.*"))) > 2
    expected = sorted((entry["entry"] for entry, _ in search(path, {"action": "call"}, None)), reverse=True)
    assert len(expected) == 400
    for limit in (1000, 7):
        assert read_pages(path, limit) == (expected, {None})
    some, _ = read_pages(path, 7, since=format_time(1100), until=format_time(1109))
    assert len(some) == 10


def test_audit_page_reads_a_bounded_number_of_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, 400)
    monkeypatch.setattr(audit_reading, "_MAX_PAGE", 20_000)
    page = read_page(path, {"action": "no-such-action"})
    assert (page.entries, page.problem) == ([], None)
    assert page.next is not None
    assert 50 < page.examined < 150
    assert len(read_pages(path, 1000)[0]) == 400


@pytest.mark.parametrize("limit", [1, 1000])
def test_audit_page_finds_changed_and_dropped_lines(path: Path, limit: int) -> None:
    write(path, 9)
    assert read_pages(path, limit)[1] == {None}
    edit_lines(path, lambda lines: lines.__setitem__(4, lines[4].replace(b"allowed", b"denied")))
    assert len(read_pages(path, limit)[1] - {None}) == 1
    edit_lines(path, lambda lines: lines.__delitem__(-1))
    assert read_page(path, {}, limit=limit).problem == "entry 10 was dropped at the end"


def test_audit_page_leaves_out_what_is_being_written(path: Path) -> None:
    write(path, 3)
    with path.open("ab") as file:
        file.write(b'{"entry": 5, "ti')
    assert read_pages(path, 2) == ([4, 3, 2], {None})
    assert read_page(path, {}, cursor=Cursor(77, 5, "0" * 64), limit=5).entries != []


def edit_lines(path: Path, change: Callable[[list[bytes]], None]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines)
    path.write_bytes(b"".join(lines))


def test_audit_changed_line_is_named(path: Path) -> None:
    write(path, 9)
    edit_lines(path, lambda lines: lines.__setitem__(4, lines[4].replace(b"allowed", b"denied")))
    assert verify(path).problems == [f"{path}:5: entry 5 was changed"]


def test_audit_changed_last_line_is_named(path: Path) -> None:
    write(path, 9)
    edit_lines(path, lambda lines: lines.__setitem__(9, lines[9].replace(b"allowed", b"denied")))
    assert verify(path).problems == [f"{path}:10: entry 10 was changed"]


def test_audit_unreadable_line_is_named(path: Path) -> None:
    write(path, 9)
    edit_lines(path, lambda lines: lines.__setitem__(4, b"\x00\xff\n"))
    assert verify(path).problems == [f"{path}:5: entry 5 was changed"]


def test_audit_dropped_lines_are_named(path: Path) -> None:
    write(path, 9)
    edit_lines(path, lambda lines: lines.__delitem__(slice(3, 5)))
    assert verify(path).problems == ["entries 4 to 5 were dropped"]


def test_audit_dropped_end_is_named(path: Path) -> None:
    write(path, 9)
    edit_lines(path, lambda lines: lines.__delitem__(slice(8, None)))
    assert verify(path).problems == ["entries 9 to 10 were dropped at the end"]
    write(path, 2)  # a restart does not hide it
    assert verify(path).problems == ["entries 9 to 10 were dropped"]


def test_audit_inserted_line_is_named(path: Path) -> None:
    write(path, 9)

    def insert(lines: list[bytes]) -> None:
        forged = json.loads(lines[5])
        forged["previous"] = json.loads(lines[5])["previous"]
        forged["job"] = "job-of-others"
        lines.insert(5, json.dumps(forged).encode() + b"\n")

    edit_lines(path, insert)
    assert verify(path).problems == [f"{path}:6: a line was inserted"]


def test_audit_moved_line_is_named(path: Path) -> None:
    write(path, 9)
    edit_lines(path, lambda lines: lines.insert(6, lines.pop(3)))
    assert verify(path).problems == [f"{path}:7: entry 4 was moved: it is after entry 7"]


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, int, int]:
    kind = draw(st.sampled_from(["change", "drop", "insert", "move", "cut"]))
    return kind, draw(st.integers(0, 19)), draw(st.integers(0, 400))


@settings(deadline=None, max_examples=150)
@given(st.lists(changes(), min_size=1, max_size=3))
def test_audit_any_change_of_lines_is_found(edits: list[tuple[str, int, int]]) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "audit.jsonl"
        write(path, 19)
        original = path.read_bytes()
        lines = original.splitlines(keepends=True)
        for kind, place, other in edits:
            if not lines:
                break
            place %= len(lines)
            if kind == "change":
                at = other % max(1, len(lines[place]) - 1)
                lines[place] = lines[place][:at] + bytes([lines[place][at] ^ 1]) + lines[place][at + 1 :]
            elif kind == "drop":
                del lines[place]
            elif kind == "insert":
                lines.insert(other % len(lines), lines[place])
            elif kind == "move":
                lines.insert(other % len(lines), lines.pop(place))
            else:
                del lines[place:]
        path.write_bytes(b"".join(lines))
        report = verify(path)
        assert bool(report.problems) == (path.read_bytes() != original), report


def test_audit_rewritten_file_is_found_by_known_entry(path: Path) -> None:
    write(path, 9)
    known = verify(path).last
    assert verify(path, known).problems == []
    for file in path.parent.iterdir():
        file.unlink()
    write(path, 9, start=100)  # with right hashes, and an own head
    assert verify(path).problems == []
    assert verify(path, known).problems == [f"entry 10 with the hash {known.hash} is not there"]
    assert verify(path, Position(20, known.hash)).problems != []


def test_audit_rotation_by_size_keeps_chain(path: Path) -> None:
    write(path, 50, max_bytes=2000)
    files = sorted(path.parent.glob("audit.jsonl*"))
    assert len(files) == 5
    assert verify(path).problems == []
    first_of_last = json.loads(path.read_bytes().splitlines()[0])
    assert first_of_last["action"] == "audit-file"
    assert first_of_last["previous_file"] == files[-1].name
    packed = files[2].with_name(f"{files[2].name}.gz")
    packed.write_bytes(gzip.compress(files[2].read_bytes()))
    files[2].unlink()
    assert verify(path).problems == []
    assert len([*search(path, {"job": "job-*"}, None)]) == 50
    packed.unlink()
    assert "were dropped" in verify(path).problems[0]


def test_audit_oldest_file_removed_is_a_note(path: Path) -> None:
    write(path, 50, max_bytes=2000)
    oldest = sorted(path.parent.glob("audit.jsonl.*"))[0]
    last = json.loads(oldest.read_bytes().splitlines()[-1])["entry"]
    oldest.unlink()
    report = verify(path)
    assert report.problems == []
    assert report.notes == [f"entries 1 to {last} are in no file here"]


def test_audit_renamed_file_is_followed(path: Path) -> None:
    file = AuditFile(path, LARGE)
    file.append([{"time": 1.0, "action": "one"}])
    path.rename(path.with_name("audit.jsonl.1"))
    file.reopen()
    file.append([{"time": 2.0, "action": "two"}])
    file.sync()
    file.close()
    assert [entry["action"] for entry, _ in search(path, {}, None)] == ["audit-begin", "one", "audit-file", "two"]
    assert [entry["previous_file"] for entry, _ in search(path, {"action": "audit-file"}, None)] == ["audit.jsonl.1"]
    assert verify(path).problems == []


def test_audit_file_renamed_while_stopped_continues_chain(path: Path) -> None:
    write(path, 3)
    path.rename(path.with_name("audit.jsonl.1"))
    write(path, 3, start=3)
    assert verify(path).problems == []
    head_file(path).unlink()
    path.rename(path.with_name("audit.jsonl.2"))
    write(path, 3, start=6)
    assert verify(path).problems == []


@pytest.mark.parametrize("left", [b"", None], ids=["empty", "missing"])
@pytest.mark.parametrize("max_bytes", [1500, 6000], ids=["head-before-the-last-file", "head-in-the-last-file"])
def test_audit_killed_at_a_rotation_continues_chain(path: Path, max_bytes: int, left: bytes | None) -> None:
    """The head is older than the last entries: the process was killed before it waited for the disk."""
    write(path, 3)
    file = AuditFile(path, max_bytes)
    for number in range(20):
        file.append([{"time": 1010.0 + number, "action": "call", "job": f"job-{number}"}])
    file.rotate()
    file.close()  # without a wait for the disk
    path.unlink() if left is None else path.write_bytes(left)
    write(path, 1, start=30)
    assert verify(path).problems == []
    assert len([*search(path, {"job": "job-*"}, None)]) == 24


def test_audit_incomplete_line_is_reported_and_repaired(path: Path) -> None:
    write(path, 3)
    with path.open("ab") as file:
        file.write(b'{"entry":5,"time":"2026-11')
    report = verify(path)
    assert (report.problems, len(report.notes)) == ([], 1)
    write(path, 2, start=3)
    assert verify(path).problems == []
    [(entry, _)] = search(path, {"action": "audit-recovered"}, None)
    assert (entry["incomplete_line"], entry["bytes"]) == ('{"entry":5,"time":"2026-11', 26)


def test_audit_confirmed_entry_cut_in_the_middle_is_found(path: Path) -> None:
    write(path, 3)
    os.truncate(path, path.stat().st_size - 5)
    assert verify(path).problems == ["entry 4 was dropped at the end"]
    write(path, 2, start=3)
    assert verify(path).problems == ["entry 4 was dropped"]


def test_audit_second_writer_is_refused(path: Path) -> None:
    file = AuditFile(path, LARGE)
    with pytest.raises(AuditError, match="another process writes it"):
        AuditFile(path, LARGE)
    file.close()


def test_audit_symbolic_link_is_refused(path: Path) -> None:
    path.symlink_to(path.parent / "elsewhere")
    with pytest.raises(AuditError, match=r"audit\.jsonl: "):
        AuditFile(path, LARGE)
    assert not (path.parent / "elsewhere").exists()


def test_audit_digest_needs_the_key(path: Path) -> None:
    file, other = AuditFile(path, LARGE), AuditFile(path.with_name("other.jsonl"), LARGE)
    assert file.digest(b'["1234"]') != other.digest(b'["1234"]')
    digest = file.digest(b'["1234"]')
    file.close()
    other.close()
    file = AuditFile(path, LARGE)
    assert file.digest(b'["1234"]') == digest
    file.append([{"time": 1.0, "action": "call", "arguments": b'["1234"]'}])
    file.close()
    assert digest in path.read_text()
    assert "1234" not in path.read_text().replace(digest, "")


def test_audit_long_text_is_cut(path: Path) -> None:
    file = AuditFile(path, LARGE)
    file.append([{"time": 1.0, "action": "call", "host": "x" * 100_000 + "\x1b[31m"}])
    file.close()
    assert len(path.read_bytes()) < 1000
    assert "(100005 characters)" in path.read_text()


def test_audit_shared_file_has_one_chain(path: Path) -> None:
    files = [AuditFile(path, 3000, shared=True) for _ in range(3)]
    for number in range(60):
        files[number % 3].append([{"time": 1.0, "action": "call", "job": f"job-{number}"}])
        files[number * 2 % 3].sync()
        if number == 30:
            path.rename(path.with_name("audit.jsonl.1"))
    for file in files:
        file.sync()
        file.close()
    assert len([*path.parent.glob("audit.jsonl.*")]) > 2
    assert [entry["job"] for entry, _ in search(path, {"job": "*"}, None)] == [f"job-{number}" for number in range(60)]
    assert verify(path).problems == []


def test_audit_shared_file_is_left_as_soon_as_another_process_has_left_it(path: Path) -> None:
    first = AuditFile(path, LARGE, shared=True)
    first.append([{"time": 1.0, "action": "call", "job": "job-1"}])
    path.rename(path.with_name("audit.jsonl.1"))  # by logrotate
    second = AuditFile(path, LARGE, shared=True)
    first.append([{"time": 2.0, "action": "call", "job": "job-2"}])
    path.rename(path.with_name("audit.jsonl.2"))
    second.append([{"time": 3.0, "action": "call", "job": "job-3"}])
    second.append([{"time": 4.0, "action": "call", "job": "job-4"}])
    first.append([{"time": 5.0, "action": "call", "job": "job-5"}])
    for file in (first, second):
        file.sync()
        file.close()
    jobs = [entry["job"] for entry, _ in search(path, {"job": "*"}, None)]
    assert jobs == [f"job-{number}" for number in range(1, 6)]
    assert [json.loads(line).get("job") for line in path.read_bytes().splitlines()][1:] == ["job-3", "job-4", "job-5"]
    assert verify(path).problems == []


def replace_by_other(path: Path) -> None:
    """Put the longer file of another daemon in place."""
    other = path.parent / "other"
    other.mkdir()
    write(other / path.name, 20, start=50)
    (other / path.name).replace(path)


def replace_by_older(path: Path) -> None:
    (path.parent / "older").replace(path)


@pytest.mark.parametrize("replace", [replace_by_other, replace_by_older])
@pytest.mark.parametrize("is_open", [True, False], ids=["open", "closed"])
def test_audit_file_put_in_place_is_found(path: Path, replace: Callable[[Path], None], is_open: bool) -> None:
    write(path, 5)
    shutil.copy(path, path.parent / "older")
    file = AuditFile(path, LARGE)
    file.append([{"time": 1010.0, "action": "call"}] * 5)
    file.sync()
    if is_open:
        replace(path)
        file.reopen()
    else:
        file.close()
        replace(path)
        assert verify(path).problems, "before the daemon has continued"
        file = AuditFile(path, LARGE)
    file.append([{"time": 1020.0, "action": "call"}])
    file.sync()
    file.close()
    assert verify(path).problems
    [gap] = [entry for entry, _ in search(path, {"action": "audit-gap"}, None)]
    assert (gap["entry"], gap["expected"]) == (12, 11)
    write(path, 1)  # another start continues the chain
    assert len([*search(path, {"action": "audit-gap"}, None)]) == 1


def test_audit_chain_computed_again_is_found_by_the_head(path: Path) -> None:
    write(path, 5)
    lines, previous = [], "0" * 64
    for line in path.read_bytes().splitlines():
        entry = json.loads(line) | {"previous": previous}
        if entry.get("job") == "job-3":
            entry["job"] = "forged"
        lines.append(json.dumps(entry).encode())
        previous = hash_line(lines[-1])
    lines.append(json.dumps({**json.loads(lines[-1]), "entry": 7, "previous": previous}).encode())
    path.write_bytes(b"\n".join(lines) + b"\n")
    [problem] = verify(path).problems
    assert problem.startswith("entry 6 is not the one in the head file: ")


@pytest.mark.parametrize("name", ["audit.jsonl", "audit.jsonl.0000000005"])
def test_audit_pipe_in_place_of_a_file_is_an_error(path: Path, name: str) -> None:
    write(path, 5)
    file = path.with_name(name)
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with pytest.raises(OSError, match="not a regular file"):
        verify(path)
    if file == path:
        with pytest.raises(AuditError, match="not a regular file"):
            AuditFile(path, LARGE)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_checks_the_file_of_the_daemons_user(tmp_path: Path) -> None:
    """`harpcallerd --test` runs as root, the daemon does not."""
    file = tmp_path / "audit.jsonl"
    write(file, 1)
    os.chown(tmp_path, 1234, 1234)
    for path in tmp_path.iterdir():
        os.chown(path, 1234, 1234)
    check_usable(file)
    os.chown(file, 999, 999)
    with pytest.raises(AuditError, match="it belongs to uid 999"):
        check_usable(file)
