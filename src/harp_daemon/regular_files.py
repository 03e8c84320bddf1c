"""Reading files that a configuration names: they must be regular files of a reasonable size.

Opening a named pipe waits for its writer, some devices have no end, and neither can be read again after a change. A
sparse file takes no space on the disk, but all of its size in memory.
"""

from __future__ import annotations

import errno
import os
import stat

_READ_SIZE = 1 << 16
_MAX_BYTES = 64 * 1024 * 1024  #: Maximum size of a file: a line of 640 bytes for each of 100,000 hosts.
_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def open_regular(path: str | os.PathLike[str], flags: int = 0) -> int:
    """Return a descriptor for reading a file; the caller closes it. Raises OSError, also if it is not a regular file.

    `flags` are added to those of `os.open`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | flags)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device that is not there
            check_regular(os.stat(path), path)
        raise
    try:
        check_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(status: os.stat_result, path: str | os.PathLike[str] | None = None) -> None:
    """Raise OSError if the status of `path` is not that of a regular file."""
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if kind != stat.S_IFREG:
        name = _KINDS.get(kind, "another kind of file")
        raise OSError(errno.EINVAL, f"expected a regular file, got {name}", path)


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Return the contents of a regular file. Raises OSError, also if it has more than 64 MiB."""
    descriptor = open_regular(path)
    try:
        if os.fstat(descriptor).st_size > _MAX_BYTES:
            raise OSError(errno.EFBIG, "expected a file of at most 64 MiB", path)
        return b"".join(iter(lambda: os.read(descriptor, _READ_SIZE), b""))
    finally:
        os.close(descriptor)
