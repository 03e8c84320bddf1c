"""The hosts registry with real scripts and files."""

from __future__ import annotations

import asyncio
import errno
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

import msgspec
import psutil
import pytest

from harp.protocol.ends import Returned
from harp_daemon import watched_file
from harpcaller.config import Config
from harpcaller.hosts.registry import CachedHosts, Host, HostsRegistry, RefreshFailed, read_cache, write_cache
from harpcaller.hosts.script import ScriptFailed, run_script
from harpcaller.model.jobs import State
from support.certificates import server_files
from support.deadline import eventually
from support.dispatcher import call, host_line, hosts_file, running
from support.peers import Peer, PeerConnection, server_context

WEB01 = Host("web01", "10.0.0.1", 4306, "u", "topsecret")


class Script:
    """A shell script that counts its runs and can be changed by the test."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "update hosts"
        self._runs = directory / "runs"
        self._hosts = directory / "printed"
        self._runs.touch()
        self.does()

    def does(self, *lines: str, after: str = "") -> None:
        """Change the script: print these lines of the registry, then run `after`."""
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
async def refreshed(directory: Path, **settings: Any) -> AsyncIterator[HostsRegistry]:
    """Yield a registry that is refreshed regularly."""
    registry = HostsRegistry(Config(host_db=directory / "hosts.db", **settings), lambda: None)
    task = asyncio.create_task(registry.refresh_regularly())
    try:
        yield registry
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


def alive(pid: int) -> bool:
    """Return whether the process exists and is not a zombie, which init reaps later."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def names(registry: HostsRegistry) -> list[str]:
    return [host.hostname for host in registry.list_hosts()]


async def test_registry_runs_the_script_at_start_and_regularly(tmp_path: Path, script: Script) -> None:
    script.does(host_line(1, "b"), host_line(2, "a"))
    async with refreshed(tmp_path, host_db_script=script.file, host_db_refresh=0.1) as registry:
        await eventually(lambda: names(registry) == ["a", "b"], what="the hosts")
        script.does(host_line(1, "c"))
        await eventually(lambda: names(registry) == ["c"], what="the new hosts")
        assert registry.find_host("c") == Host("c", "127.0.0.1", 1, "u", "topsecret")
        assert registry.find_host("a") is None


@pytest.mark.parametrize(("age", "runs"), [(400.0, 0), (500.0, 1), (-100.0, 1), (1e9, 1)])
async def test_registry_uses_a_young_cache(tmp_path: Path, script: Script, age: float, runs: int) -> None:
    write_cache(tmp_path / "hosts.db", CachedHosts({"web01": WEB01}, time.time() - age))
    script.does(host_line(1, "new"))
    async with refreshed(tmp_path, host_db_script=script.file, host_db_refresh=900.0) as registry:
        assert registry.is_ready
        assert registry.find_host("web01") == WEB01
        if runs:
            await eventually(lambda: "new" in read_cache(tmp_path / "hosts.db").hosts, what="the refresh")
        else:
            await registry.refresh()  # a refresh that is due would run before this one
        assert script.runs == 1
    restarted = HostsRegistry(Config(host_db=tmp_path / "hosts.db", host_db_script=script.file), lambda: None)
    assert names(restarted) == ["new"]


async def test_registry_never_runs_two_scripts_in_parallel(tmp_path: Path, script: Script) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    script.does(host_line(1, "a"), after=f"cat {shlex.quote(str(go))}")
    async with refreshed(tmp_path, host_db_script=script.file) as registry:
        await eventually(lambda: script.runs == 1, what="the first run")
        refreshes = [asyncio.create_task(registry.refresh()) for _ in range(5)]
        await asyncio.sleep(0)
        refreshes[0].cancel()  # a cancelled wait does not end the refresh
        await asyncio.to_thread(go.write_text, "")
        assert await asyncio.gather(*refreshes[1:]) == [1, 1, 1, 1]
        assert script.runs == 1


@pytest.mark.parametrize("ending", ["exit 3", "kill -9 $$", "echo trouble >&2; exit 1"])
async def test_registry_failed_script_has_no_effect(tmp_path: Path, script: Script, ending: str) -> None:
    script.does(host_line(1, "a"))
    async with refreshed(tmp_path, host_db_script=script.file) as registry:
        assert await registry.refresh() == 1
        copy = (tmp_path / "hosts.db").read_bytes()
        script.does(host_line(1, "b"), after=ending)
        with pytest.raises(RefreshFailed) as caught:
            await registry.refresh()
        assert str(script.file) in str(caught.value)
        assert ("trouble" in str(caught.value)) == ("trouble" in ending)
        assert names(registry) == ["a"]
        assert (tmp_path / "hosts.db").read_bytes() == copy


