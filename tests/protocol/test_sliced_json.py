"""`decode_slices` against a scan of the module `json`: the same members, the same text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harp.protocol.call_output import RECORD_PREFIX
from harp.protocol.json_text import (
    MAX_DEPTH,
    InvalidJSON,
    JSONObject,
    Raw,
    decode_checked,
    decode_enclosed,
    decode_values,
    loads,
    reject_constant,
)
from harp_daemon.json_pieces import find_parts
from harp_daemon.sliced_json import decode_slices, slice_records

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
objects = st.dictionaries(st.text(), values)


REPEATED = "repeated key"


def scan(line: bytes) -> Any:
    """Return the value of JSON text: an object as a tuple of its members, a number as its text.

    Raises:
        ValueError, RecursionError: it is not JSON.
    """
    text = decode_checked(line)
    return json.loads(
        text,
        parse_int=str,
        parse_float=str,
        parse_constant=reject_constant,
        object_pairs_hook=lambda pairs: tuple(pairs),
    )


def keys_in(value: Any) -> Any:
    """Return the keys of an object that `scan` has returned; None if it is not one."""
    if not isinstance(value, tuple):
        return None
    keys = [key for key, _ in value]
    return keys if len(set(keys)) == len(keys) else REPEATED


def outcome(decode: Callable[[], Iterable[str] | None]) -> Any:
    """Return the keys of the object that a function returns; None if it returns none."""
    try:
        found = decode()
    except InvalidJSON as error:
        assert REPEATED in str(error)
        return REPEATED
    return None if found is None else list(found)


def check_slices(line: bytes, is_long: bool = False) -> None:
    """Check that `decode_slices` finds the members of a line, or rejects it. A long object has no value."""
    try:
        expected = scan(line)
    except (ValueError, RecursionError):
        expected = None
    keys = keys_in(expected)
    if keys is None or keys == REPEATED:
        with pytest.raises(InvalidJSON):
            decode_slices(line)
        return
    members = decode_slices(line)
    assert list(members) == keys
    for key, value in expected:
        payload = members.payload(key)
        assert payload == payload.strip()
        assert payload in line
        assert scan(payload) == value
        assert members.is_null(key) == (value is None)
        assert outcome(partial(members.nested_object, key)) == keys_in(value)
        elements = members.nested_objects(key)
        assert (elements is not None) == isinstance(value, list)
        if elements is not None:
            assert [outcome(partial(next, elements)) for _ in value] == list(map(keys_in, value))
        if keys_in(value) != REPEATED and not is_long:
            check_value(members, key)


def check_value(members: JSONObject, key: str) -> None:
    """Check that the value of a member is that of its payload."""
    try:
        value = loads(members.payload(key))
    except InvalidJSON as error:
        with pytest.raises(InvalidJSON, match=re.escape(str(error))):
            members.value(key)
    else:
        assert repr(members.value(key)) == repr(value)


@given(objects, st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", "\n:\r")]), st.booleans())
def test_decode_slices_of_written_json_finds_members(value: Any, separators: tuple[str, str], ascii: bool) -> None:
    check_slices(json.dumps(value, separators=separators, ensure_ascii=ascii).encode("utf-8", "surrogatepass"))


@given(st.binary() | st.text().map(str.encode))
@example(b'{"a":1,"a":2}')
@example(b'{"a":1,"b":{},"a":1}')
@example(b'{"a":1,"b":2,"a":12345}')
@example(b'{"a":1,"a":1}')
@example(b'{"a":"b\\"","a":1}')
@example(b'{"\\u0061":1,"a":2}')
@example(b'{"\\u0061":1,"\\ud83d\\ude00\\"":2}')
@example(b'{"a":1e999,"b":"\\ud800","c":"\xff"}')
@example(b'{"a":"\\ud800"}')
@example(b'{"a":["\\ud800",{"b":"\\\\ud800"} , {}],"b":{"\\ud800":1}}')
@example(b'{"a":NaN}')
@example(b'{"a":-0,"b":0.10,"c":1E5}')
@example(b'{"a":' + b"1" * 5000 + b"}")
@example(b'{"a":1}x')
@example(b" {}")
@example(b'\xef\xbb\xbf{"a":1}')
@example(b'{"a":' + b"[" * 1100 + b"]" * 1100 + b"}")
def test_decode_slices_of_any_bytes_finds_members(line: bytes) -> None:
    check_slices(line)


def check_in_pieces(line: bytes) -> None:
    """Check that a line that is decoded in short pieces gives the same as a short one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harp_daemon.json_pieces._PIECE", 40)
        patch.setattr("harp_daemon.sliced_json.LONG", 8)
        check_slices(line, is_long=True)


