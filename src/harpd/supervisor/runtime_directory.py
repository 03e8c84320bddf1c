"""The runtime directory of sockets and state files: the default one, and how each program opens it."""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

_ROOT_DIRECTORY = Path("/run/harpd")


def default_runtime_directory() -> Path | None:
    """Return the directory if none is configured; None: this user has no directory that others do not clean up.

    It is the directory that systemd has created for the service (``RuntimeDirectory=``); for root ``/run/harpd``; for
    another user ``$XDG_RUNTIME_DIR/harpd``.
    """
    if created := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(created.split(":")[0])
    if os.geteuid() == 0:
        return _ROOT_DIRECTORY
    user_directory = os.environ.get("XDG_RUNTIME_DIR")
    return Path(user_directory, "harpd") if user_directory else None


def open_runtime_directory(path: str | os.PathLike[str]) -> int:
    """Create the directory if it is missing; return a descriptor of it.

    The descriptor has a lock for which systemd-tmpfiles does not remove old files. Raises OSError, PermissionError also
    if another user can write there, or owns the symbolic link: that user could impersonate the supervisor.
    """
    Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    try:  # after the open: its owner could have replaced a directory by the link
        owner = Path(path).lstat().st_uid
    except OSError:
        os.close(descriptor)
        raise
    reason = ""
    if owner not in (0, os.geteuid(), status.st_uid):
        reason = f"link of user {owner}; that user could replace it"
    elif status.st_uid not in (0, os.geteuid()):
        reason = f"owned by user {status.st_uid}; change the owner to the user that harpd runs as"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = "other users can write there; run chmod go-w"
    if reason:
        os.close(descriptor)
        raise PermissionError(0, reason)
    with suppress(OSError):  # systemd-tmpfiles is at work
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def is_open(path: str | os.PathLike[str], descriptor: int, directory: int | None = None) -> bool:
    """Return whether the file of a path, in `directory` if it is given, is the open file of the descriptor."""
    try:
        found, own = os.stat(path, dir_fd=directory), os.fstat(descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)
