"""Calls survive the loss of the dispatcher, of the frontend and of the network, and an upgrade of either daemon."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

import harp
from harp.protocol.ends import Returned
from harpcaller.notifier import RecordBatch
from harpcaller.store.sqlite import open_store
from support.deadline import eventually, wait_until
from support.dispatcher import Switched, call, decoded, read, running, until
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd, is_dead
from support.procedures_file import PROCEDURES
from support.system import System

DEADLINE = 60.0

pytestmark = pytest.mark.timeout(600)  # a hundred calls take long on a busy machine

OWN = """
import os, time
from harpd.proc import Result, streaming_procedure

@streaming_procedure
def flood_until(path):
    # Long records as fast as they go, until the file is there; slower once there are some megabytes.
    number = 0
    while not os.path.exists(path):
        yield [number, "x" * 1000]
        number += 1
        if number > 5000:
            time.sleep(0.02)
    yield Result(number)
"""


@contextmanager
def system(directory: Path, harpd: dict[str, Any] | None = None, **dispatcher: Any) -> Iterator[System]:
    """A complete system, with harpd as two services; at the end, no process remains."""
    with Harpd(directory / "harpd", PROCEDURES + OWN, harpd or {"limits": {"kill_grace": 0.5}}, services=True) as one:
        settings = {"ca_file": str(one.ca_file), **dispatcher}
        credentials = (one.user, one.password)
        with Harpcallerd(directory / "harpcallerd", {"web01": one.port}, credentials, settings) as other:
            yield System(one, other)


class Follower:
    """Follows a job in its own thread, and stores the received records."""

    def __init__(self, follow: Callable[[], Iterator[Any]]) -> None:
        self.records: list[Any] = []
        self.error: BaseException | None = None
        self._follow = follow
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for record in self._follow():
                self.records.append(record)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def reach(self, count: int) -> None:
        """Wait until it has `count` records."""
        wait_until(lambda: len(self.records) >= count or self.error, DEADLINE, f"record {count}")
        assert self.error is None, self.error

    def end(self) -> list[Any]:
        """Wait until the stream has ended; return all of it."""
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        assert self.error is None, self.error
        return self.records


def test_stream_continues_through_ten_kills(tmp_path: Path) -> None:
    """The dispatcher and the frontend are killed five times each; two followers have every record once and in order."""
    done = tmp_path / "done"
    with system(tmp_path) as running_system:
        job = running_system.rpc.web01.count_until(str(done), 0.05)
        followers = [
            Follower(lambda: job.follow(since=0, numbered=True)),
            Follower(lambda: running_system.rpc.job(job.id()).follow(since=0, timed=True)),
        ]
        waiting = Follower(lambda: iter([running_system.rpc.job(job.id()).get()]))
        for follower in followers:
            follower.reach(1)
        for _ in range(5):
            for kill in (partial(running_system.dispatcher.restart, kill=True), partial(again, running_system.harpd)):
                reached = [len(follower.records) for follower in followers]
                kill()
                for follower, count in zip(followers, reached, strict=True):
                    follower.reach(count + 5)
        done.touch()
        numbered, timed = (follower.end() for follower in followers)
        (result,) = waiting.end()
        assert result > 50
        assert numbered == [(number, number) for number in range(result)]
        assert [(number, value) for number, _, value in timed] == numbered
        times = [at for _, at, _ in timed]
        assert times == sorted(times)
        assert list(running_system.rpc.job(job.id()).stream()) == list(range(result))
        details = job.details()
        assert (details["state"], details["records"]["count"]) == ("returned", result)
        assert details["exit_info"]["by"] == "itself"


def test_job_phases_add_up_to_its_duration(tmp_path: Path) -> None:
    done = tmp_path / "done"
    done.touch()
    with system(tmp_path) as running_system:
        job = running_system.rpc.web01.count_until(str(done), 0.05)
        job.get()
        details = job.details()
        phases, time = details["phases"], details["time"]
        assert list(phases) == ["wait", "connect", "authenticate", "fork", "run", "other"]
        assert min(phases.values()) >= 0
        assert sum(phases.values()) == pytest.approx(time["end"] - time["submit"], abs=0.001)


def again(harpd: Harpd) -> None:
    """Kill the frontend and start it again."""
    harpd.kill()
    harpd.start_frontend()


def test_stop_report_of_hostile_call_confirms_its_end(tmp_path: Path) -> None:
    """The call ignores TERM, forks and changes its session; all its processes end, as the stop report shows."""
    pids = tmp_path / "pids"
    pids.touch()
    with system(tmp_path) as running_system:
        job = running_system.rpc.web01.resist(str(pids))
        wait_until(lambda: len(pids.read_text().split()) == 5, DEADLINE, "five processes")
        began = time.monotonic()
        assert job.cancel(wait=True)
        took = time.monotonic() - began
        found = [int(pid) for pid in pids.read_text().split()]
        assert all(map(is_dead, found))
        details = job.details()
        assert (details["stop"], details["holds_slot"]) == ("confirmed", False)
        assert {one["pid"] for one in details["stop_report"]["processes"]} >= set(found)
        assert (details["stop_report"]["survivors"], details["stop_report"]["complete"]) == ([], True)
        assert details["stop_request"]["by"].startswith("127.0.0.1:")
        assert details["exit_info"]["by_whom"] == details["stop_request"]["by"]
        assert "confirmed" in job.why()
        assert took < 0.5 + 20  # kill_grace, and time for a slow machine


def test_cancel_while_host_is_cut_off_is_confirmed_later(tmp_path: Path) -> None:
    with system(tmp_path) as running_system:
        host = running_system.rpc.host("web01", queue={"q": 1})
        job = host.wait_for(str(tmp_path / "never"), 1)
        second = host.count(1)
        wait_until(lambda: (job.details()["call"] or {}).get("instance"), DEADLINE, "the call")
        assert "is full (1 of 1: " + job.id() in second.why()
        call = psutil.Process(running_system.harpd.wait_event("call started", procedure="wait_for")["pid"])
        running_system.harpd.kill()
        assert job.cancel() is True
        assert job.result() is harp.CALL_CANCELLED
        wait_until(lambda: job.details()["call"]["outage"], DEADLINE, "the loss of contact")
        details = job.details()
        assert (details["state"], details["stop"], details["holds_slot"]) == ("cancelled", "pending", True)
        assert "cannot be reached since" in job.why()
        assert call.is_running()
        assert second.details()["state"] == "queued"
        running_system.harpd.start_frontend()
        assert job.cancel(wait=True) is False  # it had ended; the stop is final now
        details = job.details()
        assert (details["stop"], details["holds_slot"]) == ("confirmed", False)
        assert is_dead(call.pid)
        assert second.get() == 1


def test_host_unreachable_too_long_is_lost_and_ended_its_call(tmp_path: Path) -> None:
    with system(tmp_path, disconnect_timeout=1.0, host_timeout=11.0) as running_system:
        host = running_system.rpc.host("web01", queue={"q": 1})
        job = host.wait_for(str(tmp_path / "never"), 1)
        second = host.wait_for(str(tmp_path / "never"), 2)
        wait_until(lambda: (job.details()["call"] or {}).get("instance"), DEADLINE, "the call")
        running_system.harpd.kill()
        wait_until(lambda: running_system.harpd.statuses()[0]["calls"] == 0, DEADLINE, "the end of the call by itself")
        assert job.result() is harp.CALL_NOT_FINISHED
        error = job.result(wait=True)
        assert isinstance(error, harp.RemoteError)
        assert error.type == "host_lost"
        assert "since 20" in error.message
        assert error.data["attempts"] > 1
        assert job.details()["stop"] == "failed"
        assert isinstance(second.result(wait=True), harp.RemoteError)  # its slot was released; the host is lost
        running_system.harpd.start_frontend()
        assert running_system.rpc.web01.count(1).get() == 1
        wait_until(lambda: running_system.harpd.statuses()[0]["resumable"] == 0, DEADLINE, "the orphaned call released")
        assert job.details()["exit_info"]["by"] == "lost_contact"  # its exit info is stored; its end does not change
        assert job.result().type == "host_lost"


def wait_for_records(job: harp.RemoteCall, count: int) -> None:
    wait_until(lambda: job.details()["records"]["count"] >= count, DEADLINE, f"{count} records")


def newer(directory: Path) -> Path:
    """A copy of the programs that is a version ahead: its store has one more column."""
    source = Path(harp.__file__).parents[1]
    copy = directory / "newer"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    migrations = copy / "harpcaller" / "store" / "sqlite" / "migrations"
    number = max(int(file.stem) for file in migrations.glob("*.sql")) + 1
    (migrations / f"{number:04}.sql").write_text("ALTER TABLE jobs ADD COLUMN note TEXT;\n")
    return copy


def test_dispatcher_upgrade_continues_a_hundred_calls(tmp_path: Path) -> None:
    done = tmp_path / "done"
    with system(tmp_path) as running_system:
        plain = [running_system.rpc.web01.wait_for(str(done), number) for number in range(50)]
        streaming = [running_system.rpc.web01.count_until(str(done), 0.1) for _ in range(50)]
        for job in streaming:
            wait_for_records(job, 1)
        wait_until(lambda: running_system.harpd.status()["calls"] == 100, DEADLINE, "a hundred calls")
        followers = [Follower(partial(job.follow, since=0)) for job in streaming[:10]]
        assert running_system.dispatcher.stop(signal.SIGTERM) == 0
        running_system.dispatcher.code = newer(tmp_path)
        running_system.dispatcher.start()
        assert running_system.harpd.status()["calls"] == 100
        before = [job.details()["records"]["count"] for job in streaming]
        for job, count in zip(streaming, before, strict=True):
            wait_for_records(job, count + 1)
        done.touch()
        assert [job.get() for job in plain] == list(range(50))
        for job in streaming:
            assert list(job.stream()) == list(range(job.get()))
        for follower, job in zip(followers, streaming[:10], strict=True):
            assert follower.end() == list(range(job.get()))
        version = running_system.dispatcher.store_directory / "harpcaller.sqlite"
        assert version.exists()


def test_harpd_upgrade_continues_running_calls(tmp_path: Path) -> None:
    """The launcher is restarted: a new supervisor accepts new calls, the old one runs its calls to their end."""
    done = tmp_path / "done"
    with system(tmp_path) as running_system:
        job = running_system.rpc.web01.count_until(str(done), 0.05)
        follower = Follower(lambda: job.follow(since=0))
        follower.reach(5)
        old = running_system.harpd.supervisor
        running_system.harpd.stop_launcher(signal.SIGUSR1)
        running_system.harpd.start_launcher()
        assert running_system.harpd.supervisor != old
        again(running_system.harpd)
        assert running_system.rpc.web01.count(3).get() == 3
        follower.reach(len(follower.records) + 5)
        done.touch()
        assert follower.end() == list(range(job.get()))
        wait_until(lambda: is_dead(old), DEADLINE, "the end of the old supervisor")


def test_job_with_call_unknown_to_host_ends_missing_result(tmp_path: Path) -> None:
    with system(tmp_path) as running_system:
        job = running_system.rpc.web01.wait_for(str(tmp_path / "never"), 1)
        wait_until(lambda: (job.details()["call"] or {}).get("instance"), DEADLINE, "the call")
        running_system.dispatcher.kill()
        running_system.harpd.stop()  # all calls end with it, and no dispatcher is notified
        running_system.harpd.start()
        running_system.dispatcher.start()
        error = job.result(wait=True)
        assert isinstance(error, harp.RemoteError)
        assert error.type == "missing_result"
        assert "does not have the job's call" in error.message


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_call_end_without_dispatcher_is_fetched_at_restart(tmp_path: Path, number: signal.Signals) -> None:
    done = tmp_path / "done"
    with system(tmp_path) as running_system:
        job = running_system.rpc.web01.wait_for(str(done), {"k": [1]})
        wait_until(lambda: (job.details()["call"] or {}).get("instance"), DEADLINE, "the call")
        os.kill(running_system.dispatcher.pid, number)
        running_system.dispatcher.wait()
        done.touch()
        wait_until(lambda: running_system.harpd.status()["calls"] == 0, DEADLINE, "the end of the call")
        assert running_system.harpd.status()["resumable"] == 1
        running_system.dispatcher.start()
        assert job.get() == {"k": [1]}
        wait_until(lambda: running_system.harpd.status()["resumable"] == 0, DEADLINE, "the call discarded")


async def test_full_disk_does_not_end_running_calls(tmp_path: Path) -> None:
    """The disk is full for longer than `disconnect_timeout`; contact continues, and the host waits."""
    done = tmp_path / "done"
    real = await open_store(tmp_path / "store")
    store = Switched(real, "append_records", "finish_job", "finalize_stop", "update_metadata")
    with Harpd(tmp_path / "harpd", PROCEDURES + OWN) as harpd:
        credentials = {"user": harpd.user, "password": harpd.password}
        host = {"hostname": "web01", "address": "127.0.0.1", "port": harpd.port, "credentials": credentials}
        settings: dict[str, Any] = {"resumable_calls": True, "disconnect_timeout": 3.0, "host_timeout": 13.0}
        async with running(tmp_path, json.dumps(host) + "\n", store=store, **settings) as dispatcher:
            flood = await dispatcher.submit(call("flood_until", arguments=[str(done)]), "test")
            quiet = await dispatcher.submit(call("wait_for", arguments=[str(done), 5]), "test")
            await until(dispatcher, flood, lambda job: job.records > 0, "the first record")
            await eventually(lambda: harpd.status()["calls"] == 2, what="both calls")
            store.off = True
            began = time.monotonic()
            while time.monotonic() - began < 6.0:
                await asyncio.sleep(0.1)
                assert harpd.status()["calls"] == 2
            done.touch()
            await eventually(lambda: harpd.status()["calls"] == 0, what="the end of the calls")
            store.off = False
            end = await dispatcher.result(flood)
            assert isinstance(end, Returned), end
            count = int(end.result)
            assert (await dispatcher.get_job(flood)).records == count
            records = [
                pair
                async for item in read(dispatcher, flood)
                if isinstance(item, RecordBatch)
                for pair in decoded(item)
            ]
            assert [int(record[0]) for _, record in records] == list(range(count))
            assert await dispatcher.result(quiet) == Returned(b"5")
    await real.close()
