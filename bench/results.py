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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.load import Figures
from bench.processes import ROOT
from bench.workloads import Part

#: The contender whose figures are divided by those of the others.
OURS = "HARP"
#: The floors, see `bench.floors`.
F1, F2, F3 = "F1: bare fork", "F2: bare zygote", "F3: bare TLS echo"

#: A contender's summary in a row: part, row, title, unit, less_is_better, contender, durable, runs, median, min, max;
#: for the others also ratio, ratio_min, ratio_max: HARP's figure divided by theirs. ``cost``: medians of
#: what one call, job or record costs, by kind (``cpu`` in ms, ``faults``) and process.
Entry = dict[str, Any]

#: Significant digits in files.
_DIGITS = 4
#: Times that the disk is measured.
_SYNCS = 50


@dataclass
class Results:
    """All figures that were measured."""

    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)  # by row, contender, number of the run
    costs: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)  # by row, contender, name
    left_out: list[tuple[str, str, str]] = field(default_factory=list)  # part, contender, reason

    def add(self, row: str, contender: str, run: int, figures: Figures, figure: str) -> None:
        """Add one of the figures of a workload, and those that are parts of the workload's cost."""
        self.values.setdefault(row, {}).setdefault(contender, {})[run] = figures[figure]
        for name, value in figures.items():
            if " " in name:
                self.costs.setdefault(row, {}).setdefault(contender, {}).setdefault(name, []).append(value)

    def leave_out(self, part: str, contender: str, why: str) -> None:
        """Note once that something was not measured."""
        if (part, contender, why) not in self.left_out:
            self.left_out.append((part, contender, why))

    def entries(self, part: Part, durable: Iterable[str] = ()) -> list[Entry]:
        """Return the summary of a part, row by row: HARP first, then the others, the best first.

        `durable`: the contenders that sync what they acknowledge.
        """
        entries: list[Entry] = []
        for row in part.rows:
            found = self.values.get(row.key, {})
            about = {"part": part.key, "row": row.key, "title": row.title, "unit": row.unit, "less_is_better": row.less}
            lines = [
                {
                    **about,
                    "contender": name,
                    "durable": part.stored and name in durable,
                    **(self.spread(name, row.key) or {}),
                    **self._ratios(row.key, name),
                    **self._cost(row.key, name),
                }
                for name in found
            ]
            entries += sorted(
                lines, key=lambda line: (line["contender"] != OURS, line["median"] * (1 if row.less else -1))
            )
        return entries

    def spread(self, contender: str, row: str, other: tuple[str, str] | None = None) -> dict[str, float] | None:
        """Return runs, median, min and max of a figure, and its ratios to another one; None if it was not measured.

        `other`: contender and row of the other figure. Without figures in common runs, there are no ratios.
        """
        values = self.values.get(row, {}).get(contender, {})
        if not values:
            return None
        median = statistics.median(values.values())
        spread = {"runs": len(values), "median": median, "min": min(values.values()), "max": max(values.values())}
        others = self.values.get(other[1], {}).get(other[0], {}) if other else {}
        ratios = [values[run] / others[run] for run in values.keys() & others.keys() if others[run] > 0]
        if not ratios:
            return spread
        # The range is that of the runs in which both were measured: a slow period affects both.
        ratio = median / statistics.median(others.values())
        return {**spread, "ratio": ratio, "ratio_min": min(ratios), "ratio_max": max(ratios)}

    def _ratios(self, row: str, contender: str) -> dict[str, float]:
        spread = None if contender == OURS else self.spread(OURS, row, (contender, row))
        return {name: value for name, value in (spread or {}).items() if name.startswith("ratio")}

    def _cost(self, row: str, contender: str) -> dict[str, Any]:
        """Return the medians of the parts of the cost, by what and process."""
        cost: dict[str, dict[str, float]] = {}
        for name, values in self.costs.get(row, {}).get(contender, {}).items():
            what, _, process = name.partition(" ")
            cost.setdefault(what, {})[process] = statistics.median(values)
        return {"cost": cost} if cost else {}


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
    described = ""
    with suppress(FileNotFoundError):  # without git, for example on a machine that got an archive
        done = subprocess.run(commit, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        described = done.stdout.strip()
    arguments = sysconfig.get_config_var("CONFIG_ARGS") or ""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": described or "unknown",
        "machine": f"{len(os.sched_getaffinity(0))} cores, {names[0] if names else platform.machine()}, "
        f"Linux {platform.release()}, {_file_system(directory)}, sync {_sync_ms(directory):.2f} ms",
        "in_memory": _file_system(directory) in ("tmpfs", "ramfs"),
        "load": round(os.getloadavg()[0], 1),
        "interpreter": f"{platform.python_implementation()} {platform.python_version()}, "
        f"{platform.python_compiler()}, {'with' if _is_pgo(arguments) else 'without'} PGO",
        "configured": " ".join(arguments.split()),
    }


def _is_pgo(arguments: str) -> bool:
    """Return whether this Python was built with profile-guided optimisation: by its options, or because Debian did."""
    return "--enable-optimizations" in arguments or "/usr/share/python-wheels" in arguments


def _file_system(directory: Path) -> str:
    """Return the type of the file system of a directory."""
    found = ["stat", "--file-system", "--format=%T", str(directory)]
    return subprocess.run(found, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


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
    document: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Any]],
    entries: Sequence[Entry],
    goals: Sequence[Entry] = (),
) -> dict[str, Any]:
    """Return ``{"parts": {KEY: CONDITIONS}, "goals": [ENTRY], "rows": [ENTRY]}``; these replace earlier ones."""
    rows = [entry for entry in document.get("rows", []) if entry["part"] not in parts]
    measured = {goal["row"] for goal in goals}
    others = [goal for goal in document.get("goals", []) if goal["row"] not in measured]
    return {
        "parts": {**document.get("parts", {}), **parts},
        "goals": sorted([*others, *goals], key=lambda goal: goal["goal"]),
        "rows": [*rows, *entries],
    }


def write(document: Mapping[str, Any], file: Path) -> None:
    """Write a document as JSON: a line for each part, goal and entry."""
    parts = [f"  {json.dumps(key)}: {json.dumps(facts)}" for key, facts in document["parts"].items()]
    goals, rows = ([f"  {json.dumps(_rounded(entry))}" for entry in document[key]] for key in ("goals", "rows"))
    text = '{{\n "parts": {{\n{}\n }},\n "goals": [\n{}\n ],\n "rows": [\n{}\n ]\n}}\n'
    file.write_text(text.format(*map(",\n".join, (parts, goals, rows))))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
