"""The text of a job in lists is that of its object, whatever its texts contain."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harp.protocol.json_text import Raw, dumps
from harpcaller.job_rows import dump_row, encode_row
from harpcaller.model.jobs import JobSummary, State

TEXT = st.text(max_size=20) | st.sampled_from(["\ud800", "\u2028", '"\\', "\x00", "\U0001f600"])


def summary(text: str, queue: Raw | None) -> JobSummary:
    queue_id = None if queue is None else "0" * 32
    return JobSummary(
        *(1, "x" * 36, State.RAISED, text, text, queue_id, queue, text, 1.5, 2.25, None, 3, text, text, None, True),
        *(text, text, None),
    )


@settings(max_examples=100, deadline=None)
@given(TEXT, TEXT, st.booleans())
def test_text_of_row_is_that_of_its_object(text: str, name: str, has_queue: bool) -> None:
    row = encode_row(summary(text, dumps({name: 1}) if has_queue else None), ("read",))
    assert json.loads(dump_row(row)) == json.loads(dumps(row))


@pytest.mark.parametrize("name", [b'{"a": 1.50}', b'{"b":1,"a":12345678901234567890123}', b'{"q":"\\ud800"}'])
def test_name_of_queue_in_row_is_unchanged(name: bytes) -> None:
    assert dump_row(encode_row(summary("x", Raw(name)), ())).count(b'"name":%b' % name) == 1
