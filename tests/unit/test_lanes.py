"""The keys of lanes."""

from __future__ import annotations

import json

import pytest

from harp.protocol.json_text import Raw
from harpcaller.model.lanes import host_lane, queue_lane


@pytest.mark.parametrize(
    "spelling",
    [b'{"a":1,"b":[2,"x"]}', b'{ "b" : [2.0, "\\u0078"],\t"a": 10e-1 }'],
)
def test_queue_lane_of_equal_names_is_equal(spelling: bytes) -> None:
    assert queue_lane(Raw(spelling)) == queue_lane(Raw(b'{"a":1,"b":[2,"x"]}'))


def test_queue_lane_of_different_names_differs() -> None:
    names = [
        b"{}",
        b'{"a":1}',
        b'{"a":true}',
        b'{"a":"1"}',
        b'{"a":[1]}',
        b'{"a":null}',
        b'{"b":1}',
        b'{"a":"\\ud800"}',
    ]
    lanes = {queue_lane(Raw(name)) for name in names}
    assert len(lanes) == len(names)


def test_host_lane_differs_from_every_queue_lane() -> None:
    assert host_lane("{}") != queue_lane(Raw(b"{}"))
    assert host_lane("web01") != host_lane("web02")
    assert host_lane("\ud800") == host_lane("\ud800")


def test_lane_key_of_any_name_is_short() -> None:
    assert len(queue_lane(Raw(json.dumps({"a": "x" * 1_000_000}).encode()))) < 50
