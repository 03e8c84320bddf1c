"""The program's command line: the arguments of all commands, how their values are parsed, and the help."""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from harp.protocol.json_text import InvalidJSON, loads

_EPILOG = """\
An ARG is JSON, or text if it is not valid JSON: 5 is a number, five is text, '"5"' is text, too.

examples:
  export HARP_DISPATCHER=harp.example.net
  harp call web01 uptime                                submit a job; print its id
  harp call --wait web01 add 2 3                        submit, wait, print the result
  harp call web01 restart --named service=nginx --queue '{"service": "nginx"}' --concurrency 2
  harp follow JOB --since 0                             print records until the job ends
  harp read JOB --recent 10 --numbered                  records so far, each as [number, record]
  harp result JOB --no-wait                             exit code 5 while the job runs
  harp why JOB                                          why it waits, runs or ended
  harp cancel JOB --wait                                wait until the host confirms the stop
  HARP_PASSWORD=secret harp direct web01 uptime --user admin --ca-file ca.pem

exit codes:
    0  success                                    4  the job was cancelled; cancel: it had already ended
    1  the procedure raised an exception          5  the job has not ended yet
    2  wrong usage, or a value without JSON form  6  no connection, or an invalid reply
    3  the job failed, or was refused           130  Ctrl-C; a job continues, a direct call is cancelled
"""


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the program.

    Args:
        name: its name.
        run: carries it out and returns the exit code.
        help: one sentence for the help.
        arguments: names of its arguments, separated by spaces.
    """

    name: str
    run: Callable[[Namespace], int]
    help: str
    arguments: str


def make_parser(description: str | None, commands: Iterable[Command]) -> argparse.ArgumentParser:
    """Return the parser of the program's arguments, which sets `run` to that of the given command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="harp", description=description, epilog=_EPILOG, formatter_class=form)
    parser.add_argument("--dispatcher", default=os.environ.get("HARP_DISPATCHER"), **_ARGUMENTS["--dispatcher"])
    parser.add_argument("--reconnect", default=300.0, **_ARGUMENTS["--reconnect"])
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands:
        subparser = subparsers.add_parser(
            command.name, help=command.help, description=command.help, epilog=_EPILOG, formatter_class=form
        )
        subparser.set_defaults(run=command.run)
        for argument in ("--dispatcher", "--reconnect"):
            subparser.add_argument(argument, default=argparse.SUPPRESS, **_ARGUMENTS[argument])
        for argument in command.arguments.split():
            settings = _ARGUMENTS.get(f"{command.name} {argument}") or _ARGUMENTS.get(argument)
            subparser.add_argument(argument, **(settings or {"metavar": argument.upper()}))
    return parser


def _parse_value(text: str) -> Any:
    """Return an argument's value: JSON, or else the text itself."""
    try:
        return loads(text)
    except InvalidJSON:
        return text


def _parse_named(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=ARG, got {text!r}")
    return name, _parse_value(value)


def _parse_address(text: str) -> dict[str, Any]:
    """Return HOST, HOST:PORT, [ADDRESS]:PORT or an IPv6 address as a dict with `host`, and `port` if there is one."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
    else:
        host, _, port = text.partition(":") if text.count(":") == 1 else (text, "", "")
    if not host or (port and not port.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected HOST[:PORT], got {text!r}")
    return {"host": host, "port": int(port)} if port else {"host": host}


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "address": {"metavar": "HOST[:PORT]", "type": _parse_address},
    "arguments": {"metavar": "ARG", "nargs": "*", "type": _parse_value, "help": "positional argument"},
    "--dispatcher": {"metavar": "HOST[:PORT]", "type": _parse_address, "help": "default: $HARP_DISPATCHER"},
    "--named": {
        "metavar": "NAME=ARG",
        "action": "append",
        "default": [],
        "type": _parse_named,
        "help": "named argument",
    },
    "--wait": {"action": "store_true", "help": "wait for the job to end, and print its result instead of its id"},
    "cancel --wait": {"action": "store_true", "help": "wait until the host confirms that the processes have ended"},
    "--reconnect": {
        "metavar": "SECONDS",
        "type": float,
        "help": "how long to try to reach the dispatcher again after an interruption; default: 300, 0: not at all",
    },
    "--queue": {"metavar": "JSON", "type": _parse_value, "help": "name of the queue to wait in, a JSON object"},
    "--concurrency": {"metavar": "N", "type": _parse_value, "help": "jobs of the queue that may run at once"},
    "--timeout": {"metavar": "SECONDS", "type": _parse_value, "help": "longest time without a message from the job"},
    "--max-exec-time": {"metavar": "SECONDS", "type": _parse_value, "help": "longest run time of the job"},
    "--info": {"metavar": "ARG", "type": _parse_value, "help": "stored with the job; printed by status"},
    "--no-wait": {"dest": "wait", "action": "store_false", "help": "do not wait for the job to end"},
    "--since": {"metavar": "N", "type": int, "help": "begin with record N, counted from 0"},
    "--recent": {"metavar": "N", "type": int, "help": "begin with the N newest records"},
    "--numbered": {"action": "store_true", "help": "print pairs [number, record]"},
    "--timed": {"action": "store_true", "help": "print [number, time, record]; time: Unix seconds"},
    "--user": {"required": True, "help": "user to authenticate as"},
    "--ca-file": {
        "metavar": "FILE",
        "help": "PEM file with the certificate's authorities; without it, the certificate is not verified",
    },
}
