"""Program: the measurements. `./dev bench --help` explains its options."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import services
from bench.contenders import CONTENDERS, Place
from bench.goals import compare, needed, report
from bench.harness import Measurement
from bench.picture import draw
from bench.processes import ROOT
from bench.results import F1, F2, F3, OURS, Results, conditions, table, update, write
from bench.workloads import PARTS, QUICK, Sizes

_EPILOG = """\
parts:
{parts}

examples:
  ./dev bench                     everything: about an hour and a half
  ./dev bench --quick             only what is to be reached, and what it is compared with: at most 3 minutes
  ./dev bench jobs --runs 9       a part, nine times
  ./dev bench jobs --only HARP    one contender; written only with --output

Results go to bench/results/latest.json and latest.svg, or quick.json and quick.svg. A part that is not measured keeps
its earlier results. docs/performance.md explains each row.

exit status: 0 measured, 1 something of HARP was not measured, 2 wrong usage, 130 interrupted
"""

#: On a disk, not in memory: a sync has to be one.
_DISK = Path("/var/tmp")  # noqa: S108 - mkdtemp makes the directory
#: Runs: of everything; with --quick, as far as they fit into so many seconds, without the time in which servers end.
_RUNS, _QUICK_RUNS, _QUICK_SECONDS = 5, 3, 150.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    options = parser().parse_args(arguments)
    if not 0 < options.scale <= 100:
        parser().error(f"--scale: expected a number above 0, at most 100, got {options.scale:g}")
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell ignores SIGINT for background programs
        signal.signal(number, signal.default_int_handler)
    directory = Path(tempfile.mkdtemp(prefix="harp-bench-", dir=options.directory))
    try:
        return _measure(options, directory)
    except KeyboardInterrupt:
        print("interrupted; all processes have been ended", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _measure(options: argparse.Namespace, directory: Path) -> int:
    began = time.monotonic()
    chosen = [PARTS[key] for key in options.parts or PARTS if options.parts or not (options.quick and PARTS[key].large)]
    sizes = (QUICK if options.quick else Sizes()).scaled(options.scale)
    contenders = [one for one in CONTENDERS if one.name.startswith(tuple(options.only or [""]))]
    facts = {**conditions(directory), "quick": options.quick}
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", flush=True)
    has_peers = any(one.name not in (OURS, F1, F2, F3) for one in contenders)
    place = Place(directory, services.peers_python(_say) if has_peers else None)
    results = Results()
    measurement = Measurement(contenders, sizes, place, results, _say, needed if options.quick else lambda *_: True)
    small, large = ([part for part in chosen if part.large == size] for size in (False, True))
    if options.quick:
        runs = measurement.measure(small, options.runs or _QUICK_RUNS, until=began + _QUICK_SECONDS)
    else:
        runs = sum(measurement.measure(small, 1) for _ in range(options.runs or _RUNS))
    for part in large:
        measurement.measure([part], 1)

    durable = [one.name for one in contenders if one.durable and not facts["in_memory"]]
    entries, measured = [], {}
    for part in chosen:
        if found := results.entries(part, durable):
            entries += found
            measured[part.key] = {**facts, "runs": 1 if part.large else runs}
            print(f"\n{part.title}\n", *table(found), sep="\n")
    goals = compare(results)
    print("\nWhat is to be reached\n", *report(goals, entries), sep="\n")
    if facts["in_memory"]:
        print(f"{directory.parent} is in memory: nothing was durable")
    for key, contender, why in results.left_out:
        print(f"left out: {key}: {contender}: {why}")
    print(f"{time.monotonic() - began:.0f} s, {runs} runs")
    output = options.output
    if output is None and not options.only:
        output = ROOT / "bench" / "results" / ("quick.json" if options.quick else "latest.json")
    if output is not None:
        earlier = json.loads(output.read_text()) if output.exists() else {}
        document = update(earlier, measured, entries, goals)
        write(document, output)
        output.with_suffix(".svg").write_text(draw(document))
        print(f"written: {output} and {output.with_suffix('.svg').name}")
    return 1 if any(contender == OURS for _, contender, _ in results.left_out) else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parts = "\n".join(f"  {part.key:12}{part.title}{' (once)' if part.large else ''}" for part in PARTS.values())
    parser = argparse.ArgumentParser(
        prog="./dev bench",
        description="Measure HARP and its peers on the same work, in turn.",
        epilog=_EPILOG.format(parts=parts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help="what to measure (everything)")
    add("--quick", action="store_true", help="only what is to be reached, in at most three minutes")
    add("--scale", type=float, default=1.0, metavar="FACTOR", help="amount of work (1)")
    add("--runs", type=int, choices=range(1, 101), metavar="N", help=f"how often ({_RUNS}; quick: {_QUICK_RUNS})")
    add("--only", action="append", metavar="NAME", help="contenders whose names begin so; may be repeated")
    add("--output", type=Path, metavar="FILE", help="the JSON file to update; the picture goes beside it")
    add("--directory", type=Path, default=_DISK, metavar="DIR", help=f"where stores are ({_DISK})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
