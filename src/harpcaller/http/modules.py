"""Join and shorten the console's modules, once, when the dispatcher starts. Pure.

A page would load 15 small modules one after the other, as each names the next, and what they have in common would be
compressed in each anew. So they are sent as three files: `app.mjs` (the frame), `views.mjs` and `log-worker.mjs`. In a
file each module is a function that returns what it exports; nothing else changes. Vendored modules stay files of their
own, to the byte.

Shortening takes out comments, indentation, and spaces that no program needs. A lexer is enough for this, since names
and statements stay as they are: the shorter file has the tokens of the source, in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

# What is sent: the file, and the modules that it begins with. A later file takes from the first one what that has.
FILES: Final = {
    "app.mjs": ("app",),
    "views.mjs": ("overview", "jobs", "lists", "job"),
    "log-worker.mjs": ("log-worker",),
}

_IMPORT: Final = re.compile(r'^import (\w+|\{[^}]*\}) from "\./([\w/-]+)\.mjs";\n', re.MULTILINE)
_EXPORT: Final = re.compile(r"^export (?=(?:async )?(?:const|function\*?|class) (\w+))", re.MULTILINE)
_EXPORT_LIST: Final = re.compile(r"^export \{ ([^}]*) \};\n", re.MULTILINE)


def join_modules(sources: Mapping[str, str]) -> dict[str, str]:
    """Return the files of `FILES`, which export each of their modules by its name.

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
        head = [f'import * as {_variable(name)} from "./{name}.mjs";' for name in vendored]
        if of_frame and not is_worker:
            head.append(
                f'import {{ {", ".join(f"{name} as {_variable(name)}" for name in of_frame)} }} from "./app.mjs";'
            )
        names = [name for name in ordered if name != "app" and not is_worker]
        tail = f"export {{ {', '.join(f'{_variable(name)} as {name}' for name in names)} }};" if names else ""
        joined[file] = "\n".join([*head, *(_wrap(name, sources[name]) for name in ordered), tail])
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
    """Return a module as a constant: an object of what it exports."""
    exports = _EXPORT.findall(source)
    for listed in _EXPORT_LIST.findall(source):
        exports += listed.split(", ")
    body = _EXPORT.sub("", _EXPORT_LIST.sub("", source))
    body = _IMPORT.sub(
        lambda found: (
            f"const {found[1] if found[1][0] == '{' else f'{{ default: {found[1]} }}'} = {_variable(found[2])};\n"
        ),
        body,
    )
    if re.search(r"^(?:import|export)\b", body, re.MULTILINE):
        raise ValueError(f"{name}.mjs: an import or export that cannot be joined")
    return f"const {_variable(name)} = (() => {{\n{body}return {{ {', '.join(exports)} }};\n}})();"


def _variable(name: str) -> str:
    return "$" + name.rpartition("/")[2].replace("-", "_")


_CODE: Final = re.compile(
    r"""(?P<space>(?:\s|//[^\n]*|/\*.*?\*/)+)"""
    r"""|(?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
    r"""|(?P<word>[\w$]+)"""
    r"""|(?P<mark>[^"'`])""",
    re.DOTALL,
)
_REGEX: Final = re.compile(r"/(?:\\.|\[(?:\\.|[^\]\\])*\]|[^/\\\[])+/\w*")
_TEMPLATE: Final = re.compile(r"(?:\\.|\$(?!\{)|[^`\\$])*(?:`|\$\{)", re.DOTALL)
_BEFORE_REGEX: Final = frozenset("(,=:[!&|?{};+-*%~^<>") | {"return", "typeof", "case", "of", "in", "void", ""}


def tokenize(source: str) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of each token; together the texts are the source.

    The kinds are `space` (with comments), `text`, `template` (one piece between expressions), `regex`, `word`, `mark`.
    """
    place, before = 0, ""
    depths: list[int] = []  # of open braces, in each template whose expression is open
    while place < len(source):
        found = None
        kind = ""
        if depths and source[place] == "}" and not depths[-1]:
            found, kind = _TEMPLATE.match(source, place + 1), "template"
            depths.pop()
            start = place
        elif source[place] == "`":
            found, kind, start = _TEMPLATE.match(source, place + 1), "template", place
        elif source[place] == "/" and before in _BEFORE_REGEX and source[place + 1] not in "/*":
            found, kind, start = _REGEX.match(source, place), "regex", place
        else:
            found, start = _CODE.match(source, place), place
            kind = found.lastgroup or "" if found else ""
        if found is None:
            raise ValueError(f"not a module: {source[place : place + 40]!r}")
        place = found.end()
        token = source[start:place]
        if kind == "template" and token.endswith("${"):
            depths.append(0)
        elif kind == "mark" and depths:
            depths[-1] += {"{": 1, "}": -1}.get(token, 0)
        if kind != "space":
            before = token
        yield kind, token


def shorten(source: str) -> str:
    """Return a module without comments and needless spaces.

    Line feeds between tokens stay, because a statement may end by one; in templates, indentation goes.
    """
    pieces: list[str] = []
    space = ""
    for kind, token in tokenize(source):
        if kind == "space":
            space = token
            continue
        if kind == "template":
            token = _INDENTATION.sub("\n", token)
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
_NEEDED: Final = re.compile(r"[\w$][\w$]|\+\+|--|//")  # between two of these, a space divides tokens
