"""The runtime directory of sockets and state files: the default one, and how each program opens it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

_ROOT_DIRECTORY = Path("/run/harpd")
#: The directory in it for the sockets of a frontend that runs as another user.
FRONTEND_DIRECTORY = "frontend"


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


def open_runtime_directory(path: str | os.PathLike[str], mode: int = 0o700) -> int:
    """Create the directory with this mode if it is missing; return `open_existing_directory` of it. Raises OSError."""
    Path(path).mkdir(mode=mode, parents=True, exist_ok=True)
    return open_existing_directory(path)


def check_runtime_directory(path: Path) -> None:
    """Raise OSError if `open_runtime_directory` would; nothing is created."""
    if path.exists() or path.is_symlink():
        os.close(open_existing_directory(path))
        return
    above = next(each for each in path.parents if each.exists())
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
        read_only = os.statvfs(above).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number))


def open_existing_directory(path: str | os.PathLike[str]) -> int:
    """Return a descriptor of the directory.

    It has a lock for which systemd-tmpfiles does not remove old files. Raises OSError, PermissionError also
    if another user can write there, or if it is a symbolic link: another directory could impersonate the supervisor.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except NotADirectoryError as error:  # Linux reports a symbolic link so
        if Path(path).is_symlink():
            raise PermissionError(error.errno, "a symbolic link; name the directory itself") from error
        raise
    status = os.fstat(descriptor)
    reason = ""
    if status.st_uid not in (0, os.geteuid()):
        reason = f"owned by user {status.st_uid}; change the owner to the user that harpd runs as"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = "other users can write there; run chmod go-w"
    if reason:
        os.close(descriptor)
        raise PermissionError(0, reason)
    with suppress(OSError):  # systemd-tmpfiles is at work
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def open_frontend_directory(runtime_directory: str | os.PathLike[str]) -> int:
    """Create the directory of the frontend's sockets if it is missing; return a descriptor of it. Raises OSError.

    Every user may search it, but the runtime directory above is private: a frontend that runs as another user uses it
    through a descriptor. Only the owner of a socket can connect to it.
    """
    os.close(open_runtime_directory(runtime_directory))
    descriptor = open_runtime_directory(Path(runtime_directory, FRONTEND_DIRECTORY), 0o755)
    if stat.S_IMODE(os.fstat(descriptor).st_mode) != 0o755:  # the umask has removed some
        os.fchmod(descriptor, 0o755)
    return descriptor


def identify(name: str, directory: int) -> tuple[int, int] | None:
    """Return what identifies a socket in the directory of a descriptor; None: it is missing.

    It is the inode and the time of its creation: a file system uses the inode of a removed file again.
    """
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def is_open(path: str | os.PathLike[str], descriptor: int, directory: int | None = None) -> bool:
    """Return whether the file of a path, in `directory` if it is given, is the open file of the descriptor."""
    try:
        found, own = os.stat(path, dir_fd=directory), os.fstat(descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)
