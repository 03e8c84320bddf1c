"""How jobs are found by a filter: the conditions, and the entries of an index that are looked at. Pure: SQL as text.

Theory of operation. A list is a walk along one index in the order of submission, from a place on. `Search` has the
index, as one or more ranges of entries, and the conditions that each entry is checked for. Statements are put together
from fixed pieces; every value is a parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from harpcaller.model.job_filters import NO_QUEUE, JobFilter, Span
from harpcaller.model.jobs import ENDED, State
from harpcaller.store.sqlite.rows import encode_name

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


@dataclass(slots=True)
class Conditions:
    """Conditions on a job, and their parameters by name. `tables` are those that they need beside jobs."""

    texts: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    needs_calls: bool = False

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


def conditions_of(wanted: JobFilter, owners: Iterable[str] | None = None) -> Conditions:
    """Return the conditions of a filter; with `owners`, only their jobs fit it."""
    found = Conditions()
    if owners is not None:
        found.add(f"jobs.owner IN ({', '.join('?' * len(names := list(owners)))})", *map(encode_name, names))
    if wanted.states == ENDED:
        found.add("jobs.ended IS NOT NULL")
    elif wanted.states and wanted.states != frozenset(State):
        found.add_any("jobs.state", sorted(wanted.states))
    found.add_any("jobs.host", list(map(encode_name, wanted.hosts)))
    if wanted.host_pattern is not None:
        _add_pattern(found, wanted.host_pattern)
    found.add_any("jobs.owner", list(map(encode_name, wanted.owners)))
    if wanted.queue is not None:
        if wanted.queue == NO_QUEUE:
            found.add("jobs.lane < 'queue:'")
        else:
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
        found.needs_calls = True
        found.add_any("calls.procedure", list(map(encode_name, wanted.procedures)))
    if wanted.rerun_of is not None:
        found.needs_calls = True
        found.add("calls.rerun_of = ?", wanted.rerun_of)
    for column, text in (("calls.info", wanted.info), ("calls.arguments", wanted.arguments)):
        if text is not None:
            found.needs_calls = True
            needles = list(dict.fromkeys(map(encode_name, _spellings(text))))
            found.add("(" + " OR ".join(f"instr({column}, ?)" for _ in needles) + ")", *needles)
    for word in wanted.text:
        found.needs_calls = True
        _add_word(found, word)
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
    escape = lambda match: json.dumps(match[0])[1:-1]  # noqa: E731
    escaped = _NOT_ASCII.sub(escape, text)
    upper = _NOT_ASCII.sub(lambda match: escape(match).upper().replace("\\U", "\\u"), text)
    return text, escaped, upper


@dataclass(frozen=True, slots=True)
class Entries:
    """A range of the entries of an index, in the order of submission."""

    source: str  # the table, and its index
    condition: str = "TRUE"  # which entries; its parameters are those of `Search.values`
    seq: str = "jobs.seq"


@dataclass(slots=True)
class Search:
    """The entries that a walk looks at, without duplicates, and the conditions that each is checked for."""

    entries: Sequence[Entries]
    conditions: Conditions

    @property
    def values(self) -> dict[str, Any]:
        """The parameters of the statements, by name."""
        return self.conditions.values

    def select_entries(self, what: str, newest_first: bool) -> str:
        """Return a statement for the sequence numbers of the entries between `low` and `high`."""
        parts = [
            f"SELECT {each.seq} AS seq FROM {each.source} WHERE {each.condition} AND {each.seq} BETWEEN :low AND :high"
            for each in self.entries
        ]
        return f"SELECT {what} FROM ({_merge(parts, newest_first)} LIMIT :limit OFFSET :offset)"

    def select_matching(self, newest_first: bool) -> str:
        """Return a statement for the sequence numbers of the jobs between `low` and `high` that fit."""
        return f"{_merge(self._parts('{seq} AS seq'), newest_first)} LIMIT :limit"

    def select_values(self, column: str) -> str:
        """Return a statement for the values of a column of these jobs, and how many jobs have each."""
        parts = " UNION ALL ".join(self._parts(f"{column} AS value", "calls." in column))
        return f"SELECT value, count(*) FROM ({parts}) GROUP BY value"

    def _parts(self, what: str, needs_calls: bool = False) -> list[str]:
        parts = []
        for each in self.entries:
            is_of_calls = each.source.startswith("calls")
            join = "CROSS JOIN jobs ON jobs.seq = calls.job" if is_of_calls else ""
            if not is_of_calls and (needs_calls or self.conditions.needs_calls):
                join = "CROSS JOIN calls ON calls.job = jobs.seq"
            parts.append(
                f"SELECT {what.replace('{seq}', each.seq)} FROM {each.source} {join} "
                f"WHERE {each.condition} AND {each.seq} BETWEEN :low AND :high AND {self.conditions}"
            )
        return parts


def _merge(parts: Sequence[str], newest_first: bool) -> str:
    return " UNION ALL ".join(parts) + f" ORDER BY 1 {'DESC' if newest_first else 'ASC'}"


def plan(wanted: JobFilter, owners: Sequence[str] | None) -> Search:
    """Return how to search for the jobs of a filter; with `owners`, only their jobs are looked at."""
    conditions = conditions_of(wanted, owners)
    if owners is None:
        return Search([Entries("jobs")], conditions)
    entries = []
    for number, owner in enumerate(dict.fromkeys(owners)):
        conditions.values[f"owner{number}"] = encode_name(owner)
        entries.append(Entries("jobs INDEXED BY jobs_of_owner", f"jobs.owner = :owner{number}"))
    return Search(entries, conditions)
