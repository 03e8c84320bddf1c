"""The hosts registry: the last successful output of `host_db_script`, its cache in `host_db`, and `hosts_file`.

A host of `hosts_file` replaces a host with the same name from the script. The cache is a header line, then one host per
line. It contains passwords, so only the daemon's user can read it. Passwords, the text of invalid lines, and the stderr
of a successful script are never logged.

A job for a missing host ends as ``unknown_host``. A new list of hosts is therefore refused if it is empty, much shorter
than the list in use, or lacks a host and has more rejected lines. An administrator can force its use. Spec:
docs/settings-dispatcher.md, Hosts registry.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from codecs import BOM_UTF8
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from harp.protocol.json_text import JSONObject, decode_values, dumps
from harp.protocol.schema import (
    MAX_NAME,
    Kind,
    Null,
    ProtocolError,
    WireObject,
    check_string,
    decode_as,
    decode_object,
    encode_object,
)
from harp_daemon.regular_files import read_regular
from harp_daemon.watched_file import WatchedFile
from harpcaller.config import Config, file_errors
from harpcaller.hosts.script import ScriptFailed, run_script

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_PORT = 4306  #: The port of a line without a port: harpd's default.
_MAX_LOGGED_LINES = 10  #: Maximum number of rejected lines that are logged singly; further lines are only counted.
_MAX_REPORTED_LINES = 1000  #: Maximum number of rejected lines of a source that are reported to an administrator.
_MIN_SHARE = 0.5  #: A list of hosts with a smaller share of the previous number of hosts is refused.
_FORMAT = "harpcaller hosts 1"
_NAME = Kind(lambda name: 0 < len(name) <= MAX_NAME, f"a name of 1 to {MAX_NAME} characters", is_text=True)
_ADDRESS = Kind(
    lambda text: 0 < len(text) <= MAX_NAME and text.count(":") != 1 and frozenset("/[]@").isdisjoint(text),
    f"a name or an address of 1 to {MAX_NAME} characters, without brackets and port",
    is_text=True,
)


class Host(NamedTuple):
    """A host of the registry: the address of its harpd, and the credentials for calls."""

    hostname: str  # the name in submitted jobs
    address: str  # the name, IPv4 or IPv6 address to connect to
    port: int
    user: str
    password: str
    certificate_sha256: str | None = None  # the only certificate that is accepted, as 64 digits in lower case
    tags: tuple[str, ...] | None = ()  # by which rules of access may mean it; None: the line has others than texts

    def __repr__(self) -> str:
        return f"Host({self.hostname!r}, {self.address!r}, {self.port}, {self.user!r})"


class RejectedLine(NamedTuple):
    """A rejected line and the reason; of the line's values, `error` quotes only a hostname."""

    source: str  # the file or the script
    number: int
    error: str

    def __str__(self) -> str:
        return f"{self.source}:{self.number}: {self.error}"


@dataclass(frozen=True, slots=True)
class HostList:
    """The hosts of one source, and its rejected lines."""

    hosts: Mapping[str, Host] = field(default_factory=dict)  # by name
    rejected: Sequence[RejectedLine] = ()
    is_cut: bool = False  # whether it ends in the middle of a line

    def log_rejected(self, source: object) -> None:
        """Log the first rejected lines, and their number."""
        for line in self.rejected[:_MAX_LOGGED_LINES]:
            fields = {"source": line.source, "line": line.number, "error": line.error}
            log.warning("hosts registry line rejected", extra=fields)
        if self.rejected:
            counts = {"source": str(source), "rejected": len(self.rejected)}
            log.warning("hosts registry contains rejected lines", extra=counts)


class RefreshFailed(Exception):
    """A refresh that failed; the hosts of the source are unchanged. The message is the reason."""


@dataclass(frozen=True, slots=True)
class CachedHosts:
    """The hosts that a script printed."""

    hosts: Mapping[str, Host] = field(default_factory=dict)  # by name
    refreshed_at: float = 0.0  # Unix time of the script's run; 0 makes a refresh due
    rejected: Sequence[RejectedLine] = ()  # by the script's run; not in the file


