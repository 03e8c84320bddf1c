"""A daemon's process: its pid file, going to the background, telling the service manager."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class ProcessError(Exception):
    """The process can't be set up as asked. The message names file and cause."""


def describe_exit(code: int) -> str:
    """Return the text for an exit code; `code` is negative for a signal, as in `subprocess.Popen.returncode`."""
    return f"signal {-code}" if code < 0 else f"exit status {code}"


@contextmanager
def pidfile(path: Path | None) -> Iterator[None]:
    """Hold a pid file: written and locked on entry, removed on exit. None: no file.

    A file that a dead process left is taken over: it is the lock that counts.

    Raises:
        ProcessError: a running process holds it, or it can't be written.
    """
    if path is None:
        yield
        return
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ProcessError(f"pid file {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ProcessError(f"pid file {path}: held by the running process {_first_line(descriptor)}") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _first_line(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()


class Detached:
    """In a daemon that has gone to the background: call it once the daemon serves.

    It tells the process that waits in the foreground, and lets go of the terminal.

    Args:
        descriptor: where the waiting process reads.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self) -> None:
        """Say that the daemon serves. Once."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
        with suppress(BrokenPipeError):  # nobody waits any more
            os.write(self._descriptor, b"1")
        os.close(self._descriptor)


def detach() -> Detached:
    """Go to the background. Call it before any thread, loop or socket of the program exists.

    The calling process stays until the daemon has said that it serves or has died; it then exits with 0 or 1.

    Returns:
        In the daemon: what to call once it serves.
    """
    ready, said = os.pipe()
    if os.fork():
        os.close(said)
        os._exit(0 if os.read(ready, 1) else 1)
    os.close(ready)
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the session leader's end must not end the daemon
    if os.fork():
        os._exit(0)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # stderr stays until the program has said how its start went
    os.close(null)
    return Detached(said)


def notify_service_manager(state: str) -> None:
    """Tell the service manager, if there is one: ``READY=1``, ``STOPPING=1``, ... (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError:
            return  # a service manager that is gone must not stop the service
