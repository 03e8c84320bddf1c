"""The cached hosts registry in `host_db`: a header line, then one host per line.

The file holds passwords, so only the daemon's user can read it. It is replaced as a whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harpcaller.hosts.inventory import Host, parse_hosts

_FORMAT = "harpcaller hosts 1"


@dataclass(frozen=True, slots=True)
class CachedHosts:
    """The hosts that a script printed."""

    hosts: Mapping[str, Host] = field(default_factory=dict)  # by name
    refreshed_at: float = 0.0  # Unix time of the script's run; 0 makes a refresh due


def read_cache(file: Path) -> CachedHosts:
    """Return the cached hosts; an empty value if the file does not exist or has another format.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        header, *lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return CachedHosts()
    refreshed_at = _parse_header(header)
    return CachedHosts() if refreshed_at is None else CachedHosts(parse_hosts(lines).hosts, refreshed_at)


def write_cache(file: Path, cached: CachedHosts) -> Path | None:
    """Replace the file. Rename a file of another format, such as the legacy dispatcher's, and return its new name.

    Raises:
        OSError: the file cannot be written; then it is unchanged.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)  # of a daemon that was killed
    try:
        with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as stream:
            stream.write(json.dumps({"form": _FORMAT, "refreshed": cached.refreshed_at}) + "\n")
            for host in cached.hosts.values():
                members = host._asdict()
                credentials = {key: members.pop(key) for key in ("user", "password")}
                stream.write(json.dumps({**members, "credentials": credentials}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        foreign = file.replace(file.with_name(f"{file.name}.foreign")) if _is_foreign(file) else None
        new.replace(file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return foreign


def _parse_header(line: bytes) -> float | None:
    """Return the time of the refresh; None if the line is not a header."""
    try:
        members = json.loads(line)
        return float(members["refreshed"]) if members["form"] == _FORMAT else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def _is_foreign(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            header = stream.readline(1024)
    except FileNotFoundError:
        return False
    return header != b"" and _parse_header(header) is None
