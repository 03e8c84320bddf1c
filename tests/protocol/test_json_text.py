"""Strict JSON: accepted and rejected text, and payloads that are passed on unchanged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp.protocol.dispatcher import decode_request
from harp.protocol.json_text import (
    MAX_DEPTH,
    Envelope,
    InvalidJSON,
    NotJSON,
    Raw,
    decode_values,
    dumps,
    encode_value,
    loads,
)
from harp.protocol.schema import Decoder, ProtocolError
from harp_daemon.sliced_json import decode_slices
from harpcaller.model.lanes import canonical

DECODERS = pytest.mark.parametrize("decoder", [decode_values, decode_slices])

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


REFUSED = [
    (b"", "Expecting value"),
    (b"nul", "Expecting value"),
    (b"NaN", "NaN is not JSON"),
    (b"[1, -Infinity]", "-Infinity is not JSON"),
    (b'"\xff"', "not UTF-8 at byte 1"),
    ("\ufeff1".encode(), "Expecting value"),
    ("1".encode("utf-16"), "not UTF-8"),
    (b"1 2", "Extra data"),
    (b'"a\nb"', "control character"),
    (b"1" * 5000, "digits"),
    (nested(MAX_DEPTH + 1).encode(), f"nested deeper than {MAX_DEPTH}"),
    (b"[" * 100_000, f"nested deeper than {MAX_DEPTH}"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_loads_of_invalid_json_raises_reason(text: bytes, message: str) -> None:
    with pytest.raises(InvalidJSON, match=message):
        loads(text)


def test_codec_without_module_json_rejects_invalid_text() -> None:
    program = """
import sys
from harp.protocol.json_text import InvalidJSON, NotJSON, encode_value, loads
assert loads(encode_value({"a": [1, 2.5, "\\ud800", None]})) == {"a": [1, 2.5, "\\ud800", None]}
assert not {"json", "re"} & sys.modules.keys()
for text in (b"", b"nul", b"NaN", b"[1", b'{"a" 1}', b'"\\xff"', b"1 2", b"1" * 5000):
    try:
        raise SystemExit(f"{text!r} is {loads(text)!r}")
    except InvalidJSON:
        pass
for value in (float("nan"), {1}, 10**5000):
    try:
        raise SystemExit(encode_value([value]))
    except NotJSON:
        pass
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "text",
    ['"\\ud800"', "1" + "0" * 40, "0.1", '{"b": 1, "a": 2}', nested(200), '{"": {"": 0}}', "1e999", '"[[[["'],
)
def test_slices_of_a_payload_are_unchanged(text: str) -> None:
    line = f' {{ "head" : 1 ,\t"load":{text} }} \r'.encode()
    assert decode_slices(line).payload("load") == text.encode()
    assert dumps(decode_slices(line).payload("load")) == text.encode()


def test_depth_ignores_brackets_in_strings() -> None:
    text = json.dumps(["[" * 2000, '\\"' + "{" * 2000])
    assert loads(text) == json.loads(text)


@given(st.lists(st.text('[]{}"\\\\a')))
def test_depth_with_any_string_is_exact(strings: list[str]) -> None:
    text = json.dumps(strings)
    around = MAX_DEPTH - 1  # the list itself is a step, too
    assert loads("[" * around + text + "]" * around)
    with pytest.raises(InvalidJSON, match=f"nested deeper than {MAX_DEPTH}"):
        loads("[" * MAX_DEPTH + text + "]" * MAX_DEPTH)


@given(values)
def test_dumps_and_loads_return_the_value(value: Any) -> None:
    assert loads(dumps(value)) == value
    assert 10 not in dumps(value)  # a line feed


@DECODERS
@given(members=st.dictionaries(st.text(), values))
def test_decoders_return_the_same_members(decoder: Decoder, members: dict[str, Any]) -> None:
    opened = decoder(json.dumps(members).encode())
    assert list(opened) == list(members)
    for key, value in members.items():
        assert opened.value(key) == value
        payload = opened.payload(key)
        assert (loads(payload) if isinstance(payload, Raw) else payload) == value
        assert (opened.nested_object(key) is not None) == isinstance(value, dict)


@DECODERS
@pytest.mark.parametrize(
    "line",
    [b"[1]", b'{"a":1,"a":2}', b'{"a"}', b'{"a":1,}', b'{"a":1', b"{1:2}", b'{"a":1}x', b'{"a":NaN}', b"{", b"\x00"],
)
def test_decoders_of_no_object_raise(decoder: Decoder, line: bytes) -> None:
    with pytest.raises(InvalidJSON):
        decoder(line)


@DECODERS
@given(line=st.binary())
def test_decoders_of_any_bytes_return_or_raise(decoder: Decoder, line: bytes) -> None:
    try:
        opened = decoder(line)
    except InvalidJSON:
        return
    assert isinstance(json.loads(line), dict)
    assert set(opened) == set(json.loads(line))


