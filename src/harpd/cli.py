"""The program `harpd`."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from harp.protocol.printing import print_escaped
from harp_daemon.event_loop import run
from harp_daemon.exposition import render
from harp_daemon.process import ProcessError, detach, occupy_standard_descriptors, pidfile, reset_signals
from harp_daemon.program import add_version, parse_number, written_output
from harp_daemon.settings import ConfigError
from harpd.config.loaded import CommandLine, check, load_supervisor_config
from harpd.config.settings import load
from harpd.control import launcher
from harpd.control.metrics import certificate_family, read_certificate, supervisor_families
from harpd.control.supervisor_client import (
    SupervisorClient,
    SupervisorError,
    SupervisorNotRunning,
    check_directory,
    find_runtime_directory,
    retry_until_active,
)
from harpd.frontend import service

_CONFIG = "/etc/harpd/harpd.conf"
#: Seconds between two status requests while the last calls end.
_DRAIN_INTERVAL = 0.2

_EPILOG = """\
commands:
  (none)      run frontend and supervisor in one program; TERM ends all calls
  frontend    run only the frontend; resumable calls continue when it stops
  supervisor  run only the supervisor; TERM ends all calls, USR1 ends this program but no call
  drain       reject new calls; wait until no call runs and no dispatcher has a result to fetch
  resume      accept new calls again
  audit       prove that the audit file is complete, and search it: see harpd audit --help
  status      print the status of each supervisor: one JSON object a line

examples:
  harpd -t                                      check everything that the next start or reload reads
  harpd -c ./harpd.conf -r ./procedures.py      run in the foreground; log to stderr
  harpd -u nobody --syslog -d -p /run/harpd.pid run in the background; return when harpd serves
  harpd status --metrics > /var/lib/node_exporter/harpd.prom.new; mv ...
                                                for the textfile collector of node_exporter
  harpd drain --timeout 600 && systemctl stop harpd-supervisor harpd

signals:
  HUP         reload configuration, certificate, users, log settings and procedures, all or nothing
              (supervisor: start a new supervisor; the old one exits after its last call)
  TERM, INT   stop, see above; the calls that it ends have the error shutdown

