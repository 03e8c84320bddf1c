"""``harpd --test``: all that a start would read, read in a process that is thrown away.

Own modules and the procedures file run when they are read; what they do there must not stay in this process,
and what they print must not be taken for ours.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from typing import NoReturn

from harpd.auth import AuthDB
from harpd.config.loaded import CommandLine, configure_log, load_config
from harpd.config.settings import ConfigError, listening_places
from harpd.worker.privileges import UserError, resolve_credentials
from harpd.worker.procedures import load_procedures

__all__ = ["check"]


def check(options: CommandLine) -> list[str]:
    """Check everything that the command line names: configuration, certificate, users, log, procedures.

    Call it before the process has threads.

    Returns:
        Warnings: what works but should not be so.

    Raises:
        ConfigError: the first fault.
    """
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        _write_report(options, said)
    os.close(said)
    with os.fdopen(heard, "rb") as report:
        text = report.read()
    _, status = os.waitpid(child, 0)
    if not text:
        raise ConfigError(f"{options.config}: the check ended before it was done ({_describe_status(status)})")
    found = json.loads(text)
    if found["fault"]:
        raise ConfigError(found["fault"])
    return list(found["warnings"])


def _write_report(options: CommandLine, said: int) -> NoReturn:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        fault, warnings = "", []
        try:
            warnings = _load_everything(options)
        except BaseException as error:  # noqa: BLE001 - whatever own code raises is the fault to report
            fault = " ".join(str(error).split()) or type(error).__name__
        with os.fdopen(said, "wb") as report:
            report.write(json.dumps({"fault": fault, "warnings": warnings}).encode())
    finally:
        os._exit(0)


def _load_everything(options: CommandLine) -> list[str]:
    generation = load_config(options)
    configure_log(options, generation)
    listening_places(
        generation.configuration.network, options.config
    )  # whether they can be listened on, only a start can know
    before = threading.active_count()
    procedures = load_procedures(options.procedures)
    warnings = generation.users.warnings() if isinstance(generation.users, AuthDB) else []
    if not procedures:
        warnings.append(f"{options.procedures}: exposes no procedure; decorate functions with @procedure")
    if (running := threading.active_count() - before) > 0:
        warnings.append(f"{options.procedures}: leaves {running} thread(s) running; no call will have them")
    group = None if options.default_group is None else (options.default_group,)
    accounts: dict[str, tuple[int | str | None, Sequence[int | str] | None]]
    accounts = {"the default user and group": (options.default_user, group)}
    accounts |= {f"{options.procedures}: {name}": (found.uid, found.gid) for name, found in procedures.items()}
    for whose, (user, groups) in accounts.items():
        try:
            resolve_credentials(user, groups)
        except UserError as error:
            warnings.append(f"{whose}: {error}; calls will fail")
    return warnings


def _describe_status(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit status {code}"
