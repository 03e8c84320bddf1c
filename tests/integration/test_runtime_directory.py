"""harpd's runtime directory: the default one, and one that is cleaned while harpd runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harpd.supervisor.runtime_directory import default_runtime_directory
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd
from support.procedures_file import PROCEDURES


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
            assert any("result" in line for line in again.lines())


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
            assert again.lines()[-1]["error"]["type"] == "call_died"


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
