"""Locks and links of other users: they stop no daemon. Each test plays such a user of the machine."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harp_daemon.process import ProcessError, pidfile
from harp_daemon.sockets import ListenError, listen_unix
from support.daemonlog import DEADLINE
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd
from support.other_user import without_rights
from support.procedures_file import PROCEDURES

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
OTHER = 64_322

#: Locks all that it can open, prints how many that were, and holds the locks until its stdin is closed.
LOCK = """
held = []
for found, directories, names in os.walk(sys.argv[1]):
    for name in (".", *names):
        try:
            held.append(os.open(os.path.join(found, name), os.O_RDONLY | os.O_NONBLOCK))
            fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
print(len(held), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can read; the parents of a test's directory are closed to them."""
    with tempfile.TemporaryDirectory(prefix="harp-test-") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@contextmanager
def locked_by_another_user(directory: Path) -> Iterator[int]:
    """Have another user lock what it can below a directory; yield how much it has opened."""
    command = without_rights(OTHER, LOCK, directory)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.root
@as_root
def test_locked_directory_delays_no_listener(public: Path) -> None:
    path = public / "socket"
    done = threading.Event()

    def listen_and_close() -> None:
        for _ in range(2):
            listener = listen_unix(path, 0o600)
            assert path.is_socket()
            listener.close()
        done.set()

    thread = threading.Thread(target=listen_and_close, daemon=True)
    with locked_by_another_user(public) as locked:
        assert locked == 1
        thread.start()
        listened = done.wait(DEADLINE / 2)
    thread.join(DEADLINE)
    assert listened
    assert list(public.iterdir()) == []


@pytest.mark.root
@as_root
def test_locked_files_stop_no_dispatcher(public: Path) -> None:
    """Its reload, its stop and its start do not wait for the locks."""
    dispatcher = Harpcallerd(public / "dispatcher", options=(f"--pidfile={public}/dispatcher/pid",))
    dispatcher.start()
    try:
        with locked_by_another_user(public) as locked:
            assert locked > 1
            assert dispatcher.control("reload").returncode == 0
            assert dispatcher.stop() == 0
            dispatcher.start()
            os.kill(dispatcher.pid, 9)
            dispatcher.stop()
    finally:
        dispatcher.stop()
    with locked_by_another_user(public), dispatcher:
        assert dispatcher.control("list").returncode == 0


@pytest.mark.root
@as_root
def test_locked_files_stop_no_harpd(public: Path) -> None:
    harpd = Harpd(public / "harpd", PROCEDURES, options=(f"--pidfile={public}/harpd/pid",))
    for path in (harpd.certfile, harpd.config_file, harpd.procedures_file, harpd.keyfile):
        path.chmod(0o644)  # the attacker can open all that is not the daemon's own
    with harpd, locked_by_another_user(public) as locked:
        assert locked > 4
        assert harpd.reload()["event"] == "reloaded"
        assert harpd.call("version")[-1] == {"result": 1}
        os.kill(harpd.pid, 9)
        harpd.kill()
        assert (public / "harpd" / "pid").exists()
        with locked_by_another_user(public):  # also what the dead process had locked
            harpd.start()
            assert harpd.call("version")[-1] == {"result": 1}
            assert harpd.stop() == 0
            harpd.start()


#: Prints each directory that it can list, and each file that it can read.
READ = """
for found, directories, names in os.walk(sys.argv[1]):
    print(found)
    for name in names:
        try:
            os.close(os.open(os.path.join(found, name), os.O_RDONLY | os.O_NONBLOCK))
            print(os.path.join(found, name))
        except OSError:
            pass
"""


@pytest.mark.root
@as_root
def test_directories_of_daemons_are_private_with_any_umask(public: Path) -> None:
    """Another user plants, locks and reads no file of harpd's runtime directory and of the dispatcher's store."""
    harpd = Harpd(public / "harpd", PROCEDURES)
    dispatcher = Harpcallerd(public / "dispatcher")
    umask = os.umask(0)
    try:
        with harpd, dispatcher:
            with harpd.start_resumable("echo", 1) as client:
                client.message()
            dispatcher.submit("nowhere", "p")
            for directory in (harpd.runtime_directory, dispatcher.store_directory):
                assert stat.S_IMODE(directory.stat().st_mode) == 0o700
                assert any(directory.iterdir())
                command = without_rights(OTHER, READ, directory)
                done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE)
                assert done.stdout == ""
    finally:
        os.umask(umask)


def test_daemons_follow_no_planted_link(tmp_path: Path) -> None:
    """As pid file of either daemon, and as runtime directory of harpd."""
    (tmp_path / "target").write_text("content")
    (tmp_path / "pid").symlink_to("target")
    (tmp_path / "directory").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to("directory")
    option = f"--pidfile={tmp_path}/pid"
    dispatcher = Harpcallerd(tmp_path / "dispatcher")
    harpd = Harpd(tmp_path / "harpd", PROCEDURES)
    linked = Harpd(tmp_path / "linked", PROCEDURES, {"runtime_directory": str(tmp_path / "run")})
    for command, reason in (
        (dispatcher.command("start", f"--config={dispatcher.config_file}", option), "symbolic link; remove it"),
        (harpd.command(option), "symbolic link; remove it"),
        (linked.command(), "a symbolic link; name the directory itself"),
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert done.returncode == 1, done.stderr
        assert reason in done.stderr
    assert (tmp_path / "target").read_text() == "content"
    assert list((tmp_path / "directory").iterdir()) == []


@pytest.mark.root
@as_root
def test_pid_file_of_killed_process_cannot_be_locked(public: Path) -> None:
    file = public / "pid"
    child = os.fork()
    if not child:
        try:
            with pidfile(file):
                os._exit(0)  # as if it had been killed
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with locked_by_another_user(public), pidfile(file):
        assert file.read_text() == f"{os.getpid()}\n"
    file.write_text("1\n")  # of an earlier version
    file.chmod(0o644)
    with pidfile(file), locked_by_another_user(public) as opened:
        assert opened == 1  # the directory
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_pid_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("content")
    (tmp_path / "pid").symlink_to("target")
    with pytest.raises(ProcessError, match="pid: it is a symbolic link; remove it"), pidfile(tmp_path / "pid"):
        pytest.fail("the pid file is a link")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ProcessError, match="fifo: not a file of this user; remove it"), pidfile(tmp_path / "fifo"):
        pytest.fail("the pid file is a pipe")
    assert (tmp_path / "target").read_text() == "content"


def test_planted_lock_of_socket_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("content")
    (tmp_path / ".socket.lock").symlink_to("target")
    with pytest.raises(ListenError, match="Too many levels of symbolic links"):
        listen_unix(tmp_path / "socket", 0o600)
    (tmp_path / ".socket.lock").unlink()
    (tmp_path / ".socket.lock").touch(0o644)
    with pytest.raises(ListenError, match="not a private file of this user; remove it"):
        listen_unix(tmp_path / "socket", 0o600)
    (tmp_path / "socket").symlink_to("target")
    (tmp_path / ".socket.lock").unlink()
    with pytest.raises(ListenError, match="Address already in use"):
        listen_unix(tmp_path / "socket", 0o600)
    assert (tmp_path / "target").read_text() == "content"
