"""harpd's configuration: a YAML file becomes one frozen `Configuration`, checked once.

The daemon, its reload and ``--test`` all read it by `load`. Every fault reads ``FILE: key: expected X, got Y``.

Spec: docs/settings-harpd.md.
"""

from __future__ import annotations

import ssl
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import yaml
from msgspec import Meta

from harp_daemon import sockets
from harp_daemon.config_errors import describe_validation_error, describe_value
from harp_daemon.tls import DEFAULT_MINIMUM, TLS_VERSIONS, set_minimum_version

__all__ = [
    "ConfigError",
    "Configuration",
    "ExitInfo",
    "Limits",
    "Network",
    "Python",
    "listening_places",
    "load",
    "load_yaml",
    "server_context",
]


class ConfigError(Exception):
    """The configuration can't be used. The message is one line that names file, key and fault."""


# A limit that is off is a limit of a year: infinity and NaN are typing errors.
Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=365 * 86400, extra={"unit": "seconds"})]
Bytes: TypeAlias = Annotated[int, Meta(ge=1024, extra={"unit": "bytes"})]
Count: TypeAlias = Annotated[int, Meta(ge=1, extra={"unit": "count"})]


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Section `network`.

    Attributes:
        certfile: the server's certificate and the chain to its authority, PEM.
        keyfile: the certificate's key, PEM.
        address: the address or name to listen on; None: every address, IPv4 and IPv6.
        port: 0 takes a free one.
        tls_minimum: the least version of TLS. YAML reads ``1.2`` as a number; both forms are taken.
    """

    certfile: str
    keyfile: str
    address: str | None = None
    port: Annotated[int, Meta(ge=0, le=65535)] = 4306
    tls_minimum: str | float = DEFAULT_MINIMUM

    def __post_init__(self) -> None:
        if self.tls_floor not in TLS_VERSIONS:
            raise ValueError(f"tls_minimum: expected one of {', '.join(TLS_VERSIONS)}, got {self.tls_minimum!r}")

    @property
    def tls_floor(self) -> str:
        """`tls_minimum` as `harp_daemon.tls` names it."""
        return str(self.tls_minimum)


class Python(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Section `python`; `path`: where own modules are found. A directory or a list of them is put first."""

    path: str | list[str] | dict[str, str | list[str]] = []

    def __post_init__(self) -> None:
        if isinstance(self.path, dict) and (unknown := sorted(set(self.path) - {"prepend", "append"})):
            raise ValueError(f"path.{unknown[0]}: unknown key; expected prepend or append")

    def search_paths(self) -> dict[str, list[str]]:
        """The directories to put before and after Python's own: lists under ``prepend`` and ``append``."""
        given = self.path if isinstance(self.path, dict) else {"prepend": self.path}
        both = {end: given.get(end, []) for end in ("prepend", "append")}
        return {end: [listed] if isinstance(listed, str) else listed for end, listed in both.items()}


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Section `limits`.

    Attributes:
        connections: connections at once, from their arrival until they are closed.
        calls: calls at once.
        handshake: from the connection's arrival to the end of the TLS handshake.
        request: from the handshake to the end of the request line.
        request_line: length of the request line.
        request_memory: length of all request lines together that are on their way to a call.
        idle: how long a connection that is kept waits for another request.
        authentication: for the password's check.
        authentication_threads: password checks at once.
        write_stall: how long a client may take nothing of what it is sent.
        kill_grace: between two steps of ending a call: SIGXCPU, SIGTERM, SIGKILL.
        spool: what a kept call may have said that its dispatcher has not stored yet, and, up to 1 MiB, what a tied
            one may have said that its client has not read yet; past it the procedure waits.
        spool_memory: what all calls together may have said so; past it those with more than 1 MiB wait.
        disconnect_timeout: the most that a dispatcher may ask for its running calls to go on without it.
        result_ttl: the most that a dispatcher may ask for the ends of its calls to be kept for it.
    """

    max_connections: Count = 1000
    max_calls: Count = 500
    handshake_timeout: Seconds = 10.0
    request_timeout: Seconds = 30.0
    request_line: Bytes = 16 * 1024 * 1024
    request_memory: Bytes = 256 * 1024 * 1024
    keep_alive_timeout: Seconds = 60.0
    authentication_timeout: Seconds = 10.0
    authentication_threads: Count = 8
    write_timeout: Seconds = 300.0
    kill_grace: Seconds = 5.0
    spool: Bytes = 64 * 1024 * 1024
    spool_memory: Bytes = 1024 * 1024 * 1024
    disconnect_timeout: Seconds = 3600.0
    result_ttl: Seconds = 86400.0

    def __post_init__(self) -> None:
        if self.request_memory < self.request_line:
            expected = f"at least {self.request_line}, as limits.request_line"
            raise ValueError(f"request_memory: expected {expected}, got {self.request_memory}")
        if self.spool_memory < self.spool:
            expected = f"at least {self.spool}, as limits.spool"
            raise ValueError(f"spool_memory: expected {expected}, got {self.spool_memory}")


class ExitInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Section `exit_info`: what dispatchers are told of a call's end, beside what is no secret.

    Attributes:
        stderr: the last lines of its stderr.
        traceback: the traceback of an exception.
    """

    stderr: bool = False
    traceback: bool = False


