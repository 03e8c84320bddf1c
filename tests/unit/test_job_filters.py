"""The language of filters: words and parameters give the same filter, and its normal form gives it again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harpcaller.model.job_filters import BAD, KEYS, NO_QUEUE, InvalidFilter, JobFilter, Span, parse_filter, parse_search
from harpcaller.model.jobs import ENDED, State, StopState

NOW = 1_800_000_000.0
JOB = "0190abcd-0123-7abc-8def-0123456789ab"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("state:bad", {"states": BAD}),
        ("state:ended,running", {"states": ENDED | {State.RUNNING}}),
        ("state:failed state:raised", {"states": BAD}),
        ("host:web01,db01", {"hosts": ("db01", "web01")}),
        ("host:web*", {"host_pattern": "web*"}),
        ('procedure:"a b","c,d",e', {"procedures": ("a b", "c,d", "e")}),
        ("owner:token:ops", {"owners": ("token:ops",)}),
        ("queue:-", {"queue": NO_QUEUE}),
        ("queue:" + "0a" * 16, {"queue": "0a" * 16}),
        ("from:1000 to:2000.5", {"submitted": Span(1000.0, 2000.5)}),
        ("from:-15m", {"submitted": Span(NOW - 900, None, "-15m")}),
        ("ended_from:2027-01-15T08:00:00Z", {"ended": Span(NOW)}),
        ("ended_to:2027-01-15T09:00:00+01:00", {"ended": Span(None, NOW)}),
        ("started_to:-2d", {"started": Span(None, NOW - 172_800, "", "-2d")}),
        ("end_type:timeout,ValueError", {"end_types": ("ValueError", "timeout")}),
        ("stop:pending,failed", {"stops": frozenset({StopState.PENDING, StopState.FAILED})}),
        ("holds_slot:1", {"holds_slot": True}),
        ('info:"order 7"', {"info": "order 7"}),
        (r'arguments:"{\"a\": 1, \"b\": 2}"', {"arguments": '{"a": 1, "b": 2}'}),
        (f"rerun_of:{JOB}", {"rerun_of": JOB}),
        (JOB, {"id_start": JOB}),
        ("0190ABCD", {"id_start": "0190abcd"}),
        ("0190abcd-01", {"id_start": "0190abcd-01"}),
        ("id:0190abcd", {"id_start": "0190abcd"}),
        ("0190abc", {"text": ("0190abc",)}),
        ("0190abcd 0190abce", {"id_start": "0190abcd", "text": ("0190abce",)}),
        ('disk "no space" disk', {"text": ("disk", "no space")}),
        ("http://web01:80/x", {"text": ("http://web01:80/x",)}),
        ('"state:bad"', {"text": ("state:bad",)}),
        ("backup state:bad from:-1h", {"text": ("backup",), "states": BAD, "submitted": Span(NOW - 3600, None, "-1h")}),
    ],
)
def test_search_text_gives_the_filter(text: str, expected: dict[str, Any]) -> None:
    found = parse_search(text, NOW)
    assert found == JobFilter(**expected)
    assert parse_search(found.normal_form(), NOW) == found


@pytest.mark.parametrize(
    ("text", "parameter", "problem"),
    [
        ("hots:web01", "hots", "no such filter; did you mean host?"),
        ("state:faild", "state", "no such state: faild; did you mean failed?"),
        ("state:", "state", "expected a value"),
        ("host:a,", "host", "expected a value"),
        ("host:web*,db*", "host", "one name with one *"),
        ("host:w*b*", "host", "one name with one *"),
        ("host:" + "x" * 256, "host", "at most 255 characters"),
        ("procedure:" + ",".join(map(str, range(501))), "procedure", "at most 500 values"),
        ("queue:mine", "queue", "expected the id of a queue"),
        ("queue:-,-", "queue", "expected one value"),
        ("from:tomorrow", "from", "expected today, yesterday, 2026-01-31, 2026-01-31T12:00:00Z, Unix seconds, or"),
        ("from:2026-02-31", "from", "expected today"),
        ("from:0001-01-01", "from", "expected today"),
        ("from:2026-01-31T12:00:00", "from", "expected today"),
        ("from:nan", "from", "expected today"),
        ("from:-1", "from", "expected today"),
        ("from:1 from:2", "from", "expected one value"),
        ("stop:maybe", "stop", "expected pending, confirmed, failed, unknown"),
        ("holds_slot:yes", "holds_slot", "expected 1 or 0"),
        ("info:" + "x" * 1001, "info", "1 to 1000 characters"),
        ("x" * 1001, "q", "1 to 1000 characters"),
        ("rerun_of:0190abcd", "rerun_of", "expected a job id"),
        ("id:0190", "id", "at least 8 digits"),
        ('info:"a', "q", "a second quotation mark"),
        (r'info:"\x"', "info", "a text in quotation marks"),
        (" ".join(map(str, range(501))), "q", "at most 500 words"),
    ],
)
def test_invalid_search_names_parameter_and_problem(text: str, parameter: str, problem: str) -> None:
    with pytest.raises(InvalidFilter) as caught:
        parse_search(text, NOW)
    assert caught.value.parameter == parameter
    assert problem in caught.value.problem
    assert str(caught.value).startswith(f"{parameter}: ")


def test_parameters_of_a_query_are_the_words_of_a_search() -> None:
    pairs = [("state", "bad"), ("host", 'a,"b c"'), ("info", '{"a": 1, "b"'), ("q", "from:-2h disk")]
    found = parse_filter(pairs, NOW)
    assert found == JobFilter(
        states=BAD,
        hosts=("a", "b c"),
        info='{"a": 1, "b"',
        submitted=Span(NOW - 7200, None, "-2h"),
        text=("disk",),
    )
    assert parse_filter([("q", found.normal_form())], NOW) == found
    with pytest.raises(InvalidFilter, match="limit: no such filter"):
        parse_filter([("limit", "1")], NOW)


@pytest.fixture
def in_new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the test in another time zone, in which a day of March has 23 hours."""
    monkeypatch.setenv("TZ", "EST5EDT,M3.2.0,M11.1.0")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_new_york")
