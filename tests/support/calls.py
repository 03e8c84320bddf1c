"""Helpers for tests of calls through a real harpd: the end, the printed lines, and the check for leftovers."""

from __future__ import annotations

from typing import Any

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd

#: The first line of a procedure that does not stream.
ACKNOWLEDGED = {"harp": 1, "stream_result": False}


def nothing_is_left(harpd: Harpd) -> None:
    """Check that the supervisor has no calls and no state files, and has logged no error."""
    wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the end of the calls")
    assert not list((harpd.runtime_directory / "calls").glob("*/*"))
    assert not harpd.events("callback failed")


def result(harpd: Harpd, procedure: str, *arguments: Any) -> Any:
    acknowledged, last = harpd.call(procedure, *arguments)
    assert acknowledged == ACKNOWLEDGED
    assert list(last) == ["result"], last
    return last["result"]


def error(harpd: Harpd, procedure: str, *arguments: Any) -> Any:
    *_, last = harpd.call(procedure, *arguments)
    assert "error" in last, last
    return last["error"]


def printed(harpd: Harpd, call: str) -> list[str]:
    return [event["text"] for event in harpd.events("call printed", call=call)]
