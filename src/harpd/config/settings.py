"""harpd's settings: reads a YAML file into one frozen, validated `Configuration`. Spec: docs/settings-harpd.md.

Errors read ``FILE: key: expected X, got Y``.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Hashable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import yaml
from msgspec import Meta

from harp_daemon.server_tls import server_context as shared_server_context
from harp_daemon.settings import (
    DEFAULT_TLS_MINIMUM,
    TLS_VERSIONS,
    Bytes,
    ConfigError,
    Count,
    check_choice,
    convert,
    convert_entry,
    describe_value,
)
from harpd.auth.files import Files
from harpd.auth.rights import parse_network
from harpd.worker.environment import OWN_PREFIX

LOCAL_FILES = Files()

# The maximum of one year stands for "no limit". It excludes infinity and NaN, which are typing errors.
Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=365 * 86400, extra={"unit": "seconds"})]
#: The least and the greatest user id of calls with their own, and how many there may be.
_LEAST_DYNAMIC_UID, _MOST_DYNAMIC_UID, _MAX_DYNAMIC_UIDS = 1000, 2**31 - 1, 65536

#: A user or a group: its id or its name.
Identity: TypeAlias = Annotated[int, Meta(ge=0)] | Annotated[str, Meta(min_length=1)]


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Section `network`."""

    certfile: str  #: The server's certificate and the chain to its authority, PEM.
    keyfile: str  #: The certificate's key, PEM.
    address: str | None = None  #: The address or name to listen on; None: every address, IPv4 and IPv6.
    port: Annotated[int, Meta(ge=0, le=65535)] = 4306  #: The TCP port; 0: any free port.
    #: The lowest TLS version. YAML reads ``1.2`` as a number, so both types are accepted.
    tls_minimum: str | float = DEFAULT_TLS_MINIMUM

    def __post_init__(self) -> None:
        check_choice("tls_minimum", self.tls_minimum, TLS_VERSIONS)


