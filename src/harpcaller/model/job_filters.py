"""Filters of jobs: which jobs a list, a count or a stream of changes has. `now` is an argument; days are local ones.

A filter has the same words everywhere: as the parameters of a query (`parse_filter`), and as one text for people
(`parse_search`), in which words without a key are searched for in several places. `JobFilter.normal_form` is the text
of a filter. Spec: docs/job-filters.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import date, datetime, timedelta
from difflib import get_close_matches
from functools import lru_cache
from math import isfinite
from typing import Any

from msgspec import Struct

from harpcaller.model.ids import is_job_id
from harpcaller.model.jobs import ENDED, State, StopState

NO_QUEUE = "-"  #: In place of the id of a queue: jobs without one.
OPEN = frozenset(State) - ENDED  #: The states of jobs that have not ended.
BAD = frozenset({State.RAISED, State.FAILED})  #: The states of jobs that ended with an error.
#: Names of several states.
STATE_GROUPS: Mapping[str, frozenset[State]] = {"open": OPEN, "ended": ENDED, "bad": BAD}
MAX_VALUES = 500  #: Maximum number of values of one key, and of words of a text.
MAX_TEXT = 1000  #: Maximum length of a value that is searched for in a text, in characters.

_MAX_NAME = 255
_RELATIVE = re.compile(r"-(\d{1,9})([smhd])", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DAYS_AGO = {"today": 0, "yesterday": 1}
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_MAX_SUGGESTIONS = 20  #: Maximum number of unknown keys that are compared with the known ones, which takes long.
_LATEST = 253402300800.0  # the year 10000
_ID_CHARACTERS = re.compile(r"[0-9a-f-]{8,36}", re.ASCII)
_QUEUE_ID = re.compile(r"[0-9a-f]{32}|-", re.ASCII)
_PLAIN = re.compile(r'[^\s",:]+')  # a value that needs no quotes
#: A word of a search: a key, and characters without spaces or texts in quotes.
_WORD = re.compile(r'(?:([a-z_]+):)?((?:"(?:[^"\\]|\\.)*"|[^\s"])+)|(\S)')
#: A part of values: a text in quotes, another one, a comma, or all from a quotation mark without a second one on.
_PART = re.compile(r'"(?:[^"\\]|\\.)*"|[^",]+|,|"(?s:.*)')


class InvalidFilter(ValueError):
    """A parameter that is unknown, or whose value has no meaning; the message starts with its name."""

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(f"{parameter}: {problem}")
        self.parameter = parameter
        self.problem = problem


class Span(Struct, frozen=True):
    """A time from `since` on, before `until`; Unix seconds, or None: no limit. The texts are of relative times."""

    since: float | None = None
    until: float | None = None
    since_text: str = ""
    until_text: str = ""

    def __bool__(self) -> bool:
        return self.since is not None or self.until is not None

    def match(self, time: float | None) -> bool:
        """Return whether a time is in the span; None is in a span without limits only."""
        if time is None:
            return not self
        return (self.since is None or time >= self.since) and (self.until is None or time < self.until)


ANY_TIME = Span()


class JobFilter(Struct, frozen=True, kw_only=True):
    """Which jobs; every part that is given has to match. An empty value, or None, matches any job."""

    states: frozenset[State] = frozenset()
    hosts: tuple[str, ...] = ()
    host_pattern: str | None = None  # a name in which one ``*`` stands for any characters
    procedures: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    queue: str | None = None  # id of a queue, or `NO_QUEUE`
    submitted: Span = ANY_TIME
    started: Span = ANY_TIME
    ended: Span = ANY_TIME
    end_types: tuple[str, ...] = ()  # types of errors and exceptions
    stops: frozenset[StopState] = frozenset()
    holds_slot: bool | None = None
    info: str | None = None  # a part of the JSON text
    arguments: str | None = None  # a part of the JSON text
    rerun_of: str | None = None  # job id
    id_start: str | None = None  # the beginning of the job id
    #: Each is in the host, procedure, message of the end or info, without regard to the case of ASCII letters.
    text: tuple[str, ...] = ()

    def normal_form(self) -> str:
        """Return the filter as a text for `parse_search`: equal filters have the same text."""
        return _write_filter(self)


@lru_cache(64)
def _write_filter(wanted: JobFilter) -> str:
    words: list[str] = []
    for key, part in _PARTS.items():
        if values := [_quote(value) for value in part.write(wanted)]:
            words.append(f"{key}:{','.join(values)}")
    words += [json.dumps(word, ensure_ascii=False) for word in sorted(wanted.text)]
    return " ".join(words)


def parse_filter(pairs: Iterable[tuple[str, str]], now: float) -> JobFilter:
    """Return the filter of a query's parameters; `now` is Unix seconds, for relative times. Raises `InvalidFilter`."""
    values: dict[str, list[str]] = {}
    text: list[str] = []
    for key, value in pairs:
        if key == "q":
            words = parse_words(value)
            text += [word for other, word in words if other is None]
            found = [(other, word) for other, word in words if other is not None]
        else:
            found = [(key, value)]
        for name, written in found:
            if name not in _PARTS:
                raise InvalidFilter(name, "no such filter" + _suggest(name, (*_PARTS, "q")))
            is_whole = key != "q" and name in _TEXTS
            values.setdefault(name, []).extend([written] if is_whole else _split(name, written))
    fields: dict[str, Any] = {}
    for name, of_key in values.items():
        if len(of_key) > MAX_VALUES:
            raise InvalidFilter(name, f"expected at most {MAX_VALUES} values, got {len(of_key)}")
        _PARTS[name].read(name, of_key, now, fields)
    return _with_text(JobFilter(**fields), text)


