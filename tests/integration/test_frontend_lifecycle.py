"""The lifecycle of harpd: start, reload, stop, and the effects of SIGKILL on frontend and supervisor."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.certificates import server_files
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd, is_dead
from support.procedures_file import BROKEN, CHANGED, PROCEDURES

ACKNOWLEDGED = {"harp": 1, "stream_result": False}


@pytest.fixture
def harpd(tmp_path: Path) -> Harpd:
    return Harpd(tmp_path / "harpd", PROCEDURES)


def version(harpd: Harpd) -> Any:
    return harpd.call("version")[-1]


def test_reload_applies_procedures_to_new_calls_only(harpd: Harpd, tmp_path: Path) -> None:
    with harpd, harpd.connect() as running:
        running.send(harpd.request("wait_for", [str(tmp_path / "go")]))
        assert running.message() == ACKNOWLEDGED
        harpd.procedures_file.write_text(CHANGED)
        assert harpd.reload()["event"] == "reloaded"
        assert version(harpd) == {"result": 2}
        (tmp_path / "go").touch()
        assert running.lines() == [{"result": "there"}]


def break_procedures(harpd: Harpd) -> None:
    harpd.procedures_file.write_text(BROKEN)


def break_configuration(harpd: Harpd) -> None:
    harpd.procedures_file.write_text(CHANGED)
    harpd.config_file.write_text("network: {")


def break_users(harpd: Harpd) -> None:
    harpd.procedures_file.write_text(CHANGED)
    harpd.configure({"authentication": {"module": "harpd.auth.passfile", "file": "/nowhere"}})


def use_pipe(*keys: str) -> Any:
    """Return a function that makes a file of the configuration a named pipe; opening it would wait for a writer."""

    def break_(harpd: Harpd) -> None:
        pipe = harpd.directory / "pipe"
        os.mkfifo(pipe, 0o600)
        section, key = keys
        more = {"module": "harpd.auth.passfile"} if section == "authentication" else {}
        harpd.configure({section: {key: str(pipe), **more}})

    return break_


def use_pipe_as(attribute: str) -> Any:
    """Return a function that replaces a file of the command line by a named pipe."""

    def break_(harpd: Harpd) -> None:
        file: Path = getattr(harpd, attribute)
        file.unlink()
        os.mkfifo(file, 0o600)

    return break_


def use_file_as_runtime_directory(harpd: Harpd) -> None:
    harpd.runtime_directory.touch()


def use_directory_in_a_file(harpd: Harpd) -> None:
    harpd.configure({"runtime_directory": str(harpd.certfile / "run")})


def name_no_user(harpd: Harpd) -> None:
    harpd.configure({"default_user": "no-such-user"})


def name_no_group(harpd: Harpd) -> None:
    harpd.configure({"default_group": "no-such-group"})


def break_certificate(harpd: Harpd) -> None:
    harpd.procedures_file.write_text(CHANGED)
    harpd.certfile.write_text("garbage")


def break_logging(harpd: Harpd) -> None:
    harpd.procedures_file.write_text(CHANGED)
    harpd.logging_file.write_text("handlers: {a: {class: nowhere.Handler}}\nroot: {handlers: [a]}\n")


def move_log_and_break_procedures(harpd: Harpd) -> None:
    """The frontend has applied its log settings when the supervisor rejects the procedures file."""
    handler = f"{{class: logging.FileHandler, filename: {harpd.directory / 'other.log'}}}"
    harpd.logging_file.write_text(f"handlers: {{a: {handler}}}\nroot: {{handlers: [a]}}\n")
    harpd.procedures_file.write_text(BROKEN)


@pytest.mark.parametrize(
    "break_",
    [
        break_procedures,
        break_configuration,
        break_users,
        break_certificate,
        break_logging,
        move_log_and_break_procedures,
    ],
)
def test_reload_with_a_broken_file_has_no_effect(harpd: Harpd, break_: Any) -> None:
    with harpd:
        break_(harpd)
        failed = harpd.reload()
        assert failed["event"] == "reload failed; nothing is changed"
        assert failed["reason"]
        assert version(harpd) == {"result": 1}
        assert harpd.status()["calls"] == 0


def test_reload_requested_during_a_reload_follows_it(harpd: Harpd, tmp_path: Path) -> None:
    loading, go = tmp_path / "loading", tmp_path / "go"
    wait = f"""
