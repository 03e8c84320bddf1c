"""A listening address beyond loopback: the program names the lines that make it safe, and these lines work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.certificates import server_files
from support.harpcallerd import Harpcallerd

RULES = '[[rule]]\nwho = ["token:shop"]\nallow = ["call", "read"]\n'


@pytest.fixture
def dispatcher(tmp_path: Path) -> Harpcallerd:
    return Harpcallerd(tmp_path, settings={"listen": ["*:0", "127.0.0.1:0"]})


def shown_lines(output: str) -> list[str]:
    return re.findall(r"^    (\w+ = .*)$", output, re.MULTILINE)


def test_check_shows_the_lines_that_make_an_address_safe(dispatcher: Harpcallerd) -> None:
    check = ("--test", f"--config={dispatcher.config_file}")
    shown = dispatcher.control(*check)
    assert shown.returncode == 0
    assert "every client of *:0 may call every procedure" in shown.stderr
    lines = shown_lines(shown.stderr)
    assert [line.partition(" ")[0] for line in lines] == ["listen", "tls", "access_file"]
    server_files(dispatcher.directory)
    (dispatcher.directory / "access.toml").write_text(RULES)
    kept = [line for line in dispatcher.config_file.read_text().splitlines() if not line.startswith("listen")]
    dispatcher.config_file.write_text("\n".join([*kept, *lines]) + "\n")
    done = dispatcher.control(*check)
    assert (done.returncode, done.stdout) == (0, "config OK\n"), done.stderr
    assert "access_file" not in done.stderr
    assert not shown_lines(done.stderr)


def test_log_shows_the_lines_that_make_an_address_safe(dispatcher: Harpcallerd) -> None:
    with dispatcher:
        event = dispatcher.wait_event("clients need no rights; set access_file")
        assert event["listeners"] == ["*:0"]
        assert [line.partition(" ")[0] for line in event["lines"].split("; ")] == ["listen", "tls", "access_file"]


@pytest.mark.parametrize("listen", [["127.0.0.1:0"], ["[::1]:0"], ["localhost:0"]])
def test_local_addresses_need_no_lines(tmp_path: Path, listen: list[str]) -> None:
    dispatcher = Harpcallerd(tmp_path, settings={"listen": [*listen, f"unix:{tmp_path}/calls"]})
    done = dispatcher.control("--test", f"--config={dispatcher.config_file}")
    assert not shown_lines(done.stderr)


def test_check_refuses_files_that_others_can_read(tmp_path: Path) -> None:
    dispatcher = Harpcallerd(tmp_path, settings={"tokens_file": "tokens"})
    check = ("--test", f"--config={dispatcher.config_file}")
    files = server_files(tmp_path)
    with dispatcher.config_file.open("a") as file:
        file.write(f'tls = {{certfile = "{files.certfile}", keyfile = "{files.keyfile}"}}\n')
    dispatcher.hosts_file.chmod(0o600)
    (tmp_path / "tokens").touch(0o600)
    assert "every user" not in dispatcher.control(*check).stderr
    dispatcher.hosts_file.chmod(0o644)
    done = dispatcher.control(*check)
    assert done.returncode == 0
    assert "warning:" in done.stderr
    assert "hosts: every user can read it" in done.stderr
    files.keyfile.chmod(0o644)
    done = dispatcher.control(*check)
    assert done.returncode == 1
    assert "tls.keyfile" in done.stderr
    assert "every user can read it" in done.stderr
    files.keyfile.chmod(0o600)
    (tmp_path / "tokens").chmod(0o640)
    done = dispatcher.control(*check)
    assert done.returncode == 1
    assert "tokens_file" in done.stderr
    assert "expected mode 0600" in done.stderr
