"""How the program `harp` reaches a dispatcher: named contexts of its configuration file, and files with tokens.

    default = "prod"

    [contexts.prod]
    dispatcher = "dispatcher.example.net:3503"
    ca_file = "ca.pem"
    token_file = "prod.token"

Spec: docs/client-api.md, Contexts.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harp._core.values import check_token
from harp.errors import HarpException

#: Bytes; more than the longest token with white space around it.
_MAX_TOKEN_FILE = 4096


@dataclass(frozen=True, slots=True)
class Context:
    """A dispatcher, and how to reach it. Files have absolute paths."""

    dispatcher: str
    tls: bool | None = None
    ca_file: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    token_file: str | None = None


_FILES = ("ca_file", "certfile", "keyfile", "token_file")
_TYPES: Mapping[str, tuple[type, str]] = {
    "dispatcher": (str, "HOST[:PORT] or unix:/PATH"),
    "tls": (bool, "true or false"),
    **dict.fromkeys(_FILES, (str, "the path of a file")),
}


def config_file(environment: Mapping[str, str]) -> str:
    """Return the path of the configuration file."""
    base = environment.get("XDG_CONFIG_HOME", "")
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.config"), "harp", "config.toml")


def read_context(file: str, name: str | None, check_address: Callable[[str], object]) -> Context | None:
    """Return a context of a file; without `name` its default one, None if there is no file or no default.

    `check_address` raises `HarpException` for text that is not the address of a dispatcher. Raises `HarpException`, as
    ``FILE: KEY: expected X, got Y``.
    """
    import tomllib  # most commands do not need it

    try:
        with open(file, "rb") as opened:
            content = tomllib.loads(opened.read().decode("utf-8-sig"))
    except FileNotFoundError as error:
        if name is None:
            return None
        raise HarpException(f"{file}: {error.strerror}; --context {name} must be in this file") from error
    except OSError as error:
        raise HarpException(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also TOMLDecodeError and UnicodeDecodeError
        raise HarpException(f"{file}: not TOML: {error}") from error
    reject_unknown(file, "", content, ("default", "contexts"))
    found = content.get("contexts", {})
    if not isinstance(found, dict):
        raise HarpException(f"{file}: contexts: expected tables [contexts.NAME], got {found!r}")
    contexts = {each: _parse_context(file, each, table, check_address) for each, table in found.items()}
    default = content.get("default")
    known = ", ".join(contexts) or "the file has none"
    if default is not None and (not isinstance(default, str) or default not in contexts):
        raise HarpException(f"{file}: default: expected the name of a context ({known}), got {default!r}")
    if name is not None and name not in contexts:
        raise HarpException(f"{file}: contexts: expected one of {known}, got --context {name!r}")
    return contexts.get(name or default or "")


def context_names(file: str) -> list[str]:
    """Return the names of the contexts of a file; none if it cannot be read."""
    import tomllib

    try:
        with open(file, "rb") as opened:
            found = tomllib.load(opened).get("contexts")
    except (OSError, ValueError, RecursionError):
        return []
    return list(found) if isinstance(found, dict) else []


def reject_unknown(file: str, where: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise `HarpException` if a table has another key than the known ones."""
    for key in table:
        if key not in known:
            raise HarpException(f"{file}: {where}{key}: expected one of {', '.join(known)}, got an unknown key")


def _parse_context(file: str, name: str, table: Any, check_address: Callable[[str], object]) -> Context:
    where = f"contexts.{name}"
    if not isinstance(table, dict):
        raise HarpException(f"{file}: {where}: expected a table, got {table!r}")
    reject_unknown(file, f"{where}.", table, tuple(_TYPES))
    for key, value in table.items():
        kind, expected = _TYPES[key]
        if not isinstance(value, kind) or value == "":
            # A token in the place of its file must not be printed.
            got = f"a {type(value).__name__}" if key == "token_file" else repr(value)
            raise HarpException(f"{file}: {where}.{key}: expected {expected}, got {got}")
    if "dispatcher" not in table:
        raise HarpException(f"{file}: {where}.dispatcher: expected HOST[:PORT] or unix:/PATH, got nothing")
    try:
        check_address(table["dispatcher"])
    except HarpException as error:
        raise HarpException(f"{file}: {where}.dispatcher: {error}") from error
    directory = os.path.dirname(file)
    paths = {key: os.path.join(directory, os.path.expanduser(table[key])) for key in _FILES if key in table}
    return Context(**{**table, **paths})


def read_token(path: str) -> str:
    """Return the token in a file that nobody else can read. Raises `HarpException`, which does not quote it."""
    try:
        with open(path, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
                raise HarpException(f"token file {path}: others may read it; run: chmod 600 {path}")
            content = file.read(_MAX_TOKEN_FILE)
    except OSError as error:
        raise HarpException(f"token file {path}: {error.strerror}") from error
    try:
        return check_token(content.decode("utf-8", "replace").strip())
    except HarpException as error:
        raise HarpException(f"token file {path}: {error}") from None
