"""The loaded configuration, which a reload replaces as a whole: settings, certificate, users, log settings.

``--test``, the start and every reload use the same functions, so they find the same errors.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pwd
import resource
import select
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from harp_daemon import logs
from harp_daemon.expiry import Validity, read_validities
from harp_daemon.file_modes import describe_reader, describe_writer
from harp_daemon.process import describe_exit
from harp_daemon.settings import ConfigError
from harp_daemon.sockets import ResolveError, resolve
from harpd.auth import AuthDB
from harpd.auth.files import Files
from harpd.auth.rights import UserRights
from harpd.config.settings import LOCAL_FILES, Configuration, load, load_yaml, one_line, server_context
from harpd.proc import DYNAMIC_UID
from harpd.worker.environment import call_environment, enter_surroundings
from harpd.worker.privileges import UserError, resolve_credentials, user_id
from harpd.worker.procedures import LOAD_TIMEOUT, load_procedures

#: The keys of section `limits` that the supervisor applies.
_SUPERVISOR_LIMITS = (
    *("max_calls", "kill_grace", "spool", "spool_memory", "disconnect_timeout", "result_ttl"),
    *("output_lines", "output_bytes", "request_line", "request_memory"),
)
#: The error of a root harpd without a default user; a warning if the file is one of a legacy harpd.
ROOT_CALLS = (
    "default_user: missing; procedures without uid would run as root. Add a line: 'default_user: nobody', "
    "or another account with few rights; or 'default_user: root' to run them as root on purpose"
)
#: The user of the frontend if none is configured.
DEFAULT_FRONTEND_USER = "harpd"
_CREATE_USER = "create it: useradd --system --user-group --no-create-home --shell /usr/sbin/nologin {}"


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line. Paths are absolute; users and groups are names or numeric ids; None: not given."""

    command: str | None  #: The command; None: frontend and supervisor in one program.
    config: Path  #: The configuration file.
    procedures: Path  #: The procedures file.
    logging: Path | None  #: The file for `logging.config.dictConfig`.
    test: bool  #: Check the configuration, and exit.
    default_user: str | int | None  #: The user of procedures without `uid`; None: that of the configuration.
    default_group: str | int | None  #: The group of procedures without `gid`, likewise.
    syslog: bool  #: Log to syslog.
    daemon: bool  #: The program runs in the background: its child processes must not use the terminal.
    pidfile: Path | None  #: The file for the process id.
    timeout: float | None  #: The maximum seconds of ``drain``.
    metrics: bool = False  #: Whether ``status`` prints metrics.
    search_path: tuple[str, ...] = tuple(sys.path)  #: The program's initial `sys.path`.
    #: The program's initial limit of open files, which calls get.
    descriptors: int = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0])


