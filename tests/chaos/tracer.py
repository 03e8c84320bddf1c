"""Program: kills processes at entries and exits of their system calls, which it observes with ptrace.

    python -P -m chaos.tracer

It reads requests from stdin, one a line, and handles each in a separate process, which replies with one line:

    NUMBER PID START THREAD STOPS SECONDS      ->      NUMBER KILLED WHERE

START is the start time of the process; THREAD is the thread whose system calls count. After STOPS of them or, if it
does not do as many, after SECONDS the whole process is killed. KILLED is 1, or 0 if the process had ended or must not
be observed. At an entry, the system call is not carried out any more. WHERE is for reports.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

from chaos.marks import read_stat

_SYSCALL, _SEIZE, _INTERRUPT, _GET_SYSCALL_INFO = 24, 0x4206, 0x4207, 0x420E
_TRACESYSGOOD = 1
#: The signal of a stop at a system call.
_SYSTEM_CALL = signal.SIGTRAP | 0x80
#: An option of waitpid: threads, too.
_WALL = 0x40000000
#: Size of a system call's information; offsets of its kind and its number; the kind of an entry.
_INFO_SIZE, _KIND_AT, _NUMBER_AT, _ENTRY = 88, 0, 24, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, thread: int, address: int, data: object) -> None:
    if _libc.ptrace(request, thread, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class _Observed:
    """A thread with observed system calls."""

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._info = ctypes.create_string_buffer(_INFO_SIZE)
        self._number = -1
        self.where = "before a system call"

    def run(self, stops: int) -> None:
        """Return after the given number of entries and exits, or when the thread has ended."""
        _ptrace(_INTERRUPT, self._thread, 0, None)
        while stops:
            _, status = os.waitpid(self._thread, _WALL)
            if not os.WIFSTOPPED(status):
                return
            received = 0
            if os.WSTOPSIG(status) == _SYSTEM_CALL:
                stops -= 1
                self._note()
            elif not status >> 16:
                received = os.WSTOPSIG(status)
            if stops:
                _ptrace(_SYSCALL, self._thread, 0, received)

    def _note(self) -> None:
        _ptrace(_GET_SYSCALL_INFO, self._thread, _INFO_SIZE, self._info)
        entry = self._info.raw[_KIND_AT] == _ENTRY
        if entry:
            self._number = int.from_bytes(self._info.raw[_NUMBER_AT : _NUMBER_AT + 8], sys.byteorder)
        self.where = f"at the {'entry' if entry else 'exit'} of system call {self._number}"


def _kill(pid: int, start: int, thread: int, stops: int, seconds: float) -> str | None:
    """Kill a process; return where, or None if it had ended or must not be observed."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    found = read_stat(pid)
    if found is None or found[1] != start:
        return None

    def kill(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    observed = _Observed(thread)
    try:
        _ptrace(_SEIZE, thread, 0, _TRACESYSGOOD)
        observed.run(stops)
    except (PermissionError, ProcessLookupError, ChildProcessError):
        pass
    kill()
    with contextlib.suppress(ChildProcessError):
        while os.WIFSTOPPED(os.waitpid(thread, _WALL)[1]):
            pass
    return observed.where


def main() -> None:
    """Serve requests until the end of stdin."""
    for line in sys.stdin:
        if os.fork():
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            continue
        number, pid, start, thread, stops = map(int, line.split()[:5])
        where = _kill(pid, start, thread, stops, float(line.split()[5]))
        os.write(1, f"{number} {int(where is not None)} {where}\n".encode())
        os._exit(0)


if __name__ == "__main__":
    main()
