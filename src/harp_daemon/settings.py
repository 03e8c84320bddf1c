"""Typed settings: a decoded file becomes one frozen `msgspec.Struct`; its fields have types, bounds and defaults.

Errors read ``FILE: KEY: expected X, got Y``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

log = logging.getLogger(__name__)

T = TypeVar("T")

Bytes: TypeAlias = Annotated[int, Meta(ge=1024, extra={"unit": "bytes"})]
Count: TypeAlias = Annotated[int, Meta(ge=1, extra={"unit": "count"})]

#: A message of `msgspec`: the reason, and the key. If a `__post_init__` raised the error, the reason begins with the
#: rest of the key.
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


class ConfigError(Exception):
    """A configuration that cannot be used. The message is one line with file, key and reason."""


def convert(file: Path, document: Any, settings: type[T], convert_value: Callable[[type, Any], Any] | None = None) -> T:
    """Return a decoded file as a value of a class of settings.

    The `__post_init__` of the class raises ValueError with ``KEY: expected X, got Y``. `convert_value` returns a value
    as another type, for types that `msgspec` does not convert, or raises ValueError.

    Raises:
        ConfigError: a key is missing, unknown or has an invalid value.
    """
    try:
        return msgspec.convert(document, settings, dec_hook=convert_value)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {_describe_error(error, document)}") from error


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless the value of a key, as text, is one of the choices."""
    if str(value) not in choices:
        raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {value!r}")


def report_restart_needed(old: object, new: object, keys: Iterable[str]) -> list[str]:
    """Log a warning for each of these keys (``SECTION.KEY``) whose value has changed; return the changed ones."""
    changed = [key for key in keys if attrgetter(key)(old) != attrgetter(key)(new)]
    for key in changed:
        log.warning("a changed setting needs a restart", extra={"key": key})
    return changed


def _describe_error(error: msgspec.ValidationError, document: Any) -> str:
    match = _MESSAGE.fullmatch(str(error))
    assert match is not None
    what, key = match["what"], match["key"] or ""
    section = f"{key}." if key else ""
    if found := _MISSING.fullmatch(what):
        return f"{section}{found[1]}: missing"
    if found := _UNKNOWN.fullmatch(what):
        return f"{section}{found[1]}: unknown key"
    if found := _TYPE.fullmatch(what):
        return f"{key or 'the file'}: expected {_name_types(found[1])}, got {_name_types(found[2])}"
    if found := _BOUND.fullmatch(what):
        value = describe_value(reduce(getitem, key.split("."), document))
        return f"{key}: expected {_name_types(found[1])}, {_BOUNDS[found[2]]} {found[3]}, got {value}"
    return f"{key}: {what}" if what.startswith("expected ") else f"{section}{what}"


def describe_value(value: object) -> str:
    """Return a value of a configuration for a message."""
    return "nothing" if value is None else repr(value)


def _name_types(names: str) -> str:
    return " or ".join(_TYPE_NAMES.get(name, name) for name in names.split(" | "))
