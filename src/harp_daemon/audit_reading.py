"""Reads audit files: proves that they are complete, and finds entries.

`verify` first compares each line with the hash in the line after it. Only after a difference are all lines compared, to
find out what has happened: a line is as it was written if the line after it, or the head, has its hash.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple

from harp_daemon.audit_file import (
    FIRST_HASH,
    NEW_FILE,
    NO_ENTRY,
    Line,
    Position,
    hash_line,
    open_files,
    parse_line,
    read_head,
    read_lines,
)

_MAX_PAGE = 1024 * 1024  #: Bytes that one page reads; a thread needs about 50 ms for them.
_BLOCK = 64 * 1024  #: Bytes that are read at once.


@dataclass
class Report:
    """What `verify` has found."""

    first: int = 0  #: The number of the first entry; 0: there are no entries.
    last: Position = NO_ENTRY  #: The last entry.
    last_time: str = ""  #: Its time.
    problems: list[str] = field(default_factory=list)  #: Each changed, dropped, inserted or moved line.
    notes: list[str] = field(default_factory=list)  #: What an auditor has to know beside them.


@dataclass(frozen=True, slots=True)
class _Found:
    """A line: its entry number (None: it is not an entry), the hash in it, and its own hash."""

    where: str
    entry: int | None
    previous: str
    hash: str


def verify(path: Path, known: Position | None = None) -> Report:
    """Compare all lines of an audit file and of the files before it. Raises OSError.

    `known` is an entry of which the number and hash are known from an earlier report: it must still be there.
    """
    head = read_head(path)  # before the lines: entries that are written in between are after it
    report = Report()
    found: list[_Found] = []
    intact, expected, at_known, has_head = True, NO_ENTRY, None, False
    for line in read_lines(path):
        entry, is_fragment = parse_line(line.text), not line.is_complete
        if is_fragment and entry is None:
            report.notes.append(
                f"{_where(line)}: an incomplete line at the end: it is being written, or the daemon died"
            )
            continue
        number = None if entry is None else int(entry["entry"])
        one = _Found(_where(line), number, "" if entry is None else entry["previous"], hash_line(line.text))
        found.append(one)
        if len(found) == 1 and number is not None:
            expected = Position(number - 1, FIRST_HASH if number == 1 else one.previous)
            if number > 1 and entry is not None and entry.get("action") != NEW_FILE:
                report.problems.append(f"{one.where}: entries before {number} were dropped")
        intact = intact and number == expected.entry + 1 and one.previous == expected.hash
        expected = Position(expected.entry + 1, one.hash)
        if known is not None and number == known.entry and one.hash == known.hash:
            at_known = number
        has_head = has_head or (head is not None and (number, one.hash) == head)
        if entry is not None:
            report.last_time = str(entry.get("time", ""))
    numbers = [one.entry for one in found if one.entry is not None]
    report.first = min(numbers, default=0)
    report.last = expected if intact else Position(max(numbers, default=0), "")
    if head is None:
        report.notes.append("there is no head file: entries that were dropped at the end cannot be found")
    elif intact and head.entry == expected.entry:
        intact = head.hash == expected.hash
    elif intact and head.entry > expected.entry:
        report.problems.append(_dropped(expected.entry + 1, head.entry, "at the end"))
    elif intact and head.entry >= report.first and not has_head:  # all hashes were computed again
        others = "all lines were written anew, or they are of another daemon"
        report.problems.append(f"entry {head.entry} is not the one in the head file: {others}")
    if not intact:
        report.problems += _find_differences(found, head)
    if known is not None and at_known is None:
        report.problems.append(f"entry {known.entry} with the hash {known.hash} is not there")
    if report.first > 1 and not report.problems:
        report.notes.append(f"entries 1 to {report.first - 1} are in no file here")
    return report


def _find_differences(found: list[_Found], head: Position | None) -> list[str]:
    """Return what was done to the lines, in the order of entries; `head` is the position on stable storage."""
    candidates: dict[int, list[_Found]] = {}
    for one in found:
        if one.entry is not None:
            candidates.setdefault(one.entry, []).append(one)
    last = max([*candidates, head.entry if head else 0])
    if head is not None and last > head.entry + len(found):  # a number that was changed
        last = head.entry
    first = min(candidates, default=1)
    original: dict[int, _Found] = {}
    problems: list[tuple[int, str]] = []
    missing: list[int] = []
    known_hash = head.hash if head is not None and head.entry == last else None
    for number in range(last, first - 1, -1):
        same = candidates.get(number, [])
        right = [one for one in same if one.hash == known_hash]
        chosen = right[0] if right else same[0] if same else None
        if head is not None and head.entry == number and known_hash is None:
            known_hash = head.hash
        if chosen is None:
            missing.append(number)
            known_hash = None
            continue
        original[number] = chosen
        if known_hash is not None and not right:
            problems.append((number, f"{chosen.where}: entry {number} was changed"))
        # The hash in a changed line may be changed, too; then a single line before it is not accused.
        known_hash = (
            chosen.previous if right or known_hash is None else _if_found(chosen.previous, candidates, number - 1)
        )
    taken = {id(one) for one in original.values()}
    others = [one for one in found if id(one) not in taken]
    places = {id(one): index for index, one in enumerate(found)}
    for other in others:
        before = found[places[id(other)] - 1] if places[id(other)] else None
        gap = None if before is None or before.entry is None else before.entry + 1
        if gap in missing:  # its number was changed, or it is no entry any more
            missing.remove(gap)
            problems.append((gap, f"{other.where}: entry {gap} was changed"))
        else:
            number = other.entry or (gap or first)
            problems.append((number, f"{other.where}: a line was inserted"))
    for start, end in _ranges(sorted(missing)):
        problems.append((start, _dropped(start, end, "")))
    latest = 0
    for one in found:
        if id(one) in taken and one.entry is not None:
            if one.entry < latest:
                problems.append((one.entry, f"{one.where}: entry {one.entry} was moved: it is after entry {latest}"))
            latest = max(latest, one.entry)
    if not problems:
        problems.append((first, "the hash of entry 1 does not begin a chain"))
    return [text for _, text in sorted(problems)]


def _if_found(hash: str, candidates: Mapping[int, list[_Found]], number: int) -> str | None:
    return hash if any(one.hash == hash for one in candidates.get(number, [])) else None


def _ranges(numbers: list[int]) -> Iterator[tuple[int, int]]:
    start = None
    for index, number in enumerate(numbers):
        start = number if start is None else start
        if index + 1 == len(numbers) or numbers[index + 1] != number + 1:
            yield start, number
            start = None


def _dropped(first: int, last: int, where: str) -> str:
    entries = f"entry {first} was" if first == last else f"entries {first} to {last} were"
    return f"{entries} dropped{' ' if where else ''}{where}"


def _where(line: Line) -> str:
    return f"{line.file}:{line.number}"


class Cursor(NamedTuple):
    """Where a page ends: before a byte of the file whose first entry has this number, and the hash expected there."""

    first: int
    offset: int
    hash: str


@dataclass
class Page:
    """Entries of an audit file, the newest first."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    next: Cursor | None = None  #: Where to continue; None: there are no older entries here.
    examined: int = 0  #: Number of lines that were looked at.
    searched_to: str | None = None  #: The time of the last one.
    problem: str | None = None  #: Why these lines are not as they were written; None: each has the hash after it.
    head: Position = NO_ENTRY  #: The last entry on stable storage.
    omitted: int = 0  #: Number of compressed files with older entries, which are not read.


