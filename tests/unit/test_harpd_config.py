"""harpd's settings: accepted forms and error messages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from harp_daemon.settings import ConfigError
from harpd.cli import parser
from harpd.config.settings import Configuration, Limits, Network, load, load_yaml, server_context
from support.certificates import server_files

LEAST = """
network: {certfile: /c, keyfile: /k}
authentication: {module: some.module}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "harpd.conf"


def read(file: Path, text: str) -> Configuration:
    file.write_text(text)
    return load(file)


def fault(file: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(file, text)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    return message.removeprefix(f"{file}: ")


def test_minimal_file_has_the_defaults(file: Path) -> None:
    configuration = read(file, LEAST)
    assert configuration.network == Network(certfile="/c", keyfile="/k", address=None, port=4306, tls_minimum="1.2")
    assert configuration.authentication == {"module": "some.module"}
    assert configuration.python.search_paths() == {"prepend": [], "append": []}
    assert configuration.limits == Limits()
    assert configuration.runtime_directory is None


def test_memory_equal_to_its_largest_user_is_accepted(file: Path) -> None:
    limits = "{request_line: 5000000, request_memory: 5000000, spool: 7000000, spool_memory: 7000000}"
    accepted = read(file, f"{LEAST}limits: {limits}").limits
    assert (accepted.request_memory, accepted.spool_memory) == (5_000_000, 7_000_000)


def test_legacy_file_is_accepted(file: Path) -> None:
    configuration = read(
        file,
        """
        network:
          address: 0.0.0.0
          port: 4306
          certfile: /etc/harpd/harpd.cert.pem
          keyfile: /etc/harpd/harpd.key.pem
        python:
          path: /etc/harpd/lib
        authentication:
          module: harpd.auth.inconfig
          users:
            harp: "plain:secret"
        """,
    )
    assert configuration.network.address == "0.0.0.0"
    assert configuration.authentication["users"] == {"harp": "plain:secret"}
    assert "secret" not in repr(configuration)


@pytest.mark.parametrize(
    ("path", "prepend", "append"),
    [
        ("/a", [], ["/a"]),
        ("[/a, /b]", [], ["/a", "/b"]),
        ("{prepend: /a}", ["/a"], []),
        ("{append: [/a], prepend: [/b, /c]}", ["/b", "/c"], ["/a"]),
        ("{}", [], []),
    ],
)
def test_python_path_forms_are_accepted(file: Path, path: str, prepend: list[str], append: list[str]) -> None:
    configuration = read(file, f"{LEAST}\npython: {{path: {path}}}")
    assert configuration.python.search_paths() == {"prepend": prepend, "append": append}


@pytest.mark.parametrize("written", ["1.2", '"1.2"', "'1.2'"])
def test_tls_minimum_without_quotes_is_accepted(file: Path, written: str) -> None:
    text = LEAST.replace("keyfile: /k", f"keyfile: /k, tls_minimum: {written}")
    assert str(read(file, text).network.tls_minimum) == "1.2"


def network(key: str) -> str:
    return LEAST.replace("keyfile: /k", f"keyfile: /k, {key}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file: expected a mapping, got nothing"),
        ("- a", "the file: expected a mapping, got a list"),
        ("network: {}", "network.certfile: missing"),
        ("network: {certfile: /c, keyfile: /k}", "authentication: missing"),
        (LEAST.replace("module: some.module", ""), "authentication.module: expected the name of a module, got nothing"),
        (LEAST.replace("some.module", "5"), "authentication.module: expected the name of a module, got 5"),
        (LEAST.replace("{module: some.module}", "x"), "authentication: expected a mapping, got a string"),
        (network("port: x"), "network.port: expected an integer, got a string"),
        (network("port: 4306.5"), "network.port: expected an integer, got a number"),
        (network("port: -1"), "network.port: expected an integer, at least 0, got -1"),
        (network("port: 65536"), "network.port: expected an integer, at most 65535, got 65536"),
        (network("ports: 1"), "network.ports: unknown key"),
        (network("address: 5"), "network.address: expected a string or nothing, got an integer"),
        (network("tls_minimum: 1.5"), "network.tls_minimum: expected one of 1.0, 1.1, 1.2, 1.3, got 1.5"),
        (
            f"{LEAST}limits: {{handshake_timeout: 0}}",
            "limits.handshake_timeout: expected a number, more than 0.0, got 0",
        ),
        (
            f"{LEAST}limits: {{handshake_timeout: .inf}}",
            "limits.handshake_timeout: expected a number, at most 31536000.0, got inf",
        ),
        (
            f"{LEAST}limits: {{handshake_timeout: .nan}}",
            "limits.handshake_timeout: expected a number, more than 0.0, got nan",
        ),
        (f"{LEAST}limits: {{max_calls: true}}", "limits.max_calls: expected an integer, got true or false"),
        (f"{LEAST}limits: {{max_calls: 0}}", "limits.max_calls: expected an integer, at least 1, got 0"),
        (f"{LEAST}limits: {{spool: 2147483648}}", "limits.spool_memory: expected at least 2147483648, as limits.spool"),
        (f"{LEAST}limits: {{result_ttl: 0}}", "limits.result_ttl: expected a number, more than 0.0, got 0"),
        (f"{LEAST}exit_info: {{stderr: 1}}", "exit_info.stderr: expected true or false, got an integer"),
        (f"{LEAST}exit_info: {{stdout: true}}", "exit_info.stdout: unknown key"),
        (f"{LEAST}cgroup: 5", "cgroup: expected a string or nothing, got an integer"),
        (f"{LEAST}python: {{path: [1]}}", "python.path[0]: expected a string, got an integer"),
        (f"{LEAST}python: {{path: {{end: /a}}}}", "python.path.end: unknown key; expected prepend or append"),
        (f"{LEAST}python: {{path: 5}}", "python.path: expected a string or a mapping or a list, got an integer"),
        (f"{LEAST}other: 1", "other: unknown key"),
        (f"{LEAST}environment: {{A: x, PORT: 80}}", "environment.PORT: expected a string or nothing, got an integer"),
        (f"{LEAST}environment: {{A: x, B: [y]}}", "environment.B: expected a string or nothing, got a list"),
        (f"{LEAST}network: {{}}", "line 4, column 1: duplicate key 'network'"),
        (
            "network: {certfile: /c, certfile: /d}",
            "line 1, column 25: duplicate key 'certfile'",
        ),
        ("a: [", "line 1, column 5: expected the node content, but found '<stream end>'"),
        ("!!python/object:os.system {}", "line 1, column 1: could not determine a constructor for the tag"),
        ("\x01", "not YAML: "),
        ("[" * 5000, "not YAML: "),
    ],
)
def test_errors_name_file_and_key_in_one_line(file: Path, text: str, expected: str) -> None:
    assert fault(file, text).startswith(expected)