async def test_registry_missing_script_fails_the_refresh(tmp_path: Path) -> None:
    async with refreshed(tmp_path, host_db_script=tmp_path / "none") as registry:
        with pytest.raises(RefreshFailed, match="No such file"):
            await registry.refresh()
        assert registry.is_ready


async def test_registry_without_descriptors_fails_the_refresh(
    tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    script.does(host_line(1, "a"))
    async with refreshed(tmp_path, host_db_script=script.file) as registry:
        assert await registry.refresh() == 1
        monkeypatch.setattr(os, "memfd_create", fail)
        with pytest.raises(RefreshFailed, match="Too many open files"):
            await registry.refresh()
        assert names(registry) == ["a"]


async def test_registry_without_sources_fails_the_refresh(tmp_path: Path) -> None:
    async with refreshed(tmp_path) as registry:
        with pytest.raises(RefreshFailed, match="host_db_script"):
            await registry.refresh()


async def test_script_over_its_time_limit_is_killed(tmp_path: Path, script: Script) -> None:
    pids = tmp_path / "pids"
    script.does(after=f"sleep 1000 & echo $! $$ >{shlex.quote(str(pids))}; wait")

    def all_dead() -> bool:
        return not any(alive(int(pid)) for pid in pids.read_text().split())

    with pytest.raises(ScriptFailed, match="took more than"):
        await run_script(script.file, 0.5)
    await eventually(all_dead, what="the end of the script's processes")

    pids.unlink()
    task = asyncio.create_task(run_script(script.file, 600.0))
    await eventually(lambda: pids.exists() and pids.read_text(), what="the script")
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await eventually(all_dead, what="the end of the script's processes")


@pytest.mark.parametrize("start", ["", "setsid ", "setsid setsid "])
async def test_script_exit_kills_its_other_processes(tmp_path: Path, script: Script, start: str) -> None:
    pid = tmp_path / "pid"
    started = f"{start}sh -c 'echo $$ >{shlex.quote(str(pid))}; sleep 1000' &"
    script.does(host_line(1, "a"), after=f"{started} while [ ! -s {shlex.quote(str(pid))} ]; do sleep 0.01; done")
    assert await run_script(script.file, 60.0) == host_line(1, "a").encode()
    await eventually(lambda: not alive(int(pid.read_text())), what="the end of the script's processes")


@pytest.mark.parametrize("stream", [1, 2])
async def test_script_over_its_output_limit_is_killed(script: Script, stream: int) -> None:
    script.does(after=f"head -c 200000 /dev/zero >&{stream}; sleep 1000")
    with pytest.raises(ScriptFailed, match="more than 100000 bytes"):
        await run_script(script.file, 60.0, max_output=100_000)


async def test_registry_logs_invalid_lines_without_contents(
    tmp_path: Path, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    broken = json.dumps({"hostname": "x", "credentials": {"user": "u", "password": "topsecret"}}) + "\n"
    script.does(broken, host_line(1, "a"), "topsecret\n", host_line(2, "a"), after="echo topsecret >&2")
    async with refreshed(tmp_path, host_db_script=script.file) as registry:
        await registry.refresh()
        assert [host.port for host in registry.list_hosts()] == [1]
        assert [problem.split(":")[1] for problem in registry.problems()] == ["1", "3", "4"]
    counted = next(record.__dict__ for record in caplog.records if "rejected" in record.__dict__)
    assert counted["rejected"] == 3
    assert [record.__dict__["line"] for record in caplog.records if "line" in record.__dict__] == [1, 3, 4]
    assert "topsecret" not in " ".join(str(record.__dict__) for record in caplog.records)


async def test_jobs_wait_for_the_first_run_of_the_script(tmp_path: Path, script: Script) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)

    def answer(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "stream_result": False}, {"result": 1})

    with Peer(answer, tls=server_context(server_files(tmp_path))) as peer:
        script.does(host_line(peer.port), after=f"cat {shlex.quote(str(go))}")
        async with running(tmp_path, hosts_file=None, host_db_script=script.file) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await eventually(lambda: script.runs == 1, what="the script")
            assert (await dispatcher.get_job(job_id)).state is State.QUEUED
            await asyncio.to_thread(go.write_text, "")
            assert await dispatcher.result(job_id) == Returned(b"1")
            script.does(host_line(1, "a"), host_line(1, "b"))
            assert await dispatcher.registry.refresh() == 2
            assert [host.hostname for host in dispatcher.registry.list_hosts()] == ["a", "b"]


