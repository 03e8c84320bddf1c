"""The line relay: passes all data unchanged, cuts it at line ends, and detects the closing line."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp.protocol.ends import Failed, Raised, Returned
from harp.protocol.harpd import Acknowledgement, Message, Record, encode_message
from harpd.frontend.line_relay import LineRelay

MAX_PARTIAL = 64 * 1024
CLOSINGS: list[Message] = [
    Returned(1),
    Returned({"stream": 1}),
    Raised("ValueError", "m", {"class": "ValueError", "module": "builtins"}),
    Failed("timeout", "m"),
]
OTHERS: list[Message] = [Acknowledgement(True), Acknowledgement(False), Record({"result": 1}), Record(None)]


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(edges)]


@given(
    messages=st.lists(
        st.sampled_from([*OTHERS, *CLOSINGS, Record("x" * MAX_PARTIAL), Returned("y" * 200_000)]), max_size=6
    ),
    cuts=st.lists(st.integers(0, 500_000), max_size=12),
)
def test_line_relay_passes_all_data_on(messages: list[Message], cuts: list[int]) -> None:
    data = b"".join(map(encode_message, messages))
    relay = LineRelay()
    sent = b"".join(relay.feed(piece) for piece in pieces(data, cuts))
    assert sent == data
    assert not relay.mid_line
    assert relay.complete is bool(messages and isinstance(messages[-1], Returned | Raised | Failed))


@given(message=st.sampled_from([*OTHERS, *CLOSINGS]), cut=st.integers(0))
def test_line_relay_holds_an_incomplete_line_back(message: Message, cut: int) -> None:
    line = encode_message(message)
    relay = LineRelay()
    relay.feed(encode_message(Acknowledgement(True)))
    assert relay.feed(line[: cut % len(line)]) == b""
    assert not relay.mid_line
    assert not relay.complete


def test_line_relay_passes_a_long_line_in_parts() -> None:
    line = encode_message(Returned("x" * 1_000_000))
    relay = LineRelay()
    half = relay.feed(line[:500_000])
    assert half == line[:500_000]
    assert (relay.mid_line, relay.complete) == (True, False)
    assert relay.feed(line[500_000:]) == line[500_000:]
    assert (relay.mid_line, relay.complete) == (False, True)


@pytest.mark.parametrize("message", OTHERS)
def test_line_relay_is_complete_after_closing_lines_only(message: Message) -> None:
    relay = LineRelay()
    relay.feed(encode_message(message))
    assert not relay.complete
