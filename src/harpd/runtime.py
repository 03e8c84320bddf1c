"""The runtime directory: where the gate and its warden meet, and where calls are recorded. One daemon holds it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harpd.config import ConfigError

__all__ = ["runtime_directory"]


@contextmanager
def runtime_directory(configured: str | None, file: Path) -> Iterator[Path]:
    """Make and hold the runtime directory.

    Args:
        configured: its path, made when it is missing; None: a fresh one that is removed at the end.
        file: the configuration file, for messages.

    Raises:
        ConfigError: it can't be made, is not a directory, or is held by a running daemon.
    """
    if configured is None:
        path = Path(tempfile.mkdtemp(prefix="harpd-"))
    else:
        path = Path(configured).absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{file}: runtime_directory: {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            # A second warden would take the first one's calls for left over and kill them.
            raise ConfigError(f"{file}: runtime_directory: {path}: held by another running harpd") from error
        yield path
    finally:
        os.close(descriptor)
        if configured is None:
            shutil.rmtree(path, ignore_errors=True)
