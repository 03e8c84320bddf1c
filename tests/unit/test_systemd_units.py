"""The shipped units, as `systemd-analyze security` sees them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "examples" / "systemd"
MAX_EXPOSURE = 2.0


@pytest.mark.parametrize("name", ["harpd", "harpcallerd"])
def test_exposure_of_unit_is_low(name: str) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    command = ["systemd-analyze", "security", "--offline=true", str(UNITS / f"{name}.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd is older than version 250")
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= MAX_EXPOSURE, done.stdout


def test_supervisor_explains_its_exceptions() -> None:
    """It has no restriction, because procedures would have it, too; a comment has the reasons."""
    text = (UNITS / "harpd-supervisor.service").read_text()
    assert "# No restriction such as ProtectSystem= or CapabilityBoundingSet=: each one would hold for" in text
    assert not re.search(r"^(Protect|Private|Restrict|Capability|SystemCall)", text, re.MULTILINE)


def test_dispatcher_sees_the_users_of_unix_sockets() -> None:
    """In a user namespace, all users but root and its own would be nobody."""
    assert "PrivateUsers=yes" not in (UNITS / "harpcallerd.service").read_text().splitlines()


@pytest.mark.parametrize("name", ["harpd", "harpd-supervisor", "harpcallerd"])
def test_systemd_does_not_give_up(name: str) -> None:
    """Without this line it does so after five starts that fail within 10 seconds."""
    unit, _, _ = (UNITS / f"{name}.service").read_text().partition("[Service]")
    assert "\nStartLimitIntervalSec=0\n" in unit


def test_commands_stop_the_frontend_last() -> None:
    """`systemctl stop harpd harpd-supervisor` stops harpd at once, and no end of a call reaches its dispatcher."""
    root = UNITS.parents[1]
    pages = [root / "README.md", root / "src/harpd/cli.py", *(root / "docs").glob("*.md")]
    assert [page.name for page in pages if "stop harpd harpd-supervisor" in page.read_text()] == []
