"""A daemon's process: memory, pid file, background, notification of the service manager."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import os
import re
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harp_daemon import logs

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: Seconds for a message to the service manager.
_NOTIFY_TIMEOUT = 1.0


class ProcessError(Exception):
    """The process cannot be set up. The message has file and reason."""


def describe_exit(code: int) -> str:
    """Return the text for an exit code; `code` is negative for a signal, as in `subprocess.Popen.returncode`."""
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def occupy_standard_descriptors() -> None:
    """Open those of the descriptors 0, 1 and 2 that are closed: otherwise the log could be written to another file."""
    while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def reset_signals() -> None:
    """Block no signal, and do not ignore the deaths of children: a process inherits both from the one that starts it.

    The daemon could not be stopped otherwise, or not wait for its children.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextmanager
def pidfile(path: Path | None) -> Iterator[None]:
    """Write and lock a pid file on entry and remove it on exit. None: no file.

    The file of a dead process is replaced, because only the lock matters. Raises `ProcessError` if a running process
    has locked it, or it cannot be written.
    """
    if path is None:
        yield
        return
    try:
        # Private: each user who can read a file can lock it, and so prevent every later start.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        reason = "it is a symbolic link; remove it" if error.errno == errno.ELOOP else error.strerror
        raise ProcessError(f"pid file {path}: {reason}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise ProcessError(f"pid file {path}: not a file of this user; remove it")
        os.fchmod(descriptor, 0o600)  # one of an earlier version
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            raise ProcessError(f"pid file {path}: held by the running process {owner}") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def detach() -> Callable[[], None]:
    """Continue in the background; return the function that the daemon calls once when it is ready. It closes stderr.

    Call `detach` before the program has any thread, event loop or socket. The calling process waits until the daemon is
    ready (exit status 0) or has died (1).
    """
    ready, notify_end = os.pipe()
    if os.fork():
        os.close(notify_end)
        os._exit(0 if os.read(ready, 1) else 1)
    os.close(ready)
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the exit of the session leader must not end the daemon
    if os.fork():
        os._exit(0)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # stderr stays open for errors of the start

    def notify_ready() -> None:
        os.dup2(null, 2)
        logs.reopen_stderr()
        os.close(null)
        with suppress(BrokenPipeError):  # the foreground process has exited
            os.write(notify_end, b"1")
        os.close(notify_end)

    return notify_ready


def tune_memory(retained_bytes: int, mapped_bytes: int) -> None:
    """Set up the memory of this process, so that no turn of its event loop takes long. Call it before threads start.

    glibc reuses `retained_bytes` of freed memory: page faults make the copy of 1 MiB take 2 ms instead of 0.1 ms.
    Blocks of more than `mapped_bytes` are returned to the system when they are freed.
    """
    # A full collection does not visit the program's own objects, which takes 20 ms. Fewer collections would
    # leave finished requests of up to 16 MiB, which are in cycles of futures, in memory: 60 MiB more were measured.
    gc.freeze()
    with suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # loading the modules has left 1 MB of free memory
        libc.mallopt(_M_TRIM_THRESHOLD, retained_bytes)
        libc.mallopt(_M_MMAP_THRESHOLD, mapped_bytes)


def notify_service_manager(state: str) -> None:
    """Notify the service manager, if there is one: ``READY=1``, ``STOPPING=1``, ... (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(_NOTIFY_TIMEOUT)  # a service manager that hangs does not delay the service for longer
            with suppress(OSError):  # the service continues without its service manager
                channel.sendto(state.encode(), re.sub("^@", "\0", address))