class HostChange(NamedTuple):
    """A difference between the hosts in use and those that a refresh would use."""

    change: str  # added, removed or changed
    host: Host


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
        self._script_rejected: Sequence[RejectedLine] = ()
        self._script_error: str | None = None  # of the last run; None: no run, or no error
        self._refresh_attempted = False
        self.refreshes = {"ok": 0, "failed": 0}  #: Number of refreshes by outcome.
        self._refresh_task: asyncio.Task[int] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # the tasks that may run the script
        self._script_lock = asyncio.Lock()  # locked while the script runs
        self._config_changed = asyncio.Event()
        self._tagged: tuple[Mapping[str, Host], Mapping[str, Host]] = ({}, {})  # the hosts of `_tags`
        self._tags: Mapping[str, tuple[str, ...]] = {}

    @property
    def is_ready(self) -> bool:
        """Whether calls may start: they wait for the script's first run if the cache has no host, and for a new file.

        A hosts file that has just changed, and is empty or ends in the middle of a line, may be incomplete. This
        concerns the first contents only: later incomplete contents are refused.
        """
        file = self._watched_file
        if file is not None:
            contents = file.value
            if not file.is_settled and (contents.is_cut or not contents.hosts):
                return False
        return self._config.host_db_script is None or bool(self._cached.hosts) or self._refresh_attempted

    def find_host(self, hostname: str) -> Host | None:
        """Return a host, also if it was just added to the file; None if it is not in the registry."""
        if (host := self._hosts_of_file().get(hostname) or self._cached.hosts.get(hostname)) is not None:
            return host
        return self._watched_file.newest_value.hosts.get(hostname) if self._watched_file else None

    def list_hosts(self) -> list[Host]:
        """Return all hosts, ordered by name."""
        merged = self._merge(self._cached.hosts, self._hosts_of_file())
        return [merged[name] for name in sorted(merged)]

    def list_tags(self) -> Mapping[str, tuple[str, ...]]:
        """Return the tags of each host whose tags are known, by name: the same object while the hosts are the same."""
        sources = self._cached.hosts, self._hosts_of_file()
        if any(now is not then for now, then in zip(sources, self._tagged, strict=True)):
            self._tagged = sources
            self._tags = _tags_of(self._merge(*sources))
        return self._tags

    def _hosts_of_file(self) -> Mapping[str, Host]:
        return self._watched_file.value.hosts if self._watched_file else {}

    @staticmethod
    def _merge(of_script: Mapping[str, Host], of_file: Mapping[str, Host]) -> dict[str, Host]:
        return {**of_script, **of_file}

    def source_of(self, hostname: str) -> str:
        """Return the setting that a host in the registry comes from."""
        return "hosts_file" if hostname in self._hosts_of_file() else "host_db_script"

    def sources_of(self, hostnames: Iterable[str]) -> dict[str, str]:
        """Return `source_of` for each of these hosts."""
        of_file = self._hosts_of_file()
        return {name: "hosts_file" if name in of_file else "host_db_script" for name in hostnames}

    def describe(self) -> dict[str, Any]:
        """Return the number of hosts and, for each source, its age in seconds and its last error. No credentials."""
        described: dict[str, Any] = {"hosts": len(self.list_hosts())}
        now, config, file = time.time(), self._config, self._watched_file
        if config.host_db_script is not None:
            age = max(0.0, now - self._cached.refreshed_at) if self._cached.refreshed_at else None
            described["host_db_script"] = _describe_source(
                config.host_db_script, self._cached.hosts, age, self._script_error, self._script_rejected
            )
        if file is not None:
            age = max(0.0, now - file.read_at)
            described["hosts_file"] = _describe_source(
                file.file, self._hosts_of_file(), age, file.error, file.value.rejected
            )
        return described

    def problems(self) -> list[str]:
        """Return the rejected lines of the sources, and why a source is not up to date, as lines of text."""
        file = self._watched_file
        problems = [str(line) for line in self._script_rejected]
        if self._script_error is not None:
            problems.append(self._script_error)
        if file is not None:
            problems += map(str, file.value.rejected)
            if file.error is not None:
                problems.append(f"{file.file}: {file.error}")
        return problems

    @property
    def refreshed_at(self) -> float | None:
        """Unix time of the last successful run of the script; None: there was none."""
        return self._cached.refreshed_at or None

    @property
    def rejected_lines(self) -> int:
        """The number of rejected lines of the sources."""
        of_file = () if self._watched_file is None else self._watched_file.value.rejected
        return len(self._script_rejected) + len(of_file)

    def update_config(self, config: Config) -> None:
        """Apply a configuration; the hosts remain until the next refresh. Raises `ConfigError` before any change."""
        watched = self._watched_file
        if watched is None or config.hosts_file != watched.file:
            watched = _watch_hosts_file(config, None if watched is None else watched.value)
        else:
            with file_errors(config, "hosts_file"):
                read_regular(watched.file)
        self._watched_file = watched
        if config.host_db_script is None:
            self._cached, self._script_rejected, self._script_error = CachedHosts(), (), None
        elif config.host_db_script != self._config.host_db_script:
            self._cached = CachedHosts(self._cached.hosts)  # a refresh is due
        self._config = config
        self._config_changed.set()
        self._on_change()

    async def read_changed_file(self, force: bool = False) -> None:
        """Wait until a hosts file that has just changed is stable, and use it; `force` as in `refresh`."""
        if self._watched_file is not None:
            await self._watched_file.settle(force)
            self._on_change()

    async def refresh(self, force: bool = False) -> int:
        """Run the script, or wait for its current run, and read a changed file; return the number of hosts.

        With `force`, lists are used even if they are empty, shorter or have rejected lines. Raises `RefreshFailed`.
        """
        task = self._refresh_task
        if task is None or force:
            task = self._create_task(self._run_refresh(force))
            if not force:
                self._refresh_task = task
            task.add_done_callback(self._on_refreshed)
        return await asyncio.shield(task)

    async def compare(self) -> list[HostChange]:
        """Run the script and read the file; return what a refresh would change.

        Raises `RefreshFailed` if the script fails or the file cannot be read.
        """
        task = self._create_task(self._compare())
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # perhaps nobody waits any more
        return await asyncio.shield(task)

    def _create_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _on_refreshed(self, task: asyncio.Task[int]) -> None:
        if task is self._refresh_task:
            self._refresh_task = None
        self._refresh_attempted = True
        if not task.cancelled():
            # `exception` marks it as retrieved; callers of `refresh` receive it too.
            self.refreshes["ok" if task.exception() is None else "failed"] += 1
        self._on_change()

    async def refresh_regularly(self) -> None:
        """Refresh at start if it is due, then every `host_db_refresh` seconds, until cancelled."""
        try:
            self._create_task(self.read_changed_file())
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
            for task in self._tasks:
                task.cancel()  # kills the script too
            if self._tasks:
                await asyncio.wait(self._tasks)

    def _is_refresh_due(self) -> bool:
        # A time in the future is not reliable: the clock was or is wrong.
        return not 0 <= time.time() - self._cached.refreshed_at < self._config.host_db_refresh / 2

    async def _run_refresh(self, force: bool) -> int:
        config = self._config
        if config.host_db_script is None and self._watched_file is None:
            raise RefreshFailed("nothing to refresh: set host_db_script or hosts_file")
        await self.read_changed_file(force)
        if config.host_db_script is not None:
            await self._refresh_from_script(config, config.host_db_script, force)
        if self._watched_file is not None and self._watched_file.error is not None:
            raise RefreshFailed(f"{self._watched_file.file}: {self._watched_file.error}")
        return len(self.list_hosts())

    async def _refresh_from_script(self, config: Config, script: Path, force: bool) -> None:
        try:
            printed = await self._run_script(config, script)
            if config.host_db_script != self._config.host_db_script:
                raise RefreshFailed("host_db_script was changed during the refresh")
            printed.log_rejected(script)
            self._script_rejected = printed.rejected
            if not force:
                try:
                    _check_size(HostList(self._cached.hosts, self._cached.rejected), printed)
                except ValueError as error:
                    raise RefreshFailed(f"{script}: {error}") from error
        except RefreshFailed as error:
            self._script_error = str(error)
            log.error("cannot refresh hosts registry", extra={"error": str(error)})
            raise
        self._script_error = None
        self._cached = CachedHosts(printed.hosts, time.time(), printed.rejected)
        log.info("hosts registry refreshed", extra={"hosts": len(printed.hosts)})
        file = config.host_db
        try:
            renamed = await asyncio.to_thread(write_cache, file, self._cached)
            if renamed is not None:
                log.warning("host_db had another format; renamed", extra={"file": str(file), "to": str(renamed)})
        except OSError as error:
            log.error("cannot write hosts cache", extra={"file": str(file), "error": error.strerror})

    async def _run_script(self, config: Config, script: Path) -> HostList:
        async with self._script_lock:
            try:
                return await run_hosts_script(script, config.host_db_timeout)
            except (ScriptFailed, OSError) as error:
                raise RefreshFailed(str(error)) from error

    async def _compare(self) -> list[HostChange]:
        config, file = self._config, self._watched_file
        of_script, of_file = self._cached.hosts, self._hosts_of_file()
        before = self._merge(of_script, of_file)
        if config.host_db_script is not None:
            of_script = (await self._run_script(config, config.host_db_script)).hosts
        if file is not None:
            try:
                of_file = read_hosts_file(file.file).hosts
            except OSError as error:
                raise RefreshFailed(f"{file.file}: {error.strerror}") from error
        after = self._merge(of_script, of_file)
        added = [HostChange("added", after[name]) for name in after.keys() - before.keys()]
        removed = [HostChange("removed", before[name]) for name in before.keys() - after.keys()]
        common = before.keys() & after.keys()
        changed = [HostChange("changed", after[name]) for name in common if before[name] != after[name]]
        return sorted([*added, *removed, *changed], key=lambda change: change.host.hostname)


