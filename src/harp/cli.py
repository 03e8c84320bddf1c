"""The program `harp`: submit calls, manage jobs, call a harpd directly. Results go to standard output as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from enum import IntEnum
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TextIO

from harp import __version__, client, direct
from harp._core.values import CALL_NOT_FINISHED, ID_LENGTH, Result, Secret, check_token
from harp.contexts import Context, config_file, context_names, read_context, read_token
from harp.errors import (
    AccessDenied,
    AuthenticationFailed,
    CancelledException,
    CommunicationError,
    HarpException,
    NotSupported,
    RateLimited,
    RemoteError,
    RemoteException,
)
from harp.protocol.dispatcher import COUNTED_BY
from harp.protocol.json_text import InvalidJSON, loads
from harp.protocol.printing import print_escaped

if TYPE_CHECKING:
    from harp._terminal import completion

_EPILOG = """\
An ARG is JSON, or text if it is not valid JSON: 5 is a number, five is text, '"5"' is text, too.

examples:
  export HARP_DISPATCHER=harp.example.net
  harp call web01 uptime                                submit a job; print its id
  harp call --wait web01 add 2 3                        submit, wait, print the result
  harp call --follow web01 count 3                      print the records, then the result
  harp call web01 restart --named service=nginx --queue '{"service": "nginx"}' --concurrency 2
  harp follow JOB --since 0                             print records until the job ends; exit like result
  harp read JOB --recent 10 --numbered                  stored records, each as [number, record]
  harp result JOB --no-wait                             exit code 5 while the job runs
  harp why JOB                                          why it waits, runs or ended
  harp cancel JOB --wait                                wait until the host confirms the stop
  harp jobs                                             the newest jobs
  harp jobs backup state:bad from:-12h                  jobs of the last 12 hours that went wrong, with this word
  harp show JOB                                         why, times, how it ended, what to do, last records
  harp show backup state:bad                            the same of the newest job that matches
  harp jobs 'host:web*' state:open --watch              on a terminal, always as it is now
  harp jobs --count state                               how many jobs are in which state
  harp --context prod why JOB                           by a context of ~/.config/harp/config.toml
  harp call web01 set_password --named user=alice --secret password=@new_password.txt
  HARP_PASSWORD=secret harp direct web01 uptime --user admin --ca-file ca.pem

states of jobs:
  queued, running; then returned, raised (the procedure raised an exception), failed (the job did not start, or was
  stopped or lost) or cancelled. In filters, open is queued and running, ended all others, bad raised and failed.

exit codes:
    0  success                                    5  the job has not ended
    1  the procedure raised an exception          6  no connection, an invalid reply, or refused for now
    2  wrong usage, or a value without JSON form  7  the output cannot be written
    3  the job failed, or does not exist          8  the token is not accepted, or access is denied
    4  the job was cancelled; cancel: it had already ended
  130  Ctrl-C; a job continues, a direct call is cancelled
