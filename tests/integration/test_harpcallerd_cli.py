"""The program harpcallerd: start, stop, status, signals, reload, listening addresses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

import harp
from harp_daemon.settings import ConfigError
from harpcaller.api import control_client
from harpcaller.api.control_client import ControlClient, ControlError
from harpcaller.config import load
from harpcaller.daemon import check
from support.certificates import server_files
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd, LineClient

UNKNOWN = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def dispatcher(tmp_path: Path) -> Harpcallerd:
    """Return a dispatcher that is not started."""
    return Harpcallerd(tmp_path)


def answers(family: int, address: Any) -> bool:
    """Return whether a dispatcher replies there."""
    connection = socket.socket(family)
    connection.settimeout(DEADLINE)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        return False
    with LineClient(connection) as client:
        client.send({"harpcaller": 1, "cancel": UNKNOWN})
        return bool(client.messages() == [{"cancelled": False}])


def fails(dispatcher: Harpcallerd, *arguments: str) -> str:
    """Return the error of a command that must fail with 1: one line on stderr, apart from the log of a start."""
    done = dispatcher.control(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    (message,) = (line for line in done.stderr.splitlines() if not line.startswith("{"))
    return message


def start_arguments(dispatcher: Harpcallerd, *options: str) -> tuple[str, ...]:
    return ("start", f"--config={dispatcher.config_file}", *options)


# Status and stop.


def test_status_reports_running_and_stopped(dispatcher: Harpcallerd) -> None:
    dispatcher.set_hosts({"web01": 1})  # a new file without hosts may be incomplete: `status` would say so
    stopped = dispatcher.control("status")
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (1, "harpcallerd is stopped\n", "")
    with dispatcher:
        for options in ((), ("--wait",), ("--wait", "--timeout=1")):
            running = dispatcher.control("status", *options)
            assert (running.returncode, running.stdout, running.stderr) == (0, "harpcallerd is running\n", "")
    dispatcher.start()
    dispatcher.kill()  # its socket file remains
    assert dispatcher.socket.is_socket()
    assert dispatcher.control("status", "--wait", "--timeout=0.1").stdout == "harpcallerd is stopped\n"


def test_status_wait_returns_after_the_start(dispatcher: Harpcallerd) -> None:
    with subprocess.Popen(dispatcher.command("status", "--wait"), stdout=subprocess.PIPE, text=True) as waiting:
        with dispatcher:
            output, _ = waiting.communicate(timeout=DEADLINE)
        assert (waiting.returncode, output) == (0, "harpcallerd is running\n")


@pytest.mark.parametrize(
    "command",
    [
        *(
            ["reload"],
            ["list"],
            ["info", UNKNOWN],
            ["cancel", UNKNOWN],
            ["queue-list"],
            ["queue-cancel", "{}"],
        ),
        *(["hosts-list"], ["hosts-refresh"], ["prune-jobs"], ["reopen-logs"]),
    ],
    ids=" ".join,
)
def test_command_without_daemon_fails(dispatcher: Harpcallerd, command: list[str]) -> None:
    assert fails(dispatcher, *command) == f"harpcallerd: no harpcallerd is running on {dispatcher.socket}"


def test_stop_of_a_stopped_daemon_succeeds(dispatcher: Harpcallerd) -> None:
    done = dispatcher.control("stop", "--print-pid", "--timeout=5")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"harpcallerd: no harpcallerd is running on {dispatcher.socket}\n"


def test_stop_waits_for_the_process(dispatcher: Harpcallerd) -> None:
    dispatcher.start()
    pid = dispatcher.pid
    process = psutil.Process(pid)
    done = dispatcher.control("stop", "--print-pid", "--timeout=50")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{pid}\n", "")
    assert process.status() == psutil.STATUS_ZOMBIE  # exited, not yet reaped by this process
    assert dispatcher.wait() == 0
    assert not dispatcher.socket.exists()
    dispatcher.start()
    done = dispatcher.control("stop")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert dispatcher.wait() == 0


def test_stop_reports_a_timeout(dispatcher: Harpcallerd) -> None:
    dispatcher.start()
    os.kill(dispatcher.pid, signal.SIGSTOP)
    # It cannot reply; `status` detects that too.
    with subprocess.Popen(dispatcher.command("stop", "--timeout=0.5"), stderr=subprocess.PIPE, text=True) as stopping:
        _, message = stopping.communicate(timeout=DEADLINE)
    assert stopping.returncode == 1
    assert message == f"harpcallerd: harpcallerd does not answer on {dispatcher.socket}\n"
    os.kill(dispatcher.pid, signal.SIGCONT)
    assert dispatcher.wait() == 0  # the request was received in the meantime


def test_commands_to_a_halted_daemon_end(dispatcher: Harpcallerd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_client, "_REPLY_TIMEOUT", 0.2)
    with dispatcher:
        os.kill(dispatcher.pid, signal.SIGSTOP)
        try:
            for command in ("list", "reload", "hosts-list", "prune-jobs", "token-list"):
                with pytest.raises(ControlError, match="does not answer on"):
                    list(ControlClient(dispatcher.socket).send_command(command))
        finally:
            os.kill(dispatcher.pid, signal.SIGCONT)


def test_command_that_takes_long_is_waited_for(dispatcher: Harpcallerd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon answers other requests meanwhile."""
    script = dispatcher.directory / "script"
    script.write_text("#!/bin/sh\nsleep 1\n")
    script.chmod(0o700)
    monkeypatch.setattr(control_client, "_REPLY_TIMEOUT", 0.2)
    dispatcher.configure({"host_db_script": str(script)})
    with dispatcher:
        (reply,) = ControlClient(dispatcher.socket).send_command("hosts-refresh")
        assert "problems" in json.loads(bytes(reply))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_the_daemon(dispatcher: Harpcallerd, number: signal.Signals) -> None:
    dispatcher.start()
    assert dispatcher.stop(number) == 0
    assert not dispatcher.socket.exists()
    order = [event["event"] for event in dispatcher.events("harpcallerd stops", "dispatcher stops")]
    assert order == ["harpcallerd stops", "dispatcher stops"]
    assert not dispatcher.faults()


