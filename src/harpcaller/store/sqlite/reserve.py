"""Disk space that is reserved for pruning, which needs space before it frees any."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

RESERVE_NAME = "harpcaller.reserve"  #: The name of the file in the store's directory.
#: A step of the deletion writes up to about 4 MiB to the log. Copying the log adds these to the store's file, and up to
#: 8 MiB that are in the log before.
RESERVE_BYTES = 16 * 1024 * 1024


class Reserve:
    """A file without content that occupies `RESERVE_BYTES`, or less on a full disk."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / RESERVE_NAME

    def fill(self) -> bool:
        """Occupy the space, or a half, quarter or eighth of it if the disk is full; return whether it is complete."""
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                for part in (1, 2, 4, 8):
                    with suppress(OSError):
                        os.posix_fallocate(descriptor, 0, RESERVE_BYTES // part)
                        return part == 1
            finally:
                os.close(descriptor)
        return False

    def release(self) -> None:
        """Free the space."""
        with suppress(OSError):  # the file does not exist
            os.truncate(self._path, 0)
