"""The audit file: JSON Lines, each with a number and the SHA-256 hash of the line before it. It has no thread.

Theory of operation. An entry is one line, ``{"entry": N, "time": ..., "previous": HASH, "action": ..., ...}``. Who
changes, drops, inserts or moves a line would have to write all later lines again; `harp_daemon.audit_reading` finds it.
Numbers and hashes continue in the next file after a rotation, whose first entry names the file before it.

Beside the file are two private files. ``.NAME.head`` has number and hash of the last entry on stable storage, so that
an end that was cut off is found, too; the process that writes holds a lock on it. Of a file of several processes, it
also has the mark of the one that wrote last: only if that is another one are there lines of others, or another file.
``.NAME.key`` is the key of the digests of arguments: without it, a digest does not show whether a guess is right.

Blocks are allocated in advance, beyond the end of the file. If no more can be allocated, the disk is full: `problem`
reports it while some allocated blocks are left. The daemon then refuses new jobs; running jobs end with their entries.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gzip
import json
import mmap
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import datetime
from functools import lru_cache
from hashlib import blake2b, sha256
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from harp_daemon.stable_files import sync_directory

FIRST_HASH = "0" * 64  #: The hash in entry 1, which has no line before it.
NEW_FILE = "audit-file"  #: The action of the first entry of a file after another one.
MAX_TEXT = 256  #: Maximum characters of a text of an entry; longer texts are cut, and followed by their length.
#: Bytes that are allocated in advance; the file is full when fewer than the second number can be.
_AHEAD, _LEAST_AHEAD = 8 * 1024 * 1024, 4 * 1024 * 1024
_RESERVED_FOR_ENDS = 2 * 1024 * 1024  #: Of these bytes, those for entries that must be written, such as ends of jobs.
_MAX_LINE = 64 * 1024  #: Longer than any line: texts are cut.
_KEEP_SIZE = 1  # of fallocate(2): the size of the file stays as it is
_RECENT = 8 * 1024 * 1024  #: The last bytes of a file, for `AuditFile.read_recent`.
_FOLLOW_INTERVAL = 1.0  #: Seconds between two checks whether the file was renamed.
_LINES_TRIED = 5  #: Lines at the start of a file of which one has to be an entry.
_MAX_HEAD = 128  #: Longer than any head, in bytes; behind them is the mark of the process that wrote last.
_MARK_BYTES = 16
_FRAGMENT_SHOWN = 1000  #: Maximum bytes of an incomplete line that the entry about it repeats.

_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode  # to ASCII
_encode_fast = msgspec.json.Encoder().encode


class AuditError(Exception):
    """The audit file cannot be used or written. The message has file and reason."""


class Position(NamedTuple):
    """The number of an entry and the hash of its line; 0 and `FIRST_HASH` before the first entry."""

    entry: int = 0
    hash: str = FIRST_HASH


NO_ENTRY = Position()  #: The position before the first entry.


class Line(NamedTuple):
    """A line of an audit file."""

    file: Path
    number: int  # from 1
    text: bytes  # without the line feed
    is_complete: bool  # False: its line feed is missing


_unhashed = sha256()


def hash_line(text: bytes) -> str:
    """Return the hash of a line without its line feed."""
    hashed = _unhashed.copy()  # takes less time than another one
    hashed.update(text)
    return hashed.hexdigest()


def check_usable(path: Path) -> None:
    """Raise `AuditError` if this process could not write an audit file there. Nothing is created or changed.

    For root, which may check the file of a daemon with another user, the owner of the directory may have it, too.
    """
    try:
        directory = os.stat(path.parent)
        owners = {os.geteuid(), directory.st_uid} if os.geteuid() == 0 else {os.geteuid()}
        if not stat.S_ISDIR(directory.st_mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent))
        if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))
        for file in (path, head_file(path), _key_file(path)):
            with suppress(FileNotFoundError):
                _check_own(file, os.lstat(file), owners)
    except OSError as error:
        raise AuditError(f"{error.filename or path}: {error.strerror}") from error


def parse_line(text: bytes) -> dict[str, Any] | None:
    """Return the entry in a line, or None."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(entry, dict) and type(entry.get("entry")) is int and isinstance(entry.get("previous"), str)
    return entry if valid else None


def head_file(path: Path) -> Path:
    """Return the file that has number and hash of the last entry of an audit file, in the same directory."""
    return path.with_name(f".{path.name}.head")


