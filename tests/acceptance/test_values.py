"""Values survive the trip unchanged: as argument, record, end result and info, direct and through the dispatcher."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import harp
from support.procedures_file import PROCEDURES
from support.system import System, running

OWN = """
from harpd.proc import Result, streaming_procedure

@streaming_procedure
def stream(value):
    yield value
    yield Result(value)
"""


def nested(depth: int) -> Any:
    value: Any = "core"
    for level in range(depth):
        value = [value] if level % 2 else {"in": value}
    return value


VALUES = {
    "big integer": 10**40,
    "negative": -(10**40),
    "float": 0.1,
    "tiny": 5e-324,
    "exponent": 1e300,
    "lone surrogate": "\ud800",
    "pair": "\U0001f600",
    "key order": {"z": 1, "a": 2, "m": {"y": 1, "b": 2}},
    "nested 200 deep": nested(200),
    "5 MB": "x" * 5_000_000,
    "empty key": {"": {"": None}},
    "controls": "\x00\x1f\u2028\n\r",
    "null": None,
    "booleans and numbers": [True, 1, 1.0, False, 0, -0.0],
}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running(tmp_path_factory.mktemp("values"), PROCEDURES + OWN) as system:
        yield system


def same(one: Any, other: Any) -> bool:
    """Equal in value, type, key order and sign of zero."""
    return json.dumps(one) == json.dumps(other)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_value_through_dispatcher_is_unchanged(system: System, value: Any) -> None:
    job = system.rpc.host("web01", info=value).stream(value)
    assert same(list(job.follow(since=0)), [value])
    other = system.rpc.job(job.id())
    assert same(other.get(), value)
    assert same(other.args(), [value])
    assert same(other.info(), value)
    assert same(list(other.stream()), [value])


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_value_through_direct_call_is_unchanged(system: System, value: Any) -> None:
    assert same(system.server.same(value), value)
    record, result = system.server.stream(value)
    assert same(record, value)
    assert isinstance(result, harp.Result)
    assert same(result.value, value)


def test_numbers_through_dispatcher_stay_as_written(system: System) -> None:
    """Numbers that Python would write differently are unchanged, also in a job that does not run."""
    line = b'{"harpcaller":1,"host":"none","procedure":"p","arguments":[1.10,1E5,12345678901234567890.0],"info":0.30}\n'
    (accepted,) = system.transcript(line)
    job = json.loads(accepted)["job_id"]
    (status,) = system.transcript(json.dumps({"harpcaller": 1, "get_status": job}).encode() + b"\n")
    assert b'"arguments":[1.10,1E5,12345678901234567890.0]' in status.replace(b": ", b":")
    assert b'"info":0.30' in status.replace(b": ", b":")
