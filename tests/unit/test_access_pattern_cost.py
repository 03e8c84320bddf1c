"""Patterns of the access file: those whose search could stop the dispatcher are refused."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from harp_daemon.settings import ConfigError
from harpcaller.access.pattern_cost import MAX_WAYS, count_ways
from harpcaller.access.policy import load

QUICK = [
    r"[a-z0-9-]+",
    r"[a-z]+\.[a-z]+",
    r"(www|blog|shop)",
    r"(?:www\.)?[a-z0-9-]{1,63}",
    r"v\d{1,3}\.\d{1,3}",
    r"/srv/(a|b)/.*",
    r"([a-z]{2}){3}",
    r"(?:ab)+",
    r"a{5}",
    r"",
    r"(?i:x)?y\Z",
]
SLOW = [
    r"([a-z0-9]+-?)+",
    r"[^/]*\.[^/]*\.[^/]*\.[^/]*x",
    r"(a|a)*b",
    r"(a|ab)+c",
    r"(a*)*b",
    r"((a+)b?)+c",
    r"(x+x+)+y",
    "a?" * 30 + "a" * 30,
    r"(a{1,9}){1,9}b",
    r"(.)(\1)*(\1)*x",
    r"(?=(a+)+b)c",
    r"(ab|cd|ef|gh){12}e",
]


@pytest.mark.parametrize("pattern", QUICK)
def test_quick_patterns_are_accepted_and_quick(pattern: str) -> None:
    assert count_ways(pattern) <= MAX_WAYS
    began = time.process_time()
    for text in ("a" * 1024, "ab" * 512, "a.a." * 256, "/srv/a/" + "x" * 1000):
        re.fullmatch(pattern, text + "!")
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_with_many_ways_are_refused(tmp_path: Path, pattern: str) -> None:
    assert count_ways(pattern) > MAX_WAYS
    file = tmp_path / "access.toml"
    rule = f"[[rule]]\nwho = ['*']\nallow = ['call']\narguments = {{site = {{pattern = '{pattern}'}}}}\n"
    file.write_text(rule)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="expected a pattern with a quick search") as raised:
        load(file)
    assert "rule 1 (line " in str(raised.value)


def test_bound_of_two_repetitions_holds() -> None:
    """The slowest accepted kind on its worst text: two repetitions that share all characters."""
    began = time.process_time()
    assert re.fullmatch(r"[^x]*[^y]*z", "a" * 1024) is None
    assert time.process_time() - began < 5.0
