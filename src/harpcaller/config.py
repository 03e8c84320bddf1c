"""The dispatcher's configuration: a TOML file becomes one frozen, checked value.

An error is a `ConfigError` of the form ``FILE: KEY: expected X, got Y``. Files of the legacy dispatcher load: keys
without a meaning here are collected in `Config.ignored` and logged once. Other unknown keys are errors.

Spec: docs/settings-dispatcher.md.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from harp_daemon.regular_files import read_regular
from harp_daemon.settings import DEFAULT_TLS_MINIMUM, TLS_VERSIONS, Bytes, ConfigError, Count, check_choice, convert

DEFAULT_FILE = Path("/etc/harpcaller/harpcaller.toml")  #: The default path of the configuration file.
DEFAULT_MAX_AGE = 720.0  #: The default of `max_age` in hours.
#: Keys of the legacy dispatcher without a meaning here: Erlang's logging modules and Erlang's own settings.
IGNORED_KEYS = frozenset({"log_handlers", "erlang"})
MAX_SECONDS = 315_360_000  #: Ten years. Longer times are mistakes, and some exceed the range of event loops.

Seconds = Annotated[float, Meta(gt=0, le=MAX_SECONDS)]
SecondsOrZero = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]
Hours = Annotated[float, Meta(gt=0, le=MAX_SECONDS // 3600)]

_STOP_MARGIN = 10.0  #: Maximum seconds that a host needs to stop a call after `disconnect_timeout`.
_ADDRESS = re.compile(r"(?:\[(?P<bracketed>[^\[\]]+)\]|(?P<plain>[^:\[\]]+)):(?P<port>\d{1,5})", re.ASCII)
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}", re.ASCII)
_BASE_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """An address to listen on."""

    host: str | None  #: A name or an address; None for all addresses of the machine.
    port: int  #: The TCP port; 0 for any free port.
    path: Path | None = None  #: The path of a Unix socket; None for TCP.
    tls: bool = False  #: Whether clients must speak TLS.

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse ``ADDRESS:PORT``, ``*:PORT``, ``[IPV6]:PORT``, each also after ``tls:``, or ``unix:/PATH``.

        Return None for any other text.
        """
        if text.startswith("unix:/"):
            return cls(None, 0, Path(text.removeprefix("unix:")))
        match = _ADDRESS.fullmatch(text.removeprefix("tls:"))
        if match is None or int(match["port"]) > 65535:
            return None
        host = match["bracketed"] or match["plain"]
        return cls(None if host == "*" else host, int(match["port"]), tls=text.startswith("tls:"))

    @property
    def is_local(self) -> bool:
        """Whether only users of this machine can connect."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return self.host is not None and ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return False  # another name: it may resolve to any address

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        host = "*" if self.host is None else f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls:' if self.tls else ''}{host}:{self.port}"


class TLSFiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section `tls`: the certificate of the listeners with TLS, and the authorities of their clients."""

    certfile: Path  #: PEM file with the certificate and the chain to its authority.
    keyfile: Path  #: PEM file with the key of the certificate.
    client_ca_file: Path | None = None  #: PEM file with the authorities of clients' certificates.
    crl_file: Path | None = None  #: PEM file with the revocation lists of these authorities.
    minimum: str = DEFAULT_TLS_MINIMUM  #: Minimum TLS version of clients.

    def __post_init__(self) -> None:
        if self.minimum not in TLS_VERSIONS:
            raise ValueError(f"minimum: expected one of {', '.join(TLS_VERSIONS)}, got {self.minimum!r}")
        if self.crl_file is not None and self.client_ca_file is None:
            raise ValueError("crl_file: expected client_ca_file beside it, got none")


class HTTPSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section `http`: the HTTP API. Without the section no HTTP is served."""

    listen: tuple[Address, ...] = (Address("127.0.0.1", 3580),)  #: Listening addresses.
    certfile: Path | None = None  #: PEM file with the certificate of the addresses with TLS, and its chain.
    keyfile: Path | None = None  #: PEM file with the key of the certificate.
    client_ca_file: Path | None = None  #: PEM file with the authorities of clients' certificates.
    crl_file: Path | None = None  #: PEM file with the revocation lists of these authorities.
    hosts: tuple[str, ...] = ()  #: Names of this dispatcher that requests may have beside those of this machine.
    users_file: Path | None = None  #: Users who log in by name and password.
    session_idle: Seconds = 43_200.0  #: Seconds without a request after which a session ends.
    session_age: Seconds = 604_800.0  #: Maximum seconds of a session.
    tls_minimum: str = DEFAULT_TLS_MINIMUM  #: Minimum TLS version of clients.
    behind_proxy: bool = False  #: Whether a proxy with TLS is in front of the addresses.
    base_path: str = ""  #: The path before each path of the API; a proxy may need one.
    connections: Count = 1_000  #: Maximum number of connections.
    #: Maximum number of connections of one address that have sent no valid request.
    connections_per_peer: Count = 100
    requests_per_client: Count = 100  #: Maximum number of requests of one principal in a second; twice as many at once.
    waits: Count = 500  #: Maximum number of requests that wait for a job.
    waits_per_client: Count = 100  #: Maximum number of them of one principal.
    streams: Count = 1_000  #: Maximum number of responses that follow records or events.
    streams_per_client: Count = 20  #: Maximum number of them of one principal.
    console: bool = True  #: Whether the web console is served, too.
    #: Who may read the metrics without a proof of identity: "local" is a client on this machine.
    metrics_anonymous: str = "local"
    metrics_hosts: Annotated[int, Meta(ge=0)] = 500  #: Number of hosts above which no metric names a host.
    metrics_queues: tuple[str, ...] = ()  #: Queues with metrics of their own.

    def __post_init__(self) -> None:
        check_choice("tls_minimum", self.tls_minimum, TLS_VERSIONS)
        if (self.certfile is None) != (self.keyfile is None):
            raise ValueError("certfile: expected both certfile and keyfile, got one of them")
        if self.client_ca_file is not None and self.certfile is None:
            raise ValueError("client_ca_file: expected certfile and keyfile beside it, got none")
        if self.crl_file is not None and self.client_ca_file is None:
            raise ValueError("crl_file: expected client_ca_file beside it, got none")
        for name in self.hosts:
            if not _HOST_NAME.fullmatch(name):
                raise ValueError(f"hosts: expected names or addresses without a port, got {name!r}")
        check_choice("metrics_anonymous", self.metrics_anonymous, ("local", "all", "none"))
        for queue in self.metrics_queues:
            try:
                is_object = isinstance(json.loads(queue), dict)
            except ValueError:
                is_object = False
            if not is_object:
                raise ValueError(f"metrics_queues: expected the names of queues, JSON objects as text, got {queue!r}")
        if not _BASE_PATH.fullmatch(self.base_path):
            raise ValueError(f'base_path: expected "" or a path such as "/harp", got {self.base_path!r}')


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The configuration. `KEYS` are the keys of the file; see docs/settings-dispatcher.md."""

    file: Path = DEFAULT_FILE  #: The file. Not a key.
    ignored: tuple[str, ...] = ()  #: The keys of the file that only the legacy dispatcher uses. Not a key.

    listen: tuple[Address, ...] = (Address("127.0.0.1", 3502),)  #: Listening addresses for clients.
    tls: TLSFiles | None = None  #: Certificate of the listening addresses with TLS.
    tokens_file: Path | None = None  #: Tokens of clients.
    max_connections: Count = 10_000  #: Maximum number of client connections.
    #: Maximum number of connections of one address that have sent no valid request.
    max_connections_per_peer: Count = 1_000
    request_line: Bytes = 16 * 1024 * 1024  #: Maximum length of a request line in bytes.
    request_memory: Bytes = 256 * 1024 * 1024  #: Maximum total bytes of long requests that are being read or stored.
    reply_memory: Bytes = 256 * 1024 * 1024  #: Maximum total bytes of long replies that clients have not read.
    write_timeout: Seconds = 300.0  #: Seconds to read part of a long reply while others wait for `reply_memory`.
    idle_timeout: Seconds = 30.0  #: Maximum seconds to receive a request.

    http: HTTPSettings | None = None  #: The HTTP API.

    secrets_key_file: Path | None = None  #: File of the keys that encrypt secret arguments. None: these are refused.
    access_file: Path | None = None  #: File of roles and rules. None: every client may call everything.

    audit_file: Path | None = None  #: File in which the actions of clients are recorded. None: none.
    audit_file_bytes: Bytes = 100 * 1024 * 1024  #: Size in bytes from which on another audit file is begun.
    audit_reads: bool = False  #: Whether it also has the requests that read jobs.

    stream_directory: Path = Path("/var/lib/harpcaller/stream")  #: Directory of jobs and records.
    #: Free bytes of the file system of `stream_directory` below which no job is accepted.
    disk_reserve: Annotated[int, Meta(ge=0)] = 128 * 1024 * 1024
    default_timeout: Seconds = 600.0  #: Maximum seconds between two messages of a job.
    max_exec_time: Seconds = 600.0  #: Maximum seconds from the start of a job to its end.
    start_within: SecondsOrZero = 10.0  #: Seconds for which a start that certainly did not happen is tried again.
    #: Hours from the end of a job to its deletion. None: jobs are never deleted, as by a legacy file without the key.
    max_age: Hours | None = DEFAULT_MAX_AGE

    max_calls: Count = 4_000  #: Maximum number of running calls on all hosts.
    max_calls_per_host: Count = 250  #: Maximum number of running calls on one host.
    connect_timeout: Seconds = 10.0  #: Maximum seconds for lookup and connection, and again for the TLS handshake.
    acknowledgement_timeout: Seconds = 30.0  #: Maximum seconds to the acknowledgement of a call.
    resumable_calls: bool = True  #: Whether calls outlive connection and dispatcher, on hosts that support it.
    disconnect_timeout: Seconds = 240.0  #: Seconds without contact after which a host stops a running call.
    result_ttl: Seconds = 3600.0  #: Seconds for which a host stores the end of a call until it is fetched.
    host_timeout: Seconds = 300.0  #: Seconds of an outage after which a host is declared lost.
    max_record_bytes: Bytes = 1024 * 1024 * 1024  #: Maximum total bytes of the records and the result of a job.
    record_line: Bytes = 64 * 1024 * 1024  #: Maximum length of a line from a host in bytes.

    ca_file: Path | None = None  #: PEM file with certificates of authorities.
    verify_hostname: bool = True  #: Whether a certificate accepted by `ca_file` must name the host or its address.
    known_certs_file: Path | None = None  #: PEM file with certificates of hosts.
    #: Whether a host is refused if nothing says which certificate it has. False for a legacy file without the key.
    verify: bool = True
    tls_minimum: str = DEFAULT_TLS_MINIMUM  #: Minimum TLS version of connections to hosts.

    host_db: Path = Path("/var/lib/harpcaller/hosts.db")  #: Cache of the last successful output of `host_db_script`.
    host_db_script: Path | None = None  #: Program that prints the hosts.
    host_db_refresh: Seconds = 900.0  #: Seconds between two runs of `host_db_script`.
    host_db_timeout: Seconds = 600.0  #: Maximum run time of `host_db_script` in seconds.
    hosts_file: Path | None = None  #: Hosts file in the format of the output of `host_db_script`.

    log_level: str = "info"  #: Minimum level of the log.
    log_format: str = "text"  #: Format of the log.
    syslog: bool = False  #: Whether the log goes to syslog instead of stderr.

    def __post_init__(self) -> None:
        check_choice("tls_minimum", self.tls_minimum, TLS_VERSIONS)
        check_choice("log_level", self.log_level, ("debug", "info", "warning", "error"))
        check_choice("log_format", self.log_format, ("text", "json"))
        if not self.verify and (self.ca_file is not None or self.known_certs_file is not None):
            raise ValueError("verify: expected true with ca_file or known_certs_file, got false")
        if self.host_timeout < self.disconnect_timeout + _STOP_MARGIN:
            least = f"at least {_STOP_MARGIN:g} more than disconnect_timeout ({self.disconnect_timeout:g})"
            raise ValueError(f"host_timeout: expected {least}, got {self.host_timeout:g}")

    @property
    def unsafe_listeners(self) -> tuple[Address, ...]:
        """The addresses at which everyone who can reach them can call every procedure."""
        if self.access_file is not None:
            return ()
        return tuple(dict.fromkeys(address for address in self.listen if not address.is_local))

    @property
    def safe_lines(self) -> tuple[str, str, str]:
        """The lines of the file that make its listening addresses safe."""
        addresses = [str(replace(address, tls=not address.is_local)) for address in dict.fromkeys(self.listen)]
        tls = self.tls or TLSFiles(certfile=Path("server.pem"), keyfile=Path("server.key"))
        files = ((name, getattr(tls, name)) for name in ("certfile", "keyfile", "client_ca_file", "crl_file"))
        members = ", ".join(f"{name} = {json.dumps(str(path))}" for name, path in files if path is not None)
        return f"listen = {json.dumps(addresses)}", f"tls = {{{members}}}", 'access_file = "access.toml"'

    def describe_max_age(self) -> str:
        """Return what `max_age` means, for `--test`."""
        if self.max_age is None:
            return "not set in a file of the legacy dispatcher: jobs are never deleted"
        return f"ended jobs are deleted after {self.max_age:g} hours"

    @property
    def max_age_seconds(self) -> float | None:
        """`max_age` in seconds."""
        return None if self.max_age is None else self.max_age * 3600


