"""Upkeep: the hosts registry with real scripts and files, and the deletion of old jobs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from harp.protocol.ends import Failed, Returned
from harpcaller.config import Config
from harpcaller.hosts.cache import CachedHosts, read_cache, write_cache
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.registry import HostsRegistry, RefreshFailed
from harpcaller.hosts.script import ScriptFailed, run_script
from harpcaller.model.jobs import State
from harpcaller.pruner import prune, prune_regularly
from harpcaller.store import StorageError, UnknownJob
from harpcaller.store.sqlite import open_store
from support.certificates import server_files
from support.deadline import eventually
from support.dispatcher import Switched, call, followed, host_line, hosts_file, running, until
from support.jobs import job_in
from support.peers import Conversation, Peer, server_context

WEB01 = Host("web01", "10.0.0.1", 4306, "u", "topsecret")


class Script:
    """A script of the shell that counts its runs and does what the test tells it."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "update hosts"
        self._runs = directory / "runs"
        self._hosts = directory / "printed"
        self._runs.touch()
        self.does()

    def does(self, *lines: str, after: str = "") -> None:
        """From now on: print these lines of the registry, then run more of the shell."""
        self._hosts.write_text("".join(lines))
        program = f"#!/bin/sh\necho >>{shlex.quote(str(self._runs))}\ncat {shlex.quote(str(self._hosts))}\n{after}\n"
        new = self.file.with_suffix(".new")
        new.write_text(program)
        new.chmod(0o700)
        new.replace(self.file)

    @property
    def runs(self) -> int:
        return len(self._runs.read_text().splitlines())


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


@asynccontextmanager
async def kept_up(directory: Path, **settings: Any) -> AsyncIterator[HostsRegistry]:
    """A registry that is refreshed regularly."""
    registry = HostsRegistry(Config(host_db=directory / "hosts.db", **settings), lambda: None)
    task = asyncio.create_task(registry.refresh_regularly())
    try:
        yield registry
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


