"""The program `harp` as a child process, against scripted peers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import harp as harp_package
from harp.cli import Exit
from support.certificates import server_files
from support.deadline import wait_until
from support.peers import Peer, PeerConnection, Script, answering, server_context

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
PROGRAM = "import sys; from harp.cli import main; sys.exit(main())"
SUBMITTED = {"harpcaller": 1, "job_id": JOB}
STATUS = {
    "call": {"host": "web01", "procedure": "p", "arguments": [1]},
    "time": {"submit": 1, "start": 2, "end": 3},
    "info": None,
}
UNKNOWN = {"error": {"type": "invalid_jobid", "message": "there is no such job"}}
OLDER = {"error": {"type": "invalid_request", "message": "expected exactly one of procedure, cancel, get_result"}}
DETAILS = {"job": JOB, "state": "queued", "why": "it waits"}


def harp(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HARP_")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def call(arguments: Any, **options: Any) -> dict[str, Any]:
    return {"harpcaller": 1, "host": "web01", "procedure": "p", "arguments": arguments, **options}


CASES: list[tuple[str, list[Script], str, Exit]] = [
    ("call web01 p", [answering(SUBMITTED, request=call([]))], JOB + "\n", Exit.OK),
    (
        'call --wait web01 p 5 five "5" [1] -3 NaN',
        [answering(SUBMITTED, request=call([5, "five", "5", [1], -3, "NaN"])), answering({"result": {"a": 1}})],
        '{"a": 1}\n',
        Exit.OK,
    ),
    (
        'call web01 p --named a=1 --named b=x=y --queue {"":1} --concurrency 2 --timeout 5 --max-exec-time 2 --info i '
        "--start-within 0",
        [
            answering(
                SUBMITTED,
                request=call(
                    {"a": 1, "b": "x=y"},
                    queue={"name": {"": 1}, "concurrency": 2},
                    timeout=5,
                    max_exec_time=2,
                    info="i",
                    start_within=0,
                ),
            )
        ],
        JOB + "\n",
        Exit.OK,
    ),
    (f"result {JOB}", [answering({"result": None})], "null\n", Exit.OK),
    (f"result {JOB}", [answering({"exception": {"type": "E", "message": "m"}})], "", Exit.RAISED),
    (f"result {JOB}", [answering({"error": {"type": "e", "message": "m", "data": [1]}})], "", Exit.FAILED),
    (f"result {JOB}", [answering({"cancelled": True})], "", Exit.CANCELLED),
    (f"result {JOB} --no-wait", [answering({"no_result": True})], "", Exit.NOT_FINISHED),
    (f"result {JOB} --reconnect 0", [answering()], "", Exit.UNREACHABLE),
    (f"result {JOB}", [answering(), answering({"result": 1})], "1\n", Exit.OK),
    (f"result {JOB} --reconnect -1", [], "", Exit.USAGE),
    (f"status {JOB}", [answering(STATUS)], json.dumps(STATUS) + "\n", Exit.OK),
    (
        f"follow {JOB} --since 4 --numbered",
        [
            answering(
                {"packet": 4, "data": "ü"},
                {"cancelled": True},
                request={"harpcaller": 1, "follow_stream": JOB, "since": 4},
            )
        ],
        '[4, "\\u00fc"]\n',
        Exit.CANCELLED,
    ),
    (
        f"follow {JOB} --since 0",
        [answering({"packet": 0, "data": 1}, {"error": {"type": "timeout", "message": "m"}})],
        "1\n",
        Exit.FAILED,
    ),
    (
        "call web01 p --follow",
        [answering(SUBMITTED), answering({"packet": 0, "data": [1]}, {"result": {"a": 2}})],
        '[1]\n{"a": 2}\n',
        Exit.OK,
    ),
    (
        "call web01 p --follow",
        [answering(SUBMITTED), answering({"packet": 0, "data": 1}, {"exception": {"type": "E", "message": "m"}})],
        "1\n",
        Exit.RAISED,
    ),
    (
        f"read {JOB} --recent 2",
        [
            answering(
                {"packet": 7, "data": 1},
                {"packet": 8, "data": 2},
                {"continue": True},
                request={"harpcaller": 1, "read_stream": JOB, "recent": 2},
            )
        ],
        "1\n2\n",
        Exit.OK,
    ),
    (
        f"follow {JOB} --since 0 --timed",
        [
            answering(
                {"packet": 0, "time": 1700000000.25, "data": "x"},
                {"result": 1},
                request={"harpcaller": 1, "follow_stream": JOB, "since": 0, "timed": True},
            )
        ],
        '[0, 1700000000.25, "x"]\n',
        Exit.OK,
    ),
    (f"details {JOB}", [answering({"details": DETAILS})], json.dumps(DETAILS) + "\n", Exit.OK),
    (f"why {JOB}", [answering({"details": DETAILS})], "it waits\n", Exit.OK),
    (f"why {JOB}", [answering({"details": {**DETAILS, "why": "\ud800 waits"}})], "\\ud800 waits\n", Exit.OK),
    (f"why {JOB}", [answering()], "", Exit.UNREACHABLE),
    (
        f"cancel --wait {JOB}",
        [
            answering(
                {"cancelled": True, "stop": {"state": "confirmed", "stop_report": None}},
                request={"harpcaller": 1, "cancel": JOB, "wait": True},
            )
        ],
        "true\n",
        Exit.OK,
    ),
    (
        f"cancel --wait {JOB}",
        [answering({"cancelled": True, "stop": {"state": "failed", "stop_report": None}})],
        "",
        Exit.FAILED,
    ),
    (f"cancel {JOB}", [answering({"cancelled": True})], "true\n", Exit.OK),
    (f"cancel {JOB}", [answering({"cancelled": False}), answering(STATUS)], "false\n", Exit.CANCELLED),
    (f"cancel {JOB}", [answering({"cancelled": False}), answering(UNKNOWN)], "", Exit.FAILED),
    ("cancel nonsense", [answering({"cancelled": False}), answering(UNKNOWN)], "", Exit.FAILED),
    (
        f"why {JOB[:18]}",  # an older dispatcher has no lists: it knows the text as it is
        [answering(OLDER), answering(UNKNOWN, request={"harpcaller": 1, "get_details": JOB[:18]})],
        "",
        Exit.FAILED,
    ),
    (
        "call web01 p --wait 5 -5.5e3 -x",
        [],
        "",
        Exit.USAGE,
    ),
    (
        "call web01 p --wait 5 -5.5e3 -1E2 six",
        [answering(SUBMITTED, request=call([5, -5500.0, -100.0, "six"])), answering({"result": 1})],
        "1\n",
        Exit.OK,
    ),
    (
        "call web01 p 1 --timeout 5 2",
        [answering(SUBMITTED, request=call([1, 2], timeout=5))],
        JOB + "\n",
        Exit.OK,
    ),
    ("call web01 p 1 --named a=2", [], "", Exit.USAGE),
    ("call web01 p --named a=2 1", [], "", Exit.USAGE),
    (f"why {JOB} more", [], "", Exit.USAGE),
    ("call web01 p --concurrency 2", [], "", Exit.USAGE),
    ("call web01 p --queue text", [], "", Exit.USAGE),
    ("call web01 p --timeout soon", [], "", Exit.USAGE),
    ("call web01 p --named nothing", [], "", Exit.USAGE),
    (f"follow {JOB} --since 1 --recent 1", [], "", Exit.USAGE),
    ("nonsense", [], "", Exit.USAGE),
]


@pytest.mark.parametrize(("line", "scripts", "output", "code"), CASES, ids=[f"{c[0][:30]}-{c[3].name}" for c in CASES])
def test_command_prints_output_and_exits(line: str, scripts: list[Script], output: str, code: Exit) -> None:
    with Peer(*scripts) as peer:
        done = harp(*line.split(), HARP_DISPATCHER=f"{peer.host}:{peer.port}")
    assert (done.stdout, done.returncode) == (output, code), done.stderr
    has_error = code not in (Exit.OK, Exit.NOT_FINISHED) and output != "false\n"
    assert "Traceback" not in done.stderr
    reports = [line for line in done.stderr.splitlines() if not line.endswith("; reconnecting")]
    assert bool(reports) == has_error


def test_help_of_hosts_says_where_their_procedures_are_listed() -> None:
    assert "`harpd status` on a host prints its procedures" in harp("hosts", "--help").stdout


def test_follow_of_an_ended_job_says_where_its_records_are() -> None:
    """The protocol begins with the next record, and an ended job has none."""
    with Peer(answering({"continue": True}), answering({"result": 1})) as peer:
        done = harp("follow", JOB, HARP_DISPATCHER=f"{peer.host}:{peer.port}")
    assert (done.stdout, done.returncode) == ("", Exit.OK)
    [report] = done.stderr.splitlines()
    assert report.startswith("harp: the job has ended, and no record came; harp read ")


@pytest.mark.parametrize(
    ("type", "advice"),
    [
        ("auth_error", "users file"),
        ("no_such_procedure", "harpd status"),
        ("procedure_loading_error", "harpd --test"),
        ("unknown_host", "harpcallerd hosts-refresh"),
        ("network_error", "firewall"),
    ],
)
def test_error_of_the_setup_has_a_hint(type: str, advice: str) -> None:
    with Peer(answering({"error": {"type": type, "message": "m"}})) as peer:
        done = harp("result", JOB, HARP_DISPATCHER=f"{peer.host}:{peer.port}")
    error, second = done.stderr.splitlines()
    assert (error, done.returncode) == (f"harp: {type}: m", Exit.FAILED)
    assert advice in second


@pytest.mark.parametrize("address", ["127.0.0.1:1", "unix:/nowhere/socket"])
def test_unreachable_dispatcher_error_has_a_hint(address: str) -> None:
    done = harp("--reconnect", "0", "result", JOB, HARP_DISPATCHER=address)
    error, second = done.stderr.splitlines()
    assert "cannot connect" in error
    assert "the daemon runs there" in second


@pytest.mark.parametrize("module", ["harp", "harp.cli"])
def test_program_runs_as_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (Exit.OK, f"harp {harp_package.__version__}\n", "")


def test_call_without_procedure_names_the_missing_argument() -> None:
    done = harp("call", "web01", HARP_DISPATCHER="127.0.0.1:1")
    assert done.returncode == Exit.USAGE
    assert done.stderr.endswith("the following arguments are required: PROCEDURE\n")


@pytest.mark.parametrize("before", [True, False])
def test_dispatcher_option_before_or_after_command(before: bool) -> None:
    with Peer(answering({"result": 1})) as peer:
        option = ["--dispatcher", f"[{peer.host}]:{peer.port}"]
        command = ["result", JOB]
        done = harp(*option, *command, HARP_DISPATCHER="elsewhere") if before else harp(*command, *option)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "no dispatcher"), ("", "no dispatcher"), ("host:port", "expected HOST"), (":1", "HOST")],
)
def test_missing_dispatcher_is_a_usage_error(value: str | None, message: str) -> None:
    done = harp("result", JOB, **({} if value is None else {"HARP_DISPATCHER": value}))
    assert done.returncode == Exit.USAGE
    assert message in done.stderr


@pytest.mark.parametrize(
    ("messages", "output", "code"),
    [
        ([{"harp": 1, "stream_result": False}, {"result": [1]}], "[1]\n", Exit.OK),
        ([{"harp": 1, "stream_result": True}, {"stream": 1}, {"result": 2}], "1\n2\n", Exit.OK),
        ([{"harp": 1, "error": {"type": "auth_error", "message": "m"}}], "", Exit.FAILED),
    ],
)
def test_direct_prints_result(tmp_path: Path, messages: list[object], output: str, code: Exit) -> None:
    files = server_files(tmp_path)
    auth = {"user": "admin", "password": "top secret"}
    request = {"harp": 1, "procedure": "p", "arguments": {"a": [1]}, "auth": auth}
    with Peer(answering(*messages, request=request), tls=server_context(files)) as peer:
        address = f"{peer.host}:{peer.port}"
        line = ["direct", address, "p", "--named", "a=[1]", "--user", "admin", "--ca-file", str(files.ca_file)]
        done = harp(*line, HARP_PASSWORD="top secret")
    assert (done.stdout, done.returncode) == (output, code), done.stderr
    assert "top secret" not in done.stderr


def test_direct_with_empty_dispatcher_is_called(tmp_path: Path) -> None:
    files = server_files(tmp_path)
    with Peer(answering({"harp": 1, "stream_result": False}, {"result": 1}), tls=server_context(files)) as peer:
        line = [
            "direct",
            f"{peer.host}:{peer.port}",
            "p",
            "--user",
            "u",
            "--tls-minimum",
            "1.3",
            "--insecure",
        ]
        done = harp(*line, HARP_PASSWORD="p", HARP_DISPATCHER="")
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr


@pytest.mark.parametrize("line", [["result", JOB], ["call", "web01", "p"], ["follow", JOB]])
def test_output_to_full_device_has_its_exit_code(line: list[str]) -> None:
    replies: dict[str, object] = {"result": {"result": 1}, "call": SUBMITTED, "follow": {"packet": 0, "data": 1}}
    with Peer(answering(replies[line[0]])) as peer, open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "--dispatcher", f"{peer.host}:{peer.port}", "--reconnect", "0", *line],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.stderr, done.returncode) == (
        "harp: cannot write the output: No space left on device\n",
        Exit.NOT_WRITTEN,
    )


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the shell, in which harp is the program."""
    environment = {**os.environ, "PYTHON": sys.executable, "PROGRAM": PROGRAM, "HARP_DISPATCHER": ""}
    environment.pop("PYTHONUNBUFFERED", None)  # argparse ignores a failed write
    line = 'harp() { "$PYTHON" -c "$PROGRAM" "$@"; }; ' + command
    return subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("option", ["--version", "--help", "call --help"])
