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
from bench.harness import measure
from bench.picture import draw
from bench.processes import ROOT
from bench.results import OURS, Results, conditions, table, update, write
from bench.workloads import PARTS, Sizes

_EPILOG = """\
parts:
{parts}

examples:
  ./dev bench                     everything: two to three hours
  ./dev bench --quick             direct, jobs, stream, cost in small, about 3 minutes
  ./dev bench jobs --runs 9       a part, nine times
  ./dev bench jobs --only HARP    one contender; written only with --output

Results go to bench/results/latest.json and latest.svg, or quick.json and quick.svg. A part that is not measured keeps
its earlier results. docs/performance.md explains each row.

exit status: 0 measured, 1 something of HARP was not measured, 2 wrong usage, 130 interrupted
"""

#: On a disk, not in memory: a sync has to be one.
_DISK = Path("/var/tmp")  # noqa: S108 - mkdtemp makes the directory
#: What --quick does of everything.
_QUICK = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    options = parser().parse_args(arguments)
    if options.scale is not None and not 0 < options.scale <= 100:
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
    usual = [key for key, part in PARTS.items() if not (options.quick and part.large)]
    chosen = [PARTS[key] for key in options.parts or usual]
    sizes = Sizes().scaled(options.scale or (_QUICK if options.quick else 1.0))
    runs = options.runs or (1 if options.quick else 5)
    contenders = {
        part.key: [one for one in CONTENDERS[part.key] if one.name.startswith(tuple(options.only or [""]))]
        for part in chosen
    }
    place = Place(directory, services.peers_python(_say) if options.only != [OURS] else None)
    results, entries, measured = Results(), [], {}
    began = time.monotonic()
    for part in chosen:
        facts = {**conditions(directory), "runs": 1 if part.large else runs}
        measure(part, contenders[part.key], sizes, facts["runs"], place, results, _say)
        found = results.entries(part, [one.name for one in contenders[part.key] if one.durable])
        if found:
            entries += found
            measured[part.key] = facts
            print(f"\n{part.title}\n", *table(found), sep="\n", flush=True)
    for key, contender, why in results.left_out:
        print(f"left out: {key}: {contender}: {why}")
    print(f"{time.monotonic() - began:.0f} s")
    output = options.output
    if output is None and not options.only:
        output = ROOT / "bench" / "results" / ("quick.json" if options.quick else "latest.json")
    if output is not None:
        earlier = json.loads(output.read_text()) if output.exists() else {}
        document = update(earlier, measured, entries)
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
    add("--quick", action="store_true", help=f"{_QUICK:g} of everything, once, without the large parts")
    add("--scale", type=float, metavar="FACTOR", help="amount of work (1)")
    add("--runs", type=int, choices=range(1, 101), metavar="N", help="how often (5; quick: 1)")
    add("--only", action="append", metavar="NAME", help="contenders whose names begin so; may be repeated")
    add("--output", type=Path, metavar="FILE", help="the JSON file to update; the picture goes beside it")
    add("--directory", type=Path, default=_DISK, metavar="DIR", help=f"where stores are ({_DISK})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
