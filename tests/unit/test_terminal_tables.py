"""Tables on a terminal: aligned, within its width, and without control characters of the texts in them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harp._terminal.tables import (
    MIN_FLEXIBLE,
    Column,
    Line,
    Span,
    cut,
    format_duration,
    format_time,
    lay_out,
    one_line,
    width_of,
)

COLUMNS = (Column("NAME"), Column("TEXT", flexible=True), Column("COUNT", right=True), Column("END", flexible=True))
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def text_of(lines: Sequence[Line]) -> list[str]:
    return ["".join(span.text for span in line) for line in lines]


def test_table_is_aligned() -> None:
    rows = [[Span("a"), Span("日本"), Span("7"), Span("x")], [Span("long"), Span("b"), Span("12345"), Span("")]]
    assert text_of(lay_out(COLUMNS, rows, None)) == [
        "NAME  TEXT  COUNT  END",
        "a     日本      7  x",
        "long  b     12345  ",
    ]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=5), st.text(max_size=300), st.integers(0, 99), st.text(max_size=300))),
    st.integers(10, 200),
)
def test_table_of_any_texts_is_safe_and_fits(rows: list[tuple[str, str, int, str]], width: int) -> None:
    cells = [[Span(str(cell)) for cell in row] for row in rows]
    lines = text_of(lay_out(COLUMNS, cells, width))
    assert len(lines) == len(rows) + 1
    assert not any(map(UNSAFE.search, lines))
    names = max([4, *(width_of(one_line(row[0])) for row in rows)])
    least = names + 2 * MIN_FLEXIBLE + 5 + 3 * 2
    assert max(width_of(line.rstrip()) for line in lines) <= max(width, least)


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("abc", 3, "abc"),
        ("abcd", 3, "ab…"),
        ("日本語", 6, "日本語"),
        ("日本語", 5, "日本…"),
        ("日本語", 4, "日…"),
        ("a", 0, "…"),
    ],
)
def test_text_is_cut_to_cells(text: str, width: int, expected: str) -> None:
    assert cut(text, width) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (None, ""),
        (-1, "0.00s"),
        (0.254, "0.25s"),
        (59.99, "59s"),
        (252, "4m12s"),
        (3600 * 3 + 301, "3h05m"),
        (86400 * 2 + 4 * 3600, "2d04h"),
    ],
)
def test_durations_have_two_units(seconds: float | None, expected: str) -> None:
    assert format_duration(seconds) == expected


def test_times_of_other_days_have_a_date() -> None:
    now = 1_700_000_000.0
    assert re.fullmatch(r"\d\d:\d\d:\d\d", format_time(now, now))
    assert re.fullmatch(r"11-\d\d \d\d:\d\d", format_time(now - 2 * 86400, now))
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", format_time(now - 400 * 86400, now))
    assert format_time(None, now) == ""
    assert format_time(1e18, now) == "?"
