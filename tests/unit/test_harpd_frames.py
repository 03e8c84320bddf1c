"""The frames of a link: any pieces of the bytes give the same frames, and lines are cut only where they must be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harpd.supervisor.frames import (
    MAX_LINES_BYTES,
    Frame,
    FrameBuffer,
    InvalidFrame,
    decode_credit,
    encode_credit,
    encode_frame,
    split_lines,
)

FRAMES = st.lists(
    st.builds(Frame, st.integers(0, 2**32 - 1), st.integers(0, 255), st.binary(max_size=300)), max_size=20
)


@given(FRAMES, st.data())
def test_frame_buffer_returns_frames_of_any_pieces(frames: list[Frame], data: st.DataObject) -> None:
    text = b"".join(encode_frame(*frame) for frame in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    buffer = FrameBuffer(300)
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert [frame for piece in pieces for frame in buffer.feed(piece)] == frames


def test_frame_buffer_rejects_long_frame_by_its_header() -> None:
    buffer = FrameBuffer(10)
    assert buffer.feed(encode_frame(1, 2, b"x" * 10)) == [(1, 2, b"x" * 10)]
    with pytest.raises(InvalidFrame, match="longer than 10 bytes"):
        buffer.feed(encode_frame(1, 2, b"x" * 11)[:9])


def test_credit_of_wrong_size_is_rejected() -> None:
    assert decode_credit(encode_credit(70_000)) == 70_000
    with pytest.raises(InvalidFrame, match="expected 4 bytes, got 5"):
        decode_credit(b"12345")


@given(st.lists(st.integers(0, MAX_LINES_BYTES * 3), max_size=6))
def test_split_lines_cuts_only_lines_that_are_longer(sizes: list[int]) -> None:
    text = b"".join(b"x" * size + b"\n" for size in sizes)
    parts = list(split_lines(text))
    assert b"".join(parts) == text
    assert max(map(len, parts)) <= MAX_LINES_BYTES
    assert all(part.endswith(b"\n") or b"\n" not in part for part in parts[:-1])