import os, time
open({str(loading)!r}, "w").close()
while not os.path.exists({str(go)!r}):
    time.sleep(0.01)
"""
    with harpd:
        harpd.procedures_file.write_text(harpd.procedures_file.read_text() + wait)
        os.kill(harpd.pid, signal.SIGHUP)
        wait_until(loading.exists, DEADLINE, "the first reload")
        harpd.procedures_file.write_text(CHANGED)
        os.kill(harpd.pid, signal.SIGHUP)
        go.touch()
        wait_until(lambda: version(harpd) == {"result": 2}, DEADLINE, "the second reload")


def test_reload_applies_users_limits_and_certificate(harpd: Harpd) -> None:
    with harpd:
        other = harpd.directory / "other"
        other.mkdir()
        renewed = server_files(other, ("localhost", "renewed.example"))
        harpd.certfile.write_bytes(renewed.certfile.read_bytes())
        harpd.keyfile.write_bytes(renewed.keyfile.read_bytes())
        harpd.password = "another"
        harpd.configure({"limits": {"request_line": 1024}})
        assert harpd.reload()["event"] == "reloaded"
        with harpd.connect() as client:
            names = dict(client.socket.getpeercert() or {})["subjectAltName"]
            assert ("DNS", "renewed.example") in names
            client.send(harpd.request("version", ["x" * 1024]))
            assert client.lines()[0]["error"]["message"] == "the request line is longer than 1024 bytes"
        assert version(harpd) == {"result": 1}
        assert not harpd.events("a changed setting needs a restart")


def test_reload_logs_settings_that_need_a_restart(harpd: Harpd) -> None:
    with harpd:
        harpd.configure({"network": {"address": "127.0.0.2"}, "runtime_directory": str(harpd.directory / "run2")})
        for _ in range(2):  # after the second reload the restart is still needed
            assert harpd.reload()["event"] == "reloaded"

        def warned_keys() -> list[str]:
            return [event["key"] for event in harpd.events("a changed setting needs a restart")]

        expected = ["network.address", "runtime_directory"] * 2
        wait_until(lambda: warned_keys() == expected, DEADLINE, "the warnings of both reloads")
        assert version(harpd) == {"result": 1}


def test_tls_minimum_below_1_2_is_logged_as_warning(harpd: Harpd) -> None:
    harpd.configure({"network": {"tls_minimum": "1.1"}})
    with harpd:
        harpd.wait_event("TLS versions below 1.2 are allowed", level="warning", tls_minimum="1.1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_ends_calls_with_shutdown_and_exits_with_0(harpd: Harpd, number: signal.Signals) -> None:
    harpd.start()
    with harpd.connect() as running, harpd.connect() as waiting:
        running.send(harpd.request("sleep", [3600]))
        assert running.message() == ACKNOWLEDGED
        os.kill(harpd.pid, number)
        for client in (running, waiting):
            (last,) = client.lines()
            assert last["error"]["type"] == "shutdown"
    assert harpd.stop(number) == 0
    assert not harpd.faults()
    with pytest.raises(ConnectionRefusedError):
        harpd.connect()


def test_stop_does_not_wait_for_a_client_that_does_not_read(harpd: Harpd) -> None:
    harpd.configure({"limits": {"kill_grace": 0.5}})
    harpd.start()
    with harpd.connect() as client:
        client.send(harpd.request("flood", [10_000]))
        assert client.message() == {"harp": 1, "stream_result": True}
        assert harpd.stop() == 0


def test_restart_serves_on_the_same_port(harpd: Harpd) -> None:
    with harpd:
        port = harpd.port
        assert version(harpd) == {"result": 1}
    with harpd:
        assert harpd.port == port
        assert version(harpd) == {"result": 1}


def test_supervisor_death_kills_calls_and_the_next_works(harpd: Harpd, tmp_path: Path) -> None:
    with harpd, harpd.connect() as running, harpd.connect() as streaming:
        running.send(harpd.request("pid_then_wait", [str(tmp_path / "pid")]))
        assert running.message() == ACKNOWLEDGED
        streaming.send(harpd.request("count_until", [str(tmp_path / "never")]))
        assert streaming.message() == {"harp": 1, "stream_result": True}
        wait_until((tmp_path / "pid").exists, what="the call")
        call, supervisor, zygote = int((tmp_path / "pid").read_text()), harpd.supervisor, harpd.zygote
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: is_dead(call) and is_dead(zygote), 2.0, "the death of the call and of the zygote")
        died = {"harp": 1, "error": {"type": "call_died", "message": "the supervisor died"}}
        assert running.lines() == [died]
        *records, last = streaming.lines()
        assert last == died
        assert records == [{"stream": number} for number in range(len(records))]
        assert version(harpd) == {"result": 1}
        assert harpd.supervisor != supervisor
        harpd.wait_event("supervisor died", supervisor=supervisor, status="signal 9")


def test_supervisor_that_cannot_restart_is_an_error(harpd: Harpd) -> None:
    with harpd:
        harpd.procedures_file.write_text(BROKEN)
        os.kill(harpd.supervisor, signal.SIGKILL)
        harpd.wait_event("cannot start supervisor; retrying")
        (rejection,) = harpd.call("version")
        assert rejection["error"]["type"] == "procedure_loading_error"
        harpd.procedures_file.write_text(CHANGED)
        wait_until(lambda: version(harpd) == {"result": 2}, DEADLINE, "the next supervisor")


def test_harpd_death_kills_calls_and_the_next_start_works(harpd: Harpd, tmp_path: Path) -> None:
    harpd.start()
    with harpd.connect() as running:
        running.send(harpd.request("pid_then_wait", [str(tmp_path / "pid")]))
        assert running.message() == ACKNOWLEDGED
        wait_until((tmp_path / "pid").exists, what="the call")
        call, supervisor, zygote = int((tmp_path / "pid").read_text()), harpd.supervisor, harpd.zygote
        harpd.kill()
        wait_until(lambda: all(map(is_dead, (call, supervisor, zygote))), DEADLINE, "the death of all")
    with harpd:
        assert version(harpd) == {"result": 1}


def test_runtime_directory_in_use_is_rejected(harpd: Harpd) -> None:
    with harpd:
        second = subprocess.run(harpd.command(), capture_output=True, text=True, timeout=DEADLINE)
        assert second.returncode == 1
        assert "used by another running harpd" in second.stderr
        assert version(harpd) == {"result": 1}


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_runtime_directory_writable_for_others_is_rejected(harpd: Harpd, mode: int) -> None:
    harpd.runtime_directory.mkdir(mode=0o700)
    harpd.runtime_directory.chmod(mode)
    outcome = subprocess.run(harpd.command(), capture_output=True, text=True, timeout=DEADLINE)
    assert outcome.returncode == 1
    assert f"{harpd.runtime_directory}: other users can write there" in outcome.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_runtime_directory_of_another_user_is_rejected(harpd: Harpd) -> None:
    harpd.runtime_directory.mkdir(mode=0o700)
    os.chown(harpd.runtime_directory, 4321, 4321)
    outcome = subprocess.run(harpd.command(), capture_output=True, text=True, timeout=DEADLINE)
    assert outcome.returncode == 1
    assert f"{harpd.runtime_directory}: owned by user 4321" in outcome.stderr


def test_port_in_use_is_an_error(harpd: Harpd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        harpd.configure({"network": {"port": taken.getsockname()[1]}})
        outcome = subprocess.run(harpd.command(), capture_output=True, text=True, timeout=DEADLINE)
    assert outcome.returncode == 1
    assert "network.address: cannot listen on 127.0.0.1, port" in outcome.stderr


def run(harpd: Harpd, *options: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(harpd.command(*options), capture_output=True, text=True, timeout=DEADLINE, **more)


def test_test_option_prints_ok_and_has_no_effect(harpd: Harpd, tmp_path: Path) -> None:
    outcome = run(harpd, "--test")
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "config OK\n", "")
    assert not harpd.runtime_directory.exists()


@pytest.mark.parametrize(
    ("break_", "expected"),
    [
        (break_procedures, "broken on purpose"),
        (break_configuration, "harpd.conf: line 1, column 11"),
        (break_users, "No such file or directory"),
        (break_certificate, "network.certfile: expected PEM files"),
        (break_logging, "logging.conf: Unable to configure handler 'a'"),
        (use_pipe("authentication", "file"), "authentication.file: "),
        (use_pipe("network", "certfile"), "pipe: expected a regular file, got a named pipe"),
        (use_pipe("network", "keyfile"), "pipe: expected a regular file, got a named pipe"),
        (use_pipe_as("config_file"), "harpd.conf: expected a regular file, got a named pipe"),
        (use_pipe_as("logging_file"), "logging.conf: expected a regular file, got a named pipe"),
        (use_pipe_as("procedures_file"), "procedures.py: expected a regular file, got a named pipe"),
        (use_file_as_runtime_directory, "runtime_directory: {directory}/run: Not a directory"),
        (use_directory_in_a_file, "runtime_directory: {directory}/server.pem/run: Not a directory"),
    ],
)
def test_test_option_reports_each_error_in_one_line(harpd: Harpd, break_: Any, expected: str) -> None:
    break_(harpd)
    outcome = run(harpd, "--test")
    assert (outcome.returncode, outcome.stdout) == (1, "")
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("harpd: ")
    assert expected.format(directory=harpd.directory) in line
    started = run(harpd)
    assert started.returncode == 1
    assert "Traceback" not in started.stderr


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("no.such.module", "authentication.module: no.such.module: cannot be imported: ModuleNotFoundError"),
        ("os.path", "authentication.module: os.path: expected a function create(config), found none"),
        ("bad_users", "authentication.module: bad_users: cannot be imported: SystemExit: 5"),
    ],
)
def test_unusable_authentication_module_is_an_error(harpd: Harpd, module: str, expected: str) -> None:
    (harpd.directory / "bad_users.py").write_text("print('hello')\nraise SystemExit(5)\n")
    harpd.configure({"authentication": {"module": module}, "python": {"path": str(harpd.directory)}})
    outcome = run(harpd, "--test")
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert expected in outcome.stderr


def test_test_option_warns_of_later_failures(harpd: Harpd) -> None:
    harpd.procedures_file.write_text(
        "import threading\nfrom harpd.proc import procedure\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "@procedure(uid='no-such-user')\ndef p(): pass\n"
    )
    outcome = run(harpd, "--test")
    assert (outcome.returncode, outcome.stdout) == (0, "config OK\n")
    expected = (
        "started 1 thread(s), which will be missing in calls",
        "unknown user: 'no-such-user'; calls will fail",
    )
    for line, end in zip(outcome.stderr.splitlines(), expected, strict=True):
        assert line.endswith(f": {end}")


@pytest.mark.parametrize(
    ("break_", "expected"),
    [(name_no_user, "unknown user: 'no-such-user'"), (name_no_group, "unknown group: 'no-such-group'")],
)
def test_test_option_refuses_an_unknown_default_user(harpd: Harpd, break_: Any, expected: str) -> None:
    break_(harpd)
    outcome = run(harpd, "--test")
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert outcome.stderr == f"harpd: {harpd.config_file}: default_user, default_group: {expected}\n"


def test_test_option_hides_output_of_the_procedures_file(harpd: Harpd) -> None:
    harpd.procedures_file.write_text("import os, sys\nprint('noise')\nos.write(2, b'more noise')\n")
    outcome = run(harpd, "--test")
    assert (outcome.returncode, outcome.stdout) == (0, "config OK\n")
    assert "exposes no procedure" in outcome.stderr
    assert "noise" not in outcome.stderr
    harpd.procedures_file.write_text("import os\nos._exit(3)\n")
    outcome = run(harpd, "--test")
    assert outcome.returncode == 1
    assert "the check exited early (exit status 3)" in outcome.stderr


def test_daemon_option_returns_when_harpd_serves(harpd: Harpd, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    harpd.logging_file.write_text(
        harpd.logging_file.read_text().replace(
            "class: logging.StreamHandler", f"class: logging.FileHandler\n    filename: {harpd.log_file}"
        )
    )
    outcome = run(harpd, "--daemon", "--pidfile", str(pid_file), cwd=harpd.directory)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "", "")
    daemon = psutil.Process(int(pid_file.read_text()))
    try:
        harpd.port = harpd.wait_event("harpd is serving")["port"]
        assert version(harpd) == {"result": 1}
        assert daemon.cwd() == "/"
        assert daemon.terminal() is None
    finally:
        daemon.terminate()
        psutil.wait_procs([daemon], DEADLINE)
    assert not pid_file.exists()
    assert not harpd.faults()


def test_daemon_option_reports_a_failed_start(harpd: Harpd) -> None:
    break_procedures(harpd)
    outcome = run(harpd, "--daemon")
    assert outcome.returncode == 1
    assert "broken on purpose" in outcome.stderr


def test_service_manager_is_notified(harpd: Harpd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        monkeypatch.chdir(tmp_path)
        manager.bind("notify")
        manager.settimeout(DEADLINE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with harpd:
            assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"STOPPING=1"


def test_test_option_accepts_a_port_in_use(harpd: Harpd) -> None:
    """The running harpd uses the port when `--test` checks the next reload."""
    with harpd:
        outcome = run(harpd, "--test")
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "config OK\n", "")


ADDRESSES = [
    (None, "127.0.0.1"),
    ("*", "127.0.0.1"),
    ("0.0.0.0", "127.0.0.1"),
    ("localhost", "localhost"),
    pytest.param("::", "::1", marks=pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")),
]


@pytest.mark.parametrize(("address", "host"), ADDRESSES)
def test_listening_addresses_follow_the_setting(harpd: Harpd, address: str | None, host: str) -> None:
    harpd.configure({"network": {"address": address}})
    outcome = run(harpd, "--test")
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "config OK\n", "")
    with harpd:
        context = ssl.create_default_context(cafile=str(harpd.ca_file))
        with socket.create_connection((host, harpd.port), DEADLINE) as plain:
            context.wrap_socket(plain, server_hostname="localhost").close()


@pytest.mark.parametrize("address", ["no-such-host.invalid", "a..b", "a b", ""])
def test_start_with_unknown_address_fails_as_test_does(harpd: Harpd, address: str) -> None:
    harpd.configure({"network": {"address": address}})
    tested, started = run(harpd, "--test"), run(harpd)
    assert (tested.returncode, tested.stdout) == (1, "")
    assert tested.stderr.startswith(f"harpd: {harpd.config_file}: network.address: cannot resolve {address!r}: ")
    assert (started.returncode, started.stdout) == (1, "")
    assert started.stderr.endswith(tested.stderr)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_listening_without_address_includes_ipv6(harpd: Harpd) -> None:
    harpd.configure({"network": {"address": None}})
    with harpd:
        context = ssl.create_default_context(cafile=str(harpd.ca_file))
        with socket.create_connection(("::1", harpd.port), DEADLINE) as plain:
            context.wrap_socket(plain, server_hostname="localhost").close()
