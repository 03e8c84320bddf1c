"""The program `harp` with tokens, TLS, contexts and secret arguments, as a child process."""

from __future__ import annotations

import json
import os
import pty
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harp.cli import Exit
from harp_daemon.certificates import make_certificate
from harpcaller.secret_arguments import add_key
from support.certificates import Certificates, server_files
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.peers import Peer, answering, server_context, silent
from support.scripted import scripted_harpd

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
PROGRAM = "import sys; from harp.cli import main; sys.exit(main())"
TOKEN, OTHER = "harp_shop_" + "5e" * 32, "harp_other_" + "7a" * 32
SUBMITTED = {"harpcaller": 1, "job_id": JOB}
YES = {"harpcaller": 1, "job_ids": []}


class Harp:
    """The program, with a separate directory of configuration and files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config" / "harp" / "config.toml"
        self.config.parent.mkdir(parents=True)

    def write(self, name: str, text: str, mode: int = 0o600) -> Path:
        file = self.directory / name
        file.write_text(text)
        file.chmod(mode)
        return file

    def environment(self, **more: str) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HARP_")}
        return {**inherited, "XDG_CONFIG_HOME": str(self.directory / "config"), **more}

    def __call__(self, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            env=self.environment(**environment),
            input=stdin,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=60,
            start_new_session=True,  # no terminal
        )
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done


@pytest.fixture
def harp(tmp_path: Path) -> Harp:
    return Harp(tmp_path)


@pytest.fixture
def files(tmp_path: Path) -> Certificates:
    return server_files(tmp_path)


def address(peer: Peer) -> str:
    return f"{peer.host}:{peer.port}"


def tokens(peer: Peer) -> list[str | None]:
    return [request.get("auth", {}).get("token") for request in peer.requests]


# Tokens.


def test_token_comes_from_file_or_environment(harp: Harp) -> None:
    harp.write("token", f"{TOKEN}\n")
    with Peer(always=answering({"result": 1})) as peer:
        for line in (["--token-file", "token", "result", JOB], ["result", JOB, "--token-file", "token"]):
            assert harp(*line, HARP_DISPATCHER=address(peer), HARP_TOKEN=OTHER).returncode == Exit.OK
        assert harp("result", JOB, HARP_DISPATCHER=address(peer), HARP_TOKEN=OTHER).returncode == Exit.OK
        assert harp("result", JOB, HARP_DISPATCHER=address(peer), HARP_TOKEN="").returncode == Exit.OK
        assert tokens(peer) == [TOKEN, TOKEN, OTHER, None]


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (TOKEN, 0o640, "harp: token file token: others may read it; run: chmod 600 token\n"),
        (TOKEN, 0o604, "harp: token file token: others may read it; run: chmod 600 token\n"),
        (
            f"{TOKEN}\n{OTHER}",
            0o600,
            "harp: token file token: token: expected 1 to 200 characters without white space\n",
        ),
        ("", 0o600, "harp: token file token: token: expected 1 to 200 characters without white space\n"),
        (None, 0o600, "harp: token file token: No such file or directory\n"),
    ],
)
def test_unusable_token_file_is_refused(harp: Harp, content: str | None, mode: int, message: str) -> None:
    if content is not None:
        harp.write("token", content, mode)
    done = harp("--dispatcher", "127.0.0.1:1", "--token-file", "token", "why", JOB)
    assert (done.returncode, done.stderr) == (Exit.USAGE, message)


def test_unusable_token_in_environment_is_refused(harp: Harp) -> None:
    done = harp("why", JOB, HARP_DISPATCHER="127.0.0.1:1", HARP_TOKEN=f"{TOKEN} {TOKEN}")
    assert done.returncode == Exit.USAGE
    assert done.stderr.startswith("harp: HARP_TOKEN: token: expected 1 to 200 characters")


# Refusals.


@pytest.mark.parametrize(
    ("error", "code", "advice"),
    [
        ({"type": "auth_error", "refused": True}, Exit.DENIED, "harpcallerd token list"),
        ({"type": "access_denied", "refused": True}, Exit.DENIED, "harpcallerd access test"),
        ({"type": "rate_limited", "refused": True, "retry_after": 9}, Exit.UNREACHABLE, "try again in 9 s; "),
        ({"type": "rate_limited", "refused": True}, Exit.UNREACHABLE, "harpcallerd access explain"),
        ({"type": "access_denied"}, Exit.FAILED, "use --token-file FILE or HARP_TOKEN"),
        ({"type": "auth_error"}, Exit.FAILED, "the users file of harpd"),
    ],
)
def test_refusal_has_its_exit_code_and_a_hint(harp: Harp, error: dict[str, Any], code: Exit, advice: str) -> None:
    with Peer(answering({"error": {"message": "no\x1b[31m", **error}})) as peer:
        done = harp("result", JOB, "--reconnect", "0", HARP_DISPATCHER=address(peer), HARP_TOKEN=TOKEN)
    first, second = done.stderr.splitlines()
    assert (first, done.returncode) == (f"harp: {error['type']}: no\\u001b[31m", code)
    assert advice in second


# TLS and contexts, with a real dispatcher.


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpcallerd]:
    directory = tmp_path_factory.mktemp("d")
    files = server_files(directory)
    settings = {
        "listen": ["tls:127.0.0.1:0"],
        "tls": {"certfile": str(files.certfile), "keyfile": str(files.keyfile)},
        "tokens_file": "tokens",
    }
    with scripted_harpd(directory) as peer, Harpcallerd(directory, {"web01": peer.port}, settings=settings) as found:
        yield found


def test_context_has_all_that_a_command_needs(harp: Harp, dispatcher: Harpcallerd, files: Certificates) -> None:
    token = dispatcher.control("token", "add", "shop").stdout
    harp.write("config/harp/prod.token", token)
    harp.write("config/harp/ca.pem", files.ca_file.read_text(), 0o644)
    prod = (
        f'[contexts.prod]\ndispatcher = "127.0.0.1:{dispatcher.port}"\nca_file = "ca.pem"\ntoken_file = "prod.token"\n'
    )
    harp.config.write_text(f'default = "prod"\n{prod}\n[contexts.other]\ndispatcher = "unix:/nowhere"\n')
    for line in (
        ["call", "web01", "echo", "5", "--wait"],
        ["--context", "prod", "call", "--wait", "web01", "echo", "5"],
    ):
        done = harp(*line)
        assert (done.stdout, done.stderr, done.returncode) == ("[5]\n", "", Exit.OK)
    done = harp("--context", "prod", "call", "web01", "echo", HARP_DISPATCHER="127.0.0.1:1")
    assert done.returncode == Exit.OK
    done = harp("why", JOB, "--context", "other")
    assert "unix:/nowhere: cannot connect" in done.stderr
    assert dispatcher.control("token", "revoke", "shop").returncode == 0
    done = harp("call", "web01", "echo")
    assert done.returncode == Exit.DENIED
    assert done.stderr.startswith("harp: auth_error: the token is unknown, revoked or expired\n")
    assert token.strip() not in done.stderr


def test_missing_tls_has_a_hint(harp: Harp, dispatcher: Harpcallerd) -> None:
    done = harp("call", "web01", "echo", HARP_DISPATCHER=f"127.0.0.1:{dispatcher.port}")
    assert done.returncode == Exit.UNREACHABLE
    assert "--ca-file FILE, or --tls" in done.stderr
    done = harp("--tls", "call", "web01", "echo", HARP_DISPATCHER=f"127.0.0.1:{dispatcher.port}")
    assert "certificate is not accepted" in done.stderr


def test_client_certificate_of_the_command_line(harp: Harp, tmp_path: Path, files: Certificates) -> None:
    context = server_context(files)
    context.load_verify_locations(files.ca_file)
    context.verify_mode = ssl.CERT_REQUIRED
    make_certificate(tmp_path, ["alice"], client=True)
    with Peer(answering({"result": 1}), tls=context) as peer:
        options = ["--ca-file", "ca.pem", "--certfile", "alice.pem", "--keyfile", "alice.key"]
        done = harp("result", JOB, *options, HARP_DISPATCHER=address(peer))
        assert (done.stdout, done.stderr) == ("1\n", "")


def test_options_and_environment_before_contexts(harp: Harp) -> None:
    """A token is sent only to the dispatcher for which it was given."""
    harp.write("token", TOKEN)
    with Peer(always=answering({"result": 1})) as of_context, Peer(always=answering({"result": 1})) as other:
        token_file = harp.directory / "token"
        harp.config.write_text(
            f'default = "a"\n[contexts.a]\ndispatcher = "{address(of_context)}"\ntoken_file = "{token_file}"\n'
            f'[contexts.b]\ndispatcher = "{address(of_context)}"\n'
        )
        elsewhere = address(other)
        cases: list[tuple[list[str], dict[str, str], Peer, str | None]] = [
            ([], {}, of_context, TOKEN),
            ([], {"HARP_TOKEN": OTHER}, of_context, TOKEN),
            (["--context", "b"], {"HARP_TOKEN": OTHER}, of_context, OTHER),
            (["--context", "a"], {"HARP_DISPATCHER": elsewhere}, of_context, TOKEN),
            ([], {"HARP_DISPATCHER": elsewhere}, other, None),
            (["--dispatcher", elsewhere], {"HARP_DISPATCHER": address(of_context)}, other, None),
            (["--dispatcher", elsewhere], {"HARP_TOKEN": OTHER}, other, OTHER),
            (["--dispatcher", elsewhere, "--token-file", "token"], {"HARP_TOKEN": OTHER}, other, TOKEN),
        ]
        for options, environment, peer, token in cases:
            seen = len(peer.requests)
            assert harp(*options, "result", JOB, **environment).returncode == Exit.OK
            assert tokens(peer)[seen:] == [token]
    done = harp("--context", "a", "--dispatcher", "h", "result", JOB)
    assert (done.returncode, done.stderr[:36]) == (Exit.USAGE, "harp: --context: it excludes --dispa")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("default = 5", "default: expected the name of a context (the file has none), got 5"),
        ('default = "b"\n[contexts.a]\ndispatcher = "h"', "default: expected the name of a context (a), got 'b'"),
        ("defualt = 5", "defualt: expected one of default, contexts, got an unknown key"),
        ("contexts = 5", "contexts: expected tables [contexts.NAME], got 5"),
        ("[contexts]\na = 5", "contexts.a: expected a table, got 5"),
        ("[contexts.a]", "contexts.a.dispatcher: expected HOST[:PORT] or unix:/PATH, got nothing"),
        ("[contexts.a]\ndispatcher = 5", "contexts.a.dispatcher: expected HOST[:PORT] or unix:/PATH, got 5"),
        ('[contexts.a]\ndispatcher = "h:p"', "contexts.a.dispatcher: expected HOST[:PORT], got 'h:p'"),
        ('[contexts.a]\ndispatcher = "h"\ntls = 1', "contexts.a.tls: expected true or false, got 1"),
        ('[contexts.a]\ndispatcher = "h"\nca_file = ""', "contexts.a.ca_file: expected the path of a file, got ''"),
        (f'[contexts.a]\ntoken = "{TOKEN}"', "contexts.a.token: expected one of dispatcher, tls, ca_file, certfile, "),
        ("[contexts.a]\ntoken_file = [5]", "contexts.a.token_file: expected the path of a file, got a list"),
        ("[contexts.a", "not TOML: "),
        (f"a = {100_000 * '['}", "not TOML: "),
        ("[contexts.b]\ndispatcher = 'h'", "contexts: expected one of b, got --context 'a'"),
    ],
)
def test_mistake_in_configuration_is_named(harp: Harp, text: str, message: str) -> None:
    harp.config.write_text(text)
    done = harp("--context", "a", "why", JOB)
    assert done.returncode == Exit.USAGE
    assert done.stderr.startswith(f"harp: {harp.config}: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_missing_configuration_is_named(harp: Harp) -> None:
    done = harp("--context", "a", "why", JOB)
    assert done.stderr == f"harp: {harp.config}: No such file or directory; --context a must be in this file\n"
    done = harp("why", JOB)
    assert f"or `default` in {harp.config}" in done.stderr


# Time-outs.


@pytest.mark.parametrize("before", [True, False])
def test_request_timeout_is_that_of_the_option(harp: Harp, before: bool) -> None:
    option, command = ["--request-timeout", "0.5"], ["why", JOB]
    with Peer(silent) as peer:
        done = harp(*(option + command if before else command + option), HARP_DISPATCHER=address(peer))
    assert (done.returncode, "no reply within 0.5 s" in done.stderr) == (Exit.UNREACHABLE, True)
    for wrong in ("-1", "soon", "inf", "nan"):
        done = harp("--request-timeout", wrong, *command, HARP_DISPATCHER="127.0.0.1:1")
        assert (done.returncode, "expected a number of seconds" in done.stderr) == (Exit.USAGE, True)
    with Peer(answering({"cancelled": True})) as peer:
        done = harp("--request-timeout", "0", "cancel", JOB, HARP_DISPATCHER=address(peer))
        assert done.returncode == Exit.OK


# Secret arguments.

SECRET = "hün ter2\nsecond line"


def call_with(arguments: dict[str, Any], pointers: list[str]) -> dict[str, Any]:
    return {"harpcaller": 1, "host": "web01", "procedure": "p", "arguments": arguments, "secrets": pointers}


@pytest.mark.parametrize("source", ["@secret.txt", "-", "fd:{}"])
def test_secret_comes_from_file_or_descriptor(harp: Harp, source: str) -> None:
    file = harp.write("secret.txt", f"{SECRET}\n")
    expected = call_with({"user": "alice", "password": SECRET}, ["/password"])
    with Peer(answering(YES), answering(SUBMITTED, request=expected)) as peer, file.open() as opened:
        number = opened.fileno()
        line = ["call", "web01", "p", "--named", "user=alice", "--secret", f"password={source.format(number)}"]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *line],
            env=harp.environment(HARP_DISPATCHER=address(peer)),
            stdin=opened,
            pass_fds=[number],
            cwd=harp.directory,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.stdout, done.stderr) == (f"{JOB}\n", "")


def test_secret_is_asked_for_on_the_terminal(harp: Harp) -> None:
    """The terminal does not show what is typed."""
    with Peer(answering(YES), answering(SUBMITTED, request=call_with({"password": "typed"}, ["/password"]))) as peer:
        line = [sys.executable, "-c", PROGRAM, "call", "web01", "p", "--secret", "password"]
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(harp.directory)
            os.execve(line[0], line, harp.environment(HARP_DISPATCHER=address(peer)))
        shown = b""
        try:
            while b"password: " not in shown:
                shown += os.read(terminal, 1000)
            os.write(terminal, b"typed\n")
            while data := os.read(terminal, 1000):
                shown += data
        except OSError:  # the program has ended
            pass
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == Exit.OK
    assert b"typed" not in shown
    assert JOB.encode() in shown


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        ("password=hunter2", "a secret cannot be an argument, which other users can see: use password=@FILE"),
        ("password=", "a secret cannot be an argument"),
        ("password=@", "a secret cannot be an argument"),
        ("=@secret.txt", "expected NAME=@FILE, NAME=-, NAME=fd:N or NAME"),
        ("password=@absent", "harp: --secret password: cannot read @absent: No such file or directory\n"),
        ("password=fd:99", "harp: --secret password: cannot read fd:99: Bad file descriptor\n"),
        ("password=@binary", "harp: --secret password: cannot read @binary: not UTF-8\n"),
        ("password", "harp: --secret password: no terminal to ask for it; use password=@FILE"),
    ],
)
def test_unusable_secret_is_not_quoted(harp: Harp, secret: str, message: str) -> None:
    (harp.directory / "binary").write_bytes(b"\xff\xfe")
    done = harp("call", "web01", "p", "--secret", secret, HARP_DISPATCHER="127.0.0.1:1")
    assert (done.returncode, done.stdout) == (Exit.USAGE, "")
    assert message in done.stderr
    assert "hunter2" not in done.stderr


def test_direct_call_sends_the_secret(harp: Harp, files: Certificates) -> None:
    harp.write("secret.txt", f"{SECRET}\n")
    with Peer(answering({"harp": 1, "stream_result": False}, {"result": 1}), tls=server_context(files)) as peer:
        options = ["--user", "u", "--ca-file", str(files.ca_file), "--secret", "password=@secret.txt"]
        done = harp("direct", address(peer), "p", *options, HARP_PASSWORD="pw")
        assert (done.stdout, done.stderr) == ("1\n", "")
        assert peer.requests[0]["arguments"] == {"password": SECRET}
        assert "secrets" not in peer.requests[0]


def test_refused_secret_is_not_sent(harp: Harp) -> None:
    refusal = {"error": {"type": "invalid_request", "message": "secrets: the dispatcher has no keys"}}
    with Peer(answering(refusal)) as peer:
        done = harp("call", "web01", "p", "--secret", "password=-", stdin="hunter2", HARP_DISPATCHER=address(peer))
        assert done.returncode == Exit.UNREACHABLE
        assert "no secret value was sent" in done.stderr
        assert "hunter2" not in json.dumps(peer.requests)


def places_of(secret: bytes, directory: Path) -> list[str]:
    """Return the files of a directory, and the command lines and environments of all processes, that have a text."""
    files = [file for file in directory.rglob("*") if file.is_file()]
    files += [file for name in ("cmdline", "environ") for file in Path("/proc").glob(f"[0-9]*/{name}")]
    found = []
    for file in files:
        try:
            if secret in file.read_bytes():
                found.append(str(file))
        except OSError:  # the process has ended
            pass
    return found


def test_secret_of_a_call_is_in_no_file_and_no_process_list(harp: Harp, tmp_path: Path) -> None:
    secret = "correct horse 4711"
    directory = tmp_path / "d"
    directory.mkdir()
    add_key(tmp_path / "keys")
    settings = {"secrets_key_file": str(tmp_path / "keys")}
    with scripted_harpd(directory) as peer, Harpcallerd(directory, {"web01": peer.port}, settings=settings) as found:
        environment = {"HARP_DISPATCHER": f"{found.host}:{found.port}"}
        done = harp("call", "web01", "hang", "--secret", "password=-", stdin=secret, **environment)
        assert (done.returncode, done.stderr) == (Exit.OK, "")
        job = done.stdout.strip()

        def is_called() -> bool:
            return any(request.get("arguments") == {"password": secret} for request in peer.requests)

        wait_until(is_called, what="the call on the host")
        assert places_of(secret.encode(), directory) == []
        done = harp("status", job, **environment)
        assert json.loads(done.stdout)["call"]["arguments"] == {"password": "***"}
        assert harp("cancel", job, **environment).stdout == "true\n"
    assert places_of(secret.encode(), directory) == []
    assert places_of(job.encode(), directory)  # the search finds what is there


OWN_JOBS = '[[rule]]\nwho = ["token:shop", "token:other"]\nallow = ["call", "read", "cancel", "list"]\n'


def test_cancel_of_a_job_of_somebody_else_is_that_of_an_unknown_one(harp: Harp, tmp_path: Path) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    (tmp_path / "access.toml").write_text(OWN_JOBS)
    settings = {"access_file": str(tmp_path / "access.toml"), "tokens_file": str(tmp_path / "tokens")}
    with scripted_harpd(directory) as peer, Harpcallerd(directory, {"web01": peer.port}, settings=settings) as found:
        tokens = {name: found.control("token", "add", name).stdout.strip() for name in ("shop", "other")}

        def run(name: str, *arguments: str) -> tuple[int, str, str]:
            done = harp(*arguments, HARP_DISPATCHER=f"{found.host}:{found.port}", HARP_TOKEN=tokens[name])
            return done.returncode, done.stdout, done.stderr

        job, unknown = run("shop", "call", "web01", "hang")[1].strip(), "00000000-0000-7000-8000-000000000000"
        for length, reason in (36, "there is no job"), (18, "there is no job whose id begins with"):
            for each in (job, unknown):
                denied = (Exit.FAILED, "", f"harp: invalid_jobid: {reason} {each[:length]}\n")
                assert run("other", "cancel", each[:length]) == denied
        assert run("shop", "cancel", job[:18]) == (Exit.OK, "true\n", "")
        assert run("shop", "cancel", job) == (Exit.CANCELLED, "false\n", "")
