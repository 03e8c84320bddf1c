"""Program: the measurements. `./dev bench --help` says how to use it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import cpu, report, table
from bench.clients import Missing
from bench.contenders import OURS, Contender
from bench.figures import Results
from bench.installing import ROOT, install_debian, peers_python
from bench.lineup import LINEUP
from bench.parts import PARTS, PICTURED
from bench.picture import draw
from bench.rounds import measure
from bench.works import FULL, QUICK, TINY, Sizes

_EXAMPLES = """\
parts:
{parts}

examples:
  ./dev bench                     everything, 5 times each: two to three hours
  ./dev bench --quick             everything in small, under 3 minutes: a look, not a proof
  ./dev bench jobs stream         two parts
  ./dev bench store start wide depth sustained
                                  what only HARP is measured in: about half an hour
  ./dev bench jobs --runs 9       a part, nine times
  ./dev bench jobs --only HARP --only Celery
                                  some of the contenders
  ./dev bench --profile           what calls and jobs cost in CPU, process by process

Results go to bench/results/: latest.json and latest.svg, or quick.json and quick.svg. docs/performance.md says what
each row is.

exit status: 0 measured, 1 something of ours could not be measured, 2 wrong usage, 130 broken off
"""

#: Where a run's directory is made: on a disk, so that a sync is one.
_DISK = Path("/var/tmp")  # noqa: S108 - the directory itself is mkdtemp's


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return the exit status."""
    options = parser().parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background a shell has it ignore the first
        signal.signal(number, signal.default_int_handler)
    directory = Path(tempfile.mkdtemp(prefix="harp-bench-", dir=options.directory))
    directory.chmod(0o755)  # a server that gives up root's rights works in it
    try:
        if options.profile:
            for line in cpu.table(directory / "cpu", options.size):
                print(line)
            return 0
        return _measure(options, directory)
    except KeyboardInterrupt:
        print("broken off; all processes have been ended", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _measure(options: argparse.Namespace, directory: Path) -> int:
    sizes: Sizes = options.size
    if options.runs is not None:
        sizes = dataclasses.replace(sizes, runs=options.runs)
    parts = [PARTS[key] for key in options.parts] if options.parts else [part for part in PARTS.values() if part.usual]
    results = Results()
    lineup = {part.key: _chosen(LINEUP[part.key], options.only) for part in parts}
    peers = _peers(lineup, results)
    facts: dict[str, Any] = {
        "machine": report.machine(directory),
        "versions": report.versions(peers),
        "commit": _commit(),
    }
    began = time.monotonic()
    durability = {key: {one.name: one.durability for one in contenders} for key, contenders in lineup.items()}
    for part in parts:
        measure(part, lineup[part.key], sizes, directory, peers, results, _say)
        for line in table.lines(part, results, OURS, durability[part.key]):
            print(line, flush=True)
    for line in table.left_out(results.left_out):
        print(line)
    took = time.monotonic() - began
    print(f"{took:.0f} s, {'a run' if sizes.runs == 1 else f'{sizes.runs} runs'}")
    document = report.document(parts, results, durability, sizes, {**facts, "seconds": round(took)})
    title = f"HARP and peers: {facts['machine']['cores']} cores, medians of {sizes.runs}"
    pictured = [row for part in parts for row in part.rows if row.key in PICTURED]
    losing = {one.name for contenders in lineup.values() for one in contenders if one.losing}
    picture = draw(pictured, results, OURS, title, losing)
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", json.dumps(document, indent=1) + "\n"), (".svg", picture)):
            file = options.results / f"{options.name}{suffix}"
            file.write_text(text)
            print(f"written: {file}")
    return 1 if any(contender == OURS for _, contender, _, _ in results.left_out) else 0


def _chosen(contenders: Sequence[Contender], only: Sequence[str] | None) -> list[Contender]:
    """The contenders that were asked for."""
    return [one for one in contenders if only is None or one.name.startswith(tuple(only))]


def _peers(lineup: Mapping[str, Sequence[Contender]], results: Results) -> Path | None:
    """The peers' Python, with what else they need installed, if there are any."""
    if all(one.ours for contenders in lineup.values() for one in contenders):
        return None
    install_debian(_say)
    try:
        return peers_python(_say)
    except Missing as lack:
        results.leave_out("all", "peers", "their packages", str(lack))
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.strip() or None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Quick(argparse.Action):
    """A size, and the name of the files that it is written to."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: tuple[Sizes, str], help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, const=const, help=help)

    def __call__(self, parser: object, namespace: argparse.Namespace, *_: object) -> None:
        namespace.size, namespace.name = self.const


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    known = "\n".join(
        f"  {part.key:12}{part.title}{'' if part.usual else ' (only when named)'}" for part in PARTS.values()
    )
    parser = argparse.ArgumentParser(
        prog="./dev bench",
        description="Measure HARP and its peers on the same work, in turn.",
        epilog=_EXAMPLES.format(parts=known),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(size=FULL, name="latest")
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], metavar="PART", help="what to measure (all usual parts)"
    )
    parser.add_argument("--quick", action=_Quick, const=(QUICK, "quick"), help="in small, under 3 minutes")
    parser.add_argument("--tiny", action=_Quick, const=(TINY, "tiny"), help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=_count, metavar="N", help="how often (5; quick: 1)")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="contenders whose names begin so: HARP, Celery; may be repeated"
    )
    parser.add_argument("--profile", action="store_true", help="instead: CPU per call, process by process")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="where files go"
    )
    parser.add_argument("--directory", type=Path, default=_DISK, metavar="DIR", help=f"where stores lie ({_DISK})")
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
