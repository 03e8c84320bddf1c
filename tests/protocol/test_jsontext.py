"""Strict JSON: what is read, what is refused, what is passed on untouched."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp.protocol.json_text import (
    MAX_DEPTH,
    Decoder,
    Envelope,
    InvalidJSON,
    NotJSON,
    Raw,
    canonical,
    decode_values,
    dumps,
    loads,
)
from harp_daemon.sliced_json import decode_slices

OPENERS = pytest.mark.parametrize("opener", [decode_values, decode_slices])

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
def test_what_is_not_json_is_refused_with_its_reason(text: bytes, message: str) -> None:
    with pytest.raises(InvalidJSON, match=message):
        loads(text)


@pytest.mark.parametrize(
    "text",
    ['"\\ud800"', "1" + "0" * 40, "0.1", '{"b": 1, "a": 2}', nested(200), '{"": {"": 0}}', "1e999", '"[[[["'],
)
def test_text_survives_being_sliced_to_the_letter(text: str) -> None:
    line = f' {{ "head" : 1 ,\t"load":{text} }} \r'.encode()
    assert decode_slices(line).payload("load") == text.encode()
    assert dumps(decode_slices(line).payload("load")) == text.encode()


def test_brackets_in_strings_are_no_nesting() -> None:
    text = json.dumps(["[" * 2000, '\\"' + "{" * 2000])
    assert loads(text) == json.loads(text)


@given(st.lists(st.text('[]{}"\\\\a')))
def test_what_strings_hold_neither_hides_depth_nor_adds_to_it(strings: list[str]) -> None:
    text = json.dumps(strings)
    around = MAX_DEPTH - 1  # the list itself is a step, too
    assert loads("[" * around + text + "]" * around)
    with pytest.raises(InvalidJSON, match=f"nested deeper than {MAX_DEPTH}"):
        loads("[" * MAX_DEPTH + text + "]" * MAX_DEPTH)


@given(values)
def test_values_survive_the_trip(value: Any) -> None:
    assert loads(dumps(value)) == value
    assert 10 not in dumps(value)  # a line feed


@OPENERS
@given(members=st.dictionaries(st.text(), values))
def test_both_openers_see_the_same_members(opener: Decoder, members: dict[str, Any]) -> None:
    opened = opener(json.dumps(members).encode())
    assert list(opened) == list(members)
    for key, value in members.items():
        assert opened.value(key) == value
        payload = opened.payload(key)
        assert (loads(payload) if isinstance(payload, Raw) else payload) == value
        assert (opened.nested_object(key) is not None) == isinstance(value, dict)


@OPENERS
@pytest.mark.parametrize(
    "line",
    [b"[1]", b'{"a":1,"a":2}', b'{"a"}', b'{"a":1,}', b'{"a":1', b"{1:2}", b'{"a":1}x', b'{"a":NaN}', b"{", b"\x00"],
)
def test_what_is_no_object_is_refused(opener: Decoder, line: bytes) -> None:
    with pytest.raises(InvalidJSON):
        opener(line)


@OPENERS
@given(line=st.binary())
def test_any_bytes_are_an_object_or_refused(opener: Decoder, line: bytes) -> None:
    try:
        opened = opener(line)
    except InvalidJSON:
        return
    assert isinstance(json.loads(line), dict)
    assert set(opened) == set(json.loads(line))


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
]


@pytest.mark.parametrize(("value", "path", "reason"), NO_JSON, ids=[reason for _, _, reason in NO_JSON])
def test_a_value_without_a_form_in_json_is_named(value: Any, path: str, reason: str) -> None:
    with pytest.raises(NotJSON) as caught:
        dumps(value)
    assert caught.value.path == path
    assert reason in caught.value.reason


def test_the_same_list_twice_is_no_loop() -> None:
    shared: list[int] = [1]
    assert dumps([shared, shared]) == b"[[1],[1]]"


def test_an_envelope_carries_raw_text_untouched() -> None:
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
def test_equal_values_have_one_canonical_text(one: bytes, other: bytes) -> None:
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_values_have_different_canonical_texts(one: bytes, other: bytes) -> None:
    assert canonical(one) != canonical(other)
