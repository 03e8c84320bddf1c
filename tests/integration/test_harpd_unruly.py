"""An unruly procedures file, and a service that a procedure leaves running."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from harp_daemon.settings import ConfigError
from harpd.cli import parser
from harpd.config.loaded import CommandLine, check
from support.calls import error, nothing_is_left, printed, result
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd, is_dead
from support.procedures_file import PROCEDURES

UNRULY = """
import atexit, os, signal, sys, threading
from harpd.proc import procedure
atexit.register(os._exit, 7)
os.chdir("/")
os.umask(0o077)
os.environ["SET"] = "here"
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGXCPU):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU})
sys.argv[:] = ["other"]
sys.stdout.write("no line feed")
os.close(0)
threading.Thread(target=threading.Event().wait, args=(3600,)).start()

@procedure(timeout=0.2)
def slow():
    import time
    try:
        time.sleep(3600)
    finally:
        print("cleaned up")

@procedure
def setting():
    return [os.getcwd(), os.environ["SET"], os.read(0, 10).decode(), __name__]
"""


EMPTY_LINES = """
import os
from harpd.proc import procedure

@procedure
def print_empty_lines():
    for _ in range(64):
        os.write(1, b"\\n" * 4096)
        os.write(2, b"\\n" * 4096)
    os.write(1, b"text\\n\\n\\ntext\\n")
    return "printed"
"""


def test_empty_lines_do_not_multiply_into_the_log(tmp_path: Path) -> None:
    with Harpd(tmp_path, EMPTY_LINES) as harpd:
        assert result(harpd, "print_empty_lines") == "printed"
        call = harpd.last_call()
        wait_until(lambda: printed(harpd, call).count("text") == 2, DEADLINE, "the last line")
        assert sorted(printed(harpd, call)) == ["", "", "", "text", "text"]
        assert harpd.log_file.stat().st_size < 32 * 1024


def test_procedures_file_unruly_does_not_harm_harpd(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "with a space and \u00fc", UNRULY, {"limits": {"kill_grace": 1}})
    with harpd:
        assert harpd.wait_event("procedures file started threads")["threads"] == 1
        assert result(harpd, "setting")[:3] == ["/", "here", ""]
        setting = harpd.last_call()
        assert error(harpd, "slow")["type"] == "timeout"
        harpd.wait_event("call printed", procedure="slow", text="cleaned up")
        assert "no line feed" not in printed(harpd, setting)
        zygote = harpd.zygote
        assert harpd.reload()["event"] == "reloaded"
        wait_until(lambda: is_dead(zygote), DEADLINE, "the end of the zygote that has threads")
        nothing_is_left(harpd)


@pytest.mark.parametrize("text", ["", "import subprocess; subprocess.Popen(['sleep', '3600'])\n"])
def test_check_of_file_that_blocks_is_killed(tmp_path: Path, text: str) -> None:
    harpd = Harpd(tmp_path, text + "import threading; threading.Event().wait()\n")
    arguments = ("--test", "--config", str(harpd.config_file), "--procedures", str(harpd.procedures_file))
    options = CommandLine(**vars(parser().parse_args(arguments)))
    with pytest.raises(ConfigError, match=r"procedures\.py: loading it took longer than 1 s"):
        check(options, timeout=1)


def test_check_hints_at_service_without_output(tmp_path: Path) -> None:
    text = """from subprocess import Popen
import subprocess
@procedure
def start(arguments, log, **options):
    Popen(arguments)
    Popen(arguments, start_new_session=True, **options)
    Popen(arguments, start_new_session=True, stdout=log, stderr=log)
    subprocess.Popen(arguments, start_new_session=True)
"""
    harpd = Harpd(tmp_path, PROCEDURES + text)
    arguments = ("--test", "--config", str(harpd.config_file), "--procedures", str(harpd.procedures_file))
    (warning,) = check(CommandLine(**vars(parser().parse_args(arguments))))
    line = len(harpd.procedures_file.read_text().splitlines())
    assert f"procedures.py:{line}: Popen without stdout and stderr" in warning


def test_check_of_file_that_forks_returns(tmp_path: Path) -> None:
    """A process that the file has started, and that has the report's pipe open, is killed, too."""
    text = "import os, time\nif not os.fork():\n    time.sleep(3600)\n"
    harpd = Harpd(tmp_path, PROCEDURES + text)
    arguments = ("--test", "--config", str(harpd.config_file), "--procedures", str(harpd.procedures_file))
    assert check(CommandLine(**vars(parser().parse_args(arguments)))) == []


HALTING = """
import os, signal, time
from harpd.proc import procedure
@procedure
def signals_zygote(number):
    os.kill(os.getppid(), number)
    return "a result"
@procedure
def exits_halted(code):
    os.kill(os.getppid(), signal.SIGSTOP)
    os._exit(code)
@procedure
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.01)
    return "there"
"""


def test_zygote_halted_by_a_procedure_is_replaced(tmp_path: Path) -> None:
    """Ended calls are reported, and running calls continue."""
    with Harpd(tmp_path / "harpd", HALTING) as harpd:
        zygote = harpd.zygote
        with harpd.start_resumable("wait_for", str(tmp_path / "go")) as running:
            assert running.message()["stream_result"] is False
            with harpd.start_resumable("signals_zygote", signal.SIGSTOP) as client:
                *_, exit_info, end = [client.message() for _ in range(3)]
                assert (exit_info["exit_info"]["exit"], end) == (0, {"result": "a result"})
                client.send({"release": True})
            assert harpd.wait_event("zygote does not respond")["zygote"] == zygote
            (tmp_path / "go").touch()
            assert [running.message(), running.message()][1] == {"result": "there"}
            running.send({"release": True})
        wait_until(lambda: is_dead(zygote), DEADLINE, "the end of the halted zygote")
        wait_until(lambda: harpd.status()["zygote"] is not None, DEADLINE, "another zygote")
        assert error(harpd, "exits_halted", 3)["data"] == {"code": 3}
        wait_until(lambda: harpd.status()["zygote"] is not None, DEADLINE, "another zygote")
        killed = harpd.zygote
        last = harpd.call("signals_zygote", signal.SIGKILL)[-1]  # which is killed at once, or a moment later
        assert last == {"result": "a result"} or last["error"]["type"] == "call_died"
        wait_until(lambda: harpd.status()["zygote"] not in (None, killed), DEADLINE, "another zygote")
        nothing_is_left(harpd)


def test_service_left_running_continues_to_print(tmp_path: Path) -> None:
    procedures = """
import os, subprocess
from harpd.proc import procedure
@procedure
def start(script, pid):
    child = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    with open(pid, "w") as file:
        file.write(str(child.pid))
"""
    go, pid = tmp_path / "go", tmp_path / "pid"
    script = f"while [ ! -e {go} ]; do sleep 0.05; done; echo still here; echo and here >&2; echo $? > {go}"
    with Harpd(tmp_path / "harpd", procedures) as harpd:
        assert result(harpd, "start", script, str(pid)) is None
        call = harpd.last_call()
        wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the call's end")
        assert harpd.reload()["event"] == "reloaded"
        assert not is_dead(int(pid.read_text()))
        go.touch()
        wait_until(lambda: sorted(printed(harpd, call)) == ["and here", "still here"], DEADLINE, "what it prints")
        wait_until(lambda: go.read_text() == "0\n", DEADLINE, "the service's end")
        nothing_is_left(harpd)
