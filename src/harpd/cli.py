"""The program `harpd`."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from harp_daemon.event_loop import run
from harp_daemon.process import ProcessError, detach, pidfile
from harpd.config.check import check
from harpd.config.loaded import CommandLine, configure_log, load_config, load_supervisor_config
from harpd.config.settings import ConfigError, load
from harpd.control import administration as control
from harpd.control import supervisor_service as calls
from harpd.control.supervisor_client import SupervisorError
from harpd.frontend import server as gate

__all__ = ["main", "parser"]

_EXAMPLES = """\
commands:
  (none)      serve, and keep the calls: TERM ends all calls
  frontend    serve alone; calls are kept by `harpd supervisor`, and TERM leaves kept ones running
  supervisor  keep the calls alone: TERM ends all calls, USR1 ends only this program
  drain       refuse new calls, and wait until the last one has ended and its end has been fetched
  resume      take new calls again
  status      print what each supervisor of calls holds, one a line, as JSON

examples:
  harpd -t                                      check everything that the next start or reload will read
  harpd -c ./harpd.conf -r ./procedures.py      in the foreground, the log on stderr
  harpd -u nobody --syslog -d -p /run/harpd.pid in the background; returns once it serves
  harpd drain --timeout 600 && systemctl stop harpd harpd-supervisor

signals:
  HUP         read configuration, certificate, users, log settings and procedures again, all or nothing
              (supervisor: put a new supervisor in the place of the old one, which ends with its last call)
  TERM, INT   stop, see above; calls that are ended have the error shutdown

exit status: 0 success; 1 an error (one line on stderr), no supervisor runs (status), calls remain (drain);
2 wrong usage
"""

#: Nested values of the protocol's depth need more than Python's default.
_RECURSION_LIMIT = 10_000


def main(arguments: list[str] | None = None) -> int:
    """Run harpd; return its exit status."""
    command = parser()
    parsed = command.parse_args(arguments)
    if parsed.timeout is not None and parsed.command != "drain":
        command.error("--timeout is for drain")
    sys.setrecursionlimit(_RECURSION_LIMIT)
    options = CommandLine(
        config=parsed.config,
        procedures=parsed.procedures,
        logging=parsed.logging,
        default_user=parsed.default_user,
        default_group=parsed.default_group,
        syslog=parsed.syslog,
        background=parsed.daemon,
        search_path=tuple(sys.path),
    )
    try:
        return _run(options, parsed)
    except (ConfigError, ProcessError, SupervisorError) as error:
        print(f"harpd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # of a command that waits; the daemon's programs take the signal for themselves
        return 1


def _run(options: CommandLine, parsed: argparse.Namespace) -> int:
    if parsed.test:
        for warning in check(options):
            print(f"harpd: warning: {warning}", file=sys.stderr)
        print("config OK")
        return 0
    match parsed.command:
        case None:
            _serve(options, parsed.pidfile, alone=False)
        case "frontend":
            _directory(options)
            _serve(options, parsed.pidfile, alone=True)
        case "supervisor":
            _directory(options)
            _keep(options, parsed.pidfile)
        case "status":
            supervisors = asyncio.run(control.status(_directory(options)))
            for supervisor in supervisors:
                print(json.dumps(supervisor))
            return 0 if supervisors else 1
        case "drain":
            return 0 if asyncio.run(control.drain(_directory(options), parsed.timeout)) else 1
        case "resume":
            asyncio.run(control.resume(_directory(options)))
    return 0


def _directory(options: CommandLine) -> Path:
    """The runtime directory, which parts of harpd that run apart must have configured. Raises `ConfigError`."""
    configured = load(options.config).runtime_directory
    if configured is None:
        raise ConfigError(f"{options.config}: runtime_directory: missing; frontend and supervisor meet there")
    return Path(configured).absolute()


def _serve(options: CommandLine, pid_file: Path | None, alone: bool) -> None:
    served = _detached(options)
    with pidfile(pid_file):
        generation = load_config(options)
        configure_log(options, generation)
        run(gate.run(options, generation, served, alone))


def _keep(options: CommandLine, pid_file: Path | None) -> None:
    served = _detached(options)
    with pidfile(pid_file):
        plan = load_supervisor_config(options)
        configure_log(options, plan)
        run(calls.run(options, plan, served))


def _detached(options: CommandLine) -> Callable[[], None]:
    """Go to the background if that is asked for; return what to call once the program serves."""
    if not options.background:
        return _nothing
    check(options)  # a fault is told to the one who is still there to read it
    return detach()


def _nothing() -> None:
    """In the foreground nobody waits."""


def _path(text: str) -> Path:
    return Path(text).absolute()  # --daemon changes the working directory


def _identity(text: str) -> str | int:
    return int(text) if text.isascii() and text.isdigit() else text


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise ValueError
    return seconds


def parser() -> argparse.ArgumentParser:
    """The command line of harpd."""
    command = argparse.ArgumentParser(
        prog="harpd",
        description="Expose the procedures of a Python file over TLS, each call in a process of its own.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    commands = ("frontend", "supervisor", "drain", "resume", "status")
    add("command", nargs="?", choices=commands, metavar="COMMAND", help=f"one of {', '.join(commands)}: see below")
    add("-c", "--config", metavar="FILE", type=_path, default="/etc/harpd/harpd.conf", help="YAML (%(default)s)")
    add("-r", "--procedures", metavar="FILE", type=_path, default="/etc/harpd/harpd.py", help="(%(default)s)")
    add("-l", "--logging", metavar="FILE", type=_path, help="YAML for Python's logging.config.dictConfig")
    add("-t", "--test", action="store_true", help="check everything, say so and exit")
    add("-u", "--default-user", metavar="USER", type=_identity, help="of procedures that name none; name or number")
    add("-g", "--default-group", metavar="GROUP", type=_identity, help="of procedures that name none; name or number")
    add("--syslog", action="store_true", help="log to syslog instead of stderr")
    add("-d", "--daemon", action="store_true", help="go to the background; return once it serves")
    add("-p", "--pidfile", metavar="FILE", type=_path, help="write the process id there")
    add("--timeout", metavar="S", type=_seconds, help="drain: the most seconds to wait; without it, for ever")
    return command


if __name__ == "__main__":
    sys.exit(main())