class Configuration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file.

    Attributes:
        network: where to listen, and as whom.
        authentication: `module`, and the keys that this module takes.
        python: where own modules are found.
        limits: how much of everything.
        exit_info: what dispatchers are told of a call's end.
        runtime_directory: where gate and supervisors meet, with the records of running calls;
            None: a fresh private directory, removed at the end.
        cgroup: the directory of the cgroup in which each call gets one; None: the service's own, if it was delegated.
    """

    network: Network
    authentication: dict[str, Any]
    python: Python = Python()
    limits: Limits = Limits()
    exit_info: ExitInfo = ExitInfo()
    runtime_directory: str | None = None
    cgroup: str | None = None

    def __post_init__(self) -> None:
        module = self.authentication.get("module")
        if not isinstance(module, str) or not module:
            raise ValueError(f"authentication.module: expected the name of a module, got {describe_value(module)}")

    def __repr__(self) -> str:
        # The section `authentication` may hold passwords.
        return f"Configuration(network={self.network!r}, authentication={self.authentication['module']!r}, ...)"


def load(path: Path) -> Configuration:
    """Read and check a configuration file.

    Args:
        path: the file, YAML.

    Raises:
        ConfigError: the file can't be read, is not YAML, or has a wrong or unknown key.
    """
    document = load_yaml(path)
    try:
        return msgspec.convert(document, Configuration)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {describe_validation_error(error, document)}") from error


def load_yaml(path: Path) -> Any:
    """Read a YAML file. Raises `ConfigError`; a key that a mapping has twice is an error too."""
    try:
        with path.open("rb") as file:
            return yaml.load(file, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: {where}{error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {_one_line(error)}") from error


class _Loader(yaml.SafeLoader):
    """YAML, values only, without the silent loss of a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands here for the second time", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def listening_places(network: Network, path: Path) -> list[sockets.TCPPlace]:
    """Return what to bind in order to listen as `network` describes. It may wait for a name server.

    Args:
        network: the section.
        path: the configuration file, for messages.

    Raises:
        ConfigError: the address can't be resolved.
    """
    try:
        return sockets.listening_places(network.address)
    except sockets.ResolveError as error:
        raise ConfigError(f"{path}: network.address: {error}") from error


def server_context(network: Network, path: Path) -> ssl.SSLContext:
    """Make the TLS context of the server that `network` describes.

    Args:
        network: the section.
        path: the configuration file, for messages.

    Raises:
        ConfigError: the certificate or the key can't be read, or the key is another certificate's.
    """
    for key in ("certfile", "keyfile"):
        name = getattr(network, key)
        try:
            Path(name).open("rb").close()
        except OSError as error:
            raise ConfigError(f"{path}: network.{key}: {name}: {error.strerror}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    set_minimum_version(context, network.tls_floor)
    try:
        # A key with a passphrase fails here; without the argument OpenSSL would ask the terminal.
        context.load_cert_chain(network.certfile, network.keyfile, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            fault = f"{network.keyfile}: expected the key of {network.certfile}, got another certificate's key"
            raise ConfigError(f"{path}: network.keyfile: {fault}") from error
        fault = f"expected PEM files of a certificate and its key, got {network.certfile} and {network.keyfile}"
        raise ConfigError(f"{path}: network.certfile: {fault} ({_one_line(error)})") from error
    return context