def _key_file(path: Path) -> Path:
    """Return the file that has the key of the digests of an audit file, in the same directory."""
    return path.with_name(f".{path.name}.key")


def read_head(path: Path) -> Position | None:
    """Return the position in the head of an audit file; None if it has none. Raises OSError."""
    try:
        return _parse_head(head_file(path).read_bytes())
    except FileNotFoundError:
        return None


def _parse_head(text: bytes) -> Position | None:
    found = re.match(rb"(\d{1,18}) ([0-9a-f]{64})\n", text)
    return None if found is None else Position(int(found[1]), found[2].decode())


def format_time(seconds: float) -> str:
    """Return the text of a time in Unix seconds."""
    return f"{_format_second(int(seconds))}.{int(seconds % 1 * 1000):03d}Z"


def parse_time(text: str) -> float:
    """Return the Unix seconds of a time as `format_time` writes it. Raises ValueError."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


@lru_cache(16)
def _format_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def open_files(path: Path) -> list[tuple[Path, IO[bytes]]]:
    """Open an audit file and the files before it, compressed ones too, in the order of their entries.

    Those before it have its name, followed by ``.`` or ``-`` and any text. Raises OSError.
    """
    for _ in range(10):
        with ExitStack() as stack:
            opened: dict[tuple[int, int], tuple[int, Path, IO[bytes]]] = {}
            names = {name for name in (path, *path.parent.glob(f"{path.name}[.-]*")) if name.exists()}
            if not names:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            try:
                for name in names:
                    file = stack.enter_context(_open_for_reading(name))
                    first = _find_first(file)
                    if first is None and name != path:
                        continue  # another file with such a name
                    status = os.fstat(file.fileno())
                    opened[status.st_dev, status.st_ino] = 1 << 62 if first is None else first, name, file
            except FileNotFoundError:
                continue  # a rotation has renamed it
            stack.pop_all()
            return [(name, file) for _, name, file in sorted(opened.values(), key=lambda item: item[0])]
    raise OSError(errno.EBUSY, "it is rotated again and again", str(path))


def _open_for_reading(path: Path) -> IO[bytes]:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]  # it is one


def _find_first(file: IO[bytes]) -> int | None:
    """Return the number of the first entry among the first lines; None if none is an entry."""
    try:
        for _ in range(_LINES_TRIED):
            entry = parse_line(file.readline(_MAX_LINE).rstrip(b"\n"))
            if entry is not None:
                return int(entry["entry"])
        return None
    finally:
        file.seek(0)


def read_lines(path: Path) -> Iterator[Line]:
    """Yield all lines of an audit file and of the files before it. Raises OSError."""
    files = open_files(path)
    with ExitStack() as stack:
        for _, file in files:
            stack.enter_context(file)
        for name, file in files:
            for number, text in enumerate(file, 1):
                yield Line(name, number, text.rstrip(b"\n"), text.endswith(b"\n"))


@contextmanager
def _excluding_others(descriptor: int) -> Iterator[None]:
    """Exclude other processes that write the same file."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