#: The valid keys of a file, apart from `IGNORED_KEYS`.
KEYS = frozenset(Config.__struct_fields__) - {"file", "ignored"}


def load(file: Path = DEFAULT_FILE) -> Config:
    """Load and check a file. Paths in it are relative to its directory. Raises `ConfigError`."""

    def to_path(_: type, value: Any) -> Path:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError(f"expected a path, got {value!r}")
        return file.absolute().parent / value

    try:
        members = tomllib.loads(read_regular(file).decode("utf-8-sig"))
    except OSError as error:
        hint = "; copy examples/harpcaller.toml, or use --config" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{file}: {error.strerror}{hint}") from error
    except (ValueError, RecursionError) as error:  # also for numbers of too many digits
        raise ConfigError(f"{file}: expected TOML: {error}") from error
    for key in members:
        if key not in KEYS and key not in IGNORED_KEYS:
            near = "".join(f"; did you mean {name}?" for name in get_close_matches(key, KEYS, 1))
            raise ConfigError(f"{file}: {key}: expected a key of the dispatcher, got an unknown one{near}")
    http = members.get("http")
    if isinstance(http, dict):  # addresses are read by `_parse_addresses`
        members["http"] = {key: value for key, value in http.items() if key != "listen"}
    config = convert(file, {key: members[key] for key in members if key in KEYS - {"listen"}}, Config, to_path)
    changed: dict[str, Any] = {"file": file, "ignored": tuple(key for key in members if key in IGNORED_KEYS)}
    if changed["ignored"] and "max_age" not in members:  # the legacy dispatcher deletes no jobs by default
        changed["max_age"] = None
    if changed["ignored"] and not members.keys() & {"verify", "ca_file", "known_certs_file"}:
        changed["verify"] = False  # the legacy dispatcher verifies nothing by default
    if "listen" in members:
        changed["listen"] = _parse_addresses(f"{file}: listen", members["listen"])
    if config.http is not None and isinstance(http, dict) and "listen" in http:
        addresses = _parse_addresses(f"{file}: http.listen", http["listen"])
        changed["http"] = msgspec.structs.replace(config.http, listen=addresses)
    config = msgspec.structs.replace(config, **changed)
    if os.path.isfile(config.stream_directory):
        raise ConfigError(f"{file}: stream_directory: expected a directory, got the file {config.stream_directory}")
    if config.tls is None and (needing := [str(address) for address in config.listen if address.tls]):
        raise ConfigError(f"{file}: tls: expected a section with certfile and keyfile, as {needing[0]} needs; got none")
    if config.http is not None:
        _check_listeners(config, config.http)
    return config


