"""The last good copy of the hosts registry, in `host_db`: a line that says what the file is, then a host a line.

The file holds passwords: it is for the daemon's user alone, and written whole or not at all. A file that is not
of this form (an older dispatcher's, say) is moved aside, never written over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harpcaller.hosts.inventory import Host, parse_registry

__all__ = ["HostCopy", "read_copy", "write_copy"]

_FORM = "harpcaller hosts 1"


@dataclass(frozen=True, slots=True)
class HostCopy:
    """What a script printed.

    Attributes:
        hosts: the hosts by name.
        refreshed: when, in Unix seconds; 0: unknown, so long ago.
    """

    hosts: Mapping[str, Host] = field(default_factory=dict)
    refreshed: float = 0.0


def read_copy(file: Path) -> HostCopy:
    """Read the copy; an empty one when there is none, or when the file is not of this form.

    Raises:
        OSError: it can't be read.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return HostCopy()
    header = _header(lines[0])
    if header is None:
        return HostCopy()
    return HostCopy(parse_registry(lines[1:]).hosts, header)


def write_copy(file: Path, copy: HostCopy) -> Path | None:
    """Write the copy; it is on stable storage, and the one before gone, when this returns.

    Returns:
        Where a file that was no copy has been moved; None: there was none.

    Raises:
        OSError: it can't be written; then the one before is as it was.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    with suppress(FileNotFoundError):
        new.unlink()  # left by a crash
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as stream:
            stream.writelines(_lines(copy))
            stream.flush()
            os.fsync(stream.fileno())
        aside = _move_aside(file)
        new.replace(file)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    _sync_directory(file.parent)
    return aside


def _lines(copy: HostCopy) -> Iterator[bytes]:
    yield _line({"form": _FORM, "refreshed": copy.refreshed})
    for host in copy.hosts.values():
        credentials = {"user": host.user, "password": host.password}
        yield _line({"hostname": host.hostname, "address": host.address, "port": host.port, "credentials": credentials})


def _line(members: Mapping[str, Any]) -> bytes:
    return json.dumps(members).encode("ascii") + b"\n"


def _header(line: bytes) -> float | None:
    """When the copy was made; None: this is no first line of a copy."""
    try:
        members = json.loads(line)
        return float(members["refreshed"]) if members["form"] == _FORM else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def _move_aside(file: Path) -> Path | None:
    try:
        with file.open("rb") as stream:
            first = stream.readline(1024)
    except FileNotFoundError:
        return None
    if not first or _header(first) is not None:
        return None
    number, aside = 0, file.with_name(f"{file.name}.foreign")
    while aside.exists():
        number += 1
        aside = file.with_name(f"{file.name}.foreign.{number}")
    return file.rename(aside)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
