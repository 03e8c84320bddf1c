"""The access file in sentences: why something is denied, what a principal may do, and who may do something.

Each function returns lines of text. They agree with `Policy.decide`, because they use its conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from harpcaller.access.client import Client
from harpcaller.access.policy import Action, Policy, Target, names_of
from harpcaller.access.rules import ROLE, TOKEN, Examined, Limits, Rule

_MAX_CLOSE = 5  #: Maximum number of rules that a denial names.


def explain_decision(policy: Policy, client: Client, action: Action, target: Target) -> list[str]:
    """Return the decision with its rule and limits; of a denial without a rule, also which rules come close."""
    decision = policy.decide(client, action, target)
    lines = [f"{'allowed' if decision.allowed else 'denied'}: {decision.reason}"]
    if decision.allowed and (limits := describe_limits(decision.limits)):
        lines.append(f"limits: {limits}")
    if not decision.allowed and decision.rule is None:
        lines += _describe_close_rules(policy, client, action, target)
    return lines


def _describe_close_rules(policy: Policy, client: Client, action: Action, target: Target) -> Iterator[str]:
    """Yield the rules that allow something and have the fewest unmet conditions, with these conditions."""
    names = names_of(client.principals, client.roles)
    tags = policy.find_tags(target.host)
    allowing = [rule for rule in policy.rules if rule.allows]
    examined = Examined.of(target, action, client.principals)
    found = [(rule, [*rule.find_unmet(names, action, examined, tags)]) for rule in allowing]
    least = min((len(unmet) for _, unmet in found), default=0)
    close = [(rule, unmet) for rule, unmet in found if len(unmet) == least]
    for rule, unmet in close[:_MAX_CLOSE]:
        yield from (f"{rule.place}: {key}: {text}" for key, text in unmet)
    if len(close) > _MAX_CLOSE:
        yield f"and {len(close) - _MAX_CLOSE} more rules"


def explain_rights(policy: Policy, client: Client) -> list[str]:
    """Return all that a client may do: the rules that name it, in their order, with all conditions and limits."""
    names = names_of(client.principals, client.roles)
    lines = []
    for rule in policy.rules:
        if rule.who.match_any(names):
            named = [text for text in rule.written_who if _names_client(policy, text, names)]
            verb = "allows" if rule.allows else "denies"
            lines.append(f"{rule.place}, for {', '.join(named)}, {verb} {describe_actions(rule)}")
            lines += [f"  {key}: {text}" for key, text in describe_conditions(rule)]
    return [*lines, "everything else is denied" if lines else "no rule names it: everything is denied"]


def _names_client(policy: Policy, text: str, names: Sequence[str]) -> bool:
    return policy.expand(text).match_any(names)


def explain_clients(
    policy: Policy, action: Action, target: Target, tokens: Mapping[str, Iterable[str]] | None
) -> list[str]:
    """Return who may do something: a line for each principal of the rules that may match, in their order.

    The first line that names a principal of a client decides. A line has the conditions on facts that the target does
    not state. `tokens` are the roles of each token; None: they are unknown.
    """
    stated = {key for key, name in _FACTS.items() if getattr(target, name) is not None} | {"allow", "deny"}
    lines = []
    for rule in policy.rules:
        tags = policy.find_tags(target.host)
        unmet = {key for key, _ in rule.find_unmet((), action, Examined(target), tags)}
        if unmet & stated:
            continue
        left = [f"; {key}: {text}" for key, text in describe_conditions(rule) if key in unmet - stated]
        for written in rule.written_who:
            verb = "allows" if rule.allows else "denies"
            for name in _list_principals(policy, written, tokens):
                through = f" ({written})" if written != name else ""
                lines.append(f"{name}{through}: {rule.place} {verb} it{''.join(left)}")
    return lines or ["no rule allows it to any client"]


def _list_principals(policy: Policy, written: str, tokens: Mapping[str, Iterable[str]] | None) -> Iterator[str]:
    """Yield the principals that a text in `who` means; the tokens that have a role in its place."""
    for principal in policy.expand(written).texts:
        if not principal.startswith(ROLE):
            yield principal
        elif tokens is None:
            yield f"every token with {principal}"
        else:
            yield from (TOKEN + name for name, roles in tokens.items() if principal.removeprefix(ROLE) in roles)


#: The conditions on a target, and the facts that they are on.
_FACTS = {
    "hosts": "host",
    "tags": "host",
    "procedures": "procedure",
    "queues": "queue",
    "arguments": "arguments",
    "jobs": "owner",
}


def describe_actions(rule: Rule) -> str:
    """Return the actions of a rule, in the order of `Action`."""
    return ", ".join(action for action in Action if action in rule.actions)


def describe_conditions(rule: Rule) -> Iterator[tuple[str, str]]:
    """Yield key and value of each condition, and of the limits."""
    if rule.hosts is not None:
        yield "hosts", str(rule.hosts)
    if rule.tags is not None:
        yield "tags", str(rule.tags)
    if rule.procedures is not None:
        yield "procedures", str(rule.procedures)
    if rule.queues is not None:
        yield "queues", " or ".join(map(str, rule.queues))
    if rule.arguments is not None:
        yield "arguments", str(rule.arguments)
    if rule.allows and rule.actions - {Action.CALL, Action.ADMIN}:
        yield "jobs", "any" if rule.any_job else "own"
    if limits := describe_limits(rule.limits):
        yield "limits", limits


def describe_limits(limits: Limits) -> str:
    """Return the limits of a rule as text; empty if it has none."""
    found = {name: getattr(limits, name) for name in Limits.__struct_fields__}
    found["max_exec_time"] = None if limits.max_exec_time is None else f"{limits.max_exec_time:g} s"
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