def parse_search(text: str, now: float) -> JobFilter:
    """Return the filter of a search text: ``key:value`` words, the beginning of a job id, and words to search for."""
    return parse_filter([("q", text)], now)


def parse_words(text: str) -> list[tuple[str | None, str]]:
    """Return the words of a search text with their keys; None: a word without a key."""
    words: list[tuple[str | None, str]] = []
    unknown: set[str] = set()
    for match in _WORD.finditer(text):
        key, value, stray = match.groups()
        if stray is not None:
            raise InvalidFilter("q", f"expected a second quotation mark after {text[match.start() :][:20]!r}")
        if key is None and value[:-1] in _PARTS and value.endswith(":"):
            key, value = value[:-1], ""
        elif key is not None and key not in _PARTS:
            is_compared = key not in unknown and len(unknown) < _MAX_SUGGESTIONS
            if not (is_compared and _looks_like_key(key)):
                unknown.add(key)
                key, value = None, match[0]
        words.append((key, value))
    return words


def _looks_like_key(key: str) -> bool:
    """Return whether an unknown key is a misspelled one, and not a part of a text like ``http://``."""
    return bool(_suggest(key, _PARTS))


def _with_text(found: JobFilter, words: list[str]) -> JobFilter:
    if not words:
        return found
    text: list[str] = []
    id_start = found.id_start
    for word in words:
        lowered = word.lower()
        if id_start is None and _is_id_start(lowered):
            id_start = lowered
        else:
            plain = "".join(_unquote("q", part) for part in _PART.findall(word))
            text.append(_check_text("q", plain))
    if len(text) > MAX_VALUES:
        raise InvalidFilter("q", f"expected at most {MAX_VALUES} words, got {len(text)}")
    fields = {name: getattr(found, name) for name in JobFilter.__struct_fields__}
    return JobFilter(**fields | {"id_start": id_start, "text": tuple(sorted(set(text)))})


def _is_id_start(text: str) -> bool:
    """Return whether a text is a job id, or the beginning of one with at least 8 digits."""
    form = "00000000-0000-0000-0000-000000000000"
    return _ID_CHARACTERS.fullmatch(text) is not None and is_job_id(text + form[len(text) :])


