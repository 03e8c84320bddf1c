"""The rules of access: who may do what. Pure: no clock, no input or output.

A `Rule` consists of conditions on the client and on the target. It matches if all of its conditions are met. A
condition that is not written is met. One on a fact that the target does not have (a host, an argument) is not met: a
rule never covers more than it states.

Arguments are decoded as the host decodes them. The host uses the last one of repeated names, other decoders the first
one; arguments that repeat a name are therefore refused by a rule that looks at arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import StrEnum
from fnmatch import translate
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from msgspec import Struct

from harp.protocol.json_text import MAX_DEPTH, InvalidJSON, Raw, decode_checked, decode_text, reject_constant

#: Maximum length in bytes of arguments and of queue names that rules look at. Decoding them takes at most 5 ms.
MAX_EXAMINED = 64 * 1024
MAX_PATTERN_TEXT = 1024  #: A longer text matches no pattern: the time of some patterns grows faster than their text.

ROLE = "role:"  #: The beginning of a role in `who`.
TOKEN = "token:"  #: The beginning of the principal of a token.  # noqa: S105

ANONYMOUS = "anonymous@"  #: The beginning of the principal of every client of a listener.

Scalar: TypeAlias = str | int | float | bool


class Action(StrEnum):
    """What a client does."""

    CALL = "call"
    READ = "read"  # status, result, stream and details of a job
    CANCEL = "cancel"
    LIST = "list"  # jobs, queues, hosts
    MANAGE = "manage"  # release a slot, prune, refresh the hosts
    ADMIN = "admin"  # tokens, logins, reload, audit
    METRICS = "metrics"  # numbers about all jobs and hosts


#: Actions whose target is a job that exists.
ON_JOBS = frozenset({Action.READ, Action.CANCEL})


class Target(Struct, frozen=True):
    """What an action is applied to. None: the target has no such fact.

    `owner` is the principal that submitted the job, and "" if it is unknown: then no client owns the job. None means
    that the target is not a job.
    """

    host: str | None = None
    procedure: str | None = None
    arguments: Raw | None = None
    queue: Raw | None = None  # name of the queue
    owner: str | None = None


class Rate(NamedTuple):
    """A number of calls in a time."""

    calls: int
    seconds: int

    def __str__(self) -> str:
        return f"{self.calls}/{RATE_NAMES[self.seconds]}"


RATE_NAMES = {1: "s", 60: "min", 3600: "h"}  #: The units of rates by their seconds.


class Limits(Struct, frozen=True):
    """The limits of a rule that allows calls; each applies to a principal. None: no limit."""

    max_exec_time: float | None = None  # seconds
    running: int | None = None  # jobs
    queued: int | None = None  # jobs
    rate: Rate | None = None  # of calls
    bytes: int | None = None  # of the arguments and the info of a call
    max_record_bytes: int | None = None  # of the records and the result of a job


NO_LIMITS = Limits()


ANY_NAME = "*"  #: The glob that matches every text.


class Globs:
    """Texts in which ``*`` stands for any characters and ``?`` for one. All other characters stand for themselves."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(texts)
        self._exact = frozenset(text for text in self.texts if not is_glob(text))
        globs = [self._translate(text) for text in self.texts if is_glob(text)]
        self._match = re.compile("|".join(globs)).match if globs else None

    def _translate(self, text: str) -> str:
        """Return the regular expression of a glob."""
        return translate(text.replace("[", "[[]"))

    def match(self, name: str | None) -> bool:
        """Return whether one of the texts matches the whole name. None matches nothing."""
        return name is not None and (name in self._exact or (self._match is not None and self._match(name) is not None))

    def match_any(self, names: Iterable[str]) -> bool:
        """Return whether one of the names matches."""
        return any(map(self.match, names))

    def __str__(self) -> str:
        return ", ".join(self.texts)


CERT = "cert:"  #: The beginning of the principals of a certificate.


class Principals(Globs):
    """Globs of principals. Those of a certificate match names of their own kind.

    The names of a certificate are DNS names, email addresses and URIs. An authority may let clients choose an address
    ``x@a.ops.example.net``, or a URI with this end, but not the DNS name that ``cert:*.ops.example.net`` means.
    """

    def _translate(self, text: str) -> str:
        name = text.removeprefix(CERT)
        if name in (text, "*") or is_uri(name):
            return super()._translate(text)
        kind = r"[^@:/]*@[^@:/]*" if "@" in name else r"[^@:/]*"
        return rf"(?={CERT}{kind}\Z)" + super()._translate(text)


