"""The program `harpcallerd`: the dispatcher, and its control program over the control socket."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from harp.protocol.json_text import MAX_LINE_DEPTH, Raw, loads
from harp.protocol.printing import escape_controls, print_escaped
from harp_daemon.audit_commands import add_commands as add_audit_commands
from harp_daemon.audit_commands import run as run_on_audit_file
from harp_daemon.process import ProcessError, detach, occupy_standard_descriptors, pidfile, reset_signals
from harp_daemon.program import add_version, parse_number, written_output
from harp_daemon.settings import ConfigError
from harp_daemon.sliced_json import decode_slices
from harpcaller.access.commands import add_commands, answer_question, parse_queue
from harpcaller.api.control_client import ControlClient, ControlError, NotRunning
from harpcaller.config import DEFAULT_FILE, DEFAULT_MAX_AGE, load
from harpcaller.store import StorageError

_SOCKET = Path("/var/run/harpcaller/control")
_COMMON = ("command", "run", "socket", "config", "test")  # the arguments that are not sent to the daemon
_EXAMPLES = """\
examples:
  harpcallerd start                                     in the foreground, the log on stderr
  harpcallerd start --config=./harpcaller.toml --daemon --pidfile=/run/harpcallerd.pid
                                                        in the background; returns when it serves
  harpcallerd --test --config=./harpcaller.toml         check configuration, certificates, hosts file and script
  harpcallerd status --wait --timeout=10                wait until it serves
  harpcallerd list --all --queue                        all jobs, one JSON object per line
  harpcallerd list --all --newest=100 --host=web01      the last 100 jobs for a host, ended or not
  harpcallerd info --full 3f22e0d4-c8ed-11e5-8d66-001e8c140268
  harpcallerd queue-list                                the names of the queues, one per line
  harpcallerd queue-list '{"service": "nginx"}'         the queued and running jobs of a queue
  harpcallerd queue-cancel '{"service": "nginx"}'       cancel them
  harpcallerd token add shop --role=web --expires=90d   print a new token once; the dispatcher may run or not
  harpcallerd token revoke shop                         it is refused within a second, on open connections, too
  harpcallerd web-login --as=alice --role=viewer        print a link to the console, which can be used once
  harpcallerd --socket=./control stop --print-pid       the daemon that uses this control socket
  harpcallerd access who --host=web07 --procedure=restart_nginx
                                                        who may call it; see: harpcallerd access --help
  harpcallerd audit search --host=web07 --procedure=restart_nginx
                                                        who has called it; see: harpcallerd audit --help

signals:
  HUP         reload the configuration, all or nothing
  USR1        reopen the log files
  TERM, INT   stop; running calls continue on their hosts until the next start, queued jobs stay queued

Options may be given before or after the command.

