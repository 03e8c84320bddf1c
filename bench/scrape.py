"""Program: how long a scrape of the dispatcher's metrics takes. `./dev run python -m bench.scrape`.

The dispatcher runs in this process, with hosts, queued jobs and procedures; hosts refuse connections. Printed are the
time of a scrape, its CPU time, and the CPU time of its part in the event loop. The last two hardly depend on other
programs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

from harp.protocol.dispatcher import Call, Queue
from harp.protocol.ends import Returned
from harp.protocol.json_text import Raw
from harpcaller.config import Config
from harpcaller.dispatcher import Dispatcher
from harpcaller.metrics import Metrics
from harpcaller.model.changes import Change, ChangeKind
from harpcaller.model.jobs import Job, State
from harpcaller.monitoring import Monitor, MonitorSettings
from harpcaller.store.sqlite import open_store

_HOSTS, _JOBS, _PROCEDURES, _SCRAPES = 1000, 3000, 200, 50
_YEAR = 365 * 86400.0


async def measure(directory: Path, hosts: int, jobs: int) -> None:
    """Run a dispatcher and scrape it; print the times."""
    line = {"address": "127.0.0.1", "port": 1, "credentials": {"user": "u", "password": "p"}}
    names = [f"host{number:05}.example.com" for number in range(hosts)]
    (directory / "hosts").write_text("".join(json.dumps({"hostname": name, **line}) + "\n" for name in names))
    (directory / "hosts").chmod(0o600)
    config = Config(
        stream_directory=directory / "store", hosts_file=directory / "hosts", verify=False, resumable_calls=False
    )
    store, metrics = await open_store(config.stream_directory), Metrics()
    metrics.stored = await store.count_stored()
    store.observe(metrics.observe_changes)
    store.measure()
    for number in range(_PROCEDURES):
        job = Job("", State.RUNNING, "", f"p{number}", Raw(b"[]"), 1, 1, None, Raw(b""), 0, 1, None, None, 0)
        metrics.observe_changes([Change(ChangeKind.STARTED, str(number), number, 1.0, job)])
        metrics.observe_changes([Change(ChangeKind.ENDED, str(number), number, 2.0, end=Returned(Raw(b"1")))])
    async with Dispatcher(config, store, metrics=metrics) as dispatcher:
        queue = Queue(Raw(b"{}"))  # so that all wait for one host, and nothing else happens
        calls = [
            Call(names[number % hosts], "work", Raw(b"[]"), queue=queue, start_within=3600) for number in range(jobs)
        ]
        await dispatcher.submit_many(calls, "bench")
        dispatcher.connects.certificate_ends |= dict.fromkeys(names, time.time() + _YEAR)
        monitor = Monitor(dispatcher, metrics, settings=lambda: MonitorSettings(hosts, gauges_age=0.0))
        await monitor.scrape()
        total: list[float] = []
        cpu: list[float] = []
        in_loop: list[float] = []
        for _ in range(_SCRAPES):
            await asyncio.sleep(0.05)
            began = time.perf_counter(), time.process_time(), time.thread_time()
            text = await monitor.scrape()
            ended = time.perf_counter(), time.process_time(), time.thread_time()
            for times, before, after in zip((total, cpu, in_loop), began, ended, strict=True):
                times.append((after - before) * 1000)
        print(f"{hosts} hosts, {jobs} queued jobs, {_PROCEDURES} procedures: {len(text)} bytes")
        for what, times in (("scrape", total), ("CPU", cpu), ("CPU of the loop's thread", in_loop)):
            print(f"{what}: median {statistics.median(times):.1f} ms, least {min(times):.1f} ms")
    await store.close()


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hosts", type=int, default=_HOSTS)
    parser.add_argument("--jobs", type=int, default=_JOBS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="harp-scrape-") as directory:
        asyncio.run(measure(Path(directory), options.hosts, options.jobs))


if __name__ == "__main__":
    main()
