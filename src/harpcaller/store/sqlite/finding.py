"""How jobs are found by a filter: which index is read, and which conditions are checked. Pure: SQL as text.

Theory of operation. A list is a walk along one index in the order of submission, from a place on. Each part of a filter
may have an index that contains all jobs that fit it, a `Range`. `choose` takes the shortest one; its entries are
checked for the conditions of all parts. A search looks at fewer entries if each costs more. Statements are put together
from fixed pieces; every value is a parameter.

- The indexes of jobs that have not ended, have not returned, were stopped or hold a slot are partial, so they are
  short. Those of queues, procedures, hosts and owners have all of their jobs.
- The index of ids and that of ends are not in the order of submission. They are used if they have few entries for a
  filter, which are sorted.
- A filter without such a part, or with too many values, walks along all jobs.

Conditions read columns of the index, then the row of the job, and at last the row of its call, which may be long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harpcaller.model.job_filters import BAD, NO_QUEUE, OPEN, JobFilter, Span
from harpcaller.model.jobs import ENDED, State
from harpcaller.store.sqlite.rows import encode_name

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_MAX_MERGED = 16  # Each entry passes through as many steps as there are indexes.
_FEW = 200  # A range with fewer entries is used without a look at the other ones.
_COLUMN = re.compile(r"\bjobs\.(\w+)")
_NAMED = "calls AS named INDEXED BY calls_of_procedure"
_ID_INDEX = "sqlite_autoindex_jobs_1"


@dataclass(slots=True)
class Conditions:
    """Conditions on a job, and their parameters by name. `read_payloads`: they read arguments or info."""

    texts: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    read_payloads: bool = False

    def add(self, text: str, *values: Any) -> None:
        """Add a condition in which each ``?`` stands for one of the values."""
        for value in values:
            name = f"p{len(self.values)}"
            self.values[name] = value
            text = text.replace("?", f":{name}", 1)
        self.texts.append(text)

    def add_any(self, column: str, values: Sequence[Any]) -> None:
        """Add that a column has one of these values."""
        if values:
            self.add(f"{column} IN ({', '.join('?' * len(values))})", *values)

    def add_span(self, column: str, span: Span) -> None:
        """Add that a time is in a span."""
        if span.since is not None:
            self.add(f"{column} >= ?", span.since)
        if span.until is not None:
            self.add(f"{column} < ?", span.until)

    def __str__(self) -> str:
        return " AND ".join(self.texts) or "TRUE"


def conditions_of(wanted: JobFilter, of_calls: bool = False, owners: Sequence[str] | None = None) -> Conditions:
    """Return the conditions of a filter on entries of the table of jobs, or of calls.

    With `owners`, only their jobs fit it.
    """
    found = Conditions()
    if owners is not None:
        found.add_any("jobs.owner", list(map(encode_name, owners)))
    if wanted.states == ENDED:
        found.add("jobs.ended IS NOT NULL")
    elif wanted.states and wanted.states != frozenset(State):
        found.add_any("jobs.state", sorted(wanted.states))
    found.add_any("jobs.host", list(map(encode_name, wanted.hosts)))
    if wanted.host_pattern is not None:
        _add_pattern(found, wanted.host_pattern)
    found.add_any("jobs.owner", list(map(encode_name, wanted.owners)))
    if wanted.queue == NO_QUEUE:
        found.add("jobs.lane < 'queue:'")
    elif wanted.queue is not None:
        found.add("jobs.lane = ? AND jobs.lane >= 'queue:'", f"queue:{wanted.queue}")
    found.add_span("jobs.submitted", wanted.submitted)
    found.add_span("jobs.started", wanted.started)
    found.add_span("jobs.ended", wanted.ended)
    found.add_any("jobs.end_type", list(map(encode_name, wanted.end_types)))
    found.add_any("jobs.stop", sorted(wanted.stops))
    if wanted.holds_slot is not None:
        found.add("jobs.holds_slot = ?", wanted.holds_slot)
    if wanted.id_start is not None:
        found.add("jobs.id >= ? AND jobs.id < ?", wanted.id_start, wanted.id_start + "g")
    if wanted.procedures:
        marks, names = ", ".join("?" * len(wanted.procedures)), map(encode_name, wanted.procedures)
        if of_calls:
            found.add(f"calls.procedure IN ({marks})", *names)
        else:  # in the index, which is denser than the table
            index = f"{_NAMED} WHERE named.procedure IN ({marks})"
            found.add(f"EXISTS (SELECT 1 FROM {index} AND named.job = jobs.seq)", *names)
    if wanted.rerun_of is not None:
        found.add("calls.rerun_of = ?", wanted.rerun_of)
    for column, text in (("calls.info", wanted.info), ("calls.arguments", wanted.arguments)):
        if text is not None:
            needles = list(dict.fromkeys(map(encode_name, _spellings(text))))
            found.add("(" + " OR ".join(f"instr({column}, ?)" for _ in needles) + ")", *needles)
            found.read_payloads = True
    for word in wanted.text:
        _add_word(found, word)
        found.read_payloads = True
    return found


def _add_pattern(found: Conditions, pattern: str) -> None:
    start, _, end = pattern.partition("*")
    head, tail = encode_name(start), encode_name(end)
    found.add("length(jobs.host) >= ?", len(head) + len(tail))
    if head:
        found.add("substr(jobs.host, 1, ?) = ?", len(head), head)
    if tail:
        found.add("substr(jobs.host, -?) = ?", len(tail), tail)


def _add_word(found: Conditions, word: str) -> None:
    """Add that a word is in one of the texts of a job, without regard to the case of ASCII letters."""
    escaped = {json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1], word}
    in_names, in_info = encode_name(word).lower(), sorted({encode_name(text).lower() for text in escaped})
    parts = [f"instr({_lower(column)}, ?)" for column in ("jobs.host", "calls.procedure", "jobs.end_message")]
    parts += [f"instr({_lower('calls.info')}, ?)"] * len(in_info)
    found.add("(" + " OR ".join(parts) + ")", in_names, in_names, in_names, *in_info)


def _lower(column: str) -> str:
    return f"CAST(lower(CAST({column} AS TEXT)) AS BLOB)"


def _spellings(text: str) -> tuple[str, str, str]:
    """Return a part of a JSON text as it may be written: its characters, or their escape sequences in two cases."""
    escaped = _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text)
    upper = _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1].upper().replace("\\U", "\\u"), text)
    return text, escaped, upper


@dataclass(frozen=True, slots=True)
class Entries:
    """Entries of an index. Its order is that of submission if `is_ordered`."""

    source: str  # the table, and its index
    condition: str = "TRUE"  # which entries
    values: Mapping[str, Any] = field(default_factory=dict)  # the parameters of the condition
    seq: str = "jobs.seq"
    is_ordered: bool = True

    @property
    def has_calls(self) -> bool:
        """Whether they are entries of the table of calls."""
        return self.source.startswith("calls")

    @property
    def columns(self) -> frozenset[str] | None:
        """The columns of jobs that the index has; None: all."""
        index = self.source.partition(" INDEXED BY ")[2]
        return _COLUMNS[index] if index else None


@dataclass(frozen=True, slots=True)
class Range:
    """The entries that a walk looks at: those of one or several indexes, without duplicates."""

    name: str
    entries: tuple[Entries, ...]

    @property
    def values(self) -> dict[str, Any]:
        """The parameters of the entries, by name."""
        return {name: value for each in self.entries for name, value in each.values.items()}

    def needs_rows(self, columns: set[str]) -> bool:
        """Return whether an index lacks one of these columns of jobs."""
        return any(each.columns is not None and not columns <= each.columns for each in self.entries)

    @property
    def is_ordered(self) -> bool:
        """Whether the entries are in the order of submission."""
        return all(each.is_ordered for each in self.entries)

    def select(self, what: str, newest_first: bool) -> str:
        """Return a statement for the entries between `low` and `high`: after `offset`, at most `limit`."""
        parts = [
            f"SELECT {each.seq} AS seq FROM {each.source} WHERE {each.condition} AND {each.seq} BETWEEN :low AND :high"
            for each in self.entries
        ]
        return f"SELECT {what} FROM ({_merge(parts, newest_first)} LIMIT :limit OFFSET :offset)"


#: The columns of jobs in each index.
_COLUMNS: Mapping[str, frozenset[str]] = {
    "jobs_queued": frozenset({"seq", "host", "state"}),
    "jobs_queued_of_lane": frozenset({"seq", "lane", "state", "owner"}),
    "jobs_holding": frozenset({"seq", "lane", "host", "state", "holds_slot"}),
    "jobs_not_returned": frozenset({"seq", "state", "host", "end_type", "owner", "lane", "submitted", "ended"}),
    "jobs_stopped": frozenset({"seq", "stop", "state", "host", "end_type"}),
    "jobs_ended": frozenset({"seq", "ended", "state"}),
    "jobs_of_host": frozenset({"seq", "host"}),
    "jobs_of_owner": frozenset({"seq", "owner"}),
    "jobs_of_queue": frozenset({"seq", "lane"}),
    "calls_of_procedure": frozenset({"seq"}),
    "calls_rerun_of": frozenset({"seq"}),
    _ID_INDEX: frozenset({"seq", "id"}),
}
#: How much an entry costs if the conditions need its row, its procedure or its payloads, and how many are looked at.
_ENTRY, _PROCEDURE, _ROW, _PAYLOADS = 1, 3, 6, 15

ALL_JOBS = Range("jobs", (Entries("jobs NOT INDEXED"),))
NO_JOBS = Range("none", ())
_NOT_RETURNED = "jobs.ended IS NOT NULL AND jobs.state <> 'returned'"  # the condition of the index, to the letter
_INDEXES_OF_STATES = {
    State.QUEUED: ("jobs_queued", "jobs.state = 'queued'"),
    State.RUNNING: ("jobs_holding", "jobs.holds_slot = 1 AND jobs.state = 'running'"),
    State.RAISED: ("jobs_not_returned", f"jobs.state = 'raised' AND {_NOT_RETURNED}"),
    State.FAILED: ("jobs_not_returned", f"jobs.state = 'failed' AND {_NOT_RETURNED}"),
    State.CANCELLED: ("jobs_not_returned", f"jobs.state = 'cancelled' AND {_NOT_RETURNED}"),
}


def ranges_of(wanted: JobFilter) -> list[Range]:
    """Return the ranges of which each contains all jobs that fit a filter. The preferred one is the first."""
    found: list[Range] = []

    def add(name: str, index: str, column: str, values: Iterable[Any], extra: str = "", **options: Any) -> None:
        parts = []
        table = column.partition(".")[0]
        for number, value in enumerate(values):
            parameter = f"{name}{number}"
            condition = f"{column} = :{parameter}{extra}"
            parts.append(Entries(f"{table} INDEXED BY {index}", condition, {parameter: value}, **options))
        if 0 < len(parts) <= _MAX_MERGED:
            found.append(Range(name, tuple(parts)))

    if wanted.id_start is not None:
        values = {"id_from": wanted.id_start, "id_to": wanted.id_start + "g"}
        entries = Entries(f"jobs INDEXED BY {_ID_INDEX}", "jobs.id >= :id_from AND jobs.id < :id_to", values)
        found.append(Range("id", (replace(entries, is_ordered=False),)))
    if wanted.rerun_of is not None:
        add("rerun_of", "calls_rerun_of", "calls.rerun_of", [wanted.rerun_of], seq="calls.job")
    if wanted.holds_slot:
        found.append(Range("holding", (Entries("jobs INDEXED BY jobs_holding", "jobs.holds_slot = 1"),)))
    states = wanted.states or frozenset(State)
    if wanted.end_types:
        states &= BAD
    if not states:
        return [NO_JOBS]
    if wanted.queue not in (None, NO_QUEUE) and states <= OPEN:
        values = {"lane": f"queue:{wanted.queue}"}
        queued = Entries("jobs INDEXED BY jobs_queued_of_lane", "jobs.lane = :lane AND jobs.state = 'queued'", values)
        running = f"{_INDEXES_OF_STATES[State.RUNNING][1]} AND jobs.lane = :lane"
        found.append(Range("open_of_queue", (queued, Entries("jobs INDEXED BY jobs_holding", running, values))))
    add("stop", "jobs_stopped", "jobs.stop", sorted(wanted.stops))
    if State.RETURNED not in states:
        indexes = [_INDEXES_OF_STATES[state] for state in sorted(states)]
        found.append(Range("states", tuple(Entries(f"jobs INDEXED BY {name}", text) for name, text in indexes)))
    if wanted.queue not in (None, NO_QUEUE):
        add("queue", "jobs_of_queue", "jobs.lane", [f"queue:{wanted.queue}"], " AND jobs.lane >= 'queue:'")
    procedures = map(encode_name, wanted.procedures)
    add("procedure", "calls_of_procedure", "calls.procedure", procedures, seq="calls.job")
    add("host", "jobs_of_host", "jobs.host", map(encode_name, wanted.hosts))
    add("owner", "jobs_of_owner", "jobs.owner", map(encode_name, wanted.owners))
    if wanted.ended.since is not None and wanted.ended.until is not None:
        times = {"ended_from": wanted.ended.since, "ended_to": wanted.ended.until}
        condition = "jobs.ended >= :ended_from AND jobs.ended < :ended_to"
        entries = Entries("jobs INDEXED BY jobs_ended", condition, times, is_ordered=False)
        found.append(Range("ended", (entries,)))
    return found


def ranges_of_owners(owners: Iterable[str]) -> Range:
    """Return the range of the jobs of some owners."""
    entries = []
    for number, owner in enumerate(dict.fromkeys(owners)):
        values = {f"own{number}": encode_name(owner)}
        entries.append(Entries("jobs INDEXED BY jobs_of_owner", f"jobs.owner = :own{number}", values))
    return Range("own", tuple(entries))


def cost(looked_at: Range, conditions: Conditions) -> int:
    """Return how much an entry costs that is checked for conditions; 1: it is checked in the index alone."""
    text = str(conditions)
    columns = set(_COLUMN.findall(text)) - {"seq"}
    found = _ENTRY
    if looked_at.needs_rows(columns):
        found = _ROW
    elif _NAMED in text:
        found = _PROCEDURE
    return _PAYLOADS if conditions.read_payloads else found


def choose(
    ranges: Iterable[Range], cost_of: Callable[[Range], int], count: Callable[[Range, int], int], most: int
) -> tuple[Range, int]:
    """Return the range whose entries cost the least, and how many of them may be looked at.

    `count` returns the number of entries of a range up to a limit. A range with more entries than may be looked at is
    only taken if there is no other, and if it is in the order of submission.
    """
    best: tuple[int, Range, int] | None = None
    fallback: tuple[int, Range, int] | None = None
    for each in ranges:
        of_entry = cost_of(each)
        limit = max(1, most // of_entry)
        number = count(each, limit)
        if number < limit:
            if best is None or number * of_entry < best[0]:
                best = number * of_entry, each, limit
            if number < _FEW:
                break
        elif each.is_ordered and (fallback is None or of_entry < fallback[0]):
            fallback = of_entry, each, limit
    chosen = best or fallback
    if chosen is None:
        return ALL_JOBS, max(1, most // cost_of(ALL_JOBS))
    return chosen[1:]


@dataclass(frozen=True, slots=True)
class Search:
    """A range, and the conditions that its entries are checked for."""

    range: Range
    conditions: Conditions

    @classmethod
    def of(cls, wanted: JobFilter, chosen: Range, owners: Sequence[str] | None) -> Search:
        """Return the search for the jobs of a filter in a range that contains all of them."""
        return cls(chosen, conditions_of(wanted, any(each.has_calls for each in chosen.entries), owners))

    @property
    def values(self) -> dict[str, Any]:
        """The parameters of the statements, by name."""
        return {**self.range.values, **self.conditions.values}

    def select(self, newest_first: bool) -> str:
        """Return a statement for the sequence numbers of the jobs between `low` and `high` that fit."""
        return f"{_merge(self._parts('{seq} AS seq'), newest_first)} LIMIT :limit"

    def select_checked(self, newest_first: bool) -> str:
        """Return a statement for all entries between `low` and `high`: the length of their payloads, and if they fit.

        Entries that do not fit are decided about one after the other, so that the reader may stop at any of them.
        """
        parts = []
        for each in self.range.entries:
            other, column = ("jobs", "jobs.seq") if each.has_calls else ("calls", "calls.job")
            parts.append(
                f"SELECT {each.seq} AS seq, length(calls.info) + length(calls.arguments), {self.conditions} "
                f"FROM {each.source} CROSS JOIN {other} ON {column} = {each.seq} "
                f"WHERE {each.condition} AND {each.seq} BETWEEN :low AND :high"
            )
        return f"{_merge(parts, newest_first)} LIMIT :limit"

    def select_values(self, column: str) -> str:
        """Return a statement for the values of a column of these jobs, and how many jobs have each."""
        parts = " UNION ALL ".join(self._parts(f"{column} AS value"))
        return f"SELECT value, count(*) FROM ({parts}) GROUP BY value"

    def _parts(self, what: str) -> list[str]:
        parts = []
        for each in self.range.entries:
            chosen = what.replace("{seq}", each.seq)
            other, column = ("jobs", "jobs.seq") if each.has_calls else ("calls", "calls.job")
            is_needed = f"{other}." in f"{chosen} {self.conditions}"
            join = f" CROSS JOIN {other} ON {column} = {each.seq}" if is_needed else ""
            parts.append(
                f"SELECT {chosen} FROM {each.source}{join} "
                f"WHERE {each.condition} AND {each.seq} BETWEEN :low AND :high AND {self.conditions}"
            )
        return parts


def _merge(parts: Sequence[str], newest_first: bool) -> str:
    return " UNION ALL ".join(parts) + f" ORDER BY 1 {'DESC' if newest_first else 'ASC'}"


def count_entries(counted: Range) -> str:
    """Return a statement for the number of entries between `low` and `high`, at most `limit`."""
    parts = [
        f"SELECT 1 FROM {each.source} WHERE {each.condition}"
        # The entries outside of these places would be read without a limit if they are in another order.
        + (f" AND {each.seq} BETWEEN :low AND :high" if each.is_ordered else "")
        for each in counted.entries
    ]
    return f"SELECT count(*) FROM ({' UNION ALL '.join(parts)} LIMIT :limit)"
