"""Secret arguments in the whole system: the plain text reaches the procedure, and nothing else."""

from __future__ import annotations

import itertools
import json
import resource
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from harpcaller.secret_arguments import add_key
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.system import DEADLINE, System, running

SECRET = 'hün"ter2 corréct\\horse'
PROCEDURES = """
import os, sys, threading, time
from harpd.proc import Result, procedure, streaming_procedure

@procedure()
def check(user, password):
    return [user, len(password), password.startswith("hün")]

@procedure()
def leak(password):
    return {"password": password}

@procedure()
def loud(password):
    print("the password is", password, file=sys.stderr, flush=True)
    os.kill(os.getpid(), 9)

@procedure()
def fail(password):
    int(password)

@streaming_procedure()
def records(password, go):
    yield {"got": password}
    while not os.path.exists(go):
        time.sleep(0.02)
    yield [password, 2]
    yield Result(password)

@procedure()
def crash(password):
    os.kill(os.getpid(), 9)

@procedure(timeout=60)
def wait(password, go):
    while not os.path.exists(go):
        time.sleep(0.02)
    return "done with " + password

@procedure()
def core_limit(password):
    import resource
    return resource.getrlimit(resource.RLIMIT_CORE)

@procedure(max_calls_per_process=5)
def print_later(password, go):
    if password:
        def run():
            while not os.path.exists(go):
                time.sleep(0.02)
            print("later", password, flush=True)
        threading.Thread(target=run, daemon=True).start()
    else:
        open(go, "x").close()
    return os.getpid()

@procedure()
def echo(password, value):
    print(value)
    return value

@procedure()
def raises(password, before, after):
    raise RuntimeError("x" * before + password + "y" * after)

@procedure()
def write(password, before, line_feed):
    sys.stdout.write("x" * before)
    sys.stdout.flush()
    sys.stdout.write(password + line_feed)
"""


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    key_file = tmp_path / "keys"
    add_key(key_file)
    settings = {"secrets_key_file": str(key_file), "log_level": "debug"}
    harpd = {"exit_info": {"stderr": True}}
    with running(tmp_path, PROCEDURES, harpd, settings, names=("web01", "web02")) as found:
        yield found


def submit(dispatcher: Harpcallerd, procedure: str, arguments: Any, secrets: list[str], **options: Any) -> str:
    (reply,) = dispatcher.ask(host="web01", procedure=procedure, arguments=arguments, secrets=secrets, **options)
    return str(reply["job_id"])


def files_with(secret: str, directory: Path) -> list[str]:
    """Return which files have the text in any form, of all of both daemons: state, store, logs, configuration."""
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != "procedures.py"]
    assert any(file.name == "harpcaller.sqlite" for file in files)
    return [f"{file}: {form!r}" for file in files for form in forms(secret) if form in file.read_bytes()]


def of_processes() -> bytes:
    """Return the command lines and the environments of all processes."""
    texts = []
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                texts.append((process / name).read_bytes())
            except OSError:  # it has ended
                continue
    return b"\n".join(texts)


def forms(secret: str) -> list[bytes]:
    """Return how the text may be written: as it is, as `repr`, as JSON."""
    texts = secret, repr(secret)[1:-1]
    as_json = [json.dumps(text, ensure_ascii=ascii_only)[1:-1] for text in texts for ascii_only in (True, False)]
    return [text.encode() for text in [*texts, *as_json]]


