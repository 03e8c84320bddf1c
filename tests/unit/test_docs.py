"""Docs agree with the program, and use the words of the glossary."""

from __future__ import annotations

import re
from pathlib import Path

from harpcaller.model.jobs import TRANSITIONS
from support import error_types, log_events
from support.line_references import references, wrong_references

ROOT = Path(__file__).parents[2]
TEXT_SUFFIXES = {".py", ".sql", ".toml", ".conf", ".service"}
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS += sorted(
    path
    for name in ("src", "examples")
    for path in (ROOT / name).rglob("*")
    if path.suffix in TEXT_SUFFIXES and path.parent.name != "migrations"  # a migration contains old names
)
SOURCES = {path: path.read_text() for path in (ROOT / "src").rglob("*.py")}


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_docs_table_of_states_matches_transitions() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page("lifecycle.md"), re.MULTILINE)
    table = {state: set(re.findall(r"`(\w+)`", following)) for state, following in rows}
    assert table == {str(state): {str(following) for following in after} for state, after in TRANSITIONS.items()}


def test_docs_table_of_errors_has_every_error_type() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", page("protocol.md"), re.MULTILINE))
    made = set()
    for text in SOURCES.values():
        made |= set(re.findall(r"\b(?:Failed|Refused)\(\s*\"(\w+)\"", text))
        made |= set(re.findall(r"\"error\": ?\{\"type\": ?\"(\w+)\"", text))
    assert made
    assert made <= listed


def test_docstring_pages_exist() -> None:
    named = {name for text in SOURCES.values() for name in re.findall(r"docs/([\w/.-]+\.md)", text)}
    assert named
    assert {name for name in named if not (ROOT / "docs" / name).exists()} == set()


def test_page_of_log_events_is_generated_from_the_source() -> None:
    text = log_events.PAGE.read_text()
    assert text == log_events.render(text), "write it with: ./dev run python tests/support/log_events.py"


def test_page_of_log_events_explains_each() -> None:
    meanings = log_events.read_meanings(log_events.PAGE.read_text())
    assert len(meanings) > 100
    assert [event for event, meaning in meanings.items() if not meaning.strip()] == []


def test_source_paths_in_pages_exist() -> None:
    named = {name for path in TEXTS for name in re.findall(r"`(src/[\w/.-]+)`", path.read_text())}
    assert len(named) > 20
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_line_references_of_the_architecture_are_right() -> None:
    architecture = ROOT / "docs" / "architecture.md"
    assert len([*references(architecture)]) >= 25
    assert wrong_references(architecture) == [], "set them with: ./dev run python tests/support/line_references.py"


def test_test_names_in_pages_exist() -> None:
    functions = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    functions |= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    named = {name for path in TEXTS for name in re.findall(r"\b(test_\w+)\b(?!\.py\b|\w*<)", path.read_text())}
    assert named
    assert named - functions - {"test_docs"} == set()


def test_docstring_sections_exist() -> None:
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


#: Other words for what a term of the glossary names. Two words for one thing make readers look for a difference.
OTHER_WORDS = {
    "frontend": r"\bgates?\b",
    "supervisor": r"\bwardens?\b",
    "launcher": r"\bkeepers?\b",
    "zygote": r"\bnursery\b",
    "pre-forked worker": r"\bspares?\b",
    "idle worker": r"\bresting process|\bprocess(es)? that rests?\b",
    "legacy": r"\b(of|in) the field\b|\bthe older (system|program|daemon|dispatcher|harpd)\b",
    "resumable call": r"\bkept calls?\b|\bkept_calls?\b",
    "connection-bound call": r"\btied (to|calls?)\b",
    "exit info": r"\bevidence\b",
    "stop report": r"\breceipts?\b",
    "keep-alive": r"\bkept connections?\b|\bkeep=|\bkeep_running\b",
    "heartbeat": r"\bsigns? of life\b",
    "instance id": r"\bincarnations?\b",
    "tombstone": r"\bbarred\b|\bbars\b",
    "state file": r"\bcall records?\b",
    "orphan": r"\bunwanted\b|\bnobody wants\b",
    "result_ttl": r"\blinger\b",
    "host_timeout": r"\bhost_lost_after\b",
    "max_calls_per_process": r"\breuse=",
    "host": r"\bminions?\b",
}

#: Phrases that readers have to read twice, or without a meaning; and the plain words to use.
BANNED_PHRASES = {
    r"\bwhoever\b": "name the actor",
    r"\bwho(so)? asks\b": "the caller, the client",
    r"\bwhat (comes?|came|was said|is said|stands|stood)\b": "name the thing: the data, the message",
    r"\bcomes? to be\b": "is created",
    r"\bto be had\b": "available",
    r"(?<!there )\b[Ii]s none\b(?! of)": "say what it is",
    r"\bwon't do\b": "is invalid",
    r"\bfor good\b": "permanently",
    r"\bas ever\b": "as before",
    r"\btill\b": "until",
    r"\bby itself\b(?= (takes|gives|says))": "by default",
    r"\bfor nothing\b": "without effect",
    r"\b(says?|said|tells?|told|hears?|heard) nothing\b": "sends nothing, receives nothing",
    r"\b(has|have|had|was|were|be|been|is|are) (told|heard)\b": "notified, received",
    r"\bnobody\b(?=.{0,20}\b(wants|asks)\b)": "name the condition",
    r"\bslip of the pen\b": "typing error",
    r"\bcan't\b": "cannot",
    r"\bit is borne\b|\bis borne\b": "tolerated",
    r"\bthe moment\b": "the time",
    r"\bby way of\b": "through",
    r"\bas it comes\b": "by default; unchanged",
    r"\bgo(es)? on\b|\bgoing on\b|\bwent on\b": "continue",
    r"\bmerely\b": "only",
    r"\bsome (hundred|thousand)\b": "a number",
}


def found(patterns: dict[str, str]) -> list[str]:
    """Return ``file:line: text (hint)`` for each line of a text that a pattern matches."""
    compiled = {re.compile(pattern): hint for pattern, hint in patterns.items()}
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]!r}: {hint}"
        for path in TEXTS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for pattern, hint in compiled.items()
        if pattern.search(line)
    ]


def glossary() -> list[str]:
    """Return the terms of the glossary: the text in bold or as code in the first cell of a row."""
    return re.findall(r"^\| (?:\*\*|`)([^*`]+)(?:\*\*|`) \|", page("glossary.md"), re.MULTILINE)


def test_glossary_terms_are_defined_once() -> None:
    terms = glossary()
    assert len(terms) > 30
    assert len(terms) == len(set(terms))


def test_glossary_terms_are_in_use() -> None:
    text = "\n".join(path.read_text().lower() for path in TEXTS if path.name != "glossary.md")
    assert [term for term in glossary() if term.lower() not in text] == []


def test_texts_use_no_other_word_for_a_glossary_term() -> None:
    assert found({pattern: term for term, pattern in OTHER_WORDS.items()}) == []


def test_texts_have_no_banned_phrase() -> None:
    assert found(BANNED_PHRASES) == []


def test_glossary_other_words_belong_to_its_terms() -> None:
    assert set(OTHER_WORDS) <= {*glossary(), "max_calls_per_process"}


def test_console_explains_each_error_type_of_the_protocol() -> None:
    types = error_types.read_error_types()
    assert {"timeout", "host_lost", "call_died", "invalid_argument_list"} <= types.keys()
    assert all(cause and cure for entries in types.values() for cause, cure in entries)
    assert error_types.FILE.read_text() == error_types.make_file(), "run tests/support/error_types.py"
