"""Lists of a real system: `HarpCaller.jobs`, `hosts`, `queues`, `count_jobs`, and the commands of `harp` for people."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import harp
from harp import aio
from harp.cli import Exit
from support.blocking import LoopThread
from support.harpcallerd import Harpcallerd
from support.peers import DEADLINE, Peer, PeerConnection, answering
from support.shells import Shell
from support.system import System, running
from support.terminal import Terminal

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
    assert {(host.state, host.limit) for host in hosts} == {("up", 250)}
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
    rpc = system.rpc
    rpc.jobs("state:bad").all()
    rpc.count_jobs("host:db01")
    rpc.hosts("db").all()
    rpc.queues("slow").all()
    file = system.dispatcher.directory.parent / "audit.jsonl"
    entries = [entry for entry in map(json.loads, file.read_text().splitlines()) if entry["action"] == "list"][-4:]
    assert [(entry["target"], entry["filter"], entry["decision"]) for entry in entries] == [
        ("jobs", "state:raised,failed", "allowed"),
        ("counts", "host:db01", "allowed"),
        ("hosts", "db", "allowed"),
        ("queues", "slow", "allowed"),
    ]


def test_lists_without_access_file_need_a_role(tmp_path: Path) -> None:
    socket = tmp_path / "calls"
    settings = {"listen": ["127.0.0.1:0", f"unix:{socket}"], "tokens_file": str(tmp_path / "tokens")}
    with Harpcallerd(tmp_path / "harpcallerd", {"web01": 1}, settings=settings) as dispatcher:
        tokens = [
            dispatcher.control("token", "add", name, *options).stdout.strip()
            for name, options in (("shop", ()), ("watcher", ("--role=viewer",)))
        ]
        port = next(event["port"] for event in dispatcher.events("harpcallerd is serving") if "port" in event)
        anonymous = harp.HarpCaller("127.0.0.1", port, keep_alive=False)
        without_role = harp.HarpCaller("127.0.0.1", port, keep_alive=False, token=tokens[0])
        viewer = harp.HarpCaller("127.0.0.1", port, keep_alive=False, token=tokens[1])
        daemons_user = harp.HarpCaller(f"unix:{socket}", keep_alive=False)
        for rpc in (anonymous, without_role):
            assert rpc.web01.backup().id()
            for read in (rpc.jobs().all, rpc.hosts().all, rpc.queues().all, rpc.count_jobs):
                with pytest.raises(harp.AccessDenied):
                    read()
        for rpc in (viewer, daemons_user):
            assert len(rpc.jobs().all()) == 2
            assert [host.name for host in rpc.hosts().all()] == ["web01"]


def test_list_continues_after_a_restart_of_the_dispatcher(tmp_path: Path) -> None:
    (tmp_path / "access.toml").write_text(ACCESS)
    settings = {"access_file": str(tmp_path / "access.toml")}
    with Harpcallerd(tmp_path / "harpcallerd", settings=settings) as dispatcher, LoopThread() as thread:
        rpc = harp.HarpCaller("127.0.0.1", dispatcher.port, keep_alive=False)
        submitted = [
            job.id() for job in rpc.submit_many([harp.Call("nowhere", "p", (number,)) for number in range(250)])
        ]
        newest = rpc.jobs()
        oldest = aio.AsyncHarpCaller("127.0.0.1", dispatcher.port, keep_alive=False).jobs(oldest_first=True)
        found = [[next(newest).id], [thread.run(anext(oldest)).id]]
        dispatcher.restart(kill=True)
        found[0] += [job.id for job in newest]
        found[1] += [job.id for job in thread.run(oldest.all())]
    assert found == [submitted[::-1], submitted]


def test_lists_have_only_jobs_that_the_rules_allow(tmp_path: Path) -> None:
    rules = tmp_path / "access.toml"
    rules.write_text('[[rule]]\nwho = ["token:*"]\nallow = ["call", "read", "list"]\n')
    settings = {"access_file": str(rules), "tokens_file": str(tmp_path / "tokens")}
    with Harpcallerd(tmp_path / "harpcallerd", {"web01": 1}, settings=settings) as dispatcher:
        one, other = (
            harp.HarpCaller("127.0.0.1", dispatcher.port, keep_alive=False, token=text.strip())
            for text in (dispatcher.control("token", "add", name).stdout for name in ("one", "other"))
        )
        of_one, of_other = one.web01.backup().id(), other.web01.backup("secret").id()
        for rpc, job in ((one, of_one), (other, of_other)):
            assert [found.id for found in rpc.jobs().all()] == [job]
            assert [each.count for each in rpc.count_jobs(by="host").by["host"]] == [1]
        for filter in (f"id:{of_other}", "arguments:secret", "owner:token:other"):
            found = one.jobs(filter)
            assert found.all() == []
            assert found.examined <= 1  # its own job


# The commands for people.

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
COLOUR = re.compile(r"\x1b\[[0-9;]+m")


def on_terminal(system: System, *arguments: str, columns: int = 140, program: str = PROGRAM, **more: str) -> Terminal:
    command = [sys.executable, "-c", program, *arguments]
    return Terminal(command, environment(system, **more), columns=columns)


def test_command_jobs_prints_json_lines_in_a_pipe(system: System) -> None:
    found = lines(system, "jobs", "state:bad", "procedure:backup")
    assert [(job["host"], job["state"], job["end_type"]) for job in found] == [
        ("nowhere", "failed", "unknown_host"),
        ("db02", "raised", "OSError"),
    ]
    assert set(found[0]) >= {"job", "time", "queue", "records", "can"}
    assert json.loads(run(system, "jobs", "state:bad", "procedure:backup", "--format", "json").stdout) == found
    assert len(lines(system, "jobs", "procedure:backup", "--limit", "1")) == 1
    (oldest,) = lines(system, "jobs", "--oldest", "--limit", "1", "procedure:clear_cache,backup")
    assert oldest["arguments_preview"] == '["blog"]'


def test_command_jobs_prints_an_aligned_table(system: System) -> None:
    done = run(system, "jobs", "procedure:backup", "--format", "table", "--columns", "state,host,procedure,records,end")
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["STATE", "HOST", "PROCEDURE", "RECORDS", "END"]
    assert [row.split()[:2] for row in rows] == [
        ["failed", "nowhere"],
        ["returned", "db03"],
        ["raised", "db02"],
        ["returned", "db01"],
    ]
    assert {row.index("backup") for row in rows} == {head.index("PROCEDURE")}
    assert rows[2].endswith("OSError: [Errno 28] No space left on device: '/backup/orders.dump'")
    unknown = run(system, "jobs", "--columns", "state,hots")
    assert unknown.returncode == Exit.USAGE
    assert "unknown column 'hots'; columns: job,state,host" in unknown.stderr


def test_command_jobs_on_a_terminal_has_colours_and_a_hint(system: System) -> None:
    with on_terminal(system, "jobs", "procedure:backup") as terminal:
        text = terminal.read_all()
        assert COLOUR.search(terminal.printed)
    assert "raised" in text
    assert "OSError: [Errno 28]" in text
    assert "harp show JOB explains one" in text
    with on_terminal(system, "jobs", "procedure:backup", NO_COLOR="1") as terminal:
        terminal.read_all()
        assert not re.search(r"\x1b\[[0-9;]*3[0-9]", terminal.printed)


def test_long_search_shows_progress_and_what_was_found(system: System) -> None:
    job = run(system, "jobs", "host:db02").stdout
    third_asked = threading.Event()  # interrupted between connecting and asking, the program asks nothing

    def never_ending(conn: PeerConnection) -> None:
        request = conn.expect()
        if "submit_many" in request:  # the question whether it supports keep-alive
            conn.reply({"harpcaller": 1, "job_ids": []})
        elif request.get("cursor") == "third":
            third_asked.set()
            conn.until_closed()
        else:
            first = "cursor" not in request
            page = {"jobs": [json.loads(job)] if first else [], "next": "second" if first else "third"}
            conn.reply({**page, "examined": 10_000, "searched_to": 1.0})

    with Peer(always=never_ending) as peer:
        with on_terminal(system, "jobs", "raised", HARP_DISPATCHER=f"{peer.host}:{peer.port}") as terminal:
            terminal.read_until("searched 20000 jobs, back to 1970-01-01; Ctrl-C shows what was found")
            assert third_asked.wait(DEADLINE)
            assert terminal.interrupt() == Exit.INTERRUPTED
    assert "OSError" in terminal.text.rpartition("what was found")[2]


def test_command_jobs_shows_no_progress_without_a_second_page(system: System) -> None:
    with on_terminal(system, "jobs", "--limit", "2") as terminal:
        assert "--limit N prints more" in terminal.read_all()
        assert "searched" not in terminal.printed


def test_command_jobs_without_rich_prints_the_same_text(system: System) -> None:
    without = "import sys; sys.modules['rich'] = None; " + PROGRAM.removeprefix("import sys; ")
    with on_terminal(system, "jobs", "procedure:backup,hostile") as terminal:
        expected = [line.rstrip() for line in terminal.read_all().splitlines()]
    with on_terminal(system, "jobs", "procedure:backup,hostile", program=without) as terminal:
        assert [line.rstrip() for line in terminal.read_all().splitlines()] == expected
        assert "\x1b" not in terminal.printed


@pytest.mark.parametrize("columns", [80, 100])
def test_command_jobs_fits_a_narrow_terminal(system: System, columns: int) -> None:
    with on_terminal(system, "jobs", "procedure:backup,hostile", columns=columns) as terminal:
        table = terminal.read_all().splitlines()[:-1]
    assert max(map(len, table)) <= columns
    beginning = table[1].split()[0]
    assert len(beginning) < 36
    assert lines(system, "show", beginning)[0]["job"].startswith(beginning)


@pytest.mark.parametrize("command", [("jobs", "procedure:hostile"), ("show", "procedure:hostile")])
def test_texts_of_jobs_change_no_terminal(system: System, command: tuple[str, ...]) -> None:
    for more in ([], ["--format", "table"]):
        assert not CONTROL.search(run(system, *command, *more).stdout)
    with on_terminal(system, *command, columns=200) as terminal:
        text = terminal.read_all()
        assert "\x1b]" not in terminal.printed
        assert "\x1b[2J" not in terminal.printed
        assert "\u202e" not in terminal.printed
    assert "[bold]evil[/bold]" in text
    assert "\\u001b[2J" in text


def test_command_jobs_explains_what_state_failed_leaves_out(system: System) -> None:
    hint = "harp: state:failed leaves out jobs whose procedure raised an exception (state:raised); state:bad is both"
    found = run(system, "jobs", "state:failed", "host:db02")
    assert (found.returncode, found.stdout, found.stderr) == (Exit.OK, "", hint + "\n")
    assert run(system, "jobs", "state:failed", "host:nowhere").stderr == ""  # found, and no person reads it
    assert run(system, "jobs", "state:bad", "host:web99").stderr == ""
    with on_terminal(system, "jobs", "state:failed") as terminal:
        assert hint[:60] in terminal.read_all()


def test_command_jobs_counts(system: System) -> None:
    found = lines(system, "jobs", "procedure:backup", "--count", "state")
    assert {each["state"]: each["count"] for each in found} == {"returned": 2, "raised": 1, "failed": 1}
    table = run(system, "jobs", "procedure:backup", "--count", "state", "--format", "table").stdout
    assert re.search(r"^returned +2$", table, re.MULTILINE)


def test_command_jobs_with_invalid_filter_is_wrong_usage(system: System) -> None:
    done = run(system, "jobs", "stat:bad")
    assert (done.returncode, done.stdout) == (Exit.USAGE, "")
    assert "did you mean state?" in done.stderr


def test_commands_hosts_and_queues(system: System) -> None:
    assert [host["name"] for host in lines(system, "hosts", "db")] == ["db01", "db02", "db03"]
    table = run(system, "hosts", "--format", "table").stdout.splitlines()
    assert table[0].split()[:3] == ["HOST", "STATE", "ADDRESS"]
    assert f"127.0.0.1:{system.harpd.port}" in table[1]
    job = system.rpc.host("web01", queue={"slow": 2}).wait(30)
    try:
        (queue,) = lines(system, "queues", "slow")
        assert (queue["name"], queue["running"], queue["queued"]) == ('{"slow":2}', 1, 0)
        assert '{"slow":2}' in run(system, "queues", "--format", "table").stdout
    finally:
        job.cancel(wait=True)


def test_commands_hosts_and_queues_say_that_nothing_matches(system: System) -> None:
    for command, text, expected in (
        ("hosts", "nothing", "no host matches"),
        ("queues", "nothing", "no queue matches"),
        ("queues", "", "there are no queues"),
    ):
        with on_terminal(system, command, *filter(None, [text])) as terminal:
            assert terminal.read_all().strip() == expected
    assert run(system, "hosts", "nothing").stdout == ""
    assert run(system, "hosts", "nothing", "--format", "table").stdout.split()[0] == "HOST"


def test_command_hosts_cuts_long_names_on_a_narrow_terminal() -> None:
    host = {"name": "a-long-name." * 8, "address": "192.0.2.1", "port": 4306, "state": "up", "running": 0, "queued": 0}
    with Peer(answering({"hosts": [host], "next": None})) as peer:
        variables = {"HARP_DISPATCHER": f"{peer.host}:{peer.port}", "PATH": os.environ["PATH"]}
        with Terminal([sys.executable, "-c", PROGRAM, "hosts"], variables, columns=80) as terminal:
            printed = terminal.read_all().splitlines()
    assert [len(line) <= 80 for line in printed] == [True, True]
    assert "…" in printed[1]


def test_command_show_prints_all_of_a_job(system: System) -> None:
    (failed,) = system.rpc.jobs("procedure:backup host:db02").all()
    done = run(system, "show", failed.id, "--format", "table")
    for expected in (
        r"^job +" + failed.id,
        r"^state +raised$",
        r"^why +it raised OSError after ",
        r"^call +backup on db02$",
        r'^arguments +\["orders"\]$',
        r'^queue +\{"backup": "db02"\}$',
        r"^started +20\d\d-\d\d-\d\d \d\d:\d\d:\d\d, after .*s in the queue$",
        r"^ended +.*, it took .*s$",
        r"^exception +OSError: \[Errno 28\] No space left on device: '/backup/orders.dump'$",
        r"^records +3$",
        r'^ +2 .*\{"table": "orders", "error": "write failed", "device": "/dev/sdb1"\}$',
    ):
        assert re.search(expected, done.stdout, re.MULTILINE), (expected, done.stdout)
    assert "process " not in done.stdout, "an exit status of 0 would read as a success"
    (page,) = lines(system, "show", failed.id, "--recent", "1")
    assert page["exit_info"].items() >= {"exit": 0, "by": "itself"}.items()
    assert page["end"]["exception"]["type"] == "OSError"
    assert page["recent_records"][0]["data"]["error"] == "write failed"
    assert [record["packet"] for record in page["recent_records"]] == [2]


def test_command_show_says_what_to_do(system: System) -> None:
    done = run(system, "show", "host:nowhere", "--format", "table")
    assert re.search(r"^error +unknown_host: ", done.stdout, re.MULTILINE)
    assert re.search(r"^what to do .*harpcallerd hosts-refresh", done.stdout, re.MULTILINE)


def test_command_show_finds_a_job_by_words_or_start_of_its_id(system: System) -> None:
    (newest, *_) = system.rpc.jobs("procedure:backup").all()
    done = run(system, "show", "procedure:backup")
    assert json.loads(done.stdout)["job"] == newest.id
    assert "the newest job that matches; see harp jobs procedure:backup" in done.stderr
    several = run(system, "show", newest.id[:8])
    assert several.returncode == Exit.USAGE
    assert f"several jobs begin with {newest.id[:8]}: " in several.stderr
    for unknown in ("00000000-0000", "00000000-0000-7000-8000-000000000000", "procedure:nothing"):
        missing = run(system, "show", unknown)
        assert (missing.returncode, missing.stdout) == (Exit.FAILED, ""), missing.stderr


@pytest.mark.parametrize("command", ["result", "status", "details", "why", "follow", "read", "cancel"])
def test_commands_accept_the_beginning_of_an_id(system: System, command: str) -> None:
    (job, *_) = [found.id for found in system.rpc.jobs("procedure:clear_cache").all()]
    ids = [found.id for found in system.rpc.jobs().all()]
    beginning = next(job[:end] for end in range(8, 36) if sum(each.startswith(job[:end]) for each in ids) == 1)
    expected, done = run(system, command, job), run(system, command, beginning)
    assert (done.stdout, done.returncode) == (expected.stdout, expected.returncode), done.stderr
    assert "there is no job" not in done.stderr
    several = run(system, command, job[:8])
    assert several.returncode == Exit.USAGE
    same = [each for each in ids if each.startswith(job[:8])]
    assert sum(each in several.stderr for each in same) == min(10, len(same)) > 1
    missing = run(system, command, "00000000-0000")
    assert (missing.returncode, missing.stdout) == (Exit.FAILED, "")
    assert "there is no job whose id begins with 00000000-0000" in missing.stderr


def test_cancel_tells_an_ended_job_from_an_unknown_one(system: System) -> None:
    (ended, *_) = system.rpc.jobs("procedure:clear_cache").all()
    done = run(system, "cancel", ended.id)
    assert (done.stdout, done.stderr, done.returncode) == ("false\n", "", Exit.CANCELLED)
    for unknown in ("nonsense", "00000000-0000-7000-8000-000000000000"):
        done = run(system, "cancel", unknown)
        assert (done.stdout, done.returncode) == ("", Exit.FAILED)
        assert f"there is no job {unknown}" in done.stderr


def test_watch_in_a_pipe_prints_each_change(system: System) -> None:
    command = [sys.executable, "-c", PROGRAM, "jobs", "procedure:wait", "state:open", "--watch", "--interval", "0.1"]
    with subprocess.Popen(command, env=environment(system), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        job = system.rpc.web01.wait(30)
        states = []
        try:
            for line in process.stdout:
                row = json.loads(line)
                if row["job"] == job.id():
                    states.append(row["state"])
                    if row["state"] == "running":
                        job.cancel(wait=True)
                    if row["time"]["end"] is not None and not row["holds_slot"]:
                        break
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == Exit.INTERRUPTED
    assert [state for state in dict.fromkeys(states) if state != "queued"] == ["running", "cancelled"]


def test_watch_on_a_terminal_updates_in_place(system: System) -> None:
    with on_terminal(system, "jobs", "procedure:wait", "state:open", "--watch", "--interval", "0.1") as terminal:
        terminal.read_until("no job matches")
        job = system.rpc.web01.wait(30)
        terminal.read_until("running")
        job.cancel(wait=True)
        terminal.read_until("no job matches", len(terminal.text))
        assert terminal.interrupt() == Exit.INTERRUPTED
        assert terminal.printed.count("\x1b[?1049h") == terminal.printed.count("\x1b[?1049l") == 1
        assert "\x1b[2J" not in terminal.printed


def test_watch_shows_an_outage_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "access.toml").write_text(ACCESS)
    settings = {"access_file": str(tmp_path / "access.toml")}
    with Harpcallerd(tmp_path / "harpcallerd", settings=settings) as dispatcher:
        watched = {"HARP_DISPATCHER": f"127.0.0.1:{dispatcher.port}", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", PROGRAM, "jobs", "--watch", "--interval", "0.1"]
        with Terminal(command, {**os.environ, **watched}) as terminal:
            terminal.read_until("no job matches")
            dispatcher.kill()
            terminal.read_until("not reachable: ")
            dispatcher.start()
            job = harp.HarpCaller("127.0.0.1", dispatcher.port, keep_alive=False).nowhere.backup()
            terminal.read_until(job.id())
            assert terminal.interrupt() == Exit.INTERRUPTED


def test_commands_for_programs_load_no_tables(system: System) -> None:
    program = (
        "import sys, harp.cli; sys.exit(', '.join([n for n in sys.modules if n in ('rich', 'harp._terminal')]) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    program = f"{PROGRAM.removesuffix('sys.exit(main())')}main(sys.argv[1:]); sys.exit('rich' in sys.modules)"
    command = [sys.executable, "-c", program, "jobs", "--limit", "1"]
    subprocess.run(command, env=environment(system), check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_operator_finds_the_cause_in_three_commands(system: System) -> None:
    """Somebody who knows only "something is wrong with last night's backups" sees a prompt, and help."""
    help = run(system, "--help").stdout
    assert re.search(r"^ +jobs +list jobs", help, re.MULTILINE)
    assert "harp jobs backup state:bad" in help
    # The word of the sentence is enough: it is in the name of the procedure.
    with on_terminal(system, "jobs", "backup", columns=120) as terminal:
        table = terminal.read_all()
    (suspect,) = [line for line in table.splitlines() if "raised" in line]
    assert "db02" in suspect
    assert "harp show JOB explains one" in table
    assert "state:bad lists only those that went wrong" in table
    with on_terminal(system, "show", suspect.split()[0], columns=120) as terminal:
        page = terminal.read_all()
    assert "No space left on device: '/backup/orders.dump'" in page
    (record,) = [line for line in page.splitlines() if "write failed" in line]
    assert '"device": "/dev/sdb1"' in record
