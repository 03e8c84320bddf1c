"""The program `harpd`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

from harp.daemon.process import ProcessError, detach, pidfile
from harpd import gate
from harpd.check import check
from harpd.config import ConfigError
from harpd.generation import Options, configure_log, make_generation
from harpd.keeper import WardenError

__all__ = ["main", "parser"]

_EXAMPLES = """\
examples:
  harpd -t                                      check everything that the next start or reload will read
  harpd -c ./harpd.conf -r ./procedures.py      in the foreground, the log on stderr
  harpd -u nobody --syslog -d -p /run/harpd.pid in the background; returns once it serves

signals:
  HUP         read configuration, certificate, users, log settings and procedures again, all or nothing
  TERM, INT   end all calls with the error shutdown, and stop

exit status: 0 ended or checked in order, 1 a fault (one line on stderr), 2 wrong usage
"""

#: Nested values of the protocol's depth need more than Python's default.
_RECURSION_LIMIT = 10_000


def main(arguments: list[str] | None = None) -> int:
    """Run harpd; return its exit status."""
    parsed = parser().parse_args(arguments)
    sys.setrecursionlimit(_RECURSION_LIMIT)
    options = Options(
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
        if parsed.test:
            for warning in check(options):
                print(f"harpd: warning: {warning}", file=sys.stderr)
            print("config OK")
        else:
            _serve(options, parsed.pidfile)
    except (ConfigError, ProcessError, WardenError) as error:
        print(f"harpd: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(options: Options, pid_file: Path | None) -> None:
    served: Callable[[], None] = _nothing
    if options.background:
        check(options)  # a fault is told to the one who is still there to read it
        served = detach()
    with pidfile(pid_file):
        generation = make_generation(options)
        configure_log(options, generation)
        asyncio.run(gate.run(options, generation, served))


def _nothing() -> None:
    """In the foreground nobody waits."""


def _path(text: str) -> Path:
    return Path(text).absolute()  # --daemon changes the working directory


def _identity(text: str) -> str | int:
    return int(text) if text.isascii() and text.isdigit() else text


def parser() -> argparse.ArgumentParser:
    """The command line of harpd."""
    command = argparse.ArgumentParser(
        prog="harpd",
        description="Expose the procedures of a Python file over TLS, each call in a process of its own.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("-c", "--config", metavar="FILE", type=_path, default="/etc/harpd/harpd.conf", help="YAML (%(default)s)")
    add("-r", "--procedures", metavar="FILE", type=_path, default="/etc/harpd/harpd.py", help="(%(default)s)")
    add("-l", "--logging", metavar="FILE", type=_path, help="YAML for Python's logging.config.dictConfig")
    add("-t", "--test", action="store_true", help="check everything, say so and exit")
    add("-u", "--default-user", metavar="USER", type=_identity, help="of procedures that name none; name or number")
    add("-g", "--default-group", metavar="GROUP", type=_identity, help="of procedures that name none; name or number")
    add("--syslog", action="store_true", help="log to syslog instead of stderr")
    add("-d", "--daemon", action="store_true", help="go to the background; return once it serves")
    add("-p", "--pidfile", metavar="FILE", type=_path, help="write the process id there")
    return command


if __name__ == "__main__":
    sys.exit(main())
