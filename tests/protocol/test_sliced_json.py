"""`decode_slices` against `scan_slices`: the same members, the same text, the same errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harp.protocol.call_output import RECORD_PREFIX
from harp.protocol.fields import Decoder
from harp.protocol.json_text import MAX_DEPTH, InvalidJSON, Raw, decode_enclosed, loads
from harp_daemon.sliced_json import decode_slices, scan_slices, slice_records

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
objects = st.dictionaries(st.text(), values)


def outcome(decoder: Decoder, line: bytes) -> object:
    """Return all members that a decoder finds in a line, or its error."""
    try:
        members = decoder(line)
        found: list[tuple[str, bytes, Any, object]] = []
        for key in members:
            inner = members.nested_object(key)
            within = None if inner is None else [(name, inner.payload(name)) for name in inner]
            elements = members.nested_objects(key)
            opened = (
                None if elements is None else [one and [(name, one.payload(name)) for name in one] for one in elements]
            )
            found.append((key, members.payload(key), repr(members.value(key)), (within, opened)))
    except InvalidJSON as error:
        return str(error)
    return found


@given(objects, st.sampled_from([(",", ":"), (", ", ": ")]), st.booleans())
def test_decode_slices_of_written_json_is_the_scan(value: Any, separators: tuple[str, str], ascii: bool) -> None:
    line = json.dumps(value, separators=separators, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    assert outcome(decode_slices, line) == outcome(scan_slices, line)


@given(st.binary() | st.text().map(str.encode))
@example(b'{"a":1,"a":2}')
@example(b'{"a":1,"b":{},"a":1}')
@example(b'{"a":1,"b":2,"a":12345}')
@example(b'{"\\u0061":1,"a":2}')
@example(b'{"a":1e999,"b":"\\ud800","c":"\xff"}')
@example(b'{"a":"\\ud800"}')
@example(b'{"a":NaN}')
@example(b'{"a":-0,"b":0.10,"c":1E5}')
@example(b'{"a":' + b"1" * 5000 + b"}")
@example(b'{"a":1}x')
@example(b" {}")
@example(b'\xef\xbb\xbf{"a":1}')
@example(b'{"a":' + b"[" * 1100 + b"]" * 1100 + b"}")
def test_decode_slices_of_any_bytes_is_the_scan(line: bytes) -> None:
    assert outcome(decode_slices, line) == outcome(scan_slices, line)


@given(objects, st.data())
def test_decode_slices_of_damaged_json_is_the_scan(value: Any, data: st.DataObject) -> None:
    line = json.dumps(value, separators=(",", ":")).encode()
    at = data.draw(st.integers(0, len(line)))
    changed = line[:at] + data.draw(st.sampled_from([b"", b",", b'"a":1,', b" ", b"}", b"0"])) + line[at:]
    assert outcome(decode_slices, changed) == outcome(scan_slices, changed)


WRONG = [
    "01",
    '"\n"',
    "[1,]",
    '"\\x"',
    "+1",
    "1.",
    '"\\u12"',
    "tru",
    "-",
    "1e",
    ".5",
    '"\x1f"',
    "[1 2]",
    "{1:2}",
    "nulll",
    "1\x0b",
    "1_0",
]
ODD = [
    '"\\ud83d\\ude00"',
    '"\x7f"',
    '{"a":1,"a":2}',
    '"\\ud800\\u0041"',
    '"\\udc00"',
    '"a\\/b"',
    "\t1",
    "-0",
    "1E400",
    "1" * 5000,
]


@pytest.mark.parametrize("text", WRONG)
def test_decode_slices_of_no_value_raises_as_the_scan(text: str) -> None:
    line = f'{{"a":{text}}}'.encode()
    assert isinstance(outcome(scan_slices, line), str)
    assert outcome(decode_slices, line) == outcome(scan_slices, line)


@pytest.mark.parametrize("text", ODD)
def test_decode_slices_of_unusual_value_is_the_scan(text: str) -> None:
    line = f'{{"a":{text}}}'.encode()
    assert decode_slices(line).payload("a") == scan_slices(line).payload("a") == text.strip().encode()
    assert outcome(decode_slices, line) == outcome(scan_slices, line)


@pytest.mark.parametrize("count", [1, 2, 100])
def test_decode_slices_with_repeated_key_raises(count: int) -> None:
    members = [f'"{number}":{number}' for number in range(count)]
    line = ("{" + ",".join([*members, '"0":0']) + "}").encode()
    with pytest.raises(InvalidJSON, match="repeated key"):
        decode_slices(line)


def one_by_one(lines: list[bytes]) -> list[Raw] | None:
    """Return the payloads of lines of records; None if one of them is not a record."""
    try:
        opened = [scan_slices(line) for line in lines]
    except InvalidJSON:
        return None
    if any(list(members) != ["stream"] for members in opened):
        return None
    return [Raw(members.payload("stream")) for members in opened]


@given(st.lists(values, min_size=1), st.booleans())
def test_slice_records_returns_each_payload(records: list[Any], ascii: bool) -> None:
    texts = [json.dumps(record, ensure_ascii=ascii).encode("utf-8", "surrogatepass") for record in records]
    lines = [RECORD_PREFIX + text + b"}" for text in texts]
    expected = one_by_one(lines)
    assert slice_records(lines) == expected
    assert expected in (None, texts)


#: Lines that begin like records. Some are invalid; joined, they would look like valid records.
BESIDE = [
    [b'{"stream":1},{"stream":2}', b'{"stream":[3}', b'{"stream":4]}'],
    [b'{"stream":1,"x}', b'{"stream":y"}'],
    [b'{"stream":1,2}', b'{"stream":"}'],
    [b'{"stream":[1}', b'{"stream":2]}'],
    [b'{"stream":"}', b'{"stream":"}'],
    [b'{"stream":1,"stream":2}', b'{"stream":3}'],
    [b'{"stream":1,"result":2}', b'{"stream":3}'],
    [b'{"stream":}', b'{"stream":3}'],
    [b'{"stream":1}}', b'{"stream":3}'],
    [b'{"stream":1', b'{"stream":3}'],
    [b'{"stream":', b'{"stream":3}'],
    [b'{"stream":"\xff"}', b'{"stream":3}'],
    [b'{"stream":NaN}', b'{"stream":3}'],
    [b'{"stream":01}', b'{"stream":3}'],
    [b'{"stream":' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}", b'{"stream":3}'],
    [b'{"stream":' + b"1" * 5000 + b"}", b'{"stream":3}'],
]


@pytest.mark.parametrize("lines", BESIDE)
def test_slice_records_with_an_invalid_line_returns_none(lines: list[bytes]) -> None:
    assert slice_records(lines) in (None, one_by_one(lines))
    for count in range(1, len(lines)):
        assert slice_records(lines[:count]) in (None, one_by_one(lines[:count]))


def test_slice_records_with_spaces_returns_none() -> None:
    assert slice_records([b'{"stream": 1}', b'{"stream":2}']) is None


@given(st.lists(st.binary() | st.text().map(str.encode), min_size=1, max_size=4))
def test_slice_records_of_any_bytes_invents_no_record(insides: list[bytes]) -> None:
    lines = [RECORD_PREFIX + inside + b"}" for inside in insides]
    assert slice_records(lines) in (None, one_by_one(lines))
    for line in lines:
        alone = one_by_one([line])
        found = decode_enclosed(line, RECORD_PREFIX)
        assert found is None or (alone is not None and repr(found) == repr((loads(alone[0]),)))


@given(values)
def test_decode_enclosed_returns_the_value_alone(value: Any) -> None:
    text = json.dumps(value).encode()
    assert decode_enclosed(RECORD_PREFIX + text + b"}", RECORD_PREFIX) == (value,)
    for wrong in (
        RECORD_PREFIX + text,
        RECORD_PREFIX + text + b"}}",
        RECORD_PREFIX + text + b"} ",
        b" " + RECORD_PREFIX + text + b"}",
    ):
        assert decode_enclosed(wrong, RECORD_PREFIX) is None


LONG = b'"' + b"x" * 70_000 + b'"'


@pytest.mark.parametrize(
    "line",
    [
        b'{"a":%b,"b":[1,{"c":"\\ud800\\n"}]}' % LONG,
        b' { "a" : %b , "b" : [ 1, { } ] } ' % LONG,
        b'{"a":"\\uD83D\\uDE00\\\\ud83d","b":%b,"c":{"b":1}}' % LONG,
        b'{"b":"\xc3\xa4","a":%b}' % LONG,
        b'{"a":%b%b%b}' % (b"[" * 500, LONG, b"]" * 500),
    ],
)
def test_decode_slices_of_long_line_is_the_scan(line: bytes) -> None:
    assert dict(decode_slices(line)).keys() == dict(scan_slices(line)).keys()
    for name in scan_slices(line):
        assert decode_slices(line).payload(name) == scan_slices(line).payload(name)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"a":%b,"a":1}' % LONG, "repeated name"),
        (b'{"a":1,"b":2,"a":%b}' % LONG, "repeated name"),
        (b'{"a":1,"a":1,"b":%b}' % LONG, "repeated name"),
        (b'{"a":1,"b":%b,"b":2}' % LONG, "repeated name"),
        (b'{"\\u0061":1,"b":%b}' % LONG, "escapes"),
        (b'{"a":%b,}' % LONG, "trailing comma"),
        (b'{"a":%b} x' % LONG, "trailing"),
        (b'{"a":%b,"b":"\\u12"}' % LONG, "malformed|truncated"),
        (b'{"a":%b,"b":"\xff"}' % LONG, "UTF-8"),
        (b'{"a":%b%b%b}' % (b"[" * 1000, LONG, b"]" * 1000), "nested deeper than 1000"),
        (b'{"a":%b,%b}' % (LONG, b",".join(b'"%d":1' % number for number in range(200))), "more than 100 members"),
        (b"[%b]" % LONG, "object"),
    ],
)
def test_decode_slices_of_invalid_long_line_raises(line: bytes, error: str) -> None:
    with pytest.raises(InvalidJSON, match=error):
        decode_slices(line)