def _split(name: str, written: str) -> list[str]:
    """Return the values of a text, between commas outside of quotes."""
    values, value, is_given = [], "", False
    for part in _PART.findall(written):
        if part == ",":
            values.append((value, is_given))
            value, is_given = "", False
        else:
            value, is_given = value + _unquote(name, part), True
    values.append((value, is_given))
    if not all(given for _, given in values):
        raise InvalidFilter(name, "expected a value")
    return [text for text, _ in values]


def _unquote(name: str, part: str) -> str:
    if not part.startswith('"'):
        return part
    try:
        return str(json.loads(part))
    except ValueError as error:
        raise InvalidFilter(name, f"expected a text in quotation marks, got {part[:40]}") from error


def _quote(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def _suggest(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


# The parts of a filter: how they are read from values, and written as values.


class _Part(Struct, frozen=True):
    read: Callable[[str, list[str], float, dict[str, Any]], None]
    write: Callable[[JobFilter], Iterable[str]]


def _one(name: str, values: list[str]) -> str:
    if len(values) != 1:
        raise InvalidFilter(name, f"expected one value, got {len(values)}")
    return values[0]


def _check_text(name: str, value: str) -> str:
    if not 0 < len(value) <= MAX_TEXT:
        raise InvalidFilter(name, f"expected 1 to {MAX_TEXT} characters, got {len(value)}")
    return value


def _check_names(name: str, values: list[str]) -> tuple[str, ...]:
    for value in values:
        if len(value) > _MAX_NAME:
            raise InvalidFilter(name, f"expected at most {_MAX_NAME} characters, got {len(value)}")
    return tuple(sorted(set(values)))


def _names(field: str) -> _Part:
    def read(name: str, values: list[str], now: float, fields: dict[str, Any]) -> None:
        fields[field] = _check_names(name, values)

    return _Part(read, lambda found: getattr(found, field))


def _read_hosts(name: str, values: list[str], now: float, fields: dict[str, Any]) -> None:
    names = _check_names(name, values)
    if not any("*" in value for value in names):
        fields["hosts"] = names
    elif len(names) == 1 and names[0].count("*") == 1:
        fields["host_pattern"] = names[0]
    else:
        raise InvalidFilter(name, "expected names, or one name with one *")


def _write_hosts(found: JobFilter) -> Iterator[str]:
    yield from found.hosts
    if found.host_pattern is not None:
        yield found.host_pattern


def _read_states(name: str, values: list[str], now: float, fields: dict[str, Any]) -> None:
    states: set[State] = set()
    for value in values:
        if value in STATE_GROUPS:
            states |= STATE_GROUPS[value]
        elif value in tuple(State):
            states.add(State(value))
        else:
            raise InvalidFilter(name, f"no such state: {value[:40]}{_suggest(value, (*State, *STATE_GROUPS))}")
    fields["states"] = frozenset(states)


def _read_stops(name: str, values: list[str], now: float, fields: dict[str, Any]) -> None:
    for value in values:
        if value not in tuple(StopState):
            raise InvalidFilter(name, f"expected {', '.join(StopState)}, got {value[:40]}")
    fields["stops"] = frozenset(map(StopState, values))


def _read_queue(name: str, values: list[str], now: float, fields: dict[str, Any]) -> None:
    value = _one(name, values)
    if not _QUEUE_ID.fullmatch(value):
        raise InvalidFilter(name, "expected the id of a queue, 32 digits, or - for jobs without a queue")
    fields["queue"] = value


def _read_bool(name: str, values: list[str], now: float, fields: dict[str, Any]) -> None:
    value = _one(name, values)
    if value not in _BOOLEANS:
        raise InvalidFilter(name, f"expected 1 or 0, got {value[:40]}")
    fields["holds_slot"] = _BOOLEANS[value]


_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}


def _part_of_text(field: str) -> _Part:
    def read(name: str, values: list[str], now: float, fields: dict[str, Any]) -> None:
        # The text of a value may contain commas.
        fields[field] = _check_text(name, ",".join(values))

    return _Part(read, lambda found: () if getattr(found, field) is None else (getattr(found, field),))


def _read_job_id(name: str, values: list[str], now: float, fields: dict[str, Any]) -> None:
    value = _one(name, values)
    if not is_job_id(value):
        raise InvalidFilter(name, "expected a job id")
    fields["rerun_of"] = value


def _read_id_start(name: str, values: list[str], now: float, fields: dict[str, Any]) -> None:
    value = _one(name, values).lower()
    if not _is_id_start(value):
        raise InvalidFilter(name, "expected a job id, or at least 8 digits of its beginning")
    fields["id_start"] = value


def parse_time(name: str, text: str, now: float) -> float:
    """Return a time in Unix seconds: of a number, of a date and time by RFC 3339, or of ``-2h`` (s, m, h, d).

    A date, ``today`` and ``yesterday`` are the midnight before this day, in the time zone of the dispatcher.
    """
    if relative := _RELATIVE.fullmatch(text):
        return now - int(relative[1]) * _UNITS[relative[2]]
    if text in _DAYS_AGO:
        text = (date.fromtimestamp(now) - timedelta(_DAYS_AGO[text])).isoformat()
    time: float | None = None
    try:
        time = float(text)
    except ValueError:
        with suppress(ValueError, OverflowError):
            moment = datetime.fromisoformat(text)
            time = moment.timestamp() if moment.tzinfo is not None or _DATE.fullmatch(text) else None
    if time is None or not isfinite(time) or not 0 <= time < _LATEST:
        days = "today, yesterday, 2026-01-31, 2026-01-31T12:00:00Z"
        expected = f"{days}, Unix seconds, or a time before now such as -15m, -2h or -7d"
        raise InvalidFilter(name, f"expected {expected}, got {text[:40]}")
    return time


def _time(field: str, is_since: bool) -> _Part:
    side = "since" if is_since else "until"

    def read(name: str, values: list[str], now: float, fields: dict[str, Any]) -> None:
        text = _one(name, values)
        before: Span = fields.get(field, ANY_TIME)
        written = {name: getattr(before, name) for name in Span.__struct_fields__}
        relative = text if text in _DAYS_AGO or _RELATIVE.fullmatch(text) else ""
        fields[field] = Span(**written | {side: parse_time(name, text, now), f"{side}_text": relative})

    def write(found: JobFilter) -> Iterator[str]:
        span = getattr(found, field)
        time = getattr(span, side)
        if time is not None:
            yield getattr(span, f"{side}_text") or repr(float(time))

    return _Part(read, write)


_PARTS: Mapping[str, _Part] = {
    "id": _Part(_read_id_start, lambda found: () if found.id_start is None else (found.id_start,)),
    "state": _Part(_read_states, lambda found: [state for state in State if state in found.states]),
    "host": _Part(_read_hosts, _write_hosts),
    "procedure": _names("procedures"),
    "owner": _names("owners"),
    "queue": _Part(_read_queue, lambda found: () if found.queue is None else (found.queue,)),
    "from": _time("submitted", True),
    "to": _time("submitted", False),
    "started_from": _time("started", True),
    "started_to": _time("started", False),
    "ended_from": _time("ended", True),
    "ended_to": _time("ended", False),
    "end_type": _names("end_types"),
    "stop": _Part(_read_stops, lambda found: [stop for stop in StopState if stop in found.stops]),
    "holds_slot": _Part(_read_bool, lambda found: () if found.holds_slot is None else (str(int(found.holds_slot)),)),
    "info": _part_of_text("info"),
    "arguments": _part_of_text("arguments"),
    "rerun_of": _Part(_read_job_id, lambda found: () if found.rerun_of is None else (found.rerun_of,)),
}

_TEXTS = ("info", "arguments")  # their values may be JSON, with quotes and commas

#: The keys of the parts of a filter, for help and completion.
KEYS = tuple(_PARTS)
