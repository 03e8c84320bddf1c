"""harpd's runtime directory: its default, and a clean-up of it while harpd runs."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from harpd.supervisor.event_loop import EventLoop
from harpd.supervisor.listener import Listener
from harpd.supervisor.runtime_directory import (
    FRONTEND_DIRECTORY,
    default_runtime_directory,
    identify,
    open_runtime_directory,
)
from harpd.supervisor.state_files import StateFiles
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd, is_dead
from support.procedures_file import CHANGED, PROCEDURES


@pytest.mark.parametrize(
    ("environment", "user", "expected"),
    [
        ({"RUNTIME_DIRECTORY": "/run/a:/run/b", "XDG_RUNTIME_DIR": "/run/user/5"}, 0, "/run/a"),
        ({"XDG_RUNTIME_DIR": "/run/user/5"}, 0, "/run/harpd"),
        ({"XDG_RUNTIME_DIR": "/run/user/5"}, 5, "/run/user/5/harpd"),
        ({}, 0, "/run/harpd"),
        ({}, 5, None),
    ],
)
def test_default_runtime_directory_is_not_cleaned(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], user: int, expected: str | None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_runtime_directory() == (None if expected is None else Path(expected))


def test_link_as_runtime_directory_is_refused(tmp_path: Path) -> None:
    """It could refer to another directory later, with state files that name processes to kill."""
    (tmp_path / "own").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to("own")
    os.close(open_runtime_directory(tmp_path / "own"))
    with pytest.raises(PermissionError, match="a symbolic link; name the directory itself"):
        open_runtime_directory(link)
    link.unlink()
    link.write_text("")
    with pytest.raises(FileExistsError):
        open_runtime_directory(link)


def remove_directory(directory: Path) -> None:
    shutil.rmtree(directory)


def remove_files(directory: Path) -> None:
    for path in [*directory.rglob("*")]:
        if not path.is_dir():
            path.unlink()


def remove_active_socket(directory: Path) -> None:
    (directory / "supervisor").unlink()


@pytest.mark.parametrize("services", [False, True])
@pytest.mark.parametrize("clean", [remove_directory, remove_files, remove_active_socket])
def test_cleaned_runtime_directory_costs_no_call(tmp_path: Path, clean: Callable[[Path], None], services: bool) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES, services=services) as harpd:
        assert harpd.call("echo", 1)[-1] == {"result": [1]}
        with harpd.start_resumable("wait_for", str(tmp_path / "go")) as running:
            running.line()
            clean(harpd.runtime_directory)
            assert harpd.call("echo", 2)[-1] == {"result": [2]}  # the frontend waits for the sockets
            assert harpd.wait_event("runtime directory was cleaned; files created again", level="warning")
            call = running.call
        status = subprocess.run(harpd.command("status"), capture_output=True, text=True, check=False)
        assert status.returncode == 0, status.stderr
        assert call in harpd.list_calls()["calls"]
        (tmp_path / "go").touch()
        with harpd.attach(call) as again:
            assert again.closing_line() == {"result": "there"}


@pytest.mark.parametrize("clean", [remove_directory, remove_active_socket])
def test_retired_supervisor_does_not_take_the_new_calls(tmp_path: Path, clean: Callable[[Path], None]) -> None:
    """It creates its own socket again, but not that of new calls, which it would reject until its last call ends."""
    with Harpd(tmp_path / "harpd", PROCEDURES, services=True) as harpd:
        with harpd.start_resumable("wait_for", str(tmp_path / "go")) as running:
            running.line()
            call, retired = running.call, harpd.supervisor
            harpd.reload(launcher=True)
            assert harpd.supervisor != retired
            for _ in range(3):
                clean(harpd.runtime_directory)
                time.sleep(1.2)  # until both supervisors have looked at their files; in any order
                wait_until((harpd.runtime_directory / "supervisor").exists, DEADLINE, "the socket")
                assert harpd.supervisor != retired
            assert harpd.call("echo", 1)[-1] == {"result": [1]}
        (tmp_path / "go").touch()
        with harpd.attach(call) as again:
            assert again.closing_line() == {"result": "there"}


@contextmanager
def halted(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def changing(directory: Path) -> Iterator[None]:
    """Change the directory of a frontend's sockets all the time, as supervisors do that create theirs one by one."""
    ended = threading.Event()

    def change() -> None:
        while not ended.wait(0.1):
            for above in (directory, directory / FRONTEND_DIRECTORY):
                if above.is_dir():
                    (above / "changed").touch()
                    (above / "changed").unlink()

    with ThreadPoolExecutor(1) as threads:
        changes = threads.submit(change)
        try:
            yield
        finally:
            ended.set()
            changes.result(DEADLINE)


