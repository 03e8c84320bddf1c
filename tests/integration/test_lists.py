"""Lists of a real system: `HarpCaller.jobs`, `hosts`, `queues`, `count_jobs`, and the commands of `harp` for people."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import harp
from support.shells import Shell, shell_of
from support.system import System, running

PROGRAM = "import sys; from harp.cli import main; sys.exit(main())"

PROCEDURES = """
import time
from harpd.proc import Result, procedure, streaming_procedure

@procedure
def clear_cache(site):
    return {"site": site}

@streaming_procedure
def backup(database):
    for number, table in enumerate(("customers", "invoices", "orders")):
        if database == "orders" and table == "orders":
            yield {"table": table, "error": "write failed", "device": "/dev/sdb1"}
            raise OSError(28, "No space left on device: '/backup/orders.dump'")
        yield {"table": table, "bytes": 1000 * number}
    yield Result("done")

@procedure
def wait(seconds):
    time.sleep(seconds)

@procedure
def hostile():
    raise ValueError("\\x1b[2J\\x1b]0;owned\\x07 \\u202e[bold]evil[/bold]\\r\\nsecond line\\tend")
"""

ACCESS = """
[[rule]]
who = ["anonymous@*"]
allow = ["call", "read", "cancel", "list"]
jobs = "any"
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("system")
    access_file = directory / "access.toml"
    access_file.write_text(ACCESS)
    settings = {"access_file": str(access_file), "audit_file": str(directory / "audit.jsonl"), "audit_reads": True}
    names = ("web01", "db01", "db02", "db03")
    with running(directory, PROCEDURES, dispatcher=settings, names=names) as found:
        rpc = found.rpc
        calls = [harp.Call("web01", "clear_cache", (site,)) for site in ("blog", "shop", "docs")]
        calls += [
            harp.Call(host, "backup", (database,), queue={"backup": host}, info={"cron": "nightly"})
            for host, database in (("db01", "crm"), ("db02", "orders"), ("db03", "wiki"))
        ]
        calls += [harp.Call("web01", "hostile", ()), harp.Call("nowhere", "backup", ("crm",))]
        for job in rpc.submit_many(calls):
            job.result(wait=True)
        yield found


@pytest.fixture(params=["sync", "aio"])
def shell(request: pytest.FixtureRequest) -> Iterator[Shell]:
    with shell_of(request.param) as found:
        yield found


def caller(system: System, shell: Shell) -> Any:
    return shell.caller_at("127.0.0.1", system.dispatcher.port)


def environment(system: System, **more: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HARP_", "NO_COLOR"))}
    return {**inherited, "HARP_DISPATCHER": f"127.0.0.1:{system.dispatcher.port}", **more}


def run(system: System, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(
        command, env=environment(system, **more), capture_output=True, text=True, timeout=60, check=False
    )


def lines(system: System, *arguments: str) -> list[dict[str, Any]]:
    done = run(system, *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# The client library.


def test_jobs_match_a_filter(system: System, shell: Shell) -> None:
    rpc = caller(system, shell)
    bad = rpc.jobs("state:bad procedure:backup").all()
    assert [(job.host, job.state, job.end_type) for job in bad] == [
        ("nowhere", "failed", "unknown_host"),
        ("db02", "raised", "OSError"),
    ]
    (failed,) = rpc.jobs("backup host:db02").all()
    assert failed.end_message.startswith("[Errno 28] No space left on device")
    assert json.loads(failed.queue) == {"backup": "db02"}
    assert failed.submitted <= failed.started <= failed.ended
    assert (failed.records, failed.arguments_preview, failed.info_preview) == (3, '["orders"]', '{"cron":"nightly"}')
    assert failed.owner.startswith("anonymous@127.0.0.1:")
    assert set(failed.can) >= {"read", "rerun"}
    assert [job.id for job in rpc.jobs(f"queue:{failed.queue_id}").all()] == [failed.id]


def test_pages_continue_by_cursor_in_both_orders(system: System, shell: Shell) -> None:
    rpc = caller(system, shell)
    wanted = "procedure:clear_cache,backup,hostile"
    everything = [job.id for job in rpc.jobs(wanted).all()]
    assert len(everything) == 8
    for oldest_first in (False, True):
        found: list[str] = []
        cursor = None
        while True:
            part = rpc.jobs(wanted, oldest_first=oldest_first, limit=3, cursor=cursor)
            found += [job.id for job in part.all()]
            cursor = part.cursor
            if cursor is None:
                break
        assert found == (everything[::-1] if oldest_first else everything)


def test_cursor_of_another_list_is_refused(system: System, shell: Shell) -> None:
    rpc = caller(system, shell)
    part = rpc.jobs("state:bad", limit=1)
    part.all()
    for other in ({"filter": ""}, {"filter": "state:bad", "oldest_first": True}):
        with pytest.raises(harp.HarpException, match="expected a cursor of this filter and order"):
            rpc.jobs(**other, cursor=part.cursor).all()


def test_invalid_filter_names_what_was_meant(system: System, shell: Shell) -> None:
    with pytest.raises(harp.HarpException, match="did you mean state") as caught:
        caller(system, shell).jobs("stat:bad").all()
    assert type(caught.value) is harp.HarpException


def test_counts_are_by_each_key(system: System, shell: Shell) -> None:
    counts = caller(system, shell).count_jobs("procedure:backup", ["state", "host"])
    assert {each.value: each.count for each in counts.by["state"]} == {"returned": 2, "raised": 1, "failed": 1}
    assert {each.value: each.count for each in counts.by["host"]} == {"db01": 1, "db02": 1, "db03": 1, "nowhere": 1}
    assert counts.exact


def test_hosts_and_queues_are_listed(system: System, shell: Shell) -> None:
    rpc = caller(system, shell)
    hosts = rpc.hosts().all()
    assert [host.name for host in hosts] == ["db01", "db02", "db03", "web01"]
    assert {host.port for host in hosts} == {system.harpd.port}
    first = rpc.hosts(limit=2)
    assert [host.name for host in first.all()] == ["db01", "db02"]
    assert [host.name for host in rpc.hosts(cursor=first.cursor).all()] == ["db03", "web01"]
    assert [host.name for host in rpc.hosts("WEB").all()] == ["web01"]
    jobs = [rpc.host("web01", queue={"slow": 1}).wait(30) for _ in range(2)]
    try:
        (queue,) = rpc.queues("slow").all()
        assert (json.loads(queue.name), queue.concurrency, queue.running, queue.queued) == ({"slow": 1}, 1, 1, 1)
        assert {job.id for job in rpc.jobs(f"queue:{queue.id} state:open").all()} == {job.id() for job in jobs}
    finally:
        for job in jobs:
            job.cancel(wait=True)
    assert rpc.queues("slow").all() == []


def test_lists_are_audited(system: System) -> None:
    system.rpc.jobs("state:bad").all()
    file = system.dispatcher.directory.parent / "audit.jsonl"
    found = [entry for entry in map(json.loads, file.read_text().splitlines()) if entry["action"] == "list"]
    assert {"target": "jobs", "filter": "state:raised,failed", "decision": "allowed"}.items() <= found[-1].items()
