"""The commands ``harpcallerd access``: questions about the access file. They read files and need no daemon."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

from harp.protocol.json_text import InvalidJSON, Raw, loads
from harp_daemon.settings import ConfigError
from harpcaller.access.client import Client
from harpcaller.access.explain import explain_clients, explain_decision, explain_rights
from harpcaller.access.policy import Action, Policy, Target, load
from harpcaller.access.rules import ON_JOBS, ROLE, TOKEN
from harpcaller.access.rules_file import is_principal
from harpcaller.access.tokens import TokenError, read_tokens
from harpcaller.config import Config
from harpcaller.config import load as load_config

_EXAMPLES = """\
examples:
  harpcallerd access who --host=web07 --procedure=restart_nginx
                                                        who may call it, by which rule
  harpcallerd access test --as=token:shop --host=web01 --procedure=clear_cache --arguments='{"site": "blog"}'
                                                        whether this call is allowed, and why
  harpcallerd access explain cert:anna.ops.example.net  all that this client may do
  harpcallerd access explain token:shop anonymous@127.0.0.1:3502 --file=./access.toml
                                                        with a new file, before it is in use

A client has several principals: each also has anonymous@LISTENER of the address that it is connected to. A token has
the roles that tokens_file says.

exit status: 0 success (test: allowed), 1 failure (test: denied), 2 wrong usage, 3 the output cannot be written
"""


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the questions to the parser of ``harpcallerd access``."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    questions = parser.add_subparsers(dest="question", metavar="QUESTION", required=True)

    def add(name: str, answer: Callable[[Namespace], tuple[list[str], int]], help: str) -> argparse.ArgumentParser:
        question = questions.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        question.set_defaults(answer=answer)
        question.add_argument(
            "--config", metavar="PATH", type=Path, default=argparse.SUPPRESS, help="the daemon's file"
        )
        question.add_argument("--file", metavar="FILE", type=Path, help="the access file (default: that of --config)")
        return question

    def add_target(question: argparse.ArgumentParser) -> None:
        option = question.add_argument
        option("--host", metavar="HOST", help="name of the host")
        option("--procedure", metavar="NAME", help="name of the procedure")
        option("--arguments", metavar="JSON", type=_arguments, help="arguments of the call, an object or an array")
        option("--queue", metavar="JSON", type=parse_queue, help="name of the queue, an object")
        option("--action", choices=[str(action) for action in Action], default="call", help="default: %(default)s")
        option("--owner", metavar="PRINCIPAL", help="owner of the job that is read or cancelled (default: the client)")

    question = add("test", _test, "show whether an action is allowed, by which rule, or which rules come close")
    principal = "principal of the client, or role:NAME; may be repeated"
    question.add_argument(
        "--as", dest="principals", metavar="PRINCIPAL", action="append", required=True, help=principal
    )
    add_target(question)
    question = add("explain", _explain, "show all that a client may do")
    question.add_argument("principals", metavar="PRINCIPAL", nargs="+", help=principal)
    add_target(add("who", _who, "show who may do something: the first line that names a client decides"))


_NO_TAGS = "tags of hosts are unknown"


class _Files(NamedTuple):
    """What the files say: the rules, and the roles of each token; None: the tokens cannot be read."""

    policy: Policy
    tokens: Mapping[str, tuple[str, ...]] | None
    notes: tuple[str, ...] = ()  # what cannot be read


#: Returns the tags of the hosts in the files of a configuration, by name. Raises OSError.
TagsReader: TypeAlias = Callable[[Config], Mapping[str, tuple[str, ...]]]


def answer_question(parsed: Namespace, read_tags: TagsReader) -> tuple[list[str], int]:
    """Return the lines of the answer and the exit status. Raises `ConfigError`."""
    parsed.read_tags = read_tags
    lines, status = parsed.answer(parsed)
    return lines, status


def _test(parsed: Namespace) -> tuple[list[str], int]:
    _check_principals(parsed.principals)
    files, action = _read_files(parsed), Action(parsed.action)
    client = _client(parsed.principals, files)
    target = _target(parsed, client.owner if action in ON_JOBS else None)
    allowed = files.policy.decide(client, action, target).allowed
    return _with_notes(explain_decision(files.policy, client, action, target), files), 0 if allowed else 1


def _explain(parsed: Namespace) -> tuple[list[str], int]:
    _check_principals(parsed.principals)
    files = _read_files(parsed)
    return _with_notes(explain_rights(files.policy, _client(parsed.principals, files)), files), 0


def _who(parsed: Namespace) -> tuple[list[str], int]:
    files = _read_files(parsed)
    target = _target(parsed, None)
    return _with_notes(explain_clients(files.policy, Action(parsed.action), target, files.tokens), files), 0


def _with_notes(lines: list[str], files: _Files) -> list[str]:
    return [*lines, *(f"note: {note}" for note in files.notes)]


def _read_files(parsed: Namespace) -> _Files:
    """Return what the access file and the tokens file of the configuration say; `--file` replaces the former."""
    if parsed.file is not None and not parsed.config.exists():
        policy = load(parsed.file)
        return _Files(policy, {}, (f"{_NO_TAGS}: {parsed.config} does not exist",) if policy.uses_tags else ())
    config = load_config(parsed.config)
    file = parsed.file or config.access_file
    if file is None:
        raise ConfigError(f"{config.file}: access_file: not set: every client may call everything; use --file")
    policy, notes = load(file), []
    if policy.uses_tags:
        try:
            policy = policy.with_tags(parsed.read_tags(config))
        except OSError as error:
            notes.append(f"{_NO_TAGS}: {error}")
    roles: dict[str, tuple[str, ...]] | None = None
    try:
        tokens = read_tokens(config.tokens_file) if config.tokens_file else {}
        roles = {name: token.roles for name, token in tokens.items()}
    except (TokenError, OSError) as error:
        notes.append(f"roles of tokens are unknown: {error}")
    return _Files(policy, roles, tuple(notes))


def _check_principals(names: list[str]) -> None:
    for name in names:
        if not name.startswith(ROLE) and not is_principal(name):
            raise ConfigError(f'{name}: expected a principal such as "token:shop" or "cert:anna.example.net"')


def _client(names: list[str], files: _Files) -> Client:
    """Return the client with these principals, and the roles of those that are tokens."""
    tokens = [name.removeprefix(TOKEN) for name in names if name.startswith(TOKEN)]
    roles = [role for token in tokens for role in (files.tokens or {}).get(token, ())]
    return Client(tuple(names), "", "", authenticated=True, roles=tuple(roles))


def _target(parsed: Namespace, owner: str | None) -> Target:
    return Target(parsed.host, parsed.procedure, parsed.arguments, parsed.queue, parsed.owner or owner)


def _arguments(text: str) -> Raw:
    return _json(text, (dict, list), "a JSON object or array")


def parse_queue(text: str) -> Raw:
    """Return the name of a queue, a JSON object. Raises `ArgumentTypeError`."""
    return _json(text, (dict,), "a JSON object")


def _json(text: str, kinds: tuple[type, ...], expected: str) -> Raw:
    try:
        value = loads(text)
    except InvalidJSON as error:
        raise argparse.ArgumentTypeError(f"expected {expected}: {error}") from error
    if not isinstance(value, kinds):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
    # A line feed between values would end the line of a request.
    return Raw(text.replace("\n", " ").encode("utf-8", "surrogateescape"))