def is_uri(name: str) -> bool:
    """Return whether a name of a certificate, or a glob of them, is neither a DNS name nor an email address."""
    return ":" in name or "/" in name


def is_glob(text: str) -> bool:
    """Return whether a text stands for several names."""
    return "*" in text or "?" in text


class QueuePattern(NamedTuple):
    """A pattern for names of queues: the name has these members and no others.

    The members' values are globs for strings; integers and booleans are compared. ``*`` matches every value.
    """

    members: Mapping[str, str | int]
    globs: Mapping[str, Globs]

    @classmethod
    def of(cls, members: Mapping[str, str | int]) -> QueuePattern:
        """Return the pattern of these members."""
        return cls(members, {key: Globs([value]) for key, value in members.items() if isinstance(value, str)})

    def match(self, name: Any) -> bool:
        """Return whether a decoded name matches."""
        return (
            isinstance(name, dict)
            and name.keys() == self.members.keys()
            and all(self._match_member(key, value) for key, value in name.items())
        )

    def _match_member(self, key: str, value: Any) -> bool:
        wanted = self.members[key]
        if isinstance(wanted, str):
            return wanted == "*" or (isinstance(value, str) and self.globs[key].match(value))
        return is_equal(wanted, value)

    def __str__(self) -> str:
        return json.dumps(self.members, ensure_ascii=False)


NO_QUEUE = "none"  #: In place of a pattern: calls without a queue.


@dataclass(frozen=True, slots=True)
class Check:
    """The conditions on the value of one argument; all are met. None: no such condition."""

    enum: tuple[Scalar, ...] | None = None
    pattern: re.Pattern[str] | None = None  # of the whole text
    minimum: float | None = None
    maximum: float | None = None
    optional: bool = False  # whether the argument may be missing
    position: int | None = None  # of a positional argument, from 1

    def match(self, value: Any) -> bool:
        """Return whether a decoded value meets the conditions."""
        return (
            (self.enum is None or any(is_equal(one, value) for one in self.enum))
            and (self.pattern is None or self._match_pattern(value))
            and (self.minimum is None or (_is_number(value) and value >= self.minimum))
            and (self.maximum is None or (_is_number(value) and value <= self.maximum))
        )

    def _match_pattern(self, value: Any) -> bool:
        assert self.pattern is not None
        is_text = isinstance(value, str) and len(value) <= MAX_PATTERN_TEXT
        return is_text and self.pattern.fullmatch(value) is not None

    def __str__(self) -> str:
        parts = [
            f"one of {', '.join(map(_describe, self.enum))}" if self.enum is not None else "",
            f"a text that matches {self.pattern.pattern}" if self.pattern is not None else "",
            f"at least {self.minimum}" if self.minimum is not None else "",
            f"at most {self.maximum}" if self.maximum is not None else "",
        ]
        return ", ".join(filter(None, parts)) or "any value"


class Mismatch(NamedTuple):
    """An argument that does not meet its conditions; as text, ``NAME: expected X, got Y``."""

    name: str | int  # a number is the position of an argument without a name
    check: Check | None  # None: no such argument is allowed
    got: str

    def __str__(self) -> str:
        name = f"position {self.name}" if isinstance(self.name, int) else _describe(self.name)
        return f"{name}: expected {self.check or 'no such argument'}, got {self.got}"


MASK = "***"  #: What is stored in place of a secret value.
ANY_OTHER = "*"  #: In place of the name of an argument: all those that the rule does not name.


