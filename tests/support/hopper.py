"""A fork loop: it forks and exits without pause, so that each process ends before it can be read or signalled."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from harpd.processes.cookie import cookie_for
from harpd.processes.process_tree import Process, take_snapshot
from support.deadline import wait_until

__all__ = ["HOP", "group_lives", "hopping", "is_hopper"]

#: The code of the loop, for the text of a procedures file: it continues as long as the file `going` exists.
HOP = """
import os, signal

def hop(going, session=False):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while os.path.exists(going):
        if os.fork():
            os._exit(0)
        if session:
            os.setsid()
    os._exit(0)
"""
_PROGRAM = HOP + "\nimport sys; os.setpgid(0, 0); hop(sys.argv[1], sys.argv[2] == 'session')\n"


@contextlib.contextmanager
def hopping(directory: Path, session: bool = False, **environment: str) -> Iterator[int]:
    """Run a fork loop, and stop it.

    Args:
        directory: where the file is made whose removal ends it.
        session: whether it has a new session after each hop.
        environment: its environment.

    Yields:
        its process group, if it keeps it.
    """
    going = directory / f"going-{uuid.uuid4().hex}"
    going.touch()
    kind = "session" if session else "group"
    reading, writing = os.pipe()  # open until the last process of the loop has ended
    try:
        command = [sys.executable, "-c", _PROGRAM, str(going), kind]
        process = subprocess.Popen(command, env=environment, pass_fds=(writing,))
        os.close(writing)
        wait_until(lambda: process.poll() is not None, what="the first hop")
        yield process.pid
    finally:
        going.unlink()
        os.read(reading, 1)
        os.close(reading)


def group_lives(group: int) -> bool:
    """Return whether a process group has a live process."""
    return any(process.group == group and process.alive for process in take_snapshot().values())


def is_hopper(process: Process, group: int) -> bool:
    """Return whether a process of a snapshot is one of a fork loop with the cookie of the call ``hopper``.

    A process in uninterruptible sleep shows no cookie. It is recognized by its command.
    """
    known = cookie_for("hopper") in process.cookies or process.group == group
    return process.alive and (known or (process.state == "D" and process.command.startswith("python")))