def test_file_that_is_not_utf_8_is_an_error(file: Path) -> None:
    file.write_bytes(b"network: \xff\xfe")
    with pytest.raises(ConfigError, match="not YAML"):
        load(file)


def test_missing_file_is_an_error(file: Path) -> None:
    message = f"{file}: No such file or directory; copy examples/harpd.conf, or use --config"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(file)


def test_yaml_merge_keys_are_accepted(file: Path) -> None:
    file.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert load_yaml(file) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


def test_key_of_another_certificate_is_an_error(tmp_path: Path, file: Path) -> None:
    files = server_files(tmp_path)
    server_context(Network(certfile=str(files.certfile), keyfile=str(files.keyfile)), file)
    other = tmp_path / "other"
    other.mkdir()
    foreign = server_files(other)
    with pytest.raises(ConfigError, match=r"network.keyfile: .* expected the key of .* got another certificate's key"):
        server_context(Network(certfile=str(files.certfile), keyfile=str(foreign.keyfile)), file)


@pytest.mark.parametrize("key", ["certfile", "keyfile"])
def test_missing_certificate_or_key_is_named(tmp_path: Path, file: Path, key: str) -> None:
    files = server_files(tmp_path)
    network = Network(certfile=str(files.certfile), keyfile=str(files.keyfile))
    with pytest.raises(ConfigError, match=f"{file}: network.{key}: /nowhere: No such file"):
        server_context(msgspec.structs.replace(network, **{key: "/nowhere"}), file)


