"""A small file that is read again after a change.

A writer may truncate a file before it writes, and write in pieces. A changed file is therefore used only when it has
been unchanged for `SETTLE_SECONDS`; until then the previous contents are used.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from harp_daemon.regular_files import read_regular

log = logging.getLogger(__name__)

T = TypeVar("T")

SETTLE_SECONDS = 1.0  #: Seconds for which a changed file must be unchanged before it is used.
_CHECK_INTERVAL = 0.05  #: Seconds within which `value` does not look for another change: each job needs it often.
_MAX_WAIT = 10.0  #: Maximum seconds that `settle` waits for a file that changes repeatedly.


class _Identity(NamedTuple):
    """Attributes that change with the contents. The times are in nanoseconds; `changed` cannot be set by a program."""

    size: int
    modified: int
    changed: int
    inode: int


_Identities: TypeAlias = tuple[_Identity, ...]


class WatchedFile(Generic[T]):
    """The parsed contents of a file; the previous contents while the file changes, is invalid or is refused.

    `parse` returns the value of a file's contents, or raises ValueError. `accept` is called with the value in use and
    the new value, and raises ValueError to refuse the new value. `in_use` is the value until the file is accepted,
    `if_missing` the value until the file exists. A change of a file `beside` it counts as a change of the file. Raises
    OSError or ValueError if the first contents are invalid.
    """

    def __init__(
        self,
        file: Path,
        parse: Callable[[bytes], T],
        accept: Callable[[T, T], None] = lambda old, new: None,
        in_use: T | None = None,
        if_missing: T | None = None,
        beside: Sequence[Path] = (),
    ) -> None:
        self.file = file
        self._files = (file, *beside)
        self.error: str | None = None  #: Why the file's current contents are not in use; None: they are in use.
        self.read_at = time.time()  #: Unix time at which the contents in use were read.
        self.version = 0  #: A number that changes with the contents in use.
        self._parse = parse
        self._accept = accept
        self._identity: _Identities | None  # of the latest contents that were used or refused
        self._pending = _identify_if_exists(self._files)  # at the last check
        self._newest = self._pending, if_missing  # the latest parsed contents, which may not be in use
        if self._pending is not None or if_missing is None:
            self._newest = _identify(self._files), parse(read_regular(file))
        first = self._newest[1]
        assert first is not None
        self._identity, self._value = (self._newest[0], first) if in_use is None else (None, in_use)
        self._pending_since = time.monotonic()
        self._check_at = 0.0  # monotonic time
        self.is_settled = self._has_settled()  #: Whether the file had not just changed at the last check.

    @property
    def value(self) -> T:
        """The contents to use. A change is found within `_CHECK_INTERVAL`."""
        if time.monotonic() >= self._check_at:
            self._check(force=False)
        return self._value

    @property
    def is_missing(self) -> bool:
        """Whether the file did not exist at the last check."""
        return self._pending is None

    @property
    def newest_value(self) -> T:
        """The current contents, even if the file has just changed; `value` if they are invalid or were refused."""
        self._check(force=False)
        value = self._value
        if self.is_settled:
            return value
        identity = _identify_if_exists(self._files)
        if identity is not None and identity != self._newest[0]:
            try:
                self._newest = identity, self._parse(read_regular(self.file))
            except (OSError, ValueError):
                self._newest = identity, value
        return self._newest[1] or value

    async def settle(self, force: bool = False) -> None:
        """Wait until a file that has just changed can be used, and use it; with `force`, also if `accept` refuses it.

        The property `error` has the reason if the current contents cannot be used, for example because the file has
        changed repeatedly for `_MAX_WAIT` s.
        """
        end = time.monotonic() + _MAX_WAIT
        self._check(force)
        while not self.is_settled and time.monotonic() < end:
            await asyncio.sleep(SETTLE_SECONDS / 10)
            self._check(force)
        if not self.is_settled:
            self.error = f"it has changed again and again for {_MAX_WAIT:g} s"

    def _check(self, force: bool) -> None:
        self._check_at = time.monotonic() + _CHECK_INTERVAL
        identity = _identify_if_exists(self._files)
        if identity != self._pending:
            self._pending, self._pending_since = identity, time.monotonic()
        if identity == self._identity and self.is_settled and not (force and self.error):
            return
        self.is_settled = self._has_settled()
        if self.is_settled and (identity != self._identity or (force and self.error)):
            self._read(identity, force)

    def _has_settled(self) -> bool:
        # The clock of the file system may differ from this clock; then only the time since the first check counts.
        changed_at = max(each.changed for each in self._pending) / 1e9 if self._pending else time.time()
        return max(time.time() - changed_at, time.monotonic() - self._pending_since) >= SETTLE_SECONDS

    def _read(self, identity: _Identities | None, force: bool) -> None:
        try:
            value = self._parse(read_regular(self.file))
            if _identify(self._files) != identity:  # it has changed during the read
                self.is_settled = False
                return
            if not force:
                self._accept(self._value, value)
        except (OSError, ValueError) as error:
            self.error = (error.strerror if isinstance(error, OSError) else None) or str(error)
            log.error("cannot use changed file", extra={"file": str(self.file), "error": self.error})
        else:
            self._value, self.read_at, self.error = value, time.time(), None
            self.version += 1
            log.info("changed file read", extra={"file": str(self.file)})
        self._identity = identity


def _identify(files: Iterable[Path]) -> _Identities:
    found = [
        _Identity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        for status in map(os.stat, files)
    ]
    return tuple(found)


def _identify_if_exists(files: Iterable[Path]) -> _Identities | None:
    try:
        return _identify(files)
    except OSError:
        return None
