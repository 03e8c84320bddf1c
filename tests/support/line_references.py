"""Line references in the pages: ``Name.method`` (``src/package/module.py:12``) names the line that defines it.

``python tests/support/line_references.py`` updates the line numbers after a change of the source.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: A definition in backticks and behind it, in parentheses, its file and line. A line break may be between them.
REFERENCE = re.compile(r"`([\w.]+)`(\s+\(`)(src/[\w/.-]+\.py):(\d+)(`)")


def definitions(path: Path) -> dict[str, int]:
    """Return the lines of the classes, functions and module variables of a file, by qualified name."""
    found: dict[str, int] = {}

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            match node:
                case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                    found[prefix + node.name] = node.lineno
                    if isinstance(node, ast.ClassDef):
                        visit(node.body, f"{prefix}{node.name}.")
                case ast.Assign(targets=[ast.Name(id=name), *_]) | ast.AnnAssign(target=ast.Name(id=name)):
                    found[prefix + name] = node.lineno
                case _:
                    pass

    visit(ast.parse(path.read_text()).body, "")
    return found


def references(page: Path) -> Iterator[tuple[str, str, int]]:
    """Yield name, file and line of each reference in a page."""
    for name, _, file, line, _ in REFERENCE.findall(page.read_text()):
        yield name, file, int(line)


def wrong_references(page: Path) -> list[str]:
    """Return a sentence for each reference that names no definition, or another line than that of the definition."""
    wrong = []
    for name, file, line in references(page):
        lines = definitions(ROOT / file) if (ROOT / file).exists() else {}
        if lines.get(name) != line:
            wrong.append(f"{page.name}: `{name}` is defined at {file}:{lines.get(name, 'no line')}, not at {line}")
    return wrong


def update(page: Path) -> None:
    """Set the line numbers in a page. A reference to an unknown definition stays; the test reports it."""

    def corrected(match: re.Match[str]) -> str:
        name, between, file, line, rest = match.groups()
        lines = definitions(ROOT / file) if (ROOT / file).exists() else {}
        return f"`{name}`{between}{file}:{lines.get(name, line)}{rest}"

    page.write_text(REFERENCE.sub(corrected, page.read_text()))


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["docs/architecture.md"]:
        update(ROOT / argument)
