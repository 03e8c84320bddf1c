"""The surroundings of calls: environment, umask, working directory and OOM score are not those of harpd."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.calls import result
from support.harpd import Harpd
from support.leftovers import COOKIE_VARIABLE

PROCEDURES = """
import os, subprocess
from harpd.proc import procedure

AT_LOAD = dict(os.environ)

def umask():
    found = os.umask(0)
    os.umask(found)
    return found

def see():
    executed = subprocess.run(["env", "-0"], capture_output=True, text=True, check=True).stdout[:-1].split("\\0")
    return {
        "here": dict(os.environ), "at load": AT_LOAD, "executed": dict(item.split("=", 1) for item in executed),
        "proc": open("/proc/self/environ").read(), **others(),
    }

def others():
    return {"umask": umask(), "cwd": os.getcwd(), "oom": int(open("/proc/self/oom_score_adj").read())}

@procedure
def own():
    return see()
"""
AS_NOBODY = """
@procedure(uid="nobody")
def nobody():
    return {"here": dict(os.environ), **others()}

@procedure(uid=54321)
def number():
    return dict(os.environ)
"""
#: What calls must not see: a secret, and what changes the programs that they execute.
SECRETS = {
    "CLOUD_SECRET_KEY": "of harpd alone",
    "LD_LIBRARY_PATH": "/nonexistent/of-harpd",
    "BASH_ENV": "/nonexistent/of-harpd",
    "HARPD_SOMETHING": "of harpd alone",
}
OF_CALLS = {"PATH", "LANG", "HOME", "USER", "LOGNAME", "SHELL", COOKIE_VARIABLE}
OF_HARPD = {"HARPD_CALL", "HARPD_PROCEDURES"}


@pytest.fixture
def unclean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Surroundings of a harpd that calls should not have."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("unclean")
def test_call_has_clean_surroundings(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES) as harpd:
        found = result(harpd, "own")
    entry = pwd.getpwuid(os.geteuid())
    for where in ("here", "executed"):
        environment = found[where]
        assert environment.keys() - {"_"} == OF_CALLS | OF_HARPD, where
        assert environment["HOME"] == entry.pw_dir
        assert environment["USER"] == environment["LOGNAME"] == entry.pw_name
        assert environment["SHELL"] == entry.pw_shell
        assert environment["PATH"] == os.environ["PATH"]
    assert found["at load"].keys() == OF_CALLS | {"HARPD_PROCEDURES"}
    assert not [value for value in SECRETS.values() if value in found["proc"]]
    assert (found["umask"], found["cwd"]) == (0o022, "/")


@pytest.mark.usefixtures("unclean")
def test_configured_variables_reach_calls(tmp_path: Path) -> None:
    environment = {"SITE": "blog", "PATH": "/opt/site/bin:/usr/bin:/bin", "CLOUD_SECRET_KEY": None, "NOT_SET": None}
    with Harpd(tmp_path / "harpd", PROCEDURES, {"environment": environment}) as harpd:
        for where in ("here", "at load", "executed"):
            found = result(harpd, "own")[where]
            assert (found["SITE"], found["PATH"]) == ("blog", environment["PATH"])
            assert found["CLOUD_SECRET_KEY"] == SECRETS["CLOUD_SECRET_KEY"]
            assert "NOT_SET" not in found
            assert "BASH_ENV" not in found


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_call_of_other_user_has_its_variables_and_oom_score(tmp_path: Path) -> None:
    score = Path("/proc/self/oom_score_adj")
    before = score.read_text()
    harpd = Harpd(tmp_path / "harpd", PROCEDURES + AS_NOBODY)
    score.write_text("300")
    try:
        harpd.start()
    finally:
        score.write_text(before)
    with_entry: dict[str, Any] = result(harpd, "nobody")
    without = result(harpd, "number")
    own = result(harpd, "own")
    assert harpd.stop() == 0
    entry = pwd.getpwnam("nobody")
    expected = {"HOME": entry.pw_dir, "USER": "nobody", "LOGNAME": "nobody", "SHELL": entry.pw_shell}
    assert {name: with_entry["here"].get(name) for name in expected} == expected
    assert (with_entry["umask"], with_entry["cwd"], with_entry["oom"], own["oom"]) == (0o022, "/", 0, 0)
    assert {name: without.get(name) for name in expected} == dict.fromkeys(expected) | {"HOME": "/", "SHELL": "/bin/sh"}


SIGNALS = """
import signal
from harpd.proc import procedure

@procedure
def signals():
    ignored = [number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN]
    return sorted(ignored), sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


@contextmanager
def parent_of_odd_signals() -> Iterator[None]:
    """Block all signals, and ignore some: a program that starts a daemon passes this on."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    numbers = (signal.SIGCHLD, signal.SIGQUIT, signal.SIGUSR1, signal.SIGALRM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@pytest.mark.parametrize("services", [False, True])
def test_signals_of_the_parent_have_no_effect(tmp_path: Path, services: bool) -> None:
    harpd = Harpd(tmp_path / "harpd", SIGNALS, services=services)
    with parent_of_odd_signals():
        found = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
        assert (found.stdout, found.stderr) == ("config OK\n", "")
        harpd.start()
    try:
        assert result(harpd, "signals") == [[signal.SIGPIPE, signal.SIGXFSZ], []]  # as Python has them
        assert harpd.reload()["event"] == "reloaded"
    finally:
        assert harpd.stop() == 0


@pytest.mark.parametrize("name", ["HARPD_CALL", "A=B", ""])
def test_invalid_variable_is_error(tmp_path: Path, name: str) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES, {"environment": {name: "x"}})
    found = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert f"environment.{name}: expected the name of a variable" in found.stderr


def test_invalid_value_of_variable_is_error(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES, {"environment": {"NAME": "a\0b"}})
    found = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
    assert (found.returncode, "environment.NAME: expected a text" in found.stderr) == (1, True), found.stderr


def test_check_loads_file_in_the_surroundings_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEEDED", "yes")
    procedures = 'import os\nassert os.getcwd() == "/", os.getcwd()\nos.environ["NEEDED"]\n' + PROCEDURES
    harpd = Harpd(tmp_path / "harpd", procedures)
    found = subprocess.run(harpd.command("--test"), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (found.returncode, "KeyError: 'NEEDED'" in found.stderr) == (1, True), found.stderr
    harpd.configure({"environment": {"NEEDED": None}})
    assert subprocess.run(harpd.command("--test"), capture_output=True, cwd=tmp_path, check=False).returncode == 0


def test_check_finds_modes_of_files_with_relative_paths(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES)
    key = harpd.keyfile.relative_to(harpd.directory)
    harpd.configure({"network": {"keyfile": str(key)}})
    harpd.keyfile.chmod(0o644)
    found = subprocess.run(harpd.command("--test"), capture_output=True, text=True, cwd=harpd.directory, check=False)
    assert (found.returncode, str(key) in found.stderr, "strict_modes" in found.stderr) == (1, True, True), found.stderr


def test_relative_python_path_begins_at_start_of_harpd(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", "import site_module\n" + PROCEDURES, {"python": {"path": "library"}})
    (harpd.directory / "library").mkdir()
    (harpd.directory / "library" / "site_module.py").touch()
    with harpd:
        assert result(harpd, "own")["cwd"] == "/"