def test_cache_is_private_and_complete(tmp_path: Path) -> None:
    file = tmp_path / "new" / "hosts.db"
    hosts = {"web01": WEB01, "\ud800": Host("\ud800", "::1", 1, "\u00fc", "\n")}
    hosts |= {str(tags): WEB01._replace(hostname=str(tags), tags=tags) for tags in (None, ("prod", "eu"))}
    assert write_cache(file, CachedHosts(hosts, 12.5)) is None
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert read_cache(file) == CachedHosts(hosts, 12.5)
    (tmp_path / "new" / "hosts.db.new").write_text("left by a crash")
    assert write_cache(file, CachedHosts({}, 13.5)) is None
    assert read_cache(file) == CachedHosts({}, 13.5)
    assert [path.name for path in file.parent.iterdir()] == ["hosts.db"]


@pytest.mark.parametrize("content", [b"\x00DETS\x00", b"{}\n", b'{"form": "x", "refreshed": 1}\n', b"[" * 5000])
def test_cache_renames_a_foreign_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "hosts.db"
    file.write_bytes(content)
    assert read_cache(file) == CachedHosts()
    assert write_cache(file, CachedHosts({"web01": WEB01}, 1.0)) == tmp_path / "hosts.db.foreign"
    assert (tmp_path / "hosts.db.foreign").read_bytes() == content
    assert read_cache(file).hosts == {"web01": WEB01}


async def test_registry_works_without_a_writable_cache(tmp_path: Path, script: Script) -> None:
    (tmp_path / "hosts.db").mkdir()
    script.does(host_line(1, "a"))
    async with refreshed(tmp_path, host_db_script=script.file) as registry:
        assert await registry.refresh() == 1
        assert names(registry) == ["a"]
    assert not (tmp_path / "hosts.db.new").exists()


async def test_registry_reads_a_changed_hosts_file(tmp_path: Path, script: Script) -> None:
    script.does(host_line(1, "a"), host_line(1, "b"))
    file = hosts_file(tmp_path, host_line(2, "b"), host_line(2, "c"))
    async with refreshed(tmp_path, host_db_script=script.file, hosts_file=file) as registry:
        assert await registry.refresh() == 3
        assert [(host.hostname, host.port) for host in registry.list_hosts()] == [("a", 1), ("b", 2), ("c", 2)]
        found = registry.find_host("b")
        assert found is not None
        assert found.port == 2
        file.write_text(host_line(3, "c") + host_line(3, "d"))
        new = [("a", 1), ("b", 1), ("c", 3), ("d", 3)]
        assert registry.find_host("d") == Host("d", "127.0.0.1", 3, "u", "topsecret")  # at once, as it is additional
        await eventually(
            lambda: [(host.hostname, host.port) for host in registry.list_hosts()] == new, what="the new hosts"
        )
        file.unlink()
        await registry.read_changed_file()
        assert len(registry.list_hosts()) == 4
        assert "No such file" in registry.problems()[0]
        hosts_file(tmp_path, host_line(4, "e"))
        await eventually(lambda: names(registry) == ["a", "b", "e"], what="the hosts of the new file")
        assert registry.problems() == []


async def test_hosts_file_is_not_used_while_it_is_written(tmp_path: Path) -> None:
    """A job of a known host finds its host at every moment."""
    lines = [host_line(number, f"h{number}") for number in range(1, 9)]
    file = hosts_file(tmp_path, *lines)
    async with refreshed(tmp_path, hosts_file=file) as registry:
        for _ in range(3):
            with file.open("w") as stream:
                assert len(registry.list_hosts()) == 8
                for line in lines:
                    stream.write(line[:40])
                    stream.flush()
                    assert len(registry.list_hosts()) == 8
                    await asyncio.sleep(0.02)
                    stream.write(line[40:])
            assert len(registry.list_hosts()) == 8
        with file.open("a") as stream:
            stream.write(host_line(9, "new")[:-9])  # the writer was killed
        await registry.read_changed_file()
        assert "middle of a line" in registry.problems()[0]
        assert len(registry.list_hosts()) == 8
        assert registry.find_host("new") is None


