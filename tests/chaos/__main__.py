"""Program: the chaos run. `./dev chaos --help` explains its options."""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from chaos import namespaces
from chaos.dispatcher import SABOTAGES
from chaos.run import Plan, Run
from chaos.system import PROCEDURE_SABOTAGES

_EXAMPLES = """\
examples:
  ./dev chaos --minutes 1                          one minute, with a random seed
  ./dev chaos --minutes 10 --seed 7                ten minutes, with the faults of seed 7
  ./dev chaos --minutes 10 --seed 7 --keep-logs /tmp/seed7
                                                   the same, and keep all files of the run there
  ./dev chaos --kills 500 --seed 7                 kill 500 processes, most of them at a random system call
  ./dev chaos --minutes 0.2 --sabotage drop-record a dispatcher that breaks a promise: must exit with 1

The same seed gives the same schedule of faults; the effects depend on the speed of the machine, too.
Faults: killed, restarted, suspended and reloaded daemons; killed calls; a cut, slow or refusing network; hanging
lookups of hosts' names; steps of the clock; logs that are not read; a crowd of connections to the dispatcher; a hosts
file that is rewritten in place; a cleaned runtime directory. In ten minutes each kind occurs at least once.
As root, the dispatcher's store is on a separate small file system, which is full from time to time, and unrelated
processes get the pids of killed processes.

exit status: 0 no promise broken, 1 at least one broken (printed with the facts), 2 wrong usage, 130 interrupted
"""

#: Size of the file system for the dispatcher's store, as an option of mount.
_DISK_SIZE = "192m"


def main() -> int:
    """Run the program; return its exit status."""
    options = _parser().parse_args()
    isolated = namespaces.enter()
    directory = options.keep_logs or Path(tempfile.mkdtemp(prefix="chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        print(f"chaos: --keep-logs: expected a new or an empty directory, got {directory}", file=sys.stderr)
        return 2
    store = directory / "store"
    store.mkdir()
    disk = isolated and _mount(store)
    if not disk:
        print("not root, or no own namespaces: this run has no full disk, and no unrelated process gets a pid again")
    plan = Plan(options.seed, options.minutes * 60.0, options.kills, options.sabotage, directory.absolute(), disk)
    duration = f"{plan.kills} kills" if plan.kills else f"{plan.seconds:g} s"
    print(f"seed {plan.seed}, {duration}; files in {directory}", flush=True)
    broken = _run(plan)
    if disk:
        _keep_store(store)
    if broken or options.keep_logs:
        print(f"files of this run: {directory}")
    else:
        shutil.rmtree(directory, ignore_errors=True)
    return broken


def _run(plan: Plan) -> int:
    """Run, print the report, and return the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell ignores SIGINT for background programs
        signal.signal(number, signal.default_int_handler)
    run: Run | None = None

    async def whole() -> None:
        nonlocal run
        run = Run(plan)
        await run.run()

    try:
        asyncio.run(whole())
    except KeyboardInterrupt:
        print("interrupted; all processes have been ended")
        return 130
    assert run is not None
    run.report()
    return 1 if run.observations.violations else 0


def _mount(store: Path) -> bool:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_SIZE}", "tmpfs", str(store)]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


def _keep_store(store: Path) -> None:
    """Copy the store from the file system that ends with this program."""
    (store / "ballast").unlink(missing_ok=True)
    shutil.copytree(store, store.with_name("store-at-the-end"), dirs_exist_ok=True)
    subprocess.run(["umount", str(store)], capture_output=True, check=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./dev chaos",
        description="Inject faults into a whole system, and compare its replies with what happened.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=_minutes, default=1.0, metavar="N", help="duration of the faults (1)")
    add("--kills", type=_count, default=0, metavar="N", help="kill N processes instead: a failpoint run")
    add("--seed", type=int, default=random.randrange(1_000_000), metavar="S", help="seed of the schedule (random)")
    add("--sabotage", choices=sorted([*SABOTAGES, *PROCEDURE_SABOTAGES]), default="none", help="break a promise")
    add("--keep-logs", type=Path, metavar="DIR", help="keep all files there (default: only after a failure)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"expected a number of kills, got {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0
    if not 0 < minutes <= 24 * 60:
        raise argparse.ArgumentTypeError(f"expected a number of minutes, got {text!r}")
    return minutes


if __name__ == "__main__":
    sys.exit(main())
