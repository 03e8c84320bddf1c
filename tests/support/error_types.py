"""The error types with cause and cure, as the console shows them: from the tables of docs/protocol.md.

`python tests/support/error_types.py` writes the console's file anew. A test compares the two.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "src" / "harpcaller" / "http" / "static" / "errors.json"

#: What a cause says about the table of harpd, which the console shows beside it.
_REFERENCE = ". Also harpd's own, see below"


def read_error_types() -> dict[str, list[tuple[str, str]]]:
    """Return the causes and cures of each type that can end a job, as plain text."""
    page = (ROOT / "docs" / "protocol.md").read_text()
    found: dict[str, list[tuple[str, str]]] = {}
    above = ""  # the cure of the row above, which "the same" means
    for heading in ("From the dispatcher", "From harpd", "From legacy programs"):
        section = page.partition(f"\n### {heading}\n")[2].partition("\n##")[0]
        for name, rest, cause, cure in re.findall(
            r"^\| `(\w+)`([^|]*)\|(?:[^|]*\|)??([^|]*)\|([^|]*)\|$", section, re.MULTILINE
        ):
            detail = f"{_plain(rest)}: " if rest.strip() else ""
            cure = _plain(cure)
            above = (
                above + cure.removeprefix("the same") if cure.startswith("the same") else cure
            ) or "see the message"
            found.setdefault(name, []).append((detail + _plain(cause).replace(_REFERENCE, ""), above))
    return found


def _plain(text: str) -> str:
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("`", "").strip()


def make_file() -> str:
    """Return the text of the console's file: {type: [[cause, cure], ...]}; a type of both daemons has two."""
    lines = [f"{json.dumps(name)}: {json.dumps(entries)}" for name, entries in sorted(read_error_types().items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(make_file())
