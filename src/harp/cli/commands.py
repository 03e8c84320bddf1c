"""The program's commands: each takes the parsed arguments, prints its output and returns the exit code."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from harp import client, direct
from harp._core.outcomes import CALL_NOT_FINISHED
from harp.cli.arguments import Command
from harp.cli.output import Exit, print_stream, print_values
from harp.errors import HarpException


def _dispatcher(options: Namespace) -> client.HarpCaller:
    if options.dispatcher is None:
        raise HarpException("no dispatcher: use --dispatcher HOST[:PORT] or set HARP_DISPATCHER")
    return client.HarpCaller(**options.dispatcher, reconnect=options.reconnect)


def _job(options: Namespace) -> client.RemoteCall:
    return _dispatcher(options).job(options.job)


def _call(options: Namespace) -> Exit:
    names = ("queue", "concurrency", "timeout", "max_exec_time", "info")
    dispatcher = _dispatcher(options)
    host = dispatcher.host(options.host, **{name: getattr(options, name) for name in names})
    job = client.RemoteProcedure(dispatcher, host, options.procedure)(*options.arguments, **dict(options.named))
    if options.wait:
        return print_values(job.get())
    print(job.id())
    return Exit.OK


def _result(options: Namespace) -> Exit:
    result = _job(options).get(wait=options.wait)
    return Exit.NOT_FINISHED if result is CALL_NOT_FINISHED else print_values(result)


def _status(options: Namespace) -> Exit:
    job = _job(options)
    end, start = job.end_time(), job.start_time()
    call = {"host": job.host(), "procedure": job.procedure(), "arguments": job.args()}
    time = {"submit": job.submit_time(), "start": start, "end": end}
    return print_values({"call": call, "time": time, "info": job.info()})


def _details(options: Namespace) -> Exit:
    return print_values(_job(options).details())


def _why(options: Namespace) -> Exit:
    print(_job(options).why())
    return Exit.OK


def _follow(options: Namespace) -> Exit:
    return print_stream(_job(options).follow(**_stream_options(options)))


def _read(options: Namespace) -> Exit:
    return print_stream(_job(options).stream(**_stream_options(options)))


def _stream_options(options: Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("since", "recent", "numbered", "timed")}


def _cancel(options: Namespace) -> Exit:
    cancelled = _job(options).cancel(wait=options.wait)
    print_values(cancelled)
    return Exit.OK if cancelled else Exit.CANCELLED


def _direct(options: Namespace) -> Exit:
    password = os.environ.get("HARP_PASSWORD")
    if password is None:
        raise HarpException("no password: set HARP_PASSWORD")
    server = direct.HarpServer(user=options.user, password=password, ca_file=options.ca_file, **options.address)
    result = direct.HarpProcedure(server, options.procedure)(*options.arguments, **dict(options.named))
    return print_stream(result) if isinstance(result, direct.HarpStreamIterator) else print_values(result)


_JOB = "--queue --concurrency --timeout --max-exec-time --info"
_STREAM = "job --since --recent --numbered --timed"

#: The commands, with their help and the names of their arguments.
COMMANDS = (
    Command("call", _call, "submit a job and print its id", f"host procedure arguments --named --wait {_JOB}"),
    Command("result", _result, "wait for a job to end and print its result", "job --no-wait"),
    Command("status", _status, "print a job's call, and when it was submitted, started and ended", "job"),
    Command("details", _details, "print all that is known about a job: queue, host, call, stop report, end", "job"),
    Command("why", _why, "explain in one sentence why a job waits, runs or ended", "job"),
    Command("follow", _follow, "print a job's records as they arrive, until it ends", _STREAM),
    Command("read", _read, "print a job's records so far", _STREAM),
    Command("cancel", _cancel, "cancel a job and print whether this stopped it", "job --wait"),
    Command(
        "direct",
        _direct,
        "call a procedure on a harpd; the password is read from $HARP_PASSWORD",
        "address procedure arguments --named --user --ca-file",
    ),
)
