"""The SQL of the store: named statements and numbered migrations, read from the files next to this module."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType

_HEADER = "-- name: "

#: Number of rows in a statement of `insert_many`. More rows are hardly cheaper, and SQLite limits the parameters.
ROWS_PER_INSERT = 50


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
def insert_many(statement: str) -> str:
    """Return a statement that inserts `ROWS_PER_INSERT` rows instead of one, at half the cost per row."""
    head, values, row = statement.strip().removesuffix(";").partition("VALUES ")
    return head + values + ", ".join([row] * ROWS_PER_INSERT)


#: The script that makes each version of the schema from the previous one, by number, in order.
MIGRATIONS = _migrations()
