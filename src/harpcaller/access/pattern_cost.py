"""The cost of a regular expression: how many ways its search may try before it gives up.

Python's search tries every way to divide a text among the repetitions of a pattern. Nested repetitions have
exponentially many, so a client could stop the dispatcher with one argument. The number is computed from the pattern,
without a text, and is an upper bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from re import _constants, _parser  # type: ignore[attr-defined]  # no public module parses patterns
from typing import Any

#: Ways of two unlimited repetitions in a text of 1024 characters: their search takes some milliseconds.
MAX_WAYS = 1025 * 1025
_LONGEST_TEXT = 1024

_SINGLE = frozenset({_constants.LITERAL, _constants.NOT_LITERAL, _constants.IN, _constants.ANY, _constants.AT})
_REPEATS = frozenset({_constants.MAX_REPEAT, _constants.MIN_REPEAT})


def count_ways(pattern: str) -> float:
    """Return in how many ways a search may try to match a text of 1024 characters; infinity if it has no useful limit.

    Raises `re.error` for an invalid pattern.
    """
    return _ways_of_all(_parser.parse(pattern, re.ASCII))


def _ways_of_all(items: Iterable[tuple[Any, Any]]) -> float:
    ways = 1.0
    for operation, argument in items:
        ways = min(ways * _ways(operation, argument), float("inf"))
    return ways


def _ways(operation: Any, argument: Any) -> float:
    if operation in _SINGLE:
        return 1.0
    if operation is _constants.SUBPATTERN:
        return _ways_of_all(argument[-1])
    if operation is _constants.BRANCH:
        return sum(map(_ways_of_all, argument[1]))
    if operation in _REPEATS:
        return _ways_of_repeat(*argument)
    return float("inf")  # a reference to a group, or a condition


def _ways_of_repeat(least: int, most: int, body: Sequence[tuple[Any, Any]]) -> float:
    most = min(int(most), max(_LONGEST_TEXT, least))
    each = _ways_of_all(body)
    if each == 1.0:
        return float(most - least + 1)
    total = 0.0
    for count in range(least, most + 1):
        try:
            total += each**count
        except OverflowError:
            return float("inf")
        if total > MAX_WAYS:
            return float("inf")
    return total