def test_secret_reaches_the_procedure_and_nothing_else(system: System, tmp_path: Path) -> None:
    dispatcher, go = system.dispatcher, tmp_path / "go"
    replies: list[Any] = []

    def ask(**request: Any) -> list[Any]:
        received = dispatcher.ask(**request)
        replies.append(received)
        return received

    jobs = {
        "check": submit(dispatcher, "check", ["a", SECRET], ["/1"]),
        "leak": submit(dispatcher, "leak", {"password": SECRET}, ["/password"]),
        "fail": submit(dispatcher, "fail", [SECRET], ["/0"]),
        "crash": submit(dispatcher, "crash", [SECRET], ["/0"], request_id="crash"),
        "records": submit(dispatcher, "records", [SECRET, str(go)], ["/0"]),
        "wait": submit(dispatcher, "wait", [SECRET, str(go)], ["/0"], queue={"name": {"q": 1}}),
        "queued": submit(dispatcher, "wait", [SECRET, str(go)], ["/0"], queue={"name": {"q": 1}}),
        "cancelled": submit(dispatcher, "wait", [SECRET, str(go)], ["/0"], queue={"name": {"q": 1}}),
    }
    assert submit(dispatcher, "crash", [SECRET], ["/0"], request_id="crash") == jobs["crash"]
    assert ask(get_result=jobs["check"]) == [{"result": ["a", len(SECRET), True]}]
    assert ask(get_result=jobs["leak"]) == [{"result": {"password": "***"}}]
    (failed,) = ask(get_result=jobs["fail"])
    assert failed["exception"]["type"] == "ValueError"
    assert failed["exception"]["message"] == "invalid literal for int() with base 10: '***'"
    ask(get_result=jobs["crash"])
    wait_until(lambda: "packet" in dispatcher.ask(read_stream=jobs["records"])[0], DEADLINE, "a record")
    assert of_processes().find(SECRET.encode()) < 0
    dispatcher.kill()
    assert files_with(SECRET, tmp_path) == []
    dispatcher.start()
    assert ask(cancel=jobs["cancelled"]) == [{"cancelled": True}]
    go.touch()
    assert ask(get_result=jobs["records"]) == [{"result": "***"}]
    assert [line["data"] for line in ask(read_stream=jobs["records"], since=0)[:-1]] == [{"got": "***"}, ["***", 2]]
    assert ask(get_result=jobs["wait"]) == [{"result": "done with ***"}]
    assert ask(get_result=jobs["queued"]) == [{"result": "done with ***"}]
    for job in jobs.values():
        ask(get_status=job)
        ask(get_details=job)
    listed = [dispatcher.listed("list", "--all"), *(dispatcher.listed("info", "--full", job) for job in jobs.values())]
    texts = json.dumps([replies, listed], ensure_ascii=False), json.dumps([replies, listed])
    for form in forms(SECRET):
        for text in texts:
            assert form not in text.encode()
        assert form not in "\n".join(system.log_lines()).encode()
    assert files_with(SECRET, tmp_path) == []
    assert dispatcher.ask(get_status=jobs["check"])[0]["call"]["arguments"] == ["a", "***"]


def test_printed_secret_is_masked_in_log_and_exit_info(system: System, tmp_path: Path) -> None:
    job = submit(system.dispatcher, "loud", [SECRET], ["/0"])
    (reply,) = system.dispatcher.ask(get_result=job)
    assert reply["error"]["type"] == "call_died"
    (details,) = system.dispatcher.ask(get_details=job)
    assert details["details"]["exit_info"]["stderr"][-1:] == ["the password is ***"]
    printed = system.harpd.wait_event("call printed", stream="stderr")
    assert printed["text"] == "the password is ***"
    assert files_with(SECRET, tmp_path) == []


def test_secret_that_an_earlier_call_prints_is_masked(system: System, tmp_path: Path) -> None:
    """A worker runs one call after the other; what the first one has left prints while the second one runs."""
    go = tmp_path / "go"
    job = submit(system.dispatcher, "print_later", [SECRET, str(go)], ["/0"])
    (first,) = system.dispatcher.ask(get_result=job)
    later = submit(system.dispatcher, "print_later", ["", str(go)], [])
    assert system.dispatcher.ask(get_result=later) == [first]
    assert system.harpd.wait_event("call printed", call=later)["text"] == "later ***"


def test_printed_secret_that_crosses_the_end_of_an_event_is_masked(system: System) -> None:
    secret = "first-part-of-it--second-part-of-it"
    written = [*itertools.product((8180, 8192 - 500, 16384 - 20), ("", "\n"))]
    jobs = [submit(system.dispatcher, "write", [secret, *each], ["/0"]) for each in written]
    for job in jobs:
        assert system.dispatcher.ask(get_result=job) == [{"result": None}]

    def printed() -> list[str]:
        """Return what each call has printed; the last event may follow the end of the call."""
        texts: dict[str, str] = {}
        for event in system.harpd.events("call printed"):
            texts[event["call"]] = texts.get(event["call"], "") + event["text"]
        return sorted(texts.values())

    length = sum(before + len("***") for before, _ in written)
    wait_until(lambda: len("".join(printed())) >= length, DEADLINE, "the printed texts")
    assert printed() == sorted("x" * before + "***" for before, _ in written)


def test_call_with_a_secret_dumps_no_core(system: System) -> None:
    """Also if no text is masked. The usual limits are those of harpd."""
    limits = []
    for arguments, secrets in (([SECRET], ["/0"]), ([1234567], ["/0"]), ([SECRET], [])):
        job = submit(system.dispatcher, "core_limit", arguments, secrets)
        (reply,) = system.dispatcher.ask(get_result=job)
        limits.append(reply["result"])
    assert limits == [[1, 1], [1, 1], [*resource.getrlimit(resource.RLIMIT_CORE)]]


