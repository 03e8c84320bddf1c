"""The SQL of the store: named statements and numbered migrations, read from the files beside this module."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType

__all__ = ["INSERTED_AT_ONCE", "MIGRATIONS", "QUERIES", "inserts_many"]

_HEADER = "-- name: "

#: How many rows `inserts_many` takes: more are hardly cheaper, and SQLite's limit on parameters is far.
INSERTED_AT_ONCE = 50


def _statements(text: str) -> Mapping[str, str]:
    _, *parts = text.split(_HEADER)
    named = (part.split("\n", 1) for part in parts)
    return MappingProxyType({name.strip(): statement for name, statement in named})


def _migrations() -> Mapping[int, str]:
    found = sorted((files(__package__) / "migrations").iterdir(), key=lambda file: file.name)
    return MappingProxyType({int(file.name.removesuffix(".sql")): file.read_text("utf-8") for file in found})


#: The statements of queries.sql by their names.
QUERIES = _statements((files(__package__) / "queries.sql").read_text("utf-8"))


@cache
def inserts_many(statement: str) -> str:
    """A statement that inserts a row, for INSERTED_AT_ONCE of them: a row costs half as much."""
    head, values, row = statement.strip().removesuffix(";").partition("VALUES ")
    return head + values + ", ".join([row] * INSERTED_AT_ONCE)


#: What makes each version of the schema from the one before, by number, in order.
MIGRATIONS = _migrations()