def test_commands_start_without_the_event_loop() -> None:
    program = "import harpcaller.cli, sys; print(*{'asyncio', 'sqlite3', 'cryptography'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (0, "\n")


# Starts.


def test_second_daemon_does_not_start(dispatcher: Harpcallerd) -> None:
    with dispatcher:
        message = fails(dispatcher, *start_arguments(dispatcher))
        assert message == f"harpcallerd: a harpcallerd is already running on {dispatcher.socket}"
        other = dispatcher.directory / "other"
        dispatcher.configure({"listen": [f"127.0.0.1:{dispatcher.port}"]})
        done = dispatcher.control(*start_arguments(dispatcher), f"--socket={other}")
        assert done.returncode == 1
        assert "Address already in use" in done.stderr
        dispatcher.configure({"listen": ["127.0.0.1:0"]})
        done = dispatcher.control(*start_arguments(dispatcher), f"--socket={other}")
        assert done.returncode == 1
        assert str(dispatcher.store_directory) in done.stderr
        assert dispatcher.control("status").returncode == 0
        assert answers(socket.AF_INET, (dispatcher.host, dispatcher.port))
        assert not other.exists()


def test_start_replaces_sockets_of_a_dead_daemon(dispatcher: Harpcallerd) -> None:
    dispatcher.start()
    dispatcher.kill()
    with dispatcher:
        assert dispatcher.control("status").returncode == 0


