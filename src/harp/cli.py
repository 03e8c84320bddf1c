"""The program `harp`: submit calls, look after jobs, call a harpd directly. Results go to standard output as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any

from harp import client, direct
from harp._core.outcomes import CALL_NOT_FINISHED, Result
from harp.errors import CancelledException, CommunicationError, HarpException, RemoteError, RemoteException
from harp.protocol.json_text import InvalidJSON, loads

__all__ = ["Exit", "main"]


class Exit(IntEnum):
    """The exit codes; `harp --help` tells their meaning."""

    OK = 0
    RAISED = 1
    USAGE = 2
    FAILED = 3
    CANCELLED = 4
    NOT_FINISHED = 5
    UNREACHABLE = 6
    INTERRUPTED = 130


_EPILOG = """\
An ARG is JSON, or text when it is not JSON: 5 is a number, five is text, '"5"' is text too.

examples:
  export HARP_DISPATCHER=harp.example.net
  harp call web01 uptime                                submit; prints the job's id
  harp call --wait web01 add 2 3                        submit, wait, print the result
  harp call web01 restart --named service=nginx --queue '{"service": "nginx"}' --concurrency 2
  harp follow JOB --since 0                             records as they come, until the job ends
  harp read JOB --recent 10 --numbered                  records so far, each as [number, record]
  harp result JOB --no-wait                             exit code 5 while it runs
  harp why JOB                                          why it waits or ended, in one sentence
  harp cancel JOB --wait                                until its host has confirmed that all of it is gone
  HARP_PASSWORD=secret harp direct web01 uptime --user admin --ca-file ca.pem

exit codes:
    0  done                                       4  the job was cancelled; cancel: nothing to cancel
    1  the procedure raised an exception          5  the job has not ended yet
    2  wrong usage, or a value can't be sent      6  no connection, or no answer of the protocol
    3  it could not be carried out, or refused  130  Ctrl-C; a job runs on, a direct call is cancelled
"""

_EXITS = (
    (RemoteException, Exit.RAISED),
    (RemoteError, Exit.FAILED),
    (CancelledException, Exit.CANCELLED),
    (CommunicationError, Exit.UNREACHABLE),
    (HarpException, Exit.USAGE),
)


def _value(text: str) -> Any:
    """An argument: JSON, or else text."""
    try:
        return loads(text)
    except InvalidJSON:
        return text


def _named(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=ARG, got {text!r}")
    return name, _value(value)


def _address(text: str) -> dict[str, Any]:
    """HOST, HOST:PORT, [ADDRESS]:PORT or a bare IPv6 address, as `host` and perhaps `port`."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
    else:
        host, _, port = text.partition(":") if text.count(":") == 1 else (text, "", "")
    if not host or (port and not port.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected HOST[:PORT], got {text!r}")
    return {"host": host, "port": int(port)} if port else {"host": host}


def _show(items: Iterable[Any]) -> Exit:
    for item in items:
        print(json.dumps(item.value if isinstance(item, Result) else item), flush=True)
    return Exit.OK


def _dispatcher(options: Namespace) -> client.HarpCaller:
    if options.dispatcher is None:
        raise HarpException("which dispatcher? Give --dispatcher HOST[:PORT] or set HARP_DISPATCHER")
    return client.HarpCaller(**options.dispatcher, reconnect=options.reconnect)


def _job(options: Namespace) -> client.RemoteCall:
    return _dispatcher(options).job(options.job)


def _call(options: Namespace) -> Exit:
    names = ("queue", "concurrency", "timeout", "max_exec_time", "info")
    dispatcher = _dispatcher(options)
    host = dispatcher.host(options.host, **{name: getattr(options, name) for name in names})
    job = client.RemoteProcedure(dispatcher, host, options.procedure)(*options.arguments, **dict(options.named))
    if options.wait:
        return _show([job.get()])
    print(job.id())
    return Exit.OK


def _result(options: Namespace) -> Exit:
    result = _job(options).get(wait=options.wait)
    return Exit.NOT_FINISHED if result is CALL_NOT_FINISHED else _show([result])


def _status(options: Namespace) -> Exit:
    job = _job(options)
    end, start = job.end_time(), job.start_time()
    call = {"host": job.host(), "procedure": job.procedure(), "arguments": job.args()}
    time = {"submit": job.submit_time(), "start": start, "end": end}
    return _show([{"call": call, "time": time, "info": job.info()}])


def _records(options: Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("since", "recent", "numbered", "timed")}


def _why(options: Namespace) -> Exit:
    print(_job(options).why())
    return Exit.OK


def _cancel(options: Namespace) -> Exit:
    cancelled = _job(options).cancel(wait=options.wait)
    print(json.dumps(cancelled))
    return Exit.OK if cancelled else Exit.CANCELLED


def _direct(options: Namespace) -> Exit:
    password = os.environ.get("HARP_PASSWORD")
    if password is None:
        raise HarpException("which password? Set HARP_PASSWORD")
    server = direct.HarpServer(user=options.user, password=password, ca_file=options.ca_file, **options.address)
    result = direct.HarpProcedure(server, options.procedure)(*options.arguments, **dict(options.named))
    return _show(result if isinstance(result, direct.HarpStreamIterator) else [result])


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "address": {"metavar": "HOST[:PORT]", "type": _address},
    "arguments": {"metavar": "ARG", "nargs": "*", "type": _value, "help": "positional argument"},
    "--dispatcher": {"metavar": "HOST[:PORT]", "type": _address, "help": "default: $HARP_DISPATCHER"},
    "--named": {"metavar": "NAME=ARG", "action": "append", "default": [], "type": _named, "help": "named argument"},
    "--wait": {"action": "store_true", "help": "wait for the job to end and print its result instead"},
    "cancel --wait": {"action": "store_true", "help": "wait until its host has confirmed that its processes are gone"},
    "--reconnect": {
        "metavar": "SECONDS",
        "type": float,
        "help": "how long to try to reach the dispatcher again when it was lost; default: 300, 0: not at all",
    },
    "--queue": {"metavar": "JSON", "type": _value, "help": "the queue to wait in, an object"},
    "--concurrency": {"metavar": "N", "type": _value, "help": "jobs of the queue that may run at once"},
    "--timeout": {"metavar": "SECONDS", "type": _value, "help": "longest silence of the job"},
    "--max-exec-time": {"metavar": "SECONDS", "type": _value, "help": "longest run of the job"},
    "--info": {"metavar": "ARG", "type": _value, "help": "given back by status"},
    "--no-wait": {"dest": "wait", "action": "store_false", "help": "don't wait for the job to end"},
    "--since": {"metavar": "N", "type": int, "help": "from record N on, counted from 0"},
    "--recent": {"metavar": "N", "type": int, "help": "from the N newest records on"},
    "--numbered": {"action": "store_true", "help": "print pairs [number, record]"},
    "--timed": {"action": "store_true", "help": "print [number, time, record]; time: Unix seconds"},
    "--user": {"required": True, "help": "user to authenticate as"},
    "--ca-file": {"metavar": "FILE", "help": "authorities of the certificate; without, it is not verified"},
}

