"""The policy: the decision whether a client may do something. Pure apart from `load`, which reads a file.

The first rule that matches decides; without one, the action is denied. See `harpcaller.access.rules` for when a rule
matches, and `harpcaller.access.rules_file` for the file.

Names are compared with all rules at once, and rarely: which rules match a client, an action, a host and a procedure is
a set of bits each, which is cached. Bit 0 is the first rule. Only the rules that match all four are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from msgspec import Struct

from harp_daemon.regular_files import read_regular
from harp_daemon.settings import ConfigError
from harpcaller.access.client import LOCAL_ADMINISTRATOR, Client
from harpcaller.access.rules import (
    NO_LIMITS,
    ROLE,
    Action,
    Examined,
    Limits,
    Principals,
    Rate,
    Rule,
    Target,
    Unreadable,
)
from harpcaller.access.rules_file import read_rules

__all__ = ["ALLOW_ALL", "BUILT_IN_ROLES", "Action", "Decision", "Limits", "Policy", "Rate", "Target", "load"]

_CACHED = 16_384  #: Maximum number of cached clients, of hosts and of procedures.
_MAX_CACHED_NAME = 255  #: Longer names, in characters, are not cached: they would fill the memory.


class Decision(Struct, frozen=True):
    """Whether an action is allowed, and the rule that decided; None: no rule did."""

    allowed: bool
    rule: int | None = None  # from 1
    line: int | None = None
    reason: str = ""
    limits: Limits = NO_LIMITS


class Scope(Struct, frozen=True):
    """The jobs to which a client may do something.

    `owners`: only jobs of these principals; None: jobs of all. `is_exact`: all of them; False: each is decided about.
    """

    owners: tuple[str, ...] | None
    is_exact: bool


_DENIED = Decision(False, reason="no rule allows it")
_ALLOWED_TO_ALL = Decision(True, reason="there is no access_file")
_ADMINISTRATOR = Decision(True, reason="the control socket has all rights")


class Policy:
    """The rules of a file, in their order.

    `roles` are the principals of each role, with nested roles expanded; `by_default` are the actions that are allowed
    if no rule matches. `tags` are the tags of each host, by name; those of other hosts are unknown.
    """

    def __init__(
        self,
        rules: Sequence[Rule] = (),
        roles: Mapping[str, tuple[str, ...]] | None = None,
        by_default: frozenset[Action] = frozenset(),
        tags: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.rules = tuple(rules)
        self.roles = roles or {}
        self.sha256 = ""  #: Of the file.
        self.uses_tags = any(rule.tags is not None for rule in rules)  #: Whether decisions depend on tags of hosts.
        self._by_default = by_default
        self._tags = tags or {}
        self._decisions = [_decision_of(rule) for rule in rules]
        self._of_action = {action: _bits(action in rule.actions for rule in rules) for action in Action}
        self._of_client = lru_cache(_CACHED)(self._match_client)
        self._of_host = lru_cache(_CACHED)(self._match_host)
        self._of_procedure = lru_cache(_CACHED)(self._match_procedure)
        self._scope_of = lru_cache(_CACHED)(self._find_scope)
        self._general_of = lru_cache(_CACHED)(self._find_general)
        self._is_ever_allowed = lru_cache(_CACHED)(self._decide_ever)

    def with_tags(self, tags: Mapping[str, tuple[str, ...]]) -> Policy:
        """Return the policy for other tags of hosts: itself if it does not depend on tags."""
        if not self.uses_tags:
            return self
        policy = Policy(self.rules, self.roles, self._by_default, tags)
        policy.sha256 = self.sha256
        return policy

    def find_tags(self, host: str | None) -> tuple[str, ...] | None:
        """Return the tags of a host; None: they are unknown."""
        return None if host is None else self._tags.get(host)

    def decide(self, client: Client, action: Action, target: Target) -> Decision:
        """Return whether a client may do something, by which rule and within which limits.

        For an action on a job, the target consists of the job's host, procedure, arguments, queue and owner. Before a
        list of several items, see `may_ever`.
        """
        if client is LOCAL_ADMINISTRATOR:
            return _ADMINISTRATOR
        host, procedure = target.host, target.procedure
        of_host = self._of_host if host is None or len(host) <= _MAX_CACHED_NAME else self._match_host
        is_long = procedure is not None and len(procedure) > _MAX_CACHED_NAME
        of_procedure = self._match_procedure if is_long else self._of_procedure
        remaining = self._of_action[action] & self._of_client(client.principals, client.roles)
        remaining &= of_host(host) & of_procedure(procedure)
        examined: Examined | None = None
        while remaining:
            index = (remaining & -remaining).bit_length() - 1
            remaining &= remaining - 1
            rule = self.rules[index]
            if not rule.match_owner(client.principals, action, target.owner):
                continue
            if rule.queues is not None or rule.arguments is not None:
                examined = examined or Examined.of(target, action, client.principals)
                try:
                    if not (rule.match_queue(examined) and rule.match_arguments(examined)):
                        continue
                except Unreadable as error:
                    return Decision(False, rule.number, rule.line, f"{rule.place} cannot judge it: {error}")
            return self._decisions[index]
        return _ALLOWED_TO_ALL if action in self._by_default else _DENIED

    def expand(self, text: str) -> Principals:
        """Return the principals that a text in `who` means: those of a role and the role itself, or the text."""
        of_role = self.roles.get(text.removeprefix(ROLE), ()) if text.startswith(ROLE) else ()
        return Principals((text, *of_role))

    def find_scope(self, client: Client, action: Action) -> Scope:
        """Return to which jobs a client may do something, as far as that depends on their owners only."""
        if client is LOCAL_ADMINISTRATOR:
            return Scope(None, True)
        return self._scope_of(client.principals, client.roles, action)

    def _find_scope(self, principals: tuple[str, ...], roles: tuple[str, ...], action: Action) -> Scope:
        names = names_of(principals, roles)
        rules = [rule for rule in self.rules if action in rule.actions and rule.who.match_any(names)]
        own = self._decide_all(rules, action)
        others = self._decide_all([rule for rule in rules if rule.any_job], action)
        if others is False:
            return Scope(principals if own is not False else (), own is not None)
        return Scope(None, own is others is True)

    def find_general(self, client: Client, actions: tuple[Action, ...]) -> frozenset[Action] | None:
        """Return which of these actions a client may do with every job; None: for one of them, it depends on the job.

        It does not hold for the local administrator.
        """
        return self._general_of(client.principals, client.roles, actions)

    def _find_general(
        self, principals: tuple[str, ...], roles: tuple[str, ...], actions: tuple[Action, ...]
    ) -> frozenset[Action] | None:
        scopes = {action: self._scope_of(principals, roles, action) for action in actions}
        if not all(scope.is_exact and scope.owners in (None, ()) for scope in scopes.values()):
            return None
        return frozenset(action for action, scope in scopes.items() if scope.owners is None)

    def _decide_all(self, rules: Sequence[Rule], action: Action) -> bool | None:
        """Return what rules decide about all jobs that they cover, in their order; None: it depends on the job."""
        decided: set[bool] = set()
        for rule in rules:
            decided.add(rule.allows)
            if rule.queues is not None or rule.arguments is not None:
                decided.add(False)  # of those that it cannot judge
            if rule.is_unconditional:
                break
        else:
            decided.add(action in self._by_default)
        return decided.pop() if len(decided) == 1 else None

    def may_ever(self, client: Client, action: Action) -> bool:
        """Return whether some rule allows this action to the client for some target."""
        if client is LOCAL_ADMINISTRATOR or action in self._by_default:
            return True
        return self._is_ever_allowed(client.principals, client.roles, action)

    def _decide_ever(self, principals: tuple[str, ...], roles: tuple[str, ...], action: Action) -> bool:
        names = names_of(principals, roles)
        return any(rule.allows and action in rule.actions and rule.who.match_any(names) for rule in self.rules)

    def _match_client(self, principals: tuple[str, ...], roles: tuple[str, ...]) -> int:
        names = names_of(principals, roles)
        return _bits(rule.who.match_any(names) for rule in self.rules)

    def _match_host(self, host: str | None) -> int:
        tags = self.find_tags(host)
        return _bits(rule.match_host(host, tags) for rule in self.rules)

    def _match_procedure(self, procedure: str | None) -> int:
        return _bits(rule.procedures is None or rule.procedures.match(procedure) for rule in self.rules)


def _bits(matches: Iterable[bool]) -> int:
    """Return the number that has bit N if match N is true."""
    return sum(1 << index for index, match in enumerate(matches) if match)


def names_of(principals: Iterable[str], roles: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the names by which rules may mean a client."""
    return (*principals, *(ROLE + role for role in roles))


