"""Program: print how many Python functions one job enters, by process and module. See `./dev trace --help`.

The daemons are real and log as they do by default; each Python process carries the recorder of `startup`. The client is
this program, which is recorded only inside the client library. A run switches recording on, runs one job, and switches
recording off when no process has entered a function for `_SILENCE`; then both daemons must have finalized the job.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import harp
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd, is_dead
from tracing.startup import sitecustomize as recorder

_EPILOG = """\
An entry is a call of a Python function, or the resumption of a generator or a coroutine. "ours" is the project's code
and the procedure, "library" is the standard library and other packages.

processes:
  client, dispatcher, frontend, supervisor, zygote
  call                the call's process, from the arrival of the call to its exit
  pre-forked worker   the process that is forked in its place, for a later call

Periodic work, for example heartbeats, is separate: the functions that an idle system enters, and that some run does
without, mark the runs that it disturbed. The median of the other runs is printed; if there is none, as on a busy
machine, the run with the fewest entries.

exit status: 0 printed, 1 no run was complete, or the system not quiet (one line on stderr), 2 wrong usage
"""

_ROOT = Path(__file__).parents[2]
_STARTUP = Path(recorder.__file__).parent
#: The first part of the names of our modules; the last one is the module of a procedures file.
_OURS = {path.name for path in (_ROOT / "src").iterdir()} | {"harpd_procedures"}

_PROCEDURES = """\
from harpd.proc import procedure, streaming_procedure

@procedure
def add(a, b):
    return a + b

@streaming_procedure
def count(records):
    yield from range(records)