def test_invalid_certificate_is_an_error(tmp_path: Path, file: Path) -> None:
    files = server_files(tmp_path)
    files.certfile.write_text("garbage")
    with pytest.raises(ConfigError, match=r"network.certfile: expected PEM files"):
        server_context(Network(certfile=str(files.certfile), keyfile=str(files.keyfile)), file)


def test_key_with_passphrase_is_an_error_without_prompt(tmp_path: Path, file: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    files = server_files(tmp_path)
    key = serialization.load_pem_private_key(files.keyfile.read_bytes(), None)
    files.keyfile.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"passphrase"),
        )
    )
    with pytest.raises(ConfigError, match=r"network.certfile"):
        server_context(Network(certfile=str(files.certfile), keyfile=str(files.keyfile)), file)


def test_default_tls_minimum_is_1_2(tmp_path: Path, file: Path) -> None:
    files = server_files(tmp_path)
    context = server_context(Network(certfile=str(files.certfile), keyfile=str(files.keyfile)), file)
    assert context.minimum_version.name == "TLSv1_2"


PAGE = Path(__file__).parents[2] / "docs" / "settings-harpd.md"


def options(section: type[msgspec.Struct], prefix: str = "") -> dict[str, tuple[str, str]]:
    """Return default and unit of each setting by dotted name, as the page shows them."""
    found: dict[str, tuple[str, str]] = {}
    for option in msgspec.structs.fields(section):
        name = f"{prefix}{option.name}"
        kinds = [kind for kind in (option.type, *get_args(option.type)) if isinstance(kind, type)]
        if sections := [kind for kind in kinds if issubclass(kind, msgspec.Struct)]:
            found |= options(sections[0], f"{name}.")
            continue
        described = msgspec.inspect.type_info(option.type)
        unit = described.extra["unit"] if isinstance(described, msgspec.inspect.Metadata) and described.extra else ""
        found[name] = (shown(option), "" if unit == "count" else unit)
    return found


def shown(option: msgspec.structs.FieldInfo) -> str:
    if option.required:
        return "required"
    if isinstance(option.default, float):
        return f"{option.default:g}"
    return "" if option.default in (None, msgspec.NODEFAULT) else str(option.default)


def test_settings_page_lists_every_setting() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \|([^|\n]*)\|([^|\n]*)\|", PAGE.read_text(), re.MULTILINE)
    assert {name: (default.strip(" `"), unit.strip()) for name, default, unit in rows} == options(Configuration)


def test_settings_page_lists_every_command_line_option() -> None:
    rows = re.findall(r"^\| (`-[^|]*) \|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    text = parser().format_help()
    commands = re.search(r"COMMAND +one of ([a-z, ]+):", text)
    assert commands is not None
    assert set(commands[1].split(", ")) <= set(re.findall(r"^\| `([a-z]+)` \|", PAGE.read_text(), re.MULTILINE))
    documented = {tuple(re.findall(r"`?(--?[a-z-]+)", flags)): default.strip(" `") for flags, default in rows}
    defaults = {name: str(value or "") for name, value in vars(parser().parse_args([])).items()}
    expected = {}
    for short, long in re.findall(r"^  (?:(-[a-z])(?: [A-Z]+)?, )?(--[a-z-]+)", text, re.MULTILINE):
        if long != "--help":
            flags = (short, long) if short else (long,)
            expected[flags] = defaults.get(long.removeprefix("--").replace("-", "_"), "")
    assert documented == expected


@pytest.mark.parametrize("address", ["0.0.0.0", "192.0.2.1", "example.com", "::"])
def test_metrics_listen_on_loopback_only(file: Path, address: str) -> None:
    expected = "metrics.address: expected a loopback address"
    assert fault(file, f"{LEAST}metrics: {{address: '{address}'}}").startswith(expected)
