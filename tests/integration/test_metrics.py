"""The metrics of a dispatcher: their names, their labels, and that they equal what the store has."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from harp.protocol.ends import Returned
from harpcaller.dispatcher import Dispatcher
from harpcaller.metrics import END_TYPES, OTHER, PHASES, Metrics
from harpcaller.model.changes import Change, ChangeKind
from harpcaller.model.jobs import Job, State
from harpcaller.monitoring import Limits, Monitor, MonitorSettings
from harpcaller.store import StorageError
from support.deadline import eventually
from support.dispatcher import call, host_line, raw, result, running, until
from support.error_types import read_error_types
from support.scripted import scripted_harpd

DOCS = Path(__file__).parents[2] / "docs/monitoring.md"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def documented(heading: str, until: str) -> set[str]:
    """Return the names in the tables of a part of docs/monitoring.md."""
    part = DOCS.read_text().partition(f"\n{heading}\n")[2].partition(f"\n{until}\n")[0]
    rows = [line for line in part.splitlines() if re.match(r"\| `(harp|harpd|process|python)_", line)]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


async def scraped(monitor: Monitor) -> tuple[set[str], Samples]:
    """Return the names of all metrics and the values of their samples, as Prometheus' own parser reads them."""
    families = list(parse_text((await monitor.scrape()).decode()))
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert len(names) == len(families), "each metric has one family"
    samples: Samples = {}
    for family in families:
        assert family.documentation
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return names, samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, tuple(sorted(labels.items()))), 0.0)


def totals(samples: Samples, name: str, label: str) -> Counter[str]:
    """Return the values of a metric by one of its labels."""
    found: Counter[str] = Counter()
    for (sample, labels), number in samples.items():
        if sample == name:
            found[dict(labels)[label]] += int(number)
    return found


@asynccontextmanager
async def monitored(
    directory: Path, *lines: str, max_hosts: int = 500, queues: tuple[str, ...] = (), **settings: Any
) -> AsyncIterator[tuple[Dispatcher, Monitor]]:
    """Run a dispatcher with metrics, whose gauges are always read again."""
    metrics = Metrics()
    monitor_settings = MonitorSettings(max_hosts, queues, gauges_age=0.0)
    async with running(directory, *lines, metrics=metrics, **settings) as dispatcher:
        limits = {"client": Limits(3, 10)}
        yield dispatcher, Monitor(dispatcher, metrics, lambda: limits, settings=lambda: monitor_settings)


async def test_metrics_are_the_documented_ones(tmp_path: Path) -> None:
    with scripted_harpd(tmp_path) as host:
        async with monitored(tmp_path, host_line(host.port)) as (dispatcher, monitor):
            await result(dispatcher, procedure="echo")
            names, samples = await scraped(monitor)
            text = (await monitor.scrape(openmetrics=True)).decode()
    openmetrics = list(parse_openmetrics(text))  # type: ignore[no-untyped-call]
    expected = documented("## Metrics of the dispatcher", "### What has no metric yet")
    assert names == expected
    assert len(openmetrics) == len(names)
    phases = {dict(labels).get("phase") for name, labels in samples if name == "harp_job_phase_seconds_count"}
    assert phases == set(PHASES)


