"""Cgroups for tests: a cgroup for calls, and a freezer."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from harpd.processes.cgroup import Cgroup
from support.deadline import wait_until

__all__ = ["CONTROLLERS", "Freezer", "delegated_cgroup", "freezer", "own_cgroup"]

CONTROLLERS = frozenset({"cpu", "memory", "pids"})  #: What the kernel can limit for calls.

_FREEZERS = Path("/sys/fs/cgroup/freezer")


@contextlib.contextmanager
def own_cgroup() -> Iterator[Path]:
    """Create a version 2 cgroup; skip the test where that is not possible."""
    places = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    mounted = next((place[1] for place in places if place[2] == "cgroup2"), None)
    if mounted is None:
        pytest.skip("there is no cgroup2 here")
    directory = Path(mounted) / f"harpd-test-{uuid.uuid4().hex}"
    try:
        directory.mkdir()
    except OSError:
        pytest.skip("no cgroup can be made here")
    try:
        yield directory
    finally:
        Cgroup(str(directory)).kill()
        wait_until(lambda: not Cgroup(str(directory)).populated, what="an empty cgroup")
        Cgroup(str(directory)).remove()


@contextlib.contextmanager
def delegated_cgroup() -> Iterator[Path]:
    """Create a cgroup with controllers as systemd delegates one; skip the test where the kernel has none for it.

    The daemon belongs into its cgroup ``supervisor``, as by ``DelegateSubgroup=supervisor``.
    """
    with own_cgroup() as place:
        if not {*(place.parent / "cgroup.controllers").read_text().split()} >= CONTROLLERS:
            pytest.skip("version 2 cgroups have no controllers here: those of version 1 have them")
        enabled = (place.parent / "cgroup.subtree_control").read_text().split()
        added = CONTROLLERS - set(enabled)
        try:
            for controller in added:
                (place.parent / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError:
            pytest.skip("no controllers can be used here")
        os.setxattr(place, "trusted.delegate", b"1")
        (place / "supervisor").mkdir()
        try:
            yield place
        finally:
            Cgroup(str(place)).kill()
            (place / "cgroup.subtree_control").write_text(" ".join(f"-{name}" for name in CONTROLLERS))
            for controller in added:
                (place.parent / "cgroup.subtree_control").write_text(f"-{controller}")


class Freezer:
    """A freezer: a frozen process dies only when it is thawed, even after SIGKILL.

    Args:
        directory: a cgroup of the old kind.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def freeze(self, *pids: int) -> None:
        """Freeze these processes."""
        for pid in pids:
            (self._directory / "tasks").write_text(str(pid))
        (self._directory / "freezer.state").write_text("FROZEN")

    def thaw(self) -> None:
        """Let the processes continue, or die."""
        (self._directory / "freezer.state").write_text("THAWED")


@contextlib.contextmanager
def freezer() -> Iterator[Freezer]:
    """Yield a freezer; skip the test without cgroup support."""
    if not (_FREEZERS / "tasks").exists():
        pytest.skip("there is no freezer of the old kind here")
    directory = _FREEZERS / f"harpd-test-{uuid.uuid4().hex}"
    directory.mkdir()
    freezer = Freezer(directory)
    try:
        yield freezer
    finally:
        freezer.thaw()
        wait_until(lambda: not (directory / "tasks").read_text(), what="an empty freezer")
        directory.rmdir()
