"""The dispatcher's verbs for clients under rules: each kind of request, and clients with and without the right."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.dispatcher import Continue
from harp.protocol.ends import Cancelled, End, Failed, Returned
from harp.protocol.json_text import Raw, loads
from harpcaller.access import AccessDenied, RateLimited
from harpcaller.access.client import LOCAL_ADMINISTRATOR, Client
from harpcaller.access.enforcement import Rates
from harpcaller.access.rules import Rate
from harpcaller.acting import ActingAs
from harpcaller.config import Config
from harpcaller.dispatcher import Dispatcher
from harpcaller.model.jobs import State, StopState
from harpcaller.notifier import RecordBatch
from harpcaller.store import RequestIDReused, UnknownJob
from support.deadline import eventually
from support.dispatcher import call, host_line, raw, running
from support.jobs import new_id
from support.scripted import connection_of, scripted_harpd

RULES = """
[[rule]]
who = ["token:limited"]
allow = ["call", "read", "cancel"]
running = 1
queued = 2
bytes = 100
max_exec_time = 7
procedures = ["hang", "echo"]

[[rule]]
who = ["token:slow", "anonymous@slow"]
allow = ["call", "read"]
rate = "3/h"

[[rule]]
who = ["token:shop", "token:other", "token:limited", "anonymous@legacy", "anonymous@queued"]
allow = ["call", "read", "cancel", "list"]
procedures = ["hang", "echo", "feed", "count"]
queued = 3

[[rule]]
who = ["token:reader"]
allow = ["read"]
jobs = "any"