async def test_metrics_equal_the_truth_of_the_store(tmp_path: Path) -> None:
    queue = '{"q": 1}'
    with scripted_harpd(tmp_path) as host:
        async with monitored(tmp_path, host_line(host.port), queues=(queue,)) as (dispatcher, monitor):
            calls = [
                *(call("echo", arguments=[number]) for number in range(5)),
                *(call("count", arguments=[number]) for number in range(1, 6)),
                *(call("raise") for _ in range(3)),
                call("error"),
                call("fail", arguments=["call_died"]),
                call("fail", arguments=["made_up_by_a_host"]),
                call("echo", host="nowhere"),
            ]
            ids = await dispatcher.submit_many(calls, "test")
            await asyncio.gather(*map(dispatcher.result, ids))
            held = [
                await dispatcher.submit(call("hang", arguments=[number], queue={"q": 1}), "test") for number in range(3)
            ]
            await eventually(lambda: len([c for c in host.connections if b"hang" in b"".join(c.received)]))
            assert await dispatcher.cancel(held[2])
            _, samples = await scraped(monitor)
            stored = [job async for job in dispatcher.list_jobs(ended=True)]
            assert await dispatcher.prune(min_age=0.000001, trust_clock=True) == len(calls) + 1
            _, later = await scraped(monitor)
    assert value(samples, "harp_jobs_submitted_total") == len(stored) == len(calls) + 3
    assert value(samples, "harp_jobs_stored") == len(stored)
    assert value(samples, "harp_jobs_started_total") == sum(job.started is not None for job in stored)
    by_state = Counter(job.state.value for job in stored)
    ended = {state: number for state, number in by_state.items() if state not in ("queued", "running")}
    assert totals(samples, "harp_jobs_ended_total", "state") == ended
    assert totals(samples, "harp_jobs", "state") == {"queued": 1, "running": 1}
    assert {kind for kind in totals(samples, "harp_jobs_ended_total", "type") if kind} == {
        "auth_error", "call_died", "unknown_host", OTHER,
    }  # fmt: skip
    assert value(samples, "harp_records_total") == sum(job.records for job in stored) == 15
    assert value(samples, "harp_record_bytes_total") == 15
    assert value(samples, "harp_job_wait_seconds_count") == value(samples, "harp_jobs_started_total")
    runs = totals(samples, "harp_job_run_seconds_count", "procedure")
    assert runs == {"echo": 5, "count": 5, "raise": 3, OTHER: 4}, "a name that no host has run is not shown"
    assert (value(samples, "harp_slots_held"), value(samples, "harp_calls")) == (1, 1)
    assert (value(samples, "harp_queues"), value(samples, "harp_queues_full")) == (1, 1)
    assert value(samples, "harp_queue_jobs", queue=queue, state="queued") == 1
    assert value(samples, "harp_queue_jobs", queue=queue, state="running") == 1
    assert value(samples, "harp_oldest_queued_seconds") > 0
    assert value(samples, "harp_host_up", host="web01") == value(samples, "harp_host_running", host="web01") == 1
    assert value(samples, "harp_host_queued", host="web01") == 1
    assert value(samples, "harp_hosts", state="up") == 1
    assert value(samples, "harp_host_certificate_expiry_timestamp_seconds", host="web01") > time.time()
    assert value(samples, "harp_host_connects_total", outcome="ok") >= len(calls) - 1
    commits = value(samples, "harp_store_commits_total")
    assert 0 < commits <= value(samples, "harp_store_commit_seconds_count"), "which is read a little later"
    assert value(later, "harp_pruned_jobs_total") == len(calls) + 1
    assert value(later, "harp_jobs_stored") == len(stored) - len(calls) - 1


async def test_metrics_of_a_second_dispatcher_continue_with_the_store(tmp_path: Path) -> None:
    with scripted_harpd(tmp_path) as host:
        async with monitored(tmp_path, host_line(host.port)) as (dispatcher, _):
            await result(dispatcher, procedure="echo")
        async with monitored(tmp_path, host_line(host.port)) as (dispatcher, monitor):
            await result(dispatcher, procedure="echo")
            _, samples = await scraped(monitor)
    assert (value(samples, "harp_jobs_submitted_total"), value(samples, "harp_jobs_stored")) == (1, 2)


async def test_labels_stay_few_after_many_invented_names(tmp_path: Path) -> None:
    many = 10_000
    async with monitored(tmp_path, host_line(1), start_within=60.0) as (dispatcher, monitor):
        first = await dispatcher.submit(call("first", queue={"q": 1}), "test")
        await until(dispatcher, first, lambda job: job.tried is not None, "the first attempt")
        before = len((await scraped(monitor))[1])
        await dispatcher.submit_many(
            [call(f"p{n}", host=f"host{n}", queue={"q": 1}) for n in range(many)], "test"
        )  # they wait for the first one
        _, samples = await scraped(monitor)
    assert value(samples, "harp_jobs", state="queued") > many
    assert len(samples) - before < 100, "only verbs of the store are new"
    values = {text for _, labels in samples for text in dict(labels).values()}
    assert not any(re.fullmatch(r"p\d+|host\d+", text) for text in values)


def test_procedures_that_a_host_has_run_are_bounded() -> None:
    metrics = Metrics()
    odd = ["x" * 101, "a\ud800", "a\ud801", "a\nb", "a\0"]
    for number in range(1000):
        name = f"procedure{number}" if number >= len(odd) else odd[number]
        job = Job(str(number), State.RUNNING, "h", name, raw([]), 1, 1, None, raw(None), 1.0, 2.0, None, None, 0)
        metrics.observe_changes([Change(ChangeKind.STARTED, job.id, number, 2.0, job)])
        metrics.observe_changes([Change(ChangeKind.ENDED, job.id, number, 3.0, end=Returned(raw(1)))])
    assert len(metrics.run_seconds) == 201
    assert metrics.run_seconds[OTHER].count == 800
    assert metrics.run_seconds.keys().isdisjoint(odd)


