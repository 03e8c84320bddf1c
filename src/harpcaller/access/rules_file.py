"""The access file: TOML text becomes rules and roles, or one `ConfigError`.

An error reads ``FILE: rule 3 (line 12): KEY: expected X, got Y``. A file with an error is refused as a whole, because a
rule that is left out may be the one that denies. Spec: docs/access.md, The access file.
"""

from __future__ import annotations

import math
import re
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from harp_daemon.settings import ConfigError
from harpcaller.access.pattern_cost import MAX_WAYS, count_ways
from harpcaller.access.rules import (
    ANY_OTHER,
    CERT,
    NO_QUEUE,
    RATE_NAMES,
    ROLE,
    TOKEN,
    Action,
    Arguments,
    Check,
    Globs,
    Limits,
    Principals,
    QueuePattern,
    Rate,
    Rule,
    Scalar,
    is_uri,
)
from harpcaller.config import MAX_SECONDS

T = TypeVar("T")

_MAX_FILE = 1024 * 1024  #: Bytes: the event loop reads a changed file, and they take up to half a second.
_HEADER = re.compile(rb"[ \t]*\[\[[ \t]*rule[ \t]*\]\][ \t]*(?:#.*)?")
_PRINCIPAL = re.compile(r"\*|(?:(?:token|cert|user|uid|gid):|anonymous@).+", re.DOTALL)
_PREFIXES = ("token:", "cert:", "user:", "uid:", "gid:", ROLE, "anonymous@")
#: The names that principals of a kind can have, with the characters of globs: another name would never match.
_FORMS = {
    TOKEN: (re.compile(r"[A-Za-z0-9*?][A-Za-z0-9._*?-]{0,63}"), "letters, digits, dots, hyphens and underscores"),
    CERT: (re.compile(r"[!-~]{1,255}"), "printable ASCII characters without spaces"),
}
_RATE = re.compile(r"([1-9]\d{0,8})/(s|min|h)", re.ASCII)
_BYTES = re.compile(r"([1-9]\d{0,17}) ?(B|KiB|MiB|GiB)", re.ASCII)
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class _Wrong(Exception):
    """A wrong value; `keys` lead to it."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(f"{'.'.join(keys).replace('.[', '[')}: {message}" if keys else message)
        self.message = message
        self.keys = keys


@contextmanager
def _key(key: str) -> Iterator[None]:
    """Add a key to a wrong value that is found inside."""
    try:
        yield
    except _Wrong as error:
        raise _Wrong(error.message, key, *error.keys) from None


def read_rules(path: Path, text: bytes) -> tuple[list[Rule], dict[str, tuple[str, ...]]]:
    """Return the rules of a text, and the principals of each role. Raises `ConfigError`; `path` is for the message."""
    if len(text) > _MAX_FILE:
        raise ConfigError(f"{path}: expected at most {_MAX_FILE} bytes, got {len(text)}")
    try:
        document = tomllib.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also for numbers of too many digits
        raise ConfigError(f"{path}: expected TOML: {error}") from error
    where = str(path)
    if text and not text.endswith(b"\n"):  # a rule without its last conditions would allow more
        raise ConfigError(f"{path}: expected a line feed at the end, got none; the file may be incomplete")
    try:
        _check_keys(document, ("roles", "rule"))
        with _key("roles"):
            roles = _read_roles(document.get("roles", {}))
        rules = []
        tables = document.get("rule", [])
        for number, (line, table) in enumerate(zip(_find_lines(text, tables), tables, strict=True), 1):
            where = f"{path}: rule {number} (line {line})"
            rules.append(_read_rule(number, line, table, roles))
    except _Wrong as error:
        raise ConfigError(f"{where}: {error}") from error
    return rules, roles


def _find_lines(text: bytes, tables: Any) -> list[int]:
    """Return the line of the header of each rule."""
    with _key("rule"):
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise _Wrong(f"expected tables with the header [[rule]], got {_show(tables)}")
        lines = text.split(b"\n")
        found = [number for number, line in enumerate(lines, 1) if _HEADER.fullmatch(line.rstrip(b"\r"))]
        if len(found) != len(tables):
            raise _Wrong("expected each rule below a line [[rule]], and this text nowhere else, got another form")
        return found


# Roles.


def _read_roles(value: Any) -> dict[str, tuple[str, ...]]:
    """Return the principals of each role, with nested roles expanded."""
    written: dict[str, tuple[str, ...]] = {}
    for name, texts in _table(value).items():
        with _key(name):
            written[name] = _read_texts(texts)
    expanded: dict[str, tuple[str, ...]] = {}
    for name in written:
        with _key(name):
            expanded[name] = tuple(_expand(written[name], written, (name,)))
    return expanded


def _expand(
    texts: Iterable[str], roles: Mapping[str, tuple[str, ...]], inside: tuple[str, ...] = ()
) -> dict[str, None]:
    """Return the principals that texts name, in their order; a role is expanded. `inside`: the roles around it."""
    found: dict[str, None] = {}
    for text in texts:
        if not text.startswith(ROLE):
            if not is_principal(text):
                raise _Wrong(f'expected a principal such as "token:shop" or "role:web", got {text!r}{_near(text)}')
            for kind, (form, names) in _FORMS.items():
                if text.startswith(kind) and not form.fullmatch(text.removeprefix(kind)):
                    raise _Wrong(f"expected {names}, got {text!r}, which no client has")
            name = text.removeprefix(CERT)
            if name != text and "@" not in name and not is_uri(name) and name != name.lower():
                raise _Wrong(f"expected a DNS name in lower case, got {text!r}")
            found[text] = None
            continue
        name = text.removeprefix(ROLE)
        if name not in roles:
            near = "".join(f"; did you mean {ROLE}{close}?" for close in get_close_matches(name, roles, 1))
            raise _Wrong(f"expected a role of [roles], got {text!r}{near}")
        if name in inside:
            raise _Wrong(f"expected roles that do not contain themselves, got {' -> '.join([*inside, name])}")
        found |= {text: None} | _expand(roles[name], roles, (*inside, name))
    return found


def _near(text: str) -> str:
    kind, _, rest = text.partition(":")
    close = get_close_matches(f"{kind}:", _PREFIXES, 1)
    return f"; did you mean {close[0]}{rest}?" if close and rest else ""


def is_principal(text: str) -> bool:
    """Return whether a text has the form of a principal, or of a glob of principals."""
    return _PRINCIPAL.fullmatch(text) is not None


# Rules.


def _read_rule(number: int, line: int, table: dict[str, Any], roles: Mapping[str, tuple[str, ...]]) -> Rule:
    _check_keys(table, KEYS)
    values: dict[str, Any] = {}
    for key, value in table.items():
        with _key(key):
            values[key] = KEYS[key](value)
    with _key("who"):
        if "who" not in values:
            raise _Wrong("expected a list of principals, got none")
        who = Principals(_expand(values["who"], roles))
    if ("allow" in values) == ("deny" in values):
        raise _Wrong(f"expected one of the two, got {'both' if 'allow' in values else 'none'}", "allow, deny")
    limits = {key: value for key, value in values.items() if key in Limits.__struct_fields__}
    is_denial = "deny" in values
    for key in ("arguments", "jobs", *limits):
        if is_denial and key in values:
            raise _Wrong("expected only in a rule with allow, got a rule with deny", key)
        if key in limits and Action.CALL not in values["allow"]:
            raise _Wrong('expected only in a rule that allows "call", got a rule that does not', key)
    return Rule(
        number=number,
        line=line,
        allows=not is_denial,
        actions=values["deny" if is_denial else "allow"],
        who=who,
        written_who=values["who"],
        hosts=values.get("hosts"),
        tags=values.get("tags"),
        procedures=values.get("procedures"),
        queues=values.get("queues"),
        arguments=values.get("arguments"),
        any_job=is_denial or values.get("jobs") == "any",
        limits=Limits(**limits),
    )


def _read_texts(value: Any) -> tuple[str, ...]:
    return tuple(_each(value, _read_text, "a list of texts"))


def _read_names(value: Any) -> tuple[str, ...]:
    """Return a list of texts with at least one element."""
    texts = _read_texts(value)
    if not texts:
        raise _Wrong("expected at least one text, got an empty list")
    return texts


def _read_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _Wrong(f"expected a text, got {_show(value)}")
    return value


def _read_globs(value: Any) -> Globs:
    return Globs(_read_names(value))


def _read_actions(value: Any) -> frozenset[Action]:
    return frozenset(Action(_read_choice(name, tuple(Action))) for name in _read_names(value))


def _read_choice(value: Any, choices: Iterable[str]) -> str:
    if value not in choices:
        near = "".join(f"; did you mean {close}?" for close in get_close_matches(str(value), choices, 1))
        raise _Wrong(f"expected one of {', '.join(choices)}, got {_show(value)}{near}")
    return str(value)


def _read_queues(value: Any) -> tuple[QueuePattern | str, ...]:
    def read(pattern: Any) -> QueuePattern | str:
        if pattern == NO_QUEUE:
            return NO_QUEUE
        members: dict[str, str | int] = {}
        for key, member in _table(pattern, f'a table such as {{site = "*"}}, or "{NO_QUEUE}"').items():
            if not isinstance(member, (str, int)):  # a bool is an int
                raise _Wrong(f"expected a text, an integer, true or false, got {_show(member)}", key)
            members[key] = member
        return QueuePattern.of(members)

    patterns = tuple(_each(value, read, "a list of tables"))
    if not patterns:
        raise _Wrong("expected at least one table, got an empty list")
    return patterns


def _read_arguments(value: Any) -> Arguments:
    checks: dict[str, Check] = {}
    for name, table in _table(value).items():
        with _key(name):
            checks[name] = _read_check(table)
            if name == ANY_OTHER and (checks[name].position is not None or checks[name].optional):
                raise _Wrong("expected no position and no optional, because it stands for several arguments, got one")
    positions = [check.position for check in checks.values() if check.position is not None]
    if len(set(positions)) != len(positions):
        raise _Wrong(f"expected different positions, got {sorted(positions)}")
    return Arguments(checks)


def _read_check(value: Any) -> Check:
    table = _table(value)
    _check_keys(table, CHECK_KEYS)
    values = {}
    for key, member in table.items():
        with _key(key):
            values[key] = CHECK_KEYS[key](member)
    return Check(**values)


def _read_enum(value: Any) -> tuple[Scalar, ...]:
    values = tuple(_each(value, _read_scalar, "a list of values"))
    if not values:
        raise _Wrong("expected at least one value, got an empty list")
    return values


def _read_scalar(value: Any) -> Scalar:
    if isinstance(value, (str, bool)):
        return value
    return _read_number(value, "a text, a number, true or false")


def _read_number(value: Any, expected: str = "a number") -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _Wrong(f"expected {expected}, got {_show(value)}")
    return value


def _read_pattern(value: Any) -> re.Pattern[str]:
    text = _read_text(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Python warns of patterns that may be a mistake
            compiled = re.compile(text, re.ASCII)  # \d and \w mean ASCII characters
    except (re.error, ValueError, Warning, OverflowError, RecursionError) as error:
        raise _Wrong(f"expected a regular expression, got {value!r}: {error}") from error
    if count_ways(text) > MAX_WAYS:
        reason = "its search could take very long; use at most two of * and +, and none inside a repeated group"
        raise _Wrong(f"expected a pattern with a quick search, got {value!r}: {reason}")
    return compiled


def _read_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong(f"expected true or false, got {_show(value)}")
    return value


def _read_count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _Wrong(f"expected an integer of at least 1, got {_show(value)}")
    return value


def _read_seconds(value: Any) -> float:
    seconds = float(_read_number(value, "a number of seconds"))
    if not 0 < seconds <= MAX_SECONDS:
        raise _Wrong(f"expected a number of seconds above 0 and at most {MAX_SECONDS}, got {_show(value)}")
    return seconds


def _read_rate(value: Any) -> Rate:
    found = _RATE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise _Wrong(f'expected a rate such as "50/s", "10/min" or "100/h", got {_show(value)}')
    seconds = {name: seconds for seconds, name in RATE_NAMES.items()}
    return Rate(int(found[1]), seconds[found[2]])


def _read_bytes(value: Any) -> int:
    if type(value) is int and value > 0:
        return value
    found = _BYTES.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise _Wrong(f'expected a size such as "64 KiB", "1 MiB" or a number of bytes, got {_show(value)}')
    return int(found[1]) * _UNITS[found[2]]


#: The keys of a rule, each with a function that returns its checked value.
KEYS: Mapping[str, Callable[[Any], Any]] = {
    "who": _read_names,
    "allow": _read_actions,
    "deny": _read_actions,
    "hosts": _read_globs,
    "tags": _read_globs,
    "procedures": _read_globs,
    "queues": _read_queues,
    "arguments": _read_arguments,
    "jobs": lambda value: _read_choice(value, ("own", "any")),
    "max_exec_time": _read_seconds,
    "running": _read_count,
    "queued": _read_count,
    "rate": _read_rate,
    "bytes": _read_bytes,
    "max_record_bytes": _read_bytes,
}

#: The keys of the conditions on an argument.
CHECK_KEYS: Mapping[str, Callable[[Any], Any]] = {
    "enum": _read_enum,
    "pattern": _read_pattern,
    "minimum": _read_number,
    "maximum": _read_number,
    "optional": _read_flag,
    "position": _read_count,
}


def _table(value: Any, expected: str = "a table") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"expected {expected}, got {_show(value)}")
    return value


def _each(value: Any, read: Callable[[Any], T], expected: str) -> Iterator[T]:
    if not isinstance(value, list):
        raise _Wrong(f"expected {expected}, got {_show(value)}")
    for index, element in enumerate(value):
        with _key(f"[{index}]"):
            yield read(element)


def _check_keys(table: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in table:
        if key not in known:
            near = "".join(f"; did you mean {close}?" for close in get_close_matches(key, known, 1))
            raise _Wrong(f"expected one of {', '.join(known)}, got an unknown key{near}", key)


def _show(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a table"
    return repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
