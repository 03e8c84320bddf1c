"""The proof is part of every test run: a minute of it holds, and each sabotage is caught."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.schedule import schedule

TESTS = Path(__file__).parents[1]
HOSTS = ("web1", "web2", "web3")


def chaos(*options: str) -> tuple[int, str]:
    """Run `./dev chaos`; return its exit status and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "chaos", *options],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGTERM)  # so that it ends what it has started
        process.communicate()
        raise
    return process.returncode, printed


@pytest.mark.timeout(600)
def test_chaos_one_minute_of_faults_breaks_no_guarantee(tmp_path: Path) -> None:
    status, printed = chaos("--minutes", "1", "--seed", "20260", "--keep-logs", str(tmp_path / "run"))
    assert status == 0, printed
    assert "broken promises: 0" in printed


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("sabotage", "promise"),
    [("drop-record", "4. a stream has"), ("start-twice", "5. a call starts"), ("leak-slot", "7. a limit holds")],
)
def test_chaos_sabotage_is_detected(tmp_path: Path, sabotage: str, promise: str) -> None:
    options = ("--minutes", "0.15", "--seed", "3", "--keep-logs", str(tmp_path / "run"))
    status, printed = chaos("--sabotage", sabotage, *options)
    assert status == 1, printed
    assert promise in printed, printed


def test_chaos_schedule_same_seed_gives_same_schedule() -> None:
    assert schedule(7, 600, HOSTS) == schedule(7, 600, HOSTS)
    assert schedule(7, 600, HOSTS) != schedule(8, 600, HOSTS)


@pytest.mark.parametrize("seed", range(10))
def test_chaos_schedule_of_ten_minutes_has_200_faults(seed: int) -> None:
    assert len(schedule(seed, 600, HOSTS)) >= 250