class AuditFile:
    """The writer of an audit file. It rotates the file before it has more than `max_bytes`. Raises `AuditError`.

    Several processes may write a `shared` file: each write continues after the last line of any of them.
    """

    def __init__(self, path: Path, max_bytes: int, shared: bool = False) -> None:
        self.path = path
        self._name = str(path)
        self.problem: str | None = None  #: Why new jobs are to be refused; None: there is room.
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._shared = shared
        self._mark = os.urandom(_MARK_BYTES)
        self._follow_at = 0.0  # monotonic time
        self._descriptor = self._head = -1
        self._position = NO_ENTRY
        self._size = self._allocated = 0  # bytes of the file; bytes up to which blocks are allocated
        try:
            self._head = _open_private(head_file(path), os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(self._head, fcntl.LOCK_EX | (0 if shared else fcntl.LOCK_NB))
            except BlockingIOError:
                raise AuditError(f"{path}: another process writes it") from None
            self._keyed = blake2b(key=_read_key(_key_file(path)), digest_size=16)
            self._open()
            if shared:
                fcntl.flock(self._head, fcntl.LOCK_UN)
        except OSError as error:
            self.close()
            raise AuditError(f"{error.filename or path}: {error.strerror}") from error
        except AuditError:
            self.close()
            raise

    def digest(self, data: bytes) -> str:
        """Return a digest that only the holder of the key can compute: BLAKE2b with a key."""
        keyed = self._keyed.copy()  # takes less time than another one
        keyed.update(data)
        return keyed.hexdigest()

    @property
    def has_room(self) -> bool:
        """Whether there is room beside that for the ends of jobs."""
        return self.problem is None or self._allocated - self._size > _RESERVED_FOR_ENDS

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write entries with ``time``, ``action`` and so on. After an error none is written; raises `AuditError`.

        A process calls this now and then, with cold caches: each function that it does not call saves time.
        """
        with self._lock:
            try:
                if self._shared:
                    fcntl.flock(self._head, fcntl.LOCK_EX)
                now = time.monotonic()
                is_continued = self._shared and os.pread(self._head, _MARK_BYTES, _MAX_HEAD) != self._mark  # by others
                if is_continued or now >= self._follow_at:
                    self._follow_at = now + _FOLLOW_INTERVAL
                    self._follow_rename()
                    if is_continued:
                        self._set_mark()
                if self._size >= self._max_bytes and self.problem is None:  # another file would need room
                    self.rotate()
                if entries:
                    self._write(entries)
            except OSError as error:
                raise AuditError(f"{error.filename or self.path}: {error.strerror}") from error
            finally:
                if self._shared:
                    fcntl.flock(self._head, fcntl.LOCK_UN)

    def sync(self) -> None:
        """Wait until the written entries are on stable storage, then store the head. Raises `AuditError`.

        Another thread may call it: only here, and not in `append`, does the disk delay the caller.
        """
        try:
            with self._lock:
                position, descriptor = self._position, os.dup(self._descriptor)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
            with self._lock, _excluding_others(self._head) if self._shared else nullcontext():
                stored = _parse_head(os.pread(self._head, _MAX_HEAD, 0)) if self._shared else None
                if stored is None or stored.entry < position.entry:
                    os.pwrite(self._head, f"{position.entry} {position.hash}\n".encode(), 0)
        except OSError as error:
            self.problem = f"{self.path}: {error.strerror}"
            raise AuditError(self.problem) from error

    def reopen(self) -> None:
        """Look for a renamed file before the next entry; otherwise that happens once in a second."""
        self._follow_at = 0.0

    def check_room(self) -> None:
        """Allocate blocks in advance; `problem` has the result."""
        if self._allocated - self._size >= _LEAST_AHEAD:
            self.problem = None
            return
        try:
            _allocate(self._descriptor, self._size, _AHEAD)
            self._allocated = self._size + _AHEAD
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):  # the file system cannot allocate
                self._allocated = self._size
            else:
                self.problem = f"{self.path}: no disk space in reserve: {error.strerror}"
                return
        self.problem = None

    def rotate(self) -> None:
        """Rename the file, so that its name ends with the number of its last entry, and start another file."""
        target = self.path.with_name(f"{self.path.name}.{self._position.entry:010d}")
        with suppress(OSError):  # the file grows until the next attempt
            os.link(self.path, target)  # unlike a rename, this replaces no file
            self.path.unlink()
            self._begin_file(target.name)

    def read_recent(self) -> list[dict[str, Any]]:
        """Return the entries of the last 8 MiB, also of earlier files. Raises OSError."""
        text = b""
        with ExitStack() as stack:
            files = [stack.enter_context(file) for _, file in open_files(self.path)]
            while files and len(text) < _RECENT:
                file = files.pop()
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _RECENT + len(text)))
                text = file.read() + text
        return [entry for line in text.split(b"\n") if (entry := parse_line(line)) is not None]

    def close(self) -> None:
        """Store the head durably and close the files. The entries must have been synchronized."""
        for descriptor in (self._head, self._descriptor):
            if descriptor >= 0:
                with suppress(OSError):
                    os.fsync(descriptor)
                os.close(descriptor)
        self._head = self._descriptor = -1

    # Internals.

    def _set_mark(self) -> None:
        """Tell other processes of a shared file, before this one writes a line, that they have to follow it."""
        if self._shared:
            try:
                os.pwrite(self._head, self._mark, _MAX_HEAD)
            except OSError as error:
                raise AuditError(f"{head_file(self.path)}: {error.strerror}") from error

    def _follow_others(self) -> None:
        """Continue after the lines that other processes have written to a shared file."""
        size = self._size
        if os.fstat(self._descriptor).st_size != size:
            text, fragment = self._read_end()
            if fragment:  # the process died
                os.ftruncate(self._descriptor, self._size)
            entry = None if text is None else parse_line(text)
            if text is not None and entry is not None and entry["entry"] > self._position.entry:
                self._position = Position(entry["entry"], hash_line(text))

    def _open(self) -> None:
        """Open the file, find the position to continue at, and write what was found."""
        head = read_head(self.path)
        self._descriptor = _open_private(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        status = os.fstat(self._descriptor)
        self._identity = status.st_dev, status.st_ino
        text, fragment = self._read_end()
        if fragment:
            os.ftruncate(self._descriptor, self._size)
        last = None if text is None else parse_line(text)
        found = NO_ENTRY if text is None or last is None else Position(last["entry"], hash_line(text))
        if text is None:
            found = _find_last(self.path) if head is None else _find_last_after(self.path, head)
        is_later = head is None or (found.entry > head.entry and (text is None or self._continues(head)))
        self._position = found if head is None or is_later else head
        self._set_mark()
        self._allocated = self._size
        self.check_room()
        entries: list[dict[str, Any]] = []
        if self._position == NO_ENTRY:
            entries.append({"action": "audit-begin"})
        elif text is None:
            entries.append({"action": NEW_FILE, "previous_file": None})
        if fragment:  # no reply was sent for it
            shown = fragment[:_FRAGMENT_SHOWN].decode("ascii", "backslashreplace")
            entries.append({"action": "audit-recovered", "incomplete_line": shown, "bytes": len(fragment)})
        if text is not None and self._position is head and found != head:
            entries.append({"action": "audit-gap", "expected": head.entry, "found": found.entry})
        with suppress(AuditError):  # no room: see `problem`
            self._write([{"time": time.time(), **entry} for entry in entries])
            self.sync()
        os.fsync(self._head)
        sync_directory(self.path.parent)

    def _continues(self, head: Position) -> bool:
        """Return whether the last lines are a chain that begins at the head's entry.

        Another file may have been put in place of the own one. Lines after the head are those of a last moment, so few
        are read. If the file begins after the head's entry, that is in an earlier file.
        """
        end, expected = self._size, ""
        with mmap.mmap(self._descriptor, end, access=mmap.ACCESS_READ) as data:
            while end:
                start = data.rfind(b"\n", 0, end - 1) + 1
                text = data[start : end - 1]
                entry = parse_line(text)
                if entry is None or (expected and hash_line(text) != expected):
                    return False
                if entry["entry"] <= head.entry:
                    return (entry["entry"], hash_line(text)) == head
                end, expected = start, entry["previous"]
        return True

    def _read_end(self) -> tuple[bytes | None, bytes]:
        """Return the last complete line, or None, and the bytes that follow it; set the size without these bytes."""
        size = os.fstat(self._descriptor).st_size
        tail = os.pread(self._descriptor, 4 * _MAX_LINE, max(0, size - 4 * _MAX_LINE))
        complete = tail.rfind(b"\n") + 1
        self._size = size - (len(tail) - complete)
        text = tail[: complete - 1].rpartition(b"\n")[2] if complete else None
        return text, tail[complete:]

    def _follow_rename(self) -> None:
        """Begin another file if the file was renamed or removed, as by logrotate; of a shared one, follow others."""
        try:
            status = os.lstat(self._name)
            if (status.st_dev, status.st_ino) == self._identity:
                if not self._shared:
                    self._size = min(self._size, status.st_size)  # it was truncated: the numbers show it
                elif status.st_size != self._size:
                    self._follow_others()
                return
        except OSError:
            pass
        own, name = os.fstat(self._descriptor), None
        with suppress(OSError):
            for file in self.path.parent.glob(f"{self.path.name}[.-]*"):
                if os.stat(file).st_ino == own.st_ino:
                    name = file.name
        try:
            self._begin_file(name)
        except OSError as error:
            raise AuditError(f"{self.path}: {error.strerror}") from error

    def _begin_file(self, previous_file: str | None) -> None:
        if self._shared:
            self._follow_others()
        opened = _open_private(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        old, self._descriptor = self._descriptor, opened
        with suppress(OSError):
            os.ftruncate(old, os.fstat(old).st_size)  # frees the blocks beyond the end
            os.fdatasync(old)
        os.close(old)
        sync_directory(self.path.parent)
        self._size = self._allocated = 0
        status = os.fstat(opened)
        self._identity = status.st_dev, status.st_ino
        entries: list[dict[str, Any]] = []
        if status.st_size and self._shared:  # another process has started it
            self._follow_others()
        elif status.st_size:  # another file was put in its place: the own chain continues
            text, _ = self._read_end()
            os.ftruncate(opened, self._size)
            found = None if text is None else parse_line(text)
            last = None if found is None else found["entry"]
            entries.append({"action": "audit-gap", "expected": self._position.entry, "found": last})
        self.check_room()
        if not self._size:
            entries.append({"action": NEW_FILE, "previous_file": previous_file})
        if entries:
            self._set_mark()
            self._write([{"time": time.time(), **entry} for entry in entries])

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        number, last_hash = self._position
        lines: list[bytes] = []
        for entry in entries:
            number += 1
            text = self._encode_entry(number, last_hash, entry)
            hashed = _unhashed.copy()  # as `hash_line`
            hashed.update(text)
            last_hash = hashed.hexdigest()
            lines += text, b"\n"
        data = b"".join(lines)
        try:
            written = os.write(self._descriptor, data)
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
                self._allocated = self._size
            self.problem = f"{self.path}: {error.strerror}"
            raise AuditError(self.problem) from error
        self._size += len(data)
        self._position = Position(number, last_hash)
        if self._allocated - self._size < _LEAST_AHEAD or self.problem is not None:
            self.check_room()

    def _encode_entry(self, number: int, previous: str, entry: Mapping[str, Any]) -> bytes:
        members = {"entry": number, "time": "", "previous": previous, **entry}
        if None in entry.values():
            members = {key: value for key, value in members.items() if value is not None}
        seconds = entry["time"]
        members["time"] = f"{_format_second(int(seconds))}.{int(seconds % 1 * 1000):03d}Z"  # as `format_time`
        if "arguments" in entry:
            digested = self._keyed.copy()  # as `digest`
            digested.update(entry["arguments"])
            members["arguments"] = digested.hexdigest()
        try:
            text = _encode_fast(members)
            # A line with a longer text has `MAX_TEXT`, 110 bytes of number, time and hash, and 6 for each name.
            if len(text) <= MAX_TEXT + 90 + 6 * len(members) and text.isascii():
                return text
        except (TypeError, ValueError):  # for example a lone surrogate
            pass
        for key, value in members.items():
            if type(value) is str and len(value) > MAX_TEXT:
                members[key] = f"{value[:MAX_TEXT]}... ({len(value)} characters)"
        return _encode(members).encode()


def _find_last(path: Path) -> Position:
    """Return the position of the last entry of the files before an audit file."""
    last = NO_ENTRY
    for line in read_lines(path):
        entry = parse_line(line.text)
        if entry is not None and entry["entry"] > last.entry:
            last = Position(entry["entry"], hash_line(line.text))
    return last


def _find_last_after(path: Path, head: Position) -> Position:
    """Return the position of the last entry of the file before an audit file if it continues the head; else the head.

    A process that was killed has perhaps begun a file, and left no line in it.
    """
    with ExitStack() as stack:
        before: IO[bytes] | None = None
        for name, file in open_files(path):
            stack.enter_context(file)
            before = file if name != path else before
        last = NO_ENTRY
        for line in before or ():
            text = line.rstrip(b"\n")
            entry = parse_line(text)
            if entry is None or (last != NO_ENTRY and entry["previous"] != last.hash):
                return head
            last = Position(entry["entry"], hash_line(text))
            if last.entry == head.entry and last != head:
                return head
    return last if last.entry > head.entry else head


def _open_private(path: Path, flags: int) -> int:
    """Open a regular file of this user, with mode 0600, through no symbolic link. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        status = os.fstat(descriptor)
        _check_own(path, status, {os.geteuid()})
        if status.st_mode & 0o077:
            os.fchmod(descriptor, 0o600)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _read_key(path: Path) -> bytes:
    """Return the key in a file; create it if the file is empty or missing. Raises OSError."""
    descriptor = _open_private(path, os.O_RDWR | os.O_CREAT)
    try:
        key = os.pread(descriptor, 64, 0)
        if not key:
            key = os.urandom(32).hex().encode()
            os.pwrite(descriptor, key, 0)
            os.fsync(descriptor)
        return key
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, offset: int, length: int) -> None:
    """Allocate blocks without a change of the file's size. Raises OSError."""
    function = getattr(_LIBC, "fallocate64", None) or getattr(_LIBC, "fallocate", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if function(descriptor, _KEEP_SIZE, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_LIBC = ctypes.CDLL(None, use_errno=True)


def _check_own(path: Path, status: os.stat_result, owners: set[int]) -> None:
    """Raise OSError unless it is a regular file of one of these users."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_uid not in owners:
        raise OSError(errno.EPERM, f"it belongs to uid {status.st_uid}, not to uid {os.geteuid()}", str(path))
