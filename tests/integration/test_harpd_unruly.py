"""An unruly procedures file, and a service that a procedure leaves running."""

from __future__ import annotations

from pathlib import Path

from support.calls import error, last_call, nothing_is_left, printed, result
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd, is_dead

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


def test_procedures_file_unruly_does_not_harm_harpd(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "with a space and \u00fc", UNRULY, {"limits": {"kill_grace": 1}})
    with harpd:
        assert harpd.wait_event("procedures file started threads")["threads"] == 1
        assert result(harpd, "setting")[:3] == ["/", "here", ""]
        assert error(harpd, "slow")["type"] == "timeout"
        harpd.wait_event("call printed", procedure="slow", text="cleaned up")
        assert "no line feed" not in printed(harpd, last_call(harpd, "setting"))
        zygote = harpd.zygote
        assert harpd.reload()["event"] == "reloaded"
        wait_until(lambda: is_dead(zygote), DEADLINE, "the end of the zygote that has threads")
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
        call = last_call(harpd, "start")
        wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the call's end")
        assert harpd.reload()["event"] == "reloaded"
        assert not is_dead(int(pid.read_text()))
        go.touch()
        wait_until(lambda: sorted(printed(harpd, call)) == ["and here", "still here"], DEADLINE, "what it prints")
        wait_until(lambda: go.read_text() == "0\n", DEADLINE, "the service's end")
        nothing_is_left(harpd)