[[rule]]
who = ["token:ops"]
allow = ["call", "read", "cancel", "list", "manage"]
jobs = "any"
"""


def token(name: str) -> Client:
    return Client((f"token:{name}", "anonymous@l"), "l", "192.0.2.1:7", authenticated=True)


def anonymous(listener: str) -> Client:
    return Client((f"anonymous@{listener}",), listener, "192.0.2.2:7")


SHOP, OTHER, OPS, READER, NOBODY, LIMITED, SLOW = map(
    token, ("shop", "other", "ops", "reader", "nobody", "limited", "slow")
)
LEGACY, STRANGER = anonymous("legacy"), anonymous("stranger")
KNOWN, UNKNOWN = "known", "unknown"


def rules(directory: Path, text: str = RULES) -> Path:
    file = directory / "access.toml"
    file.write_text(text)
    return file


def under_rules(directory: Path, *lines: str, **settings: Any) -> Any:
    return running(directory, *lines, access_file=rules(directory), **settings)


async def stream_items(acting: ActingAs, job_id: str, wait: bool) -> list[Any]:
    """Return the items of a stream, until it ends."""
    ready = asyncio.Event()
    stream = acting.stream(job_id, 0, None, wait, ready.set)
    items: list[Any] = []
    try:
        while True:
            ready.clear()
            item = stream.next_item()
            if item is None:
                await ready.wait()
                continue
            items.append(item)
            if not isinstance(item, RecordBatch):
                return items
    finally:
        stream.close()


async def end_of(acting: ActingAs, job_id: str) -> End:
    return await asyncio.wait_for(acting.result(job_id), 10)


async def is_running(dispatcher: Dispatcher, job_id: str) -> None:
    async def looked() -> bool:
        return (await dispatcher.get_job(job_id)).state is State.RUNNING

    predicate: Callable[[], bool | Awaitable[bool]] = looked
    await eventually(predicate, what="a running job")


# Each request on a job.


READS: dict[str, Callable[[ActingAs, str], Awaitable[Any]]] = {
    "get_job": lambda acting, job: acting.get_job(job),
    "details": lambda acting, job: acting.details(job),
    "result": end_of,
    "follow": lambda acting, job: stream_items(acting, job, wait=True),
    "read": lambda acting, job: stream_items(acting, job, wait=False),
}

RIGHTS = [
    (SHOP, KNOWN),
    (OTHER, UNKNOWN),
    (READER, KNOWN),
    (OPS, KNOWN),
    (NOBODY, UNKNOWN),
    (LEGACY, UNKNOWN),
    (STRANGER, UNKNOWN),
    (LOCAL_ADMINISTRATOR, KNOWN),
]


@pytest.mark.parametrize("verb", READS)
async def test_reading_a_job_needs_the_right_to_it(tmp_path: Path, verb: str) -> None:
    read = READS[verb]
    with scripted_harpd(tmp_path) as peer:
        async with under_rules(tmp_path, host_line(peer.port)) as dispatcher:
            ended = await ActingAs(dispatcher, SHOP).submit(call("echo"))
            await end_of(ActingAs(dispatcher, SHOP), ended)
            hanging = await ActingAs(dispatcher, SHOP).submit(call("hang"))
            await is_running(dispatcher, hanging)
            for job in (ended, hanging):
                for client, expected in RIGHTS:
                    reading = asyncio.ensure_future(read(ActingAs(dispatcher, client), job))
                    done, _ = await asyncio.wait([reading], timeout=1.0 if job == ended or expected is UNKNOWN else 0.1)
                    if expected is UNKNOWN:
                        assert done, f"{client} waits"
                        with pytest.raises(UnknownJob, match=job):
                            reading.result()
                    elif done:
                        assert reading.result() is not None
                    else:
                        assert verb in ("result", "follow"), client
                        assert job == hanging
                        reading.cancel()
            await eventually(lambda: not dispatcher.access.waits, what="no request that waits")
            await dispatcher.cancel(hanging)


async def test_cancelling_a_job_needs_the_right_to_it(tmp_path: Path) -> None:
    with scripted_harpd(tmp_path) as peer:
        async with under_rules(tmp_path, host_line(peer.port)) as dispatcher:
            hanging = await ActingAs(dispatcher, SHOP).submit(call("hang"))
            # Before its request is sent, a stop would be confirmed.
            await eventually(lambda: "hang" in [one["procedure"] for one in peer.requests], what="the call")
            for client in (OTHER, READER, NOBODY, LEGACY, STRANGER):
                acting = ActingAs(dispatcher, client)
                assert await acting.cancel(hanging) is await acting.cancel(new_id()) is False
                with pytest.raises(UnknownJob, match=hanging):
                    await acting.wait_stopped(hanging)
                assert await acting.cancel_queue(raw({"q": 1})) == 0
            assert (await dispatcher.get_job(hanging)).state is State.RUNNING
            assert await ActingAs(dispatcher, SHOP).cancel(hanging)
            assert (await ActingAs(dispatcher, SHOP).wait_stopped(hanging)).job.stop is StopState.UNKNOWN
            second = await ActingAs(dispatcher, SHOP).submit(call("hang"))
            assert await ActingAs(dispatcher, OPS).cancel(second)


async def test_denied_job_is_like_an_unknown_one_also_in_time(tmp_path: Path) -> None:
    """The look-ups and the decision take place within the time that each such reply takes at least."""
    argument = "x" * 60_000
    text = RULES + '\n[[rule]]\nwho = ["*"]\nallow = ["read"]\njobs = "any"\narguments = {a = {enum = ["y"]}}\n'
    async with running(tmp_path, access_file=rules(tmp_path, text)) as dispatcher:
        job = await dispatcher.submit(call("echo", arguments={"a": argument}), "test")
        await dispatcher.result(job)
        acting, times = ActingAs(dispatcher, OTHER), dict[str, list[float]]()
        unknown = new_id()
        for _ in range(60):
            for each in (job, unknown):
                began = time.monotonic()
                with pytest.raises(UnknownJob, match=each):
                    await acting.get_job(each)
                times.setdefault(each, []).append(time.monotonic() - began)
        assert min(times[job]) >= 0.005
        assert min(times[unknown]) >= 0.005
        # The shortest times, because those do not depend on how busy the machine is.
        assert abs(min(times[job]) - min(times[unknown])) < 0.002


# Submission.


async def test_denied_call_of_an_authenticated_client_is_refused(tmp_path: Path) -> None:
    async with under_rules(tmp_path) as dispatcher:
        for client, procedure in ((NOBODY, "echo"), (SHOP, "reboot"), (READER, "echo")):
            with pytest.raises(AccessDenied, match=f"^{client.owner} may not call {procedure} on host web01$"):
                await ActingAs(dispatcher, client).submit(call(procedure))
        assert [job async for job in dispatcher.list_jobs(ended=True)] == []


async def test_denied_call_of_a_legacy_client_is_a_job_that_has_ended(tmp_path: Path) -> None:
    with scripted_harpd(tmp_path) as peer:
        async with under_rules(tmp_path, host_line(peer.port)) as dispatcher:
            denied = Failed("access_denied", "anonymous@legacy may not call reboot on host web01")
            request = call("reboot", arguments=[1], request_id="r")
            job = await ActingAs(dispatcher, LEGACY).submit(request)
            assert await end_of(ActingAs(dispatcher, LEGACY), job) == denied
            stored = await dispatcher.get_job(job)
            assert (stored.started, stored.owner, stored.arguments) == (None, "anonymous@legacy", b"[1]")
            assert await ActingAs(dispatcher, LEGACY).submit(request) != job, "after a change of the rules it may run"
            assert peer.connections == []
            # This client has no rule, also none to read its jobs.
            job = await ActingAs(dispatcher, STRANGER).submit(call("echo"))
            denied = Failed("access_denied", "anonymous@stranger may not call echo on host web01")
            for verb, read in READS.items():
                found = await read(ActingAs(dispatcher, STRANGER), job)
                if verb == "details":
                    assert found["why"] == f"it failed: access_denied: {denied.message}"
                else:
                    assert {"get_job": getattr(found, "end", None), "result": found}.get(verb, found) in (
                        denied,
                        [denied],
                    )
                with pytest.raises(UnknownJob):
                    await read(ActingAs(dispatcher, LEGACY), job)


async def test_refused_calls_do_not_fill_the_disk(tmp_path: Path) -> None:
    async with under_rules(tmp_path) as dispatcher:
        acting = ActingAs(dispatcher, STRANGER)
        with pytest.raises(AccessDenied):
            await acting.submit(call("echo", arguments=["x" * 16_383]))
        ids = await asyncio.gather(*(acting.submit(call("echo")) for _ in range(1000)))
        with pytest.raises(AccessDenied):
            await acting.submit(call("echo"))
        assert {job.id async for job in dispatcher.list_jobs(ended=True)} == set(ids)
        await ActingAs(dispatcher, LEGACY).submit(call("reboot"))  # another owner has a limit of its own


async def test_many_calls_are_submitted_all_or_none(tmp_path: Path) -> None:
    async with under_rules(tmp_path) as dispatcher:
        for client in (SHOP, LEGACY):
            acting = ActingAs(dispatcher, client)
            with pytest.raises(AccessDenied, match=r"^submit_many\[1\]: .* may not call reboot on host web01$"):
                await acting.submit_many([call("echo"), call("reboot"), call("echo")])
            with pytest.raises(RateLimited, match=r"0 jobs of .* are queued; the limit is 3"):
                await acting.submit_many([call("echo")] * 4)
        assert [job async for job in dispatcher.list_jobs(ended=True)] == []
        ids = await ActingAs(dispatcher, SHOP).submit_many([call("echo")] * 3)
        assert [(await dispatcher.get_job(job)).owner for job in ids] == ["token:shop"] * 3


async def test_request_ids_of_two_owners_do_not_meet(tmp_path: Path) -> None:
    async def submit(client: Client, procedure: str) -> str:
        return await ActingAs(dispatcher, client).submit(call(procedure, request_id="r"))

    async with under_rules(tmp_path) as dispatcher:
        first, second = await submit(SHOP, "echo"), await submit(OTHER, "count")
        assert first != second
    async with under_rules(tmp_path) as dispatcher:
        assert (await submit(SHOP, "echo"), await submit(OTHER, "count")) == (first, second)
        for client, procedure, own, foreign in ((SHOP, "count", first, second), (OTHER, "echo", second, first)):
            with pytest.raises(RequestIDReused, match=own) as refused:
                await submit(client, procedure)
            assert foreign not in str(refused.value)


async def test_request_id_from_the_time_without_rules_names_no_job(tmp_path: Path) -> None:
    async with running(tmp_path) as dispatcher:
        first = await ActingAs(dispatcher, LEGACY).submit(call("echo", request_id="r"))
        assert await ActingAs(dispatcher, SHOP).submit(call("echo", request_id="r")) == first
    async with under_rules(tmp_path) as dispatcher:
        assert await ActingAs(dispatcher, LEGACY).submit(call("echo", request_id="r")) == first
        with pytest.raises(RequestIDReused) as refused:
            await ActingAs(dispatcher, SHOP).submit(call("count", request_id="r"))
        assert first not in str(refused.value)


# What a client sees of others.


async def test_full_queue_shows_no_ids_of_other_owners(tmp_path: Path) -> None:
    queue: dict[str, Any] = {"queue": {"q": 1}, "concurrency": 2}
    with scripted_harpd(tmp_path) as peer:
        async with under_rules(tmp_path, host_line(peer.port)) as dispatcher:
            foreign = await ActingAs(dispatcher, OTHER).submit(call("hang", **queue))
            own = await ActingAs(dispatcher, SHOP).submit(call("hang", **queue))
            waiting = await ActingAs(dispatcher, SHOP).submit(call("hang", **queue))
            await is_running(dispatcher, own)
            details = await ActingAs(dispatcher, SHOP).details(waiting)
            assert (
                details["why"]
                == f'queue {{"q": 1}} is full (2 of 2: {own}, 1 of other owners), position 1 of its owner\'s jobs'
            )
            assert foreign not in str(details)
            for client in (OPS, LOCAL_ADMINISTRATOR):
                why = (await ActingAs(dispatcher, client).details(waiting))["why"]
                assert why == f'queue {{"q": 1}} is full (2 of 2: {foreign}, {own}), position 1'
            assert await ActingAs(dispatcher, OTHER).cancel_queue(Raw(b'{"q":1}')) == 1
            assert await ActingAs(dispatcher, SHOP).cancel_queue(Raw(b'{"q":1}')) == 2
            assert isinstance((await dispatcher.get_job(foreign)).end, Cancelled)


async def test_client_of_own_jobs_learns_nothing_of_the_jobs_of_others(tmp_path: Path) -> None:
    """No queue, number, position or address of other owners is in a list or in the details of an own job."""
    text = RULES.replace('procedures = ["hang", "echo", "feed", "count"]\nqueued = 3', "")
    hidden: dict[str, Any] = {"queue": {"secret": "merger"}}
    access_file = rules(tmp_path, text)
    with scripted_harpd(tmp_path) as peer:
        lines = host_line(peer.port), host_line(peer.port, "db")
        async with running(tmp_path, *lines, access_file=access_file, max_calls_per_host=1) as dispatcher:
            shop, other, ops = (ActingAs(dispatcher, client) for client in (SHOP, OTHER, OPS))
            holder = await other.submit(call("hang", queue={"q": 1}))
            await is_running(dispatcher, holder)
            for _ in range(3):
                await other.submit(call("hang", **hidden))
                await other.submit(call("hang", queue={"q": 1}))
                await other.submit(call("hang"))
            waiting = [await shop.submit(call("hang", queue={"q": 1})) for _ in range(2)]
            without_queue = await shop.submit(call("hang"))

            def shown(found: Any) -> list[tuple[bytes, int, int]]:
                return [(queue.name, queue.running, queue.queued) for queue in found]

            queues, _ = await shop.find_queues(50)
            assert shown(queues) == shown(await shop.list_queues()) == [(b'{"q": 1}', 0, 2)]
            assert queues[0].oldest == (await shop.get_job(waiting[0])).submitted
            everything, _ = await ops.find_queues(50)
            assert shown(everything) == [(b'{"q": 1}', 1, 5), (b'{"secret": "merger"}', 0, 3)]
            for queue, own in zip(everything, (queues[0], None), strict=True):
                assert await shop.get_queue(queue.id) == own
                assert await ops.get_queue(queue.id) == queue

            async def numbers(acting: ActingAs) -> dict[str, tuple[int, int]]:
                return {each.host.hostname: (each.running, each.queued) for each in await acting.describe_hosts()}

            assert await numbers(shop) == {"db": (0, 0), "web01": (0, 3)}
            assert await numbers(ops) == {"db": (0, 0), "web01": (1, 12)}
            for number, job in enumerate(waiting, 1):
                details = await shop.details(job)
                assert details["position"] == number
                full = f'queue {{"q": 1}} is full (1 of 1: 1 of other owners), position {number}'
                assert details["why"] == f"{full} of its owner's jobs"
                assert (await ops.details(job))["position"] == 3 + number
            details = await shop.details(without_queue)
            full = "host web01 is full (1 of 1 calls), position 1 of its owner's jobs"
            assert (details["position"], details["why"]) == (1, full)
            # An administrator cancels a job: its owner sees neither who that is nor from where.
            assert await ops.cancel(waiting[1])
            details = await shop.details(waiting[1])
            assert "192.0.2.1" not in str(details)
            assert OPS.owner not in str(details)
            assert details["why"].startswith("it was cancelled at ")
            assert (await ops.details(waiting[1]))["why"].startswith(f"it was cancelled by {OPS.owner} at ")


async def test_lists_have_what_the_client_may_list(tmp_path: Path) -> None:
    queue: dict[str, Any] = {"queue": {"q": 1}}
    with scripted_harpd(tmp_path) as peer:
        async with under_rules(tmp_path, host_line(peer.port), host_line(peer.port, "db")) as dispatcher:
            jobs: dict[str, list[str]] = {}
            for client in (SHOP, OTHER, SHOP, OTHER, SHOP):
                jobs.setdefault(client.owner, []).append(
                    await ActingAs(dispatcher, client).submit(call("hang", **queue))
                )

            async def listed(client: Client, **options: Any) -> list[str]:
                return [job.id async for job in ActingAs(dispatcher, client).list_jobs(**options)]

            assert await listed(SHOP) == jobs["token:shop"]
            assert await listed(SHOP, newest=2) == jobs["token:shop"][:0:-1]
            assert await listed(OTHER, host="web01") == jobs["token:other"]
            assert len(await listed(OPS)) == len(await listed(LOCAL_ADMINISTRATOR, queue=Raw(b'{"q":1}'))) == 5
            assert [found.queued for found in await ActingAs(dispatcher, OPS).list_queues()] == [4]
            assert await ActingAs(dispatcher, SHOP).list_queues() == [], "its rule needs a procedure"
            assert [found.hostname for found in ActingAs(dispatcher, OPS).list_hosts()] == ["db", "web01"]
            for client in (READER, NOBODY, STRANGER):
                acting = ActingAs(dispatcher, client)
                for attempt in (acting.list_queues, lambda client=client: listed(client)):
                    with pytest.raises(AccessDenied, match="does not have the right: list"):
                        await attempt()
                with pytest.raises(AccessDenied):
                    acting.list_hosts()


async def test_administration_needs_the_right_to_manage(tmp_path: Path) -> None:
    async with under_rules(tmp_path) as dispatcher:
        job = await ActingAs(dispatcher, SHOP).submit(call("echo"))
        await dispatcher.result(job)
        for client in (SHOP, READER, NOBODY, LEGACY):
            acting = ActingAs(dispatcher, client)
            for attempt in (acting.prune(), acting.refresh_hosts(), acting.compare_hosts(), acting.release_slot(job)):
                with pytest.raises(AccessDenied, match="does not have the right: manage"):
                    await attempt
        for client in (OPS, LOCAL_ADMINISTRATOR):
            assert await ActingAs(dispatcher, client).release_slot(job) is False
            assert await ActingAs(dispatcher, client).compare_hosts() == []
        assert await ActingAs(dispatcher, OPS).prune(0.0, trust_clock=True) == 1


# Limits.


async def test_running_jobs_of_an_owner_are_limited(tmp_path: Path) -> None:
    with scripted_harpd(tmp_path) as peer:
        async with under_rules(tmp_path, host_line(peer.port)) as dispatcher:
            first = await ActingAs(dispatcher, LIMITED).submit(call("hang", max_exec_time=60))
            await is_running(dispatcher, first)
            second = await ActingAs(dispatcher, LIMITED).submit(call("hang"))
            job = await dispatcher.get_job(first)
            assert (job.max_exec_time, job.max_running) == (7.0, 1)
            other = await ActingAs(dispatcher, SHOP).submit(call("echo"))
            assert await end_of(ActingAs(dispatcher, SHOP), other) == Returned(Raw(b"[]")), "others do not wait"
            details = await ActingAs(dispatcher, LIMITED).details(second)
            assert details["why"] == "its owner has reached its limit (1 of 1 jobs), position 1 of its owner's jobs"
            assert await ActingAs(dispatcher, LIMITED).cancel(first)
            await is_running(dispatcher, second)


async def test_records_and_results_are_limited_by_rule(tmp_path: Path) -> None:
    text = RULES.replace("bytes = 100\n", 'bytes = "4 KiB"\nmax_record_bytes = "2 KiB"\n')
    text = text.replace('"hang", "echo"', '"*"', 1)
    with scripted_harpd(tmp_path) as peer:
        async with running(tmp_path, host_line(peer.port), access_file=rules(tmp_path, text)) as dispatcher:
            limited = ActingAs(dispatcher, LIMITED)
            job = await limited.submit(call("repeat", arguments=[100, "x" * 98]))
            message = "the records and the result of the job exceed max_record_bytes of its access rule (2048 bytes)"
            assert await end_of(limited, job) == Failed("record_limit", message)
            stored = (await dispatcher.store.get_details(job)).record_bytes
            assert stored <= 2048
            short = await limited.submit(call("repeat", arguments=[10, "x" * 98]))
            assert await end_of(limited, short) == Returned(Raw(b"null"))
            long = await end_of(limited, await limited.submit(call("echo", arguments=["x" * 3000])))
            assert long == Failed("record_limit", message)
            shop = ActingAs(dispatcher, SHOP)
            assert isinstance(await end_of(shop, await shop.submit(call("echo", arguments=["x" * 3000]))), Returned)


async def test_queued_jobs_of_an_owner_are_limited_after_a_restart(tmp_path: Path) -> None:
    script = tmp_path / "hosts.sh"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    script.chmod(0o700)
    async with under_rules(tmp_path, host_db_script=script, hosts_file=None) as dispatcher:
        for _ in range(2):
            await ActingAs(dispatcher, LIMITED).submit(call("echo"))
        for _ in range(3):
            await ActingAs(dispatcher, LEGACY).submit(call("echo"))
        assert [job.state async for job in dispatcher.list_jobs()] == [State.QUEUED] * 5, "there are no hosts yet"
    async with under_rules(tmp_path, host_db_script=script, hosts_file=None) as dispatcher:
        with pytest.raises(RateLimited, match="2 jobs of token:limited are queued; the limit is 2") as refused:
            await ActingAs(dispatcher, LIMITED).submit(call("echo"))
        assert refused.value.retry_after == 1.0
        ended = await ActingAs(dispatcher, LEGACY).submit(call("echo"))
        end = (await dispatcher.get_job(ended)).end
        assert isinstance(end, Failed)
        assert (end.type, end.message) == ("rate_limited", "3 jobs of anonymous@legacy are queued; the limit is 3")
        assert loads(end.data) == {"retry_after": 1.0}


async def test_length_of_calls_is_limited(tmp_path: Path) -> None:
    async with under_rules(tmp_path) as dispatcher:
        acting = ActingAs(dispatcher, LIMITED)
        await acting.submit(call("echo", arguments=["x" * 40], info=raw("y" * 54)))
        with pytest.raises(RateLimited, match="arguments and info have 101 bytes; the limit is 100") as refused:
            await acting.submit(call("echo", arguments=["x" * 40], info=raw("y" * 55)))
        assert refused.value.retry_after is None, "no attempt can succeed"
        with pytest.raises(RateLimited, match=r"submit_many\[1\]: arguments"):
            await acting.submit_many([call("echo"), call("echo", arguments=["x" * 99])])


async def test_rate_of_calls_is_limited(tmp_path: Path) -> None:
    async with under_rules(tmp_path) as dispatcher:
        acting, legacy = ActingAs(dispatcher, SLOW), ActingAs(dispatcher, anonymous("slow"))
        with pytest.raises(RateLimited, match="at a rate of 3/h") as refused:
            await acting.submit_many([call("echo")] * 4)
        assert refused.value.retry_after is None
        await acting.submit_many([call("echo")] * 2)
        await acting.submit(call("echo"))
        with pytest.raises(RateLimited, match="token:slow may submit calls at a rate of 3/h") as refused:
            await acting.submit(call("echo"))
        assert refused.value.retry_after is not None
        assert 1190 < refused.value.retry_after <= 1200
        ids = [await legacy.submit(call("echo")) for _ in range(4)]
        ends = [await end_of(legacy, job) for job in ids]
        assert [end.type for end in ends if isinstance(end, Failed)] == ["unknown_host"] * 3 + ["rate_limited"]


def test_rates_are_counted_by_owner_and_rate() -> None:
    rates, fast, slow = Rates(), Rate(50, 1), Rate(1, 60)
    assert rates.take({("a", fast): 50}, 100.0) == 0
    assert rates.take({("a", fast): 1}, 100.0) == pytest.approx(0.02)
    assert rates.take({("b", fast): 50}, 100.0) == 0
    assert rates.take({("a", fast): 1}, 100.02) == 0
    assert rates.take({("a", fast): 51}, 1000.0) is None
    assert rates.take({("a", slow): 1, ("a", fast): 1}, 100.02) == pytest.approx(0.02)
    assert rates.take({("a", slow): 1}, 100.02) == 0, "nothing was counted"
    assert rates.take({("a", slow): 1}, 130.02) == pytest.approx(30.0)


# Tags of hosts.

TAGGED = """
[[rule]]
who = ["token:shop"]
deny = ["call", "read"]
tags = ["prod"]