def _decision_of(rule: Rule) -> Decision:
    verb = "allows" if rule.allows else "denies"
    return Decision(rule.allows, rule.number, rule.line, f"{rule.place} {verb} it", rule.limits)


#: The rules of HTTP clients while there is no access file.
_ROLES = b"""
[roles]
viewer = []
operator = []
admin = []

[[rule]]
who = ["role:viewer"]
allow = ["read", "list", "metrics"]
jobs = "any"

[[rule]]
who = ["role:operator"]
allow = ["read", "list", "metrics", "call", "cancel", "manage"]
jobs = "any"

[[rule]]
who = ["role:admin"]
allow = ["read", "list", "metrics", "call", "cancel", "manage", "admin"]
jobs = "any"
"""
#: The policy of clients that need a role, without a file.
BUILT_IN_ROLES = Policy(*read_rules(Path("built-in roles"), _ROLES))

#: The policy of other clients without a file: they may call, and read and cancel all jobs, as the client API has always
#: let them.
ALLOW_ALL = Policy(by_default=frozenset({Action.CALL, Action.READ, Action.CANCEL}))


def load(path: Path) -> Policy:
    """Return the policy of a file. Raises `ConfigError`."""
    try:
        text = read_regular(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return parse(path, text)


def parse(path: Path, text: bytes) -> Policy:
    """Return the policy of the contents of a file. Raises `ConfigError`."""
    policy = Policy(*read_rules(path, text))
    policy.sha256 = sha256(text).hexdigest()
    return policy
