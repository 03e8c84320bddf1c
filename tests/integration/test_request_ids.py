"""Request ids: a submission is sent again after a lost reply, and becomes one job. With both shells and the CLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import harp
from harp.cli import Exit
from support.harpcallerd import Harpcallerd
from support.legacy import LegacyDispatcher, server
from support.peers import Peer, PeerConnection, answering, keeping, resetting
from support.shells import Shell, shell_of

TESTS = Path(__file__).resolve().parent.parent
JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
SUBMITTED = {"harpcaller": 1, "job_id": JOB}
QUESTION = {"harpcaller": 1, "submit_many": []}
ANSWER = {"harpcaller": 1, "job_ids": []}
CALL: dict[str, Any] = {"host": "web01", "procedure": "p", "arguments": []}
PROGRAM = "import sys; from harp.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpcallerd]:
    """A dispatcher without hosts: its jobs end as ``unknown_host``."""
    with Harpcallerd(tmp_path_factory.mktemp("dispatcher")) as running:
        yield running


def jobs_of(dispatcher: Harpcallerd, procedure: str) -> list[str]:
    """Return the ids of all jobs with this procedure."""
    listed = dispatcher.listed("list", "--all")
    return [job["job"] for job in listed if job["call"]["procedure"] == procedure]


# The key of the protocol.


def test_same_call_with_same_request_id_is_same_job(dispatcher: Harpcallerd) -> None:
    call = {**CALL, "procedure": "same", "queue": {"name": {"q": 1}}, "request_id": "same"}
    (reply,) = dispatcher.ask(**call)
    assert dispatcher.ask(**call) == [reply]
    assert dispatcher.ask(submit_many=[call, call]) == [{"harpcaller": 1, "job_ids": [reply["job_id"]] * 2}]
    other = {**call, "request_id": "other"}
    (many,) = dispatcher.ask(submit_many=[other, call])
    assert jobs_of(dispatcher, "same") == [reply["job_id"], many["job_ids"][0]]
    assert many["job_ids"][1] == reply["job_id"]
    dispatcher.wait_event("job submitted again", job=reply["job_id"], request_id="same")


@pytest.mark.parametrize(
    "changed",
    [
        {"host": "web02"},
        {"procedure": "p2"},
        {"arguments": [1]},
        {"arguments": {}},
        {"timeout": 3},
        {"max_exec_time": 3},
        {"queue": {"name": {"q": 2}}},
        {"queue": {"name": {"q": 1}, "concurrency": 2}},
        {"info": 2},
    ],
    ids=str,
)
def test_other_call_with_same_request_id_is_refused(dispatcher: Harpcallerd, changed: dict[str, Any]) -> None:
    call = {**CALL, "timeout": 2, "max_exec_time": 2, "queue": {"name": {"q": 1}}, "info": 1, "request_id": "reused"}
    (reply,) = dispatcher.ask(**call)
    message = f"request_id 'reused' was used for another call: job {reply['job_id']}"
    refusal = {"error": {"type": "request_id_reused", "message": message}}
    jobs = len(dispatcher.listed("list", "--all"))
    assert dispatcher.ask(**{**call, **changed}) == [refusal]
    assert dispatcher.ask(submit_many=[CALL, {**call, **changed}]) == [refusal]
    assert len(dispatcher.listed("list", "--all")) == jobs, "nothing was stored"
    assert dispatcher.ask(**call) == [reply]


def test_limits_of_the_configuration_do_not_change_the_call(tmp_path: Path) -> None:
    call = {**CALL, "timeout": 1000, "request_id": "r"}
    with Harpcallerd(tmp_path, settings={"default_timeout": 500}) as dispatcher:
        (reply,) = dispatcher.ask(**call)
        dispatcher.configure({"default_timeout": 400})
        assert dispatcher.reload()["event"] == "reloaded"
        assert dispatcher.ask(**call) == [reply]


INVALID = [
    (5, "expected a string, got a number"),
    (True, "expected a string, got a boolean"),
    ([], "expected a string, got an array"),
    ({"a": 1}, "expected a string, got an object"),
    ("", "expected 1 to 200 characters"),
    ("x" * 201, "expected 1 to 200 characters"),
]


@pytest.mark.parametrize(("request_id", "message"), INVALID, ids=lambda value: str(value)[:20])
def test_invalid_request_id_is_refused(dispatcher: Harpcallerd, request_id: Any, message: str) -> None:
    call = {**CALL, "procedure": "invalid", "request_id": request_id}
    refusal = {"error": {"type": "invalid_request", "message": f"request_id: {message}"}}
    assert dispatcher.ask(**call) == [refusal]
    refusal["error"]["message"] = f"submit_many[1]: request_id: {message}"
    assert dispatcher.ask(submit_many=[CALL, call]) == [refusal]
    assert jobs_of(dispatcher, "invalid") == []


def test_request_id_of_another_request_is_refused(dispatcher: Harpcallerd) -> None:
    for request in ({"get_result": JOB}, {"submit_many": [CALL]}, {"cancel": JOB}):
        (refusal,) = dispatcher.ask(**request, request_id="r")
        assert refusal["error"]["message"] == "unknown key request_id"


def test_null_request_id_is_none(dispatcher: Harpcallerd) -> None:
    call = {**CALL, "procedure": "null", "request_id": None}
    ids = [dispatcher.ask(**call)[0]["job_id"] for _ in range(2)]
    assert jobs_of(dispatcher, "null") == ids


VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=250) | st.lists(st.integers(), max_size=2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request_id=VALUES, escaped=st.booleans())
def test_any_request_id_gives_a_single_job_or_refusal(dispatcher: Harpcallerd, request_id: Any, escaped: bool) -> None:
    line = json.dumps({"harpcaller": 1, **CALL, "procedure": "any", "request_id": request_id}, ensure_ascii=escaped)
    data = line.encode("utf-8", "surrogatepass") + b"\n"
    replies = []
    for _ in range(2):
        with dispatcher.connect() as client:
            client.send(data)
            replies += client.messages()
    first, second = replies
    if isinstance(request_id, str) and 0 < len(request_id) <= 200 and "job_id" in first:
        assert first == second
    else:
        assert request_id is None or first["error"]["type"] == "invalid_request"


# Lost replies.


def closing(conn: PeerConnection) -> None:
    """Read a request, then close the connection without a reply."""
    conn.expect()


@pytest.mark.parametrize("losing", [closing, resetting])
def test_submission_is_sent_again_after_a_lost_reply(shell: Shell, losing: Any) -> None:
    request = {"harpcaller": 1, **CALL, "request_id": "r"}
    known = answering(ANSWER, request=QUESTION)
    with Peer(losing, known, answering(SUBMITTED, request=request)) as peer:
        assert shell.caller(peer).web01(request_id="r").p().id() == JOB
    assert [peer.requests[0], peer.requests[2]] == [request] * 2


def test_many_are_sent_again_after_a_lost_reply(shell: Shell) -> None:
    calls = [harp.Call("web01", "p", [n], request_id=f"r{n}") for n in range(2)]
    request = {
        "harpcaller": 1,
        "submit_many": [{**CALL, "arguments": [n], "request_id": f"r{n}"} for n in range(2)],
    }
    reply = {"harpcaller": 1, "job_ids": ["x", "y"]}
    known = answering(ANSWER, request=QUESTION)
    with Peer(closing, known, closing, answering(reply, request=request)) as peer:
        assert [job.id() for job in shell.caller(peer).submit_many(calls)] == ["x", "y"]


def test_many_are_sent_once_if_one_has_no_request_id(shell: Shell) -> None:
    calls = [harp.Call("web01", "p", request_id="r"), harp.Call("web01", "p")]
    with Peer(closing) as peer, pytest.raises(harp.CommunicationError, match="may be too old for request_id"):
        shell.caller(peer).submit_many(calls)


def test_submission_is_sent_again_over_a_new_connection(shell: Shell) -> None:
    """The reply is lost on a connection that has served requests before."""

    def losing(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({**ANSWER, "keep_alive": 60})
        conn.expect()

    with Peer(answering(SUBMITTED), losing, keeping([{**SUBMITTED, "keep_alive": 60}])) as peer:
        with shell.caller(peer, keep_alive=None) as rpc:
            server = rpc.web01(request_id="r")
            assert server.p().id() == JOB
            assert server.p().id() == JOB


def test_submission_without_request_id_is_sent_once(shell: Shell) -> None:
    with Peer(closing) as peer, pytest.raises(harp.CommunicationError, match="closed the connection"):
        shell.caller(peer).web01.p()


def test_submission_without_reconnect_is_sent_once(shell: Shell) -> None:
    with Peer(closing) as peer, pytest.raises(harp.CommunicationError, match="closed the connection"):
        shell.caller(peer, reconnect=0).web01(request_id="r").p()


def test_refusal_is_raised(shell: Shell) -> None:
    refusal = {"error": {"type": "request_id_reused", "message": "m"}}
    with Peer(closing, answering(ANSWER), answering(refusal)) as peer:
        with pytest.raises(harp.RemoteError, match="request_id_reused: m"):
            shell.caller(peer).web01(request_id="r").p()


@pytest.mark.parametrize("keep_alive", [None, False, True])
def test_legacy_dispatcher_gets_no_second_submission(shell: Shell, keep_alive: bool | None) -> None:
    legacy = LegacyDispatcher()
    with server(legacy) as port:
        rpc = shell.caller_at("127.0.0.1", port, keep_alive=keep_alive)
        submissions: list[Callable[[], Any]] = [
            lambda: rpc.web01(request_id="r").p(),
            lambda: rpc.submit_many([harp.Call("web01", "p", request_id="r")]),
        ]
        for submit in submissions:
            legacy.requests.clear()
            with pytest.raises(harp.CommunicationError, match="the dispatcher may be too old for request_id"):
                submit()
            assert json.dumps(legacy.requests).count('"request_id"') == 1


@pytest.mark.parametrize("request_id", ["", 5, "x" * 201])
def test_invalid_option_is_refused_by_the_client(request_id: Any) -> None:
    message = "option 'request_id': expected a text of 1 to 200 characters"
    with pytest.raises(harp.HarpException, match=message):
        harp.HarpCaller("127.0.0.1").web01(request_id=request_id)
    with pytest.raises(harp.HarpException, match=message):
        harp.Call("web01", "p", request_id=request_id)


# A dispatcher that is killed between commit and reply.


class KilledAfterCommit(Harpcallerd):
    """A harpcallerd that is killed after the commit of a submission while the file `mark` exists."""

    @property
    def mark(self) -> Path:
        return self.directory / "kill"

    def command(self, *arguments: str) -> list[str]:
        program, options, _, _, *more = super().command(*arguments)
        return [program, options, "-m", "support.killed_after_commit", str(self.mark), *more]

    @contextmanager
    def killed_once(self) -> Iterator[None]:
        """Kill the daemon at the next commit of a submission, and start it again."""
        self.mark.touch()

        def restart() -> None:
            status = self.wait()
            assert status == -9
            self.start()

        with ThreadPoolExecutor(1) as executor:
            restarting = executor.submit(restart)
            yield
            restarting.result(60)
        assert not self.mark.exists()


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KilledAfterCommit]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    with KilledAfterCommit(tmp_path / "dispatcher") as running:
        yield running


@pytest.mark.parametrize("keep_alive", [None, False])
def test_killed_dispatcher_has_one_job(shell: Shell, killed: KilledAfterCommit, keep_alive: bool | None) -> None:
    rpc = shell.caller_at("127.0.0.1", killed.port, keep_alive=keep_alive)
    with rpc:
        for number in range(2):  # the second one over a connection that has served requests before
            with killed.killed_once():
                job = rpc.web01(request_id=f"r{number}").p(number)
            assert jobs_of(killed, "p")[number:] == [job.id()]
        calls = [harp.Call("web01", "many", [n], request_id=f"many {n}") for n in range(5)]
        with killed.killed_once():
            jobs = rpc.submit_many(calls)
        assert jobs_of(killed, "many") == [job.id() for job in jobs]
        assert [job.id() for job in rpc.submit_many(calls[::-1])] == [job.id() for job in jobs[::-1]]


def test_killed_dispatcher_has_one_job_of_the_cli(killed: KilledAfterCommit) -> None:
    arguments = ["--dispatcher", f"127.0.0.1:{killed.port}", "call", "web01", "cli", "5", "--request-id", "r"]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    with killed.killed_once():
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == Exit.OK, done.stderr
    assert done.stderr.endswith("reconnecting\n")
    assert jobs_of(killed, "cli") == [done.stdout.strip()]
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.stdout == done.stdout
    other = subprocess.run([*command, "6"], capture_output=True, text=True, timeout=60)
    assert other.returncode == Exit.FAILED
    assert "request_id_reused" in other.stderr


# Several clients.


def test_concurrent_clients_get_one_job(dispatcher: Harpcallerd) -> None:
    clients, rounds = 12, 10
    together = threading.Barrier(clients)

    def submit(rpc: Any) -> list[str]:
        ids = []
        for number in range(rounds):
            together.wait(60)
            ids.append(rpc.web01(request_id=f"concurrent {number}").concurrent(number).id())
        return ids

    def many(rpc: Any) -> list[str]:
        ids = []
        for number in range(rounds):
            together.wait(60)
            call = harp.Call("web01", "concurrent", [number], request_id=f"concurrent {number}")
            ids.append(rpc.submit_many([call, call])[1].id())
        return ids

    with shell_of("aio") as aio, shell_of("sync") as sync, ThreadPoolExecutor(clients) as executor:
        kinds: list[tuple[Callable[[Any], list[str]], Shell]] = [
            (submit, sync),
            (submit, aio),
            (many, sync),
            (many, aio),
        ]
        submitting = []
        for number in range(clients):
            work, shell = kinds[number % 4]
            submitting.append(executor.submit(work, shell.caller_at("127.0.0.1", dispatcher.port)))
        first, *others = [future.result(60) for future in submitting]
    assert others == [first] * (clients - 1)
    assert jobs_of(dispatcher, "concurrent") == first
