"""`harpcallerd backup` and `restore`: a consistent copy while jobs are submitted, and the choice about queued jobs."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from support.harpcallerd import Harpcallerd
from support.peers import Peer
from support.scripted import scripted_harpd

QUEUE = {"name": {"service": "nginx"}}


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("harpd")) as peer:
        yield peer


def submit_all_kinds(dispatcher: Harpcallerd) -> tuple[str, str]:
    """Submit a job that returns, and two of a queue; return the first and the last, which stays queued."""
    ended = dispatcher.submit("web01", "echo", 1)
    assert dispatcher.ask(get_result=ended) == [{"result": [1]}]
    dispatcher.submit("web01", "hang", queue=QUEUE)
    return ended, dispatcher.submit("web01", "echo", 2, queue=QUEUE)


def failure(dispatcher: Harpcallerd, *arguments: str) -> str:
    done = dispatcher.control(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr.removeprefix("harpcallerd: ").rstrip("\n")


def restored(dispatcher: Harpcallerd, backup: Path, *options: str) -> tuple[int, str]:
    done = dispatcher.control("restore", f"--config={dispatcher.config_file}", *options, str(backup))
    return done.returncode, done.stderr


def test_backup_is_complete_and_private(tmp_path: Path, peer: Peer) -> None:
    backup = tmp_path / "backup.sqlite"
    with Harpcallerd(tmp_path / "one", {"web01": peer.port}) as dispatcher:
        ended, _ = submit_all_kinds(dispatcher)
        done = dispatcher.control("backup", str(backup))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        listed = dispatcher.control("list", "--all", "--queue").stdout
        assert dispatcher.control("backup", str(backup)).returncode == 0  # an earlier one is replaced
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("backup")] == ["backup.sqlite"]
    with closing(sqlite3.connect(backup)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("SELECT state, count(*) FROM jobs GROUP BY state ORDER BY state").fetchall() == [
            ("queued", 1),
            ("returned", 1),
            ("running", 1),
        ]
    other = Harpcallerd(tmp_path / "two")
    assert restored(other, backup, "--queued=run") == (
        0,
        "harpcallerd: 1 queued jobs: run when harpcallerd starts\n",
    )
    assert other.store_directory.stat().st_uid == (other.store_directory / "harpcaller.sqlite").stat().st_uid
    other.configure({"connect_timeout": 1})
    with other:
        assert other.ask(get_result=ended) == [{"result": [1]}]
        assert {json.loads(line)["job"] for line in listed.splitlines()} == {
            job["job"] for job in other.listed("list", "--all")
        }
        assert not other.events("restored store has queued jobs")  # the operator has decided


def test_backup_while_jobs_are_submitted(tmp_path: Path) -> None:
    with Harpcallerd(tmp_path / "one") as dispatcher:
        stop = threading.Event()
        ids: list[str] = []

        def submit() -> None:
            while not stop.is_set():
                ids.append(dispatcher.submit("nowhere", "p", "x" * 1000))

        submitting = threading.Thread(target=submit)
        submitting.start()
        try:
            for number in range(5):
                before = list(ids)
                assert dispatcher.control("backup", str(tmp_path / f"{number}")).returncode == 0
                with closing(sqlite3.connect(tmp_path / f"{number}")) as db:
                    stored = {id for (id,) in db.execute("SELECT id FROM jobs").fetchall()}
                    assert stored >= set(before)
                    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        finally:
            stop.set()
            submitting.join()


def test_backup_never_overwrites_another_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    with Harpcallerd(tmp_path / "one") as dispatcher:
        store = dispatcher.store_directory / "harpcaller.sqlite"
        for target in (mine, store):
            message = f"{target}: exists, and is not a backup; choose another file"
            assert failure(dispatcher, "backup", str(target)) == message
        assert failure(dispatcher, "backup", "/nowhere/file").startswith("/nowhere/file: its directory does not exist")
        assert dispatcher.control("list").returncode == 0
    assert mine.read_text() == "mine"
    assert failure(dispatcher, "backup", str(mine)).startswith("no harpcallerd is running on ")


def test_restore_requires_a_choice_for_queued_jobs(tmp_path: Path, peer: Peer) -> None:
    backup = tmp_path / "backup"
    with Harpcallerd(tmp_path / "one", {"web01": peer.port}) as dispatcher:
        ended, queued = submit_all_kinds(dispatcher)
        assert dispatcher.control("backup", str(backup)).returncode == 0
        store = dispatcher.store_directory / "harpcaller.sqlite"
        assert restored(dispatcher, backup) == (1, f"harpcallerd: {store}: another dispatcher uses it\n")
    assert restored(dispatcher, backup) == (1, f"harpcallerd: {store}: exists; move it away\n")
    store.rename(tmp_path / "old")
    status, message = restored(dispatcher, backup)
    assert status == 1
    assert "1 jobs are queued in it; those that ran after the backup would run again; choose --queued=" in message
    assert os.listdir(dispatcher.store_directory) == ["harpcaller.reserve"]
    assert restored(dispatcher, backup, "--queued=cancel") == (0, "harpcallerd: 1 queued jobs: cancelled\n")
    with dispatcher:
        assert dispatcher.ask(get_result=queued) == [{"cancelled": True}]
        assert dispatcher.ask(get_result=ended) == [{"result": [1]}]
        assert not any(queue["queued"] for queue in dispatcher.listed("queue-list", "--full"))


def test_restore_refuses_a_file_that_is_no_backup(tmp_path: Path) -> None:
    dispatcher = Harpcallerd(tmp_path / "one")
    other = tmp_path / "other"
    other.write_text("x" * 100)
    assert restored(dispatcher, other) == (1, f"harpcallerd: {other}: not a backup of a store\n")
    other.write_bytes(b"")
    assert restored(dispatcher, other) == (1, f"harpcallerd: {other}: not a backup of a store\n")


def test_start_with_a_copied_backup_logs_queued_jobs(tmp_path: Path, peer: Peer) -> None:
    with Harpcallerd(tmp_path / "one", {"web01": peer.port}) as dispatcher:
        submit_all_kinds(dispatcher)
        assert dispatcher.control("backup", str(tmp_path / "backup")).returncode == 0
    for path in dispatcher.store_directory.iterdir():
        path.unlink()
    (tmp_path / "backup").rename(dispatcher.store_directory / "harpcaller.sqlite")
    with dispatcher:
        assert dispatcher.events("restored store has queued jobs", level="warning", jobs=1)