def test_call_of_a_supervisor_without_socket_is_not_denied(tmp_path: Path) -> None:
    """A retired supervisor creates its socket later than the active one; nobody hears before that its call is unknown.

    It is halted, so that it is late.
    """
    with Harpd(tmp_path / "harpd", PROCEDURES, services=True) as harpd:
        with harpd.start_resumable("wait_for", str(tmp_path / "go")) as running:
            running.line()
            call, retired = running.call, harpd.supervisor
            harpd.reload(launcher=True)
        harpd.stop_frontend()  # it has a link to the retired supervisor
        with changing(harpd.runtime_directory):
            with halted(retired):
                remove_files(harpd.runtime_directory)
                wait_until((harpd.runtime_directory / "supervisor").exists, DEADLINE, "the socket")
                harpd.start_frontend()
                client = harpd.attach(call)
                harpd.wait_event("attach accepted", call=call)
        with client:
            assert "error" not in client.message()
        (tmp_path / "go").touch()
        with harpd.attach(call) as again:
            assert again.closing_line() == {"result": "there"}


def test_supervisor_that_a_reload_did_not_find_retires(tmp_path: Path) -> None:
    """Its socket had been removed, and it had not yet created it again. Otherwise it would take the new calls back."""
    with Harpd(tmp_path / "harpd", PROCEDURES, services=True) as harpd:
        with harpd.start_resumable("wait_for", str(tmp_path / "go")) as running:
            running.line()
            call, old = running.call, harpd.supervisor
            with halted(old):
                remove_files(harpd.runtime_directory)
                harpd.reload(launcher=True)
                new = harpd.supervisor
            harpd.wait_event("supervisor retires", calls=1)
            assert harpd.supervisor == new != old
            assert harpd.call("echo", 1)[-1] == {"result": [1]}
        (tmp_path / "go").touch()
        with harpd.attach(call) as again:
            assert again.closing_line() == {"result": "there"}
        wait_until(lambda: is_dead(old), DEADLINE, "the end of the old supervisor")


def test_supervisor_whose_socket_is_removed_while_it_loads_becomes_active(tmp_path: Path) -> None:
    """Otherwise it would become active a second later, unknown to its launcher, which kills it with its calls."""
    loading, go = tmp_path / "loading", tmp_path / "go"
    wait = f"""
import pathlib, time
pathlib.Path({str(loading)!r}).touch()
while not pathlib.Path({str(go)!r}).exists():
    time.sleep(0.01)
"""
    with Harpd(tmp_path / "harpd", PROCEDURES, services=True) as harpd, ThreadPoolExecutor(1) as threads:
        old = harpd.supervisor
        harpd.procedures_file.write_text(CHANGED + wait)
        reload = threads.submit(harpd.reload, launcher=True)
        wait_until(loading.exists, DEADLINE, "the load")
        with halted(old):
            remove_files(harpd.runtime_directory)
            go.touch()
            assert reload.result(DEADLINE)["event"] == "reloaded"
        assert harpd.supervisor != old
        assert harpd.call("version")[-1] == {"result": 2}


