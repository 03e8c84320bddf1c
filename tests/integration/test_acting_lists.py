"""The dispatcher's lists, counts and re-runs for clients under rules: nobody learns of a job that it may not list."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Failed
from harp.protocol.json_text import Raw
from harp.protocol.schema import ProtocolError
from harpcaller.access import AccessDenied
from harpcaller.access.client import LOCAL_ADMINISTRATOR, Client
from harpcaller.access.policy import Action
from harpcaller.acting import ActingAs
from harpcaller.cursors import InvalidCursor
from harpcaller.dispatcher import Dispatcher
from harpcaller.model.job_filters import JobFilter, Span
from harpcaller.model.jobs import State
from harpcaller.secret_arguments import add_key
from harpcaller.store import CannotRerun, RequestIDReused, UnknownJob
from support.dispatcher import call, raw, running
from support.jobs import new_id

RULES = """
[[rule]]
who = ["token:limited"]
allow = ["call", "read", "list"]
procedures = ["deploy"]

[[rule]]
who = ["token:shop", "token:other", "anonymous@legacy"]
allow = ["call", "read", "cancel", "list"]

[[rule]]
who = ["token:web"]
allow = ["read", "list"]
jobs = "any"
hosts = ["web*"]

[[rule]]
who = ["token:reader"]
allow = ["read", "list"]
jobs = "any"

[[rule]]
who = ["token:ops"]
allow = ["call", "read", "cancel", "list", "manage"]
jobs = "any"

