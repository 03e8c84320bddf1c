"""Commands to a running harpcallerd through the program: output, exit status, no secrets."""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd, LineClient
from support.peers import Peer
from support.scripted import scripted_harpd

UNKNOWN = "00000000-0000-4000-8000-000000000000"
QUEUE = {"name": {"b": 1, "a": 2}}


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("harpd")) as peer:
        yield peer


@pytest.fixture
def dispatcher(tmp_path: Path, peer: Peer) -> Iterator[Harpcallerd]:
    with Harpcallerd(tmp_path, {"web01": peer.port}, ("u", "topsecret")) as dispatcher:
        yield dispatcher


def failure(dispatcher: Harpcallerd, *arguments: str) -> str:
    """Return the error of a command that must fail with 1: exactly one line on stderr."""
    done = dispatcher.control(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("harpcallerd: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("harpcallerd: ").rstrip("\n")


def ended(dispatcher: Harpcallerd, *arguments: Any, **options: Any) -> str:
    job = dispatcher.submit("web01", "echo", *arguments, **options)
    dispatcher.ask(get_result=job)
    return job


def listed(job: str, procedure: str, arguments: Any, times: str) -> dict[str, Any]:
    """Return a job as in a list; `times` has the first letters of the times that are set."""
    time = {name: name[0] in times for name in ("submit", "start", "end")}
    time["start"], time["end"] = "b" in times, "e" in times
    return {"job": job, "call": {"host": "web01", "procedure": procedure, "arguments": arguments}, "time": time}


def with_times_seen(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the jobs with each time, an integer or null, replaced by whether it is set."""
    for job in jobs:
        assert list(job["time"]) == ["submit", "start", "end"]
        assert all(seconds is None or type(seconds) is int for seconds in job["time"].values())
        job["time"] = {name: seconds is not None for name, seconds in job["time"].items()}
    return jobs


def wait_started(dispatcher: Harpcallerd, job: str) -> None:
    wait_until(lambda: dispatcher.ask(get_status=job)[0]["time"]["start"], DEADLINE, "the start")


def test_list_shows_jobs(dispatcher: Harpcallerd) -> None:
    done = ended(dispatcher, {"z": 1, "a": 10**40})
    running = dispatcher.submit("web01", "hang", queue=QUEUE)
    waiting = dispatcher.submit("web01", "echo", queue={"name": {"a": 2, "b": 1}})
    wait_started(dispatcher, running)
    first = listed(done, "echo", [{"z": 1, "a": 10**40}], "sbe")
    second = listed(running, "hang", [], "sb")
    third = listed(waiting, "echo", [], "s")
    assert with_times_seen(dispatcher.listed("list")) == [second, third]
    assert with_times_seen(dispatcher.listed("list", "--all")) == [first, second, third]
    assert with_times_seen(dispatcher.listed("list", "--all", "--queue")) == [
        {**first, "queue": None},
        {**second, "queue": {"b": 1, "a": 2}},
        {**third, "queue": {"a": 2, "b": 1}},
    ]
    assert with_times_seen(dispatcher.listed("queue-list", '{"a": 2, "b": 1.0}')) == [
        {**second, "running": True},
        {**third, "running": False},
    ]
    full = {"queue": {"b": 1, "a": 2}, "concurrency": 1, "running": 1, "queued": 1}
    assert dispatcher.listed("queue-list", "--full") == dispatcher.listed("--full", "queue-list") == [full]
    assert dispatcher.listed("queue-list", "{}") == []


@pytest.mark.parametrize("options", [(), ("--full",)])
def test_queue_list_without_queues_says_so(dispatcher: Harpcallerd, options: tuple[str, ...]) -> None:
    done = dispatcher.control("queue-list", *options)
    message = "harpcallerd: no queue has a queued or running job\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", message)


def test_queue_list_names_can_be_cancelled(dispatcher: Harpcallerd) -> None:
    with dispatcher.connect() as client:
        client.send(
            b'{"harpcaller":1,"host":"web01","procedure":"hang","arguments":[],'
            b'"queue":{"name": {"a b": 1.0, "\\u00fc": "\xc3\xbc"}}}\n'
        )
        assert "job_id" in client.message()
    dispatcher.submit("web01", "hang", queue={"name": {}})
    done = dispatcher.control("queue-list")
    assert (done.returncode, done.stdout, done.stderr) == (0, '{"a b": 1.0, "\\u00fc": "ü"}\n{}\n', "")
    for name in done.stdout.splitlines():
        assert dispatcher.listed("queue-cancel", name) == [{"cancelled": 1}]
    message = 'queue {"no": 1} does not exist, or its jobs have ended'
    assert failure(dispatcher, "queue-cancel", '{"no": 1}') == message


def test_list_newest_of_a_host_or_queue(dispatcher: Harpcallerd) -> None:
    def listed(*options: str) -> list[str]:
        return [job["job"] for job in dispatcher.listed("list", *options)]

    old = [ended(dispatcher, number, **({"queue": QUEUE} if number % 2 else {})) for number in range(4)]
    running = dispatcher.submit("web01", "hang", queue=QUEUE)
    waiting = dispatcher.submit("web01", "echo", queue=QUEUE)
    elsewhere = dispatcher.submit("nowhere", "echo")
    dispatcher.ask(get_result=elsewhere)
    name = "--of-queue=" + json.dumps({"a": 2, "b": 1.0})
    assert listed("--all", "--newest=3") == [elsewhere, waiting, running]
    assert listed("--all", "--newest=1000") == [elsewhere, waiting, running, *old[::-1]]
    assert listed("--newest=1") == [waiting]
    assert listed("--host=web01") == [running, waiting]
    assert listed("--host=web01", "--all", "--newest=3") == [waiting, running, old[3]]
    assert listed("--host=nowhere", "--newest=3") == []
    assert listed("--host=nowhere", "--all") == [elsewhere]
    assert listed("--host=web", "--all") == []
    assert listed(name) == [running, waiting]
    assert listed(name, "--all") == [old[1], old[3], running, waiting]
    assert listed(name, "--all", "--newest=3") == [waiting, running, old[3]]
    assert listed("--of-queue={}", "--all") == []
    assert dispatcher.listed("list", "--newest=1", "--queue")[0]["queue"] == QUEUE["name"]
    both = ("list", "--host=web01", name)
    assert failure(dispatcher, *both) == "host, of_queue: expected one of them, got both"


def test_list_shows_arguments_unchanged(dispatcher: Harpcallerd) -> None:
    with dispatcher.connect() as client:
        client.send(b'{"harpcaller":1,"host":"none","procedure":"p","arguments":[1.10, 1E5,"\\ud800"],"info":0.30}\n')
        job = client.message()["job_id"]
    assert '"arguments":[1.10, 1E5,"\\ud800"]' in dispatcher.control("list", "--all").stdout
    assert '"info":0.30' in dispatcher.control("info", job).stdout


def test_list_of_many_jobs_is_complete_and_ordered(dispatcher: Harpcallerd) -> None:
    jobs = [dispatcher.submit("nowhere", "p", number, "x" * 2000) for number in range(500)]
    assert [job["job"] for job in dispatcher.listed("list", "--all")] == jobs
    assert [job["job"] for job in dispatcher.listed("list", "--all", "--newest=450")] == jobs[:-451:-1]


def test_info_shows_a_job(dispatcher: Harpcallerd) -> None:
    job = ended(dispatcher, 1, queue=QUEUE, info={"who": "me"}, timeout=7)
    (info,) = with_times_seen(dispatcher.listed("info", job))
    assert info == {
        **listed(job, "echo", [1], "sbe"),
        "queue": {"b": 1, "a": 2},
        "info": {"who": "me"},
        "state": "returned",
        "timeout": 7.0,
        "max_exec_time": 600.0,
        "records": 0,
        "end": {"result": [1]},
    }
    assert failure(dispatcher, "info", UNKNOWN) == f"there is no job {UNKNOWN}"
    assert failure(dispatcher, "info", "no id") == "there is no job no id"


def test_cancel_ends_a_job(dispatcher: Harpcallerd) -> None:
    job = dispatcher.submit("web01", "hang")
    done = dispatcher.control("cancel", job)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert dispatcher.ask(get_result=job) == [{"cancelled": True}]
    assert failure(dispatcher, "cancel", job) == f"job {job} has ended or does not exist"


def test_queue_cancel_ends_all_its_jobs(dispatcher: Harpcallerd) -> None:
    jobs = [dispatcher.submit("web01", "hang", queue=QUEUE) for _ in range(3)]
    other = dispatcher.submit("web01", "hang", queue={"name": {}})
    assert dispatcher.listed("queue-cancel", '{"a": 2,\n "b": 1}') == [{"cancelled": 3}]
    assert [dispatcher.ask(get_result=job) for job in jobs] == [[{"cancelled": True}]] * 3
    assert [job["job"] for job in dispatcher.listed("list")] == [other]
    message = failure(dispatcher, "queue-cancel", '{"a": 2, "b": 1}')
    assert message == 'queue {"a": 2, "b": 1} does not exist, or its jobs have ended'


@pytest.mark.parametrize("queue", ["nginx", "[]", '"q"', "{", "NaN"])
def test_invalid_queue_name_is_refused(dispatcher: Harpcallerd, queue: str) -> None:
    for command in ("queue-list", "queue-cancel"):
        done = dispatcher.control(command, queue)
        assert done.returncode == 2
        assert "expected a JSON object" in done.stderr


def test_hosts_are_listed_and_refreshed(dispatcher: Harpcallerd, peer: Peer) -> None:
    assert dispatcher.listed("hosts-list") == [{"hostname": "web01", "address": "127.0.0.1", "port": peer.port}]
    script = dispatcher.directory / "hosts.sh"
    credentials = {"user": "u", "password": "topsecret"}
    host = {"hostname": "db01", "address": "db01.example.net", "port": 4306, "credentials": credentials}
    script.write_text(f"#!/bin/sh\necho '{json.dumps(host)}'\n")
    script.chmod(0o700)
    dispatcher.configure({"host_db_script": str(script)})
    assert dispatcher.control("reload").returncode == 0
    assert dispatcher.listed("hosts-refresh") == []
    assert [host["hostname"] for host in dispatcher.listed("hosts-list")] == ["db01", "web01"]
    script.write_text("#!/bin/sh\nexit 3\n")
    assert failure(dispatcher, "hosts-refresh")
    listing = dispatcher.control("hosts-list")
    assert [json.loads(line)["hostname"] for line in listing.stdout.splitlines()] == ["db01", "web01"]
    assert f"warning: {script} exited with status 3 (hosts are " in listing.stderr
    status = dispatcher.control("status")
    assert status.stdout == "harpcallerd is running\n"
    assert status.stderr.partition(" (")[0] == listing.stderr.partition(" (")[0]
    sources = dispatcher.listed("status", "--full")[0]["hosts_registry"]
    assert (sources["hosts"], sources["hosts_file"]["hosts"], sources["hosts_file"]["error"]) == (2, 1, None)
    assert 0 <= sources["hosts_file"]["age"] < sources["host_db_script"]["age"] + 3600
    first, second = dispatcher.listed("hosts-list", "--full")
    assert (first["source"], first["error"]) == (str(script), f"{script} exited with status 3")
    assert (second["source"], second["error"]) == (str(dispatcher.hosts_file), None)


def test_hosts_refresh_prints_rejected_lines_and_fails(dispatcher: Harpcallerd) -> None:
    valid = dispatcher.hosts_file.read_text()
    password = json.loads(valid)["credentials"]["password"]
    without_port = json.loads(valid) | {"hostname": "web02", "rack": 7}
    del without_port["port"]
    lines = [valid, json.dumps(without_port) + "\n", valid, valid.replace(", ", "", 1), '{"hostname": "web03"}\n']
    dispatcher.hosts_file.write_text("".join(lines))
    for command in ("hosts-refresh", "reload"):
        done = dispatcher.control(command)
        assert done.returncode == 1
        start = f"harpcallerd: hosts registry: {dispatcher.hosts_file}:"
        errors = done.stderr.splitlines()
        assert all(error.startswith(start) for error in errors)
        assert [error.removeprefix(start).partition(": ")[::2] for error in errors] == [
            ("3", "hostname 'web01' is repeated; line 1 counts"),
            ("4", errors[1].rpartition("4: ")[2]),
            ("5", "address: missing"),
        ]
        assert password not in done.stderr
    assert [(host["hostname"], host["port"]) for host in dispatcher.listed("hosts-list")][1] == ("web02", 4306)


def test_hosts_refresh_refuses_an_empty_file_until_forced(dispatcher: Harpcallerd) -> None:
    before = dispatcher.listed("hosts-list")
    dispatcher.hosts_file.write_text("")
    assert [item["change"] for item in dispatcher.listed("hosts-refresh", "--diff")] == ["removed"]
    for command in ("hosts-refresh", "reload"):
        done = dispatcher.control(command)
        assert done.returncode == 1
        assert f"{dispatcher.hosts_file}: refused: it has 0 hosts, and 1 are in use; " in done.stderr
        start = f"harpcallerd: warning: {dispatcher.hosts_file}: refused: "
        assert dispatcher.control("status").stderr.startswith(start)
    assert dispatcher.listed("hosts-list") == before
    assert failure(dispatcher, "hosts-refresh", "--force", "--diff") == "force, diff: expected one of them, got both"
    assert dispatcher.listed("hosts-refresh", "--force") == []
    assert dispatcher.listed("hosts-list") == []


def test_prune_jobs_deletes_old_jobs(dispatcher: Harpcallerd) -> None:
    ended(dispatcher)
    running = dispatcher.submit("web01", "hang")
    for arguments in (["prune-jobs"], ["prune-jobs", "--age=1"]):
        done = dispatcher.control(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")  # a mail of cron would have it
    assert len(dispatcher.listed("list", "--all")) == 2
    wait_until(lambda: dispatcher.listed("prune-jobs", "--age=1e-9") or len(dispatcher.listed("list", "--all")) == 1)
    assert [job["job"] for job in dispatcher.listed("list", "--all")] == [running]


def test_control_output_has_no_password(dispatcher: Harpcallerd) -> None:
    job = ended(dispatcher)
    printed = "".join(
        dispatcher.control(*arguments).stdout
        for arguments in (["hosts-list"], ["list", "--all", "--queue"], ["info", job], ["queue-list"])
    )
    assert "web01" in printed
    assert "topsecret" not in printed
    assert "topsecret" not in dispatcher.log_file.read_text()


def test_control_socket_is_private(dispatcher: Harpcallerd) -> None:
    assert stat.S_IMODE(dispatcher.socket.stat().st_mode) == 0o600


def test_waiting_command_ends_with_the_daemon(dispatcher: Harpcallerd) -> None:
    script = dispatcher.directory / "hosts.sh"
    script.write_text("#!/bin/sh\necho started >&2\nexec sleep 600\n")
    script.chmod(0o700)
    dispatcher.configure({"host_db_script": str(script)})
    assert dispatcher.control("reload").returncode == 0
    with LineClient(socket.socket(socket.AF_UNIX)) as client:
        client.socket.settimeout(DEADLINE)
        client.socket.connect(str(dispatcher.socket))
        client.send({"command": "hosts-refresh"})
        wait_until(lambda: psutil.Process(dispatcher.pid).children(), DEADLINE, "the script")
        children = psutil.Process(dispatcher.pid).children(recursive=True)
        dispatcher.kill()
        with suppress(ConnectionResetError):  # the script may have run for the reload, before the request was read
            assert client.lines() == []
    for child in children:
        child.kill()
    dispatcher.start()


# The socket itself.


def control(dispatcher: Harpcallerd, data: bytes) -> list[Any]:
    with LineClient(socket.socket(socket.AF_UNIX)) as client:
        client.socket.settimeout(DEADLINE)
        client.socket.connect(str(dispatcher.socket))
        client.send(data)
        return client.messages()


COMMANDS = (
    "status, stop, reload, reopen-logs, list, info, cancel, release-slot, queue-list, queue-cancel, hosts-list, "
    "hosts-refresh, token-add, token-list, token-revoke, web-login"
)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"x", "Expecting value at column 1"),
        (b"[]", "expected an object"),
        (b"{}", "command: missing"),
        (b'{"command": 5}', "command: expected a string, got a number"),
        (b'{"command": "dance"}', f"command: expected one of {COMMANDS}, prune-jobs, got 'dance'"),
        (b'{"command": "status", "more": 1}', "unknown key more"),
        (b'{"command": "list", "all": 1}', "all: expected true or false"),
        (b'{"command": "list", "newest": 0}', "newest: expected a whole number of at least 1, got 0"),
        (b'{"command": "list", "newest": true}', "newest: expected a whole number of at least 1, got True"),
        (b'{"command": "list", "newest": 1.5}', "newest: expected a whole number of at least 1, got 1.5"),
        (b'{"command": "list", "newest": null}', "newest: expected a whole number of at least 1, got None"),
        (b'{"command": "list", "host": 1}', "host: expected a string, got a number"),
        (b'{"command": "list", "of_queue": "q"}', "of_queue: expected an object"),
        (b'{"command": "list", "host": "a", "of_queue": {}}', "host, of_queue: expected one of them, got both"),
        (b'{"command": "info"}', "job: missing"),
        (b'{"command": "queue-cancel"}', "queue: missing"),
        (b'{"command": "queue-list", "queue": []}', "queue: expected an object"),
        (b'{"command": "prune-jobs", "age": "x"}', "age: expected a number of seconds above 0, got 'x'"),
        (b'{"command": "prune-jobs", "age": 1%s}' % (b"0" * 400), "age: expected fewer than 100000000000 seconds"),
        (b'{"command": "prune-jobs", "age": 0}', "age: expected a number of seconds above 0, got 0"),
        (b'{"command": "prune-jobs", "age": -1}', "age: expected a number of seconds above 0, got -1"),
    ],
)
def test_invalid_request_is_refused(dispatcher: Harpcallerd, request_: bytes, message: str) -> None:
    assert control(dispatcher, request_ + b"\n") == [{"error": message}]


def test_unread_list_blocks_no_other_request(dispatcher: Harpcallerd) -> None:
    for number in range(200):
        dispatcher.submit("nowhere", "p", number, "x" * 20_000)
    with LineClient(socket.socket(socket.AF_UNIX)) as client:
        client.socket.settimeout(DEADLINE)
        client.socket.connect(str(dispatcher.socket))
        client.send({"command": "list", "all": True})
        assert client.line()
        assert dispatcher.control("status").returncode == 0
        assert len(dispatcher.listed("list", "--all")) == 200