def test_removed_sockets_are_made_again(dispatcher: Harpcallerd, tmp_path: Path) -> None:
    """Otherwise `status` and `stop` would report a stopped daemon."""
    calls = tmp_path / "s" / "calls"
    dispatcher.configure({"listen": [f"unix:{calls}"]})
    with dispatcher:
        mode = calls.stat().st_mode
        shutil.rmtree(calls.parent)
        dispatcher.socket.unlink()
        for path in (calls, dispatcher.socket):
            made_again = partial(dispatcher.events, "removed socket made again", address=f"unix:{path}")
            wait_until(made_again, DEADLINE, str(path))
        assert dispatcher.control("status").returncode == 0
        assert calls.stat().st_mode == mode
        rpc = harp.HarpCaller(f"unix:{calls}")
        assert rpc.job(rpc.web01.p().id()).host() == "web01"
    assert not calls.exists()


def test_start_keeps_a_file_that_is_not_a_socket(dispatcher: Harpcallerd) -> None:
    dispatcher.socket.write_text("mine")
    message = f"harpcallerd: control socket {dispatcher.socket}: the existing file is not a socket"
    assert fails(dispatcher, *start_arguments(dispatcher)) == message
    assert dispatcher.socket.read_text() == "mine"
    assert fails(dispatcher, "list") == f"harpcallerd: no harpcallerd is running on {dispatcher.socket}"


def test_daemon_started_twice_in_parallel_runs_once(dispatcher: Harpcallerd) -> None:
    dispatcher.start()
    dispatcher.kill()  # both find its socket files
    dispatcher.configure({"listen": ["127.0.0.1:0"]})
    start = dispatcher.command(*start_arguments(dispatcher))
    starts = [subprocess.Popen(start, stderr=subprocess.PIPE) for _ in range(4)]
    try:
        wait_until(lambda: sum(one.poll() is not None for one in starts) == 3, DEADLINE, "all but one giving up")
        assert dispatcher.control("status", "--wait").returncode == 0
        assert dispatcher.control("stop").returncode == 0
        assert sorted(one.wait(DEADLINE) for one in starts) == [0, 1, 1, 1]
    finally:
        for one in starts:
            one.kill()
            one.communicate()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"listne": ["*:1"]}, "listne: expected a key of the dispatcher, got an unknown one"),
        ({"max_connections": 0}, "max_connections: expected an integer, at least 1, got 0"),
        ({"listen": ["192.0.2.1:0"]}, "listen: cannot listen on 192.0.2.1:0: Cannot assign requested address"),
        ({"listen": ["a..b:0"]}, "listen: cannot listen on a..b:0: cannot resolve 'a..b': not a valid host name"),
        ({"ca_file": "/nowhere.pem"}, "ca_file: expected a file that can be used"),
    ],
)
def test_invalid_configuration_prints_one_line(dispatcher: Harpcallerd, settings: dict[str, Any], message: str) -> None:
    dispatcher.configure({**settings, "log_level": "error"})
    for options in ((), ("--daemon",)):
        assert f"{dispatcher.config_file}: {message}" in fails(dispatcher, *start_arguments(dispatcher, *options))
    assert not dispatcher.socket.exists()


def test_missing_configuration_prints_one_line(dispatcher: Harpcallerd) -> None:
    assert fails(dispatcher, "start", "--config=/nowhere.toml") == (
        "harpcallerd: /nowhere.toml: No such file or directory; copy examples/harpcaller.toml, or use --config"
    )


