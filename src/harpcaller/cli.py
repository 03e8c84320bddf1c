"""The program `harpcallerd`: the dispatcher, and its control program over the control socket."""

from __future__ import annotations

import argparse
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harp.protocol.json_text import InvalidJSON, Raw, loads
from harp_daemon.process import ProcessError, detach, pidfile
from harp_daemon.settings import ConfigError
from harpcaller.api.control_client import ControlClient, ControlError
from harpcaller.config import DEFAULT_FILE, load
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
  harpcallerd queue-list '{"service": "nginx"}'         the queued and running jobs of a queue
  harpcallerd queue-cancel '{"service": "nginx"}'       cancel them
  harpcallerd --socket=./control stop --print-pid       the daemon that uses this control socket

signals:
  HUP         reload the configuration, all or nothing
  USR1        reopen the log files
  TERM, INT   stop; running calls continue on their hosts until the next start, queued jobs stay queued

exit status: 0 success, 1 failure (one line on stderr says why; status: stopped), 2 wrong usage
"""


def main(arguments: list[str] | None = None) -> int:
    """Run harpcallerd; return its exit status."""
    program = parser()
    parsed = program.parse_args(arguments)
    if parsed.command is None and not parsed.test:
        program.error("the following arguments are required: COMMAND")
    sys.setrecursionlimit(10_000)  # values may be nested as deeply as the protocol allows
    try:
        return int((_test if parsed.test else parsed.run)(parsed) or 0)
    except (ControlError, ProcessError) as error:
        print(f"harpcallerd: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of the list has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 1


# The commands.


def _start(parsed: Namespace) -> None:
    # Only the daemon needs the event loop, TLS and SQLite; commands should not wait for these imports.
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
        print("harpcallerd is stopped")
        return 1
    (status,) = daemon.send_command("status")
    print(status.decode() if parsed.full else "harpcallerd is running")
    _warn_of_hosts(status)
    return 0


def _stop(parsed: Namespace) -> None:
    pid = ControlClient(parsed.socket).stop(parsed.timeout)
    if parsed.print_pid:
        print(pid)


def _reload(parsed: Namespace) -> int:
    reply = _single_reply(parsed)
    for key in reply["restart_needed"]:
        print(f"harpcallerd: warning: the change of {key} needs a restart", file=sys.stderr)
    return _print_problems(reply["problems"])


def _hosts_list(parsed: Namespace) -> None:
    _print_reply(parsed)
    (status,) = ControlClient(parsed.socket).send_command("status")
    _warn_of_hosts(status)


def _hosts_refresh(parsed: Namespace) -> int:
    if parsed.diff:
        _print_reply(parsed)
        return 0
    reply = _single_reply(parsed)
    print(f'{{"hosts":{reply["hosts"]}}}')
    return _print_problems(reply["problems"])


def _warn_of_hosts(status: Raw) -> None:
    """Print a warning on stderr for each source of hosts whose latest contents are not in use."""
    for source in loads(status)["hosts_registry"].values():
        if isinstance(source, dict) and source["error"] is not None:
            age = "no hosts yet" if source["age"] is None else f"hosts are {source['age']:.0f} s old"
            print(f"harpcallerd: warning: {source['error']} ({age})", file=sys.stderr)


def _print_problems(problems: list[str]) -> int:
    """Print the rejected lines and other problems of the hosts registry; return the exit status."""
    for problem in problems:
        print(f"harpcallerd: hosts registry: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _test(parsed: Namespace) -> int:
    from harpcaller.daemon import check

    try:
        errors = check(load(parsed.config))
    except ConfigError as error:
        errors = [str(error)]
    for message in errors:
        print(f"harpcallerd: {message}", file=sys.stderr)
    if not errors:
        print("config OK")
    return 1 if errors else 0


def _reopen_logs(parsed: Namespace) -> None:
    _single_reply(parsed)


def _cancel(parsed: Namespace) -> None:
    if not _single_reply(parsed)["cancelled"]:
        raise ControlError(f"job {parsed.job} has ended or does not exist")


def _release_slot(parsed: Namespace) -> None:
    if not _single_reply(parsed)["released"]:
        raise ControlError(f"job {parsed.job} has not ended, holds no slot, or does not exist")


def _print_reply(parsed: Namespace) -> None:
    for item in _send(parsed):
        sys.stdout.buffer.write(item + b"\n")
    sys.stdout.buffer.flush()


def _send(parsed: Namespace) -> Iterator[Raw]:
    """Send the command with its own arguments; yield the items of the reply."""
    options = {name: value for name, value in vars(parsed).items() if name not in _COMMON}
    return ControlClient(parsed.socket).send_command(parsed.command, **options)


def _single_reply(parsed: Namespace) -> dict[str, Any]:
    (item,) = _send(parsed)
    reply: dict[str, Any] = loads(item)
    return reply


# The command line.


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    program = argparse.ArgumentParser(
        prog="harpcallerd",
        description="The dispatcher of HARP: queues calls, runs them on hosts, stores records and results.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    path: dict[str, Any] = {"metavar": "PATH", "type": _absolute_path}
    program.add_argument("--socket", **path, default=_SOCKET, help=f"control socket ({_SOCKET})")
    program.add_argument("--config", **path, default=DEFAULT_FILE, help="TOML file (%(default)s)")
    program.add_argument("--test", action="store_true", help="check configuration, certificates and hosts, and exit")
    # Also accepted after the command. Its default must not override the option before the command.
    socket = argparse.ArgumentParser(add_help=False)
    socket.add_argument("--socket", **path, default=argparse.SUPPRESS, help="control socket")
    commands = program.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Callable[[Namespace], int | None], help: str) -> Callable[..., argparse.Action]:
        command = commands.add_parser(name, parents=[socket], help=help, description=f"{help[0].upper()}{help[1:]}.")
        command.set_defaults(run=run)
        return command.add_argument

    option = add("start", _start, "run the dispatcher")
    option("--debug", action="store_true", help="log at debug level, including the arguments of calls")
    option("--config", **path, default=argparse.SUPPRESS, help=f"TOML file ({DEFAULT_FILE})")
    option("--pidfile", metavar="FILE", type=_absolute_path, help="write the process id to FILE")
    option("--daemon", action="store_true", help="run in the background; return when it serves")
    option = add("status", _status, "show whether the dispatcher runs")
    option("--full", action="store_true", help="show process, calls and the state of the hosts registry as JSON")
    option("--wait", action="store_true", help="wait until it runs")
    option("--timeout", metavar="S", type=_number, help="wait at most S seconds")
    option = add("stop", _stop, "stop the dispatcher and wait until its process has exited")
    option("--timeout", metavar="S", type=_number, help="wait at most S seconds")
    option("--print-pid", action="store_true", help="print its process id")
    add("reload", _reload, "reload the configuration, all or nothing")
    option = add("list", _print_reply, "list the jobs that have not ended, in the order of submission")
    option("--all", action="store_true", help="include jobs that have ended")
    option("--newest", metavar="N", type=_count, help="only the last N submitted jobs, the newest first")
    option("--host", metavar="HOST", help="only jobs for this host")
    option("--of-queue", metavar="QUEUE", type=_queue, help="only jobs of this queue; QUEUE is a JSON object")
    option("--queue", action="store_true", help="show the queue of each job")
    option = add("info", _print_reply, "show a job and its end")
    option("job", metavar="JOB")
    option("--full", action="store_true", help="show all details: host, stop, exit info, and the reason of its state")
    option = add("cancel", _cancel, "cancel a job")
    option("job", metavar="JOB")
    option = add("release-slot", _release_slot, "free the slot of an ended job without confirmation by its host")
    option("job", metavar="JOB")
    option = add("queue-list", _print_reply, "list the queues, or the queued and running jobs of one queue")
    option("queue", metavar="QUEUE", type=_queue, nargs="?", help="a JSON object")
    option = add("queue-cancel", _print_reply, "cancel all jobs of a queue")
    option("queue", metavar="QUEUE", type=_queue, help="a JSON object")
    option = add("hosts-list", _hosts_list, "list the hosts of the registry, without credentials")
    option("--full", action="store_true", help="show the source of each host, its age in seconds and its last error")
    option = add("hosts-refresh", _hosts_refresh, "run host_db_script and read hosts_file now")
    option("--force", action="store_true", help="use the hosts even if they are none, or much fewer than before")
    option("--diff", action="store_true", help="show what would change, and change nothing")
    option = add("prune-jobs", _print_reply, "delete old ended jobs with their records")
    option("--age", metavar="DAYS", type=_days, help="delete jobs that ended more than DAYS ago (default: max_age)")
    add("reopen-logs", _reopen_logs, "reopen the log files, after a rotation")
    return program


def _absolute_path(text: str) -> Path:
    return Path(text).absolute()  # --daemon changes the working directory


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


def _days(text: str) -> float:
    return _number(text) * 86_400


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _queue(text: str) -> Raw:
    try:
        queue = loads(text)
    except InvalidJSON as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object: {error}") from error
    if not isinstance(queue, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    # A line feed inside the object would end the request line.
    return Raw(text.replace("\n", " ").encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    sys.exit(main())