"""


class Exit(IntEnum):
    """The exit codes; `harp --help` explains them."""

    OK = 0
    RAISED = 1
    USAGE = 2
    FAILED = 3
    CANCELLED = 4
    NOT_FINISHED = 5
    UNREACHABLE = 6
    NOT_WRITTEN = 7
    DENIED = 8
    INTERRUPTED = 130


#: What to do about an error, by its type: a second line on stderr. docs/protocol.md has every type.
_ADVICE = {
    "access_denied": "no rule of the dispatcher's access file allows it to this client, which has sent no token: use "
    "--token-file FILE or HARP_TOKEN; `harpcallerd access test` explains a decision",
    "auth_error": "the users file of harpd on the host must have this user and password; "
    "the dispatcher takes both from its hosts registry",
    "no_such_procedure": "`harpd status` on the host prints its procedures; reload harpd after a change of its file",
    "procedure_loading_error": "`harpd --test` on the host prints the error",
    "unknown_host": "`harpcallerd hosts-refresh` reads the registry again and prints rejected lines; "
    "`harpcallerd hosts-list` prints the hosts",
    "network_error": "check that harpd runs on the host, and its address, port and firewall",
}

#: The same for requests that were refused.
_ADVICE_FOR_REFUSALS: dict[type[HarpException], str] = {
    AuthenticationFailed: "--token-file, HARP_TOKEN or the context must have a valid token; on the dispatcher, "
    "`harpcallerd token list` prints names and ends, `harpcallerd token add NAME` makes one",
    AccessDenied: "on the dispatcher, `harpcallerd access test` explains the decision, `harpcallerd access who` prints "
    "who is allowed; without an access file, lists need a token: `harpcallerd token add NAME --role=viewer`, or root "
    "on a Unix socket of `listen`",
    RateLimited: "the limits of this client are in the access file of the dispatcher: `harpcallerd access explain`",
}

_EXITS = (
    (AuthenticationFailed, Exit.DENIED),
    (AccessDenied, Exit.DENIED),
    (RemoteException, Exit.RAISED),
    (RemoteError, Exit.FAILED),
    (CancelledException, Exit.CANCELLED),
    (CommunicationError, Exit.UNREACHABLE),
    (HarpException, Exit.USAGE),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    sys.setrecursionlimit(10_000)  # values may be nested as deeply as the protocol allows
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it is closed; `print` would print errors on stdout then
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the exit
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may have any characters
    try:
        try:
            given = sys.argv[1:] if arguments is None else arguments
            if given[:1] == ["complete-line"]:
                return _complete_line(given[1:])
            options = _parse_arguments(given)
            return Exit(options.run(options))
        finally:
            sys.stdout.flush()  # also the output of --help and --version
    except HarpException as error:
        data = getattr(error, "data", None)
        _report(f"{error}" if data is None else f"{error} {json.dumps(data)}")
        if advice := _advice(error):
            _report(advice)
        return next(code for kind, code in _EXITS if isinstance(error, kind))
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except OSError as error:
        _discard(sys.stdout)
        if isinstance(error, BrokenPipeError):  # the reader of our output has closed it
            return Exit.OK
        _report(f"cannot write the output: {error.strerror}")
        return Exit.NOT_WRITTEN


def _advice(error: HarpException) -> str | None:
    """Return what to do about an error, if its message does not have that."""
    if isinstance(error, RemoteError):
        return _ADVICE.get(error.type)
    if isinstance(error, RateLimited) and error.retry_after is not None:
        return f"try again in {error.retry_after:g} s; {_ADVICE_FOR_REFUSALS[RateLimited]}"
    if type(error) in _ADVICE_FOR_REFUSALS:
        return _ADVICE_FOR_REFUSALS[type(error)]
    if isinstance(error, CommunicationError) and " requires TLS; " in str(error):
        return "use --ca-file FILE, or --tls if an authority of this system has issued the dispatcher's certificate"
    if isinstance(error, CommunicationError) and ": cannot connect: " in str(error):
        return "check that the daemon runs there and listens on this address (settings `listen`, `network.address`)"
    if isinstance(error, CommunicationError) and ": cannot resolve the name: " in str(error):
        return "check the name of the dispatcher: --dispatcher, HARP_DISPATCHER, or the context"
    return None


def _report(message: str) -> None:
    """Print a message on stderr. If this fails, the exit code still has its meaning."""
    try:
        print_escaped(f"harp: {message}", file=sys.stderr)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Discard the unwritten data of a stream; otherwise Python tries again at the exit and changes the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_value(value: Any) -> Exit:
    """Print a value as a line of JSON."""
    print_escaped(json.dumps(value.value if isinstance(value, Result) else value), flush=True)
    return Exit.OK


def _print_all(values: Iterable[Any]) -> int:
    """Print each value on a line of its own; return how many there were."""
    number = 0
    for value in values:
        _print_value(value)
        number += 1
    return number


# The commands: each prints its output and returns the exit code.


class _Caller(client.HarpCaller):
    def _on_outage(self, error: HarpException) -> None:
        _report(f"{error}; reconnecting")


def _dispatcher(options: Namespace) -> client.HarpCaller:
    return _Caller(**_connection(options), keep_alive=False)


def _connection(options: Namespace) -> dict[str, Any]:
    """Return the arguments of `HarpCaller` that the options, the environment and the configuration file name."""
    context = _context(options)
    token_file = options.token_file or context.token_file
    return {
        **_check_dispatcher(context.dispatcher),
        "reconnect": options.reconnect,
        "request_timeout": options.request_timeout or None,
        "token": _token_of_environment() if token_file is None else read_token(token_file),
        "ca_file": options.ca_file or context.ca_file,
        "certfile": options.certfile or context.certfile,
        "keyfile": options.keyfile or (None if options.certfile else context.keyfile),
        "tls": options.tls or context.tls,
    }


def _context(options: Namespace) -> Context:
    """Return the dispatcher that the options, the environment or the configuration file name, in this order."""
    if options.context is not None and options.dispatcher is not None:
        raise HarpException("--context: it excludes --dispatcher, because it has the address of a dispatcher")
    if options.context is None:
        if options.dispatcher is not None:
            return Context(options.dispatcher)
        if os.environ.get("HARP_DISPATCHER"):
            return Context(os.environ["HARP_DISPATCHER"])
    file = config_file(os.environ)
    context = read_context(file, options.context, _check_dispatcher)
    if context is None:
        hint = "use --dispatcher HOST[:PORT] or unix:/PATH, or set HARP_DISPATCHER, or `default` in"
        raise HarpException(f"no dispatcher: {hint} {file}")
    return context


def _token_of_environment() -> str | None:
    try:
        return check_token(os.environ["HARP_TOKEN"]) if os.environ.get("HARP_TOKEN") else None
    except HarpException as error:
        raise HarpException(f"HARP_TOKEN: {error}") from None


def _check_dispatcher(text: str) -> dict[str, Any]:
    """Return the address of a dispatcher, as `_parse_address` does; ``unix:/PATH`` is the host."""
    try:
        return {"host": text} if text.startswith("unix:/") else _parse_address(text)
    except argparse.ArgumentTypeError as error:
        raise HarpException(str(error)) from error


def _named(options: Namespace) -> dict[str, Any]:
    """Return the named arguments of a call, with secret ones. Raise `HarpException` if one is given twice."""
    names = [name for name, _ in (*options.named, *options.secrets)]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise HarpException(f"named argument {repeated[0]!r}: it is given twice")
    return {**dict(options.named), **{name: Secret(_read_secret(name, source)) for name, source in options.secrets}}


def _read_secret(name: str, source: str | None) -> str:
    """Return a text from ``@FILE``, ``-`` (standard input) or ``fd:N``, without its last line end; None: ask for it."""
    try:
        if source is None:
            return _ask_for_secret(name)
        opened: str | int = source[1:] if source[0] == "@" else 0 if source == "-" else int(source.removeprefix("fd:"))
        with open(opened, "rb", closefd=opened != 0) as file:
            text = file.read().decode()
    except OSError as error:
        raise HarpException(f"--secret {name}: cannot read {source}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise HarpException(f"--secret {name}: cannot read {source}: not UTF-8") from None
    return text.removesuffix("\n").removesuffix("\r")


def _ask_for_secret(name: str) -> str:
    import getpass
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it would be visible
            return getpass.getpass(f"{name}: ")
    except (EOFError, getpass.GetPassWarning):
        raise HarpException(
            f"--secret {name}: no terminal to ask for it; use {name}=@FILE, {name}=- or {name}=fd:N"
        ) from None


def _job(options: Namespace) -> client.RemoteCall:
    """Return the job whose id, or the beginning of its id, is given. Only a beginning needs a request."""
    caller = _dispatcher(options)
    if len(options.job) == ID_LENGTH:
        return caller.job(options.job)
    from harp._terminal.lists import find_id

    try:
        return caller.job(find_id(caller, options.job) or options.job)
    except NotSupported:  # an older dispatcher knows whole ids only
        return caller.job(options.job)


def _call(options: Namespace) -> Exit:
    names = ("queue", "concurrency", "timeout", "max_exec_time", "info", "start_within", "request_id")
    dispatcher = _dispatcher(options)
    host = dispatcher.host(options.host, **{name: getattr(options, name) for name in names})
    job = client.RemoteProcedure(dispatcher, host, options.procedure)(*options.arguments, **_named(options))
    if not (options.wait or options.follow):
        print_escaped(job.id(), flush=True)
        return Exit.OK
    try:
        if options.follow:
            _print_all(job.follow(since=0))
        return _print_value(job.get())
    except KeyboardInterrupt:
        _report(f"job {job.id()} continues; see harp result, follow and cancel")
        raise


def _result(options: Namespace) -> Exit:
    result = _job(options).get(wait=options.wait)
    return Exit.NOT_FINISHED if result is CALL_NOT_FINISHED else _print_value(result)


def _status(options: Namespace) -> Exit:
    job = _job(options)
    end, start = job.end_time(), job.start_time()
    call = {"host": job.host(), "procedure": job.procedure(), "arguments": job.args()}
    time = {"submit": job.submit_time(), "start": start, "end": end}
    return _print_value({"call": call, "time": time, "info": job.info()})


def _details(options: Namespace) -> Exit:
    return _print_value(_job(options).details())


def _why(options: Namespace) -> Exit:
    print_escaped(_job(options).why())
    return Exit.OK


def _records(options: Namespace) -> Exit:
    job = _job(options)
    read = job.follow if options.command == "follow" else job.stream
    number = _print_all(read(options.since, options.recent, options.numbered, timed=options.timed))
    if options.command == "follow":
        if number == 0 and options.since is None and options.recent is None:
            _report("the job has ended, and no record came; harp read prints those that were stored before")
        job.get()  # raises how the job ended
    return Exit.OK


def _cancel(options: Namespace) -> Exit:
    job = _job(options)
    cancelled = job.cancel(wait=options.wait)
    if not cancelled:
        job.submit_time()  # raises if there is no such job: the reply to a cancel is the same for one that has ended
    _print_value(cancelled)
    return Exit.OK if cancelled else Exit.CANCELLED


def _direct(options: Namespace) -> Exit:
    password = os.environ.get("HARP_PASSWORD")
    if password is None:
        raise HarpException("no password: set HARP_PASSWORD")
    if options.ca_file is None and not options.insecure:
        raise HarpException("nothing verifies the server: use --ca-file FILE, or --insecure to accept any certificate")
    if options.ca_file is not None and options.insecure:
        raise HarpException("--insecure: it excludes --ca-file, which verifies the server")
    access = {"user": options.user, "password": password, "ca_file": options.ca_file, "keep_alive": False}
    tls = {"tls_minimum": options.tls_minimum, "verify_hostname": options.verify_hostname}
    server = direct.HarpServer(**options.address, **access, **tls)
    result = direct.HarpProcedure(server, options.procedure)(*options.arguments, **_named(options))
    if not isinstance(result, direct.HarpStreamIterator):
        return _print_value(result)
    _print_all(result)
    return Exit.OK


# The commands of lists load what they need: others start faster without it.


def _list(options: Namespace) -> Exit:
    from harp._terminal import lists

    functions = {"jobs": lists.list_jobs, "hosts": lists.list_hosts, "queues": lists.list_queues}
    functions[options.command](_Caller(**_connection(options)), options)
    return Exit.OK


def _show(options: Namespace) -> Exit:
    from harp._terminal.job_page import show_job

    show_job(_Caller(**_connection(options)), options, _ADVICE.get)
    return Exit.OK


def _completion(options: Namespace) -> Exit:
    from harp._terminal.completion import SCRIPTS

    sys.stdout.write(SCRIPTS[options.shell])
    return Exit.OK


def _complete_line(arguments: Sequence[str]) -> Exit:
    """Print the completions of a command line: the name of the shell, ``--``, and the words up to the cursor."""
    from harp._terminal import completion

    def connect(words: Sequence[str]) -> client.HarpCaller:
        parser = argparse.ArgumentParser(add_help=False)
        for argument in _CONNECTION:
            parser.add_argument(argument, **{**_ARGUMENTS[argument], "default": _DEFAULTS.get(argument)})
        return completion.caller_with_deadline(_connection(parser.parse_known_args(words)[0]))

    shell, _, *words = arguments
    commands = {name: (help, _describe(name, names)) for name, _, help, names in _COMMANDS}
    common = _describe("", " ".join(_CONNECTION)).options
    program = completion.Program(commands, common, connect, lambda: context_names(config_file(os.environ)))
    for line in completion.print_lines(shell, words, completion.complete(program, words)):
        print(line)
    return Exit.OK


def _describe(command: str, names: str) -> completion.Arguments:
    """Return the arguments of a command for completions."""
    from harp._terminal.completion import Arguments

    found = {name: _settings(command, name) for name in names.split()}
    options = {
        name: None if settings.get("action") in ("store_true", "store_false") else settings.get("metavar", "VALUE")
        for name, settings in found.items()
        if name.startswith("-")
    }
    return Arguments([name for name in found if not name.startswith("-")], options)


# The command line.


def _parse_value(text: str) -> Any:
    """Return an argument's value: JSON, or else the text. Raises `ArgumentTypeError` if an object repeats a key."""
    try:
        value = loads(text)
    except InvalidJSON:
        return text
    if isinstance(value, (dict, list)):
        json.loads(text, object_pairs_hook=_check_keys)
    return value