def test_exception_that_is_cut_within_a_secret_has_no_part_of_it(system: System) -> None:
    """harpd cuts the text of the exception, and its traceback, before it masks them."""
    secret = "first-part-of-it--second-part-of-it"
    for before, after in ((65536 - 20, 100), (0, 16384 - 20)):
        job = submit(system.dispatcher, "raises", [secret, before, after], ["/0"])
        (reply,) = system.dispatcher.ask(get_result=job)
        assert reply["exception"]["message"].count("x") > before - 50
        for text in (json.dumps(reply), "\n".join(system.log_lines())):
            assert "first-part" not in text
            assert "second-part" not in text


def test_secret_that_looks_like_a_part_of_json_breaks_nothing(system: System) -> None:
    value = {"number": 12345, "nothing": None, "flag": True, "list": ["a", "b"]}
    jobs = []
    for secret in ("null", "1234", "exit", "true", '": ', "], "):
        jobs.append(job := submit(system.dispatcher, "echo", [secret, value], ["/0"]))
        assert system.dispatcher.ask(get_result=job) == [{"result": value}]
        (details,) = system.dispatcher.ask(get_details=job)
        assert details["details"]["exit_info"]["exit"] == 0
    assert {row["job"] for row in system.dispatcher.listed("list", "--all")} == {*jobs}


def test_ciphertext_is_erased_when_the_job_ends(system: System, tmp_path: Path) -> None:
    go = tmp_path / "go"
    job = submit(system.dispatcher, "wait", [SECRET, str(go)], ["/0"])

    def stored() -> int:
        with closing(sqlite3.connect(system.dispatcher.store_directory / "harpcaller.sqlite")) as db:
            return int(db.execute("SELECT count(*) FROM calls WHERE secrets IS NOT NULL").fetchone()[0])

    assert stored() == 1
    go.touch()
    assert system.dispatcher.ask(get_result=job) == [{"result": "done with ***"}]
    wait_until(lambda: stored() == 0, DEADLINE, "the erasure")


def test_jobs_of_a_key_that_was_removed_fail_with_the_reason(system: System, tmp_path: Path) -> None:
    go = tmp_path / "go"
    queue = {"name": {"q": 1}}
    first = submit(system.dispatcher, "wait", [SECRET, str(go)], ["/0"], queue=queue)
    second = submit(system.dispatcher, "wait", [SECRET, str(go)], ["/0"], queue=queue)
    key_file = tmp_path / "keys"
    key_file.unlink()
    add_key(key_file)
    system.dispatcher.reload()
    go.touch()
    assert system.dispatcher.ask(get_result=first) == [{"result": "done with ***"}]
    (failed,) = system.dispatcher.ask(get_result=second)
    assert failed["error"]["type"] == "secrets_unavailable"
    assert f"{key_file} has no key" in failed["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "secrets", "reason"),
    [
        ([SECRET], ["/1"], "no value at '/1'"),
        ([SECRET], ["x"], "expected a JSON pointer"),
        ([SECRET], "x", "expected an array of at most 20 JSON pointers"),
        ([SECRET], ["/0"] * 21, "expected an array of at most 20 JSON pointers"),
    ],
)
def test_wrong_pointers_are_refused_and_store_nothing(
    system: System, tmp_path: Path, arguments: Any, secrets: Any, reason: str
) -> None:
    call = {"host": "web01", "procedure": "check", "arguments": arguments, "secrets": secrets}
    for request in (call, {"submit_many": [call]}):
        (reply,) = system.dispatcher.ask(**request)
        assert reply["error"]["type"] == "invalid_request"
        assert reason in reply["error"]["message"]
        assert SECRET not in reply["error"]["message"]
    assert system.dispatcher.listed("list", "--all") == []


def test_secrets_without_keys_are_refused_and_store_nothing(tmp_path: Path) -> None:
    with Harpcallerd(tmp_path / "dispatcher") as dispatcher:
        call = {"host": "web01", "procedure": "check", "arguments": ["a", SECRET], "secrets": ["/1"]}
        for request in (call, {"submit_many": [call]}):
            (reply,) = dispatcher.ask(**request)
            assert reply["error"]["type"] == "invalid_request"
            assert "set secrets_key_file" in reply["error"]["message"]
        assert dispatcher.listed("list", "--all") == []
    assert files_with(SECRET, tmp_path) == []


def test_many_calls_with_secrets_are_staged_encrypted(system: System, tmp_path: Path) -> None:
    calls = [
        {
            "host": "web02",
            "procedure": "check",
            "arguments": [n, SECRET],
            "secrets": ["/1"],
            "queue": {"name": {"q": 2}},
        }
        for n in range(600)
    ]
    (reply,) = system.dispatcher.ask(submit_many=calls)
    last = reply["job_ids"][-1]
    assert system.dispatcher.ask(get_status=last)[0]["call"]["arguments"] == [599, "***"]
    assert files_with(SECRET, tmp_path) == []
    system.dispatcher.control("queue-cancel", '{"q": 2}')


