"""The hosts registry at work: the script that fills it, the last good copy, and the hosts file beside it.

What the script printed last with success is what counts; a copy of it in `host_db` survives restarts. A host of
`hosts_file` takes the place of one with the same name from the script. No password gets into the log: neither do
lines that can't be understood, nor what the script says on stderr when it succeeds.

Spec: docs/settings-dispatcher.md, Hosts registry.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from harpcaller.config import Config, file_errors
from harpcaller.hosts.cache import CachedHosts, read_cache, write_cache
from harpcaller.hosts.inventory import Host, ParsedHosts, parse_hosts
from harpcaller.hosts.script import ScriptFailed, run_script
from harpcaller.hosts.watched_file import WatchedFile

__all__ = ["HostsRegistry", "RefreshFailed"]

log = logging.getLogger(__name__)

#: Skipped lines that the log tells one by one; the others are only counted.
_MAX_LOGGED_LINES = 10


class RefreshFailed(Exception):
    """The registry was not refreshed and is what it was. The message says why."""


class HostsRegistry:
    """The hosts that may be called.

    Args:
        config: its `host_db`, `host_db_script`, `host_db_refresh`, `host_db_timeout` and `hosts_file` count.
        on_change: called when the registry has become usable, or has changed.

    Raises:
        ConfigError: the hosts file can't be read.
    """

    def __init__(self, config: Config, on_change: Callable[[], None]) -> None:
        self._config = config
        self._on_change = on_change
        self._watched_file = _watch_hosts_file(config)
        self._cached = _load_cache(config.host_db) if config.host_db_script else CachedHosts()
        self._refresh_attempted = False
        self._refresh_task: asyncio.Task[int] | None = None
        self._config_changed = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether calls may start: not before a first run of the script when nothing is known without it."""
        return (
            self._refresh_attempted
            or self._config.host_db_script is None
            or bool(self._cached.hosts)
            or bool(self._hosts_of_file())
        )

    def find_host(self, hostname: str) -> Host | None:
        """Return a host; None: it is not in the registry."""
        return self._hosts_of_file().get(hostname) or self._cached.hosts.get(hostname)

    def list_hosts(self) -> list[Host]:
        """Return all hosts, by name."""
        merged = {**self._cached.hosts, **self._hosts_of_file()}
        return [merged[name] for name in sorted(merged)]

    def _hosts_of_file(self) -> Mapping[str, Host]:
        return self._watched_file.value if self._watched_file else {}

    def update_config(self, config: Config) -> None:
        """Take a new configuration; the hosts known stay until the next refresh.

        Raises:
            ConfigError: the hosts file can't be read; then nothing has changed.
        """
        self._watched_file = _watch_hosts_file(config)
        if config.host_db_script is None:
            self._cached = CachedHosts()
        elif config.host_db_script != self._config.host_db_script:
            self._cached = CachedHosts(self._cached.hosts)  # due at once
        self._config = config
        self._config_changed.set()
        self._on_change()

    async def refresh(self) -> int:
        """Run the script, or wait for its run that is under way; return how many hosts the registry has.

        Raises:
            RefreshFailed: the script failed, or there is none and no hosts file either.
        """
        if self._refresh_task is None:
            self._refresh_task = asyncio.create_task(self._run_refresh(self._config))
            self._refresh_task.add_done_callback(self._on_refreshed)
        return await asyncio.shield(self._refresh_task)

    def _on_refreshed(self, task: asyncio.Task[int]) -> None:
        self._refresh_task = None
        self._refresh_attempted = True
        if not task.cancelled():
            task.exception()  # whoever waited has it
        self._on_change()

    async def refresh_regularly(self) -> None:
        """Refresh at start if that is due, then as often as the configuration says; until cancelled."""
        try:
            await self._refresh_if_old()
            while True:
                try:
                    async with asyncio.timeout(self._config.host_db_refresh):
                        await self._config_changed.wait()
                except TimeoutError:
                    await self._try_refresh()
                else:
                    self._config_changed.clear()
                    await self._refresh_if_old()
        finally:
            if self._refresh_task is not None:
                self._refresh_task.cancel()  # ends the script too
                await asyncio.wait([self._refresh_task])

    async def _refresh_if_old(self) -> None:
        # A time in the future says nothing: the clock was wrong then or is now.
        if not 0 <= time.time() - self._cached.refreshed_at < self._config.host_db_refresh / 2:
            await self._try_refresh()

    async def _try_refresh(self) -> None:
        if self._config.host_db_script is not None:
            try:
                await self.refresh()
            except RefreshFailed:
                pass  # it is in the log

    async def _run_refresh(self, config: Config) -> int:
        if config.host_db_script is None:
            if self._watched_file is None:
                raise RefreshFailed("there is nothing to refresh from: neither host_db_script nor hosts_file is set")
            return len(self.list_hosts())
        try:
            output = await run_script(config.host_db_script, config.host_db_timeout)
        except ScriptFailed as error:
            log.error("hosts registry not refreshed", extra={"error": str(error)})
            raise RefreshFailed(str(error)) from error
        registry = await asyncio.to_thread(_parse, output)
        _log_invalid_lines(registry, config.host_db_script)
        if config.host_db_script != self._config.host_db_script:
            raise RefreshFailed("host_db_script has been changed meanwhile")
        self._cached = CachedHosts(registry.hosts, time.time())
        log.info("hosts registry refreshed", extra={"hosts": len(registry.hosts)})
        await _save_cache(config.host_db, self._cached)
        return len(self.list_hosts())


async def _save_cache(file: Path, copy: CachedHosts) -> None:
    try:
        aside = await asyncio.to_thread(write_cache, file, copy)
    except OSError as error:
        log.error("copy of the hosts registry can't be written", extra={"file": str(file), "error": error.strerror})
        return
    if aside is not None:
        log.warning("host_db was no copy of ours and was moved", extra={"file": str(file), "to": str(aside)})


def _load_cache(file: Path) -> CachedHosts:
    try:
        return read_cache(file)
    except OSError as error:
        log.error("copy of the hosts registry can't be read", extra={"file": str(file), "error": error.strerror})
        return CachedHosts()


def _parse(text: bytes) -> ParsedHosts:
    return parse_hosts(text.split(b"\n"))


def _watch_hosts_file(config: Config) -> WatchedFile[Mapping[str, Host]] | None:
    if config.hosts_file is None:
        return None
    file = config.hosts_file

    def parse(text: bytes) -> Mapping[str, Host]:
        registry = _parse(text)
        _log_invalid_lines(registry, file)
        return registry.hosts

    with file_errors(config, "hosts_file"):
        return WatchedFile(file, parse)


def _log_invalid_lines(registry: ParsedHosts, source: Path) -> None:
    """Tell what was wrong with the lines, never what was in them."""
    for skipped in registry.invalid_lines[:_MAX_LOGGED_LINES]:
        fault = {"source": str(source), "line": skipped.line, "error": skipped.reason}
        log.warning("line of the hosts registry skipped", extra=fault)
    if registry.invalid_lines or registry.duplicates:
        counts = {"source": str(source), "skipped": len(registry.invalid_lines), "repeated": registry.duplicates}
        log.warning("hosts registry has lines that do not count", extra=counts)