def _check_listeners(config: Config, http: HTTPSettings) -> None:
    """Raise `ConfigError` if everyone could use the HTTP API, or read what others send to it."""
    for address in http.listen:
        if address.tls and http.certfile is None:
            raise ConfigError(f"{config.file}: http.certfile: expected a file, as http.listen has {address}; got none")
        if address.is_local:
            continue
        if config.access_file is None:
            reason = f"expected a loopback address, or access_file, got {address} without access_file"
        elif not address.tls and not http.behind_proxy:
            reason = f'expected a loopback address, "tls:{address}" or behind_proxy = true, got {address}'
        else:
            continue
        raise ConfigError(f"{config.file}: http.listen: {reason}")


def _parse_addresses(where: str, texts: object) -> tuple[Address, ...]:
    if not isinstance(texts, list) or not texts:
        raise ConfigError(f"{where}: expected an array of addresses, got {texts!r}")
    addresses = []
    for text in texts:
        address = Address.parse(text) if isinstance(text, str) else None
        if address is None:
            raise ConfigError(f'{where}: expected "ADDRESS:PORT", an IPv6 address in brackets, got {text!r}')
        addresses.append(address)
    return tuple(addresses)


@contextmanager
def file_errors(config: Config, key: str) -> Iterator[None]:
    """Raise an OSError or ValueError about the file of a key as `ConfigError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if isinstance(error, PermissionError):
            reason += f"; the user of this process (uid {os.geteuid()}) needs access"
        expected = f"expected a file that can be used, got {getattr(config, key)}"
        raise ConfigError(f"{config.file}: {key}: {expected}: {reason}") from error
