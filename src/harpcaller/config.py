"""The dispatcher's configuration: a TOML file becomes one frozen, checked value.

A fault is a `ConfigError` of the form ``FILE: KEY: expected X, got Y``. Files of the older dispatcher load: what
makes no sense here is collected in `Config.ignored`, to be reported once; other unknown keys are errors.

Spec: docs/settings-dispatcher.md.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

__all__ = ["DEFAULT_FILE", "IGNORED_KEYS", "KEYS", "Address", "Config", "ConfigError", "file_errors", "load"]

#: Where the configuration is when nothing else is said.
DEFAULT_FILE = Path("/etc/harpcaller/harpcaller.toml")

#: Keys of the older dispatcher that have no meaning here: Erlang's logging modules and Erlang's own settings.
IGNORED_KEYS = frozenset({"log_handlers", "erlang"})

#: Ten years. Longer times are mistakes, and the clocks of event loops can't take all of them.
_LONGEST = 315_360_000

Seconds = Annotated[float, Meta(gt=0, le=_LONGEST)]
Hours = Annotated[float, Meta(gt=0, le=_LONGEST // 3600)]
Bytes = Annotated[int, Meta(ge=1024)]
Count = Annotated[int, Meta(ge=1)]

#: Seconds that a host may need to stop a call that has run without contact for as long as it may.
_STOP_MARGIN = 10.0

_ADDRESS = re.compile(r"(?:\[(?P<bracketed>[^\[\]]+)\]|(?P<plain>[^:\[\]]+)):(?P<port>\d{1,5})", re.ASCII)


class ConfigError(Exception):
    """The configuration can't be used; the message names file and key."""


@dataclass(frozen=True, slots=True)
class Address:
    """An address to listen on.

    Attributes:
        host: a name or an address; None: every address of the machine.
        port: 0 lets the system choose.
        path: a Unix socket instead.
    """

    host: str | None
    port: int
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read ``ADDRESS:PORT`` or ``unix:/PATH``; None: it is neither.

        ADDRESS is ``*`` for any, and in brackets when it is one of IPv6.
        """
        if text.startswith("unix:/"):
            return cls(None, 0, Path(text.removeprefix("unix:")))
        match = _ADDRESS.fullmatch(text)
        if match is None or int(match["port"]) > 65535:
            return None
        host = match["bracketed"] or match["plain"]
        return cls(None if host == "*" else host, int(match["port"]))

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        host = "*" if self.host is None else f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The configuration. `KEYS` are the keys of the file; docs/settings-dispatcher.md describes them."""

    #: The file it was read from; None: it was made otherwise. Not a key.
    file: Path | None = None
    #: The keys of the file that only the older dispatcher knew. Not a key.
    ignored: tuple[str, ...] = ()

    #: Addresses to listen on for requests.
    listen: tuple[Address, ...] = (Address("127.0.0.1", 3502),)
    #: Most connections of clients at once.
    connections: Count = 10_000
    #: Longest line of a request, bytes.
    request_line: Bytes = 16 * 1024 * 1024
    #: Bytes of all long requests together that are being read or stored.
    request_memory: Bytes = 256 * 1024 * 1024
    #: Seconds that a client may take to send its request.
    idle_timeout: Seconds = 30.0

    #: Where jobs and their records are kept.
    stream_directory: Path = Path("/var/lib/harpcaller/stream")
    #: Most seconds between two messages of a job.
    default_timeout: Seconds = 600.0
    #: Most seconds from a job's start to its end.
    max_exec_time: Seconds = 600.0
    #: Hours after its end at which a job is deleted.
    max_age: Hours = 720.0

    #: Most calls under way at once, on all hosts together.
    calls: Count = 4_000
    #: Most calls under way at once on one host.
    host_concurrency: Count = 250
    #: Seconds for reaching a host, and again for the TLS handshake.
    connect_timeout: Seconds = 10.0
    #: Seconds that a host may take to receive and acknowledge a call.
    acknowledgement_timeout: Seconds = 30.0
    #: Whether calls are kept by hosts that can: they outlive the connection and this program.
    kept_calls: bool = True
    #: Seconds that a call may run without contact before its host stops it.
    disconnect_timeout: Seconds = 240.0
    #: Seconds for which a host keeps the end of a call that nobody has fetched.
    result_ttl: Seconds = 3600.0
    #: Seconds without contact after which a host is given up as lost.
    host_timeout: Seconds = 300.0
    #: Longest line that a host may send, bytes.
    record_line: Bytes = 64 * 1024 * 1024

    #: Certificates of authorities, PEM.
    ca_file: Path | None = None
    #: Whether a certificate that `ca_file` vouches for must name the host.
    verify_hostname: bool = True
    #: Certificates of hosts, PEM.
    known_certs_file: Path | None = None
    #: Least version of TLS spoken with hosts.
    tls_minimum: Literal["1.0", "1.1", "1.2", "1.3"] = "1.2"

    #: Last good copy of what `host_db_script` printed.
    host_db: Path = Path("/var/lib/harpcaller/hosts.db")
    #: Program that prints the hosts.
    host_db_script: Path | None = None
    #: Seconds between two runs of `host_db_script`.
    host_db_refresh: Seconds = 900.0
    #: Seconds that a run of `host_db_script` may take.
    host_db_timeout: Seconds = 600.0
    #: Hosts in the form that `host_db_script` prints.
    hosts_file: Path | None = None

    #: Least level that is logged.
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    #: Form of the log.
    log_format: Literal["text", "json"] = "text"
    #: Whether the log goes to syslog instead of stderr.
    syslog: bool = False

    def __post_init__(self) -> None:
        if self.host_timeout < self.disconnect_timeout + _STOP_MARGIN:
            least = f"at least {_STOP_MARGIN:g} more than disconnect_timeout ({self.disconnect_timeout:g})"
            raise ValueError(f"host_timeout: expected {least}, got {self.host_timeout:g}")

    @property
    def max_age_seconds(self) -> float:
        """`max_age` in seconds."""
        return self.max_age * 3600