@pytest.mark.parametrize(
    ("text", "begin"),
    [
        ("today", "2027-03-15T00:00:00-04:00"),
        ("yesterday", "2027-03-14T00:00:00-05:00"),
        ("2027-03-14", "2027-03-14T00:00:00-05:00"),
        ("2027-01-31", "2027-01-31T00:00:00-05:00"),
    ],
)
def test_days_begin_at_midnight_of_the_dispatcher(text: str, begin: str) -> None:
    now = datetime.fromisoformat("2027-03-16T03:00:00Z").timestamp()  # still the 15th there
    found = parse_search(f"from:{text}", now)
    assert found.submitted.since == datetime.fromisoformat(begin).timestamp()
    assert parse_search(found.normal_form(), now) == found


def test_relative_times_have_one_normal_form() -> None:
    """A cursor belongs to a normal form, and the next page is asked for later."""
    for text in ("from:-2h", "from:yesterday to:today"):
        assert parse_search(text, NOW).normal_form() == text == parse_search(text, NOW + 60).normal_form()


NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="*"), min_size=1, max_size=9))
FILTERS = st.builds(
    JobFilter,
    states=st.frozensets(st.sampled_from(list(State))),
    hosts=NAMES.map(lambda names: tuple(sorted(set(names)))),
    end_types=NAMES.map(lambda names: tuple(sorted(set(names)))),
    info=st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9),
    started=st.builds(Span, st.none() | st.floats(0, 1e10)),
    text=NAMES.map(lambda words: tuple(sorted({word + "!" for word in words}))),
)


@settings(max_examples=60)
@given(wanted=FILTERS)
def test_normal_form_gives_the_same_filter(wanted: JobFilter) -> None:
    assert parse_search(wanted.normal_form(), NOW) == wanted


@settings(max_examples=60)
@given(text=st.lists(st.sampled_from([*'ab09 :,"\\*-\u00e4', *(f"{key}:" for key in KEYS)]), max_size=20).map("".join))
def test_any_text_gives_a_filter_or_an_error(text: str) -> None:
    try:
        found = parse_search(text, NOW)
    except InvalidFilter:
        return
    assert parse_search(found.normal_form(), NOW).normal_form() == found.normal_form()