@given(objects, st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", "\n:\r"), (",", ":" + " " * 90)]), st.booleans())
def test_decode_slices_in_pieces_finds_members(value: Any, separators: tuple[str, str], ascii: bool) -> None:
    check_in_pieces(json.dumps(value, separators=separators, ensure_ascii=ascii).encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    ("begin", "behind"),
    [(b'{"a":', b"}"), (b'{"b":[[],', b"]}"), (b'{"b":1,"a": [', b"]}"), (b'{"' + b"x" * 16_300 + b'":', b"}")],
)
@pytest.mark.parametrize("digits", [100, 16_383, 16_384, 16_385, 32_768])
def test_long_line_may_have_long_numbers(begin: bytes, behind: bytes, digits: int) -> None:
    assert [*find_parts(begin + b"7" * digits + behind)]
    with pytest.raises(InvalidJSON, match="more than 32768 bytes of a number"):
        [*find_parts(begin + b"7" * 32_769 + behind)]


@given(objects, st.data())
def test_decode_slices_in_pieces_of_damaged_json_raises(value: Any, data: st.DataObject) -> None:
    line = json.dumps(value, separators=(",", ":")).encode()
    at = data.draw(st.integers(0, len(line)))
    damages = [b",", b'"', b"[", b"]", b"{", b"}", b":", b"\\", b"0", b".5", b" " * 90, b'"a"', b"\xc3", b'"a":1,']
    check_in_pieces(line[:at] + data.draw(st.sampled_from(damages)) + line[at + data.draw(st.integers(0, 2)) :])


@given(objects, st.data())
def test_decode_slices_of_damaged_json_finds_members(value: Any, data: st.DataObject) -> None:
    line = json.dumps(value, separators=(",", ":")).encode()
    at = data.draw(st.integers(0, len(line)))
    check_slices(line[:at] + data.draw(st.sampled_from([b"", b",", b'"a":1,', b" ", b"}", b"0"])) + line[at:])


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
def test_decode_slices_of_no_value_raises_as_for_clients(text: str) -> None:
    line = f'{{"a":{text}}}'.encode()
    with pytest.raises(InvalidJSON) as expected:
        decode_values(line)
    with pytest.raises(InvalidJSON, match=re.escape(str(expected.value))):
        decode_slices(line)


@pytest.mark.parametrize("text", ODD)
def test_decode_slices_of_unusual_value_finds_it(text: str) -> None:
    line = f'{{"a":{text}}}'.encode()
    assert decode_slices(line).payload("a") == text.strip().encode()
    check_slices(line)


@pytest.mark.parametrize("count", [1, 2, 100])
def test_decode_slices_with_repeated_key_raises(count: int) -> None:
    members = [f'"{number}":{number}' for number in range(count)]
    line = ("{" + ",".join([*members, '"0":0']) + "}").encode()
    with pytest.raises(InvalidJSON, match="repeated key"):
        decode_slices(line)


def one_by_one(lines: list[bytes]) -> list[Raw] | None:
    """Return the payloads of lines of records; None if one of them is not a record."""
    try:
        opened = [scan(line) for line in lines]
    except (ValueError, RecursionError):
        return None
    if any(keys_in(members) != ["stream"] for members in opened):
        return None
    return [Raw(line[len(RECORD_PREFIX) : -1]) for line in lines]


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


def test_slice_records_with_spaces_returns_each_payload() -> None:
    assert slice_records([b'{"stream": 1}', b'{"stream":" 2 " }', b'{"stream":\t[3, 4]\r}']) == [
        b"1",
        b'" 2 "',
        b"[3, 4]",
    ]
    assert slice_records([b'{"stream": 1}', b'{"stream":\x0b2}']) is None


@given(st.lists(st.binary() | st.text().map(str.encode), min_size=1, max_size=4))
def test_slice_records_of_any_bytes_invents_no_record(insides: list[bytes]) -> None:
    lines = [RECORD_PREFIX + inside + b"}" for inside in insides]
    assert slice_records(lines) in (None, one_by_one(lines))
    for line in lines:
        alone = one_by_one([line])
        found = decode_enclosed(line, RECORD_PREFIX)
        assert found is None or (alone is not None and repr(found) == repr((loads(alone[0]),)))


@given(values)
def test_decode_enclosed_returns_only_the_value(value: Any) -> None:
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
        b'{"\\u0061":1,"b":%b}' % LONG,
        b'{"a":%b%b%b}' % (b"[" * 500, LONG, b"]" * 500),
        b'{"a":1%b}%b' % (b" " * 70_000, b" " * 70_000),
        b'{%b"a"%b:%b"x"%b,%b"b":[%b]}' % ((b" " * 70_000,) * 6),
    ],
)
def test_decode_slices_of_long_line_finds_members(line: bytes) -> None:
    check_slices(line, is_long=True)


@pytest.mark.parametrize("text", [b"[%b]" % LONG, b'{"a":%b}' % LONG, b"1" * 70_000, b'"%b"' % (b"x" * 1024 * 1024)])
def test_decode_slices_of_long_value_gives_a_payload_only(text: bytes) -> None:
    if text.startswith(b"1"):
        with pytest.raises(InvalidJSON, match="of a number"):
            decode_slices(b'{"a":%b}' % text)
        return
    members = decode_slices(b'{"a":%b}' % text)
    assert members.payload("a") == text
    with pytest.raises(InvalidJSON, match="expected a string of at most"):
        members.value("a")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"a":%b,"a":1}' % LONG, "repeated key"),
        (b'{"a":1,"b":2,"a":%b}' % LONG, "repeated key"),
        (b'{"a":1,"a":1,"b":%b}' % LONG, "repeated key"),
        (b'{"a":1,"b":%b,"b":2}' % LONG, "repeated key"),
        (b'{"a" :%b,"\\u0061":2}' % LONG, "repeated key"),
        (b'{"b"\t:1,%b:2}' % LONG, "name of a member is too long"),
        (b'{"a":%b,}' % LONG, "trailing comma"),
        (b'{"a":%b} x' % LONG, "trailing"),
        (b'{"a":%b,"b":"\\u12"}' % LONG, "malformed|truncated"),
        (b'{"a":%b,"b":"\xff"}' % LONG, "UTF-8"),
        (b'{"a":%b%b%b}' % (b"[" * 1016, LONG, b"]" * 1016), "nested deeper than 1016"),
        (b'{"a":%b,%b}' % (LONG, b",".join(b'"%d":1' % number for number in range(200))), "more than 100 members"),
        (b"[%b]" % LONG, "object"),
    ],
)
def test_decode_slices_of_invalid_long_line_raises(line: bytes, error: str) -> None:
    with pytest.raises(InvalidJSON, match=error):
        decode_slices(line)