[[rule]]
who = ["token:caller"]
allow = ["call"]
"""


def token(name: str) -> Client:
    return Client((f"token:{name}", "anonymous@l"), "l", "192.0.2.1:7", authenticated=True)


SHOP, OTHER, OPS, READER, WEB, CALLER, LIMITED = map(
    token, ("shop", "other", "ops", "reader", "web", "caller", "limited")
)


@pytest.fixture
async def dispatcher(tmp_path: Path) -> AsyncIterator[Dispatcher]:
    """Run a dispatcher that knows no hosts, so that every job ends at once."""
    access_file, key_file = tmp_path / "access.toml", tmp_path / "keys"
    access_file.write_text(RULES)
    add_key(key_file)
    async with running(tmp_path, access_file=access_file, secrets_key_file=key_file) as dispatcher:
        yield dispatcher


async def submit(dispatcher: Dispatcher, client: Client, *procedures: str, **options: Any) -> list[str]:
    """Submit jobs, and wait until they have ended."""
    acting = ActingAs(dispatcher, client)
    ids = [await acting.submit(call(procedure, **options)) for procedure in procedures]
    await asyncio.gather(*(dispatcher.result(job_id) for job_id in ids))
    return ids


async def ids_of(acting: ActingAs, wanted: JobFilter = JobFilter()) -> list[str]:  # noqa: B008 - it is frozen
    return [summary.id for summary in (await acting.find_jobs(wanted, newest_first=False, limit=500)).summaries]


async def test_lists_and_counts_have_the_jobs_that_a_client_may_list(dispatcher: Dispatcher) -> None:
    shop = await submit(dispatcher, SHOP, "deploy", "backup", "backup")
    other = await submit(dispatcher, OTHER, "deploy", "restart", host="db01")
    visible = {
        SHOP: shop,
        OTHER: other,
        OPS: shop + other,
        READER: shop + other,
        WEB: shop,
        LIMITED: [],
        LOCAL_ADMINISTRATOR: shop + other,
    }
    procedures = dict(zip(shop + other, ["deploy", "backup", "backup", "deploy", "restart"], strict=True))
    for client, jobs in visible.items():
        acting = ActingAs(dispatcher, client)
        page = await acting.find_jobs(JobFilter())
        assert [summary.id for summary in page.summaries] == jobs[::-1]
        assert (page.examined, page.complete, page.next) == (len(jobs), True, None), "others are not counted"
        failed = JobFilter(states=frozenset({State.FAILED}), host_pattern="*")
        assert await ids_of(acting, failed) == jobs
        counts = await acting.count_jobs(failed, ["state", "procedure", "host"])
        expected = Counter(procedures[job] for job in jobs)
        assert {each.value: each.count for each in counts.by["procedure"]} == expected
        assert sum(each.count for each in counts.by["state"]) == len(jobs)
        statistics = await acting.job_statistics(0.0, 4e9, 4e9)
        assert [(each.submitted, each.failed) for each in statistics.buckets] == [(len(jobs), len(jobs))]
        assert [each.id for each in await acting.get_summaries([*shop, *other, new_id()])] == jobs
    denied = ActingAs(dispatcher, CALLER)
    requests: list[Awaitable[Any]] = [
        denied.find_jobs(JobFilter()),
        denied.count_jobs(JobFilter(), ["state"]),
        denied.job_statistics(0.0, 10.0, 1.0),
        denied.get_summaries(shop),
    ]
    for request in requests:
        with pytest.raises(AccessDenied):
            await request


async def test_an_owner_looks_at_own_jobs_only_whatever_the_filter(dispatcher: Dispatcher) -> None:
    """So neither the number of examined jobs nor the time tells how many jobs others have."""
    [own] = await submit(dispatcher, SHOP, "deploy")
    others = await submit(dispatcher, OTHER, *(["deploy"] * 20))
    acting = ActingAs(dispatcher, SHOP)
    for wanted in (
        JobFilter(procedures=("deploy",)),
        JobFilter(owners=("token:other",)),
        JobFilter(hosts=("web01",), states=frozenset({State.FAILED})),
        JobFilter(id_start=others[0]),
        JobFilter(submitted=Span(0.0, 4e9), ended=Span(0.0, 4e9)),
        JobFilter(info="null"),
    ):
        page = await acting.find_jobs(wanted)
        assert {summary.id for summary in page.summaries} <= {own}
        assert (page.examined, page.complete) == (1, True)


async def test_summaries_of_one_job_need_the_right_that_is_asked_for(dispatcher: Dispatcher) -> None:
    [job_id] = await submit(dispatcher, SHOP, "deploy")
    for client, is_found in ((SHOP, True), (OPS, True), (OTHER, False), (CALLER, False)):
        found = await ActingAs(dispatcher, client).get_summaries([job_id], Action.READ)
        assert [summary.id for summary in found] == [job_id] * is_found


async def test_rights_are_what_the_client_may_do_with_a_job_now(dispatcher: Dispatcher) -> None:
    await submit(dispatcher, SHOP, "backup")
    expected = {
        SHOP: ("read", "rerun"),
        OPS: ("read", "rerun"),
        READER: ("read",),
        WEB: ("read",),
        LOCAL_ADMINISTRATOR: ("read", "rerun"),
    }
    for client, rights in expected.items():
        acting = ActingAs(dispatcher, client)
        [summary] = (await acting.find_jobs(JobFilter())).summaries
        assert acting.rights(summary) == rights


async def test_a_cursor_belongs_to_one_list_and_tells_no_number(dispatcher: Dispatcher) -> None:
    jobs = await submit(dispatcher, SHOP, *(["deploy"] * 5))
    acting, wanted = ActingAs(dispatcher, SHOP), JobFilter(procedures=("deploy",))
    page = await acting.find_jobs(wanted, limit=2)
    again = await acting.find_jobs(wanted, limit=2)
    assert page.next is not None
    assert again.next is not None
    assert page.next != again.next, "it is encrypted"
    second = await acting.find_jobs(wanted, limit=2, cursor=again.next)
    assert [summary.id for summary in [*page.summaries, *second.summaries]] == jobs[:0:-1]
    other = await ActingAs(dispatcher, OTHER).find_jobs(wanted, cursor=page.next)
    assert other.summaries == []
    # Not the last character, of which four bits mean nothing.
    changed = page.next[:-2] + ("A" if page.next[-2] != "A" else "B") + page.next[-1]
    with pytest.raises(InvalidCursor):
        await acting.find_jobs(JobFilter(), cursor=page.next)
    with pytest.raises(InvalidCursor):
        await acting.find_jobs(wanted, newest_first=False, cursor=page.next)
    for cursor in (changed, page.next + "AAAA", "", "\u00e4", "x" * 1000):
        with pytest.raises(InvalidCursor):
            await acting.find_jobs(wanted, cursor=cursor)


# Re-runs.


async def test_rerun_copies_payloads_to_the_byte_also_long_ones(dispatcher: Dispatcher) -> None:
    for size in (10, 16 * 1024 * 1024):
        arguments = Raw(b'{"z": 1.50, "n": 1970670598291982290, "a":"\\u00e4\\ud800' + b"x" * size + b'"}')
        [old] = await submit(dispatcher, SHOP, "deploy", queue={"q": 1.0}, timeout=7, max_exec_time=9)
        options = {"arguments": arguments, "info": Raw(b'{"b":1,  "a":' + b" " * size + b"2}")}
        first = await ActingAs(dispatcher, SHOP).rerun(old, options)
        again = await ActingAs(dispatcher, OPS).rerun(first)
        job = await dispatcher.get_job(again)
        assert (job.arguments, job.info) == (options["arguments"], options["info"])
        assert (job.host, job.procedure, job.queue) == ("web01", "deploy", raw({"q": 1.0}))
        assert (job.timeout, job.max_exec_time, job.owner, job.rerun_of) == (7.0, 9.0, "token:ops", first)
        [summary] = await ActingAs(dispatcher, OPS).get_summaries([again])
        assert summary.rerun_of == first
        assert await ids_of(ActingAs(dispatcher, OPS), JobFilter(rerun_of=first)) == [again]


async def test_rerun_needs_the_rights_to_read_the_job_and_to_call(dispatcher: Dispatcher) -> None:
    [job_id] = await submit(dispatcher, SHOP, "backup")
    for client, error in ((OTHER, UnknownJob), (CALLER, UnknownJob), (READER, AccessDenied), (WEB, AccessDenied)):
        with pytest.raises(error):
            await ActingAs(dispatcher, client).rerun(job_id)
    with pytest.raises(UnknownJob):
        await ActingAs(dispatcher, OPS).rerun(new_id())
    [own] = await submit(dispatcher, LIMITED, "deploy")
    with pytest.raises(AccessDenied):
        await ActingAs(dispatcher, LIMITED).rerun(own, {"procedure": "backup"})
    assert await ids_of(ActingAs(dispatcher, OPS)) == [job_id, own]


async def test_rerun_changes_attributes_of_the_call(dispatcher: Dispatcher) -> None:
    [job_id] = await submit(dispatcher, SHOP, "deploy", arguments=[1], queue={"q": 1})
    acting = ActingAs(dispatcher, SHOP)
    again = await acting.rerun(job_id, {"host": "web02", "arguments": raw([2]), "queue": None})
    job = await dispatcher.get_job(again)
    assert (job.host, job.arguments, job.queue, job.rerun_of) == ("web02", raw([2]), None, job_id)
    for changes in ({"hosts": "web02"}, {"request_id": "x"}, {"timeout": -1}, {"host": ""}, {"arguments": Raw(b"1")}):
        with pytest.raises(ProtocolError):
            await acting.rerun(job_id, changes)


async def test_reruns_with_one_request_id_are_one_job(dispatcher: Dispatcher) -> None:
    first, second = await submit(dispatcher, SHOP, "deploy", "deploy")
    acting = ActingAs(dispatcher, SHOP)
    again = [await acting.rerun(first, request_id="r") for _ in range(3)]
    assert len(set(again)) == 1
    with pytest.raises(RequestIDReused):
        await acting.rerun(second, request_id="r")
    with pytest.raises(RequestIDReused):
        await acting.submit(call("deploy", request_id="r"))


async def test_rerun_of_a_job_with_secrets_needs_all_arguments(dispatcher: Dispatcher) -> None:
    arguments = {"password": "s3cret", "user": "u"}
    [job_id] = await submit(dispatcher, SHOP, "deploy", arguments=arguments, secrets=("/password",))
    acting = ActingAs(dispatcher, SHOP)
    with pytest.raises(CannotRerun, match="secret"):
        await acting.rerun(job_id, {"host": "web02"})
    again = await acting.rerun(job_id, {"arguments": raw(arguments), "secrets": ("/password",)})
    assert "s3cret" not in (await dispatcher.get_job(again)).arguments.decode()


async def test_a_refused_call_cannot_be_rerun(dispatcher: Dispatcher) -> None:
    legacy = Client(("anonymous@legacy",), "legacy", "192.0.2.2:7")
    stranger = Client(("anonymous@stranger",), "stranger", "192.0.2.2:7")
    [refused] = await submit(dispatcher, stranger, "deploy")
    end = (await dispatcher.get_job(refused)).end
    assert isinstance(end, Failed)
    assert end.type == "access_denied"
    for client in (stranger, OPS):
        with pytest.raises(CannotRerun, match="refused"):
            await ActingAs(dispatcher, client).rerun(refused)
    [summary] = await ActingAs(dispatcher, OPS).get_summaries([refused])
    assert ActingAs(dispatcher, OPS).rights(summary) == ("read",)
    [failed] = await submit(dispatcher, legacy, "deploy")
    assert await ActingAs(dispatcher, legacy).rerun(failed) != failed