def alive(pid: int) -> bool:
    """Whether it is there and no zombie: those are reaped when init comes to it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def names(registry: HostsRegistry) -> list[str]:
    return [host.hostname for host in registry.list_hosts()]


async def test_the_script_is_run_at_start_and_then_regularly(tmp_path: Path, script: Script) -> None:
    script.does(host_line(1, "b"), host_line(2, "a"))
    async with kept_up(tmp_path, host_db_script=script.file, host_db_refresh=0.1) as registry:
        await eventually(lambda: names(registry) == ["a", "b"], what="the hosts")
        script.does(host_line(1, "c"))
        await eventually(lambda: names(registry) == ["c"], what="the new hosts")
        assert registry.find_host("c") == Host("c", "127.0.0.1", 1, "u", "topsecret")
        assert registry.find_host("a") is None


@pytest.mark.parametrize(("age", "runs"), [(400.0, 0), (500.0, 1), (-100.0, 1), (1e9, 1)])
async def test_the_kept_copy_counts_while_it_is_young(tmp_path: Path, script: Script, age: float, runs: int) -> None:
    write_cache(tmp_path / "hosts.db", CachedHosts({"web01": WEB01}, time.time() - age))
    script.does(host_line(1, "new"))
    async with kept_up(tmp_path, host_db_script=script.file, host_db_refresh=900.0) as registry:
        assert registry.is_ready
        assert registry.find_host("web01") == WEB01
        if runs:
            await eventually(lambda: "new" in read_cache(tmp_path / "hosts.db").hosts, what="the refresh")
        else:
            await registry.refresh()  # one that is due would run, or have run, before
        assert script.runs == 1
    restarted = HostsRegistry(Config(host_db=tmp_path / "hosts.db", host_db_script=script.file), lambda: None)
    assert names(restarted) == ["new"]


async def test_the_script_never_runs_twice_at_once(tmp_path: Path, script: Script) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    script.does(host_line(1, "a"), after=f"cat {shlex.quote(str(go))}")
    async with kept_up(tmp_path, host_db_script=script.file) as registry:
        await eventually(lambda: script.runs == 1, what="the first run")
        refreshes = [asyncio.create_task(registry.refresh()) for _ in range(5)]
        await asyncio.sleep(0)
        refreshes[0].cancel()  # who no longer waits does not end it for the others
        await asyncio.to_thread(go.write_text, "")
        assert await asyncio.gather(*refreshes[1:]) == [1, 1, 1, 1]
        assert script.runs == 1


@pytest.mark.parametrize("ending", ["exit 3", "kill -9 $$", "echo trouble >&2; exit 1"])
async def test_a_script_that_fails_changes_nothing(tmp_path: Path, script: Script, ending: str) -> None:
    script.does(host_line(1, "a"))
    async with kept_up(tmp_path, host_db_script=script.file) as registry:
        assert await registry.refresh() == 1
        copy = (tmp_path / "hosts.db").read_bytes()
        script.does(host_line(1, "b"), after=ending)
        with pytest.raises(RefreshFailed) as caught:
            await registry.refresh()
        assert str(script.file) in str(caught.value)
        assert ("trouble" in str(caught.value)) == ("trouble" in ending)
        assert names(registry) == ["a"]
        assert (tmp_path / "hosts.db").read_bytes() == copy


async def test_a_script_that_can_not_be_started(tmp_path: Path) -> None:
    async with kept_up(tmp_path, host_db_script=tmp_path / "none") as registry:
        with pytest.raises(RefreshFailed, match="No such file"):
            await registry.refresh()
        assert registry.is_ready


async def test_without_script_and_hosts_file_there_is_nothing_to_refresh(tmp_path: Path) -> None:
    async with kept_up(tmp_path) as registry:
        with pytest.raises(RefreshFailed, match="host_db_script"):
            await registry.refresh()


async def test_a_script_has_a_deadline_and_leaves_nothing_running(tmp_path: Path, script: Script) -> None:
    pids = tmp_path / "pids"
    script.does(after=f"sleep 1000 & echo $! $$ >{shlex.quote(str(pids))}; wait")

    def gone() -> bool:
        return not any(alive(int(pid)) for pid in pids.read_text().split())

    with pytest.raises(ScriptFailed, match="took more than"):
        await run_script(script.file, 0.5)
    await eventually(gone, what="the end of the script's processes")

    pids.unlink()
    task = asyncio.create_task(run_script(script.file, 600.0))
    await eventually(lambda: pids.exists() and pids.read_text(), what="the script")
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await eventually(gone, what="the end of the script's processes")


async def test_a_script_that_ends_may_leave_nothing_running_either(tmp_path: Path, script: Script) -> None:
    pid = tmp_path / "pid"
    script.does(host_line(1, "a"), after=f"sleep 1000 & echo $! >{shlex.quote(str(pid))}")
    assert await run_script(script.file, 60.0) == host_line(1, "a").encode()
    await eventually(lambda: not alive(int(pid.read_text())), what="the end of the script's processes")


@pytest.mark.parametrize("stream", [1, 2])
async def test_a_script_that_prints_too_much(script: Script, stream: int) -> None:
    script.does(after=f"head -c 200000 /dev/zero >&{stream}; sleep 1000")
    with pytest.raises(ScriptFailed, match="more than 100000 bytes"):
        await run_script(script.file, 60.0, max_output=100_000)


async def test_lines_that_do_not_count_are_told_without_what_is_in_them(
    tmp_path: Path, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    broken = json.dumps({"hostname": "x", "credentials": {"user": "u", "password": "topsecret"}}) + "\n"
    script.does(broken, host_line(1, "a"), "topsecret\n", host_line(2, "a"), after="echo topsecret >&2")
    async with kept_up(tmp_path, host_db_script=script.file) as registry:
        await registry.refresh()
        assert [host.port for host in registry.list_hosts()] == [2]
    counted = next(record.__dict__ for record in caplog.records if "duplicates" in record.__dict__)
    assert (counted["invalid"], counted["duplicates"]) == (2, 1)
    assert [record.__dict__["line"] for record in caplog.records if "line" in record.__dict__] == [1, 3]
    assert "topsecret" not in " ".join(str(record.__dict__) for record in caplog.records)


async def test_jobs_wait_for_the_first_run_of_the_script(tmp_path: Path, script: Script) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)

    def answer(talk: Conversation) -> None:
        talk.expect()
        talk.reply({"harp": 1, "stream_result": False}, {"result": 1})

    with Peer(answer, tls=server_context(server_files(tmp_path))) as peer:
        script.does(host_line(peer.port), after=f"cat {shlex.quote(str(go))}")
        async with running(tmp_path, hosts_file=None, host_db_script=script.file) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await eventually(lambda: script.runs == 1, what="the script")
            assert (await dispatcher.job(job_id)).state is State.QUEUED
            await asyncio.to_thread(go.write_text, "")
            assert await dispatcher.result(job_id, wait=True) == Returned(b"1")
            script.does(host_line(1, "a"), host_line(1, "b"))
            assert await dispatcher.refresh_hosts() == 2
            assert [host.hostname for host in dispatcher.hosts()] == ["a", "b"]


def test_the_copy_is_private_and_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "hosts.db"
    hosts = {"web01": WEB01, "\ud800": Host("\ud800", "::1", 1, "\u00fc", "\n")}
    assert write_cache(file, CachedHosts(hosts, 12.5)) is None
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert read_cache(file) == CachedHosts(hosts, 12.5)
    (tmp_path / "new" / "hosts.db.new").write_text("left by a crash")
    assert write_cache(file, CachedHosts({}, 13.5)) is None
    assert read_cache(file) == CachedHosts({}, 13.5)
    assert [path.name for path in file.parent.iterdir()] == ["hosts.db"]


@pytest.mark.parametrize("content", [b"\x00DETS\x00", b"{}\n", b'{"form": "x", "refreshed": 1}\n', b"[" * 5000])
def test_a_foreign_file_is_renamed(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "hosts.db"
    file.write_bytes(content)
    assert read_cache(file) == CachedHosts()
    assert write_cache(file, CachedHosts({"web01": WEB01}, 1.0)) == tmp_path / "hosts.db.foreign"
    assert (tmp_path / "hosts.db.foreign").read_bytes() == content
    assert read_cache(file).hosts == {"web01": WEB01}


async def test_a_copy_that_can_not_be_written_stops_nothing(tmp_path: Path, script: Script) -> None:
    (tmp_path / "hosts.db").mkdir()
    script.does(host_line(1, "a"))
    async with kept_up(tmp_path, host_db_script=script.file) as registry:
        assert await registry.refresh() == 1
        assert names(registry) == ["a"]
    assert not (tmp_path / "hosts.db.new").exists()


async def test_the_hosts_file_is_read_again_when_it_changes(tmp_path: Path, script: Script) -> None:
    script.does(host_line(1, "a"), host_line(1, "b"))
    file = hosts_file(tmp_path, host_line(2, "b"), host_line(2, "c"))
    async with kept_up(tmp_path, host_db_script=script.file, hosts_file=file) as registry:
        assert await registry.refresh() == 3
        assert [(host.hostname, host.port) for host in registry.list_hosts()] == [("a", 1), ("b", 2), ("c", 2)]
        found = registry.find_host("b")
        assert found is not None
        assert found.port == 2
        file.write_text(host_line(3, "c") + host_line(3, "d"))
        assert [(host.hostname, host.port) for host in registry.list_hosts()] == [
            ("a", 1),
            ("b", 1),
            ("c", 3),
            ("d", 3),
        ]
        file.unlink()
        assert len(registry.list_hosts()) == 4
        hosts_file(tmp_path, host_line(4, "e"))
        assert names(registry) == ["a", "b", "e"]


async def test_reconfiguring(tmp_path: Path, script: Script) -> None:
    script.does(host_line(1, "a"))
    file = hosts_file(tmp_path, host_line(2, "b"))
    async with kept_up(tmp_path, hosts_file=file) as registry:
        assert names(registry) == ["b"]
        registry.update_config(Config(host_db=tmp_path / "hosts.db", host_db_script=script.file))
        await eventually(lambda: names(registry) == ["a"], what="the script's hosts")
        registry.update_config(Config(host_db=tmp_path / "hosts.db", hosts_file=file))
        assert names(registry) == ["b"]


async def test_old_jobs_are_deleted_with_their_records_and_others_are_not(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "store")
    long_ago = time.time() - 100_000
    old = [await job_in(store, State.RETURNED, now=long_ago) for _ in range(450)]
    waiting = await job_in(store, State.QUEUED, now=long_ago, queue={})
    young = await job_in(store, State.CANCELLED, now=time.time() - 1000)
    assert await prune(store, time.time() - 2000) == 450
    for job_id in old:
        with pytest.raises(UnknownJob):
            await store.get_job(job_id)
    assert (await store.get_job(waiting)).state is State.QUEUED
    assert (await store.get_job(young)).state is State.CANCELLED
    await store.close()


async def test_pruning_goes_on_after_a_failure_and_follows_max_age(tmp_path: Path) -> None:
    real = await open_store(tmp_path / "store")
    store = Switched(real, "prune_jobs")
    store.off = True
    job_id = await job_in(real, State.RETURNED, now=time.time() - 1000)
    max_age = 2000.0
    task = asyncio.create_task(prune_regularly(store, time.time, lambda: max_age, every=0.05))
    await eventually(lambda: store.refused >= 2, what="a second try")
    with pytest.raises(StorageError):
        await prune(store, 0)
    store.off = False
    assert (await real.get_job(job_id)).state is State.RETURNED
    max_age = 500.0

    async def pruned() -> bool:
        return not await real.list_jobs(ended=True)

    while not await pruned():
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    await real.close()


async def test_the_dispatcher_prunes_at_start_and_on_demand(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "store")
    old = await job_in(store, State.RETURNED, now=time.time() - 8000)
    young = await job_in(store, State.RETURNED, now=time.time() - 1000)
    async with running(tmp_path, store=store, max_age=2.0) as dispatcher:
        with pytest.raises(UnknownJob):
            await until(dispatcher, old, lambda job: False, "the pruning")
        assert await dispatcher.prune(500) == 1
        with pytest.raises(UnknownJob):
            await followed(dispatcher, young)
        unknown = await dispatcher.submit(call(), "test")
        end = await dispatcher.result(unknown, wait=True)
        assert isinstance(end, Failed)
        assert await dispatcher.prune(0) == 1
    await store.close()
