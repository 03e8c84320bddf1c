"""The SQL of the store: named statements and numbered migrations, read from the files next to this module."""

from __future__ import annotations

from importlib.resources import files

_FOLDER = files(__package__)
_, *_PARTS = (_FOLDER / "queries.sql").read_text("utf-8").split("-- name: ")

#: The statements of queries.sql by their names.
QUERIES = dict(part.split("\n", 1) for part in _PARTS)

#: The script that makes each version of the schema from the previous one, by number, in order.
MIGRATIONS = dict(sorted((int(file.name[:-4]), file.read_text("utf-8")) for file in (_FOLDER / "migrations").iterdir()))

#: The largest integer of SQLite.
MAX_INTEGER = 2**63 - 1
