"""The policy in use: that of `access_file`, which is read again after a change.

A changed file with an error is not used: the policy stays as it was, and the log has an error. A file that other users
can change is an error, too: they could give themselves every right.
"""

from __future__ import annotations

import time
from collections.abc import Set
from typing import Any

from harp_daemon.file_modes import describe_writer
from harp_daemon.regular_files import read_regular
from harp_daemon.settings import ConfigError
from harp_daemon.watched_file import WatchedFile
from harpcaller.access.policy import ALLOW_ALL, Policy, parse
from harpcaller.access.rules import ANONYMOUS, Globs
from harpcaller.config import Config, file_errors


class PolicySource:
    """The policy of a configuration, or `ALLOW_ALL` without `access_file`. Raises `ConfigError`."""

    def __init__(self, config: Config) -> None:
        self._watched = _watch(config)

    @property
    def policy(self) -> Policy:
        """The policy to use for one request."""
        return ALLOW_ALL if self._watched is None else self._watched.value

    def describe_version(self) -> dict[str, Any]:
        """Return file and SHA-256 of the rules in use; nothing without a file."""
        if self._watched is None:
            return {}
        return {"access_file": str(self._watched.file), "access_sha256": self._watched.value.sha256}

    def describe_unmatched(self, hosts: Set[str], tags: Set[str], listeners: Set[str]) -> list[str]:
        """Return a warning for each condition of a rule that nothing meets: it may be mistyped.

        The arguments are the names and the tags of all hosts, and the names of all listeners.
        """
        if self._watched is None:
            return []
        found, anonymous = list[str](), [ANONYMOUS + name for name in listeners]
        for rule in self.policy.rules:
            where = f"{self._watched.file}: {rule.place}"
            names = () if rule.hosts is None else rule.hosts.texts
            found += [
                f"{where}: hosts: no host has the name {text}" for text in names if not Globs([text]).match_any(hosts)
            ]
            if rule.tags is not None and not rule.tags.match_any(tags):
                found.append(f"{where}: tags: no host has one of {rule.tags}")
            texts = [text for text in rule.who.texts if text.startswith(ANONYMOUS)]
            found += [
                f"{where}: who: no listener is that of {text}"
                for text in texts
                if not Globs([text]).match_any(anonymous)
            ]
        return found

    def describe(self) -> dict[str, Any] | None:
        """Return file, number of rules, age in seconds and the error of the latest contents; None without a file."""
        if self._watched is None:
            return None
        rules = len(self.policy.rules)
        age = max(0.0, time.time() - self._watched.read_at)
        return {"file": str(self._watched.file), "rules": rules, "age": age, "error": self._watched.error}


def _watch(config: Config) -> WatchedFile[Policy] | None:
    file = config.access_file
    if file is None:
        return None

    def parse_text(text: bytes) -> Policy:
        if (writer := describe_writer(file)) is not None:
            raise ValueError(f"{config.file}: access_file: {writer}")
        try:
            return parse(file, text)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    try:
        with file_errors(config, "access_file"):
            read_regular(file)
        return WatchedFile(file, parse_text)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
