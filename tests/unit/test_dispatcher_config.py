"""The configuration of the dispatcher: valid files, errors with file and key, the page of settings."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harp_daemon.settings import ConfigError
from harpcaller.config import IGNORED_KEYS, KEYS, Address, Config, HTTPSettings, TLSFiles, file_errors, load

PAGE = Path(__file__).parents[2] / "docs" / "settings-dispatcher.md"

#: A file of the legacy dispatcher, with every key that it has.
OLDER = """
# network
listen = ["*:3502", "localhost:3503"]
ca_file = "/etc/harpcaller/ca_certs.pem"
known_certs_file = "/etc/harpcaller/known_certs.pem"

# jobs
stream_directory = "/var/lib/harpcaller/stream/"
default_timeout = 600
max_exec_time = 700
max_age = 48

# hosts registry
host_db_script = "/etc/harpcaller/update-hosts"
host_db = "/var/lib/harpcaller/hosts.db"
host_db_refresh = 1200

# logging
log_handlers = ["harpcaller_syslog_h"]

[erlang]
node_name = "harpcaller"
name_type = "longnames"
cookie_file = "/etc/harpcaller/cookie.txt"
distributed_immediate = false
error_logger_handlers = []
"""


def loaded(directory: Path, text: str) -> Config:
    file = directory / "harpcaller.toml"
    file.write_text(text)
    return load(file)


def test_config_legacy_file_loads(tmp_path: Path) -> None:
    config = loaded(tmp_path, OLDER)
    assert config == Config(
        file=tmp_path / "harpcaller.toml",
        ignored=("log_handlers", "erlang"),
        listen=(Address(None, 3502), Address("localhost", 3503)),
        ca_file=Path("/etc/harpcaller/ca_certs.pem"),
        known_certs_file=Path("/etc/harpcaller/known_certs.pem"),
        stream_directory=Path("/var/lib/harpcaller/stream"),
        default_timeout=600.0,
        max_exec_time=700.0,
        max_age=48.0,
        host_db_script=Path("/etc/harpcaller/update-hosts"),
        host_db=Path("/var/lib/harpcaller/hosts.db"),
        host_db_refresh=1200.0,
    )
    assert config.max_age_seconds == 48 * 3600


@pytest.mark.parametrize(
    ("text", "max_age"),
    [
        ("", 720.0),
        ('listen = ["*:3502"]', 720.0),
        ('log_handlers = ["harpcaller_syslog_h"]', None),
        ("[erlang]\n", None),
        ("max_age = 720\n[erlang]\n", 720.0),
    ],
)
def test_config_legacy_file_without_max_age_keeps_jobs(tmp_path: Path, text: str, max_age: float | None) -> None:
    assert loaded(tmp_path, text).max_age == max_age


def test_config_empty_file_has_defaults(tmp_path: Path) -> None:
    assert loaded(tmp_path, "") == Config(file=tmp_path / "harpcaller.toml")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("*:3502", None, 3502),
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("[::1]:3502", "::1", 3502),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ("dispatcher.example.net:65535", "dispatcher.example.net", 65535),
    ],
)
def test_addresses_are_parsed(tmp_path: Path, text: str, host: str | None, port: int) -> None:
    config = loaded(tmp_path, f'listen = ["{text}"]')
    assert config.listen == (Address(host, port),)
    assert str(config.listen[0]) == text


def test_tls_addresses_and_files_are_parsed(tmp_path: Path) -> None:
    config = loaded(tmp_path, 'listen = ["tls:[::1]:1", "tls:*:2"]\n[tls]\ncertfile = "a"\nkeyfile = "/b"\n')
    assert [str(address) for address in config.listen] == ["tls:[::1]:1", "tls:*:2"]
    assert all(address.tls for address in config.listen)
    assert config.tls == TLSFiles(certfile=tmp_path / "a", keyfile=Path("/b"))


@pytest.mark.parametrize(
    ("listen", "unsafe", "safe"),
    [
        (["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/x", "127.8.0.1:1"], [], None),
        (["*:1"], ["*:1"], ["tls:*:1"]),
        (["tls:*:1", "127.0.0.1:2"], ["tls:*:1"], ["tls:*:1", "127.0.0.1:2"]),
        (["[::]:1", "10.0.0.1:1", "name:1"], ["[::]:1", "10.0.0.1:1", "name:1"], None),
    ],
)
def test_config_lines_make_listening_addresses_safe(
    tmp_path: Path, listen: list[str], unsafe: list[str], safe: list[str] | None
) -> None:
    config = loaded(tmp_path, f'listen = {json.dumps(listen)}\ntls = {{certfile = "a", keyfile = "b"}}')
    assert [str(address) for address in config.unsafe_listeners] == unsafe
    made = loaded(tmp_path, "\n".join(config.safe_lines))  # exactly these lines
    assert not made.unsafe_listeners
    assert made.tls == config.tls
    assert all(address.tls or address.is_local for address in made.listen)
    if safe is not None:
        assert [str(address) for address in made.listen] == safe


def test_config_docs_list_every_key_of_tls() -> None:
    rows = re.findall(r"^\| `tls\.(\w+)` \| (?:`(.*?)`)? ?\|", PAGE.read_text(), re.MULTILINE)
    defaults = {field.name: field.default for field in msgspec.structs.fields(TLSFiles)}
    wanted = {name: "" if value is msgspec.NODEFAULT else _shown(value) for name, value in defaults.items()}
    assert dict(rows) == wanted


def test_config_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = loaded(tmp_path, 'ca_file = "ca.pem"\nhost_db = "../hosts.db"')
    assert (config.ca_file, config.host_db) == (tmp_path / "ca.pem", tmp_path / "../hosts.db")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("listen = []", "listen: expected an array of addresses, got []"),
        ('listen = "*:1"', "listen: expected an array of addresses, got '*:1'"),
        ("listen = [1]", 'listen: expected "ADDRESS:PORT", an IPv6 address in brackets, got 1'),
        ('listen = ["::1:80"]', "got '::1:80'"),
        ('listen = ["host"]', "got 'host'"),
        ('listen = ["host:65536"]', "got 'host:65536'"),
        ('listen = ["host:-1"]', "got 'host:-1'"),
        ('listen = ["host:\u0663"]', "listen: expected"),
        ("default_timeout = 0", "default_timeout: expected a number, more than 0.0, got 0"),
        ("default_timeout = true", "default_timeout: expected a number, got true or false"),
        ('max_exec_time = "600"', "max_exec_time: expected a number, got a string"),
        ("max_age = nan", "max_age: expected a number, more than 0.0, got nan"),
        ("max_age = inf", "max_age: expected a number, at most 87600.0, got inf"),
        ("max_connections = 1.5", "max_connections: expected an integer, got a number"),
        ("max_connections = 0", "max_connections: expected an integer, at least 1, got 0"),
        ("request_line = 10", "request_line: expected an integer, at least 1024, got 10"),
        ("verify_hostname = 1", "verify_hostname: expected true or false, got an integer"),
        ('tls_minimum = "2"', "tls_minimum: expected one of 1.0, 1.1, 1.2, 1.3, got '2'"),
        ("tls_minimum = 1.2", "tls_minimum: expected"),
        ('log_level = "loud"', "log_level: expected"),
        ("ca_file = 5", "ca_file: expected a path, got 5"),
        ('ca_file = ""', "ca_file: expected a path, got ''"),
        ('host_db = "a\\u0000b"', "host_db: expected a path, got"),
        ("max_exec_tme = 5", "max_exec_tme: expected a key of the dispatcher, got an unknown one"),
        ('file = "x"', "file: expected a key of the dispatcher, got an unknown one"),
        ("ignored = []", "ignored: expected a key of the dispatcher, got an unknown one"),
        ("[section]\nx = 1", "section: expected a key of the dispatcher, got an unknown one"),
        ("host_timeout = 249.9", "host_timeout: expected at least 10 more than disconnect_timeout (240), got 249.9"),
        ('listen = ["tls:unix:/x"]', "got 'tls:unix:/x'"),
        ('listen = ["tls:*:1"]', "tls: expected a section with certfile and keyfile, as tls:*:1 needs; got none"),
        ('tls = {certfile = "a"}', "tls.keyfile: missing"),
        ('tls = {certfile = "a", keyfile = "b", ca = "c"}', "tls.ca: unknown key"),
        ('tls = {certfile = "a", keyfile = 1}', "tls.keyfile: expected a path, got 1"),
        (
            'tls = {certfile = "a", keyfile = "b", minimum = "2"}',
            "tls.minimum: expected one of 1.0, 1.1, 1.2, 1.3, got",
        ),
        ('tls = {certfile = "a", keyfile = "b", crl_file = "c"}', "tls.crl_file: expected client_ca_file beside it"),
        ("max_connections_per_peer = 0", "max_connections_per_peer: expected an integer, at least 1, got 0"),
        ("x =", "expected TOML: "),
        (f"x = {'9' * 5000}", "expected TOML: "),
        (f"x = {'[' * 5000}", "expected TOML: "),
        ("x = 1\nx = 2", "expected TOML: "),
    ],
)
def test_config_errors_name_file_and_key(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'harpcaller.toml'}: ")
    assert fault in str(caught.value)


def test_config_stream_directory_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "harpcaller.toml"
    file.write_text('stream_directory = "jobs"')
    load(file)
    (tmp_path / "jobs").touch()
    with pytest.raises(
        ConfigError, match=f"{file}: stream_directory: expected a directory, got the file {tmp_path}/jobs"
    ):
        load(file)


def test_config_invalid_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none")
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="expected TOML"):
        load(tmp_path / "binary")


def _shown(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case tuple():
            return f"[{', '.join(_shown(str(item)) for item in value)}]"
        case str():
            return f'"{value}"'
        case Path():
            return f'"{value}"'
    return str(value)


def test_missing_permission_names_the_user(tmp_path: Path) -> None:
    """A daemon reads files as another user than the administrator who runs `--test`."""
    config = Config(file=tmp_path / "toml", hosts_file=tmp_path / "hosts")
    with pytest.raises(ConfigError, match=rf"hosts: Permission denied; .* \(uid {os.geteuid()}\) needs access$"):
        with file_errors(config, "hosts_file"):
            raise PermissionError(errno.EACCES, "Permission denied")


def test_config_docs_list_every_key_and_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? ?\|", PAGE.read_text(), re.MULTILINE)
    fields = msgspec.structs.fields(Config)
    wanted = {field.name: _shown(field.default) for field in fields if field.name in KEYS}
    assert dict(rows) == wanted
    assert len(rows) == len(wanted)
    assert all(f"`{key}`" in PAGE.read_text() for key in IGNORED_KEYS)


SAFE = 'access_file = "access.toml"\n'


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            '[http]\nlisten = ["0.0.0.0:3580"]',
            "http.listen: expected a loopback address, or access_file",
        ),
        (
            SAFE + '[http]\nlisten = ["*:1"]',
            'http.listen: expected a loopback address, "tls:*:1" or',
        ),
        ('[http]\nlisten = ["tls:127.0.0.1:1"]', "http.certfile: expected a file, as http.listen has tls:127.0.0.1:1"),
        ('[http]\nlisten = "127.0.0.1:1"', "http.listen: expected an array of addresses"),
        ('[http]\nlisten = ["127.0.0.1"]', 'http.listen: expected "ADDRESS:PORT"'),
        ('[http]\ncertfile = "a"', "http.certfile: expected both certfile and keyfile"),
        ('[http]\nbase_path = "harp/"', 'http.base_path: expected "" or a path'),
        ("[http]\nconnections = 0", "http.connections: expected an integer, at least 1, got 0"),
        ("[http]\nport = 1", "http.port: unknown key"),
        ("http = 5", "http: expected a mapping"),
    ],
)
def test_http_section_is_checked(tmp_path: Path, text: str, error: str) -> None:
    file = tmp_path / "harpcaller.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert error in str(caught.value)
    assert str(caught.value).startswith(f"{file}: http")


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("[http]", ["127.0.0.1:3580"]),
        ('[http]\nlisten = ["[::1]:1", "localhost:2", "unix:/run/http"]', ["[::1]:1", "localhost:2", "unix:/run/http"]),
        (SAFE + '[http]\nlisten = ["*:1"]\nbehind_proxy = true', ["*:1"]),
        (SAFE + '[http]\nlisten = ["tls:*:1"]\ncertfile = "a"\nkeyfile = "b"', ["tls:*:1"]),
    ],
)
def test_http_section_is_read(tmp_path: Path, text: str, listen: list[str]) -> None:
    file = tmp_path / "harpcaller.toml"
    file.write_text(text)
    http = load(file).http
    assert http is not None
    assert [str(address) for address in http.listen] == listen
    assert http.certfile in (None, tmp_path / "a")


def test_http_settings_are_on_the_page() -> None:
    rows = re.findall(r"^\| `http\.(\w+)` \| (?:`(.*?)`)? ?\|", PAGE.read_text(), re.MULTILINE)
    fields = msgspec.structs.fields(HTTPSettings)
    assert dict(rows) == {field.name: _shown(field.default) for field in fields}
