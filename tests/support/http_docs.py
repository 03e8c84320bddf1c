"""The pages that are made from the table of operations: ``python tests/support/http_docs.py`` writes them."""

from __future__ import annotations

from pathlib import Path

from harpcaller.http.app import OPERATIONS
from harpcaller.http.openapi import encode_document, insert_tables

DOCS = Path(__file__).parents[2] / "docs"


def render() -> dict[Path, bytes]:
    """Return the contents that the pages must have."""
    page = DOCS / "http-api.md"
    return {
        DOCS / "openapi.json": encode_document(OPERATIONS),
        page: insert_tables(page.read_text(), OPERATIONS).encode(),
    }


if __name__ == "__main__":
    for file, contents in render().items():
        file.write_bytes(contents)
