"""The console's modules are sent joined and shortened, with the tokens of their sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import harpcaller.http.console as console_module
from harpcaller.http.modules import join_modules, shorten, tokenize

STATIC = Path(console_module.__file__).parent / "static"
SOURCES = {path.stem: path.read_text() for path in STATIC.glob("*.mjs")}


def without_indentation(template: str) -> str:
    """Return a template without what htm leaves out: indentation, and lines between two elements or expressions."""
    return re.sub(r"(?<=[>}])\n(?=<|\$\{)", "", re.sub(r"\n[ \t]+", "\n", template))


def tokens(source: str) -> list[tuple[str, str]]:
    """Return the tokens without the spaces between them and the indentation in templates."""
    return [
        (kind, without_indentation(token) if kind == "template" else token)
        for kind, token in tokenize(source)
        if kind != "space"
    ]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_shorter_module_has_the_tokens_of_its_source(name: str) -> None:
    source = SOURCES[name]
    assert "".join(token for _, token in tokenize(source)) == source
    shorter = shorten(source)
    assert tokens(shorter) == tokens(source)
    assert shorten(shorter) == shorter
    # A statement may end by the end of its line: such ends stay, but those beside a mark that can end none.
    kept = {token for kind, token in tokenize(shorter) if kind == "space"}
    assert kept <= {" ", "\n"}


@pytest.mark.parametrize(
    ("source", "shorter"),
    [
        ("a = b + c;", "a=b+c;"),
        ("a = b + +c - -d;", "a=b+ +c- -d;"),
        ("return a in b", "return a in b"),
        ("a = 1\nb = 2", "a=1\nb=2"),
        ("return\n{ a }", "return\n{a}"),
        ("f(a, // why\n  b)", "f(a,b)"),
        ("/** Says. */\nconst a = /[/'\"]/g.test(b) / c / d;", "const a=/[/'\"]/g.test(b)/c/d;"),
        ("const a = (b) / c, d = [e] / f;", "const a=(b)/c,d=[e]/f;"),
        ("\"a  //  b\"  +  '/* c */'", "\"a  //  b\"+'/* c */'"),
        ("`a  ${ b  +  `c  ${ { d:  1 } }  e` }  // f`", "`a  ${b+`c  ${{d:1}}  e`}  // f`"),
        ("`<a>\n    <b  c=${ d } />\n  </a>`", "`<a><b  c=${d} /></a>`"),
        ("`<a>\n  b\n  ${ c }\n  ${ d }</a>`", "`<a>\nb\n${c}${d}</a>`"),
        (r"`a \` \${ b  c` + d", r"`a \` \${ b  c`+d"),
        ("if (a(b)) /c  d/.test(e)", "if(a(b))/c  d/.test(e)"),
        ('while (a) /c  "/.test(e) || (f) / g  / h;', 'while(a)/c  "/.test(e)||(f)/g/h;'),
        ("for await (a of b) /c  d/.test(e)", "for await(a of b)/c  d/.test(e)"),
        ("a.with(1) / c  / d", "a.with(1)/c/d"),
        ("a.return / c  / d", "a.return/c/d"),
        ("else /c  d/.test(e)", "else/c  d/.test(e)"),
        ("a++ / c  / d; --a", "a++/c/d;--a"),
        ("`${ (a) / c  / d } ${ /e  f/.g }`", "`${(a)/c/d} ${/e  f/.g}`"),
    ],
)
def test_shorter_source_is_as_expected(source: str, shorter: str) -> None:
    assert shorten(source) == shorter + "\n"


@given(
    st.lists(st.sampled_from(["a", "1", '"x  y"', "`p  q`", "+", "-", "(", ")", ",", ";", "{", "}", "\n", " ", "in"]))
)
def test_any_source_keeps_its_tokens(parts: list[str]) -> None:
    source = " ".join(parts)
    assert tokens(shorten(source)) == tokens(source)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("a `b\nc", "line 3: the template has no end: `b"),
        ('a "b\n";', 'line 3: the text has no end: "b'),
        ("return /b [\n]/", "line 3: the regular expression has no end: /b ["),
    ],
)
def test_source_that_cannot_be_read_is_refused_with_its_line(source: str, problem: str) -> None:
    module = f'import {{\n  x }} from "./app.mjs";\n{source}'
    sources = {**dict.fromkeys(("app", "overview", "jobs", "lists", "log-worker"), ""), "job": module}
    with pytest.raises(ValueError, match=re.escape(f"job.mjs, {problem}")):
        join_modules(sources)


def test_modules_are_joined_in_the_order_of_their_imports() -> None:
    sources = {
        "base": 'import htm from "./vendor/htm.mjs";\nexport const one = 1;\nexport async function two() {}\n',
        "app": 'import { one } from "./base.mjs";\none();\n',
        **dict.fromkeys(("overview", "lists", "job"), ""),
        "jobs": 'import { one, two } from "./base.mjs";\nimport { h } from "./vendor/preact.mjs";\nexport { h };\n',
        "log-worker": 'import { two } from "./base.mjs";\ntwo();\n',
    }
    joined = join_modules(sources)
    assert joined["app.mjs"].splitlines() == [
        'import*as $htm from"./vendor/htm.mjs";',
        "const $base=(()=>{const{default:htm}=$htm;const one=1;async function two(){}",
        "return{one,two}",
        "})();",
        "const $app=(()=>{const{one}=$base;one();",
        "return{}",
        "})();",
        "export{$base as base};",
    ]
    views = joined["views.mjs"].splitlines()
    assert views[:2] == [
        'import*as $preact from"./vendor/preact.mjs";',
        'import{base as $base}from"./app.mjs";',
    ]
    assert "const $jobs=(()=>{const{one,two}=$base;const{h}=$preact;" in views
    assert "return{h}" in views
    assert views[-1] == "export{$job as job,$jobs as jobs,$overview as overview,$lists as lists};"
    assert "const $base=(()=>{" in joined["log-worker.mjs"], "a worker runs apart from the page"


@pytest.mark.parametrize("line", ["export let a = 1;", 'import * as a from "./base.mjs";', "export default a;"])
def test_module_that_cannot_be_joined_is_refused(line: str) -> None:
    sources = {**dict.fromkeys(("app", "overview", "jobs", "lists", "log-worker"), ""), "job": line + "\n"}
    with pytest.raises(ValueError, match=r"job\.mjs, line 1: an import or export"):
        join_modules(sources)


def test_all_modules_of_the_console_are_sent_once() -> None:
    joined = join_modules(SOURCES)
    sent = [name for file in ("app.mjs", "views.mjs") for name in re.findall(r"^const \$(\w+)=\(", joined[file], re.M)]
    assert sorted([*sent, "log-worker"]) == sorted(SOURCES)