exit status: 0 success; 1 an error (one line on stderr; status: no supervisor runs), calls remain (drain);
2 wrong usage; 3 the output cannot be written
"""


def main(arguments: list[str] | None = None) -> int:
    """Run harpd; return its exit status."""
    occupy_standard_descriptors()
    reset_signals()
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["audit"]:
        return _audit(given[1:])
    command_line = parser()
    with written_output("harpd"):  # of --help and --version
        options = CommandLine(**vars(command_line.parse_args(arguments)))
    if options.timeout is not None and options.command != "drain":
        command_line.error("--timeout is an option of drain")
    if options.metrics and options.command != "status":
        command_line.error("--metrics is an option of status")
    sys.setrecursionlimit(10_000)  # values may be nested as deeply as the protocol allows
    prints = options.test or options.command in ("drain", "resume", "status")
    try:
        with written_output("harpd") if prints else nullcontext():
            return _run_command(options)
    except (ConfigError, ProcessError, SupervisorError) as error:
        print_escaped(f"harpd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # of status, drain and resume; the daemon's programs handle the signal
        return 1


def _run_command(options: CommandLine) -> int:
    if options.test:
        warnings = check(options)
        check_directory(load(options.config).runtime_directory, options.config)
        for warning in warnings:
            print_escaped(f"harpd: warning: {warning}", file=sys.stderr)
        print_escaped("config OK")
        return 0
    if options.command in ("drain", "resume", "status"):
        if options.metrics:
            return _print_metrics(options)
        with SupervisorClient(_runtime_directory(options), create=False) as client:
            return asyncio.run(_control(client, options.command, options.timeout))
    if options.command is not None:
        _runtime_directory(options)
    if options.daemon:
        check(options)  # while stderr still shows the error
    on_serving = detach() if options.daemon else lambda: None
    with pidfile(options.pidfile):
        if options.command == "supervisor":
            supervisor_config = load_supervisor_config(options)
            supervisor_config.configure_log()
            run(launcher.run(supervisor_config, on_serving))
        else:
            config = service.load(options)
            config.configure_log()
            run(service.run(config, on_serving, frontend_only=options.command == "frontend"))
    return 0


def _audit(arguments: list[str]) -> int:
    from harp_daemon import audit_commands  # large, and the daemon does not need it

    command_line = argparse.ArgumentParser(prog="harpd audit", description="Prove and search the audit file.")
    audit_commands.add_commands(command_line, "harpd")
    with written_output("harpd"):
        parsed = command_line.parse_args(arguments)
    config = getattr(parsed, "config", Path(_CONFIG))
    try:
        with written_output("harpd"):
            file = parsed.file or load(config).audit_file
            if file is None:
                raise ConfigError(f"{config}: audit_file: not set: nothing is recorded; use --file")
            return audit_commands.run(parsed, Path(file))
    except ConfigError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename or 'audit file'}: {error.strerror}"
    except KeyboardInterrupt:  # of tail
        return 1
    print_escaped(f"harpd: {reason}", file=sys.stderr)
    return 1


def _print_metrics(options: CommandLine) -> int:
    """Print the metrics, also if no supervisor runs: then an alert can find that."""
    supervisors = []
    try:
        with SupervisorClient(_runtime_directory(options), create=False) as client:
            supervisors = asyncio.run(client.read_metrics())
    except SupervisorError as error:
        print_escaped(f"harpd: {error}", file=sys.stderr)
    certificate = certificate_family(read_certificate(Path(load(options.config).network.certfile)))
    sys.stdout.write(render([*supervisor_families(supervisors), certificate]).decode())
    return 0 if supervisors else 1


async def _control(client: SupervisorClient, command: str, deadline: float | None) -> int:
    """Send a command to the running supervisors; return the exit status."""
    replies = await client.request_all(command)
    if not replies:
        raise SupervisorNotRunning("the supervisor does not run")
    if command == "status":
        for reply in replies:
            print_escaped(json.dumps(reply))
        return 0
    try:
        async with asyncio.timeout(deadline):
            await (_wait_until_resumed(client) if command == "resume" else _wait_until_drained(client))
    except TimeoutError:
        return 1
    return 0


async def _wait_until_resumed(client: SupervisorClient) -> None:
    """Return when the active supervisor accepts new calls, which may not have received the command."""
    if not (await _active_status(client))["accepting"]:
        await client.request_all("resume")


async def _wait_until_drained(client: SupervisorClient) -> None:
    """Wait until no supervisor has a call or an end; one that has become active since rejects new calls, too."""
    drained: str | None = None
    while True:
        version, active = client.version(), await _active_status(client)
        if active["accepting"] and active["instance"] != drained:  # otherwise `harpd resume` was called
            await client.request_all("drain")
        else:
            statuses = [active, *await client.request_all("status")]
            is_empty = not any(status["calls"] + status["resumable"] for status in statuses)
            if is_empty and await client.confirm(version):
                return
        drained = active["instance"]
        await asyncio.sleep(_DRAIN_INTERVAL)


async def _active_status(client: SupervisorClient) -> dict[str, Any]:
    """Return the status of the active supervisor; its socket may be missing for a moment. Raises `SupervisorError`."""
    return await retry_until_active(partial(client.request, {"control": "status"}))


def _runtime_directory(options: CommandLine) -> Path:
    """Return the runtime directory, by which separate programs find each other. Raises `ConfigError`."""
    return find_runtime_directory(load(options.config).runtime_directory, options.config)


def _path(text: str) -> Path:
    return Path(text).absolute()  # --daemon changes the working directory


def _identity(text: str) -> str | int:
    return int(text) if text.isascii() and text.isdigit() else text


def parser() -> argparse.ArgumentParser:
    """Return the parser of harpd's command line."""
    command = argparse.ArgumentParser(
        prog="harpd",
        description="Serve the procedures of a Python file over TLS; each call runs in its own process.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(command)
    add = command.add_argument
    commands = ("frontend", "supervisor", "drain", "resume", "status")
    add("command", nargs="?", choices=commands, metavar="COMMAND", help=f"one of {', '.join(commands)}: see below")
    add("-c", "--config", metavar="FILE", type=_path, default=_CONFIG, help="YAML (%(default)s)")
    add("-r", "--procedures", metavar="FILE", type=_path, default="/etc/harpd/harpd.py", help="(%(default)s)")
    add("-l", "--logging", metavar="FILE", type=_path, help="YAML for Python's logging.config.dictConfig")
    add("-t", "--test", action="store_true", help="check the configuration and all files that it names")
    default = "default {0} for procedures without {1} (name or numeric id), instead of that of the configuration"
    add("-u", "--default-user", metavar="USER", type=_identity, help=default.format("user", "uid"))
    add("-g", "--default-group", metavar="GROUP", type=_identity, help=default.format("group", "gid"))
    add("--syslog", action="store_true", help="log to syslog instead of stderr")
    add("-d", "--daemon", action="store_true", help="run in the background; return when harpd serves")
    add("-p", "--pidfile", metavar="FILE", type=_path, help="write the process id to FILE")
    add("--metrics", action="store_true", help="status: print metrics for Prometheus instead")
    add("--timeout", metavar="S", type=parse_number, help="drain: most seconds to wait (default: no limit)")
    return command


if __name__ == "__main__":
    sys.exit(main())
