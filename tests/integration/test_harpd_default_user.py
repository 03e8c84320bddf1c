"""The user of procedures without `uid`: a harpd that runs as root has to be told."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.calls import result
from support.harpd import Harpd

PROCEDURES = """
import os
from harpd.proc import procedure

@procedure
def user():
    return os.getresuid()

@procedure(uid="daemon")
def other():
    return os.getresuid()
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
pytestmark = pytest.mark.root


def check(harpd: Harpd, *options: str) -> tuple[int, str]:
    done = subprocess.run(harpd.command("--test", *options), capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def write(harpd: Harpd, **changes: Any) -> None:
    """Write a configuration without `default_user`: that of a legacy harpd, with these changes."""
    network = {"certfile": str(harpd.certfile), "keyfile": str(harpd.keyfile), "address": "127.0.0.1", "port": 4306}
    users = {"module": "harpd.auth.inconfig", "users": {"tester": "plain:secret"}}
    harpd.config_file.write_text(yaml.safe_dump({"network": network, "authentication": users, **changes}))


@needs_root
def test_root_without_default_user_is_error(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES)
    write(harpd, runtime_directory=str(tmp_path / "run"))
    done = subprocess.run(harpd.command(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert f"{harpd.config_file}: default_user: missing" in done.stderr
    assert "'default_user: nobody'" in done.stderr
    assert "'default_user: root'" in done.stderr
    for option in ("root", "nobody", "0"):
        assert check(harpd, "--default-user", option)[0] == 0
    for changes in ({"default_user": "root"}, {"default_user": "nobody"}, {"default_user": 0}):
        write(harpd, runtime_directory=str(tmp_path / "run"), **changes)
        status, printed = check(harpd)
        assert (status, "default_user" in printed) == (0, False), printed


@needs_root
def test_legacy_file_without_default_user_is_warning(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES)
    for changes in ({}, {"python": {"path": "/nowhere"}}):
        write(harpd, **changes)
        status, printed = check(harpd)
        assert (status, "warning" in printed, "default_user: missing" in printed) == (0, True, True)


@needs_root
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_default_user_of_configuration_applies(tmp_path: Path, user: str) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES, {"default_user": user}) as harpd:
        assert result(harpd, "user") == [pwd.getpwnam(user).pw_uid] * 3
        assert result(harpd, "other") == [pwd.getpwnam("daemon").pw_uid] * 3
        assert not harpd.events("procedures without uid run as root")
        harpd.configure({"default_user": "daemon"})
        assert harpd.reload()["event"] == "reloaded"
        assert result(harpd, "user") == [pwd.getpwnam("daemon").pw_uid] * 3


def test_harpd_without_root_may_name_its_own_user(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES, {"default_user": os.geteuid()})
    with harpd:
        assert result(harpd, "user") == [os.geteuid()] * 3