@pytest.mark.parametrize("left", [[], ["h1"], ["h1", "h2", "h3"], ["x1"]])
async def test_hosts_file_much_shorter_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left: list[str]
) -> None:
    file = hosts_file(tmp_path, *(host_line(1, f"h{number}") for number in range(8)))
    async with refreshed(tmp_path, hosts_file=file) as registry:
        hosts_file(tmp_path, *(host_line(1, name) for name in left))
        with pytest.raises(RefreshFailed, match=rf"refused: it has {len(left)} hosts, and 8 are in use.*--force"):
            await registry.refresh()
        assert len(registry.list_hosts()) == 8
        assert registry.find_host("x1") is None
        described = registry.describe()["hosts_file"]
        assert (described["hosts"], described["source"]) == (8, str(file))
        assert "refused" in described["error"]
        assert sum(record.levelno == logging.ERROR for record in caplog.records) == 1
        assert await registry.refresh(force=True) == len(left)
        assert names(registry) == left
        assert registry.describe()["hosts_file"]["error"] is None


async def test_hosts_file_that_keeps_changing_fails_the_refresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = hosts_file(tmp_path, host_line(1, "a"))
    async with refreshed(tmp_path, hosts_file=file) as registry:
        await registry.refresh()
        monkeypatch.setattr(watched_file, "_MAX_WAIT", 0.0)
        hosts_file(tmp_path, host_line(1, "b"))
        with pytest.raises(RefreshFailed, match="changed again and again"):
            await registry.refresh()
        await eventually(lambda: names(registry) == ["b"], what="the new hosts")
        assert registry.problems() == []


async def test_hosts_file_of_half_the_hosts_is_used(tmp_path: Path) -> None:
    file = hosts_file(tmp_path, *(host_line(1, f"h{number}") for number in range(8)))
    async with refreshed(tmp_path, hosts_file=file) as registry:
        hosts_file(tmp_path, *(host_line(1, f"h{number}") for number in range(4)))
        assert await registry.refresh() == 4


@pytest.mark.parametrize("printed", [(), (host_line(1, "h1"),), ("oops\n",) * 8])
async def test_script_much_shorter_output_is_refused(tmp_path: Path, script: Script, printed: tuple[str, ...]) -> None:
    script.does(*(host_line(1, f"h{number}") for number in range(8)))
    async with refreshed(tmp_path, host_db_script=script.file) as registry:
        assert await registry.refresh() == 8
        script.does(*printed)
        with pytest.raises(RefreshFailed, match="refused") as caught:
            await registry.refresh()
        assert ("oops" in printed[0] if printed else False) == ("8 rejected lines" in str(caught.value))
        assert len(registry.list_hosts()) == len(read_cache(tmp_path / "hosts.db").hosts) == 8
        assert registry.describe()["host_db_script"]["error"] == str(caught.value)
        valid = [line for line in printed if "oops" not in line]
        assert await registry.refresh(force=True) == len(valid)
        assert len(read_cache(tmp_path / "hosts.db").hosts) == len(valid)


async def test_typing_error_removes_no_host(tmp_path: Path, script: Script) -> None:
    """Only a list with as many mistakes as before may lack a host; a host may be added beside a mistake."""
    lines = [host_line(1, f"h{number}") for number in range(4)]
    script.does(*lines, "odd\n")
    in_file = [host_line(1, f"f{number}") for number in range(4)]
    file = hosts_file(tmp_path, *in_file, "odd\n")
    async with refreshed(tmp_path, host_db_script=script.file, hosts_file=file) as registry:
        assert await registry.refresh() == 8
        for _ in range(2):
            script.does(*lines[:3], lines[3].replace(",", "", 1), "odd\n")
            with pytest.raises(RefreshFailed, match=r"refused: it has 3 hosts, 2 rejected lines .*:4: "):
                await registry.refresh()
        script.does(*lines[:3], "odd\n")
        hosts_file(tmp_path, *in_file[:3], in_file[3].replace(",", "", 1), "odd\n", host_line(1, "f9"))
        with pytest.raises(RefreshFailed, match=r"refused: it has 4 hosts, 2 rejected lines .*:4: "):
            await registry.refresh()
        assert names(registry) == ["f0", "f1", "f2", "f3", "h0", "h1", "h2"]
        hosts_file(tmp_path, *in_file, "odd\n", "odd\n", host_line(1, "f9"))
        assert await registry.refresh() == 8


async def test_compare_shows_changes_and_makes_none(tmp_path: Path, script: Script) -> None:
    script.does(host_line(1, "a"), host_line(1, "b"))
    file = hosts_file(tmp_path, host_line(2, "c"))
    async with refreshed(tmp_path, host_db_script=script.file, hosts_file=file) as registry:
        await registry.refresh()
        assert await registry.compare() == []
        script.does(host_line(9, "a"))
        hosts_file(tmp_path, host_line(2, "c"), host_line(2, "d"))
        found = [(change, host.hostname, host.port) for change, host in await registry.compare()]
        assert found == [("changed", "a", 9), ("removed", "b", 1), ("added", "d", 2)]
        assert read_cache(tmp_path / "hosts.db").hosts.keys() == {"a", "b"}
        script.does(after="exit 3")
        with pytest.raises(RefreshFailed, match="status 3"):
            await registry.compare()


