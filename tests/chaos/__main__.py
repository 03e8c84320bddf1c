"""Program: the proof. `./dev chaos --help` says how to use it."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from chaos.dispatcher import SABOTAGES
from chaos.run import Plan, Run

_EXAMPLES = """\
examples:
  ./dev chaos --minutes 1                          a look: one minute, a seed of its own choice
  ./dev chaos --minutes 10 --seed 7                the proof
  ./dev chaos --minutes 10 --seed 7 --keep-logs /tmp/seed7
                                                   the same, and every file of the run stays there
  ./dev chaos --minutes 0.2 --sabotage drop-record must end with status 1: so the proof is one

The same seed gives the same schedule of faults; outcomes may differ, as the machine's moments do.
As root the dispatcher's store lies on a small file system of its own, which is full now and then.

exit status: 0 no promise was broken, 1 at least one was (each is told with its facts), 2 wrong usage, 130 broken off
"""

#: The file system for the dispatcher's store, in the form that mount takes.
_DISK_SIZE = "192m"

#: Set in the environment of the program that runs in a mount namespace of its own.
_OWN_MOUNTS = "CHAOS_OWN_MOUNTS"


def main() -> int:
    """Run as the command line says; return the exit status."""
    options = _parser().parse_args()
    if os.geteuid() == 0 and _OWN_MOUNTS not in os.environ:
        probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
        if probe.returncode == 0:
            # So that the file system goes with the last process, however this program ends.
            again = ["unshare", "--mount", sys.executable, "-P", "-m", "chaos", *sys.argv[1:]]
            os.execvpe(again[0], again, {**os.environ, _OWN_MOUNTS: "1"})
    directory = options.keep_logs or Path(tempfile.mkdtemp(prefix="chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        print(f"chaos: --keep-logs: expected a new or an empty directory, got {directory}", file=sys.stderr)
        return 2
    store = directory / "store"
    store.mkdir()
    disk = _OWN_MOUNTS in os.environ and _mount(store)
    if not disk:
        print("not root, or no mount namespaces: the dispatcher's disk will not be full in this run")
    plan = Plan(options.seed, options.minutes * 60.0, options.sabotage, directory.absolute(), disk)
    print(f"seed {plan.seed}, {plan.seconds:g} s; files in {directory}", flush=True)
    broken = _run(plan)
    if disk:
        _keep_store(store)
    if broken or options.keep_logs:
        print(f"files of this run: {directory}")
    else:
        shutil.rmtree(directory, ignore_errors=True)
    return broken


def _run(plan: Plan) -> int:
    """The exit status of a run."""
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background a shell has it ignore the first
        signal.signal(number, signal.default_int_handler)
    run: Run | None = None

    async def whole() -> None:
        nonlocal run
        run = Run(plan)
        await run.run()

    try:
        asyncio.run(whole())
    except KeyboardInterrupt:
        print("broken off; all processes have been ended")
        return 130
    assert run is not None
    run.report()
    return 1 if run.ledger.broken else 0


def _mount(store: Path) -> bool:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_SIZE}", "tmpfs", str(store)]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


def _keep_store(store: Path) -> None:
    """Move the store off the file system that goes with this program."""
    (store / "ballast").unlink(missing_ok=True)
    shutil.copytree(store, store.with_name("store-at-the-end"), dirs_exist_ok=True)
    subprocess.run(["umount", str(store)], capture_output=True, check=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./dev chaos",
        description="Break a whole system on purpose and hold what it says against what happened.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=_minutes, default=1.0, metavar="N", help="how long there are faults (1)")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), metavar="S", help="of the schedule")
    parser.add_argument("--sabotage", choices=sorted(SABOTAGES), default="none", help="have the dispatcher do this")
    parser.add_argument("--keep-logs", type=Path, metavar="DIR", help="keep all files, there (else: after a failure)")
    return parser


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