@dataclass(frozen=True)
class SupervisorConfig:
    """The configuration that the launcher needs: without certificate and users."""

    options: CommandLine
    configuration: Configuration
    log: dict[str, Any]  #: Arguments for `harp_daemon.logs.configure`: JSON values.

    @property
    def rights_section(self) -> dict[str, dict[str, Any]]:
        """The rights of users, as `harpd.auth.rights.UserRights` takes them: JSON values."""
        return {user: msgspec.structs.asdict(rights) for user, rights in self.configuration.rights.items()}

    @property
    def runs_calls_as_root(self) -> bool:
        """Whether procedures without `uid` run as root, without a setting for it."""
        return self.default_user is None and os.geteuid() == 0

    @property
    def default_user(self) -> str | int | None:
        """The user of procedures without `uid`; None: that of harpd."""
        option = self.options.default_user
        return self.configuration.default_user if option is None else option

    @property
    def default_group(self) -> str | int | None:
        """The group of procedures without `gid`; None: those of the user."""
        option = self.options.default_group
        return self.configuration.default_group if option is None else option

    def configure_log(self) -> None:
        """Configure this process's log. Raises `ConfigError`."""
        try:
            logs.configure(name="harpd", **self.log)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.options.logging or '--syslog'}: {one_line(error)}") from error

    def frontend_identity(self) -> tuple[int, int] | None:
        """Return user and group of the frontend; None: those of this process. Raises `ConfigError`."""
        user = self.configuration.frontend_user
        if user is None:
            if os.geteuid() != 0:
                return None
            try:
                entry = pwd.getpwnam(DEFAULT_FRONTEND_USER)
            except KeyError:
                return None
            return entry.pw_uid, entry.pw_gid
        where = f"{self.options.config}: frontend_user"
        try:
            uid, gid, *_ = resolve_credentials(user, None)
        except UserError as error:
            raise ConfigError(f"{where}: {error}; {_CREATE_USER.format(user)}") from error
        if uid == os.geteuid():
            return None
        if os.geteuid() != 0:
            raise ConfigError(f"{where}: cannot change to user {user}: harpd does not run as root")
        assert uid is not None
        assert gid is not None
        first, last = self.configuration.uid_range() or (0, -1)
        if first <= uid <= last:
            raise ConfigError(f"{self.options.config}: dynamic_uids: includes {uid}, the user of the frontend")
        return uid, gid

    def frontend_warning(self) -> str | None:
        """Return a warning if the frontend runs as root although that is not configured. Raises `ConfigError`."""
        if os.geteuid() != 0 or self.configuration.frontend_user is not None or self.frontend_identity() is not None:
            return None
        user = DEFAULT_FRONTEND_USER
        return f"the network frontend runs as root, because there is no user {user}; {_CREATE_USER.format(user)}"

    def writable_files(self) -> list[str]:
        """Return why another user could change what the calls or the users are, for each file by which it could."""
        options, configuration = self.options, self.configuration
        search_path = [path for paths in configuration.python.search_paths().values() for path in paths]
        named = [configuration.network.keyfile, configuration.authentication.get("file"), *search_path]
        # The runtime directory itself is checked whenever it is opened.
        directory = configuration.runtime_directory
        above = None if directory is None else Path(directory).absolute().parent
        names = [options.config, options.procedures, options.logging, *named, above]
        writers = [describe_writer(Path(name)) for name in names if isinstance(name, (str, Path))]
        return [*dict.fromkeys(filter(None, writers))]

    def readable_files(self) -> list[str]:
        """Return that every user can read a secret, for each file with secrets."""
        configuration = self.configuration
        names: list[Any] = [configuration.network.keyfile, configuration.authentication.get("file")]
        if "users" in configuration.authentication:  # passwords
            names.append(self.options.config)
        return [*filter(None, (describe_reader(Path(name)) for name in names if isinstance(name, (str, Path))))]

    def supervisor_settings(self, runtime_directory: Path, outlive: bool) -> dict[str, Any]:
        """Return the supervisor's settings: JSON values, no secret."""
        options, configuration = self.options, self.configuration
        return {
            "procedures": str(options.procedures),
            "python_path": configuration.python.search_paths(),
            "default_user": self.default_user,
            "default_group": self.default_group,
            **{name: getattr(configuration.limits, name) for name in _SUPERVISOR_LIMITS},
            "exit_info": msgspec.structs.asdict(configuration.exit_info),
            "cgroup": configuration.cgroup,
            "environment": configuration.environment,
            "rights": self.rights_section,
            "dynamic_uids": configuration.uid_range(),
            "outlive": outlive,
            "audit_file": configuration.audit_file,
            "audit_file_bytes": configuration.audit_file_bytes,
            "frontend": self.frontend_identity(),
            "runtime_directory": str(runtime_directory),
            "logging": self.log,
            "descriptors": options.descriptors,
        }


@dataclass(frozen=True)
class LoadedConfig(SupervisorConfig):
    """The frontend's configuration. A connection uses the configuration of its start until it closes."""

    context: ssl.SSLContext
    users: AuthDB
    rights: UserRights
    #: Mistakes that prevent neither start nor reload, each with its place. ``--test`` fails with the first.
    problems: list[str]
    validities: list[Validity]  #: Of the certificates that clients see.


def load_supervisor_config(options: CommandLine, files: Files = LOCAL_FILES) -> SupervisorConfig:
    """Read configuration and log settings. May block. Raises `ConfigError`."""
    configuration = load(options.config, files)
    log_config = None if options.logging is None else load_yaml(options.logging, files=files)
    if options.logging is not None and not isinstance(log_config, dict):
        raise ConfigError(f"{options.logging}: expected a mapping, as logging.config.dictConfig takes it")
    config = SupervisorConfig(options, configuration, {"syslog": options.syslog, "config": log_config})
    if config.runs_calls_as_root and not configuration.is_legacy:
        raise ConfigError(f"{options.config}: {ROOT_CALLS}")
    if configuration.strict_modes and files is LOCAL_FILES and (writable := config.writable_files()):
        raise ConfigError(f"{options.config}: strict_modes: {writable[0]}")
    return config


