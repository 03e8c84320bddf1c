"""The loaded configuration, which a reload replaces as a whole: settings, certificate, users, log settings.

``--test``, the start and every reload use the same functions, so they find the same errors.
"""

from __future__ import annotations

import importlib
import resource
import ssl
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from harp_daemon import logs
from harp_daemon.settings import ConfigError
from harpd.auth import AuthDB
from harpd.config.settings import Configuration, load, load_yaml, one_line, server_context

#: The keys of section `limits` that the supervisor applies.
_SUPERVISOR_LIMITS = ("max_calls", "kill_grace", "spool", "spool_memory", "disconnect_timeout", "result_ttl")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command line. Paths are absolute; users and groups are names or numeric ids; None: not given."""

    command: str | None  #: The command; None: frontend and supervisor in one program.
    config: Path  #: The configuration file.
    procedures: Path  #: The procedures file.
    logging: Path | None  #: The file for `logging.config.dictConfig`.
    test: bool  #: Check the configuration, and exit.
    default_user: str | int | None  #: The user of procedures without `uid`.
    default_group: str | int | None  #: The group of procedures without `gid`.
    syslog: bool  #: Log to syslog.
    daemon: bool  #: The program runs in the background: its child processes must not use the terminal.
    pidfile: Path | None  #: The file for the process id.
    timeout: float | None  #: The maximum seconds of ``drain``.
    search_path: tuple[str, ...] = tuple(sys.path)  #: The program's initial `sys.path`.
    #: The program's initial limit of open files, which calls get.
    descriptors: int = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0])


@dataclass(frozen=True)
class SupervisorConfig:
    """The configuration that the launcher needs: without certificate and users."""

    configuration: Configuration
    log: dict[str, Any]  #: Arguments for `harp_daemon.logs.configure`: JSON values.


@dataclass(frozen=True)
class LoadedConfig(SupervisorConfig):
    """The frontend's configuration. Each connection uses the one with which it began until it closes."""

    context: ssl.SSLContext
    users: AuthDB


def load_supervisor_config(options: CommandLine) -> SupervisorConfig:
    """Read configuration and log settings. May block. Raises `ConfigError`."""
    configuration = load(options.config)
    return SupervisorConfig(configuration, {"syslog": options.syslog, "config": _log_config(options.logging)})


def load_config(options: CommandLine) -> LoadedConfig:
    """Load and check configuration, certificate, users and log settings. May block.

    Sets `sys.path`, because the authentication module may need it.

    Raises:
        ConfigError: the first error found; `sys.path` is unchanged.
    """
    supervisor_config = load_supervisor_config(options)
    configuration = supervisor_config.configuration
    context = server_context(configuration.network, options.config)
    previous_path = sys.path[:]
    paths = configuration.python.search_paths()
    sys.path[:] = [*paths["prepend"], *options.search_path, *paths["append"]]
    try:
        users = _open_users(configuration.authentication, options.config)
    except BaseException:
        sys.path[:] = previous_path
        raise
    return LoadedConfig(configuration, supervisor_config.log, context, users)


def _log_config(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    config = load_yaml(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a mapping, as logging.config.dictConfig takes it")
    return config


def _open_users(section: dict[str, Any], file: Path) -> AuthDB:
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
        users: AuthDB = create({key: value for key, value in section.items() if key != "module"})
    except ValueError as error:  # its message begins with the key
        raise ConfigError(f"{file}: authentication.{one_line(error)}") from error
    except BaseException as error:
        raise _module_error(f"{where}: create() failed", error) from error
    if not callable(getattr(users, "authenticate", None)):
        raise ConfigError(f"{where}: expected an object with authenticate(), create() returned {type(users).__name__}")
    return users


def _module_error(where: str, error: BaseException) -> ConfigError:
    if isinstance(error, KeyboardInterrupt):
        raise error
    return ConfigError(f"{where}: {type(error).__name__}: {one_line(error)}")


def configure_log(options: CommandLine, config: SupervisorConfig) -> None:
    """Configure this process's log. Raises `ConfigError`."""
    try:
        logs.configure(name="harpd", **config.log)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{options.logging or '--syslog'}: {one_line(error)}") from error


def supervisor_settings(
    options: CommandLine, config: SupervisorConfig, runtime_directory: Path, outlive: bool
) -> dict[str, Any]:
    """Return the supervisor's settings: JSON values, no secret. Spec: harpd.supervisor.main.

    Args:
        options: the command line.
        config: configuration and log settings.
        runtime_directory: the directory of its sockets.
        outlive: whether it continues without a launcher while it holds calls.
    """
    configuration = config.configuration
    return {
        "procedures": str(options.procedures),
        "python_path": configuration.python.search_paths(),
        "default_user": options.default_user,
        "default_group": options.default_group,
        **{name: getattr(configuration.limits, name) for name in _SUPERVISOR_LIMITS},
        "exit_info": msgspec.structs.asdict(configuration.exit_info),
        "cgroup": configuration.cgroup,
        "outlive": outlive,
        "runtime_directory": str(runtime_directory),
        "logging": config.log,
        "descriptors": options.descriptors,
    }
