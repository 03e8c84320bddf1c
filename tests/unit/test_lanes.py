"""Lanes: their keys, and the jobs that may start."""

from __future__ import annotations

import json
from collections import Counter, deque
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp.protocol.json_text import Raw
from harpcaller.model.lanes import Head, host_lane, queue_lane, startable_jobs


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


@dataclass
class Lane:
    """A lane in memory: its queued jobs, and the number of jobs that may start."""

    waiting: deque[Head]
    room: int


class Lanes:
    """Several lanes, and the number of slots held on each host."""

    def __init__(self, lanes: list[Lane], holding: Counter[str]) -> None:
        self.lanes = lanes
        self.holding = holding
        self.asked: Counter[str] = Counter()

    def next_head(self, seq: int) -> Head | None:
        heads = [lane.waiting[0] for lane in self.lanes if lane.waiting and lane.room]
        return min((head for head in heads if head.seq > seq), key=lambda head: head.seq, default=None)

    def holding_on(self, host: str) -> int:
        self.asked[host] += 1
        return self.holding[host]

    def start(self, limit: int, max_calls_per_host: int) -> list[int]:
        started = []
        for head in startable_jobs(self.next_head, self.holding_on, limit=limit, max_calls_per_host=max_calls_per_host):
            [lane] = [lane for lane in self.lanes if lane.waiting and lane.waiting[0] == head]
            lane.waiting.popleft()
            lane.room -= 1
            started.append(head.seq)
        return started


def lane(host: str, *seqs: int, room: int = 1000) -> Lane:
    return Lane(deque(Head(seq, host) for seq in seqs), room)


def test_startable_jobs_of_several_lanes_are_in_order() -> None:
    lanes = Lanes([lane("a", 1, 4, 5), lane("b", 2, 7), lane("c", 3, 6)], Counter())
    assert lanes.start(5, 100) == [1, 2, 3, 4, 5]
    assert lanes.start(5, 100) == [6, 7]


def test_startable_jobs_skips_a_full_lane() -> None:
    assert Lanes([lane("a", 1, 3, 4, room=2), lane("b", 2, room=0)], Counter()).start(9, 100) == [1, 3]


def test_startable_jobs_skips_lanes_of_a_full_host() -> None:
    mixed = Lane(deque([Head(2, "full"), Head(3, "free")]), 9)
    lanes = Lanes([lane("full", 1), mixed, lane("free", 4)], Counter({"full": 1, "free": 1}))
    assert lanes.start(9, 2) == [1, 4]


def test_startable_jobs_with_a_lowered_limit_yields_none() -> None:
    assert Lanes([lane("a", 1)], Counter(a=5)).start(9, 2) == []


def test_startable_jobs_with_limit_zero_reads_nothing() -> None:
    lanes = Lanes([lane("a", 1)], Counter())
    assert lanes.start(0, 9) == []
    assert not lanes.asked


HEADS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), max_size=25)


@given(HEADS, st.lists(st.integers(0, 4), min_size=5, max_size=5), st.integers(0, 9), st.integers(0, 4), st.data())
def test_startable_jobs_equals_a_scan_of_all_queued_jobs(
    waiting: list[tuple[str, int]], rooms: list[int], limit: int, max_calls_per_host: int, data: st.DataObject
) -> None:
    holding = Counter({host: data.draw(st.integers(0, 3)) for host in "abc"})
    queues = [deque[Head]() for _ in rooms]
    expected: list[int] = []
    used, room, held = Counter(holding), list(rooms), set[int]()
    for seq, (host, queue) in enumerate(waiting, 1):
        queues[queue].append(Head(seq, host))
        if queue not in held and room[queue] > 0 and used[host] < max_calls_per_host and len(expected) < limit:
            expected.append(seq)
            used[host] += 1
            room[queue] -= 1
        else:
            held.add(queue)
    lanes = Lanes([Lane(queue, room) for queue, room in zip(queues, rooms, strict=True)], holding)
    assert lanes.start(limit, max_calls_per_host) == expected
    assert max(lanes.asked.values(), default=0) <= 1
