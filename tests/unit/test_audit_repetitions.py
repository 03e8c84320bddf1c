"""Entries that anybody can cause are counted, and nothing of them is lost or attributed wrongly."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from harp_daemon.audit import AuditLog

PEERS, MORE = 1000, 25  # as many peers as have entries of their own; and denials of others


def record_and_close(path: Path, denials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of denials, the shared ones too."""

    async def run() -> None:
        log = AuditLog(path)
        for fields in denials:
            log.record(fields["action"], "denied", repeats=fields["peer"], peer=fields["peer"], job=fields["job"])
        await log.close()

    asyncio.run(run())
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry for entry in entries if entry.get("decision") == "denied"]


def test_audit_counts_denials_of_more_peers_than_it_distinguishes(tmp_path: Path) -> None:
    first = [{"action": "read", "peer": f"first-{number}", "job": "a"} for number in range(PEERS)]
    others = [
        {"action": action, "peer": f"other-{number}", "job": "a"}
        for action in ("read", "call")
        for number in range(MORE)
    ]
    entries = record_and_close(tmp_path / "audit.jsonl", [*first, *others])
    for action, number in (("read", PEERS + MORE), ("call", MORE)):
        counts = [entry.get("count", 1) for entry in entries if entry["action"] == action]
        assert sum(counts) == number
    assert {entry["peer"] for entry in entries if "count" in entry} == {"others"}


def test_audit_shared_entry_names_only_what_its_denials_have_in_common(tmp_path: Path) -> None:
    jobs = ["harmless"] * 11 + ["secret"] * 3
    denials = [{"action": "read", "peer": "attacker", "job": job} for job in jobs]
    [shared] = [entry for entry in record_and_close(tmp_path / "audit.jsonl", denials) if "count" in entry]
    assert (shared["count"], shared["peer"], "job" in shared) == (4, "attacker", False)