def _describe_source(
    source: Path, hosts: Mapping[str, Host], age: float | None, error: str | None, rejected: Sequence[RejectedLine]
) -> dict[str, Any]:
    return {
        "source": str(source),
        "hosts": len(hosts),
        "age": None if age is None else round(age, 3),
        "error": error,
        "rejected_lines": len(rejected),
    }


def _check_size(in_use: HostList, new: HostList) -> None:
    """Raise ValueError if a list of hosts must be refused, as the module's docstring says."""
    old = in_use.hosts
    lacks_host = len(new.rejected) > len(in_use.rejected) and not old.keys() <= new.hosts.keys()
    if old and (lacks_host or len(new.hosts) < max(1, len(old) * _MIN_SHARE)):
        rejected = f", {len(new.rejected)} rejected lines (the first: {new.rejected[0]})" if new.rejected else ""
        raise ValueError(
            f"refused: it has {len(new.hosts)} hosts{rejected}, and {len(old)} are in use; correct it, or accept it "
            "with harpcallerd hosts-refresh --force"
        )


def _accept_file(old: HostList, new: HostList) -> None:
    if new.is_cut:
        raise ValueError("refused: it ends in the middle of a line; it may be incomplete")
    _check_size(old, new)


def _watch_hosts_file(config: Config, in_use: HostList | None = None) -> WatchedFile[HostList] | None:
    """Return the watched hosts file; the hosts of a previous file, which are `in_use`, remain until it is accepted."""
    file = config.hosts_file
    if file is None:
        return None

    def parse(text: bytes) -> HostList:
        hosts = parse_hosts(text.split(b"\n"), file)
        hosts.log_rejected(file)
        return hosts

    with file_errors(config, "hosts_file"):
        return WatchedFile(file, parse, _accept_file, in_use)


