"""A small file that is read again once it has changed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

__all__ = ["FreshFile"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class FreshFile(Generic[T]):
    """What a file says now.

    A change is seen by modification time, size and inode. A changed file that can't be read or parsed is logged,
    once, and the last good value stays.

    Args:
        file: the file.
        parse: makes the value of the file's bytes; raises ValueError when they make none.

    Raises:
        OSError: the file can't be read at first.
        ValueError: what it says first can't be parsed.
    """

    def __init__(self, file: Path, parse: Callable[[bytes], T]) -> None:
        self.file = file
        self._parse = parse
        self._seen = self._signature()
        self._value = parse(file.read_bytes())

    @property
    def value(self) -> T:
        """What the file says; looks whether it has changed, and then reads it."""
        seen = None
        try:
            # Looked at before it is read: a change between the two is seen the next time.
            seen = self._signature()
            if seen != self._seen:
                self._value = self._parse(self.file.read_bytes())
                log.info("changed file read", extra={"file": str(self.file)})
        except (OSError, ValueError) as error:
            if seen != self._seen:
                log.error("changed file refused, what it said before stays", extra=_described(self.file, error))
        self._seen = seen
        return self._value

    def _signature(self) -> tuple[int, int, int] | None:
        status = os.stat(self.file)
        return status.st_mtime_ns, status.st_size, status.st_ino


def _described(file: Path, error: Exception) -> dict[str, str]:
    return {"file": str(file), "error": (error.strerror if isinstance(error, OSError) else None) or str(error)}
