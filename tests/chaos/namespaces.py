"""A run of root has separate mounts and pids: the kernel ends all remaining processes, and pids can be chosen."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from typing import NoReturn

_NEW_MOUNTS, _NEW_PIDS = 0x00020000, 0x20000000


def enter() -> bool:
    """Continue in a new process with its own mounts and pids; return whether that was possible.

    If it is, this function returns in the new process only. The first one passes signals on, and exits with its status.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0 or libc.unshare(_NEW_MOUNTS | _NEW_PIDS):
        return False
    if init := os.fork():
        _wait(init)
    os.setsid()  # Ctrl-C is for the first process, which passes it on
    if worker := os.fork():
        _wait(worker)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
    return True


def _wait(child: int) -> NoReturn:
    """Wait for a child, reap all others, and exit with its status."""

    def send(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, send)
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