def test_help_to_full_device_has_its_exit_code(option: str) -> None:
    done = shell(f"harp {option} > /dev/full")
    assert (done.stderr, done.returncode) == (
        "harp: cannot write the output: No space left on device\n",
        Exit.NOT_WRITTEN,
    )


def test_error_to_full_device_keeps_its_exit_code() -> None:
    assert shell(f"harp result {JOB} 2> /dev/full").returncode == Exit.USAGE


def test_closed_standard_output_is_no_error() -> None:
    with Peer(answering({"result": 1})) as peer:
        done = shell(f"harp --dispatcher {peer.host}:{peer.port} result {JOB} >&-")
    assert (done.stderr, done.returncode) == ("", Exit.OK)
    page: dict[str, Any] = {"jobs": [], "next": None, "examined": 0, "searched_to": None}
    with Peer(answering(page)) as peer:
        for command in ("jobs", "completion bash"):
            done = shell(f"harp --dispatcher {peer.host}:{peer.port} {command} >&-")
            assert (done.stderr, done.returncode) == ("", Exit.OK)


def test_closed_standard_error_moves_no_error_to_the_output() -> None:
    with Peer(answering(), answering({"result": 1})) as peer:
        done = shell(f"harp --dispatcher {peer.host}:{peer.port} result {JOB} 2>&-")
    assert (done.stdout, done.returncode) == ("1\n", Exit.OK)  # not a line about the reconnect
    done = shell(f"harp result {JOB} 2>&-")
    assert (done.stdout, done.returncode) == ("", Exit.USAGE)