_JOB = "--queue --concurrency --timeout --max-exec-time --info"
_STREAM = "job --since --recent --numbered --timed"
_COMMANDS: dict[str, tuple[Callable[[Namespace], Exit], str, str]] = {
    "call": (_call, "submit a job; prints its id", f"host procedure arguments --named --wait {_JOB}"),
    "result": (_result, "wait for a job to end and print its result", "job --no-wait"),
    "status": (_status, "print what a job is, and when it was submitted, started, ended", "job"),
    "details": (
        lambda options: _show([_job(options).details()]),
        "print all that is known of a job: what it waits for, its call, how it was stopped, how it ended",
        "job",
    ),
    "why": (_why, "say in one sentence why a job waits, runs or ended", "job"),
    "follow": (
        lambda options: _show(_job(options).follow(**_records(options))),
        "print a job's records as they come, until it ends",
        _STREAM,
    ),
    "read": (
        lambda options: _show(_job(options).stream(**_records(options))),
        "print a job's records so far",
        _STREAM,
    ),
    "cancel": (_cancel, "cancel a job; prints whether that stopped it", "job --wait"),
    "direct": (
        _direct,
        "call a procedure on a harpd; the password is in $HARP_PASSWORD",
        "address procedure arguments --named --user --ca-file",
    ),
}


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="harp", description=__doc__, epilog=_EPILOG, formatter_class=form)
    parser.add_argument("--dispatcher", default=os.environ.get("HARP_DISPATCHER"), **_ARGUMENTS["--dispatcher"])
    parser.add_argument("--reconnect", default=300.0, **_ARGUMENTS["--reconnect"])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, text, arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, epilog=_EPILOG, formatter_class=form)
        command.set_defaults(run=run)
        for argument in ("--dispatcher", "--reconnect"):
            command.add_argument(argument, default=argparse.SUPPRESS, **_ARGUMENTS[argument])
        for argument in arguments.split():
            settings = _ARGUMENTS.get(f"{name} {argument}") or _ARGUMENTS.get(argument, {"metavar": argument.upper()})
            command.add_argument(argument, **settings)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    sys.setrecursionlimit(10_000)  # values may be nested as deep as the protocol allows
    options = _parser().parse_args(arguments)
    try:
        return Exit(options.run(options))
    except HarpException as error:
        data = getattr(error, "data", None)
        print(f"harp: {error}" if data is None else f"harp: {error} {json.dumps(data)}", file=sys.stderr)
        return next(code for kind, code in _EXITS if isinstance(error, kind))
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:  # who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
