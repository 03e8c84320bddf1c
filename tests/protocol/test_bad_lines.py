"""Every decoder needs linear time and bounded memory for lines of any content, and raises `ProtocolError` only."""

from __future__ import annotations

import gc
import math
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harp.protocol import dispatcher, harpd
from harp.protocol.schema import ProtocolError
from harp_daemon.sliced_json import decode_slices, slice_records
from harpcaller.api.fast_decoder import decode_request
from harpcaller.hosts.registry import parse_line
from support.bad_lines import BAD_VALUES, bad_lines

#: Lines of more bytes are decoded in pieces: both of the sizes that are compared.
_LONG, _SIZE = 16 * 1024, 48 * 1024

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"

#: The decoders of the daemons, and a line that each of them accepts with any value at ``%b``.
DAEMONS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "harpd's requests": (
        lambda line: harpd.decode_request(line, decode_slices),
        b'{"harp":1,"procedure":"p","arguments":[%b],"auth":{"user":"u","password":"p"}}',
    ),
    "records": (lambda line: harpd.decode_message(line, decode_slices), b'{"stream":%b}'),
    "errors": (
        lambda line: harpd.decode_message(line, decode_slices),
        b'{"harp":1,"error":{"type":"t","message":"m","data":%b}}',
    ),
    "many records": (lambda line: slice_records([line, line]), b'{"stream":%b}'),
    "clients' requests": (
        decode_request,
        b'{"harpcaller":1,"host":"h","procedure":"p","arguments":[%b],"info":1}',
    ),
    "many calls": (
        decode_request,
        b'{"harpcaller":1,"submit_many":[{"host":"h","procedure":"p","arguments":[%b]},{"host":"h"}]}',
    ),
}
#: Decoders of values: of the client, of the hosts registry, and of commands to a call.
OTHERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "replies": (
        lambda line: dispatcher.decode_reply(line, dispatcher.GetResult(JOB)),
        b'{"result":%b}',
    ),
    "messages": (harpd.decode_message, b'{"result":%b}'),
    "hosts": (
        parse_line,
        b'{"hostname":"h","address":"a","credentials":{"user":"u","password":"p"},"other":%b}',
    ),
}
DECODERS = {**DAEMONS, **OTHERS}


@pytest.fixture(autouse=True, scope="module")
def long_lines_are_shorter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harp_daemon.sliced_json.LONG", _LONG)
        patch.setattr("harpcaller.api.fast_decoder._MAX_STEP", _LONG)
        patch.setattr("harpcaller.api.fast_decoder._MAX_MANY", _LONG)
        patch.setattr("harp_daemon.json_pieces._PIECE", _LONG // 2)
        yield


def outcome(decode: Callable[[bytes], object], line: bytes) -> object:
    try:
        return decode(line)
    except ProtocolError as error:
        assert len(str(error)) < 1100
        return error


def seconds(decode: Callable[[bytes], object], lines: list[bytes]) -> float:
    """Return the least processor time of this thread for all lines, of several attempts."""
    least = math.inf
    gc.disable()  # its time depends on all other objects
    try:
        for _ in range(2):
            began = time.thread_time()
            for line in lines:
                outcome(decode, line)
            least = min(least, time.thread_time() - began)
    finally:
        gc.enable()
    return least


@pytest.mark.parametrize("name", BAD_VALUES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoder_needs_linear_time(decoder: str, name: str) -> None:
    """Four times the length takes about four times as long; in quadratic time, it would take 16 times as long."""
    decode, template = DECODERS[decoder]
    short, long = (bad_lines(name, size, template) for size in (_SIZE, 4 * _SIZE))
    short_time, long_time = seconds(decode, short), seconds(decode, long)
    assert long_time < 10 * short_time + 0.02, (short_time, long_time)


@pytest.mark.parametrize("name", BAD_VALUES)
@pytest.mark.parametrize("decoder", ["records", "clients' requests"])
def test_decoder_of_a_daemon_needs_little_memory(decoder: str, name: str) -> None:
    """Beside the line itself, the daemons have three times its length at most."""
    decode, template = DAEMONS[decoder]
    for line in bad_lines(name, 4 * _SIZE, template):
        tracemalloc.start()
        try:
            outcome(decode, line[:-1])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 3 * len(line) + 512 * 1024, peak / len(line)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[Callable[[bytes], object], bytes]:
    """Return a decoder, and a line with bad values in it, of which a part may be missing or repeated."""
    decode, template = DECODERS[draw(st.sampled_from(sorted(DECODERS)))]
    name = draw(st.sampled_from(sorted(BAD_VALUES)))
    line = bad_lines(name, draw(st.sampled_from([1, 40, 3000, 20_000])), template)[draw(st.integers(0, 3))][:-1]
    start = draw(st.integers(0, len(line)))
    end = draw(st.integers(0, len(line)))
    return decode, line[:start] + draw(st.binary(max_size=5)) + line[end:]


@settings(max_examples=100, deadline=None)
@given(damaged())
def test_decoder_of_damaged_lines_raises_protocol_errors_only(found: tuple[Any, bytes]) -> None:
    decode, line = found
    outcome(decode, line.replace(b"\n", b""))
