"""The fast decoder of requests: it returns the value of the usual decoder, or None."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp.protocol.dispatcher import MAX_CALLS, MAX_LINE, Call, decode_request, encode_request, submit_in_parts
from harp.protocol.json_text import Raw
from harp.protocol.schema import ProtocolError
from harp_daemon.sliced_json import decode_slices
from harpcaller.api.fast_decoder import decode_usual_request

CALL: dict[str, Any] = {"host": "web01", "procedure": "p", "arguments": []}
MANY: dict[str, Any] = {"harpcaller": 1, "submit_many": [CALL, CALL]}

JOB = "00000000-0000-4000-8000-000000000000"

USUAL = [
    {"harpcaller": 1, **CALL},
    {"harpcaller": 1, **CALL, "keep_alive": True, "queue": {"name": {"q": 1}}, "timeout": 5, "info": None},
    {"harpcaller": 1, **CALL, "start_within": 0},
    {"harpcaller": 1, **CALL, "auth": {"token": "t"}},
    {"harpcaller": 1, "get_result": JOB, "auth": {"token": "t" * 200}, "keep_alive": True},
    {**MANY, "auth": {"token": "t"}},
    {"harpcaller": 1, "get_result": JOB},
    {"harpcaller": 1, "get_result": ""},
    {"harpcaller": 1, "get_result": JOB, "wait": True, "keep_alive": True},
    {"harpcaller": 1, "get_result": JOB, "wait": False},
    MANY,
    {**MANY, "keep_alive": True},
    {"harpcaller": 1, "submit_many": []},
    {"harpcaller": 1, "submit_many": [{**CALL, "arguments": {"a b": " "}, "info": {"x": [1, 2.50]}}]},
    {"submit_many": [{**CALL, "queue": {"concurrency": 3, "name": {"q": 1}}, "timeout": 5}, CALL], "harpcaller": 1},
    {"harpcaller": 1, "submit_many": [{**CALL, "queue": {"name": {}}, "max_exec_time": 123456789}]},
]

#: Requests that only the usual decoder decodes or refuses.
UNUSUAL = [
    b"",
    b"[]",
    b'{"harpcaller":1,"cancel":"x"}',
    b'{"harpcaller":1}',
    b'{"harpcaller":1,"get_result":"x","auth":null}',
    b'{"harpcaller":1,"get_result":"x","auth":{"token":""}}',
    b'{"harpcaller":1,"get_result":"x","auth":{"token":"t","token":"t"}}',
    b'{"harpcaller":1,"submit_many":[],"auth":{"token":"t","user":"u"}}',
    b'{"get_result":"x"}',
    b'{"harpcaller":1,"get_result":"x","wait":null}',
    b'{"harpcaller":1,"get_result":"x","host":"a"}',
    b'{"harpcaller":1,"get_result":"x","submit_many":[]}',
    b'{"harpcaller":1,"host":"a","procedure":"","arguments":[]}',
    b'{"harpcaller":1,"host":"a","procedure":"p"}',
    b'{"harpcaller":1,"host":"a","procedure":"p","arguments":[],"wait":true}',
    b'{"harpcaller":1.0,"host":"a","procedure":"p","arguments":[]}',
    b'{"harpcaller":1,"submit_many":[{"host":"a","procedure":"p"}]}',
    b'{"harpcaller":2,"submit_many":[]}',
    b'{"harpcaller":1,"submit_many":[],"submit_many":[]}',
    b'{"harpcaller":1,"submit_many":[{"host":"a","procedure":"p","arguments":[],"arguments":[]}]}',
    b'{"harpcaller":1,"submit_many":[{"host":"a","procedure":"p","arguments":[],"timeout":1.5}]}',
    b'{"harpcaller":1,"submit_many":[{"host":"a","procedure":"p","arguments":[],"timeout":0}]}',
    b'{"harpcaller":1,"submit_many":[{"host":"a","procedure":"p","arguments":[],"timeout":null}]}',
    b'{"harpcaller":1,"submit_many":[{"host":"a","procedure":"p","arguments":[],"start_within":-1}]}',
    b'{"harpcaller":1,"submit_many":[{"host":"a","procedure":"p","arguments":1}]}',
    b'{"harpcaller":1,"submit_many":[{"host":"a","procedure":"p","arguments":[],"queue":{"name":1}}]}',
    b'{"harpcaller":1,"submit_many":[{"host":"\\u0061","procedure":"p","arguments":[]}]}',
    b'{"harpcaller":1,"submit_many":[{"host":"\\ud800","procedure":"p","arguments":[]}]}',
    b'{"harpcaller":1,"submit_many":[{"host":"a","procedure":"p","arguments":[],"other":1}]}',
    b'{"harpcaller":1,"submit_many":[' + b"[" * 10_000 + b"]" * 10_000 + b"]}",
]


@pytest.mark.parametrize("request_", USUAL)
@pytest.mark.parametrize("separators", [None, (",", ":")])
def test_usual_request_is_decoded_alike(request_: Any, separators: Any) -> None:
    line = json.dumps(request_, separators=separators).encode()
    assert decode_usual_request(line) == decode_request(line, decode_slices)


@pytest.mark.parametrize("line", UNUSUAL)
def test_unusual_request_is_decoded_by_the_protocol(line: bytes) -> None:
    assert decode_usual_request(line) is None


CHARACTERS = st.sampled_from('{}[]",: 01aé\\"\t')


@given(st.sampled_from(USUAL), st.integers(0, 10**6), st.text(CHARACTERS, max_size=3), st.integers(0, 3))
def test_changed_request_is_never_decoded_differently(request_: Any, at: int, new: str, removed: int) -> None:
    text = json.dumps(request_)
    at %= len(text)
    line = (text[:at] + new + text[at + removed :]).encode()
    decoded = decode_usual_request(line)
    if decoded is not None:
        assert decoded == decode_request(line, decode_slices)


def test_bulk_request_with_too_many_calls_is_refused() -> None:
    line = json.dumps({"harpcaller": 1, "submit_many": [CALL] * (MAX_CALLS + 1)}).encode()
    assert decode_usual_request(line) is None
    with pytest.raises(ProtocolError, match="expected at most 10000 calls"):
        decode_request(line, decode_slices)


def test_long_bulk_request_is_decoded_alike() -> None:
    calls = [{**CALL, "arguments": [number, "x" * 500]} for number in range(3000)]
    line = json.dumps({"harpcaller": 1, "submit_many": calls, "keep_alive": True}).encode()
    assert decode_usual_request(line) == decode_request(line, decode_slices)
    repeated = line.replace(b'"arguments": [2999', b'"host": "web02", "arguments": [2999')
    assert decode_usual_request(repeated) is None
    # msgspec would make an object of each element before it refuses them.
    assert decode_usual_request(b'{"harpcaller":1,"submit_many":[%b]}' % b",".join([b"1"] * 300_000)) is None


def test_submit_in_parts_keeps_within_the_limits() -> None:
    small = Call("web01", "p", [])
    assert [len(part.calls) for part in submit_in_parts([])] == [0]
    assert [len(part.calls) for part in submit_in_parts([small] * MAX_CALLS)] == [MAX_CALLS]
    assert [len(part.calls) for part in submit_in_parts([small] * (2 * MAX_CALLS + 1))] == [MAX_CALLS, MAX_CALLS, 1]
    large = Call("web01", "p", Raw(b'["' + b"x" * (MAX_LINE // 3) + b'"]'))
    parts = list(submit_in_parts([large] * 5))
    assert [len(part.calls) for part in parts] == [2, 2, 1]
    assert all(len(encode_request(part, keep_alive=True)) <= MAX_LINE for part in parts)
