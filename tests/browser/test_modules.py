"""The console's modules that need no daemon: exact JSON text, colours, times, characters that one does not see."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, Route

from harpcaller.http.console import StaticFile, read_static_files

_PLACE = "http://localhost:1/static/version/"
_PAGE = StaticFile("text/html", b"<!doctype html><title>Modules</title><div id=app></div>", b"")
_NUMBERS = st.sampled_from(["0", "-0", "1.50", "1e400", "1208925819614629174706176", "0.10", "-1E-7"])
_STRINGS = st.text(max_size=8).map(json.dumps) | st.sampled_from([r'"\\\""', r'"\ud800"', '"{[,:"', '"\u202e"'])
_LEAVES = _NUMBERS | _STRINGS | st.sampled_from(["true", "null"])


def _containers(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    space = st.sampled_from(["", " "])
    lists = st.tuples(st.lists(values, max_size=4), space).map(lambda made: "[" + f",{made[1]}".join(made[0]) + "]")
    pairs = st.lists(st.tuples(_STRINGS, values), max_size=4)
    objects = st.tuples(pairs, space).map(
        lambda made: "{" + f",{made[1]}".join(f"{key}:{made[1]}{value}" for key, value in made[0]) + "}"
    )
    return lists | objects


TEXTS = st.recursive(_LEAVES, _containers, max_leaves=12)


@pytest.fixture(scope="module")
def modules(browser: Browser) -> Iterator[Page]:
    """A page with the modules, which are sent by the test."""
    files = read_static_files()

    def send(route: Route) -> None:
        file = files.get(route.request.url.removeprefix(_PLACE), _PAGE)
        route.fulfill(body=file.body, content_type=file.media_type)

    context = browser.new_context()
    context.route("**/*", send)
    page = context.new_page()
    page.goto(_PLACE)
    page.evaluate(
        """async () => {
            const [app, views] = [await import("./app.mjs"), await import("./views.mjs")];
            window.modules = { ...app, ...views };
        }"""
    )
    yield page
    context.close()


def _tokens(text: str) -> list[str]:
    return re.findall(r'"(?:[^"\\]|\\.)*"|[^\s"]', text)


@settings(max_examples=60)
@given(text=TEXTS)
def test_indented_json_has_the_same_tokens(modules: Page, text: str) -> None:
    indented = modules.evaluate("(text) => modules.json.indent(text)", text)
    assert _tokens(indented) == _tokens(text)


@settings(max_examples=60)
@given(values=st.lists(TEXTS, max_size=5), key=_STRINGS)
def test_children_are_cut_as_they_were_sent(modules: Page, values: list[str], key: str) -> None:
    array, an_object = f"[{', '.join(values)}]", f"{{{', '.join(f'{key} : {value}' for value in values)}}}"
    cut = "(text) => [...modules.json.children(text)].map(([key, start, end]) => [key, text.slice(start, end)])"
    assert modules.evaluate(cut, array) == [[None, value] for value in values]
    assert modules.evaluate(cut, an_object) == [[key, value] for value in values]


def test_deep_and_cut_json_is_shown(modules: Page) -> None:
    depth = 1000
    deep = "[" * depth + "]" * depth
    assert _tokens(modules.evaluate("(text) => modules.json.indent(text)", deep)) == list(deep)
    for text in ('{"a": [1, {"b', '[1, "x', '{"a"', "[", '{"a": 1,'):
        assert modules.evaluate("(text) => modules.json.makeTree(text).textContent.length", text) >= 0


@pytest.mark.parametrize(
    ("text", "decoded"),
    [('"a\\n\\u00e9"', "a\né"), ('"cut \\u00', "cut "), ('"cut \\\\', "cut \\"), ('"cut \\', "cut "), ("12", None)],
)
def test_strings_are_decoded_also_when_cut(modules: Page, text: str, decoded: str | None) -> None:
    assert modules.evaluate("(text) => modules.json.decodeString(text)", text) == decoded


@pytest.mark.parametrize(
    ("text", "plain", "runs"),
    [
        ("plain", "plain", []),
        ("\x1b[31mred\x1b[0m x", "red x", [[0, 3, "sgr-1"]]),
        ("\x1b[1;32mbold\x1b[22mgreen", "boldgreen", [[0, 4, "sgr-bold sgr-2"], [4, 9, "sgr-2"]]),
        ("\x1b[38;5;196mx\x1b[38;2;0;0;255my\x1b[39mz", "xyz", [[0, 1, "sgr-1"], [1, 2, "sgr-4"]]),
        ("\x1b[2Jx\x1b]0;t\x07", "\x1b[2Jx\x1b]0;t\x07", []),
    ],
)
def test_colours_are_read_and_other_escapes_stay(
    modules: Page, text: str, plain: str, runs: list[list[object]]
) -> None:
    found_plain, found_runs = modules.evaluate("(text) => modules.log.readColours(text)", text)
    assert found_plain == plain
    assert [(start, end, set(names.split())) for start, end, names in found_runs] == [
        (start, end, set(str(names).split())) for start, end, names in runs
    ]


def test_characters_that_one_does_not_see_are_named(modules: Page) -> None:
    text = "a\u202eb\x00\x1b\u200b\ufeff\r\x85c\td\ne"
    shown = modules.evaluate("(text) => modules.formats.visible(text)", text)
    assert shown == "a\\u202eb\\x00\\x1b\\u200b\\ufeff\\x0d\\x85c\td\ne"


@pytest.mark.parametrize(
    ("json_text", "shown"),
    [
        (r'["M\u00fcnchen", "\u5317\u4eac"]', '("M\u00fcnchen", "\u5317\u4eac")'),
        (
            r'["\ud83d\ude00 \\u00fc \u0022 \n"]',
            r'("\U0001f600 \\u00fc \u0022 \n")'.replace(r"\U0001f600", "\U0001f600"),
        ),
        (
            r'["\u05d0", "b", "\u0627"]',
            '(\u2068"\u05d0"\u2069, "b", \u2068"\u0627"\u2069)',
        ),
        (r'["\u202e \u00A0 \ud83d"]', r'("\u202e \u00A0 \ud83d")'),
    ],
)
def test_escaped_letters_of_arguments_are_shown_as_letters(modules: Page, json_text: str, shown: str) -> None:
    assert modules.evaluate("(text) => modules.formats.callOf('p', text)", json_text) == ["p", shown]
