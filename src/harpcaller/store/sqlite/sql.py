"""The SQL of the store: named statements and numbered migrations, read from the files next to this module."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType

#: Number of rows in a statement of `insert_many`. More rows are hardly cheaper, and SQLite limits the parameters.
ROWS_PER_INSERT = 50


_FOLDER = files(__package__)
_, *_PARTS = (_FOLDER / "queries.sql").read_text("utf-8").split("-- name: ")

#: The statements of queries.sql by their names.
QUERIES: Mapping[str, str] = MappingProxyType(dict(part.split("\n", 1) for part in _PARTS))

#: The script that makes each version of the schema from the previous one, by number, in order.
MIGRATIONS: Mapping[int, str] = MappingProxyType(
    {
        int(file.name.removesuffix(".sql")): file.read_text("utf-8")
        for file in sorted((_FOLDER / "migrations").iterdir(), key=lambda file: file.name)
    }
)

#: The largest integer of SQLite.
MAX_INTEGER = 2**63 - 1


@cache
def insert_many(statement: str) -> str:
    """Return a statement that inserts `ROWS_PER_INSERT` rows instead of one, at half the cost per row."""
    head, values, row = statement.strip().removesuffix(";").partition("VALUES ")
    return head + values + ", ".join([row] * ROWS_PER_INSERT)