def _check_keys(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Otherwise, `json` would keep the last member of a name, and drop the others."""
    found = dict(members)
    if len(found) < len(members):
        names = [name for name, _ in members]
        repeated = next(name for name in names if names.count(name) > 1)
        raise argparse.ArgumentTypeError(f"repeated key {json.dumps(repeated)} in an object")
    return found


def _parse_named(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=ARG, got {text!r}")
    return name, _parse_value(value)


def _parse_secret(text: str) -> tuple[str, str | None]:
    """Return the name and the source of a secret argument. No error quotes the source: it may be the secret."""
    name, equals, source = text.partition("=")
    if not name:
        raise argparse.ArgumentTypeError("expected NAME=@FILE, NAME=-, NAME=fd:N or NAME")
    if not equals:
        return name, None
    is_descriptor = source[:3] == "fd:" and source[3:].isdecimal() and len(source) < 12
    if source == "-" or (source[:1] == "@" and source[1:]) or is_descriptor:
        return name, source
    use = f"use {name}=@FILE, {name}=- for standard input, {name}=fd:N, or only {name} to be asked"
    raise argparse.ArgumentTypeError(f"a secret cannot be an argument, which other users can see: {use}")


def _parse_dispatcher(text: str) -> str:
    try:
        _check_dispatcher(text)
    except HarpException as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError("expected a number of seconds of at least 0")
    return seconds


def _parse_count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("expected an integer of at least 0")
    return int(text)


def _parse_columns(text: str) -> tuple[str, ...]:
    from harp._terminal.lists import parse_columns

    try:
        return parse_columns(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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


def _parse_arguments(arguments: Sequence[str]) -> Namespace:
    """Return the program's arguments. An ARG may be a negative number of any form, and may follow an option."""
    parser = _make_parser()
    # argparse takes -5.5e3 for an option, but not with a space in front.
    marked = [f" {each}" if each[:1] == "-" and not isinstance(_parse_value(each), str) else each for each in arguments]
    options, rest = parser.parse_known_args(marked)
    takes_more = hasattr(options, "arguments") or hasattr(options, "words")
    if rest and (not takes_more or any(each.startswith("-") for each in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and hasattr(options, "words"):
        options.words = [*options.words, *rest]
    elif rest:
        try:
            options.arguments = [*options.arguments, *map(_parse_value, rest)]
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument ARG: {error}")
    return options


#: Settings of arguments by name; ``COMMAND NAME`` for an argument with another meaning in this command.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "address": {"metavar": "HOST[:PORT]", "type": _parse_address},
    "arguments": {"metavar": "ARG", "nargs": "*", "default": (), "type": _parse_value, "help": "positional argument"},
    "--dispatcher": {
        "metavar": "HOST[:PORT]",
        "type": _parse_dispatcher,
        "help": "or unix:/PATH; default: $HARP_DISPATCHER, or the default context",
    },
    "--context": {"metavar": "NAME", "help": "the dispatcher of a context in ~/.config/harp/config.toml"},
    "--token-file": {"metavar": "FILE", "help": "file with the token of this client; default: $HARP_TOKEN"},
    "--tls": {"action": "store_true", "help": "use TLS; without --ca-file, with the authorities of this system"},
    "--ca-file": {"metavar": "FILE", "help": "use TLS; PEM file of the authorities of the dispatcher's certificate"},
    "--certfile": {"metavar": "FILE", "help": "use TLS; PEM file with the certificate of this client"},
    "--keyfile": {"metavar": "FILE", "help": "PEM file with the key of --certfile; default: it is in the same file"},
    "--request-timeout": {
        "metavar": "SECONDS",
        "type": _parse_seconds,
        "help": "how long a request may take that does not wait for a job; default: 30, 0: any time",
    },
    "--secret": {
        "metavar": "NAME[=SOURCE]",
        "dest": "secrets",
        "action": "append",
        "default": [],
        "type": _parse_secret,
        "help": "named argument that the dispatcher encrypts, a text: @FILE, - for standard input, fd:N for a "
        "descriptor; without SOURCE, the program asks for it",
    },
    "--named": {
        "metavar": "NAME=ARG",
        "action": "append",
        "default": [],
        "type": _parse_named,
        "help": "named argument",
    },
    "--wait": {"action": "store_true", "help": "wait for the job to end, and print its result instead of its id"},
    "--follow": {"action": "store_true", "help": "wait for the job to end, and print its records, then its result"},
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
    "--start-within": {
        "metavar": "SECONDS",
        "type": _parse_value,
        "help": "how long to try the start again if it certainly did not happen; 0: not at all",
    },
    "--info": {"metavar": "ARG", "type": _parse_value, "help": "stored with the job; printed by status"},
    "--request-id": {"metavar": "ID", "help": "new for each job: with the same one, the command submits no second job"},
    "--no-wait": {"dest": "wait", "action": "store_false", "help": "do not wait for the job to end"},
    "--since": {"metavar": "N", "type": int, "help": "begin with record N, counted from 0"},
    "--recent": {"metavar": "N", "type": int, "help": "begin with the N newest records"},
    "--numbered": {"action": "store_true", "help": "print pairs [number, record]"},
    "--timed": {"action": "store_true", "help": "print [number, time, record]; time: Unix seconds"},
    "--user": {"required": True, "help": "user to authenticate as"},
    "direct --ca-file": {"metavar": "FILE", "help": "PEM file of the certificate's authorities; needed, or --insecure"},
    "--tls-minimum": {"metavar": "VERSION", "default": "1.2", "help": "1.0, 1.1, 1.2 or 1.3; default: 1.2"},
    "--insecure": {
        "action": "store_true",
        "help": "without --ca-file: accept any certificate; another server may get the password",
    },
    "--no-verify-hostname": {
        "dest": "verify_hostname",
        "action": "store_false",
        "help": "accept a certificate of the authorities for any host",
    },
}

_FORMAT = {
    "metavar": "FORMAT",
    "choices": ("table", "json", "lines"),
    "help": "table, json (an array) or lines (JSON, one per line); default: table on a terminal, otherwise lines",
}
_ARGUMENTS |= {
    "job": {"metavar": "JOB", "help": "a job id, or at least 8 characters of its beginning"},
    "words": {"metavar": "WORD", "nargs": "*", "default": (), "help": "a part of the name"},
    "jobs words": {
        "metavar": "WORD",
        "nargs": "*",
        "default": (),
        "help": "KEY:VALUE, such as state:bad (raised or failed), host:web*, from:-12h, from:yesterday; or a text in "
        "procedure, host, info or message; arguments:TEXT looks in the arguments",
    },
    "show words": {"metavar": "JOB", "nargs": "+", "help": "a job id, its beginning, or words as of harp jobs"},
    "show --recent": {
        "metavar": "N",
        "type": _parse_count,
        "default": 10,
        "help": "how many of the newest records to print; default: 10",
    },
    "--format": _FORMAT,
    "--limit": {"metavar": "N", "type": _parse_count, "help": "how many to print; 0: all; default of a table: 20"},
    "hosts --limit": {"metavar": "N", "type": _parse_count, "help": "how many to print; default: all"},
    "queues --limit": {"metavar": "N", "type": _parse_count, "help": "how many to print; default: all"},
    "--oldest": {"action": "store_true", "help": "the oldest jobs first"},
    "--columns": {
        "metavar": "NAMES",
        "type": _parse_columns,
        "default": ("job", "state", "host", "procedure", "submitted", "took", "end"),
        "help": "columns of the table, such as job,state,owner,end; an unknown one lists all",
    },
    "--count": {
        "metavar": "KEY",
        "choices": COUNTED_BY,
        "help": f"print numbers of jobs by one of {', '.join(COUNTED_BY)}",
    },
    "--watch": {"action": "store_true", "help": "update the table until Ctrl-C; in a pipe, print jobs that change"},
    "--interval": {"metavar": "SECONDS", "type": _parse_seconds, "default": 2.0, "help": "of --watch; default: 2"},
    "shell": {"metavar": "SHELL", "choices": ("bash", "zsh", "fish"), "help": "bash, zsh or fish"},
}

#: The options of every command that uses a dispatcher, before or after the command, and their defaults.
_CONNECTION = (
    *("--dispatcher", "--context", "--token-file", "--tls", "--ca-file", "--certfile", "--keyfile"),
    *("--reconnect", "--request-timeout"),
)
_DEFAULTS = {"--reconnect": 300.0, "--request-timeout": 30.0}

_JOB = "--queue --concurrency --timeout --max-exec-time --info --start-within --request-id"
_DIRECT = "address procedure arguments --named --secret --user --insecure --tls-minimum --no-verify-hostname"
_STREAM = "job --since --recent --numbered --timed"

#: The commands: name, function, help, names of the arguments.
_COMMANDS = (
    (
        "call",
        _call,
        "submit a job and print its id",
        f"host procedure arguments --named --secret --wait --follow {_JOB}",
    ),
    ("result", _result, "wait for a job to end and print its result", "job --no-wait"),
    ("status", _status, "print a job's call, and when it was submitted, started and ended", "job"),
    ("details", _details, "print all that is known about a job: queue, host, call, stop report, end", "job"),
    ("why", _why, "explain in one sentence why a job waits, runs or ended", "job"),
    (
        "follow",
        _records,
        "print a job's records that arrive from now on, until it ends; all of them with --since 0",
        _STREAM,
    ),
    ("read", _records, "print a job's stored records, also after its end", _STREAM),
    ("cancel", _cancel, "cancel a job and print whether this stopped it", "job --wait"),
    (
        "jobs",
        _list,
        "list jobs, the newest first",
        "words --columns --limit --oldest --count --watch --interval --format",
    ),
    ("show", _show, "print a job: why, times, how it ended and what to do, last records", "words --recent --format"),
    (
        "hosts",
        _list,
        "list the hosts of the registry; `harpd status` on a host prints its procedures",
        "words --limit --format",
    ),
    ("queues", _list, "list queues with jobs that wait or run", "words --limit --format"),
    ("completion", _completion, "print a script that completes commands, jobs and hosts in a shell", "shell"),
    ("direct", _direct, "call a procedure on a harpd; the password is read from $HARP_PASSWORD", _DIRECT),
)


def _make_parser() -> argparse.ArgumentParser:
    """Return the parser of the program's arguments, which sets `run` to that of the given command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="harp", description=__doc__, epilog=_EPILOG, formatter_class=form)
    for argument in _CONNECTION:
        parser.add_argument(argument, **{"default": _DEFAULTS.get(argument), **_ARGUMENTS[argument]})
    parser.add_argument("--version", action="version", version=f"harp {__version__}", help="print the version")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, help, arguments in _COMMANDS:
        subparser = subparsers.add_parser(name, help=help, description=help, epilog=_EPILOG, formatter_class=form)
        subparser.set_defaults(run=run, command=name)
        for argument in ("--dispatcher", "--reconnect", "--ca-file") if name == "direct" else _CONNECTION:
            subparser.add_argument(argument, **{**_settings(name, argument), "default": argparse.SUPPRESS})
        for argument in arguments.split():
            subparser.add_argument(argument, **_settings(name, argument))
    return parser


def _settings(command: str, argument: str) -> dict[str, Any]:
    return _ARGUMENTS.get(f"{command} {argument}") or _ARGUMENTS.get(argument) or {"metavar": argument.upper()}


if __name__ == "__main__":
    sys.exit(main())
