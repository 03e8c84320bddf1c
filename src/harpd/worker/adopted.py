"""Reaping of adopted children: a worker is a subreaper, so orphaned descendants become its children and, dead, zombies.

Only the procedure may wait for its own children. The kernel does not distinguish them from adopted children, so the
functions of Python that create processes record them. A child of a library in C is safe in two cases: the library waits
for it before it returns, or another thread than the main one creates the child. Adopted children go to the main thread.
"""

from __future__ import annotations

import _posixsubprocess
import _signal  # type: ignore[import-not-found]
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

#: How many pids are recorded before those of ended processes are deleted.
_MAX_RECORDED = 1000


class AdoptedChildren:
    """The adopted children of a worker. Create it in the zygote, before the procedures file is loaded."""

    def __init__(self) -> None:
        self._worker = 0  # its pid
        self._own_children: set[int] = set()
        self._creating: list[None] = []  # an item for each thread that is creating a process
        self._reap_is_due = False  # whether a child has died in this time
        for name in ("fork", "posix_spawn", "posix_spawnp"):
            setattr(os, name, self._recording(getattr(os, name), lambda result: result))
        os.forkpty = self._recording(os.forkpty, lambda result: result[0])
        _posixsubprocess.fork_exec = self._recording(_posixsubprocess.fork_exec, lambda result: result)
        if subprocess := sys.modules.get("subprocess"):  # loaded at Python's start: it has a reference to the function
            vars(subprocess)["_fork_exec"] = _posixsubprocess.fork_exec

    def install(self) -> None:
        """Install the handler: in the zygote, so that no worker has to."""
        _signal.signal(_signal.SIGCHLD, self._on_child_death)
        _signal.siginterrupt(_signal.SIGCHLD, False)

    def start_reaping(self) -> None:
        """Begin to reap in this process, a worker that was just forked."""
        self._worker = os.getpid()
        if self._creating:  # a thread of the procedures file was creating a process
            self._creating.clear()

    def _recording(self, create: Callable[..., Any], pid_of: Callable[[Any], int]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            self._creating.append(None)  # a child that dies before it is recorded must not be reaped
            try:
                result = create(*args, **kwargs)
                if self._worker:  # not in the zygote, which adopts no children
                    self._own_children.add(pid_of(result))
            finally:
                if self._creating:  # not in the child
                    self._creating.pop()
                if self._reap_is_due:
                    self._reap()
            return result

        return record

    def _on_child_death(self, number: int, frame: FrameType | None) -> None:
        if self._worker:  # not in the zygote
            self._reap()

    def _reap(self) -> None:
        if os.getpid() != self._worker:  # a child of the procedure
            return
        try:
            with open(f"/proc/self/task/{self._worker}/children", "rb") as file:
                children = {int(pid) for pid in file.read().split()}
            # After the read: another thread may begin to create a process during it.
            self._reap_is_due = bool(self._creating)
            if self._reap_is_due:
                return
            for pid in children - self._own_children:
                os.waitpid(pid, os.WNOHANG)
        except OSError:
            pass  # the procedure has waited for it, or this kernel lacks the file
        if len(self._own_children) > _MAX_RECORDED:
            self._own_children = {pid for pid in self._own_children if os.path.exists(f"/proc/{pid}")}
