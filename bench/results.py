"""What was measured: values by row, contender and run; their summary as table and as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.processes import ROOT
from bench.workloads import Part

#: The contender whose figures are divided by those of the others.
OURS = "HARP"

#: A contender's summary in a row: part, row, title, unit, less_is_better, contender, durable, runs, median, min, max;
#: for the others also ratio, ratio_min, ratio_max: HARP's figure divided by theirs.
Entry = dict[str, Any]

#: Significant digits in files.
_DIGITS = 4
#: Times that the disk is measured.
_SYNCS = 50


@dataclass
class Results:
    """All figures that were measured."""

    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)  # by row, contender, number of the run
    left_out: list[tuple[str, str, str]] = field(default_factory=list)  # part, contender, reason

    def add(self, row: str, contender: str, run: int, value: float) -> None:
        """Add a value."""
        self.values.setdefault(row, {}).setdefault(contender, {})[run] = value

    def leave_out(self, part: str, contender: str, why: str) -> None:
        """Note once that something was not measured."""
        if (part, contender, why) not in self.left_out:
            self.left_out.append((part, contender, why))

    def entries(self, part: Part, durable: Iterable[str] = ()) -> list[Entry]:
        """Return the summary of a part, row by row: HARP first, then the others, the best first."""
        entries: list[Entry] = []
        for row in part.rows:
            found = self.values.get(row.key, {})
            about = {"part": part.key, "row": row.key, "title": row.title, "unit": row.unit, "less_is_better": row.less}
            lines = [{**about, "contender": name, "durable": name in durable, **_spread(found, name)} for name in found]
            entries += sorted(
                lines, key=lambda line: (line["contender"] != OURS, line["median"] * (1 if row.less else -1))
            )
        return entries


def _spread(found: Mapping[str, Mapping[int, float]], name: str) -> dict[str, float]:
    values, ours = found[name], found.get(OURS, {})
    median = statistics.median(values.values())
    spread = {"runs": len(values), "median": median, "min": min(values.values()), "max": max(values.values())}
    ratios = [ours[run] / values[run] for run in ours.keys() & values.keys() if values[run] > 0]
    if name == OURS or not ratios:
        return spread
    # The range is that of the runs in which both were measured: a slow period affects both.
    ratio = statistics.median(ours.values()) / median
    return {**spread, "ratio": ratio, "ratio_min": min(ratios), "ratio_max": max(ratios)}


def figure(value: float) -> str:
    """Return a figure as text, with at least three digits if it is 10 or more."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the lines of a table of entries."""
    head = ["", "median", "min", "max", "HARP/this", "(min to max)"]
    cells = [head]
    for entry in entries:
        name = entry["contender"] + (" *" if entry["durable"] else "")
        ratio = [figure(entry[key]) for key in ("ratio", "ratio_min", "ratio_max") if key in entry]
        ratios = [f"{ratio[0]} x", f"({ratio[1]} to {ratio[2]})"] if ratio else ["", ""]
        cells.append([name, *(figure(entry[key]) for key in ("median", "min", "max")), *ratios])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([one[0].ljust(widths[0]), *map(str.rjust, one[1:], widths[1:])]).rstrip() for one in cells]
    yield lines[0]
    row = None
    for entry, line in zip(entries, lines[1:], strict=True):
        if entry["row"] != row:
            row = entry["row"]
            yield f"{entry['title']}, {entry['unit']}" + (" (less is better)" if entry["less_is_better"] else "")
        yield f"  {line}"
    if any(entry["durable"] for entry in entries):
        yield "* each job, record and end is synced to disk before it is acknowledged"


def conditions(directory: Path) -> dict[str, Any]:
    """Return what figures depend on: date, commit, machine with the disk of this directory, interpreter."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in facts if line.startswith("model name")]
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    described = subprocess.run(commit, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    optimised = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": described.stdout.strip(),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {names[0] if names else platform.machine()}, "
        f"Linux {platform.release()}, sync {_sync_ms(directory):.2f} ms, load {os.getloadavg()[0]:.1f}",
        "interpreter": f"{platform.python_implementation()} {platform.python_version()}, "
        f"{platform.python_compiler()}, {'with' if optimised else 'without'} PGO",
    }


def _sync_ms(directory: Path) -> float:
    """Return the median time of writing and syncing a page."""
    took = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(_SYNCS):
            file.write(bytes(4096))
            file.flush()
            began = time.monotonic()
            os.fdatasync(file.fileno())
            took.append(1000 * (time.monotonic() - began))
    return statistics.median(took)


def update(
    document: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]], entries: Sequence[Entry]
) -> dict[str, Any]:
    """Return ``{"parts": {KEY: CONDITIONS}, "rows": [ENTRY]}`` in which these parts replace earlier measurements."""
    kept = [entry for entry in document.get("rows", []) if entry["part"] not in parts]
    return {"parts": {**document.get("parts", {}), **parts}, "rows": [*kept, *entries]}


def write(document: Mapping[str, Any], file: Path) -> None:
    """Write a document as JSON: a line for each part and for each entry."""
    parts = [f"  {json.dumps(key)}: {json.dumps(facts)}" for key, facts in document["parts"].items()]
    rows = [f"  {json.dumps({key: _rounded(value) for key, value in entry.items()})}" for entry in document["rows"]]
    text = '{{\n "parts": {{\n{}\n }},\n "rows": [\n{}\n ]\n}}\n'
    file.write_text(text.format(",\n".join(parts), ",\n".join(rows)))


def _rounded(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
