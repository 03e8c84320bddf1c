"""The session of a resumable call without a dispatcher: the memory that its end uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from harp.protocol.json_text import dumps
from harpd.supervisor.call import CallContext
from harpd.supervisor.event_loop import EventLoop
from harpd.supervisor.sessions import ResumableSession, SessionTerms

TERMS = SessionTerms("owner", "digest", 60.0, 60.0, 60.0, 60.0, streaming=True, user="user")


@pytest.mark.parametrize("adopted", [False, True])
def test_session_end_uses_quota_until_discarded(tmp_path: Path, adopted: bool) -> None:
    loop = EventLoop()
    settings = {
        "spool": 1000,
        "rights": {},
        "spool_memory": 1,  # two used bytes exhaust it
        "kill_grace": 1.0,
        "runtime_directory": str(tmp_path),
        "cgroup": None,
    }
    context = CallContext(loop, "w1", settings)
    quota = context.quota
    discarded: list[ResumableSession] = []
    session = ResumableSession(context, "call", TERMS, loop.now(), discarded.append)
    exhausted = [quota.is_exhausted(session.account)]
    if adopted:
        session.adopt(None)
    else:
        session.on_started()
        session.on_end(b'{"result": 1}\n')
        session.on_exit(lambda: dumps({"by": "itself"}), None)
    exhausted.append(quota.is_exhausted(session.account))
    session.discard()
    assert discarded == [session]
    exhausted.append(quota.is_exhausted(session.account))
    quota.reserve(session.account, 2)
    exhausted.append(quota.is_exhausted(session.account))
    assert exhausted == [False, True, False, True]
    context.state_files.close()
