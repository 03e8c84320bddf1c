"""The table of log events in `docs/log-events.md`: events, levels, programs and fields come from the source.

``python tests/support/log_events.py`` updates the table; people write the meanings. An event
without a meaning gets an empty one, which the test rejects.

An event is the constant text of a log call; or, if the call has a variable, each text that is passed to a parameter
named `event` of a function, or that is its default.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "log-events.md"
_LEVELS = ("debug", "info", "warning", "error", "exception")
#: The program of a package; the first prefix that matches.
_PROGRAMS = {
    "harpcaller/": "dispatcher",
    "harpd/frontend/": "frontend",
    "harpd/auth/": "frontend",
    "harpd/config/": "frontend",
    "harpd/control/": "launcher",
    "harpd/": "supervisor",
    "harp_daemon/": "all",
}
_ROW = re.compile(r"^\| `([^`]+)` \|.*\| ([^|]*) \|$", re.MULTILINE)
_HEAD = "| event | level | program | fields | meaning |\n|---|---|---|---|---|\n"


@dataclass
class LogEvent:
    """The properties of an event in the source."""

    levels: set[str] = field(default_factory=set)
    programs: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _texts(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body)
        yield from _texts(node.orelse)


def _field_names(call: ast.Call, level: str) -> Iterator[str]:
    for keyword in call.keywords:
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Dict):
            yield from (key.value for key in keyword.value.keys if isinstance(key, ast.Constant))  # type: ignore[misc]
    if level == "exception" or any(keyword.arg == "exc_info" for keyword in call.keywords):
        yield "traceback"


def find_events() -> dict[str, LogEvent]:
    """Return all log events of the daemons by their text."""
    found: dict[str, LogEvent] = {}

    def add(text: str, level: str, path: str, names: Iterable[str] = ()) -> None:
        event = found.setdefault(text, LogEvent())
        event.levels.add("error" if level == "exception" else level)
        event.programs.add(next(program for prefix, program in _PROGRAMS.items() if path.startswith(prefix)))
        event.fields.update(names)

    paths = sorted((ROOT / "src").rglob("*.py"))
    trees = {path.relative_to(ROOT / "src").as_posix(): [*ast.walk(ast.parse(path.read_text()))] for path in paths}
    passing: dict[str, tuple[str, str]] = {}  # functions and classes that log an event which is passed: path, level
    for path, nodes in trees.items():
        variable_level = "warning"
        for call in nodes:
            if isinstance(call, ast.Call) and (level := _log_level(call)):
                texts = [*_texts(call.args[level == "log"])]
                level = "warning" if level == "log" else level
                for each in texts:
                    add(each, level, path, _field_names(call, level))
                variable_level = variable_level if texts else level
        for name, function in _functions(nodes):
            arguments = function.args.args
            if any(argument.arg == "event" for argument in arguments):
                passing[name] = path, variable_level
                defaults = zip(reversed(arguments), reversed(function.args.defaults), strict=False)
                for text in [
                    text for argument, default in defaults if argument.arg == "event" for text in _texts(default)
                ]:
                    add(text, variable_level, path)
    for path, nodes in trees.items():
        for call in nodes:
            name = _name(call.func) if isinstance(call, ast.Call) else ""
            if isinstance(call, ast.Call) and name in passing:
                defined_in, level = passing[name]
                if path == defined_in or name[0].isupper():
                    for text in [text for argument in call.args for text in _texts(argument) if " " in text]:
                        add(text, level, path)
    return found


def _log_level(call: ast.Call) -> str:
    """Return the level of a log call, or "log"; empty: it is another call."""
    target = call.func
    if not isinstance(target, ast.Attribute) or target.attr not in (*_LEVELS, "log") or not call.args:
        return ""
    return target.attr if _name(target.value).endswith("log") or "getLogger" in ast.unparse(target.value) else ""


def _functions(nodes: list[ast.AST]) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield the functions with their names; a constructor has that of its class."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from (
                (node.name, each) for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"
            )


def read_meanings(page: str) -> Mapping[str, str]:
    """Return the meanings in the table of a page."""
    return dict(_ROW.findall(page))


def render(page: str) -> str:
    """Return the page with a new table, which has the meanings of the old one."""
    meanings = read_meanings(page)
    rows = [
        f"| `{text}` | {', '.join(sorted(event.levels))} | {', '.join(sorted(event.programs))} "
        f"| {', '.join(f'`{name}`' for name in sorted(event.fields))} | {meanings.get(text, '')} |\n"
        for text, event in sorted(find_events().items(), key=lambda item: item[0].lower())
    ]
    return page[: page.index(_HEAD)] + _HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