class Arguments:
    """The conditions on the arguments of a call, by name.

    An argument without a check is not allowed, unless there is a check for `ANY_OTHER`. An argument with a check is
    required, unless the check is optional. Positional arguments are those whose checks have this position.
    """

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self.checks = checks
        self._other = checks.get(ANY_OTHER)
        self._named = {name: check for name, check in checks.items() if name != ANY_OTHER}
        self._names = {check.position: name for name, check in self._named.items() if check.position is not None}
        self._required = [name for name, check in self._named.items() if not check.optional]

    def match(self, arguments: Any, trust_masked: bool = False) -> bool:
        """Return whether decoded arguments meet the conditions; with `trust_masked`, masked values meet each one."""
        return next(self._find_mismatches(arguments, trust_masked), None) is None

    def find_mismatch(self, arguments: Any, trust_masked: bool = False) -> Mismatch | None:
        """Return the first argument of decoded ones that does not meet the conditions."""
        for name, value in self._find_mismatches(arguments, trust_masked):
            got = "none" if value is _MISSING else _describe(value)
            return Mismatch(name, self._check_of(name), got)
        return None

    def _check_of(self, name: str | int) -> Check | None:
        """Return the check of a named argument, or of a position without a name."""
        return self._other if isinstance(name, int) else self._named.get(name, self._other)

    def _find_mismatches(self, arguments: Any, trust_masked: bool) -> Iterator[tuple[str | int, Any]]:
        by_name: Mapping[str | int, Any] = arguments
        if isinstance(arguments, list):
            by_name = {self._names.get(position, position): value for position, value in enumerate(arguments, 1)}
        for name, value in by_name.items():
            check = self._check_of(name)
            if check is None or not (check.match(value) or (trust_masked and value == MASK)):
                yield name, value
        for name in self._required:
            if name not in by_name:
                yield name, _MISSING

    def __str__(self) -> str:
        optional = {True: " (optional)", False: ""}
        return "; ".join(f"{name}: {check}{optional[check.optional]}" for name, check in self.checks.items())


_MISSING = object()


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """A rule of the access file. A condition that is None is met by every target."""

    number: int  # from 1
    line: int
    allows: bool  # False: it denies
    actions: frozenset[Action]
    who: Principals  # roles are expanded
    written_who: tuple[str, ...]  # as in the file
    hosts: Globs | None = None
    procedures: Globs | None = None
    queues: tuple[QueuePattern | str, ...] | None = None  # a string is `NO_QUEUE`
    arguments: Arguments | None = None
    any_job: bool = False  # whether it covers the jobs of other owners
    tags: Globs | None = None  # of the host
    limits: Limits = field(default=NO_LIMITS)

    @property
    def place(self) -> str:
        """The rule's number and line, for messages."""
        return f"rule {self.number} (line {self.line})"

    @property
    def is_unconditional(self) -> bool:
        """Whether its conditions on host, procedure, queue and arguments are met by all jobs."""
        names = (self.hosts, self.procedures)
        is_for_all = all(globs is None or ANY_NAME in globs.texts for globs in names)
        return is_for_all and self.tags is None and self.queues is None and self.arguments is None

    def match_host(self, host: str | None, tags: Iterable[str] | None) -> bool:
        """Return whether the conditions on the host are met. `tags` are its tags; None: they are unknown.

        A rule that denies by tags matches a host of unknown tags, which may be one of those.
        """
        if self.hosts is not None and not self.hosts.match(host):
            return False
        if self.tags is None:
            return True
        return host is not None and (not self.allows if tags is None else self.tags.match_any(tags))

    def match_owner(self, principals: Iterable[str], action: Action, owner: str | None) -> bool:
        """Return whether the condition on the owner of the job is met; a target that is not a job has none."""
        if self.any_job or (owner is None and action not in ON_JOBS):
            return True
        return owner is not None and owner in principals

    def match_queue(self, examined: Examined) -> bool:
        """Return whether the condition on the queue is met. Raises `Unreadable`."""
        if self.queues is None:
            return True
        if examined.target.queue is None:
            return NO_QUEUE in self.queues
        return any(pattern.match(examined.queue) for pattern in self.queues if isinstance(pattern, QueuePattern))

    def match_arguments(self, examined: Examined) -> bool:
        """Return whether the conditions on the arguments are met. Raises `Unreadable`."""
        if self.arguments is None:
            return True
        if examined.target.arguments is None:
            return False
        return self.arguments.match(examined.arguments, examined.trust_masked)

    def find_unmet(
        self, names: Iterable[str], action: Action, examined: Examined, tags: Sequence[str] | None = None
    ) -> Iterator[tuple[str, str]]:
        """Yield key and ``expected X, got Y`` of each condition that is not met.

        `names` are those of the client, and `tags` those of the host, None if they are unknown.
        """
        target, names = examined.target, tuple(names)
        if not self.who.match_any(names):
            yield "who", f"expected {', '.join(self.written_who)}, got {', '.join(names)}"
        if action not in self.actions:
            yield "allow" if self.allows else "deny", f"expected {', '.join(sorted(self.actions))}, got {action}"
        if self.hosts is not None and not self.hosts.match(target.host):
            yield "hosts", f"expected {self.hosts}, got {target.host or 'no host'}"
        if self.tags is not None and not replace(self, hosts=None).match_host(target.host, tags):
            got = "no host" if target.host is None else "unknown ones" if tags is None else ", ".join(tags) or "none"
            yield "tags", f"expected {self.tags}, got {got}"
        if self.procedures is not None and not self.procedures.match(target.procedure):
            yield "procedures", f"expected {self.procedures}, got {target.procedure or 'no procedure'}"
        if not self.match_owner(names, action, target.owner):
            yield "jobs", f"expected own jobs, got one of {target.owner or 'an unknown owner'}"
        try:
            if not self.match_queue(examined):
                got = "no queue" if target.queue is None else target.queue.decode("utf-8", "replace")
                yield "queues", f"expected {' or '.join(map(str, self.queues or ()))}, got {got}"
        except Unreadable as error:
            yield "queues", str(error)
        try:
            if self.arguments is not None and not self.match_arguments(examined):
                is_known = target.arguments is not None
                trusted = examined.trust_masked
                mismatch = self.arguments.find_mismatch(examined.arguments, trusted) if is_known else None
                yield "arguments", str(mismatch or "expected arguments, got none")
        except Unreadable as error:
            yield "arguments", str(error)


