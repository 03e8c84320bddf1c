"""Typed settings: a decoded file becomes one frozen `msgspec.Struct`; its fields have types, bounds and defaults.

Errors read ``FILE: KEY: expected X, got Y``.
"""

from __future__ import annotations

import logging
import re
import ssl
import warnings
from collections.abc import Callable, Iterable
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

T = TypeVar("T")
Bytes: TypeAlias = Annotated[int, Meta(ge=1024, extra={"unit": "bytes"})]
Count: TypeAlias = Annotated[int, Meta(ge=1, extra={"unit": "count"})]

log = logging.getLogger(__name__)

#: The minimum version of TLS, by its name.
TLS_VERSIONS = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}
DEFAULT_TLS_MINIMUM = "1.2"
#: OpenSSL's reasons for a failed handshake if the peer has no version of at least the minimum.
OLD_TLS_REASONS = frozenset(
    {
        *("UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "WRONG_SSL_VERSION", "VERSION_TOO_LOW"),
        "NO_PROTOCOLS_AVAILABLE",
    }
)

#: A message of `msgspec`: the reason, and the key. If a `__post_init__` raised the error, the reason begins with the
#: rest of the key.
_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<key>.*)`)?", re.DOTALL)
_TYPE_NAMES = {
    "object": "a mapping",
    "array": "a list",
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "null": "nothing",
}
#: The names that `msgspec` has for the types of a decoded file.
_MSGSPEC_NAMES: dict[type, str] = {
    str: "str",
    int: "int",
    float: "float",
    bool: "bool",
    dict: "object",
    list: "array",
    type(None): "null",
}
_BOUNDS = {">": "more than", ">=": "at least", "<": "less than", "<=": "at most"}


class ConfigError(Exception):
    """A configuration that cannot be used. The message is one line with file, key and reason."""


def convert(file: Path, document: Any, settings: type[T], convert_value: Callable[[type, Any], Any] | None = None) -> T:
    """Return a decoded file as a value of a class of settings. Raises `ConfigError`.

    The `__post_init__` of the class raises ValueError with ``KEY: expected X, got Y``. `convert_value` returns a value
    as another type, for types that `msgspec` does not convert, or raises ValueError.
    """
    try:
        return msgspec.convert(document, settings, dec_hook=convert_value)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {_describe_error(error, document)}") from error


def convert_entry(key: str, value: Any, settings: type[T]) -> T:
    """Return the value of an entry of a mapping as a value of a class of settings.

    Raises ValueError: it is invalid; the message begins with `key`.
    """
    try:
        return msgspec.convert(value, settings)
    except msgspec.ValidationError as error:
        raise ValueError(f"{key}.{_describe_error(error, value)}".replace(".the file:", ":")) from error


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless the value of a key, as text, is one of the choices."""
    if str(value) not in choices:
        raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {value!r}")


def report_restart_needed(old: object, new: object, keys: Iterable[str]) -> list[str]:
    """Log a warning for each of these keys (``SECTION.KEY``) whose value has changed; return those keys."""
    changed = [key for key in keys if attrgetter(key)(old) != attrgetter(key)(new)]
    for key in changed:
        log.warning("a changed setting needs a restart", extra={"key": key})
    return changed


def set_minimum_version(context: ssl.SSLContext, minimum: str) -> bool:
    """Set the minimum version of TLS; return whether it is below 1.2, which the daemon logs as a warning.

    OpenSSL 3 rejects the signatures of TLS 1.0 and 1.1 at its default security level, which is lowered then.
    """
    low = minimum in ("1.0", "1.1")
    if low:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        # Python warns of old versions; the administrator configured one and is warned by the daemon's log.
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = TLS_VERSIONS[minimum]
    return low


def _describe_error(error: msgspec.ValidationError, document: Any) -> str:
    what, key = _MESSAGE.fullmatch(str(error)).groups("")  # type: ignore[union-attr]  # it matches any text
    section = f"{key}." if key else ""
    if found := re.fullmatch(r"Object missing required field `(.*)`", what):
        return f"{section}{found[1]}: missing"
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", what):
        return f"{section}{found[1]}: unknown key"
    if found := re.fullmatch(r"Expected `(.*)`, got `(.*)`", what):
        if key.endswith("[...]"):  # a member of a mapping with any keys
            members = reduce(getitem, key[:-5].split("."), document)
            names = [name for name, value in members.items() if _MSGSPEC_NAMES.get(type(value)) == found[2]]
            key = f"{key[:-5]}.{names[0]}" if names else key
        return f"{key or 'the file'}: expected {_name_types(found[1])}, got {_name_types(found[2])}"
    if found := re.fullmatch(r"Expected `(.*)` ([<>]=?) (\S+)", what):
        value = describe_value(reduce(getitem, key.split("."), document))
        return f"{key}: expected {_name_types(found[1])}, {_BOUNDS[found[2]]} {found[3]}, got {value}"
    return f"{key}: {what}" if what.startswith("expected ") else f"{section}{what}"


def describe_value(value: object) -> str:
    """Return a value of a configuration for a message."""
    return "nothing" if value is None else repr(value)


def _name_types(names: str) -> str:
    return " or ".join(_TYPE_NAMES.get(name, name) for name in names.split(" | "))