def test_socket_with_the_inode_of_a_removed_one_is_another(tmp_path: Path) -> None:
    """A file system gives the inode of a removed socket to the next one, perhaps of another supervisor."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        found = set()
        for _ in range(5):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(f"/proc/self/fd/{descriptor}/supervisor")
                found.add(identify("supervisor", descriptor))
                os.chmod("supervisor", 0o600, dir_fd=descriptor)
                os.link("supervisor", "other", src_dir_fd=descriptor, dst_dir_fd=descriptor)
                found.add(identify("other", descriptor))
                time.sleep(0.02)  # the clock of a file system has steps of at most 10 ms
            os.unlink("supervisor", dir_fd=descriptor)
            os.unlink("other", dir_fd=descriptor)
        assert len(found) == 5
        assert identify("supervisor", descriptor) is None
    finally:
        os.close(descriptor)


def test_restore_that_fails_is_repeated(tmp_path: Path) -> None:
    """A failed attempt, for want of a descriptor or of space, neither ends the listener nor leaves descriptors open."""
    loop = EventLoop()
    listener = Listener(loop, str(tmp_path), "one", lambda *_: None)
    (tmp_path / "calls").mkdir()
    files = StateFiles(tmp_path, "one")
    try:
        files.reserve(str(uuid.uuid4()))
        remove_files(tmp_path)
        before = len(os.listdir("/proc/self/fd"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with ExitStack() as taken:
            taken.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
            while (descriptor := _free_descriptor()) is not None:
                taken.callback(os.close, descriptor)
            for restore in (listener.restore, files.restore) * 2:
                with pytest.raises(OSError, match="Too many open files"):
                    restore()
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        try:
            for _ in range(3):
                with pytest.raises(OSError, match="File too large"):
                    files.restore()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert len(os.listdir("/proc/self/fd")) == before
        assert listener.restore()
        assert files.restore()
        assert not listener.restore()
        assert sorted(path.name for path in tmp_path.rglob("*one*")) == ["one.1", "supervisor-one"]
    finally:
        listener.close()
        files.close()


def _free_descriptor() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return None


def test_state_file_of_a_cleaned_directory_has_the_calls(tmp_path: Path) -> None:
    """A later supervisor kills the processes of the calls, although the file was removed while they ran."""
    with Harpd(tmp_path / "harpd", PROCEDURES) as harpd:
        with harpd.start_resumable("wait_for", str(tmp_path / "never")) as running:
            running.line()
            call = running.call
        supervisor = harpd.supervisor
        shutil.rmtree(harpd.runtime_directory)
        harpd.wait_event("runtime directory was cleaned; files created again")
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: any(harpd.statuses()), DEADLINE, "the next supervisor")
        with harpd.attach(call) as again:
            assert again.closing_line()["error"]["type"] == "call_died"


@pytest.mark.skipif(not shutil.which("systemd-tmpfiles"), reason="systemd-tmpfiles is not installed")
def test_systemd_tmpfiles_spares_the_runtime_directory(tmp_path: Path) -> None:
    rules, cleaned = tmp_path / "rules.conf", tmp_path / "cleaned"
    rules.write_text(f"d {cleaned} - - - 1s\n")
    harpd = Harpd(tmp_path / "harpd", PROCEDURES)
    harpd.runtime_directory = cleaned / "run"
    harpd.configure({})
    with harpd:
        old = cleaned / "old"
        old.touch()
        time.sleep(1.5)  # until the files are old
        command = ["systemd-tmpfiles", "--clean", str(rules)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not old.exists(), done
        assert harpd.call("echo", 1)[-1] == {"result": [1]}
        assert not harpd.events("runtime directory was cleaned; files created again")


def test_call_without_supervisor_gets_a_true_message(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES, services=True) as harpd:
        harpd.stop_launcher()
        error = harpd.call("echo", 1)[-1]["error"]
        assert error["type"] == "procedure_loading_error"
        assert error["message"] == "no supervisor has accepted the call within 5 s; the log of harpd shows why"
