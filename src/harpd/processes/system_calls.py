"""A filter of system calls (seccomp): a process and its descendants leave no programs and no keys to later processes.

The filter is a program for the kernel, which it runs before each system call. It refuses to set the setuid and setgid
bits of a mode, and the calls whose arguments it cannot see: `openat2`, and rings of requests (io_uring). It refuses
keyrings, and POSIX message queues: the kernel keeps both for a user that has no process any more. Programs of another
architecture, such as those of 32 bits, have other numbers of system calls, so that all of theirs are refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_SET_SECCOMP, _MODE_FILTER = 22, 2  #: Of prctl(2).
_LOAD, _IF_EQUAL, _IF_GREATER_OR_EQUAL, _IF_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  #: Codes of instructions.
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  #: Offsets in what the kernel passes to the filter.
_SETUID_BITS = 0o6000
_CREATES = os.O_CREAT | (os.O_TMPFILE & ~os.O_DIRECTORY)
_X32 = 0x40000000  #: From this number on, system calls of x86-64 have another form.

#: For each machine: the architecture; the system calls with a mode, and its argument; those that open files, with their
#: arguments for flags and mode; those that are refused.
_MACHINES = {
    "x86_64": (
        0xC000003E,
        {90: 1, 91: 1, 268: 2, 452: 2, 85: 1, 133: 1, 259: 2},  # chmod, fchmod(at)(2), creat, mknod(at)
        {2: (1, 2), 257: (2, 3)},  # open(at)
        (437, 425, 248, 249, 250, 240),  # openat2, io_uring_setup, add_key, request_key, keyctl, mq_open
    ),
    "aarch64": (0xC00000B7, {52: 1, 53: 2, 452: 2, 33: 2}, {56: (2, 3)}, (437, 425, 217, 218, 219, 180)),
}

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def leave_nothing_to_later_processes() -> None:
    """Apply the filter to this process, which has no_new_privs or all rights. It has no effect on other machines.

    Raises OSError.
    """
    machine = _MACHINES.get(os.uname().machine)
    if machine is None:
        return
    instructions = _assemble(*machine)
    program = _Program(len(instructions) // 8, instructions)
    if _libc.prctl(_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(program), 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _assemble(
    architecture: int, modes: dict[int, int], opens: dict[int, tuple[int, int]], refused: tuple[int, ...]
) -> bytes:
    """Return the instructions. Each begins with a code and the number of instructions to skip, if true and if not."""
    unknown = (_RETURN, 0, 0, _ERROR | errno.ENOSYS)
    found = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 1, 0, architecture),
        unknown,
        (_LOAD, 0, 0, _NUMBER),
        (_IF_GREATER_OR_EQUAL, 0, 1, _X32),
        unknown,
    ]
    for number, mode in modes.items():
        found += [(_IF_EQUAL, 0, 4, number), *_check_mode(mode)]
    for number, (flags, mode) in opens.items():
        load_flags = (_LOAD, 0, 0, _ARGUMENTS + 8 * flags)
        found += [(_IF_EQUAL, 0, 6, number), load_flags, (_IF_BITS, 0, 3, _CREATES), *_check_mode(mode)]
    for number in refused:
        found += [(_IF_EQUAL, 0, 1, number), unknown]
    return b"".join(struct.pack("=HBBI", *each) for each in [*found, (_RETURN, 0, 0, _ALLOW)])


def _check_mode(argument: int) -> list[tuple[int, int, int, int]]:
    """Return the instructions that refuse a mode with these bits, and allow others."""
    load = (_LOAD, 0, 0, _ARGUMENTS + 8 * argument)
    refuse, allow = (_RETURN, 0, 0, _ERROR | errno.EPERM), (_RETURN, 0, 0, _ALLOW)
    return [load, (_IF_BITS, 0, 1, _SETUID_BITS), refuse, allow]
