"""Processes that look like those of a call: a forged cookie in a root service's process group, a reused session id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from support.deadline import wait_until
from support.state_entries import read_entries
from support.supervisor import DEADLINE, PLAIN, Supervisor, is_running

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root"),
]

ATTACKER = 54321
PROCEDURES = f"""
import os, signal, time
from harpd.proc import procedure

def resist(started):
    for number in (signal.SIGTERM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_IGN)
    open(started, "w").close()
    while True:
        time.sleep(600)

@procedure
def fork_session(started):  # only the new session's process ignores SIGTERM
    if os.fork() == 0:
        os.setsid()
        resist(started)
    time.sleep(600)

of_root = procedure(resist)
of_attacker = procedure(uid={ATTACKER})(resist)
"""
#: A service that root has started; its child has become the attacker, and forges the cookie in the environment that
#: it is executed with. The child ignores SIGTERM, so that a stop of the call comes to SIGKILL, and to process groups.
SERVICE = f"""
import os, signal, sys, time
if os.fork() == 0:
    os.setresgid({ATTACKER}, {ATTACKER}, {ATTACKER})
    os.setresuid({ATTACKER}, {ATTACKER}, {ATTACKER})
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.execve("/bin/sleep", ["sleep", "600"], {{"HARPD_CALL": sys.argv[1]}})
time.sleep(600)
"""


class Service(NamedTuple):
    """A service and the attacker's process in its process group."""

    main: psutil.Process
    attacker: psutil.Process


@contextmanager
def service(call_id: str) -> Iterator[Service]:
    """Run a service with a forged cookie of a call in its process group."""
    with subprocess.Popen([sys.executable, "-c", SERVICE, call_id], start_new_session=True) as process:
        try:
            main = psutil.Process(process.pid)
            wait_until(
                lambda: [child for child in main.children() if child.name() == "sleep"], DEADLINE, "the attacker"
            )
            (attacker,) = main.children()
            assert os.getpgid(attacker.pid) == process.pid
            yield Service(main, attacker)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory in which every user may create files."""
    with tempfile.TemporaryDirectory(prefix="harp-test-") as directory:
        os.chmod(directory, 0o777)
        yield Path(directory)


@pytest.mark.parametrize("how", ["cancel", "death of the supervisor"])
@pytest.mark.parametrize("procedure", ["of_root", "of_attacker"])
def test_service_with_forged_cookie_in_its_group_survives(
    tmp_path: Path, shared: Path, procedure: str, how: str
) -> None:
    call_id = str(uuid.uuid4())
    started = shared / "started"
    with Supervisor(tmp_path / "supervisor", PROCEDURES, kill_grace=0.3) as supervisor:
        with supervisor.call(procedure, [str(started)], call_id) as call:
            assert call.line() == PLAIN
            wait_until(started.exists, DEADLINE, "the procedure")
            with service(call_id) as found:
                if how == "cancel":
                    call.stop()
                else:
                    supervisor.kill()
                    supervisor.start()
                    wait_until(lambda: not read_entries(supervisor.runtime_directory), DEADLINE, "the clean-up")
                assert is_running(found.main)
                # It has claimed to be of the call. It may stop processes of its own user, and root's call is not of it.
                assert is_running(found.attacker) == (procedure == "of_root")


#: A service of another user, which becomes a daemon: its session has no leader any more.
DAEMON = f"""
import os, time
os.setsid()
if os.fork() == 0:
    os.setresuid({ATTACKER + 1}, {ATTACKER + 1}, {ATTACKER + 1})
    time.sleep(600)
"""


@contextmanager
def daemon_with_pid(pid: int) -> Iterator[psutil.Process]:
    """Run a daemon whose session has this id, which must be free; yield the process that stays."""
    for _ in range(1000):  # other processes start meanwhile
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        process = subprocess.Popen([sys.executable, "-c", DAEMON])
        assert process.wait() == 0
        (left,) = [one for one in psutil.process_iter() if is_of_session(one, process.pid)]
        try:
            if process.pid == pid:
                yield left
                return
        finally:
            left.kill()
    raise AssertionError(f"no process got pid {pid}")


def is_of_session(process: psutil.Process, session: int) -> bool:
    with suppress(ProcessLookupError):
        return os.getsid(process.pid) == session
    return False


@pytest.mark.skipif(not Path("/proc/sys/kernel/ns_last_pid").exists(), reason="the kernel lets nobody choose pids")
def test_service_whose_session_has_the_id_of_an_ended_call_survives(tmp_path: Path) -> None:
    """While a process that the call has left is being stopped, its main process's pid is given to a service."""
    started = tmp_path / "started"
    with Supervisor(tmp_path / "supervisor", PROCEDURES, kill_grace=2.0) as supervisor:
        with supervisor.call("fork_session", [str(started)]) as call:
            assert call.line() == PLAIN
            wait_until(started.exists, DEADLINE, "the other session")
            main = supervisor.wait_event("call started")["pid"]
            call.hang_up()
            wait_until(lambda: not psutil.pid_exists(main), DEADLINE, "the end of the main process")
            for _ in range(100):  # meanwhile, it scans all processes
                supervisor.status()
            with daemon_with_pid(main) as service:
                assert call.lines() == []
                assert supervisor.wait_event("call ended")["call"] == call.id
                assert is_running(service)
