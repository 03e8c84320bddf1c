"""The text of a job in lists has the members of its summary, whatever its texts contain."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harp.protocol.json_text import Envelope, Raw, dumps
from harpcaller.job_rows import dump_object, write_row, write_row_as_text
from harpcaller.model.jobs import JobSummary, State

TEXT = st.text(max_size=20) | st.sampled_from(["\ud800", "\u2028", '"\\', "\x00", "\U0001f600"])


def summary(text: str, queue: Raw | None) -> JobSummary:
    queue_id = None if queue is None else "0" * 32
    return JobSummary(
        *(1, "x" * 36, State.RAISED, text, text, queue_id, queue, text, 1.5, 2.25, None, 3, text, text, None, True),
        *(text, text, None),
    )


#: The members of a row, in their order.
ROW = """\
job state host procedure queue owner time records end_type end_message stop holds_slot unreachable_since
arguments_preview info_preview run rerun_of can
""".split()


@settings(max_examples=100, deadline=None)
@given(TEXT, TEXT, st.booleans())
def test_row_has_the_members_of_the_summary(text: str, name: str, has_queue: bool) -> None:
    queue = dumps({name: 1}) if has_queue else None
    row = json.loads(write_row(summary(text, queue), ("read",)))
    assert list(row) == ROW
    names = ("host", "procedure", "owner", "end_type", "end_message", "arguments_preview", "info_preview")
    assert {row[each] for each in names} == {text}
    assert row["time"] == {"submit": 1.5, "start": 2.25, "end": None}
    assert row["queue"] == (None if queue is None else {"id": "0" * 32, "name": {name: 1}})
    rest = {"job": "x" * 36, "state": "raised", "records": 3, "stop": None, "holds_slot": True, "can": ["read"]}
    rest |= dict.fromkeys(("unreachable_since", "run", "rerun_of"))
    assert {key: row[key] for key in rest} == rest
    as_text = json.loads(write_row_as_text(summary(text, queue), ("read",)))
    assert as_text == row | {"queue": None if queue is None else {"id": "0" * 32, "name": queue.decode()}}


@settings(max_examples=100, deadline=None)
@given(TEXT, TEXT)
def test_text_of_object_is_that_of_dumps(text: str, name: str) -> None:
    value = Envelope(a=text, b=Raw(b'{"x": 1.50}'), c=Envelope(d=dumps({name: [None, 2**70]}), e=1.5), f={name: 2})
    assert json.loads(dump_object(value)) == json.loads(dumps(value))
    assert dump_object(value).count(b'{"x": 1.50}') == 1


@pytest.mark.parametrize("name", [b'{"a": 1.50}', b'{"b":1,"a":12345678901234567890123}', b'{"q":"\\ud800"}'])
def test_name_of_queue_in_row_is_unchanged(name: bytes) -> None:
    assert write_row(summary("x", Raw(name)), ()).count(b'"name":%b' % name) == 1
