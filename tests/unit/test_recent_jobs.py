"""The latest jobs, which clients with rules may wait for without a look-up in the store."""

from __future__ import annotations

from pathlib import Path

from harp.protocol.json_text import Raw
from harpcaller.access.enforcement import Access
from harpcaller.config import Config, load
from harpcaller.model.jobs import NewJob

RULES = '[[rule]]\nwho = ["*"]\nallow = ["call", "read"]\n'
LATEST, LONGEST = 2500, 1000  # docs/architecture.md: at most twice as many jobs, and the bytes of their arguments


def config_in(directory: Path, rules: str | None) -> Config:
    file, access = directory / "harpcaller.toml", directory / "access.toml"
    file.write_text("" if rules is None else f'access_file = "{access}"\n')
    access.write_text(rules or "")
    return load(file)


def job(number: int, arguments: bytes = b"[]") -> NewJob:
    return NewJob(str(number), "web01", "restart", Raw(arguments), 60.0, 60.0)


def test_recent_jobs_are_limited(tmp_path: Path) -> None:
    access = Access(config_in(tmp_path, RULES))
    for number in range(3 * LATEST):
        access.remember(job(number))
    known = [number for number in range(3 * LATEST) if access.get_recent(str(number)) is not None]
    assert known == list(range(known[0], 3 * LATEST)), "the oldest ones are forgotten"
    assert LATEST <= len(known) <= 2 * LATEST


def test_recent_job_with_long_arguments_is_looked_up(tmp_path: Path) -> None:
    access = Access(config_in(tmp_path, RULES))
    access.remember(job(1, b" " * (LONGEST - 2) + b"[]"))
    access.remember(job(2, b" " * (LONGEST - 1) + b"[]"))
    assert access.get_recent("1") is not None
    assert access.get_recent("2") is None


def test_no_job_is_remembered_without_rules(tmp_path: Path) -> None:
    access = Access(config_in(tmp_path, None))
    access.remember(job(1))
    assert access.get_recent("1") is None
