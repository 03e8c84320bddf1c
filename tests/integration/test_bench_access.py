"""The measurement of rules and audit: each of the three pairs of daemons has what it is measured with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import load
from bench.access import access

JOBS, TURNS = 60, 1


def test_bench_access_measures_rules_and_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load.SETTINGS, "directory", str(tmp_path))
    monkeypatch.setitem(load.SETTINGS, "pids", {})
    found = access(2, JOBS, TURNS)
    assert all(value > 0 for name, value in found.items() if " " not in name)
    assert {"plain", "rules", "audit", "audit-dispatcher"} <= found.keys()
    files = [file.relative_to(tmp_path).parts[1:] for file in tmp_path.glob("*/*/*.jsonl")]
    assert sorted(files) == [("audit", "dispatcher.jsonl"), ("audit", "harpd.jsonl")]
    for file in tmp_path.glob("*/*/*.jsonl"):
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        calls = [entry for entry in entries if entry["action"] == "call"]
        assert len(calls) >= JOBS * (TURNS + 1)
        if file.name == "dispatcher.jsonl":
            assert {entry["rule"] for entry in calls} == {6}
