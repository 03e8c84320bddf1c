"""Ends that one user does not fetch leave room for the calls of the others."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import OWNER, SECRET, Harpd

PROCEDURES = """
from harpd.proc import procedure

@procedure(max_calls_per_process=1000)
def quick():
    return 1

@procedure(max_calls_per_process=1000)
def large(size):
    return "x" * size
"""
#: Sessions that a host stores at most for one user: 20 for each call of max_calls.
MAX_CALLS, SESSIONS = 2, 40
USERS = {"greedy": "plain:greedy", "other": "plain:other"}
#: Seconds that a call of the other user may take: it must not wait for an end of the retention, an hour.
PROMPT = 20.0


def start(harpd: Harpd, user: str, procedure: str, *arguments: Any, owner: str = OWNER) -> dict[str, Any]:
    """Start a resumable call with the longest retention; return its last line, and do not release it."""
    call = {"id": str(uuid.uuid4()), "owner": owner, "secret": SECRET, "instance": harpd.status()["instance"]}
    call |= {"disconnect_timeout": 3600, "result_ttl": 86400, "timeout": 60, "max_exec_time": 60}
    auth = {"user": user, "password": user}
    with harpd.connect() as client:
        client.send({"harp": 1, "procedure": procedure, "arguments": arguments, "auth": auth, "call": call})
        while True:
            line: dict[str, Any] = client.message()
            if line.keys() & {"result", "error"}:
                return line


def start_until_refused(harpd: Harpd, user: str, *call: Any, owner: str = OWNER) -> int:
    """Start calls until one is refused because of the ends of earlier ones; return how many were not."""
    for count in range(1000):
        wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the end of the call before")
        end = start(harpd, user, *call, owner=owner)
        if "error" in end:
            assert end["error"]["type"] in ("too_many_calls", "call_died"), end
            assert any(cause in end["error"]["message"] for cause in ("has not fetched", "used up spool_memory"))
            return count
    raise AssertionError("no call was refused")


def configuration(**limits: Any) -> dict[str, Any]:
    users = {"module": "harpd.auth.inconfig", "users": USERS}
    return {"authentication": users, "limits": {"max_calls": MAX_CALLS, **limits}}


def measured(harpd: Harpd, *call: Any) -> float:
    """Run a call of the other user; return its seconds."""
    began = time.monotonic()
    assert "result" in start(harpd, "other", *call)
    return time.monotonic() - began


def test_unfetched_ends_of_one_user_leave_calls_to_others(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES, configuration()) as harpd:
        assert start_until_refused(harpd, "greedy", "quick") == SESSIONS
        assert start_until_refused(harpd, "greedy", "quick", owner="invented") == SESSIONS // 2
        assert measured(harpd, "quick") < PROMPT
        assert start_until_refused(harpd, "other", "quick") == SESSIONS // 2 - 1


def test_unfetched_bytes_of_one_user_leave_calls_to_others(tmp_path: Path) -> None:
    memory = 4 << 20
    limits = configuration(spool=1 << 20, spool_memory=memory)
    with Harpd(tmp_path / "harpd", PROCEDURES, limits) as harpd:
        assert 2 <= start_until_refused(harpd, "greedy", "large", 3 << 20) <= 4
        assert measured(harpd, "quick") < PROMPT
        assert measured(harpd, "large", 2 << 20) < PROMPT  # a line of more than 1 MiB
