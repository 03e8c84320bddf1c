"""The pages can't drift from the program."""

from __future__ import annotations

import re
from pathlib import Path

from harpcaller.model.jobs import TRANSITIONS

ROOT = Path(__file__).parents[2]
SOURCES = {path: path.read_text() for path in (ROOT / "src").rglob("*.py")}


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_the_table_of_states_is_the_programs() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page("lifecycle.md"), re.MULTILINE)
    table = {state: set(re.findall(r"`(\w+)`", following)) for state, following in rows}
    assert table == {str(state): {str(following) for following in after} for state, after in TRANSITIONS.items()}


def test_every_error_type_of_the_program_has_a_row() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", page("protocol.md"), re.MULTILINE))
    made = set()
    for text in SOURCES.values():
        made |= set(re.findall(r"\bFailed\(\s*\"(\w+)\"", text))
        made |= set(re.findall(r"\"error\": ?\{\"type\": ?\"(\w+)\"", text))
    assert made
    assert made <= listed


def test_every_page_that_a_docstring_names_exists() -> None:
    named = {name for text in SOURCES.values() for name in re.findall(r"docs/([\w/.-]+\.md)", text)}
    assert named
    assert {name for name in named if not (ROOT / "docs" / name).exists()} == set()


def test_every_section_that_a_docstring_names_exists() -> None:
    missing = {
        (name, section)
        for text in SOURCES.values()
        for name, section in re.findall(r"Spec: docs/([\w.-]+\.md), ([\w &-]+?)[.\n]", text)
        if not re.search(
            rf"^#+ .*{re.escape(section.split(' and ')[0].strip())}", page(name), re.MULTILINE | re.IGNORECASE
        )
    }
    assert missing == set()


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    broken = {
        (str(path.relative_to(ROOT)), target)
        for path in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
        if not (path.parent / target).exists()
    }
    assert broken == set()
