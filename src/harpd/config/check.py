"""``harpd --test``: loads everything that a start would load, in a child process.

Authentication modules and the procedures file are Python code that runs when it is loaded. The child process keeps its
side effects out of this process and its output out of this program's output.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from typing import NoReturn

from harp_daemon.listeners import ResolveError, resolve
from harp_daemon.process import describe_exit
from harp_daemon.settings import ConfigError
from harpd.auth import AuthDB
from harpd.config.loaded import CommandLine, configure_log, load_config
from harpd.config.settings import one_line
from harpd.worker.privileges import UserError, resolve_credentials
from harpd.worker.procedures import load_procedures


def check(options: CommandLine) -> list[str]:
    """Check configuration, certificate, users, log settings and procedures.

    Call it before the process has threads, because it forks.

    Returns:
        Warnings.

    Raises:
        ConfigError: the first error found.
    """
    reading_end, writing_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading_end)
        _write_report(options, writing_end)
    os.close(writing_end)
    with os.fdopen(reading_end, "rb") as report:
        text = report.read()
    _, status = os.waitpid(child, 0)
    if not text:
        exited = describe_exit(os.waitstatus_to_exitcode(status))
        raise ConfigError(f"{options.config}: the check exited early ({exited})")
    result = json.loads(text)
    if result["error"]:
        raise ConfigError(result["error"])
    return list(result["warnings"])


def _write_report(options: CommandLine, writing_end: int) -> NoReturn:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        try:
            result = {"error": "", "warnings": _load_everything(options)}
        except BaseException as error:  # noqa: BLE001 - any exception of the loaded code is reported
            result = {"error": one_line(error) or type(error).__name__}
        with os.fdopen(writing_end, "w") as report:
            json.dump(result, report)
    finally:
        os._exit(0)


def _load_everything(options: CommandLine) -> list[str]:
    config = load_config(options)
    configure_log(options, config)
    try:
        resolve(config.configuration.network.address)  # only a start can find that a port is in use
    except ResolveError as error:
        raise ConfigError(f"{options.config}: network.address: {error}") from error
    threads_before = threading.active_count()
    procedures = load_procedures(options.procedures)
    warnings = config.users.warnings() if isinstance(config.users, AuthDB) else []
    if not procedures:
        warnings.append(f"{options.procedures}: exposes no procedure; decorate functions with @procedure")
    if (running := threading.active_count() - threads_before) > 0:
        warnings.append(f"{options.procedures}: started {running} thread(s), which will be missing in calls")
    group = None if options.default_group is None else (options.default_group,)

    def check_account(owner: str, user: int | str | None, groups: Sequence[int | str] | None) -> None:
        try:
            resolve_credentials(user, groups)
        except UserError as error:
            warnings.append(f"{owner}: {error}; calls will fail")

    check_account("the default user and group", options.default_user, group)
    for name, procedure in procedures.items():
        check_account(f"{options.procedures}: {name}", procedure.uid, procedure.gid)
    return warnings