#: The keys that a file may have, apart from `IGNORED_KEYS`.
KEYS = frozenset(Config.__struct_fields__) - {"file", "ignored"}


def load(file: Path = DEFAULT_FILE) -> Config:
    """Read and check a configuration file.

    Args:
        file: the file; its relative paths are taken from the directory that it is in.

    Raises:
        ConfigError: it can't be read, is not TOML, or has a wrong key or value; the first fault that was found.
    """
    members = _read(file)
    ignored = tuple(key for key in members if key in IGNORED_KEYS)
    for key in members:
        if key not in KEYS and key not in IGNORED_KEYS:
            near = "".join(f"; did you mean {name}?" for name in get_close_matches(key, KEYS, 1))
            raise ConfigError(f"{file}: {key}: expected a key of the dispatcher, got an unknown one{near}")
    known = {key: value for key, value in members.items() if key in KEYS - {"listen"}}
    try:
        config = msgspec.convert(known, Config, dec_hook=_converter(file.absolute().parent))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {_described(str(error), known)}") from error
    if "listen" in members:
        config = msgspec.structs.replace(config, listen=_addresses(file, members["listen"]))
    return msgspec.structs.replace(config, file=file, ignored=ignored)


def _addresses(file: Path, texts: object) -> tuple[Address, ...]:
    if not isinstance(texts, list) or not texts:
        raise ConfigError(f"{file}: listen: expected an array of addresses, got {texts!r}")
    for text in texts:
        if not isinstance(text, str) or Address.parse(text) is None:
            raise ConfigError(f'{file}: listen: expected "ADDRESS:PORT", an IPv6 address in brackets, got {text!r}')
    return tuple(filter(None, map(Address.parse, texts)))


@contextmanager
def file_errors(config: Config, key: str) -> Iterator[None]:
    """Turn errors with the file that a key names (OSError, ValueError) into `ConfigError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        where = f"{config.file}: " if config.file else ""
        fault = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(
            f"{where}{key}: expected a file that can be used, got {getattr(config, key)}: {fault}"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: expected TOML: {error}") from error


def _converter(directory: Path) -> Callable[[type, Any], Any]:
    def convert(_: type, value: Any) -> Path:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError("Expected a path")
        return directory / value

    return convert


#: What `msgspec` says: the expectation, perhaps what it got instead, and at which key.
_FAULT = re.compile(r"(?P<what>.+?)(?:, got .+)? - at `\$\.(?P<key>\w+)`")

_KINDS = {"bool": "true or false", "float": "a number", "int": "an integer"}


def _described(fault: str, members: Mapping[str, Any]) -> str:
    """``KEY: expected X, got Y`` of what `msgspec` says."""
    match = _FAULT.fullmatch(fault)
    if match is None:  # of several keys together; the fault names them
        return fault
    key = match["key"]
    hint = get_type_hints(Config)[key]
    if get_origin(hint) is Literal:
        what = " or ".join(f'"{choice}"' for choice in get_args(hint))
    else:
        what = re.sub(r"`?(bool|float|int)`?", lambda kind: _KINDS[kind[1]], match["what"].removeprefix("Expected "))
    return f"{key}: expected {what}, got {members[key]!r}"
