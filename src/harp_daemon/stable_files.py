"""Files that survive a loss of power: their contents, and their names in the directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_new(
    file: Path, content: bytes, mode: int, prepare: Callable[[int], object] = lambda descriptor: None
) -> None:
    """Write a file that must not exist; after an error it is removed. Raises OSError.

    `prepare` is called with the descriptor before anything is written.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as opened:
            prepare(descriptor)
            opened.write(content)
            opened.flush()
            os.fsync(descriptor)
    except OSError:
        file.unlink()
        raise
    sync_directory(file.parent)


def replace_file(
    file: Path, content: bytes, mode: int = 0o600, prepare: Callable[[int], object] = lambda descriptor: None
) -> None:
    """Replace a file as a whole, or create it. Raises OSError. `prepare` is as for `write_new`."""
    new = file.with_name(f".{file.name}.new")
    new.unlink(missing_ok=True)  # of a process that was killed
    write_new(new, content, mode, prepare)
    new.replace(file)
    sync_directory(file.parent)


def sync_directory(directory: Path) -> None:
    """Wait until the names of the files in a directory are on stable storage. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