exit status: 0 success, 1 failure (one line on stderr says why; status: stopped), 2 wrong usage,
3 the output cannot be written
"""


def main(arguments: list[str] | None = None) -> int:
    """Run harpcallerd; return its exit status."""
    occupy_standard_descriptors()
    reset_signals()
    sys.setrecursionlimit(10_000)  # values may be nested as deeply as the protocol allows
    program = parser()
    with written_output("harpcallerd"):  # for --help and --version
        parsed = program.parse_args(_command_first(program, sys.argv[1:] if arguments is None else arguments))
    if parsed.command is None and not parsed.test:
        program.error("the following arguments are required: COMMAND")
    run = _test if parsed.test else parsed.run
    try:
        with nullcontext() if run is _start else written_output("harpcallerd"):
            return int(run(parsed) or 0)
    except (ControlError, ProcessError) as error:
        print_escaped(f"harpcallerd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1


# The commands.


def _start(parsed: Namespace) -> None:
    # Only the daemon needs the event loop, TLS and SQLite: other commands do not wait for these imports.
    from harp_daemon.event_loop import run as run_loop
    from harpcaller.daemon import configure_log, run

    try:
        config = load(parsed.config)  # before detaching, so that errors appear on the terminal
        on_ready = detach() if parsed.daemon else lambda: None
        with pidfile(parsed.pidfile):
            configure_log(config, parsed.debug)
            run_loop(run(config, parsed.socket, on_ready, parsed.debug))
    except (ConfigError, StorageError) as error:
        raise ProcessError(str(error)) from error


def _status(parsed: Namespace) -> int:
    daemon = ControlClient(parsed.socket)
    running = daemon.wait_running(parsed.timeout) if parsed.wait else daemon.is_running()
    if not running:
        print_escaped("harpcallerd is stopped")
        return 1
    (status,) = daemon.send_command("status")
    print_escaped(status.decode() if parsed.full else "harpcallerd is running")
    for check in loads(status).get("checks", ()):
        if not check["ok"]:
            print_escaped(f"harpcallerd: not ready: {check['name']}: {check['detail']}", file=sys.stderr)
    _warn_of_access(status)
    _warn_of_hosts(status)
    return 0


def _stop(parsed: Namespace) -> None:
    try:
        pid = ControlClient(parsed.socket).stop(parsed.timeout)
    except NotRunning as error:
        print_escaped(f"harpcallerd: {error}", file=sys.stderr)  # not a failure: the dispatcher is stopped
        return
    if parsed.print_pid:
        print_escaped(pid)


def _backup(parsed: Namespace) -> None:
    from harpcaller.store.sqlite.backup import back_up

    (status,) = ControlClient(parsed.socket).send_command("status")
    _run_on_store(lambda: back_up(Path(loads(status)["store"]), parsed.file))


def _restore(parsed: Namespace) -> None:
    from harpcaller.store.sqlite.backup import restore

    def run() -> None:
        jobs = restore(parsed.file, load(parsed.config).stream_directory, parsed.queued, time.time())
        if jobs:
            outcome = "cancelled" if parsed.queued == "cancel" else "run when harpcallerd starts"
            print_escaped(f"harpcallerd: {jobs} queued jobs: {outcome}", file=sys.stderr)

    _run_on_store(run)


def _secrets_key(parsed: Namespace) -> None:
    from harpcaller.secret_arguments import add_key

    try:
        print(add_key(parsed.file))
    except ConfigError as error:
        raise ControlError(str(error)) from error
    except OSError as error:
        raise ControlError(f"{error.filename or parsed.file}: {error.strerror}") from error


def _run_on_store(run: Callable[[], None]) -> None:
    try:
        run()
    except (ConfigError, StorageError) as error:
        raise ControlError(str(error)) from error


def _reload(parsed: Namespace) -> int:
    reply = _single_reply(parsed)
    for key in reply["restart_needed"]:
        print_escaped(f"harpcallerd: warning: the change of {key} needs a restart", file=sys.stderr)
    return _print_problems(reply["problems"])


def _hosts_list(parsed: Namespace) -> None:
    _print_reply(parsed)
    (status,) = ControlClient(parsed.socket).send_command("status")
    _warn_of_hosts(status)


def _hosts_refresh(parsed: Namespace) -> int:
    if parsed.diff:
        _print_reply(parsed)
        return 0
    return _print_problems(_single_reply(parsed)["problems"])  # no other output: cron mails it


def _warn_of_hosts(status: Raw) -> None:
    """Print a warning on stderr for each source of hosts with latest contents that are not in use."""
    for source in loads(status)["hosts_registry"].values():
        if isinstance(source, dict) and source["error"] is not None:
            age = "no hosts yet" if source["age"] is None else f"hosts are {source['age']:.0f} s old"
            name = "" if source["source"] in source["error"] else f"{source['source']}: "  # errors of a script have it
            print_escaped(f"harpcallerd: warning: {name}{source['error']} ({age})", file=sys.stderr)


def _warn_of_access(status: Raw) -> None:
    """Print a warning on stderr if the latest contents of the access file are not in use."""
    access = loads(status).get("access")
    if access and access["error"] is not None:
        print_escaped(f"harpcallerd: warning: {access['error']} (rules are {access['age']:.0f} s old)", file=sys.stderr)


def _print_problems(problems: list[str]) -> int:
    """Print the rejected lines and other problems of the hosts registry; return the exit status."""
    for problem in problems:
        print_escaped(f"harpcallerd: hosts registry: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _test(parsed: Namespace) -> int:
    from harpcaller.daemon import check

    try:
        config = load(parsed.config)
        errors, warnings = check(config)
    except ConfigError as error:
        errors, warnings = [str(error)], []
    for warning in warnings:
        print_escaped(f"harpcallerd: warning: {warning}", file=sys.stderr)
    for message in errors:
        print_escaped(f"harpcallerd: {message}", file=sys.stderr)
    if not errors:
        if config.max_age in (DEFAULT_MAX_AGE, None):  # the default, of this or a legacy file
            print_escaped(f"harpcallerd: max_age: {config.describe_max_age()}", file=sys.stderr)
        print_escaped("config OK")
    return 1 if errors else 0


def _send_silently(parsed: Namespace) -> None:
    """Send a command and print no reply: cron, which may run the command, mails all output."""
    _single_reply(parsed)


def _cancel(parsed: Namespace) -> None:
    if not _single_reply(parsed)["cancelled"]:
        raise ControlError(f"job {parsed.job} has ended or does not exist")


def _release_slot(parsed: Namespace) -> None:
    if not _single_reply(parsed)["released"]:
        raise ControlError(f"job {parsed.job} has not ended, holds no slot, or does not exist")


def _queue_list(parsed: Namespace) -> None:
    full = parsed.full
    del parsed.full
    if parsed.queue is not None:
        _print_reply(parsed)
        return
    queues = _send(parsed)
    if not _print_lines(queues if full else (decode_slices(item).payload("queue") for item in queues)):
        print_escaped("harpcallerd: no queue has a queued or running job", file=sys.stderr)


def _queue_cancel(parsed: Namespace) -> None:
    reply = _single_reply(parsed)
    if not reply["cancelled"]:
        queue = parsed.queue.decode("utf-8", "surrogateescape")
        raise ControlError(f"queue {queue} does not exist, or its jobs have ended")
    print_escaped(json.dumps(reply))


def _access(parsed: Namespace) -> int:
    from harpcaller.hosts.registry import read_tags  # it imports the event loop, for which other commands need not wait

    try:
        lines, status = answer_question(parsed, read_tags)
    except ConfigError as error:
        raise ControlError(str(error)) from error
    print_escaped("\n".join(lines))
    return status


# Tokens. Without a running daemon, the file is changed here.


def _token_add(parsed: Namespace) -> None:
    roles, expires = parsed.role or [], parsed.expires
    added = _on_tokens(
        parsed,
        lambda daemon: loads(next(daemon.send_command("token-add", name=parsed.name, roles=roles, expires=expires))),
        lambda file: {"token": _tokens_module().add_token(file, parsed.name, roles, expires)[0]},
    )
    print_escaped("harpcallerd: store the token now: it is not shown again", file=sys.stderr)
    print_escaped(added["token"])


def _token_list(parsed: Namespace) -> None:
    def read(file: Path) -> list[Any]:
        tokens = _tokens_module()
        return [tokens.describe_token(token) for token in tokens.read_tokens(file).values()]

    for item in _on_tokens(parsed, lambda daemon: [*map(loads, daemon.send_command("token-list"))], read):
        print_escaped(json.dumps(item))


def _token_revoke(parsed: Namespace) -> None:
    revoked = _on_tokens(
        parsed,
        lambda daemon: loads(next(daemon.send_command("token-revoke", name=parsed.name)))["revoked"],
        lambda file: _tokens_module().revoke_token(file, parsed.name),
    )
    if not revoked:
        raise ControlError(f"there is no token {parsed.name}")


def _on_tokens(parsed: Namespace, by_daemon: Callable[[ControlClient], Any], by_file: Callable[[Path], Any]) -> Any:
    """Return what the daemon replies; without a running one, what the function of the tokens file returns."""
    try:
        return by_daemon(ControlClient(parsed.socket))
    except NotRunning:
        pass
    try:
        file = load(parsed.config).tokens_file
        if file is None:
            raise ControlError(f'{parsed.config}: tokens_file: expected a path, got none; add tokens_file = "tokens"')
        return by_file(file)
    except (ConfigError, ValueError, _tokens_module().TokenError) as error:
        raise ControlError(str(error)) from error


def _tokens_module() -> Any:
    from harpcaller.access import tokens  # only these commands need it

    return tokens


def _web_login(parsed: Namespace) -> None:
    seconds = None if parsed.hours is None else parsed.hours * 3600
    options = {"name": parsed.name or _user_name(), "roles": parsed.role or ["admin"], "seconds": seconds}
    (item,) = ControlClient(parsed.socket).send_command("web-login", **options)
    print_escaped("harpcallerd: open the link within 5 minutes; it can be used once", file=sys.stderr)
    print_escaped(loads(item)["url"])


def _user_name() -> str:
    """Return the name of the person who runs the command, also by sudo."""
    import pwd

    if (name := os.environ.get("SUDO_USER")) is not None and os.geteuid() == 0:
        return name
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _audit(parsed: Namespace) -> int:
    try:
        file = parsed.file or load(parsed.config).audit_file
        if file is None:
            raise ControlError(f"{parsed.config}: audit_file: not set: nothing is recorded; use --file")
        return run_on_audit_file(parsed, file)
    except ConfigError as error:
        raise ControlError(str(error)) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ControlError(f"{error.filename or 'audit file'}: {error.strerror}") from error


def _print_reply(parsed: Namespace) -> None:
    _print_lines(_send(parsed))


def _print_lines(lines: Iterable[Raw]) -> int:
    """Print lines; return their number."""
    count = 0
    for line in lines:
        # They may have any character as it is; only surrogates are always escaped.
        sys.stdout.buffer.write(escape_controls(line.decode()).encode() + b"\n")
        count += 1
    return count


def _send(parsed: Namespace) -> Iterator[Raw]:
    """Send the command with its arguments; yield the items of the reply."""
    options = {name: value for name, value in vars(parsed).items() if name not in _COMMON}
    return ControlClient(parsed.socket).send_command(parsed.command, **options)


def _single_reply(parsed: Namespace) -> dict[str, Any]:
    (item,) = _send(parsed)
    reply: dict[str, Any] = loads(item, MAX_LINE_DEPTH)
    return reply


# The command line.


#: Adds a command: name, function, help.
_Add: TypeAlias = Callable[[str, Callable[[Namespace], int | None], str], argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    program = argparse.ArgumentParser(
        prog="harpcallerd",
        description="The dispatcher of HARP: queues calls, runs them on hosts, stores records and results.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    path: dict[str, Any] = {"metavar": "PATH", "type": _absolute_path}
    add_version(program)
    program.add_argument("--socket", **path, default=_SOCKET, help=f"control socket ({_SOCKET})")
    program.add_argument("--config", **path, default=DEFAULT_FILE, help="TOML file (%(default)s)")
    program.add_argument("--test", action="store_true", help="check configuration, certificates and hosts, and exit")
    commands = program.add_subparsers(dest="command", metavar="COMMAND")
    add = partial(_add_command, commands)
    _add_daemon_commands(add)
    _add_store_commands(add)
    _add_job_commands(add)
    _add_host_commands(add)
    _add_access_commands(add)
    return program


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[Namespace], int | None],
    help: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    # It is also accepted after the command. Its default must not override the option before the command.
    command.add_argument(
        "--socket", metavar="PATH", type=_absolute_path, default=argparse.SUPPRESS, help="control socket"
    )
    command.set_defaults(run=run)
    return command


def _add_config(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument(
        "--config",
        metavar="PATH",
        type=_absolute_path,
        default=argparse.SUPPRESS,
        help=f"TOML file ({DEFAULT_FILE})",
    )
    return command


def _add_daemon_commands(add: _Add) -> None:
    option = _add_config(add("start", _start, "run the dispatcher")).add_argument
    option("--debug", action="store_true", help="log at debug level, including the arguments of calls")
    option("--pidfile", metavar="FILE", type=_absolute_path, help="write the process id to FILE")
    option("--daemon", action="store_true", help="run in the background; return when it serves")
    option = add("status", _status, "show whether the dispatcher runs").add_argument
    option("--full", action="store_true", help="show process, calls and the state of the hosts registry as JSON")
    option("--wait", action="store_true", help="wait until it runs")
    option("--timeout", metavar="S", type=parse_number, help="wait at most S seconds")
    option = add("stop", _stop, "stop the dispatcher and wait until its process has exited").add_argument
    option("--timeout", metavar="S", type=parse_number, help="wait at most S seconds")
    option("--print-pid", action="store_true", help="print its process id")
    add("reload", _reload, "reload the configuration, all or nothing")
    add("reopen-logs", _send_silently, "reopen the log files, after a rotation")


def _add_store_commands(add: _Add) -> None:
    option = add("backup", _backup, "copy the jobs to a file while the dispatcher runs").add_argument
    option("file", metavar="FILE", type=_absolute_path, help="a new file, or an earlier backup, which is replaced")
    restore = _add_config(add("restore", _restore, "copy the jobs of a backup to a stopped dispatcher without jobs"))
    restore.add_argument("file", metavar="FILE", type=_absolute_path, help="the backup")
    queued = "what to do with queued jobs; those that ran after the backup would run again"
    restore.add_argument("--queued", choices=("cancel", "run"), help=queued)
    option = add("prune-jobs", _send_silently, "delete old ended jobs with their records").add_argument
    option("--age", metavar="DAYS", type=_days, help="delete jobs that ended more than DAYS ago (default: max_age)")
    option("--trust-clock", action="store_true", help="also after a leap of the clock: its present time is right")


def _add_job_commands(add: _Add) -> None:
    option = add("list", _print_reply, "list the jobs that have not ended, in the order of submission").add_argument
    option("--all", action="store_true", help="include jobs that have ended")
    option("--newest", metavar="N", type=_count, help="only the last N submitted jobs, the newest first")
    option("--host", metavar="HOST", help="only jobs for this host")
    option("--of-queue", metavar="QUEUE", type=parse_queue, help="only jobs of this queue; QUEUE is a JSON object")
    option("--queue", action="store_true", help="show the queue of each job")
    option = add("info", _print_reply, "show a job and its end").add_argument
    option("job", metavar="JOB", help="its id")
    option("--full", action="store_true", help="show all details: host, stop, exit info, and the reason of its state")
    add("cancel", _cancel, "cancel a job").add_argument("job", metavar="JOB", help="its id")
    release = add("release-slot", _release_slot, "free the slot of an ended job without confirmation by its host")
    release.add_argument("job", metavar="JOB", help="its id")
    option = add(
        "queue-list", _queue_list, "list the names of the queues, or the unended jobs of one queue"
    ).add_argument
    option("queue", metavar="QUEUE", type=parse_queue, nargs="?", help="a JSON object")
    option("--full", action="store_true", help="show concurrency and numbers of jobs of each queue")
    cancel = add("queue-cancel", _queue_cancel, "cancel all jobs of a queue; print how many")
    cancel.add_argument("queue", metavar="QUEUE", type=parse_queue, help="a JSON object")


def _add_host_commands(add: _Add) -> None:
    option = add("hosts-list", _hosts_list, "list the hosts of the registry, without credentials").add_argument
    option("--full", action="store_true", help="show the source of each host, its age in seconds and its last error")
    option = add("hosts-refresh", _hosts_refresh, "run host_db_script and read hosts_file now").add_argument
    option("--force", action="store_true", help="use the hosts even if the list is empty or much shorter than before")
    option("--diff", action="store_true", help="only show what would change")


def _add_access_commands(add: _Add) -> None:
    token = _add_config(add("token", _token_list, "add, list or revoke tokens of clients"))
    add_action = partial(_add_command, token.add_subparsers(dest="action", metavar="ACTION", required=True))
    option = _add_config(add_action("add", _token_add, "print a new token; only its digest is stored")).add_argument
    option("name", metavar="NAME", help="its name; its principal is token:NAME")
    option("--role", metavar="ROLE", action="append", help="a role of access_file that it has; may be repeated")
    option("--expires", metavar="WHEN", type=_time, help="90d, 12h, or a date such as 2030-01-31 (default: never)")
    _add_config(add_action("list", _token_list, "list the tokens, one JSON object per line"))
    revoke = _add_config(add_action("revoke", _token_revoke, "revoke a token, on open connections, too"))
    revoke.add_argument("name", metavar="NAME", help="its name")
    option = add(
        "web-login", _web_login, "print a link that logs in to the console once, within 5 minutes"
    ).add_argument
    option("--as", dest="name", metavar="NAME", help="the principal is user:NAME (default: the user)")
    option("--role", metavar="ROLE", action="append", help="viewer, operator, admin (default), or one of access_file")
    option("--hours", metavar="H", type=_hours, help="end the session after H hours (default: session_age)")
    add_commands(_add_config(add("access", _access, "ask the access file who may do what; needs no daemon")))
    audit = add("audit", _audit, "prove that the audit file is complete, and search it; needs no daemon")
    add_audit_commands(_add_config(audit), "harpcallerd")
    option = add("secrets-key", _secrets_key, "add a key for secret arguments to a file; print its id").add_argument
    option("file", metavar="FILE", type=_absolute_path, help="created if it does not exist; see secrets_key_file")


def _command_first(program: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the options before the command after it, where its parser expects them."""
    [commands] = (action.choices for action in program._actions if isinstance(action, argparse._SubParsersAction))
    options = {
        name: action for command in commands.values() for action in command._actions for name in action.option_strings
    }
    position = 0
    while position < len(arguments) and arguments[position].startswith("-"):
        name, has_value, _ = arguments[position].partition("=")
        named = next((action for option, action in options.items() if option.startswith(name)), None)
        position += 1 if has_value or named is None or named.nargs == 0 else 2
    if position >= len(arguments) or arguments[position] not in commands:
        return [*arguments]
    return [arguments[position], *arguments[:position], *arguments[position + 1 :]]


def _absolute_path(text: str) -> Path:
    return Path(text).absolute()  # --daemon changes the working directory


def _days(text: str) -> float:
    days = parse_number(text)
    if days == 0:
        raise argparse.ArgumentTypeError("expected a number above 0: 0 would delete all jobs that have ended")
    return days * 86_400


def _hours(text: str) -> float:
    hours = parse_number(text)
    if hours == 0:
        raise argparse.ArgumentTypeError("expected a number above 0")
    return hours


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _time(text: str) -> float:
    """Return the Unix time of an option: a time from now, or a date with or without a time, by default in UTC."""
    units = {"h": 3600, "d": 86400}
    try:
        if text[-1:] in units:
            return time.time() + parse_number(text[:-1]) * units[text[-1]]
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected 90d, 12h or a date such as 2030-01-31, got {text}") from error


if __name__ == "__main__":
    sys.exit(main())