def read_page(
    path: Path,
    globs: Mapping[str, str],
    since: str | None = None,
    until: str | None = None,
    cursor: Cursor | None = None,
    limit: int = 100,
) -> Page:
    """Return up to `limit` entries whose fields match globs, from the newest one, or from a cursor. Raises OSError.

    It reads a limited number of bytes: a page may have fewer entries, or none, although there are more. The hashes of
    all lines that it reads are compared, also with the one that a cursor has from the page before.
    """
    page = Page(head=read_head(path) or NO_ENTRY)
    with ExitStack() as stack:
        plain: list[tuple[int, IO[bytes]]] = []
        for name, file in open_files(path):
            stack.enter_context(file)
            if name.suffix == ".gz":
                page.omitted += 1
            else:
                line = parse_line(file.readline(_MAX_PAGE).rstrip(b"\n"))
                plain.append((1 << 62 if line is None else int(line["entry"]), file))
        if cursor is not None:
            plain = [each for each in plain if each[0] <= cursor.first]
        later = Position(0, cursor.hash) if cursor is not None else NO_ENTRY  # what the next line is compared with
        room = _MAX_PAGE
        while plain:
            first, file = plain.pop()
            end = file.seek(0, os.SEEK_END)
            if cursor is not None and cursor.first == first:
                end = min(end, cursor.offset)
            for start, text in _read_backward(file, end):
                room -= end - start
                end = start
                entry = parse_line(text)
                page.examined += 1
                later = _compare(page, text, entry, later)
                if entry is not None:
                    page.searched_to = time = str(entry.get("time", ""))
                    if since is not None and time < since:
                        return page
                    is_in_time = until is None or time <= until
                    if is_in_time and all(_matches(entry, key, glob) for key, glob in globs.items()):
                        page.entries.append(entry)
                if room <= 0 or len(page.entries) >= limit:
                    page.next = Cursor(first, end, later.hash) if end > 0 or plain else None
                    return page
    return page