class Python(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Section `python`."""

    #: Directories for the module search: one or a list, searched after Python's own path, as in the legacy harpd; or a
    #: mapping with the keys ``prepend`` and ``append``.
    path: str | list[str] | dict[str, str | list[str]] = []

    def __post_init__(self) -> None:
        if isinstance(self.path, dict) and (unknown := sorted(set(self.path) - {"prepend", "append"})):
            raise ValueError(f"path.{unknown[0]}: unknown key; expected prepend or append")

    def search_paths(self) -> dict[str, list[str]]:
        """Return the directories to search before and after Python's own: the keys ``prepend`` and ``append``."""
        path = self.path if isinstance(self.path, dict) else {"append": self.path}
        directories = {key: path.get(key, []) for key in ("prepend", "append")}
        return {key: [value] if isinstance(value, str) else value for key, value in directories.items()}


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Section `limits`."""

    max_connections: Count = 1000  #: Most connections at the same time.
    #: Most connections of one address that have not authenticated, unless another one of it did within the last hour.
    max_connections_per_peer: Count = 64
    max_calls: Count = 500  #: Most calls at the same time.
    handshake_timeout: Seconds = 10.0  #: Time for the TLS handshake, from the acceptance of the connection.
    request_timeout: Seconds = 30.0  #: Time for the request line, from the end of the handshake.
    request_line: Bytes = 16 * 1024 * 1024  #: Longest request line.
    #: Total length of all request lines that are being received or passed to the supervisor.
    request_memory: Bytes = 256 * 1024 * 1024
    keep_alive_timeout: Seconds = 60.0  #: Time that a keep-alive connection waits for the next request.
    authentication_timeout: Seconds = 10.0  #: Time for a password check.
    authentication_delay: Seconds = 5.0  #: Longest delay of a password check after wrong passwords.
    authentication_threads: Count = 8  #: Most password checks at the same time.
    write_timeout: Seconds = 300.0  #: Seconds after which a client that does not read is disconnected.
    kill_grace: Seconds = 5.0  #: Time between SIGXCPU, SIGTERM and SIGKILL when a call is stopped.
    #: Bytes of a resumable call that its dispatcher has not stored. At the limit, the procedure is paused. For
    #: a connection-bound call, this limit is at most 1 MiB.
    spool: Bytes = 64 * 1024 * 1024
    #: Data buffered for all calls. When it is reached, calls with more than 1 MiB are paused.
    spool_memory: Bytes = 1024 * 1024 * 1024
    disconnect_timeout: Seconds = 3600.0  #: Longest time that a dispatcher can request for calls without contact.
    result_ttl: Seconds = 86400.0  #: Longest time that a dispatcher can request for the storage of unfetched results.

    output_lines: Count = 1000  #: Most lines that a call may print to the log in a second; others are dropped.
    output_bytes: Bytes = 256 * 1024  #: Most bytes that a call may print to the log in a second.

    def __post_init__(self) -> None:
        for total, single in (("request_memory", "request_line"), ("spool_memory", "spool")):
            if (value := getattr(self, total)) < (minimum := getattr(self, single)):
                raise ValueError(f"{total}: expected at least {minimum}, as limits.{single}, got {value}")


class Rights(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An entry of section `rights`: the rights of one user."""

    procedures: list[str] | None = None  #: Patterns of the names of procedures that it may call; None: all.
    peers: list[str] | None = None  #: Addresses and networks from which it may send requests; None: all.

    def __post_init__(self) -> None:
        for peer in self.peers or ():
            try:
                parse_network(peer)
            except ValueError as error:
                raise ValueError(f"peers: expected addresses or networks as 192.0.2.0/24: {error}") from error


class Metrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Section `metrics`: the listener for Prometheus."""

    address: str = "127.0.0.1"  #: The loopback address to listen on.
    port: Annotated[int, Meta(ge=0, le=65535)] = 4307  #: The TCP port; 0: any free port.

    def __post_init__(self) -> None:
        try:
            is_loopback = ip_address(self.address).is_loopback
        except ValueError:
            is_loopback = False
        if not is_loopback:
            raise ValueError(f"address: expected a loopback address such as 127.0.0.1, got {self.address!r}")


class ExitInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Section `exit_info`: parts of a call's exit info that may contain secrets and are therefore off by default."""

    stderr: bool = False  #: Whether it includes the last lines of stderr.
    traceback: bool = False  #: Whether it includes the traceback of an exception.


class Configuration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings of the file."""

    network: Network
    authentication: dict[str, Any]  #: `module`, and the keys of this module.
    python: Python = Python()
    limits: Limits = Limits()
    exit_info: ExitInfo = ExitInfo()
    #: The listener for Prometheus; None: metrics are not served.
    metrics: Metrics | None = None
    #: The directory of sockets and state files; None: see `harpd.supervisor.runtime_directory`.
    runtime_directory: str | None = None
    #: The directory of the parent cgroup of the calls' cgroups; None: the service's own, if it was delegated.
    cgroup: str | None = None
    #: The user and the group of procedures without `uid` and `gid`: id or name. The command line has priority.
    default_user: Identity | None = None
    default_group: Identity | None = None
    #: The user ids for procedures with ``uid="dynamic"``: ``FIRST-LAST``. They belong to harpd alone.
    dynamic_uids: str | None = None
    #: The rights of users by name; ``*``: of all users without an entry. Empty: each user may call all procedures.
    rights: dict[str, Any] = {}  # values: `Rights`
    #: Variables of the environment of calls; null: the value of harpd's environment.
    environment: dict[str, str | None] = {}
    #: The user of the frontend if harpd runs as root: name or numeric id; None: ``harpd`` if it exists, otherwise root.
    frontend_user: str | int | None = None
    #: Whether a file by which another user could control calls prevents start and reload; otherwise it is a warning.
    strict_modes: bool = True

    #: The file that records calls, denials and commands; None: none.
    audit_file: str | None = None
    audit_file_bytes: Bytes = 100 * 1024 * 1024  #: The size from which on another audit file is begun.

    def uid_range(self) -> tuple[int, int] | None:
        """Return the first and the last of `dynamic_uids`. Raises ValueError."""
        if self.dynamic_uids is None:
            return None
        found = re.fullmatch(r"([0-9]{1,10})-([0-9]{1,10})", self.dynamic_uids)
        first, last = map(int, found.groups()) if found else (0, 0)
        if not _LEAST_DYNAMIC_UID <= first <= last <= _MOST_DYNAMIC_UID or last - first >= _MAX_DYNAMIC_UIDS:
            least, most, number = _LEAST_DYNAMIC_UID, _MOST_DYNAMIC_UID, _MAX_DYNAMIC_UIDS
            expected = f"a range as 1900000000-1900000999 from {least} to {most}, of at most {number} ids"
            raise ValueError(f"dynamic_uids: expected {expected}, got {self.dynamic_uids!r}")
        return first, last

    def __post_init__(self) -> None:
        self.uid_range()
        rights = {user: convert_entry(f"rights.{user}", value, Rights) for user, value in self.rights.items()}
        msgspec.structs.force_setattr(self, "rights", rights)
        for name in self.environment:
            if not name or name.startswith(OWN_PREFIX) or not name.isprintable() or "=" in name:
                own = f"no {OWN_PREFIX}..., which harpd sets itself"
                raise ValueError(f"environment.{name}: expected the name of a variable, {own}")
            if "\0" in (self.environment[name] or ""):
                raise ValueError(f"environment.{name}: expected a text without the character NUL")
        module = self.authentication.get("module")
        if not isinstance(module, str) or not module:
            raise ValueError(f"authentication.module: expected the name of a module, got {describe_value(module)}")

    @property
    def is_legacy(self) -> bool:
        """Whether it has no setting that a legacy harpd does not know."""
        own = self.network
        network = Network(certfile=own.certfile, keyfile=own.keyfile, address=own.address, port=own.port)
        return self == Configuration(network=network, authentication=self.authentication, python=self.python)

    def __repr__(self) -> str:
        # The section `authentication` may contain passwords.
        return f"Configuration(network={self.network!r}, authentication={self.authentication['module']!r}, ...)"


def load(path: Path, files: Files = LOCAL_FILES) -> Configuration:
    """Read and check a configuration file, YAML. Raises `ConfigError`."""
    return convert(path, load_yaml(path, "; copy examples/harpd.conf, or use --config", files), Configuration)


def load_yaml(path: Path, if_missing: str = "", files: Files = LOCAL_FILES) -> Any:
    """Read a YAML file. Raises `ConfigError`, also for a duplicate key; `if_missing` is a hint for a missing file."""
    try:
        return yaml.load(files.read(path), _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except OSError as error:
        hint = if_missing if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{path}: {error.strerror}{hint}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: {where}{error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {one_line(error)}") from error


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


def one_line(error: BaseException) -> str:
    """Return the message of an exception without line breaks."""
    return " ".join(str(error).split())


def server_context(network: Network, path: Path, files: Files = LOCAL_FILES) -> ssl.SSLContext:
    """Return the TLS context for the section `network` of the file `path`. Raises `ConfigError`."""
    minimum, where = str(network.tls_minimum), f"{path}: network"
    certfile, keyfile = Path(network.certfile), Path(network.keyfile)
    return shared_server_context(where, certfile, keyfile, minimum, readable_path=files.readable_path)
