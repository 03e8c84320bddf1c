"""Program: the chaos run. `./dev chaos --help` explains its options."""

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
  ./dev chaos --minutes 1                          one minute, with a random seed
  ./dev chaos --minutes 10 --seed 7                ten minutes, with the faults of seed 7
  ./dev chaos --minutes 10 --seed 7 --keep-logs /tmp/seed7
                                                   the same, and keep all files of the run there
  ./dev chaos --minutes 0.2 --sabotage drop-record a dispatcher that breaks a promise: must exit with 1

The same seed gives the same schedule of faults; the effects depend on the speed of the machine, too.
As root, the dispatcher's store is on a separate small file system, which is full from time to time.

exit status: 0 no promise broken, 1 at least one broken (printed with the facts), 2 wrong usage, 130 interrupted
"""

#: Size of the file system for the dispatcher's store, as an option of mount.
_DISK_SIZE = "192m"

#: Set in the environment of the program that runs in a separate mount namespace.
_OWN_MOUNTS = "CHAOS_OWN_MOUNTS"


def main() -> int:
    """Run the program; return its exit status."""
    options = _parser().parse_args()
    if os.geteuid() == 0 and _OWN_MOUNTS not in os.environ:
        probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
        if probe.returncode == 0:
            # The kernel removes the file system with the last process, however this program ends.
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
        print("not root, or no mount namespaces: this run has no full disk")
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
    add("--seed", type=int, default=random.randrange(1_000_000), metavar="S", help="seed of the schedule (random)")
    add("--sabotage", choices=sorted(SABOTAGES), default="none", help="let the dispatcher break a promise")
    add("--keep-logs", type=Path, metavar="DIR", help="keep all files there (default: only after a failure)")
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
