"""The pid file of a daemon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harp_daemon.process import ProcessError, pidfile


def test_pidfile_of_dead_process_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "daemon.pid"
    file.write_text("99999999999\nmore\n")
    with pidfile(file):
        assert file.read_text() == f"{os.getpid()}\n"
    assert not file.exists()


def test_pidfile_of_running_process_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "daemon.pid"
    with pidfile(file):
        with pytest.raises(ProcessError, match=f"held by the running process {os.getpid()}"), pidfile(file):
            pytest.fail("two processes have the pid file")
        assert file.read_text() == f"{os.getpid()}\n"
