"""Errors of configuration files: `msgspec`'s validation errors as ``KEY: expected X, got Y``."""

from __future__ import annotations

import re
from typing import Any

#: `msgspec`'s message and its key. A check of a configuration class starts its message with the rest of the key.
_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<key>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_BOUND = re.compile(r"Expected `(.*)` ([<>]=?) (\S+)")
_TYPE = re.compile(r"Expected `(.*)`, got `(.*)`")
_TYPE_NAMES = {
    "object": "a mapping",
    "array": "a list",
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "null": "nothing",
}
_BOUNDS = {">": "more than", ">=": "at least", "<": "less than", "<=": "at most"}


def describe_validation_error(error: Exception, document: Any) -> str:
    """Return a validation error as ``KEY: expected X, got Y``.

    Args:
        error: the `msgspec.ValidationError`.
        document: the decoded file.
    """
    match = _MESSAGE.fullmatch(str(error))
    assert match is not None
    what, key = match["what"], match["key"] or ""
    if found := _MISSING.fullmatch(what):
        return f"{_join_key(key, found[1])}: missing"
    if found := _UNKNOWN.fullmatch(what):
        return f"{_join_key(key, found[1])}: unknown key"
    if found := _TYPE.fullmatch(what):
        return f"{key or 'the file'}: expected {_name_types(found[1])}, got {_name_types(found[2])}"
    if found := _BOUND.fullmatch(what):
        value = describe_value(_value_at(document, key))
        return f"{key}: expected {_name_types(found[1])}, {_BOUNDS[found[2]]} {found[3]}, got {value}"
    if what.startswith("expected "):
        return f"{key}: {what}"
    return _join_key(key, what)


def describe_value(value: object) -> str:
    """Return a value of a configuration for a message."""
    return "nothing" if value is None else repr(value)


def _join_key(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _name_types(names: str) -> str:
    return " or ".join(_TYPE_NAMES.get(name, name) for name in names.split(" | "))


def _value_at(document: Any, key: str) -> Any:
    for name in key.split("."):
        document = document[name]
    return document
