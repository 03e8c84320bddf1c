"""The entries of an audit file.

Each action with a reply has its entry before the reply. All other entries, as of ends and of a start, come a moment
later: a test waits for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.deadline import wait_until


def read_audit(file: Path, **fields: Any) -> list[dict[str, Any]]:
    """Return the entries with these fields; a line that is being written is none."""
    entries = map(json.loads, file.read_bytes().split(b"\n")[:-1])
    return [entry for entry in entries if fields.items() <= entry.items()]


def wait_audit(file: Path, count: int, **fields: Any) -> list[dict[str, Any]]:
    """Wait until the file has so many entries with these fields; return all."""

    def found() -> list[dict[str, Any]] | None:
        entries = read_audit(file, **fields)
        return entries if len(entries) >= count else None

    return wait_until(found, what=f"{count} entries {fields}") or []
