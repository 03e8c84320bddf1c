"""The session of a resumable call without a dispatcher: the memory that its end uses."""

from __future__ import annotations

import pytest

from harp.protocol.json_text import dumps
from harpd.supervisor.event_loop import EventLoop
from harpd.supervisor.resumable_session import ResumableSession, SessionTerms
from harpd.supervisor.spool import SpoolQuota

TERMS = SessionTerms("owner", "digest", 60.0, 60.0, 60.0, 60.0, streaming=True)


@pytest.mark.parametrize("adopted", [False, True])
def test_session_end_uses_quota_until_discarded(adopted: bool) -> None:
    loop, quota = EventLoop(), SpoolQuota(0)  # any used byte exhausts it
    discarded: list[ResumableSession] = []
    session = ResumableSession(loop, "call", TERMS, loop.now(), 1.0, "w1", 1000, quota, discarded.append)
    exhausted = [quota.exhausted]
    if adopted:
        session.adopt(None)
    else:
        session.on_started()
        session.on_end(b'{"result": 1}\n')
        session.on_exit(lambda: dumps({"by": "itself"}), None)
    exhausted.append(quota.exhausted)
    session.discard()
    assert discarded == [session]
    exhausted.append(quota.exhausted)
    quota.reserve(1)
    exhausted.append(quota.exhausted)
    assert exhausted == [False, True, False, True]