def _read_backward(file: IO[bytes], end: int) -> Iterator[tuple[int, bytes]]:
    """Yield start and text of each line before a byte, the last one first.

    A line without a line feed at the end of the file is being written: it is left out.
    """
    text, begin, stop = b"", end, 0  # the lines in `text[:stop]`, which begins at `begin`, are still to be yielded
    has_end = False  # whether the end of the last line was found
    while True:
        cut = text.rfind(b"\n", 0, stop - 1) if stop else -1
        if cut >= 0 or (stop and (begin == 0 or stop > _MAX_PAGE)):  # a line that is too long is yielded in parts
            yield begin + cut + 1, text[cut + 1 : stop - 1]
            stop = cut + 1
        elif begin == 0:
            return
        else:
            size = min(_BLOCK, begin)
            begin -= size
            text = os.pread(file.fileno(), size, begin) + text[:stop]
            stop = len(text) if has_end else text.rfind(b"\n") + 1
            has_end = has_end or stop > 0


def _compare(page: Page, text: bytes, entry: Mapping[str, Any] | None, later: Position) -> Position:
    """Compare a line with the hash in the line after it, or in the head; return what the line before is compared to."""
    found = hash_line(text)
    number = 0 if entry is None else int(entry["entry"])
    if later.hash != FIRST_HASH and later.hash != found:
        page.problem = page.problem or f"the line before entry {later.entry or 'of the page before'} was changed"
    if page.head.entry == number != 0 and page.head.hash != found:
        page.problem = page.problem or f"entry {number} was changed"
    if page.examined == 1 and later == NO_ENTRY and number < page.head.entry:
        page.problem = page.problem or _dropped(number + 1, page.head.entry, "at the end")
    return Position(number, FIRST_HASH if entry is None else entry["previous"])


def search(path: Path, globs: Mapping[str, str], since: str | None) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the entries whose fields match globs, and that are not before a time, with their lines. Raises OSError.

    A glob has ``*`` and ``?``. One for ``principal`` also matches owners of jobs, and who has ended a job.
    """
    for line in read_lines(path):
        entry = parse_line(line.text)
        if entry is None or (since is not None and str(entry.get("time", "")) < since):
            continue
        if all(_matches(entry, key, glob) for key, glob in globs.items()):
            yield entry, line.text


def _matches(entry: Mapping[str, Any], key: str, glob: str) -> bool:
    keys = ("principal", "owner", "by") if key == "principal" else (key,)
    return any(fnmatchcase(str(entry[one]), glob.replace("[", "[[]")) for one in keys if one in entry)