def test_daemon_option_detaches(dispatcher: Harpcallerd, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    done = dispatcher.control(*start_arguments(dispatcher, "--daemon", f"--pidfile={pidfile}"))
    try:
        assert done.returncode == 0, done.stderr
        assert dispatcher.control("status").returncode == 0
        process = psutil.Process(int(pidfile.read_text()))
        assert process.cwd() == "/"
        assert process.terminal() is None
        assert os.getsid(process.pid) != process.pid
        assert os.getsid(process.pid) != os.getsid(0)
        assert {Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in range(3)} == {Path("/dev/null")}
    finally:
        stopped = dispatcher.control("stop", "--print-pid")
    assert stopped.stdout == f"{process.pid}\n"
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE  # not reaped yet
    assert not pidfile.exists()


def test_signals_that_the_parent_blocks_stop_the_daemon(dispatcher: Harpcallerd) -> None:
    script = dispatcher.directory / "script"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o700)
    dispatcher.configure({"host_db_script": str(script)})
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ignored = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the exit status of children would be unknown
    try:
        dispatcher.start()
    finally:
        signal.signal(signal.SIGCHLD, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    dispatcher.wait_event("cannot refresh hosts registry", error=f"{script} exited with status 3")
    assert dispatcher.reload()["event"] == "reloaded"
    assert dispatcher.stop() == 0


def test_pidfile_is_written_and_removed(dispatcher: Harpcallerd, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    with Harpcallerd(tmp_path / "one", options=(f"--pidfile={pidfile}",)) as one:
        assert pidfile.read_text() == f"{one.pid}\n"
        message = fails(dispatcher, *start_arguments(dispatcher, f"--pidfile={pidfile}"))
        assert message == f"harpcallerd: pid file {pidfile}: held by the running process {one.pid}"
    assert not pidfile.exists()


@contextmanager
def service_manager(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(DEADLINE)
        manager.bind(str(directory / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(directory / "notify"))
        yield manager


def test_service_manager_is_notified(dispatcher: Harpcallerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with service_manager(tmp_path, monkeypatch) as manager:
        with dispatcher:
            assert manager.recv(1000) == b"READY=1"
            assert answers(socket.AF_INET, (dispatcher.host, dispatcher.port))
            dispatcher.reload()
            assert manager.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert manager.recv(1000) == b"READY=1"
        assert manager.recv(1000) == b"STOPPING=1"


def test_debug_logs_everything(tmp_path: Path) -> None:
    for options, logged in (((), False), (("--debug",), True)):
        directory = tmp_path / str(logged)
        with Harpcallerd(directory, settings={"log_level": "info"}, options=options) as dispatcher:
            dispatcher.submit("nowhere", "p", "the argument")
        assert ("the argument" in dispatcher.log_file.read_text()) is logged


# Listening addresses.


def test_listen_logs_every_address(tmp_path: Path) -> None:
    path = tmp_path / "path"
    listen = ["127.0.0.1:0", "[::1]:0", "*:0", f"unix:{path}"]
    with Harpcallerd(tmp_path / "many", settings={"listen": listen}) as dispatcher:
        dispatcher.wait_event("harpcallerd is serving", address=f"unix:{path}")  # the last one
        serving = dispatcher.events("harpcallerd is serving")
        assert [event["address"] for event in serving] == ["127.0.0.1", "::1", "::", f"unix:{path}"]
        ports = [event.get("port") for event in serving]
        assert ports[3] is None
        assert answers(socket.AF_INET, ("127.0.0.1", ports[0]))
        assert answers(socket.AF_INET6, ("::1", ports[1]))
        assert answers(socket.AF_INET, ("127.0.0.1", ports[2]))
        assert answers(socket.AF_INET6, ("::1", ports[2]))
        assert answers(socket.AF_UNIX, str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert len(dispatcher.wait_events(1, "listening address is not loopback", level="warning")) == 1
        assert len(dispatcher.wait_events(1, "every local user can call procedures")) == 1
    assert not path.exists()


def test_listen_name_with_several_addresses(tmp_path: Path) -> None:
    with Harpcallerd(tmp_path, settings={"listen": ["localhost:0"]}) as dispatcher:
        serving = dispatcher.events("harpcallerd is serving")
        assert {event["port"] for event in serving} == {dispatcher.port}
        for event in serving:
            family = socket.AF_INET6 if ":" in event["address"] else socket.AF_INET
            assert answers(family, (event["address"], event["port"]))


def test_unix_socket_client_is_logged_by_user(tmp_path: Path) -> None:
    path = tmp_path / "path"
    with Harpcallerd(tmp_path / "one", settings={"listen": [f"unix:{path}"]}) as dispatcher:
        with LineClient(socket.socket(socket.AF_UNIX)) as client:
            client.socket.connect(str(path))
            client.send({"harpcaller": 1, "host": "h", "procedure": "p", "arguments": []})
            assert client.message()
        dispatcher.wait_event("job submitted", client=f"uid:{os.getuid()}")


# Reload.


def test_reload_changed_listen_needs_restart(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Harpcallerd(tmp_path / "one", settings={"listen": ["127.0.0.1:0"]}) as dispatcher:
        dispatcher.configure({"listen": ["127.0.0.1:0", f"unix:{path}"]})
        for _ in range(2):  # the second reload has no effect, but the restart is still needed
            done = dispatcher.control("reload")
            assert done.returncode == 0
            assert done.stderr == "harpcallerd: warning: the change of listen needs a restart\n"
        assert len(dispatcher.wait_events(2, "a changed setting needs a restart", key="listen")) == 2
        assert not path.exists()
        assert answers(socket.AF_INET, (dispatcher.host, dispatcher.port))
        dispatcher.configure({"listen": ["127.0.0.1:0"]})
        assert dispatcher.control("reload").stderr == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_connections": "many"}, "max_connections: expected"),
        ({"ca_file": "/nowhere.pem"}, "ca_file: expected"),
    ],
)
def test_reload_of_an_invalid_file_has_no_effect(
    dispatcher: Harpcallerd, settings: dict[str, Any], message: str
) -> None:
    with dispatcher:
        listening = {connection.laddr for connection in psutil.Process(dispatcher.pid).net_connections("tcp")}
        dispatcher.configure({**settings, "log_level": "error"})
        outcome = dispatcher.reload()
        assert outcome["event"] == "reload failed; nothing is changed"
        assert message in outcome["reason"]
        assert message in fails(dispatcher, "reload")
        assert {one.laddr for one in psutil.Process(dispatcher.pid).net_connections("tcp")} == listening
        assert answers(socket.AF_INET, (dispatcher.host, dispatcher.port))
        dispatcher.wait_event("command", command="reload")  # the log level is unchanged


def test_reload_applies_request_and_log_settings(dispatcher: Harpcallerd) -> None:
    with dispatcher:
        dispatcher.configure({"request_line": 1024, "log_level": "info", "stream_directory": "/elsewhere"})
        assert dispatcher.control("reload").returncode == 0
        (reply,) = dispatcher.ask(cancel="x" * 2000)
        assert reply["error"]["message"] == "the request line is longer than 1024 bytes"
        dispatcher.submit("nowhere", "p", "the argument")
        dispatcher.wait_event("a changed setting needs a restart", key="stream_directory")
    assert "the argument" not in dispatcher.log_file.read_text()


def test_reload_many_times_in_parallel(dispatcher: Harpcallerd) -> None:
    with dispatcher:
        for _ in range(20):
            os.kill(dispatcher.pid, signal.SIGHUP)
        assert dispatcher.control("reload").returncode == 0
        assert answers(socket.AF_INET, (dispatcher.host, dispatcher.port))


@pytest.mark.parametrize("by_signal", [True, False])
def test_reopen_logs_opens_a_new_file(dispatcher: Harpcallerd, by_signal: bool) -> None:
    with dispatcher:
        if by_signal:
            os.kill(dispatcher.pid, signal.SIGUSR1)
        else:
            assert dispatcher.control("reopen-logs").returncode == 0
        dispatcher.wait_event("log files reopened")


# The command line.


def test_socket_option_before_or_after_the_command(dispatcher: Harpcallerd) -> None:
    program = dispatcher.command()[:-1]

    def run(*arguments: str) -> str:
        return subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=DEADLINE).stdout

    with dispatcher:
        socket = f"--socket={dispatcher.socket}"
        assert run(socket, "status") == run("status", socket) == "harpcallerd is running\n"
        assert run("--socket=/nowhere", "status", socket) == "harpcallerd is running\n"
        assert run("--socket=/nowhere", "status") == "harpcallerd is stopped\n"


@pytest.mark.parametrize(
    "line",
    [
        "--wait --timeout=5 status",
        "--wait --timeout 5 status",
        "--timeout=5 status --wait",
        "--time 5 --wait status",
        "status --wait --timeout 5",
    ],
)
def test_options_before_or_after_the_command(dispatcher: Harpcallerd, line: str) -> None:
    dispatcher.set_hosts({"web01": 1})
    with dispatcher:
        done = dispatcher.control(*line.split())
    assert (done.returncode, done.stdout, done.stderr) == (0, "harpcallerd is running\n", "")


def test_start_options_before_the_command(dispatcher: Harpcallerd) -> None:
    assert fails(dispatcher, "--debug", "--config", "/nowhere.toml", "start").startswith("harpcallerd: /nowhere.toml:")
    done = dispatcher.control("--debug", "list")
    assert (done.returncode, "unrecognized arguments: --debug" in done.stderr) == (2, True)


@pytest.mark.parametrize("program", ["harpd", "harpcallerd", "harp-cert"])
def test_program_version_and_failed_output(program: str) -> None:
    module = {"harpd": "harpd.cli", "harpcallerd": "harpcaller.cli", "harp-cert": "harp_daemon.certificates"}[program]
    code = f"import sys; from {module} import main; sys.exit(main())"
    environment = {**os.environ, "PYTHON": sys.executable, "CODE": code}
    environment.pop("PYTHONUNBUFFERED", None)  # argparse ignores a failed write

    def shell(arguments: str) -> tuple[int, str, str]:
        line = f'exec "$PYTHON" -c "$CODE" {arguments}'
        done = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=DEADLINE)
        return done.returncode, done.stdout, done.stderr

    assert shell("--version") == (0, f"{program} {harp.__version__}\n", "")
    full = f"{program}: cannot write the output: No space left on device\n"
    assert shell("--version > /dev/full") == shell("--help > /dev/full") == (3, "", full)
    assert shell("--help >&-") == (0, "", "")


def test_list_to_full_device_has_its_exit_status(dispatcher: Harpcallerd) -> None:
    with dispatcher:
        dispatcher.ask(get_result=dispatcher.submit("nowhere", "p"))  # it ends when the hosts are loaded
        for command in ("status", "list --all", "stop --print-pid"):
            with open("/dev/full", "w") as full:
                done = subprocess.run(
                    dispatcher.command(*command.split()), stdout=full, stderr=subprocess.PIPE, timeout=DEADLINE
                )
            message = b"harpcallerd: cannot write the output: No space left on device\n"
            assert (done.returncode, done.stderr) == (3, message), command
        assert dispatcher.wait() == 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["info"],
        ["prune-jobs", "--age=x"],
        ["prune-jobs", "--age=0"],
        ["prune-jobs", "--age=0.0"],
        ["--age=0", "prune-jobs"],
        ["prune-jobs", "--age=-1"],
        ["status", "--timeout=nan"],
        ["list", "--newest=0"],
        ["list", "--newest=1.5"],
        ["list", "--of-queue=q"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_status_2(dispatcher: Harpcallerd, arguments: list[str]) -> None:
    done = dispatcher.control(*arguments)
    assert done.returncode == 2
    assert "usage: harpcallerd" in done.stderr


def test_help_names_every_command_and_has_examples(dispatcher: Harpcallerd) -> None:
    help = dispatcher.control("--help").stdout
    commands = "start status stop reload list info cancel queue-list queue-cancel hosts-list hosts-refresh prune-jobs"
    for command in (*commands.split(), "reopen-logs"):
        assert re.search(rf"^    {command}\s", help, re.MULTILINE)
        assert dispatcher.control(command, "--help").returncode == 0
    assert "examples:\n  harpcallerd start" in help
    assert "exit status: 0 success" in help


# The check.


def test_check_accepts_a_good_configuration(dispatcher: Harpcallerd) -> None:
    dispatcher.set_hosts({"web01": 4306})
    done = dispatcher.control("--test", f"--config={dispatcher.config_file}")
    note = "harpcallerd: max_age: ended jobs are deleted after 720 hours"
    warning = "harpcallerd: warning: certificates of hosts are not checked; set ca_file or known_certs_file"
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (0, "config OK\n", [warning, note])
    missing = dispatcher.directory / "none"
    dispatcher.configure({"known_certs_file": str(missing)})
    done = dispatcher.control("--test", f"--config={dispatcher.config_file}")
    assert (done.returncode, done.stdout) == (0, "config OK\n")
    assert f"warning: known_certs_file {missing} does not exist; it accepts no certificate" in done.stderr
    assert not dispatcher.store_directory.exists()


@pytest.mark.parametrize(
    ("settings", "note", "event", "fields"),
    [
        ({"max_age": 48}, "", "ended jobs are deleted after max_age", {"hours": 48.0}),
        (
            {"log_handlers": ["harpcaller_syslog_h"]},
            "harpcallerd: max_age: not set in a file of the legacy dispatcher: jobs are never deleted\n",
            "jobs are never deleted; set max_age",
            {"level": "warning"},
        ),
        (
            {},
            "harpcallerd: max_age: ended jobs are deleted after 720 hours\n",
            "ended jobs are deleted after max_age",
            {"hours": 720.0},
        ),
    ],
    ids=["set", "legacy", "default"],
)
def test_max_age_is_stated_by_check_and_at_start(
    dispatcher: Harpcallerd, settings: dict[str, Any], note: str, event: str, fields: dict[str, Any]
) -> None:
    dispatcher.set_hosts({"web01": 4306})
    dispatcher.configure(settings)
    done = dispatcher.control("--test", f"--config={dispatcher.config_file}")
    assert (done.returncode, done.stdout) == (0, "config OK\n")
    assert done.stderr.endswith(f"known_certs_file\n{note}")
    with dispatcher:
        assert dispatcher.events(event, **fields)
        done = dispatcher.control("prune-jobs")
        message = "harpcallerd: max_age is not set, so that jobs are never deleted; use --age\n"
        assert (done.returncode, done.stderr) == ((1, message) if "legacy" in note else (0, ""))


def test_check_warns_of_a_source_without_hosts(dispatcher: Harpcallerd) -> None:
    script = dispatcher.directory / "script"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o700)
    dispatcher.set_hosts({})
    dispatcher.configure({"host_db_script": str(script)})
    done = dispatcher.control("--test", f"--config={dispatcher.config_file}")
    assert (done.returncode, done.stdout) == (0, "config OK\n")
    for key in ("hosts_file", "host_db_script"):
        assert (
            f"{dispatcher.config_file}: {key}: it has no host; a job for a host that is missing fails\n" in done.stderr
        )


def test_byte_order_mark_of_an_editor_is_accepted(dispatcher: Harpcallerd) -> None:
    dispatcher.set_hosts({"web01": 4306, "web02": 4306})
    for file in (dispatcher.config_file, dispatcher.hosts_file):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    done = dispatcher.control("--test", f"--config={dispatcher.config_file}")
    assert (done.returncode, done.stdout) == (0, "config OK\n"), done.stderr


def test_check_prints_every_error(dispatcher: Harpcallerd) -> None:
    script = dispatcher.directory / "script"
    script.write_text("#!/bin/sh\necho oops\n")
    script.chmod(0o700)
    dispatcher.set_hosts({"web01": 4306})
    dispatcher.hosts_file.write_text(dispatcher.hosts_file.read_text() * 2)
    missing = str(dispatcher.directory / "none")
    dispatcher.configure({"ca_file": missing, "host_db_script": str(script)})
    done = dispatcher.control("--test", f"--config={dispatcher.config_file}")
    assert (done.returncode, done.stdout) == (1, "")
    expected = [
        f"{dispatcher.config_file}: ca_file: expected a file that can be used, got {missing}: No such file",
        f"{dispatcher.hosts_file}:2: hostname 'web01' is repeated; line 1 counts",
        f"{script}:1: Expecting value",
    ]
    for error, start in zip(done.stderr.splitlines(), expected, strict=True):
        assert error.startswith(f"harpcallerd: {start}")
    script.write_text("#!/bin/sh\nexit 3\n")
    dispatcher.configure({"hosts_file": missing, "host_db_script": str(script)})
    errors = dispatcher.control("--test", f"--config={dispatcher.config_file}").stderr.splitlines()
    assert [error.split(": ")[2] for error in errors[1:]] == ["hosts_file", "host_db_script"]  # after a warning
    dispatcher.configure({"log_level": "loud"})
    assert "log_level: expected" in fails(dispatcher, "--test", f"--config={dispatcher.config_file}")


def test_check_refuses_a_named_pipe(dispatcher: Harpcallerd) -> None:
    """Opening it would wait for a writer."""
    pipe = dispatcher.directory / "pipe"
    os.mkfifo(pipe, 0o600)
    for key in ("hosts_file", "ca_file", "known_certs_file", "access_file", "secrets_key_file", "certfile", "crl_file"):
        files = {"certfile": str(pipe), "keyfile": str(pipe)}
        dispatcher.configure({"tls": files} if key == "certfile" else {key: str(pipe)})
        if key == "crl_file":
            own = server_files(dispatcher.directory)
            files = {"certfile": str(own.certfile), "keyfile": str(own.keyfile), "client_ca_file": str(own.ca_file)}
            dispatcher.configure({"tls": files | {"crl_file": str(pipe)}})
        (error,) = check(load(dispatcher.config_file))[0]
        assert key in error
        assert "expected a regular file, got a named pipe" in error
    with pytest.raises(ConfigError, match="expected a regular file, got a named pipe"):
        load(pipe)


def test_hosts_file_that_became_a_pipe_is_not_used(dispatcher: Harpcallerd) -> None:
    dispatcher.set_hosts({"web01": 4306})
    with dispatcher:
        os.mkfifo(dispatcher.directory / "pipe")
        (dispatcher.directory / "pipe").rename(dispatcher.hosts_file)
        refreshed = dispatcher.control("hosts-refresh")
        assert refreshed.returncode == 1
        assert "expected a regular file, got a named pipe" in refreshed.stderr
        assert '"web01"' in dispatcher.control("hosts-list").stdout


def test_list_into_a_closed_pipe_succeeds(dispatcher: Harpcallerd) -> None:
    with dispatcher:
        for number in range(300):
            dispatcher.submit("nowhere", "p", number, "x" * 1000)
        command = subprocess.Popen(
            dispatcher.command("list", "--all"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert command.stdout is not None
        assert command.stderr is not None
        with command, command.stdout, command.stderr:
            assert command.stdout.readline()
            command.stdout.close()
            assert command.stderr.read() == ""
            assert command.wait(DEADLINE) == 0


def test_control_characters_of_clients_are_escaped(dispatcher: Harpcallerd) -> None:
    """A client may write any character but C0 controls as it is; the store and the control socket do not change it."""
    odd = "\x7f\x9b2J\u202e"
    call = {
        "harpcaller": 1,
        "host": f"h{odd}",
        "procedure": f"p{odd}",
        "arguments": [odd],
        "queue": {"name": {"q": odd}},
    }
    with dispatcher:
        with dispatcher.connect() as client:
            client.send(json.dumps(call, ensure_ascii=False).encode() + b"\n")
            [reply] = client.messages()
        assert isinstance(reply, dict)
        job = str(reply["job_id"])
        for command in (["list", "--all", "--queue"], ["info", job], ["info", "--full", job]):
            done = dispatcher.control(*command)
            assert done.returncode == 0, done.stderr
            assert "\\u007f\\u009b2J\\u202e" in done.stdout
            assert not set(odd) - set("2J") & set(done.stdout)
            for line in done.stdout.splitlines():
                assert odd in json.dumps(json.loads(line), ensure_ascii=False)