def load_config(options: CommandLine, files: Files = LOCAL_FILES) -> LoadedConfig:
    """Load the configuration; set `sys.path` for the authentication module. May block. Raises `ConfigError`."""
    common = load_supervisor_config(options, files)
    configuration = common.configuration
    context = server_context(configuration.network, options.config, files)
    certfile = Path(configuration.network.certfile)
    validities = read_validities(certfile, files.read(certfile))
    previous_path = sys.path[:]
    paths = configuration.python.search_paths()
    sys.path[:] = [*paths["prepend"], *options.search_path, *paths["append"]]
    try:
        users, problems = _open_users(configuration.authentication, options.config, files)
    except BaseException:
        sys.path[:] = previous_path
        raise
    rights = UserRights(common.rights_section)
    return LoadedConfig(options, configuration, common.log, context, users, rights, problems, validities)


def _open_users(section: dict[str, Any], file: Path, files: Files) -> tuple[AuthDB, list[str]]:
    """Return the users, and mistakes that their module has found."""
    name = section["module"]
    where = f"{file}: authentication.module: {name}"
    try:
        module = importlib.import_module(name)
    except BaseException as error:
        raise _module_error(f"{where}: cannot be imported", error) from error
    create = getattr(module, "create", None)
    if not callable(create):
        raise ConfigError(f"{where}: expected a function create(config), found none")
    try:
        users: Any = create(dict(section), files=files) if _accepts_files(create) else create(dict(section))
    except ValueError as error:  # its message begins with the key
        raise ConfigError(f"{file}: authentication.{one_line(error)}") from error
    except BaseException as error:
        raise _module_error(f"{where}: create() failed", error) from error
    if not callable(getattr(users, "authenticate", None)):
        raise ConfigError(f"{where}: expected an object with authenticate(), create() returned {type(users).__name__}")
    if not isinstance(users, AuthDB):
        return users, []
    try:
        return users, list(users.problems())
    except BaseException as error:
        raise _module_error(f"{where}: problems() failed", error) from error


def _accepts_files(create: Callable[..., Any]) -> bool:
    try:
        return "files" in inspect.signature(create).parameters
    except (TypeError, ValueError):  # a function in C
        return False


def _module_error(where: str, error: BaseException) -> ConfigError:
    if isinstance(error, KeyboardInterrupt):
        raise error
    return ConfigError(f"{where}: {type(error).__name__}: {one_line(error)}")


def check(options: CommandLine, timeout: float = LOAD_TIMEOUT) -> list[str]:
    """Check configuration, certificate, users, log settings and procedures; return warnings.

    Authentication modules and the procedures file are Python code that runs when it is loaded. A child process loads
    them, so their side effects and their output stay there. Call it before the process has threads, because it forks.
    Raises `ConfigError`: the first error found, or the check was killed after `timeout` seconds.
    """
    reading_end, writing_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()  # to be killed with the processes that the code starts
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            with os.fdopen(writing_end, "w") as report:
                try:
                    warnings = _load_everything(options, lambda step: print(json.dumps(step), file=report, flush=True))
                    result = {"error": "", "warnings": warnings}
                except BaseException as error:  # noqa: BLE001 - any exception of the loaded code is reported
                    result = {"error": one_line(error) or type(error).__name__}
                json.dump(result, report)
        finally:
            os._exit(0)
    os.close(writing_end)
    try:
        text, ended = _read_report(reading_end, child, timeout)
    finally:
        os.close(reading_end)
        with suppress(ProcessLookupError):  # it has ended, or has just been forked
            os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    result = json.loads(text.splitlines()[-1] if text else "null")  # the last step, or the outcome
    if not ended:
        raise ConfigError(f"{result or options.config} took longer than {timeout:g} s")
    if not isinstance(result, dict):
        exited = describe_exit(os.waitstatus_to_exitcode(status))
        raise ConfigError(f"{options.config}: the check exited early ({exited})")
    if result["error"]:
        raise ConfigError(result["error"])
    return list(result["warnings"])


def _read_report(descriptor: int, child: int, timeout: float) -> tuple[bytes, bool]:
    """Wait for the end of the child process, for `timeout` seconds; return its output, and whether it has ended."""
    pidfd = os.pidfd_open(child)
    try:
        poll = select.poll()
        for each in (descriptor, pidfd):  # a process that the child has started may have the other end open
            poll.register(each, select.POLLIN)
        os.set_blocking(descriptor, False)
        text, deadline = b"", time.monotonic() + timeout
        while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            try:
                data = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                return text, True  # the child has ended
            if not data:
                return text, True
            text += data
        return text, False
    finally:
        os.close(pidfd)


