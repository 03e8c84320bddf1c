"""The file of a run: what was measured, on what machine, with what versions; and reading it again."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.contenders import OURS
from bench.figures import Results
from bench.works import Part, Sizes

__all__ = ["document", "machine", "versions"]

#: How often the disk is asked how long a sync takes.
_SYNCS = 50

#: Packages of the peers whose versions are told.
_PEERS = ("celery", "dramatiq", "grpcio", "huey", "procrastinate", "redis", "rpyc", "rq")


def machine(directory: Path) -> dict[str, Any]:
    """What this machine is, as far as figures depend on it.

    Args:
        directory: where the stores will lie: its disk is measured.
    """
    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    processor = next(
        (value.strip() for name, value in facts.items() if name.strip() == "model name"), platform.machine()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor,
        "memory_gb": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "sync_ms": round(_sync_time(directory), 3),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _sync_time(directory: Path) -> float:
    """Milliseconds that writing and syncing a page takes, the median."""
    took = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(_SYNCS):
            file.write(bytes(4096))
            file.flush()
            began = time.monotonic()
            os.fdatasync(file.fileno())
            took.append(1000 * (time.monotonic() - began))
    return statistics.median(took)


def versions(peers: Path | None) -> dict[str, str]:
    """Versions of the peers, by package; servers are told by what they print."""
    found: dict[str, str] = {}
    if peers is not None:
        program = (
            "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        )
        done = subprocess.run([str(peers), "-c", program, *_PEERS], stdout=subprocess.PIPE, check=False)
        if done.returncode == 0:
            found.update(json.loads(done.stdout))
    for command in (["redis-server", "--version"], ["postgres", "--version"], ["ssh", "-V"]):
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        except OSError:
            continue
        found[command[0]] = done.stdout.decode("utf-8", "replace").strip()
    return found


def document(
    parts: Sequence[Part],
    results: Results,
    durability: Mapping[str, Mapping[str, str]],
    sizes: Sizes,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything of a run, for a JSON file.

    Args:
        parts: what was measured.
        results: the figures.
        durability: by part and contender, what is synced when.
        sizes: how much was done.
        facts: machine, versions and what else goes on top.
    """
    rows = [
        {
            "part": part.key,
            "row": row.key,
            "title": row.title,
            "unit": row.unit,
            "less_is_better": row.less,
            "contender": line.contender,
            "durability": durability[part.key].get(line.contender),
            **asdict(line.spread),
            "values": [value for _, value in sorted(results.values[row.key][line.contender].items())],
            "ours_to_this": None if line.ratio is None else asdict(line.ratio),
        }
        for part in parts
        for row in part.rows
        for line in results.lines(row, OURS)
    ]
    return {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **facts,
        "sizes": asdict(sizes),
        "rows": rows,
        "left_out": [dict(zip(("part", "contender", "what", "why"), noted, strict=True)) for noted in results.left_out],
    }