def test_each_documented_type_of_an_end_has_its_own_label() -> None:
    refusals = {"invalid_jobid", "invalid_filter", "invalid_cursor", "request_id_reused"}
    of_the_client = {"stop_failed", "stop_unknown"}
    assert read_error_types().keys() - refusals - of_the_client == END_TYPES


async def test_more_hosts_than_the_limit_have_no_label(tmp_path: Path) -> None:
    lines = [host_line(1, f"host{number}") for number in range(4)]
    async with monitored(tmp_path, *lines, max_hosts=3) as (_, monitor):
        _, samples = await scraped(monitor)
    assert value(samples, "harp_hosts", state="unknown") == 4
    assert not any("host" in dict(labels) for _, labels in samples)


async def test_a_host_that_cannot_be_reached_is_down(tmp_path: Path) -> None:
    async with monitored(tmp_path, host_line(1), start_within=60.0) as (dispatcher, monitor):
        job = await dispatcher.submit(call("echo"), "test")

        async def is_down() -> bool:
            _, samples = await scraped(monitor)
            has_waited = value(samples, "harp_jobs_requeued_total") > 0
            return has_waited and value(samples, "harp_hosts", state="down") == 1

        predicate: Callable[[], bool | Awaitable[bool]] = is_down
        await eventually(predicate)
        _, samples = await scraped(monitor)
        await dispatcher.cancel(job)
    assert ("harp_host_up", (("host", "web01"),)) in samples
    assert value(samples, "harp_host_up", host="web01") == 0
    assert value(samples, "harp_jobs_requeued_total") > 0
    assert value(samples, "harp_host_connects_total", outcome="network_error") > 0


async def test_scrapers_that_ask_at_once_get_one_scrape(tmp_path: Path) -> None:
    async with monitored(tmp_path, host_line(1)) as (_, monitor):
        texts = await asyncio.gather(*(monitor.scrape() for _ in range(20)))
        _, samples = await scraped(monitor)
    assert len(set(texts)) == 1
    assert value(samples, "harp_store_read_seconds_count", verb="read_gauges") == 2, "one for all, and the last one"


async def test_hostile_names_stay_in_their_label(tmp_path: Path) -> None:
    name = 'a"} 1\nharp_jobs 7\n\\'
    lines = [host_line(1, name)]
    async with monitored(tmp_path, *lines) as (_, monitor):
        names, samples = await scraped(monitor)
    assert "harp_jobs" in names
    assert value(samples, "harp_host_running", host=name) == 0
    assert ("harp_host_running", (("host", name),)) in samples


async def test_clients_that_wait_are_counted_while_they_do(tmp_path: Path) -> None:
    with scripted_harpd(tmp_path) as host:
        async with monitored(tmp_path, host_line(host.port)) as (dispatcher, monitor):
            job = await dispatcher.submit(call("hang"), "test")
            await eventually(lambda: host.requests, what="the call: before it, a stop would be confirmed")
            waiting = [dispatcher.result(job) for _ in range(3)]
            stream = dispatcher.stream(job, 0, None, True, lambda: None)
            _, during = await scraped(monitor)
            stream.close()
            assert await dispatcher.cancel(job)
            await asyncio.gather(*waiting, dispatcher.wait_stopped(job))
            _, after = await scraped(monitor)
    assert totals(during, "harp_streams", "kind") == {"wait": 3, "records": 1, "events": 0}
    assert totals(after, "harp_streams", "kind") == {"wait": 0, "records": 0, "events": 0}
    assert value(after, "harp_jobs_ended_total", state="cancelled", type="") == 1
    assert value(after, "harp_job_stops_total", stop="unknown") == 1, "the host is a legacy one"


async def test_failed_writes_are_errors_of_their_verb(tmp_path: Path) -> None:
    async with monitored(tmp_path, host_line(1)) as (dispatcher, monitor):
        with closing(sqlite3.connect(dispatcher.store.path)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StorageError, match="locked"):
                await dispatcher.submit(call("echo"), "test")
            other.rollback()
        _, samples = await scraped(monitor)
    assert value(samples, "harp_store_errors_total", verb="add_job") == 1
    assert value(samples, "harp_jobs_submitted_total") == 0
