"""The access file of harpcallerd: start, changes, reload, check, and the commands that explain it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd

PAGE = Path(__file__).parents[2] / "docs" / "access.md"
RULES = """\
[roles]
ops = ["cert:*.ops.example.net", "uid:alice"]

[[rule]]
who = ["anonymous@*"]
deny = ["call"]
hosts = ["db*"]

[[rule]]
who = ["token:shop"]
allow = ["call", "read"]
hosts = ["web*"]
procedures = ["restart_*"]
arguments = {service = {enum = ["nginx", "php"]}}
rate = "5/min"

[[rule]]
who = ["role:ops"]
allow = ["call", "read", "cancel"]
jobs = "any"
"""
WRONG = RULES + "hots = ['a']\n"


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    file = tmp_path / "access.toml"
    file.write_text(RULES)
    return file


@pytest.fixture
def dispatcher(tmp_path: Path, rules: Path) -> Harpcallerd:
    """Return a dispatcher with the access file that is not started."""
    return Harpcallerd(tmp_path, settings={"access_file": rules.name})


def wrong(rules: Path) -> str:
    return f"{rules}: rule 3 (line 17): hots: expected one of"


# The daemon.


def test_wrong_access_file_stops_start_and_check(dispatcher: Harpcallerd, rules: Path) -> None:
    rules.write_text(WRONG)
    for arguments in (("start",), ("--test",)):
        done = dispatcher.control(*arguments, f"--config={dispatcher.config_file}")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[-1].startswith(f"harpcallerd: {wrong(rules)}")
    rules.unlink()
    done = dispatcher.control("--test", f"--config={dispatcher.config_file}")
    expected = f"access_file: expected a file that can be used, got {rules}: No such file or directory"
    assert f"harpcallerd: {dispatcher.config_file}: {expected}" in done.stderr.splitlines()


def test_wrong_change_keeps_the_rules_in_use(dispatcher: Harpcallerd, rules: Path) -> None:
    dispatcher.set_hosts({"web01": 1})  # a new file without hosts may be incomplete: `status` would say so
    with dispatcher:
        rules.write_text(WRONG)

        def warning() -> str:
            return dispatcher.control("status").stderr

        text = wait_until(warning, DEADLINE, "the warning")
        assert text.startswith(f"harpcallerd: warning: {wrong(rules)}")
        [event] = dispatcher.wait_events(1, "cannot use changed file")
        assert (event["level"], event["file"]) == ("error", str(rules))
        [status] = dispatcher.listed("status", "--full")
        assert status["access"]["rules"] == 3
        failed = dispatcher.reload()
        assert failed["event"] == "reload failed; nothing is changed"
        assert failed["reason"].startswith(wrong(rules))

        rules.write_text(RULES + '[[rule]]\nwho = ["*"]\nallow = ["list"]\n')
        wait_until(lambda: not warning(), DEADLINE, "the end of the warning")
        [status] = dispatcher.listed("status", "--full")
        assert (status["access"]["file"], status["access"]["rules"]) == (str(rules), 4)

        rules.write_text("")
        assert dispatcher.reload()["event"] == "reloaded"  # at once
        [status] = dispatcher.listed("status", "--full")
        assert status["access"]["rules"] == 0


def test_access_file_that_others_can_change_is_refused(dispatcher: Harpcallerd, rules: Path) -> None:
    reason = f"{dispatcher.config_file}: access_file: {rules}: other users can write to it; run: chmod go-w {rules}"
    rules.chmod(0o666)
    for arguments in (("start",), ("--test",)):
        done = dispatcher.control(*arguments, f"--config={dispatcher.config_file}")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[-1] == f"harpcallerd: {reason}"
    rules.chmod(0o644)
    with dispatcher:
        rules.chmod(0o666)
        event = dispatcher.wait_event("cannot use changed file", file=str(rules))
        assert event["error"][:200] == reason[:200]  # long fields are cut
        [status] = dispatcher.listed("status", "--full")
        assert status["access"]["rules"] == 3
        rules.chmod(0o644)
        wait_until(lambda: not dispatcher.control("status").stderr, DEADLINE, "the end of the warning")


def test_without_access_file_open_listeners_are_named(dispatcher: Harpcallerd) -> None:
    listen = ["*:0", "127.0.0.1:0", "[::1]:0", f"unix:{dispatcher.directory}/calls", "localhost:0"]
    dispatcher.configure({"listen": listen})
    done = dispatcher.control("--test", f"--config={dispatcher.config_file}")
    assert "access_file: not set: every client of *:0 may call every procedure" in done.stderr
    with dispatcher:
        [event] = dispatcher.events("clients need no rights; set access_file")
        assert (event["level"], event["listeners"]) == ("warning", ["*:0"])
        [status] = dispatcher.listed("status", "--full")
        assert status["access"] is None
    dispatcher.configure({"listen": listen, "access_file": "access.toml"})
    assert "not set" not in dispatcher.control("--test", f"--config={dispatcher.config_file}").stderr


# The commands.


def ask(dispatcher: Harpcallerd, *arguments: str) -> subprocess.CompletedProcess[str]:
    return dispatcher.control("access", f"--config={dispatcher.config_file}", *arguments)


def test_access_test_shows_the_rule_and_limits(dispatcher: Harpcallerd, rules: Path) -> None:
    call = ("--as=token:shop", "--host=web07", "--procedure=restart_service")
    done = ask(dispatcher, "test", *call, '--arguments={"service": "nginx"}')
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "allowed: rule 2 (line 9) allows it\nlimits: rate 5/min\n"
    last = dispatcher.control("access", "test", *call, f"--config={dispatcher.config_file}")
    assert last.stdout.startswith("denied: ")
    done = ask(dispatcher, "test", *call, '--arguments={"service": "nginx", "service": "sshd"}')
    assert done.returncode == 1
    assert done.stdout.startswith("denied: rule 2 (line 9) cannot judge it: ")
    rules.write_text(RULES.replace("nginx", "apache"))  # another file
    done = dispatcher.control("access", "test", *call, '--arguments={"service":"apache"}', f"--file={rules}")
    assert done.returncode == 0


def test_access_test_shows_what_comes_close(dispatcher: Harpcallerd) -> None:
    shop = ("--as=token:shop", "--host=web07", "--procedure=restart_service")
    done = ask(dispatcher, "test", *shop, '--arguments=["a"]')
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        "denied: no rule allows it",
        'rule 2 (line 9): arguments: position 1: expected no such argument, got "a"',
        "rule 3 (line 17): who: expected role:ops, got token:shop",
    ]
    read = ("test", "--action=read", *shop)
    done = ask(dispatcher, *read, '--arguments={"service": "php"}', "--owner=uid:alice")
    assert "rule 2 (line 9): jobs: expected own jobs, got one of uid:alice\n" in done.stdout
    assert ask(dispatcher, *read, '--arguments={"service": "php"}').returncode == 0
    done = ask(dispatcher, "test", "--as=anonymous@127.0.0.1:3502", "--as=uid:alice", "--host=db01", "--procedure=p")
    assert done.stdout == "denied: rule 1 (line 4) denies it\n"


def test_access_questions_know_the_tags_of_hosts(dispatcher: Harpcallerd, rules: Path) -> None:
    rules.write_text('[[rule]]\nwho = ["token:shop"]\nallow = ["call"]\ntags = ["prod", "eu-*"]\n')
    line = {"address": "127.0.0.1", "credentials": {"user": "u", "password": "p"}}
    hosts = {"web07": ["eu-west"], "web08": ["test"]}
    lines = [json.dumps({"hostname": name, "tags": tags, **line}) + "\n" for name, tags in hosts.items()]
    dispatcher.hosts_file.write_text("".join(lines))
    shop = ("test", "--as=token:shop", "--procedure=p")
    assert ask(dispatcher, *shop, "--host=web07").returncode == 0
    denied = "denied: no rule allows it\nrule 1 (line 1): tags: expected prod, eu-*, got "
    for host, got in ("web08", "test"), ("web09", "unknown ones"):
        assert ask(dispatcher, *shop, f"--host={host}").stdout == f"{denied}{got}\n"
    assert ask(dispatcher, "who", "--host=web07").stdout == "token:shop: rule 1 (line 1) allows it\n"
    assert ask(dispatcher, "who", "--host=web08").stdout == "no rule allows it to any client\n"
    assert ask(dispatcher, "who").stdout == "token:shop: rule 1 (line 1) allows it; tags: prod, eu-*\n"
    assert "  tags: prod, eu-*\n" in ask(dispatcher, "explain", "token:shop").stdout
    warning = f"{rules}: rule 1 (line 1): tags: no host has one of prod, eu-*"
    check = ("--test", f"--config={dispatcher.config_file}")
    assert warning not in dispatcher.control(*check).stderr
    dispatcher.hosts_file.write_text(lines[1])
    assert warning in dispatcher.control(*check).stderr, "it may be a typing error"
    dispatcher.hosts_file.unlink()
    assert "note: tags of hosts are unknown: " in ask(dispatcher, *shop, "--host=web07").stdout


def test_check_warns_of_conditions_that_nothing_meets(dispatcher: Harpcallerd, rules: Path) -> None:
    """They may be mistyped: a rule with `deny` would deny nothing."""
    rules.write_text(
        '[roles]\nall = ["anonymous@localhost:*", "anonymous@127.0.0.1:*"]\n'
        '[[rule]]\nwho = ["role:all"]\ndeny = ["call"]\nhosts = ["db*", "DB01", "web0[0-9]"]\n'
    )
    dispatcher.set_hosts({"db01": 1, "web01": 2})
    done = dispatcher.control("--test", f"--config={dispatcher.config_file}")
    where = f"harpcallerd: warning: {rules}: rule 1 (line 3): "
    assert [line for line in done.stderr.splitlines() if "rule 1" in line] == [
        f"{where}hosts: no host has the name DB01",
        f"{where}hosts: no host has the name web0[0-9]",
        f"{where}who: no listener is that of anonymous@localhost:*",
    ]


def test_access_questions_of_the_page_print_what_it_shows(dispatcher: Harpcallerd, rules: Path) -> None:
    page = PAGE.read_text()
    (example,) = re.findall(r"^```toml\n(\[roles\]\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    rules.write_text(example)
    (shown,) = re.findall(r"^```console\n(.*?)^```", page.partition("### Questions")[2], re.MULTILINE | re.DOTALL)
    questions = re.findall(r"^\$ harpcallerd access (.*)\n((?:[^$].*\n)+)", shown, re.MULTILINE)
    assert [question.split()[0] for question, _ in questions] == ["who", "test", "explain"]
    for question, printed in questions:
        assert ask(dispatcher, *shlex.split(question)).stdout == printed, question


def test_access_explain_shows_all_rights(dispatcher: Harpcallerd) -> None:
    done = ask(dispatcher, "explain", "token:shop", "anonymous@127.0.0.1:3502")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "rule 1 (line 4), for anonymous@*, denies call",
        "  hosts: db*",
        "rule 2 (line 9), for token:shop, allows call, read",
        "  hosts: web*",
        "  procedures: restart_*",
        '  arguments: service: one of "nginx", "php"',
        "  jobs: own",
        "  limits: rate 5/min",
        "everything else is denied",
    ]
    assert ask(dispatcher, "explain", "token:none").stdout == "no rule names it: everything is denied\n"
    assert "rule 3" in ask(dispatcher, "explain", "role:ops").stdout


def test_access_who_shows_each_principal(dispatcher: Harpcallerd) -> None:
    done = ask(dispatcher, "who", "--host=web07", "--procedure=restart_nginx")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        'token:shop: rule 2 (line 9) allows it; arguments: service: one of "nginx", "php"',
        "cert:*.ops.example.net (role:ops): rule 3 (line 17) allows it",
        "uid:alice (role:ops): rule 3 (line 17) allows it",
    ]
    on_db = ask(dispatcher, "who", "--host=db01", "--procedure=dump").stdout.splitlines()
    assert on_db[0] == "anonymous@*: rule 1 (line 4) denies it"
    assert len(on_db) == 3
    manage = ask(dispatcher, "who", "--action=manage")
    assert manage.stdout == "no rule allows it to any client\n"


def test_access_knows_the_roles_of_tokens(dispatcher: Harpcallerd) -> None:
    dispatcher.configure({"access_file": "access.toml", "tokens_file": "tokens"})
    call = ("--host=web07", "--procedure=reboot")
    for name, roles in {"pager": ("--role=ops",), "guest": ()}.items():
        added = dispatcher.control("token", "add", name, *roles, f"--config={dispatcher.config_file}")
        assert added.returncode == 0, added.stderr
    assert "token:pager (role:ops): rule 3 (line 17) allows it\n" in ask(dispatcher, "who", *call).stdout
    assert ask(dispatcher, "test", "--as=token:pager", *call).returncode == 0
    assert ask(dispatcher, "test", "--as=token:guest", *call).returncode == 1
    assert ask(dispatcher, "explain", "token:pager").stdout.startswith("rule 3 (line 17), for role:ops, allows call")
    (dispatcher.directory / "tokens").chmod(0o644)  # it cannot be used
    answer = ask(dispatcher, "who", *call).stdout
    assert "every token with role:ops (role:ops): rule 3 (line 17) allows it\n" in answer
    assert "note: roles of tokens are unknown: " in answer


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("explain", "shop"), 'harpcallerd: shop: expected a principal such as "token:shop"'),
        (("explain", "token:shop", "--file=none"), "harpcallerd: none: No such file or directory"),
        (("who",), "access_file: not set: every client may call everything; use --file"),
    ],
)
def test_access_reports_an_error(dispatcher: Harpcallerd, arguments: tuple[str, ...], error: str) -> None:
    dispatcher.configure({})
    done = ask(dispatcher, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert error in done.stderr


def test_access_rejects_wrong_json(dispatcher: Harpcallerd) -> None:
    for option in ("--arguments=1", "--arguments={", "--queue=[]"):
        done = ask(dispatcher, "who", option)
        assert (done.returncode, done.stdout) == (2, "")
        assert "expected a JSON object" in done.stderr