def test_secret_is_in_no_answer_over_http_and_no_search_finds_it(tmp_path: Path) -> None:
    """Each operation, the live events, metrics, the audit files of both daemons, and the table of repeated requests."""
    key_file, go = tmp_path / "keys", tmp_path / "go"
    add_key(key_file)
    settings = {
        "secrets_key_file": str(key_file),
        "tokens_file": str(tmp_path / "tokens"),
        "audit_file": str(tmp_path / "audit.jsonl"),
        "audit_reads": True,
        "log_level": "debug",
        "http": {"listen": ["127.0.0.1:0"]},
    }
    harpd = {"audit_file": str(tmp_path / "audit-of-host.jsonl")}
    seen: list[bytes] = []
    with running(tmp_path, PROCEDURES, harpd, settings) as system, ExitStack() as stack:
        dispatcher = system.dispatcher
        token = dispatcher.control("token", "add", "shop", "--role=admin").stdout.strip()
        [port] = [event["port"] for event in dispatcher.events("harpcallerd is serving HTTP")]
        headers = {"Authorization": f"Bearer {token}"}
        base = f"http://127.0.0.1:{port}"
        client = stack.enter_context(httpx.Client(base_url=f"{base}/api/v1", headers=headers, timeout=60))

        def ask(method: str, path: str, is_refused: bool = False, **options: Any) -> Any:
            reply = client.request(method, path, **options)
            assert reply.is_client_error if is_refused else reply.is_success, (path, reply.text)
            seen.extend((repr(reply.headers).encode(), reply.content))
            return reply

        events = stack.enter_context(client.stream("GET", "/events?topics=jobs,counts"))
        lines = iter(events.iter_lines())
        call = {"host": "web01", "procedure": "records", "arguments": [SECRET, str(go)], "secrets": ["/0"]}
        key = {"Idempotency-Key": '"once"'}
        job = ask("POST", "/jobs", json=call, headers=key).json()["job"]
        assert ask("POST", "/jobs", json=call, headers=key).json()["job"] == job
        ask("POST", "/jobs", True, json={**call, "arguments": [f"{SECRET}!", str(go)]}, headers=key)
        for wrong in ({"secrets": ["/7"]}, {"procedure": None}, {"timeout": -1}, {"info": 1e999}):
            text = json.dumps({**call, **wrong})
            ask("POST", "/jobs", True, content=text, headers={"Content-Type": "application/json"})
        ask("POST", "/me/can", json={"action": "call", "host": "web01", "procedure": "records", "arguments": [SECRET]})
        failed = {"host": "web01", "procedure": "fail", "arguments": [SECRET], "secrets": ["/0"]}
        many = ask("POST", "/jobs/many", json={"calls": [failed] * 2}).json()["jobs"]
        go.touch()
        for each in (job, *many):
            ask("GET", f"/jobs/{each}/end?wait=60")
        ask("POST", f"/jobs/{job}/rerun", True, json={})
        for path in ("", "/result", "/end", "/records", "/records?form=sse", "/records?form=text"):
            ask("GET", f"/jobs/{job}{path}")
        assert b'"got"' in ask("GET", f"/jobs/{job}/records?grep=***").content
        assert job in ask("GET", "/jobs?arguments=***").text
        for part in (SECRET, "ter2", "corréct"):
            quoted = json.dumps(part, ensure_ascii=False)[1:-1]
            for filter in ("arguments", "info"):
                # The answer has the filter as it was sent.
                assert client.get("/jobs", params={filter: quoted, "payloads": "text"}).json()["jobs"] == []
            assert (
                client.get("/jobs", params={"q": f"web01 {json.dumps(part, ensure_ascii=False)}"}).json()["jobs"] == []
            )
            found = client.get(f"/jobs/{job}/records", params={"grep": part})
            assert found.is_success
            assert b'"got"' not in found.content
        for path in ("/jobs?limit=500", "/jobs/counts?by=state,procedure,end_type", "/jobs/stats", "/queues", "/hosts"):
            ask("GET", path)
        assert ask("GET", f"/audit?job={job}&limit=500").json()["entries"]
        seen += [client.get(f"{base}{path}").content for path in ("/metrics", "/readyz", "/", f"/jobs/{job}")]
        while SECRET not in (line := next(lines)) and not (job in line and '"returned"' in line):
            seen.append(line.encode())
        seen.append(line.encode())
        events.close()
        assert of_processes().find(SECRET.encode()) < 0
        log = "\n".join(system.log_lines()).encode()
    everything = b"\n".join([*seen, log])
    assert [form for form in forms(SECRET) if form in everything] == []
    assert b'"got":"***"' in everything.replace(b" ", b"")
    assert files_with(SECRET, tmp_path) == []
