"""The log of a daemon under test, also of one that was killed while it wrote."""

from __future__ import annotations

import pytest

from support.daemonlog import decode_events

FIRST, SECOND = '{"time": "1", "event": "first", "text": "{\\"time\\": \\"0\\"}"}', '{"time": "2", "event": "second"}'


@pytest.mark.parametrize("length", range(len(FIRST)))
def test_events_behind_a_part_of_one_are_found(length: int) -> None:
    found = [event["event"] for event in decode_events([FIRST, "text", FIRST[:length] + SECOND])]
    assert found == ["first", "second"]


def test_events_that_are_no_json_are_an_error() -> None:
    with pytest.raises(ValueError, match="line 1"):
        list(decode_events(["{text}"]))
