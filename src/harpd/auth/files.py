"""How harpd reads the files that its configuration names.

A frontend that runs as another user than root cannot open all of them: it reads them by another object with the methods
of `Files`. An authentication module receives this object if its function ``create`` has a parameter ``files``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harp_daemon.regular_files import check_regular, open_regular

__all__ = ["Files"]

_READ_SIZE = 1 << 16


class Files:
    """The files, opened by this process itself. The methods raise OSError. They may be called in any thread."""

    def open(self, path: Path) -> int:
        """Return a descriptor for reading a file; the caller closes it."""
        return open_regular(path)

    def stat(self, path: Path) -> os.stat_result:
        """Return the status of a file."""
        return os.stat(path)

    def read(self, path: Path) -> bytes:
        """Return the content of a file."""
        descriptor = self.open(path)
        try:
            check_regular(os.fstat(descriptor))
            return b"".join(iter(lambda: os.read(descriptor, _READ_SIZE), b""))
        finally:
            os.close(descriptor)

    @contextmanager
    def readable_path(self, path: Path) -> Iterator[Path]:
        """Yield a path by which this process can open the file itself, as some libraries do."""
        yield path