def test_descriptor_of_a_secret_that_cannot_exist_is_a_usage_error() -> None:
    done = harp("--dispatcher", "127.0.0.1:1", "call", "web01", "p", "--secret", f"a=fd:{10**20}")
    assert (done.returncode, "Traceback" in done.stderr) == (Exit.USAGE, False)


@pytest.mark.parametrize("line", ["--named a=1 --named b=2 --named a=3", "--named a=1 --secret a=-"])
def test_repeated_named_argument_is_a_usage_error(line: str) -> None:
    """One of the values would be lost."""
    done = harp("--dispatcher", "127.0.0.1:1", "call", "web01", "p", *line.split())
    assert (done.stderr, done.returncode) == ("harp: named argument 'a': it is given twice\n", Exit.USAGE)


def test_version_is_that_of_the_distribution() -> None:
    assert harp("--version").stdout == f"harp {harp_package.__version__}\n"


@pytest.mark.parametrize(
    ("line", "first"),
    [
        (f"result {JOB}", []),
        (f"follow {JOB} --since 0", [{"packet": 0, "data": 1}]),
        (f"follow {JOB}", [{"packet": 0, "data": 1}]),
    ],
)
def test_interruption_reports_reconnecting_once(line: str, first: list[object]) -> None:
    with Peer(answering(*first), answering(), answering({"result": 1})) as peer:
        done = harp(*line.split(), HARP_DISPATCHER=f"{peer.host}:{peer.port}")
    assert done.returncode == Exit.OK, done.stderr
    [report] = [line for line in done.stderr.splitlines() if "no record came" not in line]
    assert re.fullmatch(r"harp: .*; reconnecting", report)


