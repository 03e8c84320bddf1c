"""The cgroup of a call: its members, and killing all of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harpd.processes.cgroup import CallCgroups, Cgroup
from support.cgroups import own_cgroup
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.hopper import hopping

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


def test_cgroup_kills_fork_loop(tmp_path: Path) -> None:
    with own_cgroup() as place, contextlib.ExitStack() as ending:
        # The processes that the test starts from now on are in it.
        group = CallCgroups(str(place)).create("a", os.getpid())
        assert group is not None
        try:
            ending.enter_context(hopping(tmp_path, session=True))
        finally:
            (place.parent / "cgroup.procs").write_text(str(os.getpid()))
        assert group.populated
        assert group.can_kill
        group.kill()
        wait_until(lambda: not group.populated, what="an empty cgroup")


def test_cgroup_removed_is_empty() -> None:
    group = Cgroup("/nowhere/call-a")
    assert not group.populated
    assert not group.can_kill
    assert group.pids() == set()
    group.kill()
    group.remove()


@pytest.mark.parametrize("subgroup", ["", "supervisor"])
def test_delegated_cgroup_is_that_of_the_service(subgroup: str) -> None:
    """With ``DelegateSubgroup=``, the service's cgroup has no processes, so that it can limit the calls below it."""
    code = "from harpd.processes.cgroup import delegated_cgroup; input(); print(delegated_cgroup())"
    with own_cgroup() as place:
        own = place / subgroup
        own.mkdir(exist_ok=True)
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        (own / "cgroup.procs").write_text(str(process.pid))
        os.setxattr(place, "trusted.delegate", b"1")
        assert process.communicate(b"\n", timeout=DEADLINE)[0].decode() == f"{place}\n"
