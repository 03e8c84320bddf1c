"""The hosts registry: the last successful output of `host_db_script`, its cache in `host_db`, and `hosts_file`.

A host of `hosts_file` replaces a host with the same name from the script. The cache is a header line, then one host per
line. It contains passwords, so only the daemon's user can read it. Passwords, invalid lines, and the stderr of a
successful script are never logged. Spec: docs/settings-dispatcher.md, Hosts registry.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Annotated, NamedTuple

from harp.protocol.json_text import decode_values, dumps
from harp.protocol.schema import Kind, ProtocolError, WireObject, decode_as, decode_object, encode_object
from harpcaller.config import Config, file_errors
from harpcaller.hosts.script import ScriptFailed, run_script
from harpcaller.hosts.watched_file import WatchedFile

log = logging.getLogger(__name__)

_MAX_LOGGED_LINES = 10  #: Maximum number of invalid lines that are logged one by one; the others are only counted.
_FORMAT = "harpcaller hosts 1"
_NAME = Kind(lambda name: name != "", "a name, got an empty string", is_text=True)


class Host(NamedTuple):
    """A host of the registry: where its harpd listens, and the credentials to call it with."""

    hostname: str  # the name in submitted jobs
    address: str  # the name, IPv4 or IPv6 address to connect to
    port: int
    user: str
    password: str

    def __repr__(self) -> str:
        return f"Host({self.hostname!r}, {self.address!r}, {self.port}, {self.user!r})"


class RefreshFailed(Exception):
    """A refresh that failed; the registry is unchanged. The message is the reason."""


@dataclass(frozen=True, slots=True)
class CachedHosts:
    """The hosts that a script printed."""

    hosts: Mapping[str, Host] = field(default_factory=dict)  # by name
    refreshed_at: float = 0.0  # Unix time of the script's run; 0 makes a refresh due


class HostsRegistry:
    """The hosts that may be called; `on_change` is called when it is ready or has changed. Raises `ConfigError`."""

    def __init__(self, config: Config, on_change: Callable[[], None]) -> None:
        self._config = config
        self._on_change = on_change
        self._watched_file = _watch_hosts_file(config)
        self._cached = CachedHosts()
        if config.host_db_script is not None:
            try:
                self._cached = read_cache(config.host_db)
            except OSError as error:
                log.error("cannot read hosts cache", extra={"file": str(config.host_db), "error": error.strerror})
        self._refresh_attempted = False
        self._refresh_task: asyncio.Task[int] | None = None
        self._config_changed = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether calls may start. If no host is known, they wait for the end of the script's first run."""
        may_be_empty = self._refresh_attempted or self._config.host_db_script is None
        return may_be_empty or bool(self._cached.hosts or self._hosts_of_file())

    def find_host(self, hostname: str) -> Host | None:
        """Return a host; None if it is not in the registry."""
        return self._hosts_of_file().get(hostname) or self._cached.hosts.get(hostname)

    def list_hosts(self) -> list[Host]:
        """Return all hosts, ordered by name."""
        merged = {**self._cached.hosts, **self._hosts_of_file()}
        return [merged[name] for name in sorted(merged)]

    def _hosts_of_file(self) -> Mapping[str, Host]:
        return self._watched_file.value if self._watched_file else {}

    def update_config(self, config: Config) -> None:
        """Apply a new configuration; the known hosts remain until the next refresh. Raises `ConfigError` at first."""
        self._watched_file = _watch_hosts_file(config)
        if config.host_db_script is None:
            self._cached = CachedHosts()
        elif config.host_db_script != self._config.host_db_script:
            self._cached = CachedHosts(self._cached.hosts)  # a refresh is due
        self._config = config
        self._config_changed.set()
        self._on_change()

    async def refresh(self) -> int:
        """Run the script, or wait for its current run; return the number of hosts. Raises `RefreshFailed`."""
        if self._refresh_task is None:
            self._refresh_task = asyncio.create_task(self._run_refresh(self._config))
            self._refresh_task.add_done_callback(self._on_refreshed)
        return await asyncio.shield(self._refresh_task)

    def _on_refreshed(self, task: asyncio.Task[int]) -> None:
        self._refresh_task = None
        self._refresh_attempted = True
        if not task.cancelled():
            task.exception()  # marks it as retrieved; callers of `refresh` receive it too
        self._on_change()

    async def refresh_regularly(self) -> None:
        """Refresh at start if it is due, then every `host_db_refresh` seconds, until cancelled."""
        try:
            due = self._is_refresh_due()
            while True:
                if due and self._config.host_db_script is not None:
                    with suppress(RefreshFailed):  # it is logged
                        await self.refresh()
                try:
                    async with asyncio.timeout(self._config.host_db_refresh):
                        await self._config_changed.wait()
                    self._config_changed.clear()
                    due = self._is_refresh_due()
                except TimeoutError:
                    due = True
        finally:
            if self._refresh_task is not None:
                self._refresh_task.cancel()  # kills the script too
                await asyncio.wait([self._refresh_task])

    def _is_refresh_due(self) -> bool:
        # A time in the future is not reliable: the clock was or is wrong.
        return not 0 <= time.time() - self._cached.refreshed_at < self._config.host_db_refresh / 2

    async def _run_refresh(self, config: Config) -> int:
        if config.host_db_script is None:
            if self._watched_file is None:
                raise RefreshFailed("nothing to refresh: set host_db_script or hosts_file")
            return len(self.list_hosts())
        try:
            output = await run_script(config.host_db_script, config.host_db_timeout)
        except (ScriptFailed, OSError) as error:
            log.error("cannot refresh hosts registry", extra={"error": str(error)})
            raise RefreshFailed(str(error)) from error
        hosts = await asyncio.to_thread(lambda: parse_hosts(output.split(b"\n"), config.host_db_script))
        if config.host_db_script != self._config.host_db_script:
            raise RefreshFailed("host_db_script was changed during the refresh")
        self._cached = CachedHosts(hosts, time.time())
        log.info("hosts registry refreshed", extra={"hosts": len(hosts)})
        file = config.host_db
        try:
            renamed = await asyncio.to_thread(write_cache, file, self._cached)
            if renamed is not None:
                log.warning("host_db had another format; renamed", extra={"file": str(file), "to": str(renamed)})
        except OSError as error:
            log.error("cannot write hosts cache", extra={"file": str(file), "error": error.strerror})
        return len(self.list_hosts())