[[rule]]
who = ["token:shop"]
allow = ["call", "read", "list"]
tags = ["test", "eu-*"]

[[rule]]
who = ["token:ops"]
allow = ["call", "read", "cancel", "list"]
jobs = "any"
"""


async def test_rules_follow_the_tags_of_hosts(tmp_path: Path) -> None:
    def lines(*tags: str) -> tuple[str, ...]:
        return (
            host_line(peer.port, tags=[*tags]),
            host_line(1, "db01", tags=["prod", "eu-west"]),
            host_line(1, "old01", tags={"site": "a"}),
            host_line(1, "plain01"),
        )

    with scripted_harpd(tmp_path) as peer:
        async with running(tmp_path, *lines("test"), access_file=rules(tmp_path, TAGGED)) as dispatcher:
            shop = ActingAs(dispatcher, SHOP)
            for host, rule in (("db01", 1), ("old01", 1), ("plain01", None), ("nohost", 1)):
                with pytest.raises(AccessDenied) as refused:
                    await shop.submit(call("echo", host=host))
                assert refused.value.fields["rule"] == rule, host
            assert [host.hostname for host in shop.list_hosts()] == ["db01", "web01"], "eu-west allows the list"
            job = await shop.submit(call("hang"))
            assert (await shop.get_job(job)).id == job
            waiting = shop.result(job)
            # The host becomes one of production: the right to it ends, also for the request that waits.
            (tmp_path / "hosts").write_text("".join(lines("prod")))
            with pytest.raises(AccessDenied, match="revoked"):
                await asyncio.wait_for(waiting, 30)
            with pytest.raises(UnknownJob):
                await ActingAs(dispatcher, SHOP).get_job(job)
            with pytest.raises(AccessDenied):
                await ActingAs(dispatcher, SHOP).submit(call("echo"))
            assert await ActingAs(dispatcher, OPS).cancel(job)


async def test_tags_are_unknown_while_the_registry_is_not_loaded(tmp_path: Path) -> None:
    script, go = tmp_path / "script", tmp_path / "go"
    line = host_line(1, tags=["test"])
    script.write_text(f"#!/bin/sh\nwhile [ ! -e {go} ]; do sleep 0.01; done\nprintf '%s' '{line}'\n")
    script.chmod(0o700)
    settings: dict[str, Any] = {"host_db_script": script, "hosts_file": None, "access_file": rules(tmp_path, TAGGED)}
    async with running(tmp_path, **settings) as dispatcher:
        with pytest.raises(AccessDenied) as refused:
            await ActingAs(dispatcher, SHOP).submit(call("echo"))
        assert refused.value.fields["rule"] == 1, "it might be one of production"
        go.touch()
        assert await dispatcher.registry.refresh() == 1
        assert await ActingAs(dispatcher, SHOP).submit(call("echo"))


# Rights that are revoked.


async def test_requests_that_wait_end_when_the_right_is_revoked(tmp_path: Path) -> None:
    file = rules(tmp_path)
    with scripted_harpd(tmp_path) as peer:
        async with running(tmp_path, host_line(peer.port), access_file=file) as dispatcher:
            jobs = {}
            for client in (SHOP, LEGACY, OTHER):
                jobs[client.owner] = await ActingAs(dispatcher, client).submit(call("feed", arguments=[client.owner]))
                await is_running(dispatcher, jobs[client.owner])

            def waiting(client: Client) -> list[asyncio.Future[Any]]:
                acting, job = ActingAs(dispatcher, client), jobs[client.owner]
                found = [end_of(acting, job), stream_items(acting, job, wait=True)]
                return [asyncio.ensure_future(each) for each in found]

            revoked, legacy, kept = waiting(SHOP), waiting(LEGACY), waiting(OTHER)
            await asyncio.sleep(0.1)
            file.write_text(RULES.replace('"token:shop", ', "").replace(', "anonymous@legacy"', ""))
            assert isinstance(dispatcher.config, Config)
            began = time.monotonic()
            await dispatcher.reload(dispatcher.config)
            await asyncio.wait([*revoked, *legacy], timeout=5)
            assert time.monotonic() - began < 1
            for each in revoked:
                with pytest.raises(AccessDenied, match="the right to read this job was revoked"):
                    each.result()
            for each in legacy:
                with pytest.raises(UnknownJob):
                    each.result()
            assert len(dispatcher.access.waits) == 2
            connection_of(peer, OTHER.owner).reply({"stream": 1}, {"result": 2})
            assert await kept[0] == Returned(Raw(b"2"))
            assert (await kept[1])[-1] == Returned(Raw(b"2"))
            assert not dispatcher.access.waits
            with pytest.raises(AccessDenied):
                await ActingAs(dispatcher, SHOP).submit(call("echo"))


# Without rules.


async def test_without_rules_every_client_may_call_read_and_cancel(tmp_path: Path) -> None:
    with scripted_harpd(tmp_path) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            job = await ActingAs(dispatcher, SHOP).submit(call("hang"))
            await is_running(dispatcher, job)
            for client in (STRANGER, NOBODY):
                acting = ActingAs(dispatcher, client)
                assert (await acting.get_job(job)).owner == "token:shop"
                assert (await stream_items(acting, job, wait=False)) == [Continue()]
                with pytest.raises(AccessDenied):
                    acting.list_hosts()
            assert await ActingAs(dispatcher, STRANGER).cancel(job)
