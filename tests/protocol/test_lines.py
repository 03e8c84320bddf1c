"""The splitting of bytes into lines."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp.protocol.lines import LineBuffer, LineTooLong


@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line)), st.data())
def test_feed_in_any_pieces_returns_complete_lines(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines) + b"rest"
    buffer = LineBuffer(20)
    found = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += buffer.feed(stream[:size])
        stream = stream[size:]
    assert found == lines
    assert buffer.pending == b"rest"


def test_feed_limit_excludes_the_line_feed() -> None:
    assert LineBuffer(3).feed(b"abc\nabc\n") == [b"abc", b"abc"]


@pytest.mark.parametrize(
    "pieces", [[b"abcd\n"], [b"abcd"], [b"ab", b"cd"], [b"x\nab", b"cd"], [b"a\nabcd\nb\n"], [b"a\nb\nabcd"]]
)
def test_feed_of_incomplete_long_line_raises(pieces: list[bytes]) -> None:
    buffer = LineBuffer(3)
    with pytest.raises(LineTooLong, match="longer than 3 bytes"):
        for piece in pieces:
            buffer.feed(piece)


def test_line_in_tiny_pieces_needs_little_memory() -> None:
    lines, line = LineBuffer(10**6), b"xy" * 100_000
    pieces = [line[at : at + 2] for at in range(0, len(line), 2)]
    tracemalloc.start()
    try:
        for piece in pieces:
            assert lines.feed(bytes(bytearray(piece))) == []  # a copy, as if it had just been received
        assert tracemalloc.get_traced_memory()[1] < 2 * len(line)
    finally:
        tracemalloc.stop()
    assert lines.size == len(line)
    assert lines.feed(b"\nz") == [line]
    assert lines.pending == b"z"


@pytest.mark.parametrize("size", [1, 700, 4096, 16 * 1024, 64 * 1024])
def test_long_line_is_not_joined_until_it_is_needed(size: int) -> None:
    """Joining one of 15 MiB halts an event loop for more than 10 ms."""
    line = bytes(range(11, 255)) * 5000
    stream = b"before\n" + line + b"\nafter\nrest"
    buffer = LineBuffer(len(line))
    found: list[bytes] = []
    longest = []
    for at in range(0, len(stream), size):
        long, lines = buffer.feed_long(stream[at : at + size])
        if long is not None:
            assert len(long) == len(line)
            longest.append(long)
            found.append(b"long")
        found += lines
    assert found == [b"before", b"long", b"after"]
    assert buffer.pending == b"rest"
    [joined] = longest
    assert joined.join() == line


def test_long_line_is_joined_by_feed() -> None:
    line = b"x" * (1 << 20)
    buffer = LineBuffer(len(line))
    assert buffer.feed(line) == []
    assert buffer.feed(b"\ny\nz") == [line, b"y"]
    with pytest.raises(LineTooLong):
        buffer.feed(line)