async def test_registry_waits_for_the_script_although_the_file_has_hosts(tmp_path: Path, script: Script) -> None:
    """Without a cache, the hosts of the program are not known before its first run: their jobs would end as unknown."""
    script.does(host_line(1, "a"))
    file = hosts_file(tmp_path, host_line(2, "b"))
    async with refreshed(tmp_path, host_db_script=script.file, hosts_file=file) as registry:
        ready = [registry.is_ready]
        assert await registry.refresh() == 2
        assert [*ready, registry.is_ready] == [False, True]


async def test_registry_waits_for_an_emptied_file_although_the_cache_has_hosts(tmp_path: Path, script: Script) -> None:
    write_cache(tmp_path / "hosts.db", CachedHosts({"web01": WEB01}, time.time()))
    async with refreshed(tmp_path, host_db_script=script.file, hosts_file=hosts_file(tmp_path)) as registry:
        ready = [registry.is_ready]
        hosts_file(tmp_path, host_line(2, "b"))
        await registry.read_changed_file()
        assert [*ready, registry.is_ready] == [False, True]
        assert registry.find_host("b") is not None


@pytest.mark.parametrize("part", [0, 20, 150], ids=["emptied", "cut in the first line", "cut in the second line"])
async def test_registry_waits_for_a_file_that_is_written(tmp_path: Path, part: int) -> None:
    """A start in the middle of a rewrite: jobs wait instead of ending as unknown."""
    file = hosts_file(tmp_path, (host_line(1, "h1") + host_line(2, "h2"))[:part])
    changed = asyncio.Event()
    registry = HostsRegistry(Config(host_db=tmp_path / "hosts.db", hosts_file=file), changed.set)
    ready = [registry.is_ready]
    task = asyncio.create_task(registry.refresh_regularly())
    await asyncio.wait_for(changed.wait(), 30.0)
    assert [*ready, registry.is_ready] == [False, True]
    task.cancel()
    await asyncio.wait([task])


async def test_registry_refuses_a_shorter_file_of_a_new_configuration(tmp_path: Path) -> None:
    first = hosts_file(tmp_path, *(host_line(1, f"h{number}") for number in range(8)))
    config = Config(host_db=tmp_path / "hosts.db", hosts_file=first)
    async with refreshed(tmp_path, hosts_file=first) as registry:
        second = tmp_path / "second"
        second.touch()
        registry.update_config(msgspec.structs.replace(config, hosts_file=second))
        await registry.read_changed_file()
        assert len(registry.list_hosts()) == 8
        assert str(second) in registry.problems()[0]
        second.write_text(host_line(1, "x") + "".join(host_line(2, f"y{number}") for number in range(5)))
        await registry.read_changed_file()
        assert names(registry) == ["x", *(f"y{number}" for number in range(5))]
        assert registry.problems() == []


async def test_registry_with_another_script_refreshes_immediately(tmp_path: Path, script: Script) -> None:
    script.does(host_line(1, "a"))
    config = Config(host_db=tmp_path / "hosts.db", host_db_script=script.file)
    async with refreshed(tmp_path, host_db_script=script.file) as registry:
        await eventually(lambda: names(registry) == ["a"], what="the hosts")
        other = tmp_path / "other"
        other.mkdir()
        another = Script(other)
        another.does(host_line(1, "b"))
        registry.update_config(msgspec.structs.replace(config, host_db_script=another.file))
        assert names(registry) == ["a"]
        await eventually(lambda: names(registry) == ["b"], what="the hosts of the other script")


async def test_registry_applies_a_new_configuration(tmp_path: Path, script: Script) -> None:
    script.does(host_line(1, "a"))
    file = hosts_file(tmp_path, host_line(2, "b"))
    async with refreshed(tmp_path, hosts_file=file) as registry:
        assert names(registry) == ["b"]
        registry.update_config(Config(host_db=tmp_path / "hosts.db", host_db_script=script.file))
        await eventually(lambda: names(registry) == ["a"], what="the script's hosts")
        registry.update_config(Config(host_db=tmp_path / "hosts.db", hosts_file=file))
        assert names(registry) == ["b"]