def read_hosts_file(file: Path) -> HostList:
    """Return the hosts of a file. Raises OSError."""
    return parse_hosts(read_regular(file).split(b"\n"), file)


def read_tags(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the tags of the hosts in the files of a configuration. Raises OSError."""
    hosts: dict[str, Host] = {}
    if config.host_db_script is not None:
        hosts |= read_cache(config.host_db).hosts
    if config.hosts_file is not None:
        hosts |= read_hosts_file(config.hosts_file).hosts
    return _tags_of(hosts)


def _tags_of(hosts: Mapping[str, Host]) -> dict[str, tuple[str, ...]]:
    return {name: host.tags for name, host in hosts.items() if host.tags is not None}


async def run_hosts_script(script: Path, time_limit: float) -> HostList:
    """Return the hosts that a script prints. Raises `ScriptFailed` or OSError."""
    output = await run_script(script, time_limit)
    return await asyncio.to_thread(lambda: parse_hosts(output.split(b"\n"), script))


def _decode_digest(members: JSONObject, key: str) -> str:
    return check_string(key, members.value(key)).replace(":", "").lower()


def _decode_tags(members: JSONObject, key: str) -> tuple[str, ...] | None:
    """Return the tags of a line; None if they are not texts: legacy lines may use the key for something else."""
    value = members.value(key)
    is_texts = isinstance(value, list) and all(isinstance(tag, str) and len(tag) <= MAX_NAME for tag in value)
    return tuple(value) if is_texts else None


_TAGS = Kind(decode=_decode_tags)
_NO_TAGS: tuple[str, ...] = ()

_DIGEST = Kind(
    lambda digest: re.fullmatch("[0-9a-f]{64}", digest) is not None,
    "the SHA-256 of a certificate, 64 hexadecimal digits",
    decode=_decode_digest,
)


class _Line(WireObject):
    """The line of a host. No error quotes a value."""

    hostname: Annotated[str, _NAME]
    address: Annotated[str, _ADDRESS]
    port: Annotated[
        int,
        Kind(lambda port: type(port) is int and 0 < port <= 65535, "an integer from 1 to 65535"),
        Null.REJECTED,
    ] = DEFAULT_PORT
    user: Annotated[str, "credentials.user"] = field(kw_only=True, repr=False)
    password: Annotated[str, "credentials.password"] = field(kw_only=True, repr=False)
    certificate_sha256: Annotated[str | None, _DIGEST, Null.REJECTED] = field(default=None, kw_only=True)
    tags: Annotated[tuple[str, ...] | None, _TAGS, Null.REJECTED] = field(default=_NO_TAGS, kw_only=True)


_FIELDS = attrgetter(*Host._fields)


def _to_line(host: Host) -> _Line:
    credentials = {"user": host.user, "password": host.password}
    digest = host.certificate_sha256
    return _Line(host.hostname, host.address, host.port, **credentials, certificate_sha256=digest, tags=host.tags)


def parse_line(line: bytes) -> Host:
    """Return the host of a line; other keys are allowed. Raises `ProtocolError`; the message never quotes a value."""
    return Host(*_FIELDS(decode_as(_Line, decode_object(line, decode_values), other_keys=None)))


def parse_hosts(lines: Sequence[bytes], source: object) -> HostList:
    """Return the hosts of lines that were split at line feeds. Of a repeated hostname, the first line counts."""
    hosts: dict[str, Host] = {}
    numbers: dict[str, int] = {}
    rejected: list[RejectedLine] = []
    is_cut = False
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(BOM_UTF8)
        if not line.strip():
            continue
        try:
            host = parse_line(line)
            if (first := numbers.setdefault(host.hostname, number)) != number:
                raise ProtocolError(f"hostname {host.hostname!r} is repeated; line {first} counts")
        except ProtocolError as error:
            is_cut = number == len(lines) and error.type == "parse_error"
            if len(rejected) < _MAX_REPORTED_LINES:
                rejected.append(RejectedLine(str(source), number, error.message))
        else:
            hosts[host.hostname] = host
    return HostList(hosts, rejected, is_cut)


def read_cache(file: Path) -> CachedHosts:
    """Return the cached hosts; an empty value if the file does not exist or has another format. Raises OSError."""
    try:
        header, *lines = read_regular(file).split(b"\n")
    except FileNotFoundError:
        return CachedHosts()
    refreshed_at = _parse_header(header)
    if refreshed_at is None:
        return CachedHosts()
    hosts = parse_hosts(lines, file)
    hosts.log_rejected(file)
    return CachedHosts(hosts.hosts, refreshed_at)


def write_cache(file: Path, cached: CachedHosts) -> Path | None:
    """Replace the file. Rename a file of another format and return its new name. Raises OSError."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    new.unlink(missing_ok=True)  # a daemon that was killed may have created it
    try:
        with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as stream:
            stream.write(dumps({"form": _FORMAT, "refreshed": cached.refreshed_at}) + b"\n")
            stream.writelines(encode_object(_to_line(host)) + b"\n" for host in cached.hosts.values())
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