"""

#: The order of the processes on the page.
_CALL, _WORKER = "call", "pre-forked worker"
_PROCESSES = ("client", "dispatcher", "frontend", "supervisor", "zygote", _CALL, _WORKER)

#: Jobs of each kind that run before the first is counted: connections are open then, and caches are filled.
_WARM_UP = 5
#: Seconds without an entry after which the system counts as quiet. Periodic work comes every 0.5 s and 1 s.
_SILENCE = 0.05
#: The longest pause before a run, in seconds. Its length is random, so that runs and periodic work keep no step.
_PAUSE = 0.5
#: Seconds for which an idle system is recorded.
_IDLE = 2.0
#: Seconds within which the system becomes quiet, and the processes of a call end.
_DEADLINE = 30.0


class TraceError(Exception):
    """The system did not become quiet, or no run was complete."""


class Entry(NamedTuple):
    """The function that was entered, and where."""

    process: str
    module: str
    function: str


T = TypeVar("T")

#: How often each function was entered.
Counts: TypeAlias = Counter[Entry]


class Recording:
    """The switch and the file that all recorders share.

    Args:
        directory: where both are created.
    """

    def __init__(self, directory: Path) -> None:
        self._entries = directory / recorder.ENTRIES
        self._entries.touch()
        switch = directory / recorder.SWITCH
        switch.write_bytes(b"\0")
        with switch.open("r+b") as file:
            self._switch = mmap.mmap(file.fileno(), 1)
        self._record = recorder.make_recorder(str(directory))

    def record(self, action: Callable[[], T]) -> tuple[T, Counter[tuple[int, str, str]]]:
        """Run an action in this process, and record until every process is quiet.

        Returns:
            The action's value, and the number of entries by process id, module and function.

        Raises:
            TraceError: the processes are not quiet within `_DEADLINE`.
        """
        os.truncate(self._entries, 0)
        self._switch[0] = 1
        try:
            sys.setprofile(self._record)
            try:
                value = action()
            finally:
                sys.setprofile(None)
            self._wait_until_quiet()
        finally:
            self._switch[0] = 0
        lines = (line.split("\t") for line in self._entries.read_text().splitlines())
        entries = ((int(pid), module, function) for pid, module, function in lines if module != "tracing.__main__")
        return value, Counter(entries)

    def _wait_until_quiet(self) -> None:
        began = since = time.monotonic()
        size = 0
        while (now := time.monotonic()) - since < _SILENCE:
            if now - began > _DEADLINE:
                raise TraceError(f"the processes are not quiet within {_DEADLINE:g} s")
            if size != (size := self._entries.stat().st_size):
                since = now
            time.sleep(_SILENCE / 10)


@dataclass(frozen=True)
class System:
    """A running system that is recorded."""

    recording: Recording
    harpd: Harpd
    dispatcher: Harpcallerd
    rpc: harp.HarpCaller

    def idle(self) -> Counts:
        """Return the entries of an idle system within `_IDLE`."""
        _, entries = self.recording.record(lambda: time.sleep(_IDLE))
        return self._by_process(entries)

    def run(self, run: Callable[[], harp.RemoteCall]) -> Counts:
        """Return the entries of one job.

        A run that is not complete when the system is quiet is repeated: the machine paused a process for too long.

        Args:
            run: submits the job and waits for its end.

        Raises:
            TraceError: no run is complete within `_DEADLINE`.
        """
        last = time.monotonic() + _DEADLINE
        while time.monotonic() < last:
            time.sleep(random.uniform(0.0, _PAUSE))
            job, entries = self.recording.record(run)
            finalized = partial(self._is_finalized, job)
            complete = finalized()
            wait_until(finalized, _DEADLINE, f"the finalization of job {job.id}")
            counts = self._by_process(entries)
            if complete and {entry.process for entry in counts} == set(_PROCESSES):
                return counts
        raise TraceError(f"no run was complete within {_DEADLINE:g} s; is the machine too busy?")

    def _is_finalized(self, job: harp.RemoteCall) -> bool:
        details, status = job.details(), self.harpd.status()
        return details["state"] == "returned" and not (details["holds_slot"] or status["calls"] or status["resumable"])

    def _by_process(self, entries: Counter[tuple[int, str, str]]) -> Counts:
        processes = {
            os.getpid(): "client",
            self.dispatcher.pid: "dispatcher",
            self.harpd.pid: "frontend",
            self.harpd.supervisor: "supervisor",
            self.harpd.zygote: "zygote",
        }
        forked = {pid for pid, _, _ in entries} - processes.keys()
        if forked:
            wait_until(lambda: any(map(is_dead, forked)), _DEADLINE, "the end of the call's process")
        processes |= {pid: _CALL if is_dead(pid) else _WORKER for pid in forked}
        return Counter({Entry(processes[pid], *names): number for (pid, *names), number in entries.items()})


def median_run(runs: Sequence[Counts], idle: Counts) -> dict[str, Any]:
    """Return the median of the runs that periodic work did not disturb; if it disturbed each, the shortest run.

    Periodic work is recognized by functions that an idle system enters and at least one run does not enter.
    """
    periodic = {entry for entry in idle if any(entry not in run for run in runs)}
    undisturbed = [run for run in runs if not periodic & run.keys()]
    ordered = sorted(undisturbed or runs, key=Counter.total)
    median = ordered[len(ordered) // 2 if undisturbed else 0]
    processes = []
    for process in _PROCESSES:
        counts = Counter({entry: number for entry, number in median.items() if entry.process == process})
        processes.append({"process": process, **_sums(counts), "modules": _modules(counts)})
    totals = [run.total() for run in ordered]
    return {**_sums(median), "processes": processes, "runs": totals, "disturbed_runs": len(runs) - len(undisturbed)}


def _sums(counts: Counts) -> dict[str, int]:
    ours = sum(number for entry, number in counts.items() if _is_ours(entry.module))
    return {"entries": counts.total(), "ours": ours, "library": counts.total() - ours}


def _modules(counts: Counts) -> list[dict[str, Any]]:
    """Return the modules with their functions, each sorted by the number of entries."""
    modules: dict[str, dict[str, int]] = {}
    for entry, number in counts.most_common():
        modules.setdefault(entry.module, {})[entry.function] = number
    ordered = sorted(modules.items(), key=lambda module: -sum(module[1].values()))
    return [{"module": name, "ours": _is_ours(name), "functions": functions} for name, functions in ordered]


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in _OURS


@contextmanager
def running(directory: Path) -> Iterator[System]:
    """Run a system whose Python processes are recorded."""
    recording = Recording(directory)
    path = os.pathsep.join(filter(None, (str(_STARTUP), os.environ.get("PYTHONPATH"))))
    os.environ.update({recorder.DIRECTORY: str(directory), "PYTHONPATH": path})  # the daemons inherit both
    harpd = Harpd(directory / "harpd", _PROCEDURES, {"environment": {recorder.DIRECTORY: None, "PYTHONPATH": None}})
    harpd.logging_file.write_text(harpd.logging_file.read_text().replace("DEBUG", "INFO"))
    with harpd:
        settings = {"ca_file": str(harpd.ca_file), "log_level": "info"}
        credentials = (harpd.user, harpd.password)
        with Harpcallerd(directory / "dispatcher", {"web01": harpd.port}, credentials, settings) as dispatcher:
            yield System(recording, harpd, dispatcher, harp.HarpCaller("127.0.0.1", dispatcher.port))


def measure(directory: Path, runs: int, records: int) -> dict[str, Any]:
    """Return the counts of a plain and a streaming job, and the entries per second of an idle system.

    Args:
        directory: an empty directory for all files.
        runs: how many times each job is run.
        records: how many records the streaming job has.

    Raises:
        TraceError: no run was complete.
    """
    with running(directory) as system:
        host = system.rpc.web01

        def add() -> harp.RemoteCall:
            job: harp.RemoteCall = host.add(1, 2)
            job.get()
            return job

        def count() -> harp.RemoteCall:
            job: harp.RemoteCall = host.count(records)
            for _ in job.follow():
                pass
            return job

        jobs = {"add(1, 2).get()": add, f"streaming job of {records} records, followed to its end": count}
        for run in (*jobs.values(),) * _WARM_UP:
            system.run(run)
        idle = system.idle()
        counted = {title: median_run([system.run(run) for _ in range(runs)], idle) for title, run in jobs.items()}
        return {"idle_entries_per_second": idle.total() / _IDLE, "jobs": counted}


def page(found: Mapping[str, Any], functions: bool) -> Iterator[str]:
    """Yield the lines of the page.

    Args:
        found: the value of `measure`.
        functions: whether each module's functions are listed.
    """
    for title, job in found["jobs"].items():
        runs, disturbed = job["runs"], job["disturbed_runs"]
        yield f"{title}: {job['entries']} function entries, {job['ours']} of them ours"
        yield f"  one of {len(runs)} runs with {runs[0]} to {runs[-1]}; periodic work disturbed {disturbed} runs"
        yield f"\n  {'':48}{'entries':>8}{'ours':>8}{'library':>8}"
        for process in job["processes"]:
            yield _row(2, process["process"], process["ours"], process["library"])
        yield _row(2, "total", job["ours"], job["library"])
        for process in job["processes"]:
            yield f"\n  {process['process']}"
            for module in process["modules"]:
                entries = sum(module["functions"].values())
                yield _row(4, module["module"], *((entries, 0) if module["ours"] else (0, entries)))
                if functions:
                    yield from (f"      {name:60}{number:8}" for name, number in module["functions"].items())
        yield ""
    yield f"An idle system enters {found['idle_entries_per_second']:.0f} functions a second."


def _row(indent: int, name: str, ours: int, library: int) -> str:
    return f"{' ' * indent}{name:{50 - indent}}{ours + library:8}{ours or '':>8}{library or '':>8}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="./dev trace",
        description="Print how many Python functions a job enters on a live system, by process and module.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", metavar="N", type=int, default=9, help="run each job N times (%(default)s)")
    parser.add_argument("--records", metavar="N", type=int, default=10, help="records of the stream (%(default)s)")
    parser.add_argument("--functions", action="store_true", help="list the functions of each module, too")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    options = parser.parse_args(arguments)
    if options.runs < 1 or options.records < 0:
        parser.error("--runs: expected at least 1, --records: expected at least 0")
    with tempfile.TemporaryDirectory(prefix="harp-trace-") as directory:
        try:
            found = measure(Path(directory), options.runs, options.records)
        except TraceError as error:
            print(f"trace: {error}", file=sys.stderr)
            return 1
    print(json.dumps(found, indent=2) if options.json else "\n".join(page(found, options.functions)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
