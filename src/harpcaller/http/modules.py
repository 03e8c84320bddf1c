"""Join and shorten the console's modules, once, when the dispatcher starts. Pure.

A page would load 15 small modules one after the other, as each names the next, and what they have in common would be
compressed in each anew. So they are sent as three files: `app.mjs` (the frame), `views.mjs` and `log-worker.mjs`. In a
file each module is a function that returns what it exports; nothing else changes. Vendored modules stay files of their
own, to the byte.

Shortening takes out comments, indentation, and spaces that no program needs. A lexer is enough for this, since names
and statements stay as they are: the shorter file has the tokens of the source, in the same order. Whether `/` begins a
regular expression depends on what is before it. What the lexer cannot read is an error with its file and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

# What is sent: the file, and the modules that it begins with. A later file takes from the first one what that has.
# The order of the views is the one that is compressed best, by 1.7 % more than in the order of the bar.
FILES: Final = {
    "app.mjs": ("app",),
    "views.mjs": ("job", "jobs", "overview", "lists"),
    "log-worker.mjs": ("log-worker",),
}

_IMPORT: Final = re.compile(r'^import (\w+|\{[^}]*\}) from "\./([\w/-]+)\.mjs";\n', re.MULTILINE)
_EXPORT: Final = re.compile(r"^export (?=(?:async )?(?:const|function\*?|class) (\w+))", re.MULTILINE)
_EXPORT_LIST: Final = re.compile(r"^export \{ ([^}]*) \};\n", re.MULTILINE)


def join_modules(sources: Mapping[str, str]) -> dict[str, str]:
    """Return the files of `FILES`, shortened, which export each of their modules by its name.

    Raises ValueError with the file and, in most cases, the line of a module that cannot be joined or read.

    Args:
        sources: the text of each module, by its name without `.mjs`. It imports by whole lines, and exports constants,
            functions and classes only, or a list of names that it has imported.
    """
    joined: dict[str, str] = {}
    of_frame: list[str] = []
    for file, entries in FILES.items():
        is_worker = file == "log-worker.mjs"  # it runs apart from the frame, and has its own copy of what it needs
        ordered: list[str] = []
        vendored: dict[str, None] = {}
        for entry in entries:
            _collect(entry, sources, [] if is_worker else of_frame, ordered, vendored)
        head = [f'import*as {_variable(name)} from"./{name}.mjs";' for name in vendored]
        if of_frame and not is_worker:
            head.append(f'import{{{",".join(f"{name} as {_variable(name)}" for name in of_frame)}}}from"./app.mjs";')
        names = [name for name in ordered if name != "app" and not is_worker]
        tail = [f"export{{{','.join(f'{_variable(name)} as {name}' for name in names)}}};"] if names else []
        joined[file] = "\n".join([*head, *(_wrap(name, sources[name]) for name in ordered), *tail, ""])
        if not of_frame:
            of_frame = names
    return joined


def _collect(
    name: str, sources: Mapping[str, str], known: list[str], ordered: list[str], vendored: dict[str, None]
) -> None:
    """Add a module to `ordered`, after all that it imports; what is `known` is in another file."""
    for _, imported in _IMPORT.findall(sources[name]):
        if imported.startswith("vendor/"):
            vendored[imported] = None
        elif imported not in ordered and imported not in known:
            _collect(imported, sources, known, ordered, vendored)
    ordered.append(name)


def _wrap(name: str, source: str) -> str:
    """Return a module, shortened, as a constant: an object of what it exports."""
    exports = _EXPORT.findall(source)
    for listed in _EXPORT_LIST.findall(source):
        exports += listed.split(", ")
    body = _EXPORT.sub("", _EXPORT_LIST.sub("\n", source))
    body = _IMPORT.sub(
        lambda found: (
            f"const {found[1] if found[1][0] == '{' else f'{{ default: {found[1]} }}'} = {_variable(found[2])};\n"
        ),
        body,
    )
    if other := re.search(r"^(?:import|export)\b", body, re.MULTILINE):
        line = body.count("\n", 0, other.start()) + 1
        raise ValueError(f"{name}.mjs, line {line}: an import or export that cannot be joined; see join_modules")
    try:
        shorter = shorten(body)
    except ValueError as error:
        raise ValueError(f"{name}.mjs, {error}") from error
    return f"const {_variable(name)}=(()=>{{{shorter}return{{{','.join(exports)}}}\n}})();"


def _variable(name: str) -> str:
    return "$" + name.rpartition("/")[2].replace("-", "_")


_CODE: Final = re.compile(
    r"""(?P<space>(?:\s|//[^\n]*|/\*.*?\*/)+)"""
    r"""|(?P<text>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
    r"""|(?P<word>[\w$]+)"""
    r"""|(?P<mark>\+\+|--|[^"'`])""",
    re.DOTALL,
)
_REGEX: Final = re.compile(r"/(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\[\n])+/\w*")
_TEMPLATE: Final = re.compile(r"(?:\\.|\$(?!\{)|[^`\\$])*(?:`|\$\{)", re.DOTALL)
_WORDS_BEFORE_VALUE: Final = "await case delete do else in instanceof new of return throw typeof void yield"
#: A `/` after these begins a regular expression; after others, it is a division.
_BEFORE_VALUE: Final = frozenset(["", *"(,=:[!&|?{};+-*%~^<>", *_WORDS_BEFORE_VALUE.split()])
_WORDS_BEFORE_STATEMENT: Final = frozenset({"if", "while", "for", "with"})  #: A statement follows their parentheses.


def tokenize(source: str) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of each token; together the texts are the source.

    The kinds are `space` (with comments), `text`, `template` (one piece between expressions), `regex`, `word`, `mark`.
    Raises ValueError with the line.
    """
    place, before = 0, ""
    is_value_next = True  # so a `/` is no division
    depths: list[int] = []  # of open braces, in each template whose expression is open
    opened: list[bool] = []  # for each open parenthesis: whether a statement follows it
    while place < len(source):
        found = None
        kind = ""
        if depths and source[place] == "}" and not depths[-1]:
            found, kind = _TEMPLATE.match(source, place + 1), "template"
            depths.pop()
            start = place
        elif source[place] == "`":
            found, kind, start = _TEMPLATE.match(source, place + 1), "template", place
        elif source[place] == "/" and is_value_next and source[place + 1 : place + 2] not in ("/", "*"):
            found, kind, start = _REGEX.match(source, place), "regex", place
        else:
            found, start = _CODE.match(source, place), place
            kind = found.lastgroup or "" if found else ""
        if found is None:
            line, snippet = source.count("\n", 0, place) + 1, source[place : place + 40].partition("\n")[0]
            what = "regular expression" if kind == "regex" else "template" if kind == "template" else "text"
            raise ValueError(f"line {line}: the {what} has no end: {snippet}; write it in another way if it has one")
        place = found.end()
        token = source[start:place]
        if kind == "template" and token.endswith("${"):
            depths.append(0)
        elif kind == "mark" and depths:
            depths[-1] += {"{": 1, "}": -1}.get(token, 0)
        yield kind, token
        if kind == "space" or (before, token) == ("for", "await"):
            continue
        leads_statement, before = before in _WORDS_BEFORE_STATEMENT, "." + token if before == "." else token
        is_value_next = before in _BEFORE_VALUE or (kind == "template" and token.endswith("${"))
        match token:
            case "(":
                opened.append(leads_statement)
            case ")" if opened:
                is_value_next = opened.pop()


def shorten(source: str) -> str:
    """Return a module without comments and needless spaces.

    Line feeds between tokens stay, because a statement may end by one. In templates, which are markup if they have
    several lines, indentation and lines between elements go. Raises ValueError with the line that cannot be read.
    """
    pieces: list[str] = []
    space = ""
    for kind, token in tokenize(source):
        if kind == "space":
            space = token
            continue
        if kind == "template":
            token = _INDENTATION.sub("\n", _BETWEEN_TAGS.sub("", token))
        if pieces and space:
            last, first = pieces[-1][-1], token[0]
            if "\n" in space:
                pieces.append("" if last in ";{,([" or first in "})]" else "\n")
            elif _NEEDED.match(last + first):
                pieces.append(" ")
        space = ""
        pieces.append(token)
    return "".join(pieces) + "\n"


_INDENTATION: Final = re.compile(r"\n[ \t]+")
#: Lines between two elements or expressions: htm leaves them out, too.
_BETWEEN_TAGS: Final = re.compile(r"(?<=[>}])\s*\n\s*(?=<|\$\{)")
_NEEDED: Final = re.compile(r"[\w$][\w$]|\+\+|--|//")  # between two of these, a space divides tokens