def test_control_c_while_waiting_prints_the_job() -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.until_closed()

    program = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {PROGRAM}"
    with Peer(answering(SUBMITTED), script) as peer:
        command = ["--dispatcher", f"{peer.host}:{peer.port}", "call", "--wait", "web01", "p"]
        with subprocess.Popen([sys.executable, "-c", program, *command], stderr=subprocess.PIPE, text=True) as child:
            wait_until(lambda: len(peer.requests) == 2, what="the wait for the result")
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=60)
    assert (errors, child.returncode) == (
        f"harp: job {JOB} continues; see harp result, follow and cancel\n",
        Exit.INTERRUPTED,
    )


def test_control_c_while_modules_load_prints_nothing(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("import time; print('loading', flush=True); time.sleep(60)")
    handler = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"import signal; {handler}; from harp.__main__ import main; main()"
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", program, "jobs"], env={**os.environ, "PYTHONPATH": str(tmp_path)}, **options
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "loading\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert (errors, child.returncode) == ("", -signal.SIGINT)


@pytest.mark.parametrize(
    "line",
    [
        ["call", "web01", "p", '{"a": 1, "a": 2}'],
        ["call", "web01", "p", '[{"b": {"a": 1, "\\u0061": 2}}]'],
        ["call", "web01", "p", "--named", 'x={"a": 1, "a": 2}'],
        ["call", "web01", "p", "--info", '{"a": 1, "a": 2}'],
        ["call", "web01", "p", "--wait", '{"a": 1, "a": 2}'],
    ],
)
def test_argument_that_repeats_a_key_is_a_usage_error(line: list[str]) -> None:
    """No connection is made: the program would have to choose one of the values."""
    done = harp(*line, HARP_DISPATCHER="localhost:1")
    assert (done.returncode, done.stdout) == (Exit.USAGE, "")
    assert 'repeated key "a" in an object' in done.stderr


def test_direct_without_verification_is_a_usage_error(tmp_path: Path) -> None:
    """No connection is made, so that no other server gets the password."""
    done = harp("direct", "localhost:1", "p", "--user", "u", HARP_PASSWORD="p")
    assert done.returncode == Exit.USAGE
    assert "use --ca-file FILE, or --insecure" in done.stderr
    done = harp("direct", "localhost:1", "p", "--user", "u", "--insecure", "--ca-file", "x", HARP_PASSWORD="p")
    assert done.returncode == Exit.USAGE
    assert "excludes --ca-file" in done.stderr


TERMINAL = "\x1b]0;title\x07\x9b2J\r\x7f\u202e"


@pytest.mark.parametrize("kind", ["exception", "error"])
def test_control_characters_of_remote_text_are_escaped(kind: str) -> None:
    end = {kind: {"type": f"T{TERMINAL}", "message": f"first\nsecond{TERMINAL}", "data": {"k": TERMINAL}}}
    with Peer(answering(end)) as peer:
        done = harp("result", JOB, "--dispatcher", f"{peer.host}:{peer.port}", "--reconnect", "0")
    assert done.returncode in (Exit.RAISED, Exit.FAILED)
    assert "first\nsecond\\u001b]0;title\\u0007\\u009b2J\\u000d\\u007f\\u202e" in done.stderr
    assert not set(TERMINAL) - set("]0;title2J") & set(done.stderr)
    details = {"details": {**DETAILS, "why": f"it failed: {TERMINAL}"}}
    with Peer(answering(details)) as peer:
        done = harp("why", JOB, "--dispatcher", f"{peer.host}:{peer.port}", "--reconnect", "0")
    assert done.stdout == "it failed: \\u001b]0;title\\u0007\\u009b2J\\u000d\\u007f\\u202e\n", done.stderr


def test_direct_without_password_is_a_usage_error() -> None:
    done = harp("direct", "localhost", "p", "--user", "u")
    assert done.returncode == Exit.USAGE
    assert "HARP_PASSWORD" in done.stderr


def test_closed_output_is_not_an_error() -> None:
    def endless(conn: PeerConnection) -> None:
        conn.expect()
        number = 0
        try:
            while True:
                conn.reply({"packet": number, "data": "x" * 1000})
                number += 1
        except OSError:
            conn.closed.set()

    with Peer(endless) as peer:
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "--dispatcher", f"{peer.host}:{peer.port}", "follow", JOB],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            child.stdout.readline()
            child.stdout.close()
            assert child.wait(60) == Exit.OK
            assert child.stderr.read() == b""


def test_help_has_examples_and_every_exit_code() -> None:
    for arguments in ([], ["call"], ["direct"]):
        text = harp(*arguments, "--help").stdout
        assert "harp call --wait web01 add 2 3" in text
        codes = {
            int(code) for code in re.findall(r"(?:^|  ) *(\d+)  \w", text.partition("exit codes:")[2], re.MULTILINE)
        }
        assert codes == set(Exit)