def _watch_hosts_file(config: Config) -> WatchedFile[Mapping[str, Host]] | None:
    file = config.hosts_file
    if file is None:
        return None
    with file_errors(config, "hosts_file"):
        return WatchedFile(file, lambda text: parse_hosts(text.split(b"\n"), file))


class _Line(WireObject):
    """The line of a host; no error quotes a value."""

    hostname: Annotated[str, _NAME]
    address: Annotated[str, _NAME]
    port: Annotated[int, Kind(lambda port: type(port) is int and 0 < port <= 65535, "an integer from 1 to 65535")]
    user: Annotated[str, "credentials.user"] = field(repr=False)
    password: Annotated[str, "credentials.password"] = field(repr=False)


_FIELDS = attrgetter(*Host._fields)


def parse_line(line: bytes) -> Host:
    """Return the host of a line. Raises `ProtocolError` if it is invalid; the message never quotes a value."""
    return Host(*_FIELDS(decode_as(_Line, decode_object(line, decode_values))))


def parse_hosts(lines: Iterable[bytes], source: object) -> Mapping[str, Host]:
    """Return the hosts by name, of lines with the same hostname the last one; log the errors of invalid lines."""
    hosts: dict[str, Host] = {}
    invalid = duplicates = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            host = parse_line(line)
        except ProtocolError as error:
            invalid += 1
            if invalid <= _MAX_LOGGED_LINES:
                fields = {"source": str(source), "line": number, "error": error.message}
                log.warning("hosts registry line is invalid", extra=fields)
            continue
        duplicates += hosts.pop(host.hostname, None) is not None
        hosts[host.hostname] = host
    if invalid or duplicates:
        counts = {"source": str(source), "invalid": invalid, "duplicates": duplicates}
        log.warning("hosts registry contains invalid or duplicate lines", extra=counts)
    return hosts


def read_cache(file: Path) -> CachedHosts:
    """Return the cached hosts; an empty value if the file does not exist or has another format. Raises OSError."""
    try:
        header, *lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return CachedHosts()
    refreshed_at = _parse_header(header)
    return CachedHosts() if refreshed_at is None else CachedHosts(parse_hosts(lines, file), refreshed_at)


def write_cache(file: Path, cached: CachedHosts) -> Path | None:
    """Replace the file. Rename a file of another format and return its new name. Raises OSError."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)  # of a daemon that was killed
    try:
        with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as stream:
            stream.write(dumps({"form": _FORMAT, "refreshed": cached.refreshed_at}) + b"\n")
            stream.writelines(encode_object(_Line(*host)) + b"\n" for host in cached.hosts.values())
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
