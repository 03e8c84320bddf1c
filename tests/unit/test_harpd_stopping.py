"""When a stop takes a call to be gone: looks that prove nothing, and numbers that may be another's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from harpd.processes.process_tree import CallTree, Process, Snapshot
from harpd.supervisor import termination as stopping
from harpd.supervisor.event_loop import EventLoop
from harpd.supervisor.termination import TerminationSequence

#: No process of this system has such a number.
MAIN = 5_000_000
LEFT = Process(MAIN + 1, 60, 1, MAIN, MAIN)


def gone(look: Callable[[float], Snapshot], strays: Callable[[], bool]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Stop what these looks show, after the main process's end; the receipt, and those that told of survivors."""
    loop = EventLoop()
    told: list[dict[str, Any]] = []

    def tell() -> None:
        receipt = stopping_.stop_report()
        assert receipt is not None
        told.append(receipt)

    stopping_ = TerminationSequence(
        loop, CallTree(MAIN, 50, b"HARPD_CALL=a"), 0.01, look, lambda processes, tree: strays(), tell, loop.stop
    )
    stopping_.on_main_exit(0)
    loop.call_later(20.0, loop.stop)
    loop.run()
    receipt = stopping_.stop_report()
    assert receipt is not None
    return receipt, told


@pytest.mark.parametrize(("doubts", "complete"), [(0, True), (3, True), (1000, False)])
def test_a_doubt_is_settled_by_some_more_looks_or_told(doubts: int, complete: bool) -> None:
    moments: list[float] = []

    def look(moment: float) -> Snapshot:
        moments.append(moment)
        return Snapshot()

    answers = itertools.chain([True] * doubts, itertools.repeat(False))
    receipt, told = gone(look, lambda: next(answers))
    assert (receipt["complete"], receipt["survivors"], told) == (complete, [], [])
    assert len(moments) == min(doubts, 5) + 1
    assert moments == sorted(set(moments))  # each is younger than the one before


def test_a_session_that_nobody_has_looked_at_for_long_may_be_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_TRUSTED", 0.0)
    strangers = Process(MAIN + 2, 70, 1, MAIN, MAIN)
    looks = iter([Snapshot({LEFT.pid: LEFT})])
    receipt, told = gone(lambda moment: next(looks, Snapshot({strangers.pid: strangers})), lambda: False)
    assert {one["pid"] for one in receipt["processes"]} == {MAIN, LEFT.pid}
    assert (receipt["found"], receipt["complete"], told) == (2, True, [])


def test_what_is_seen_in_some_looks_only_is_told_as_a_survivor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that forks and exits without pause, and is in no look that is whole when it is not seen."""
    monkeypatch.setattr(stopping, "_DEATH", 0.1)
    monkeypatch.setattr(stopping, "_LOOK_RARELY", 0.05)
    numbers = itertools.count(MAIN + 1)
    looks = 0

    def look(moment: float) -> Snapshot:
        nonlocal looks
        looks += 1
        if looks > 100:
            return Snapshot()
        pid = next(numbers)
        return Snapshot() if looks % 3 == 0 else Snapshot({pid: Process(pid, 60, 1, MAIN, MAIN)})

    receipt, survivors = gone(look, lambda: looks <= 100)
    assert [len(one["survivors"]) for one in survivors] == [1]
    assert not survivors[0]["complete"]
    assert (receipt["survivors"], receipt["complete"]) == ([], True)
