"""The access file and its decisions, against a reference and by example."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp.protocol.json_text import Raw
from harp_daemon.settings import ConfigError
from harpcaller.access.client import LOCAL_ADMINISTRATOR, Client
from harpcaller.access.policy import (
    ALLOW_ALL,
    Action,
    Decision,
    Limits,
    Policy,
    Rate,
    Scope,
    Target,
    load,
    names_of,
    parse,
)
from harpcaller.access.rules import Examined
from harpcaller.access.rules_file import CHECK_KEYS, KEYS
from support import access

FILE = Path("/etc/harpcaller/access.toml")
EXAMPLE = """\
[roles]
web = ["token:shop", "uid:www-data"]
ops = ["cert:*.ops.example.net", "user:alice"]

[[rule]]
who = ["role:web"]
allow = ["call", "read", "cancel"]
hosts = ["web*"]
procedures = ["clear_cache"]
queues = [{site = "*"}]
arguments = {site = {pattern = "[a-z0-9-]+"}}
max_exec_time = 60
running = 20
queued = 500
rate = "50/s"
bytes = "1 MiB"
max_record_bytes = "10 MiB"

[[rule]]
who = ["role:ops"]
allow = ["call", "read", "cancel", "list", "manage"]
jobs = "any"

[[rule]]
who = ["anonymous@127.0.0.1:3502"]
allow = ["call", "read"]
procedures = ["current_time"]
"""


def policy(text: str) -> Policy:
    return parse(FILE, text.encode())


def rule(text: str, who: str = '["*"]', allow: str = '["call"]') -> str:
    return f"[[rule]]\nwho = {who}\nallow = {allow}\n{text}\n"


def client(*principals: str, roles: tuple[str, ...] = ()) -> Client:
    return Client((*principals, "anonymous@127.0.0.1:3502"), "127.0.0.1:3502", "127.0.0.1:40000", True, roles)


def call(
    arguments: str = "{}", host: str = "web01", procedure: str = "clear_cache", queue: str | None = None
) -> Target:
    return Target(host, procedure, Raw(arguments.encode()), None if queue is None else Raw(queue.encode()))


def error_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        policy(f"{text}\n")
    return str(caught.value)


# Decisions.


@given(document=access.documents(), client=access.clients(), action=st.sampled_from([*Action]), target=access.targets())
def test_decide_equals_the_reference(document: Any, client: Client, action: Action, target: Target) -> None:
    found = policy(access.to_toml(document)).with_tags(access.TAGS)
    decision = found.decide(client, action, target)
    allowed, number = access.reference(document, client, action, target, access.TAGS)
    assert (decision.allowed, decision.rule) == (allowed, number)
    assert found.decide(client, action, target) == decision  # now from the caches
    # The explanation agrees: the rule that decides is the first one without an unmet condition, or cannot judge.
    names = names_of(client.principals, client.roles)
    tags = found.find_tags(target.host)
    examined = Examined.of(target, action, client.principals)
    unmet = [[*rule.find_unmet(names, action, examined, tags)] for rule in found.rules]
    decides = next((number for number, texts in enumerate(unmet, 1) if not texts), None)
    assert decides == number or (not allowed and number is not None and len(unmet[number - 1]) > 0)


@given(document=access.documents(), client=access.clients(), action=st.sampled_from([*Action]), target=access.targets())
def test_may_ever_holds_for_each_allowed_target(document: Any, client: Client, action: Action, target: Target) -> None:
    found = policy(access.to_toml(document))
    assert found.may_ever(client, action) or not found.decide(client, action, target).allowed


def test_example_of_the_design_decides() -> None:
    found = policy(EXAMPLE)
    shop, ops, anyone = client("token:shop"), client("cert:a.ops.example.net"), client()
    in_queue = call('{"site":"blog"}', queue='{"site":"blog"}')
    limits = Limits(60.0, 20, 500, Rate(50, 1), 1 << 20, 10 << 20)
    assert found.decide(shop, Action.CALL, in_queue) == Decision(True, 1, 5, "rule 1 (line 5) allows it", limits)
    assert not found.decide(shop, Action.CALL, call('{"site":"../etc"}', queue='{"site":"blog"}')).allowed
    assert not found.decide(shop, Action.CALL, call('{"site":"blog"}')).allowed
    assert not found.decide(shop, Action.LIST, Target()).allowed
    assert found.decide(ops, Action.READ, Target("db01", "dump", owner="token:shop")).rule == 2
    assert found.decide(shop, Action.CALL, call(procedure="current_time")).rule == 3  # it is also anonymous
    denied = found.decide(anyone, Action.CALL, in_queue)
    assert denied == Decision(False, None, None, "no rule allows it")


def test_first_rule_that_matches_decides() -> None:
    text = '[[rule]]\nwho = ["*"]\ndeny = ["call"]\nhosts = ["db*"]\nprocedures = ["wipe"]\n' + rule("running = 3")
    found = policy(text + rule("running = 5"))
    wipe = found.decide(client("token:shop"), Action.CALL, call(host="db01", procedure="wipe"))
    assert wipe == Decision(False, 1, 1, "rule 1 (line 1) denies it")
    assert found.decide(client("token:shop"), Action.CALL, call(procedure="wipe")).limits.running == 3


@pytest.mark.parametrize(
    ("checks", "arguments", "allowed"),
    [
        ('site = {pattern = "[a-z]+"}', '{"site":"blog"}', True),
        ('site = {pattern = "[a-z]+"}', '{"site":"blog\\n"}', False),  # the pattern is of the whole text
        ('site = {pattern = "[a-z]+"}', '{"s\\u0069te":"\\u0062log"}', True),  # decoded
        ('site = {pattern = "[a-z]+"}', '{"site":"blog","more":1}', False),
        ('site = {pattern = "[a-z]+"}\n"*" = {}', '{"site":"blog","more":1}', True),
        ('site = {pattern = "[a-z]+"}', '["blog"]', False),
        ("site = {pattern = '\\d+'}", '{"site":"12"}', True),
        ("site = {pattern = '\\d+'}", '{"site":"\\u0661"}', False),  # a digit, but not of ASCII
        ('site = {pattern = "[a-z]+", position = 1}', '["blog"]', True),
        ('site = {pattern = "[a-z]+", position = 1}', '["blog","x"]', False),
        ('site = {pattern = "[a-z]+", position = 2}', '["x","blog"]', False),
        ('site = {pattern = "[a-z]+", position = 2}\n"*" = {}', '["x","blog"]', True),
        ('site = {pattern = "[a-z]+"}', "{}", False),
        ('site = {pattern = "[a-z]+", optional = true}', "{}", True),
        ("count = {maximum = 3}", '{"count":3.0}', True),
        ("count = {maximum = 3}", '{"count":4}', False),
        ("count = {maximum = 3}", '{"count":true}', False),
        ("count = {maximum = 3}", '{"count":"1"}', False),
        ("count = {minimum = 0, maximum = 3}", '{"count":-1}', False),
        ("count = {enum = [1, 2]}", '{"count":1.0}', True),
        ("count = {enum = [1, 2]}", '{"count":true}', False),
        ('count = {enum = [true, "yes"]}', '{"count":"yes"}', True),
        ("", "{}", True),
        ("", "[1]", False),
    ],
)
def test_arguments_are_matched_decoded(checks: str, arguments: str, allowed: bool) -> None:
    found = policy(rule(f"[rule.arguments]\n{checks}"))
    assert found.decide(client(), Action.CALL, call(arguments)).allowed is allowed


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ('{"site":"blog","site":"shop"}', "got a repeated name"),
        ('{"site":"blog","s\\u0069te":"shop"}', "got a repeated name"),
        ('{"site":"blog","nested":[{"a":1,"a":2}]}', "got a repeated name"),
        ('{"site":"%s"}' % ("a" * 65536), "expected at most 65536 bytes, got 65547"),
    ],
)
def test_arguments_that_cannot_be_judged_are_refused(arguments: str, reason: str) -> None:
    found = policy(rule("arguments = {site = {enum = ['blog']}}") + rule("hosts = ['web*']"))
    decision = found.decide(client(), Action.CALL, call(arguments))
    assert (decision.allowed, decision.rule) == (False, 1)
    assert reason in decision.reason
    assert policy(rule("")).decide(client(), Action.CALL, call(arguments)).allowed  # no rule looks at them


@pytest.mark.parametrize(
    ("patterns", "queue", "allowed"),
    [
        ('[{site = "*"}]', '{"site":"blog"}', True),
        ('[{site = "*"}]', '{"site":7}', True),
        ('[{site = "b*"}]', '{"site":"blog"}', True),
        ('[{site = "b*"}]', '{"site":"shop"}', False),
        ('[{site = "*"}]', '{"site":"blog","host":"web01"}', False),
        ('[{site = "*"}, {site = "*", host = "*"}]', '{"site":"blog","host":"web01"}', True),
        ('[{site = "*"}]', None, False),
        ('[{site = "*"}, "none"]', None, True),
        ("[{id = 1}]", '{"id":1.0}', True),  # the same queue
        ("[{id = 1}]", '{"id":1.0000000000000000001}', False),  # another queue
        ("[{id = 1}]", '{"id":true}', False),
        ('[{id = "1"}]', '{"id":1}', False),
    ],
)
def test_queues_are_matched_by_their_names(patterns: str, queue: str | None, allowed: bool) -> None:
    assert policy(rule(f"queues = {patterns}")).decide(client(), Action.CALL, call(queue=queue)).allowed is allowed


def test_queue_that_repeats_a_name_evades_no_rule() -> None:
    denial = '[[rule]]\nwho = ["*"]\ndeny = ["call"]\nqueues = [{deploy = "*"}]\n'
    decision = policy(denial + rule("")).decide(client(), Action.CALL, call(queue='{"deploy":"a","deploy":"b"}'))
    assert (decision.allowed, decision.rule) == (False, 1)


@pytest.mark.parametrize(
    ("jobs", "owner", "allowed"),
    [
        ("own", "token:shop", True),
        ("own", "token:other", False),
        ("own", "", False),  # stored before jobs had owners
        ("own", None, False),
        ("any", "token:other", True),
        ("any", "", True),
    ],
)
def test_jobs_of_other_owners_need_any(jobs: str, owner: str | None, allowed: bool) -> None:
    found = policy(rule(f'jobs = "{jobs}"', allow='["read"]'))
    target = Target("web01", "clear_cache", owner=owner)
    assert found.decide(client("token:shop"), Action.READ, target).allowed is allowed


def test_masked_values_of_own_jobs_are_not_judged_again() -> None:
    found = policy(rule('arguments = {password = {pattern = ".{12,}"}}', allow='["call", "read"]'))
    masked = Target("web01", "p", Raw(b'{"password":"***"}'), owner="token:shop")
    assert found.decide(client("token:shop"), Action.READ, masked).allowed
    assert not found.decide(client("token:shop"), Action.CALL, masked).allowed, "a call has the value itself"
    more = Target("web01", "p", Raw(b'{"password":"***","more":"***"}'), owner="token:shop")
    assert not found.decide(client("token:shop"), Action.READ, more).allowed, "no such argument is allowed"
    any_job = policy(rule('jobs = "any"\narguments = {password = {pattern = ".{12,}"}}', allow='["read"]'))
    assert not any_job.decide(client("token:other"), Action.READ, masked).allowed


def test_roles_of_tokens_and_nested_roles_match() -> None:
    roles = '[roles]\nall = ["role:ops", "token:guest"]\nops = ["uid:alice", "role:oncall"]\noncall = []\n'
    found = policy(roles + rule("", '["role:all"]'))
    for one in (client("token:guest"), client("uid:alice"), client("token:pager", roles=("oncall",))):
        assert found.decide(one, Action.CALL, call()).allowed
    assert not found.decide(client("token:pager"), Action.CALL, call()).allowed
    assert found.roles["all"] == ("role:ops", "uid:alice", "role:oncall", "token:guest")


def test_globs_have_two_special_characters() -> None:
    found = policy(rule("", '["anonymous@[::1]:3502", "cert:*.x?.net"]'))
    for principal, allowed in {
        "anonymous@[::1]:3502": True,
        "anonymous@::3502": False,
        "cert:a.b.x1.net": True,
        "cert:a.x12.net": False,
        "cert:a.x1.net.evil.example": False,
    }.items():
        one = Client((principal,), "x", "x")
        assert found.decide(one, Action.CALL, call()).allowed is allowed, principal


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("cert:*.ops.example.net", ["cert:a.ops.example.net", "cert:a.b.ops.example.net"]),
        ("cert:*@*.example.net", ["cert:mallory@a.ops.example.net"]),
        ("cert:https://*", ["cert:https://evil.example/a.ops.example.net"]),
        ("cert:*/a.ops.example.net", ["cert:https://evil.example/a.ops.example.net"]),
    ],
)
def test_globs_of_certificates_match_their_own_kind_of_names(pattern: str, names: list[str]) -> None:
    found = policy(rule("", f'["{pattern}"]'))
    for name in (
        *("cert:a.ops.example.net", "cert:a.b.ops.example.net", "cert:mallory@a.ops.example.net"),
        *("cert:https://evil.example/a.ops.example.net", "token:a.ops.example.net"),
    ):
        assert found.decide(Client((name,), "x", "x"), Action.CALL, call()).allowed is (name in names), name
        assert policy(rule("", '["cert:*"]')).decide(Client((name,), "x", "x"), Action.CALL, call()).allowed is (
            name.startswith("cert:")
        )


def test_tags_of_hosts_that_are_unknown_give_nothing() -> None:
    denial = '[[rule]]\nwho = ["*"]\ndeny = ["call"]\ntags = ["prod"]\n'
    found = policy(denial + rule('tags = ["eu-*", "test"]')).with_tags(
        {"web01": ("eu-west",), "web02": ("eu-west", "prod"), "web03": ()}
    )
    hosts = ("web01", "web02", "web03", "unknown")
    decided = [found.decide(client(), Action.CALL, call(host=host)) for host in hosts]
    assert [(each.allowed, each.rule) for each in decided] == [(True, 2), (False, 1), (False, None), (False, 1)]
    assert found.with_tags({}).decide(client(), Action.CALL, call()).rule == 1
    assert not found.decide(client(), Action.CALL, Target(procedure="clear_cache")).allowed, "it has no host"
    assert found.uses_tags
    assert policy(rule("")).with_tags({}).uses_tags is False


def test_administrator_of_the_control_socket_has_all_rights() -> None:
    for action in Action:
        assert policy("").decide(LOCAL_ADMINISTRATOR, action, Target()).allowed
        assert not policy("").decide(client("administrator"), action, Target()).allowed


def test_without_a_file_all_clients_may_call() -> None:
    allowed = {action for action in Action if ALLOW_ALL.decide(client(), action, Target(owner="token:x")).allowed}
    assert allowed == {Action.CALL, Action.READ, Action.CANCEL}


def test_names_of_any_length_are_decided() -> None:
    found = policy(rule('hosts = ["web*"]\nprocedures = ["clear*"]'))
    assert found.decide(client(), Action.CALL, call(host="web" * 9999, procedure="clear" * 9999)).allowed
    assert not found.decide(client(), Action.CALL, call(host="db" * 9999)).allowed


def test_page_has_a_valid_example_and_all_keys() -> None:
    page = (Path(__file__).parents[2] / "docs" / "access.md").read_text()
    [example] = re.findall(r"^```toml\n(\[roles\]\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [each.allows for each in policy(example).rules] == [False, True, True]
    rows = re.findall(r"^\| ((?:`\w+`,? ?)+) \|", page.partition("## The access file")[2], re.MULTILINE)
    keys = [key for row in rows for key in re.findall(r"\w+", row)]
    assert sorted(keys) == sorted([*KEYS, *CHECK_KEYS, *Action])


# Errors.


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("rulez = 1", "rulez: expected one of roles, rule, got an unknown key; did you mean rule?"),
        ("[roles]\nweb = 1", "roles.web: expected a list of texts, got 1"),
        ("[roles]\nweb = ['tokn:shop']", "tokn:shop'; did you mean token:shop?"),
        (
            rule("", who="['token:shop ']"),
            "who: expected letters, digits, dots, hyphens and underscores, got 'token:shop '",
        ),
        (rule("", who="['token:a,uid:b']"), "got 'token:a,uid:b', which no client has"),
        (rule("", who="['token:\u0455hop']"), "which no client has"),
        (rule("", who="['cert:a b']"), "who: expected printable ASCII characters without spaces, got 'cert:a b'"),
        (
            "[roles]\nweb = ['role:wob']",
            "roles.web: expected a role of [roles], got 'role:wob'; did you mean role:web?",
        ),
        (
            "[roles]\na = ['role:b']\nb = ['role:a']",
            "roles.a: expected roles that do not contain themselves, got a -> b -> a",
        ),
        ("[rule]\nwho = 1", "rule: expected tables with the header [[rule]], got a table"),
        ("rule = [{who = ['*']}]", "rule: expected each rule below a line [[rule]]"),
        ("[[rule]]\nallow = ['call']", "rule 1 (line 1): who: expected a list of principals, got none"),
        ("\n\n[[ rule ]] # first\nwho = []", "rule 1 (line 3): who: expected at least one text, got an empty list"),
        ("[[rule]]\nwho = ['*']", "rule 1 (line 1): allow, deny: expected one of the two, got none"),
        (rule("deny = ['read']"), "rule 1 (line 1): allow, deny: expected one of the two, got both"),
        (rule("") + rule("hots = ['a']"), "rule 2 (line 5): hots: expected one of who, allow"),
        (rule("hots = ['a']"), "got an unknown key; did you mean hosts?"),
        (rule("", allow="['cal']"), "rule 1 (line 1): allow: expected one of call, read, cancel"),
        (rule("", allow="['cal']"), "got 'cal'; did you mean call?"),
        (rule("hosts = 'web*'"), "rule 1 (line 1): hosts: expected a list of texts, got 'web*'"),
        (rule("hosts = ['a', 1]"), "rule 1 (line 1): hosts[1]: expected a text, got 1"),
        (rule("", who="['role:web']"), "rule 1 (line 1): who: expected a role of [roles], got 'role:web'"),
        (rule("queues = ['all']"), 'rule 1 (line 1): queues[0]: expected a table such as {site = "*"}, or "none"'),
        (rule("queues = [{a = 1.5}]"), "queues[0].a: expected a text, an integer, true or false, got 1.5"),
        (rule("arguments = {a = {max = 1}}"), "arguments.a.max: expected one of enum, pattern"),
        (rule("arguments = {a = {pattern = '('}}"), "arguments.a.pattern: expected a regular expression, got '('"),
        (rule("arguments = {a = {pattern = '(?u)a'}}"), "expected a regular expression, got '(?u)a'"),
        (rule("arguments = {a = {pattern = '[[]a'}}"), "got '[[]a': Possible nested set at position 1"),
        (rule("arguments = {a = {maximum = inf}}"), "arguments.a.maximum: expected a number, got inf"),
        (rule("arguments = {a = {enum = [[]]}}"), "arguments.a.enum[0]: expected a text, a number, true or false"),
        (rule("arguments = {a = {position = 0}}"), "arguments.a.position: expected an integer of at least 1, got 0"),
        (
            rule("arguments = {a = {position = 1}, b = {position = 1}}"),
            "arguments: expected different positions, got [1, 1]",
        ),
        (rule("jobs = 'all'"), "rule 1 (line 1): jobs: expected one of own, any, got 'all'"),
        (rule("running = 0"), "rule 1 (line 1): running: expected an integer of at least 1, got 0"),
        (rule("rate = 50"), 'rule 1 (line 1): rate: expected a rate such as "50/s", "10/min" or "100/h", got 50'),
        (rule("bytes = '1 MB'"), 'rule 1 (line 1): bytes: expected a size such as "64 KiB", "1 MiB"'),
        (rule("max_exec_time = 0"), "rule 1 (line 1): max_exec_time: expected a number of seconds above 0"),
        (
            rule("running = 1", allow="['read']"),
            'rule 1 (line 1): running: expected only in a rule that allows "call", got a rule that does not',
        ),
        (
            "[[rule]]\nwho = ['*']\ndeny = ['call']\narguments = {}",
            "rule 1 (line 1): arguments: expected only in a rule with allow, got a rule with deny",
        ),
        ("[[rule]\n", "expected TOML:"),
        (f"x = {'9' * 5000}\n", "expected TOML:"),
        (f"x = {'[' * 5000}\n", "expected TOML:"),
    ],
)
def test_wrong_file_is_refused_with_the_place(text: str, error: str) -> None:
    message = error_of(text)
    assert message.startswith(f"{FILE}: ")
    assert error in message
    assert "\n" not in message


@given(text=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_rules_or_an_error(text: bytes) -> None:
    with suppress(ConfigError):
        parse(FILE, text)


@given(
    start=st.integers(0, len(EXAMPLE)),
    length=st.integers(0, 12),
    new=st.sampled_from(["", "[", "]", "{", '"', "\n", "=", "1", "*", "[[rule]]", "role:", "'", "inf", "\0", "\ud800"]),
)
def test_mutated_file_is_rules_or_an_error(start: int, length: int, new: str) -> None:
    text = EXAMPLE[:start] + new + EXAMPLE[start + length :]
    with suppress(ConfigError):
        found = parse(FILE, text.encode("utf-8", "surrogatepass"))
        for action in Action:
            found.decide(client("token:shop"), action, call('{"site":"blog"}', queue='{"site":"blog"}'))


def test_very_long_file_is_refused() -> None:
    """Another file was copied to its place. It would halt the event loop: 60 MB of comments took 20 s."""
    with pytest.raises(ConfigError, match="expected at most 1048576 bytes, got 1200000"):
        policy("# x\n" * 300_000)


def test_file_that_ends_within_a_line_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a line feed at the end, got none; the file may be incomplete"):
        policy(rule('hosts = ["web*"]').rstrip("\n"))


def test_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"access\.toml: No such file or directory"):
        load(tmp_path / "access.toml")


# Which jobs a client may list


LISTERS = [
    Client(("token:a", "anonymous@l"), "l", "", authenticated=True),
    Client(("token:b",), "l", "", authenticated=True),
    LOCAL_ADMINISTRATOR,
]
RULE_PARTS = st.tuples(
    st.sampled_from(['who = ["*"]', 'who = ["token:a"]', 'who = ["anonymous@*"]']),
    st.sampled_from(['allow = ["list"]', 'allow = ["read", "list"]', 'deny = ["list"]', 'allow = ["read"]']),
    st.sampled_from(["", 'jobs = "any"']),
    st.sampled_from(["", 'hosts = ["*"]', 'hosts = ["web*"]']),
    st.sampled_from(["", 'procedures = ["x", "*"]', 'procedures = ["x"]']),
    st.sampled_from(["", "", 'queues = ["none"]', 'arguments = {"*" = {}}']),
).filter(lambda parts: "deny" not in parts[1] or not (parts[2] or "arguments" in parts[5]))
LISTED = [
    Target(host, procedure, Raw(arguments), queue, owner)
    for host in ("web1", "db1")
    for procedure in ("x", "y")
    for arguments in (b"{}", b'{"a":1,"a":2}')
    for queue in (None, Raw(b"{}"))
    for owner in ("", "token:a", "token:b", "anonymous@l")
]


@given(rules=st.lists(RULE_PARTS, max_size=4))
def test_scope_of_a_list_is_what_the_decisions_allow(rules: list[tuple[str, ...]]) -> None:
    found = policy("".join("[[rule]]\n" + "\n".join(parts) + "\n" for parts in rules))
    for client in LISTERS:
        scope = found.find_scope(client, Action.LIST)
        for job in LISTED:
            is_allowed = found.decide(client, Action.LIST, job).allowed
            is_in_scope = scope.owners is None or job.owner in scope.owners
            assert is_in_scope or not is_allowed, (client, job)
            assert not scope.is_exact or is_in_scope is is_allowed, (client, job)


@pytest.mark.parametrize(
    ("text", "owners", "is_exact"),
    [
        ("", (), True),
        (rule('jobs = "any"', allow='["list"]'), None, True),
        (rule('jobs = "any"\nhosts = ["*"]', allow='["list"]'), None, True),
        (rule("", allow='["list"]'), LISTERS[0].principals, True),
        (rule('hosts = ["web*"]', allow='["list"]'), LISTERS[0].principals, False),
        (rule('jobs = "any"\nhosts = ["web*"]', allow='["list"]'), None, False),
    ],
)
def test_scope_of_a_list_is_exact_if_only_owners_decide(
    text: str, owners: tuple[str, ...] | None, is_exact: bool
) -> None:
    assert policy(text).find_scope(LISTERS[0], Action.LIST) == Scope(owners, is_exact)