@pytest.mark.parametrize("value", [{1: "a", "2": "b"}, {"eth0": 1, "eth1": 2}, {1: 2, 2: 3}, {True: 1, "True": 2}])
def test_encode_different_keys_passes(value: dict[Any, Any]) -> None:
    assert len(json.loads(encode_value(value))) == 2


@pytest.fixture
def deep_recursion() -> Iterator[None]:
    """Raise the limit of the interpreter, as the daemons do."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    yield
    sys.setrecursionlimit(before)


@DECODERS
@pytest.mark.usefixtures("deep_recursion")
def test_decoders_count_only_depth_of_payload(decoder: Decoder) -> None:
    """An envelope around the deepest payload, as of a list of jobs, is no reason to reject the line."""
    for depth, line in [(0, b'{"a":%b}'), (1, b'{"a":1,"call":{"arguments":%b}}')]:
        text = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
        members = decoder(line % text)
        inner = members if depth == 0 else members.nested_object("call")
        assert inner is not None
        assert len(inner) == 1
    with pytest.raises(InvalidJSON, match="nested deeper"):
        decoder(b'{"a":%b}' % (b"[" * 2000 + b"]" * 2000))


@pytest.mark.usefixtures("deep_recursion")
def test_payload_too_deep_is_rejected_by_name() -> None:
    for depth in (MAX_DEPTH, MAX_DEPTH + 1):
        text = b"[" * depth + b"]" * depth
        line = b'{"harpcaller":1,"host":"h","procedure":"p","arguments":%b}' % text
        if depth == MAX_DEPTH:
            assert decode_request(line, decode_slices)
        else:
            with pytest.raises(ProtocolError, match=r"arguments: nested deeper than 1000"):
                decode_request(line, decode_slices)


LOOP: list[Any] = []
LOOP.append(LOOP)
DEEP: list[Any] = []
for _ in range(MAX_DEPTH * 3):
    DEEP = [DEEP]

NO_JSON = [
    (object(), "", "type object has no form in JSON"),
    ({"a": [1, {2, 3}]}, "['a'][1]", "type set has no form in JSON"),
    ([b"x"], "[0]", "type bytes has no form in JSON"),
    ({"x": float("nan")}, "['x']", "nan is not a number of JSON"),
    ({"x": {(1, 2): 3}}, "['x']", "a key is of type tuple, expected str"),
    ({"x": LOOP}, "['x'][0]", "contains itself"),
    (10**5000, "", "digits"),
    (DEEP, "", "nested deeper than"),
    ({1: "a", "1": "b"}, "", "the keys 1 and '1' are the same in JSON"),
    ([{"a": {"x9": 0, True: "a", "true": "b"}}], "[0]['a']", "the keys True and 'true' are the same"),
    ({None: "a", "null": "b"}, "", "the keys None and 'null' are the same"),
    ({1.5: "a", "1.5": "b"}, "", "the keys 1.5 and '1.5' are the same"),
    ({"a": ({1e22: 0, "1e+22": 0},)}, "['a'][0]", "the keys 1e+22 and '1e+22' are the same"),
]


@pytest.mark.parametrize(("value", "path", "reason"), NO_JSON, ids=[reason for _, _, reason in NO_JSON])
def test_dumps_of_invalid_value_raises_its_position(value: Any, path: str, reason: str) -> None:
    with pytest.raises(NotJSON) as caught:
        dumps(value)
    assert caught.value.path == path
    assert reason in caught.value.reason


def test_dumps_of_the_same_list_twice_is_accepted() -> None:
    shared: list[int] = [1]
    assert dumps([shared, shared]) == b"[[1],[1]]"


def test_dumps_of_an_envelope_keeps_raw_text() -> None:
    assert dumps(Envelope(a=Raw(b"[1.10]"), b=Envelope(c="\ud800"))) == b'{"a":[1.10],"b":{"c":"\\ud800"}}'


EQUAL = [
    (b'{"a": 1, "b": [2]}', b'{"b":[2],"a":1}'),
    (b'{"a": 1}', b'{"a": 1.0}'),
    (b'{"a": 1e40}', b'{"a": 1' + b"0" * 40 + b"}"),
    (b'{"a": 0}', b'{"a": -0.0}'),
    (b'{"a": "\\u00e9"}', '{"a": "é"}'.encode()),
    (b"{}", b" { } "),
    (b'{"a": 1e99999999999999999999}', b'{ "a":1e99999999999999999999}'),
]
DIFFERENT = [
    (b'{"a": 1}', b'{"a": true}'),
    (b'{"a": 1}', b'{"a": "1"}'),
    (b'{"a": null}', b"{}"),
    (b'{"a": [1, 2]}', b'{"a": [2, 1]}'),
    (b'{"a": 10000000000000000000000000000000000000001}', b'{"a": 1e40}'),
    (b'{"a": 1e999999999}', b'{"a": 1e999999998}'),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_canonical_of_equal_values_is_equal(one: bytes, other: bytes) -> None:
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_canonical_of_different_values_differs(one: bytes, other: bytes) -> None:
    assert canonical(one) != canonical(other)
