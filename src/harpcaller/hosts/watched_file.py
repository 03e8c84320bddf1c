"""A small file that is read again after a change."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class WatchedFile(Generic[T]):
    """The parsed contents of a file; the previous ones if the file becomes invalid. Raises OSError or ValueError."""

    def __init__(self, file: Path, parse: Callable[[bytes], T]) -> None:
        self.file = file
        self._parse = parse
        self._signature = _signature(file)
        self._value = parse(file.read_bytes())

    @property
    def value(self) -> T:
        """The contents, after a check for a change."""
        signature = None
        try:
            signature = _signature(self.file)  # before reading, so that the next check detects a change in between
            if signature != self._signature:
                self._value = self._parse(self.file.read_bytes())
                log.info("changed file read", extra={"file": str(self.file)})
        except (OSError, ValueError) as error:
            if signature != self._signature:
                log.error("cannot reload changed file", extra={"file": str(self.file), "error": str(error)})
        self._signature = signature
        return self._value


def _signature(file: Path) -> tuple[int, int, int] | None:
    status = os.stat(file)
    return status.st_mtime_ns, status.st_size, status.st_ino
