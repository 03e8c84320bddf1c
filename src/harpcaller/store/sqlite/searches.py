"""The verbs that find jobs by a filter. Each reads one snapshot, and looks at a limited number of entries."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from msgspec.structs import replace

from harp.protocol.json_text import Raw
from harpcaller.model.ids import is_job_id
from harpcaller.model.job_filters import JobFilter
from harpcaller.model.jobs import (
    PREVIEW_LENGTH,
    JobSummary,
    State,
    StopState,
    Subject,
)
from harpcaller.store.sqlite.file import MAX_INTEGER, QUERIES, snapshot
from harpcaller.store.sqlite.finding import (
    Range,
    Search,
    choose,
    conditions_of,
    cost,
    count_entries,
    ranges_of,
    ranges_of_owners,
)
from harpcaller.store.sqlite.rows import decode_name, decode_owner, encode_name

Permits: TypeAlias = Callable[[Subject], bool]

EXAMINED = 10_000  #: Maximum number of entries that one search looks at.
_PAYLOAD_BYTES = 8 * 1024 * 1024  # Approximate limit of the payloads that are searched.
_MAX_HOSTS_READ = 500  # Hosts that are compared with a pattern before the search; it is compared with each job, too.
_STEP = 100  # Jobs of which the subjects are read at a time.
_STEP_BYTES = 8 * 1024 * 1024  # Approximate limit of the payloads that are read for decisions.
_PREVIEW_BYTES = 4 * PREVIEW_LENGTH
_STATES = {state.value: state for state in State}


@dataclass(frozen=True, slots=True)
class Found:
    """The jobs that a search has found, and how far it went."""

    summaries: list[JobSummary]
    next: int | None  # sequence number after which the search continues
    complete: bool  # whether there are no further entries
    examined: int
    searched_to: float | None  # submission time of the last entry


def find_jobs(
    db: sqlite3.Connection,
    wanted: JobFilter,
    *,
    owners: Sequence[str] | None = None,
    permits: Permits | None = None,
    subject_bytes: int | None = None,
    newest_first: bool = True,
    after: int | None = None,
    limit: int = 50,
    examine: int = EXAMINED,
) -> Found:
    """Return the jobs that fit a filter, in the order of submission or newest first, after a sequence number.

    With `owners`, only their jobs are looked at. With `permits`, which is called in the reading thread, other jobs are
    left out and not counted as examined. With `subject_bytes`, the summaries have subjects whose payloads have at
    most this size.
    """
    with snapshot(db):
        walk = Walk(db, wanted, owners, newest_first, after, examine)
        if permits is None:
            seqs, place = walk.find(limit)
            examined, last = (len(seqs), seqs[-1] if seqs else None) if walk.fits_all else walk.measure(place)
        else:
            seqs, place = find_permitted(db, walk, limit, permits, subject_bytes or 0)
            examined, last = len(seqs), seqs[-1] if seqs else None
        summaries = _read_summaries(db, seqs, subject_bytes)
        if last is not None and summaries and summaries[-1].seq == last:
            searched_to: float | None = summaries[-1].submitted
        else:
            searched_to = None if last is None else _submitted(db, last)
    return Found(summaries, place, place is None, examined, searched_to)


class Walk:
    """The entries that a search looks at: at most `examine`, after the sequence number `after` if it is given."""

    def __init__(
        self,
        db: sqlite3.Connection,
        wanted: JobFilter,
        owners: Sequence[str] | None,
        newest_first: bool,
        after: int | None,
        examine: int,
    ) -> None:
        self._db, self._newest_first = db, newest_first
        self._low, self._high = find_bounds(db, wanted)
        if after is not None and newest_first:
            self._high = min(self._high, after - 1)
        elif after is not None:
            self._low = max(self._low, min(after, MAX_INTEGER - 1) + 1)
        if owners is not None:
            # The number of other jobs must not show, also not by the time.
            self._range = ranges_of_owners(owners)
            examine = max(1, examine // self._cost_of(self._range, wanted, owners))
        else:
            ranges = ranges_of(_expand(db, wanted))
            cost_of = partial(self._cost_of, wanted=wanted, owners=None)
            self._range, examine = choose(ranges, cost_of, self._count, examine)
        self._search = Search.of(wanted, self._range, owners)
        self._examine = examine
        self._is_bounded = False
        #: The last entry that is looked at if there are more; None: all of them are, or as many as are wanted fit.
        self.end: int | None = None

    @property
    def fits_all(self) -> bool:
        """Whether every entry fits, because there are no conditions."""
        return not self._search.conditions.texts

    def _bound(self) -> None:
        """Look at a limited number of entries."""
        if not self._is_bounded:
            self._is_bounded = True
            self.end = self._find_end(self._examine)
            if self.end is not None:
                self._stop_at(self.end)

    @staticmethod
    def _cost_of(looked_at: Range, wanted: JobFilter, owners: Sequence[str] | None) -> int:
        return cost(looked_at, Search.of(wanted, looked_at, owners).conditions)

    def _count(self, counted: Range, limit: int) -> int:
        if not counted.entries:
            return 0
        parameters = {"low": self._low, "high": self._high, "limit": limit}
        [(number,)] = self._db.execute(count_entries(counted), {**counted.values, **parameters})
        return int(number)

    def _find_end(self, examine: int) -> int | None:
        last_and_next = self._run(self._range.select("seq", self._newest_first), 2, examine - 1)
        return last_and_next[0][0] if len(last_and_next) == 2 else None

    def _stop_at(self, seq: int) -> None:
        if self._newest_first:
            self._low = seq
        else:
            self._high = seq

    def _run(self, statement: str, limit: int, offset: int = 0) -> list[Any]:
        if not self._range.entries:
            return []
        parameters = {"low": self._low, "high": self._high, "limit": limit, "offset": offset}
        return self._db.execute(statement, {**self._search.values, **parameters}).fetchall()

    def find(self, limit: int) -> tuple[list[int], int | None]:
        """Return at most `limit` jobs that fit, and the last entry that was looked at if there are more."""
        if not self.fits_all or limit >= self._examine:
            self._bound()
        if self._search.conditions.read_payloads:
            return self._find_in_payloads(limit)
        seqs = [seq for (seq,) in self._run(self._search.select(self._newest_first), limit + 1)]
        return (seqs[:limit], seqs[limit - 1]) if len(seqs) > limit else (seqs, self.end)

    def _find_in_payloads(self, limit: int) -> tuple[list[int], int | None]:
        """Search as `find` does; end it when the payloads that were read are long."""
        found: list[int] = []
        room = _PAYLOAD_BYTES
        place = None
        if not self._range.entries:
            return found, None
        parameters = {"low": self._low, "high": self._high, "limit": -1}
        rows = self._db.execute(self._search.select_checked(self._newest_first), {**self._search.values, **parameters})
        with closing(rows):
            for seq, size, fits in rows:
                if place is not None:
                    return found, place
                room -= size
                if fits:
                    found.append(seq)
                if len(found) == limit or room <= 0:
                    place = seq  # if there is another entry
        return found, self.end

    def measure(self, place: int | None) -> tuple[int, int | None]:
        """Return the number of the entries up to a place, or of all, and the last of them."""
        if place is not None:
            self._stop_at(place)
        last = "min(seq)" if self._newest_first else "max(seq)"
        for count, seq in self._run(self._range.select(f"count(*), {last}", self._newest_first), -1):
            return count, seq
        return 0, None

    def count_values(self, column: str) -> tuple[dict[Any, int], bool]:
        """Return the values of a column of the jobs that fit, and their numbers; and whether there are more jobs."""
        self._bound()
        if self._search.conditions.read_payloads:
            seqs, place = self._find_in_payloads(MAX_INTEGER)
            return count_values_of(self._db, seqs, column), place is not None
        return dict(self._run(self._search.select_values(column), -1)), self.end is not None


def find_bounds(db: sqlite3.Connection, wanted: JobFilter) -> tuple[int, int]:
    """Return the first and last sequence number that a job can have by the times of a filter.

    A binary search finds them, because jobs are submitted in the order of time, apart from the disorder of the clock.
    No job starts or ends before its submission.
    """
    since = wanted.submitted.since
    untils = [span.until for span in (wanted.submitted, wanted.started, wanted.ended) if span.until is not None]
    if since is None and not untils:
        return 0, MAX_INTEGER
    [(first, last, disorder)] = db.execute(QUERIES["bounds"]).fetchall()
    if first is None:
        return 0, MAX_INTEGER
    low, high = 0, MAX_INTEGER
    if since is not None:
        low = _search(db, first, last, since - disorder)
    if untils:
        high = _search(db, first, last, min(untils) + disorder)
    return low, high


def _search(db: sqlite3.Connection, first: int, last: int, time: float) -> int:
    """Return the sequence number of the first job that was submitted at a time or later, by a binary search.

    This is exact if the times are in the order of submission. Otherwise it is exact for some order of the times, and
    `find_bounds` adds their disorder.
    """
    low, high = first, last + 1
    while low < high:
        middle = (low + high) // 2
        [(seq, submitted)] = db.execute(QUERIES["submitted_from"], (middle,)).fetchall()
        if submitted < time:
            low = seq + 1
        else:
            high = middle
    return low


def _expand(db: sqlite3.Connection, wanted: JobFilter) -> JobFilter:
    """Return a filter with the hosts that have jobs and match the pattern, if few hosts are to be compared.

    If no such host has jobs, the filter has a name that matches the pattern, and finds nothing.
    """
    if wanted.host_pattern is None:
        return wanted
    start, _, end = wanted.host_pattern.partition("*")
    head, tail = encode_name(start), encode_name(end)
    hosts: list[str] = []
    name = head
    statement = QUERIES["first_host"]
    for _ in range(_MAX_HOSTS_READ):
        row = db.execute(statement, (name,)).fetchone()
        if row is None or not row[0].startswith(head):
            return replace(wanted, hosts=tuple(hosts) or (start + end,))
        name, statement = row[0], QUERIES["next_host"]
        if len(name) >= len(head) + len(tail) and name.endswith(tail):
            hosts.append(decode_name(name))
    return wanted


def find_permitted(
    db: sqlite3.Connection, walk: Walk, limit: int, permits: Permits, subject_bytes: int
) -> tuple[list[int], int | None]:
    """Return at most `limit` jobs of a walk that are permitted, and where to continue."""
    permitted: list[int] = []
    seqs, end = walk.find(MAX_INTEGER - 1)
    room = _STEP_BYTES
    for start in range(0, len(seqs), _STEP):
        step = seqs[start : start + _STEP]
        subjects = _read_subjects(db, step, subject_bytes)
        for seq in step:
            if seq in subjects and permits(subjects[seq]):
                if len(permitted) == limit:
                    return permitted, permitted[-1]
                permitted.append(seq)
            if seq in subjects:
                room -= len(subjects[seq].arguments)
        if room <= 0 and start + _STEP < len(seqs):
            return permitted, step[-1]
    return permitted, end


def get_summaries(
    db: sqlite3.Connection, job_ids: Sequence[str], *, subject_bytes: int | None = None
) -> list[JobSummary]:
    """Return the summaries of these jobs, in the order of submission; unknown ones are missing."""
    with snapshot(db):
        seqs: list[int] = []
        for job_id in filter(is_job_id, job_ids):
            seqs += [seq for (seq,) in db.execute(QUERIES["find_job"], (job_id,)).fetchall()]
        return _read_summaries(db, sorted(set(seqs)), subject_bytes)


def select_jobs(db: sqlite3.Connection, wanted: JobFilter, job_ids: Sequence[str]) -> frozenset[str]:
    """Return which of these jobs fit a filter."""
    conditions = conditions_of(wanted)
    ids = {f"id{number}": job_id for number, job_id in enumerate(filter(is_job_id, job_ids))}
    statement = (
        f"SELECT jobs.id FROM jobs CROSS JOIN calls ON calls.job = jobs.seq "
        f"WHERE jobs.id IN ({', '.join(':' + name for name in ids)}) AND {conditions}"
    )
    return frozenset(job_id for (job_id,) in db.execute(statement, {**conditions.values, **ids}).fetchall())


def count_values_of(db: sqlite3.Connection, seqs: Sequence[int], column: str) -> dict[Any, int]:
    """Return the values of a column of some jobs, and how many of them have each."""
    values: Counter[Any] = Counter()
    for start in range(0, len(seqs), _STEP):
        step = seqs[start : start + _STEP]
        statement = (
            f"SELECT {column} FROM jobs CROSS JOIN calls ON calls.job = jobs.seq WHERE jobs.seq IN ({_marks(step)})"
        )
        values.update(value for (value,) in db.execute(statement, step))
    return values


def _submitted(db: sqlite3.Connection, seq: int) -> float | None:
    for (submitted,) in db.execute("SELECT submitted FROM jobs WHERE seq = ?", (seq,)):
        return float(submitted)
    return None


def _read_subjects(db: sqlite3.Connection, seqs: Sequence[int], max_bytes: int) -> dict[int, Subject]:
    statement = QUERIES["get_subjects"].replace(":seqs", _marks(seqs))
    subjects: dict[int, Subject] = {}
    for seq, owner, host, procedure, arguments, length, queue, is_refused in db.execute(statement, seqs).fetchall():
        if arguments is None:
            arguments = _read_start(db, "arguments", seq, min(length, max_bytes))
        names = decode_owner(owner), decode_name(host), decode_name(procedure)
        queue_name = None if queue is None else Raw(queue)
        subjects[seq] = Subject(*names, Raw(arguments[:max_bytes]), queue_name, bool(is_refused))
    return subjects


def _read_summaries(db: sqlite3.Connection, seqs: Sequence[int], subject_bytes: int | None) -> list[JobSummary]:
    """Return the summaries of jobs in the order of their sequence numbers `seqs`."""
    found: dict[int, JobSummary] = {}
    for start in range(0, len(seqs), _STEP):
        step = seqs[start : start + _STEP]
        subjects = {} if subject_bytes is None else _read_subjects(db, step, subject_bytes)
        statement = QUERIES["get_summaries"].replace(":seqs", _marks(step))
        for row in db.execute(statement, step).fetchall():
            found[row[0]] = _decode_summary(db, row, subjects.get(row[0]))
    return [found[seq] for seq in seqs if seq in found]


def _decode_summary(db: sqlite3.Connection, row: Sequence[Any], subject: Subject | None) -> JobSummary:
    seq, job_id, state, host, procedure, queue_id, queue, owner, submitted, started, ended, records, *others = row
    end_type, end_message, stop, holds_slot, arguments, info, rerun_of = others
    if arguments is None:
        arguments = _read_start(db, "arguments", seq, _PREVIEW_BYTES)
    if info is None:
        info = _read_start(db, "info", seq, _PREVIEW_BYTES)
    return JobSummary(  # positional: with names it takes twice as long
        seq,
        job_id,
        _STATES[state],
        decode_name(host),
        decode_name(procedure),
        queue_id,
        None if queue is None else Raw(queue),
        decode_owner(owner),
        submitted,
        started,
        ended,
        records,
        None if end_type is None else decode_name(end_type),
        None if end_message is None else decode_name(end_message),
        None if stop is None else StopState(stop),
        bool(holds_slot),
        _preview(arguments),
        _preview(info),
        rerun_of,
        None,
        subject,
    )


def _preview(text: bytes) -> str:
    return text[:_PREVIEW_BYTES].decode("utf-8", "ignore")[:PREVIEW_LENGTH]


def _read_start(db: sqlite3.Connection, column: str, seq: int, size: int) -> bytes:
    """Return the beginning of a long payload, without reading the whole of it."""
    with db.blobopen("calls", column, seq, readonly=True) as blob:
        return blob.read(size)


def _marks(seqs: Sequence[int]) -> str:
    return ", ".join("?" * len(seqs))
