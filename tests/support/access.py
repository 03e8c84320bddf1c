"""Access files, clients and targets at random, and a reference that decides by the written document alone.

The reference shares no code with `harpcaller.access`: it compares texts with the document as it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any

from hypothesis import strategies as st

from harp.protocol.json_text import Raw
from harpcaller.access.client import Client
from harpcaller.access.policy import Action, Target
from support.toml import toml

LISTENER = "127.0.0.1:3502"
PRINCIPALS = (
    "token:shop",
    "token:shop2",
    "cert:a.ops.example.net",
    "cert:b.example.net",
    "cert:mallory@a.ops.example.net",
    "cert:https://x.example/a.ops.example.net",
    "uid:www-data",
    "gid:web",
    f"anonymous@{LISTENER}",
)
PATTERNS = (
    *(*PRINCIPALS, "token:*", "token:shop?", "anonymous@*", "*"),
    *("cert:*.ops.example.net", "cert:*@*.ops.example.net", "cert:https://*", "cert:*"),
)
ROLES = ("web", "ops", "all")
HOSTS = ("web01", "web02", "db01", "[web]*")
HOST_GLOBS = ("web*", "web0?", "db01", "*", "[web]*", "web01")
#: The tags of known hosts.
TAGS = {"web01": ("prod", "eu-west"), "web02": (), "db01": ("prod", "[db]")}
TAG_GLOBS = ("prod", "eu-*", "test", "*", "[db]")
PROCEDURES = ("clear_cache", "clear_all", "reboot")
PROCEDURE_GLOBS = ("clear_*", "clear_cache", "reboot", "?eboot")
ARGUMENTS = (
    *('{"site":"blog"}', '{"site":"BLOG"}', '{"site":"blog","force":true}', '{"site":"a","site":"blog"}', "{}", "[]"),
    *('["blog"]', '["blog",2]', '[1,"blog"]', '{"s\\u0069te":"blog"}', '{"site":1}', '{"depth":1.0}', '{"depth":5}'),
    *(
        '{"site":"***"}',
        '["***"]',
        '{"site":null}',
        '{"depth":true}',
        '{"site":["blog"]}',
        '{"*":1}',
        '{"site":"blog","depth":-1e400}',
    ),
    *('{"site":"%s"}' % ("a" * 2000), '{"site":"%s"}' % ("a" * 70_000), '{"site":"blog","other":{"a":1,"a":2}}'),
)
QUEUES = (
    *('{"site":"blog"}', '{"site":1}', '{"site":1.0}', '{"site":1.0000000000000000001}', '{"site":true}', "{}"),
    *('{"site":"blog","n":1}', '{"n":2}', '{"site":"a","site":"blog"}', '{"site":{"a":1}}'),
)


def glob(pattern: str, name: str | None) -> bool:
    return name is not None and fnmatchcase(name, pattern.replace("[", "[[]"))


def names_principal(pattern: str, name: str) -> bool:
    if name.startswith("cert:") and pattern.startswith("cert:") and pattern != "cert:*":
        kinds = [(":" in text[5:] or "/" in text[5:]) * 2 or text.count("@") for text in (pattern, name)]
        if kinds[0] != kinds[1] and kinds[0] != 2:
            return False
    return glob(pattern, name)


def written_principals(document: Mapping[str, Any], texts: Sequence[str]) -> set[str]:
    nested = [document["roles"][text[5:]] for text in texts if text.startswith("role:")]
    return {*texts}.union(*(written_principals(document, inner) for inner in nested))


def decoded(text: bytes) -> Any:
    """Return the value; None if it is too long or repeats a name."""
    repeats = []

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeats.extend([name for name, _ in pairs][len(dict(pairs)) :])
        return dict(pairs)

    value = json.loads(text, object_pairs_hook=members)
    return None if repeats or len(text) > 65536 else value


def same(written: Any, value: Any) -> bool:
    return isinstance(written, bool) == isinstance(value, bool) and bool(written == value)


def queue_fits(pattern: Any, text: bytes) -> bool:
    name = json.loads(text, parse_float=Decimal)
    if pattern == "none" or name.keys() != pattern.keys():
        return False
    return all(
        pattern[key] == "*"
        or same(pattern[key], value)
        or (isinstance(pattern[key], str) and isinstance(value, str) and glob(pattern[key], value))
        for key, value in name.items()
    )


def value_fits(check: Mapping[str, Any], value: Any) -> bool:
    is_number = type(value) in (int, float)
    return (
        ("enum" not in check or any(same(one, value) for one in check["enum"]))
        and ("minimum" not in check or (is_number and value >= check["minimum"]))
        and ("maximum" not in check or (is_number and value <= check["maximum"]))
        and (
            "pattern" not in check
            or (isinstance(value, str) and len(value) <= 1024 and bool(re.fullmatch(check["pattern"], value)))
        )
    )


def arguments_fit(checks: Mapping[str, Any], arguments: Any, is_own_job: bool) -> bool:
    if isinstance(arguments, list):
        names = {check.get("position"): name for name, check in checks.items()}
        named = [(names.get(position, "*"), value) for position, value in enumerate(arguments, 1)]
    else:
        named = [*arguments.items()]
    found = [name for name, _ in named]
    required = [name for name, check in checks.items() if name != "*" and not check.get("optional")]
    known = [(name if name in checks else "*", value) for name, value in named]
    return {*required} <= {*found} and all(
        key in checks and (value_fits(checks[key], value) or (is_own_job and value == "***")) for key, value in known
    )


def tags_fit(rule: Mapping[str, Any], tags: Sequence[str] | None) -> bool:
    return "deny" in rule if tags is None else any(glob(text, tag) for text in rule["tags"] for tag in tags)


def reference(
    document: Mapping[str, Any],
    client: Client,
    action: str,
    target: Target,
    tags: Mapping[str, Sequence[str]] | None = None,
) -> tuple[bool, int | None]:
    """Return whether the action is allowed, and the number of the rule that decides; `tags` are those of the hosts."""
    names = [*client.principals, *(f"role:{role}" for role in client.roles)]
    for number, rule in enumerate(document["rule"], 1):
        is_own = target.owner in client.principals or (target.owner is None and action not in ("read", "cancel"))
        if not (
            any(names_principal(text, name) for text in written_principals(document, rule["who"]) for name in names)
            and action in rule.get("allow", rule.get("deny"))
            and ("hosts" not in rule or any(glob(text, target.host) for text in rule["hosts"]))
            and ("tags" not in rule or (target.host is not None and tags_fit(rule, (tags or {}).get(target.host))))
            and ("procedures" not in rule or any(glob(text, target.procedure) for text in rule["procedures"]))
            and (is_own or "deny" in rule or rule.get("jobs") == "any")
        ):
            continue
        if "queues" in rule and target.queue is None and "none" not in rule["queues"]:
            continue
        if "queues" in rule and target.queue is not None:
            if decoded(target.queue) is None:
                return False, number
            if not any(queue_fits(pattern, target.queue) for pattern in rule["queues"]):
                continue
        if "arguments" in rule:
            if target.arguments is None:
                continue
            if decoded(target.arguments) is None:
                return False, number
            is_own_job = action != "call" and target.owner in client.principals
            if not arguments_fit(rule["arguments"], decoded(target.arguments), is_own_job):
                continue
        return "allow" in rule, number
    return False, None


# Random documents, clients and targets.


def some(values: Sequence[Any], at_most: int = 3) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=at_most, unique_by=json.dumps)


def checks() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "enum": some(["blog", "a", 1, 1.0, True, 5]),
            "pattern": st.sampled_from(["[a-z]+", "blog", "a*", "b|blog"]),
            "minimum": st.sampled_from([0, 1.5, -3]),
            "maximum": st.sampled_from([1, 4.5]),
            "optional": st.booleans(),
        },
    )


@st.composite
def argument_checks(draw: st.DrawFn) -> dict[str, Any]:
    found = draw(st.dictionaries(st.sampled_from(["site", "force", "depth"]), checks(), max_size=3))
    positions = draw(st.permutations([1, 2, None]))
    for check, position in zip(found.values(), positions, strict=False):
        if position is not None:
            check["position"] = position
    if draw(st.booleans()):
        found["*"] = {key: value for key, value in draw(checks()).items() if key != "optional"}
    return found


@st.composite
def rules(draw: st.DrawFn, patterns: Sequence[str], roles: Sequence[str]) -> dict[str, Any]:
    rule: dict[str, Any] = {"who": draw(some([*patterns, *(f"role:{role}" for role in roles)]))}
    is_denial = draw(st.integers(0, 4)) == 0
    rule["deny" if is_denial else "allow"] = draw(some([*Action], 4))
    if draw(st.booleans()):
        rule["hosts"] = draw(some(HOST_GLOBS))
    if draw(st.integers(0, 2)) == 0:
        rule["tags"] = draw(some(TAG_GLOBS))
    if draw(st.booleans()):
        rule["procedures"] = draw(some(PROCEDURE_GLOBS))
    if draw(st.integers(0, 2)) == 0:
        rule["queues"] = draw(
            some(["none", {"site": "*"}, {"site": "b*"}, {"site": 1}, {"site": True}, {"n": 1, "site": "blog"}, {}])
        )
    if not is_denial and draw(st.integers(0, 2)) == 0:
        rule["arguments"] = draw(argument_checks())
    if not is_denial and draw(st.booleans()):
        rule["jobs"] = draw(st.sampled_from(["own", "any"]))
    return rule


@st.composite
def documents(draw: st.DrawFn, patterns: Sequence[str] = PATTERNS) -> dict[str, Any]:
    """Return the document of an access file; `patterns` are those of its principals."""
    roles: dict[str, Any] = {}
    for name in ROLES[: draw(st.integers(0, 3))]:  # each may contain those before it
        roles[name] = draw(st.lists(st.sampled_from([*patterns, *(f"role:{role}" for role in roles)]), max_size=3))
    return {"roles": roles, "rule": draw(st.lists(rules(patterns, [*roles]), max_size=6))}


def to_toml(document: Mapping[str, Any]) -> str:
    """Return the text of an access file."""
    lines = ["[roles]", *(f"{json.dumps(name)} = {toml(texts)}" for name, texts in document["roles"].items())]
    for rule in document["rule"]:
        lines += ["", "[[rule]]", *(f"{key} = {toml(value)}" for key, value in rule.items())]
    return "\n".join(lines) + "\n"


@st.composite
def clients(draw: st.DrawFn, principals: Sequence[str] = PRINCIPALS[:-1]) -> Client:
    own = draw(st.lists(st.sampled_from(principals), max_size=2, unique=True))
    roles = draw(st.lists(st.sampled_from(ROLES), max_size=1))
    return Client((*own, f"anonymous@{LISTENER}"), LISTENER, "127.0.0.1:40000", bool(own), tuple(roles))


def _raw(texts: Sequence[str]) -> st.SearchStrategy[Raw]:
    return st.sampled_from([Raw(text.encode()) for text in texts])


def random_arguments() -> st.SearchStrategy[Raw]:
    """Return arrays and objects of any values, written in one of several ways."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
    names = st.sampled_from(["site", "force", "depth", "*", "1"]) | st.text()
    arguments = st.lists(values, max_size=3) | st.dictionaries(names, values, max_size=3)

    def write(value: Any, ascii: bool, space: str) -> Raw:
        return Raw(json.dumps(value, ensure_ascii=ascii, separators=(f",{space}", f":{space}")).encode())

    return st.builds(write, arguments, st.booleans(), st.sampled_from(["", " ", "\t"]))


def targets() -> st.SearchStrategy[Target]:
    """Return targets of any kind."""
    return st.builds(
        Target,
        st.none() | st.sampled_from(HOSTS),
        st.none() | st.sampled_from(PROCEDURES),
        st.none() | _raw(ARGUMENTS) | random_arguments(),
        st.none() | _raw(QUEUES),
        st.none() | st.just("") | st.sampled_from(PRINCIPALS),
    )


def calls() -> st.SearchStrategy[Target]:
    """Return the targets of calls."""
    queues = st.none() | _raw(QUEUES)
    return st.builds(Target, st.sampled_from(HOSTS), st.sampled_from(PROCEDURES), _raw(ARGUMENTS), queues)
