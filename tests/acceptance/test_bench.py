"""`./dev bench` at a small scale, HARP and the floors alone: each part is measured, and the files are written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench.contenders import CONTENDERS
from bench.goals import GOALS
from bench.workloads import PARTS

ROOT = Path(__file__).parents[2]


def bench(*options: str) -> str:
    """Run `./dev bench`; return its output."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "bench", *options],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGTERM)  # so that it ends its processes
        process.communicate()
        raise
    assert process.returncode == 0, printed
    return printed


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", PARTS)
def test_bench_measures_harp_in_each_row(part: str, tmp_path: Path) -> None:
    work, output = tmp_path / "work", tmp_path / "results.json"
    work.mkdir()
    workloads = {workload.key for workload in PARTS[part].workloads}
    floors = {one.name for one in CONTENDERS if one.name.startswith("F") and workloads & one.functions.keys()}
    options = ("--scale=0.001", "--runs=1", f"--directory={work}", f"--output={output}")
    printed = bench(part, "--only=HARP", "--only=F", *options)
    assert "peers' environment" not in printed, "it is for peers only"
    rows = json.loads(output.read_text())["rows"]
    measured = {row["row"]: row["median"] for row in rows if row["contender"] == "HARP"}
    assert measured.keys() == {row.key for row in PARTS[part].rows}, printed
    assert all(value >= 0 for key, value in measured.items() if "growth" not in key)
    assert {row["contender"] for row in rows} == {"HARP", *floors}
    assert ElementTree.fromstring(output.with_suffix(".svg").read_text()).tag.endswith("svg")
    assert not any(work.iterdir())


@pytest.mark.timeout(300)
def test_quick_bench_repeats_rounds_and_shows_goals(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    options = ("--scale=0.001", "--runs=2", f"--directory={tmp_path}", f"--output={output}")
    printed = bench("stream", "--quick", "--only=HARP", *options)
    found = {goal["row"]: goal for goal in json.loads(output.read_text())["goals"]}
    assert found.keys() == {row.key for row in PARTS["stream"].rows} & {goal.row for goal in GOALS}
    assert found["long-stream"]["runs"] == 2, printed
    assert f"of {len(found)}; short in" in printed