def _services_without_output(file: Path) -> list[int]:
    """Return the lines of a procedures file that start a process which outlives its call but prints to harpd's log."""
    calls = [node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        given = {keyword.arg for keyword in call.keywords}
        if name == "Popen" and "start_new_session" in given and None not in given and not {"stdout", "stderr"} <= given:
            found.append(call.lineno)
    return found


def _enter_surroundings(configuration: Configuration) -> None:
    """Give this process the surroundings in which harpd loads the procedures file."""
    environment = call_environment(os.environ, configuration.environment)
    sys.path[:] = map(os.path.abspath, sys.path)
    enter_surroundings()
    os.environ.clear()
    os.environ.update(environment)


def _load_everything(options: CommandLine, begin: Callable[[str], None]) -> list[str]:
    """Load what a start loads; return warnings. `begin` is called with the name of each step that may block."""
    begin(f"{options.config}: reading it, its files and its authentication module")
    config = load_config(options)
    config.configure_log()
    begin(f"{options.config}: network.address: looking up {config.configuration.network.address}")
    try:
        resolve(config.configuration.network.address)  # only a start can find that a port is in use
    except ResolveError as error:
        raise ConfigError(f"{options.config}: network.address: {error}") from error
    if (audit_file := config.configuration.audit_file) is not None:
        from harp_daemon.audit_file import AuditError, check_usable  # large, and the daemon does not need it

        try:
            check_usable(Path(audit_file))
        except AuditError as error:
            raise ConfigError(f"{options.config}: audit_file: {error}") from error
    warnings = config.users.warnings() if isinstance(config.users, AuthDB) else []
    # Before the change of the directory: paths may be relative.
    writable, readable = config.writable_files(), config.readable_files()
    threads_before = threading.active_count()
    _enter_surroundings(config.configuration)
    begin(f"{options.procedures}: loading it")
    procedures = load_procedures(options.procedures)
    warnings += filter(None, [config.frontend_warning()])
    for line in _services_without_output(options.procedures):
        warnings.append(
            f"{options.procedures}:{line}: Popen without stdout and stderr; a restart of harpd ends the process"
        )
    now = datetime.now(UTC)
    for validity in config.validities:
        if reason := validity.describe_error(now):
            raise ConfigError(f"{options.config}: network.certfile: {reason}")
        warnings += filter(None, [validity.describe_warning(now)])
    if config.problems:
        raise ConfigError(config.problems[0])
    if config.configuration.strict_modes and readable:
        raise ConfigError(f"{options.config}: strict_modes: {readable[0]}")
    warnings += [] if config.configuration.strict_modes else [*writable, *readable]
    warnings += [f"{options.config}: {reason}" for reason in config.rights.describe_unmatched(procedures)]
    if not procedures:
        warnings.append(f"{options.procedures}: exposes no procedure; decorate functions with @procedure")
    if (running := threading.active_count() - threads_before) > 0:
        warnings.append(f"{options.procedures}: started {running} thread(s), which will be missing in calls")
    if config.runs_calls_as_root:
        warnings.append(f"{options.config}: {ROOT_CALLS}")
    begin(f"{options.config}: looking up users and groups")
    identity = config.frontend_identity()
    frontend_user = None if identity is None else identity[0]
    if (uids := config.configuration.uid_range()) is not None:
        taken = [entry.pw_name for entry in pwd.getpwall() if uids[0] <= entry.pw_uid <= uids[1]]
        if taken:
            raise ConfigError(f"{options.config}: dynamic_uids: user {taken[0]} has an id of this range")
    default_groups = None if config.default_group is None else (config.default_group,)
    default = "the default user and group"
    accounts: list[tuple[str, Any, Any]] = [(default, config.default_user, default_groups)]
    for name, found in procedures.items():
        has_dynamic_uid = found.uid == DYNAMIC_UID
        if has_dynamic_uid and config.configuration.dynamic_uids is None:
            raise ConfigError(
                f"{options.config}: dynamic_uids: missing; {name} has uid={DYNAMIC_UID!r}, which needs it"
            )
        accounts.append((f"{options.procedures}: {name}", 0 if has_dynamic_uid else found.uid, found.gid))
        user = config.default_user if found.uid is None else found.uid
        if found.processes is not None and user_id(user) == 0:
            warnings.append(f"{options.procedures}: {name}: processes restricts no call that runs as root")
    for owner, user, groups in accounts:
        try:
            uid, *_ = resolve_credentials(user, groups)
        except UserError as error:
            if owner == default:
                raise ConfigError(f"{options.config}: default_user, default_group: {error}") from error
            warnings.append(f"{owner}: {error}; calls will fail")
        else:
            if uid is not None and uid == frontend_user:
                warnings.append(f"{owner}: the user of the frontend; calls will fail, set another user")
    return warnings
