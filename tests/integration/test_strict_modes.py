"""Owners and modes of harpd's files: what another user could change prevents the start."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harp_daemon.file_modes import describe_reader, describe_writer
from support.daemonlog import DEADLINE
from support.harpd import Harpd
from support.procedures_file import PROCEDURES

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
OTHER = 64_322


def run(harpd: Harpd, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(harpd.command(*options), capture_output=True, text=True, timeout=DEADLINE, check=False)


@pytest.fixture
def harpd(tmp_path: Path) -> Harpd:
    directory = tmp_path / "harpd"
    users = tmp_path / "users"
    users.write_text("u:$5$saltsalt$0IyaXrmV7.sGNS6tirgqHLqX/G.FBvgkYA.lpPdS5sA\n")
    users.chmod(0o600)
    modules = tmp_path / "modules"
    modules.mkdir()
    authentication = {"module": "harpd.auth.passfile", "file": str(users)}
    return Harpd(directory, PROCEDURES, {"authentication": authentication, "python": {"path": [str(modules)]}})


def check_output(harpd: Harpd) -> str:
    """Return what `--test` prints; it must have the same outcome as a start."""
    outcome = run(harpd, "--test")
    if outcome.returncode == 0:
        assert outcome.stdout == "config OK\n"
    return outcome.stderr


NAMED: dict[str, Callable[[Harpd], Path]] = {
    "configuration": lambda harpd: harpd.config_file,
    "procedures": lambda harpd: harpd.procedures_file,
    "logging": lambda harpd: harpd.logging_file,
    "key": lambda harpd: harpd.keyfile,
    "users": lambda harpd: harpd.directory.parent / "users",
    "modules": lambda harpd: harpd.directory.parent / "modules",
    "directory": lambda harpd: harpd.directory,
}


@pytest.mark.parametrize("name", NAMED)
def test_file_that_others_can_write_prevents_the_start(harpd: Harpd, name: str) -> None:
    assert check_output(harpd) == ""
    path = NAMED[name](harpd)
    path.chmod(0o666 if path.is_file() else 0o777)
    expected = (
        f"harpd: {harpd.config_file}: strict_modes: {path}: other users can write to it; run: chmod go-w {path}\n"
    )
    assert check_output(harpd) == expected
    assert run(harpd).stderr == expected
    assert run(harpd, "supervisor").stderr == expected
    path.chmod(path.stat().st_mode & ~0o022)
    if path != harpd.directory:
        assert "every user can read it" in check_output(harpd) or name not in ("key", "users")


@pytest.mark.root
@as_root
@pytest.mark.parametrize("name", NAMED)
def test_file_of_another_user_prevents_the_start(harpd: Harpd, name: str) -> None:
    path = NAMED[name](harpd)
    os.chown(path, OTHER, -1)
    expected = f"{path}: owned by user {OTHER}, who can change it; change the owner to root"
    assert check_output(harpd) == f"harpd: {harpd.config_file}: strict_modes: {expected}\n"


@pytest.mark.root
@as_root
def test_group_that_can_write_prevents_the_start_of_root(harpd: Harpd) -> None:
    harpd.procedures_file.chmod(0o664)
    assert check_output(harpd) == ""  # the group of root
    os.chown(harpd.procedures_file, 0, OTHER)
    assert "other users can write to it" in check_output(harpd)


def test_key_that_all_can_read_fails_the_test_and_warns(harpd: Harpd) -> None:
    harpd.keyfile.chmod(0o644)
    hint = f"{harpd.keyfile}: every user can read it; run: chmod o-rwx {harpd.keyfile}"
    assert check_output(harpd) == f"harpd: {harpd.config_file}: strict_modes: {hint}\n"
    with harpd:
        harpd.wait_event("configuration has a mistake", problem=hint)
        harpd.keyfile.chmod(0o640)
        assert harpd.reload()["event"] == "reloaded"
        assert len(harpd.events("configuration has a mistake")) == 1
        harpd.procedures_file.chmod(0o666)
        assert "other users can write to it" in harpd.reload()["reason"]


def test_lax_modes_are_warnings_on_request(harpd: Harpd) -> None:
    harpd.configure({"strict_modes": False})
    for path in (harpd.keyfile, harpd.procedures_file):
        path.chmod(0o666)
    output = check_output(harpd)
    assert output.count("harpd: warning: ") == 3, output
    with harpd:
        assert harpd.call("version")[-1] == {"result": 1}
        harpd.wait_event("configuration has a mistake")


@pytest.fixture
def public() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="harp-test-") as directory:
        yield Path(directory)


def test_writers_are_found_through_links_and_above_missing_files(public: Path) -> None:
    (public / "a").mkdir()
    (public / "a" / "file").touch()
    (public / "link").symlink_to("a/file")
    assert describe_writer(public / "link") is None
    assert describe_writer(public / "missing" / "file") is None
    (public / "a").chmod(0o777)
    for path in (public / "link", public / "a" / "missing" / "file"):
        assert describe_writer(path) == f"{public}/a: other users can write to it; run: chmod go-w {public}/a"
    (public / "a").chmod(0o1777)
    assert describe_writer(public / "link") is None
    assert describe_reader(public / "missing") is None