class Unreadable(Exception):
    """Arguments or a queue's name that rules cannot judge. The message is ``expected X, got Y``."""


class Examined:
    """A target whose arguments and queue are decoded when a rule first looks at them.

    `trust_masked`: the target is a job of the client. Its masked values are then not judged again: the call was allowed
    with the values themselves.
    """

    def __init__(self, target: Target, trust_masked: bool = False) -> None:
        self.target = target
        self.trust_masked = trust_masked

    @classmethod
    def of(cls, target: Target, action: Action, principals: Iterable[str]) -> Examined:
        """Return the target of an action of the client with these principals."""
        return cls(target, action is not Action.CALL and target.owner is not None and target.owner in principals)

    @cached_property
    def arguments(self) -> Any:
        """The decoded arguments, an array or an object. Raises `Unreadable`."""
        return _decode(self.target.arguments, _scan_arguments)

    @cached_property
    def queue(self) -> Any:
        """The decoded name of the queue. Raises `Unreadable`."""
        return _decode(self.target.queue, _scan_queue)


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise InvalidJSON("a repeated name")
    return members


_Scanner: TypeAlias = Callable[[str, int], tuple[Any, int]]


def _new_scanner(parse_float: Callable[[str], Any]) -> _Scanner:
    decoder = json.JSONDecoder(
        parse_constant=reject_constant, object_pairs_hook=_unique_members, parse_float=parse_float
    )
    return decoder.scan_once  # type: ignore[attr-defined,no-any-return]


# Two names of queues that differ in the last digit of a number are two queues; a host decodes such numbers as floats.
_scan_arguments, _scan_queue = _new_scanner(float), _new_scanner(Decimal)


def _decode(text: Raw | None, scan_value: _Scanner) -> Any:
    assert text is not None
    if len(text) > MAX_EXAMINED:
        raise Unreadable(f"expected at most {MAX_EXAMINED} bytes, got {len(text)}")
    try:
        return decode_text(decode_checked(text, MAX_DEPTH), scan_value)
    except InvalidJSON as error:
        raise Unreadable(f"expected JSON without repeated names, got {error}") from error
    except ArithmeticError as error:
        raise Unreadable("expected numbers that are not too large, got another one") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)


def is_equal(one: Scalar, value: Any) -> bool:
    """Return whether two values are the same in JSON: ``1`` is ``1.0``, but not ``true``."""
    if _is_number(one):
        return _is_number(value) and bool(one == value)
    return type(one) is type(value) and bool(one == value)


_MAX_QUOTE = 100  #: Maximum number of characters of a value in a message.


def _describe(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return "an array" if isinstance(value, list) else "an object"
    text = json.dumps(value[:_MAX_QUOTE] if isinstance(value, str) else value, ensure_ascii=True)
    return text if len(text) <= _MAX_QUOTE + 2 else f"{text[:_MAX_QUOTE]}..."
