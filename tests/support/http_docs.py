"""The pages that are made from the table of operations: ``python tests/support/http_docs.py`` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from harpcaller.http.app import OPERATIONS
from harpcaller.http.openapi import encode_document, own_problems, query_schemas
from harpcaller.http.operations import Operation

DOCS = Path(__file__).parents[2] / "docs"
_BEGIN, _END = "<!-- operations -->\n", "<!-- end of operations -->\n"


def render() -> dict[Path, bytes]:
    """Return the contents that the pages must have."""
    page = DOCS / "http-api.md"
    return {
        DOCS / "openapi.json": encode_document(OPERATIONS),
        page: insert_tables(page.read_text(), OPERATIONS).encode(),
    }


def render_tables(operations: Sequence[Operation]) -> str:
    """Return the part of docs/http-api.md that is made from the table."""
    parts = ["| method and path | `operationId` | right | meaning |\n|---|---|---|---|\n"]
    for one in operations:
        right = "" if one.action is None else f"`{one.action}`"
        parts.append(f"| `{one.method} {one.path}` | `{one.operation_id}` | {right} | {one.summary} |\n")
    for one in operations:
        parts.append(f"\n### {one.summary}\n\n`{one.method} {one.path}`\n")
        if one.description:
            parts.append(f"\n{one.description}\n")
        if rows := [*_query_rows(one), *_header_rows(one)]:
            parts.append("\n| parameter | default | meaning |\n|---|---|---|\n" + "".join(rows))
        if one.body is not None:
            parts.append(f"\n```json\n{json.dumps(one.body.example)}\n```\n")
        parts.append("\n| status | meaning |\n|---|---|\n")
        parts += [f"| {status} | {answer.meaning} |\n" for status, answer in one.responses.items()]
        parts += [f"| {status} | {', '.join(f'`{code}`' for code in codes)} |\n" for status, codes in own_problems(one)]
    return "".join(parts)


def _query_rows(operation: Operation) -> Iterator[str]:
    for name, schema in query_schemas(operation).items():
        kind = "one of " + ", ".join(f"`{value}`" for value in schema["enum"]) if "enum" in schema else schema["type"]
        default = f"`{json.dumps(schema['default'])}`" if "default" in schema else ""
        yield f"| `{name}` ({kind}) | {default} | {schema.get('description', '')} |\n"


def _header_rows(operation: Operation) -> Iterator[str]:
    for name, meaning in operation.headers.items():
        yield f"| header `{name}` | | {meaning} |\n"


def insert_tables(page: str, operations: Sequence[Operation]) -> str:
    """Return docs/http-api.md with its part made anew."""
    before, _, rest = page.partition(_BEGIN)
    return f"{before}{_BEGIN}{render_tables(operations)}{_END}{rest.partition(_END)[2]}"


if __name__ == "__main__":
    for file, contents in render().items():
        file.write_bytes(contents)
