"""Every request, reply and error between client and dispatcher, over real sockets.

The transcripts quote docs/protocol.md, Client and dispatcher. A line ``->`` opens a connection and sends a request, the
lines ``<-`` below it are everything that the dispatcher sends before it closes. A line without an arrow continues the
line above. In strings, JOB is bound at its first use, TIME is any integer, and ~TEXT is any string that contains TEXT.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.peers import Peer
from support.scripted import connection_of, scripted_harpd

UNKNOWN = "00000000-0000-4000-8000-000000000000"

TRANSCRIPTS = {
    "call and result": """
        -> {"harpcaller": 1, "host": "web01", "procedure": "echo", "arguments": [1, "two"]}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": true}
        <- {"result": [1, "two"]}
        -> {"harpcaller": 1, "get_result": "JOB"}
        <- {"result": [1, "two"]}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": false}
        <- {"result": [1, "two"]}
        -> {"harpcaller": 1, "cancel": "JOB"}
        <- {"cancelled": false}
        -> {"harpcaller": 1, "get_status": "JOB"}
        <- {"call": {"host": "web01", "procedure": "echo", "arguments": [1, "two"]},
            "time": {"submit": "TIME", "start": "TIME", "end": "TIME"}, "info": null}
    """,
    "call with everything": """
        -> {"harpcaller": 1, "host": "web01", "procedure": "echo", "arguments": {"a": 1},
            "timeout": 15, "max_exec_time": 20.5, "queue": {"name": {"q": [1]}, "concurrency": 2},
            "info": {"who": "me"}}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": true}
        <- {"result": {"a": 1}}
        -> {"harpcaller": 1, "get_status": "JOB"}
        <- {"call": {"host": "web01", "procedure": "echo", "arguments": {"a": 1}},
            "time": {"submit": "TIME", "start": "TIME", "end": "TIME"}, "info": {"who": "me"}}
    """,
    "many calls": """
        -> {"harpcaller": 1, "submit_many": [
              {"host": "web01", "procedure": "echo", "arguments": [1, "two"]},
              {"host": "web01", "procedure": "echo", "arguments": {"a": 1}, "queue": {"name": {"q": "many"}}, "info": 5}
            ]}
        <- {"harpcaller": 1, "job_ids": ["JOB", "OTHER JOB"]}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": true}
        <- {"result": [1, "two"]}
        -> {"harpcaller": 1, "get_result": "OTHER JOB", "wait": true}
        <- {"result": {"a": 1}}
        -> {"harpcaller": 1, "submit_many": []}
        <- {"harpcaller": 1, "job_ids": []}
    """,
    "null is absent": """
        -> {"harpcaller": 1, "host": "web01", "procedure": "echo", "arguments": [],
            "timeout": null, "max_exec_time": null, "queue": null, "info": null}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": null}
        <- {"result": []}
        -> {"harpcaller": 1, "read_stream": "JOB", "since": null, "recent": null}
        <- {"result": []}
    """,
    "cancel of a running job": """
        -> {"harpcaller": 1, "host": "web01", "procedure": "hang", "arguments": []}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": false}
        <- {"no_result": true}
        -> {"harpcaller": 1, "cancel": "JOB"}
        <- {"cancelled": true}
        -> {"harpcaller": 1, "cancel": "JOB"}
        <- {"cancelled": false}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": true}
        <- {"cancelled": true}
        -> {"harpcaller": 1, "follow_stream": "JOB"}
        <- {"cancelled": true}
    """,
    "cancel of a waiting job": """
        -> {"harpcaller": 1, "host": "web01", "procedure": "hang", "arguments": [], "queue": {"name": {}}}
        <- {"harpcaller": 1, "job_id": "FIRST JOB"}
        -> {"harpcaller": 1, "host": "web01", "procedure": "echo", "arguments": [], "queue": {"name": {}}}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_status": "JOB"}
        <- {"call": {"host": "web01", "procedure": "echo", "arguments": []},
            "time": {"submit": "TIME", "start": null, "end": null}, "info": null}
        -> {"harpcaller": 1, "cancel": "JOB"}
        <- {"cancelled": true}
        -> {"harpcaller": 1, "get_status": "JOB"}
        <- {"call": {"host": "web01", "procedure": "echo", "arguments": []},
            "time": {"submit": "TIME", "start": null, "end": "TIME"}, "info": null}
        -> {"harpcaller": 1, "cancel": "FIRST JOB"}
        <- {"cancelled": true}
    """,
    "exception": """
        -> {"harpcaller": 1, "host": "web01", "procedure": "raise", "arguments": []}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": true}
        <- {"exception": {"type": "ValueError", "message": "no", "data": {"class": "ValueError"}}}
    """,
    "an error of harpd is the job's": """
        -> {"harpcaller": 1, "host": "web01", "procedure": "error", "arguments": []}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": true}
        <- {"error": {"type": "auth_error", "message": "who?", "data": [1]}}
    """,
    "unknown host": """
        -> {"harpcaller": 1, "host": "nowhere", "procedure": "p", "arguments": []}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": true}
        <- {"error": {"type": "unknown_host", "message": "~nowhere"}}
    """,
    "a host that is not there": """
        -> {"harpcaller": 1, "host": "absent", "procedure": "p", "arguments": []}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": true}
        <- {"error": {"type": "network_error", "message": "~absent", "data": {"errno": "ECONNREFUSED"}}}
    """,
    "a host that sends garbage": """
        -> {"harpcaller": 1, "host": "web01", "procedure": "garbage", "arguments": []}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": true}
        <- {"error": {"type": "protocol_error", "message": "~web01"}}
    """,
    "timeout while reading": """
        -> {"harpcaller": 1, "host": "web01", "procedure": "hang", "arguments": [], "timeout": 0.2}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": true}
        <- {"error": {"type": "timeout", "message": "~reading the result"}}
    """,
    "maximum execution time": """
        -> {"harpcaller": 1, "host": "web01", "procedure": "hang", "arguments": [], "max_exec_time": 0.2}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": true}
        <- {"error": {"type": "timeout", "message": "~maximum execution time"}}
    """,
    "stream of an ended job": """
        -> {"harpcaller": 1, "host": "web01", "procedure": "count", "arguments": [3]}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "get_result": "JOB", "wait": true}
        <- {"result": "counted"}
        -> {"harpcaller": 1, "follow_stream": "JOB", "since": 0}
        <- {"packet": 0, "data": 0}
        <- {"packet": 1, "data": 1}
        <- {"packet": 2, "data": 2}
        <- {"result": "counted"}
        -> {"harpcaller": 1, "follow_stream": "JOB"}
        <- {"result": "counted"}
        -> {"harpcaller": 1, "follow_stream": "JOB", "recent": 1}
        <- {"packet": 2, "data": 2}
        <- {"result": "counted"}
        -> {"harpcaller": 1, "follow_stream": "JOB", "since": 3}
        <- {"result": "counted"}
        -> {"harpcaller": 1, "read_stream": "JOB"}
        <- {"packet": 0, "data": 0}
        <- {"packet": 1, "data": 1}
        <- {"packet": 2, "data": 2}
        <- {"result": "counted"}
        -> {"harpcaller": 1, "read_stream": "JOB", "since": 2}
        <- {"packet": 2, "data": 2}
        <- {"result": "counted"}
        -> {"harpcaller": 1, "read_stream": "JOB", "recent": 2}
        <- {"packet": 1, "data": 1}
        <- {"packet": 2, "data": 2}
        <- {"result": "counted"}
        -> {"harpcaller": 1, "read_stream": "JOB", "recent": 0}
        <- {"result": "counted"}
        -> {"harpcaller": 1, "read_stream": "JOB", "since": 100}
        <- {"result": "counted"}
    """,
    "stream of a running job": """
        -> {"harpcaller": 1, "host": "web01", "procedure": "hang", "arguments": []}
        <- {"harpcaller": 1, "job_id": "JOB"}
        -> {"harpcaller": 1, "read_stream": "JOB"}
        <- {"continue": true}
        -> {"harpcaller": 1, "read_stream": "JOB", "since": 7}
        <- {"continue": true}
        -> {"harpcaller": 1, "cancel": "JOB"}
        <- {"cancelled": true}
        -> {"harpcaller": 1, "read_stream": "JOB"}
        <- {"cancelled": true}
    """,
    "no such job": f"""
        -> {{"harpcaller": 1, "cancel": "{UNKNOWN}"}}
        <- {{"cancelled": false}}
        -> {{"harpcaller": 1, "get_result": "{UNKNOWN}", "wait": true}}
        <- {{"error": {{"type": "invalid_jobid", "message": "there is no job {UNKNOWN}"}}}}
        -> {{"harpcaller": 1, "get_result": "{UNKNOWN}", "wait": false}}
        <- {{"error": {{"type": "invalid_jobid", "message": "~"}}}}
        -> {{"harpcaller": 1, "get_status": "{UNKNOWN}"}}
        <- {{"error": {{"type": "invalid_jobid", "message": "~"}}}}
        -> {{"harpcaller": 1, "follow_stream": "{UNKNOWN}"}}
        <- {{"error": {{"type": "invalid_jobid", "message": "~"}}}}
        -> {{"harpcaller": 1, "read_stream": "{UNKNOWN}"}}
        <- {{"error": {{"type": "invalid_jobid", "message": "~"}}}}
    """,
    "no job id at all": f"""
        -> {{"harpcaller": 1, "cancel": null}}
        <- {{"cancelled": false}}
        -> {{"harpcaller": 1, "get_result": null}}
        <- {{"error": {{"type": "invalid_jobid", "message": "there is no job null"}}}}
        -> {{"harpcaller": 1, "get_result": 5, "wait": true}}
        <- {{"error": {{"type": "invalid_jobid", "message": "there is no job 5"}}}}
        -> {{"harpcaller": 1, "get_status": {{"a": [1.0]}}}}
        <- {{"error": {{"type": "invalid_jobid", "message": "~"}}}}
        -> {{"harpcaller": 1, "follow_stream": true}}
        <- {{"error": {{"type": "invalid_jobid", "message": "there is no job true"}}}}
        -> {{"harpcaller": 1, "read_stream": ""}}
        <- {{"error": {{"type": "invalid_jobid", "message": "there is no job "}}}}
        -> {{"harpcaller": 1, "cancel": "17"}}
        <- {{"cancelled": false}}
        -> {{"harpcaller": 1, "get_status": "{UNKNOWN.replace("0", "A")}"}}
        <- {{"error": {{"type": "invalid_jobid", "message": "~"}}}}
        -> {{"harpcaller": 1, "get_result": ""}}
        <- {{"error": {{"type": "invalid_jobid", "message": "~"}}}}
        -> {{"harpcaller": 1, "get_result": "\\ud800"}}
        <- {{"error": {{"type": "invalid_jobid", "message": "~"}}}}
    """,
}


# Forms of requests.


def as_it_stands(request: dict[str, Any]) -> list[bytes]:
    return [json.dumps(request).encode() + b"\n"]


def reversed_keys(request: dict[str, Any]) -> list[bytes]:
    return [json.dumps(dict(reversed(request.items()))).encode() + b"\n"]


def white_space(request: dict[str, Any]) -> list[bytes]:
    return [b" \t" + json.dumps(request, indent=1).replace("\n", "\r").encode() + b" \r\n\n"]


def byte_by_byte(request: dict[str, Any]) -> list[bytes]:
    line = json.dumps(request).encode() + b"\n"
    return [line[at : at + 1] for at in range(len(line))]


Form = Callable[[dict[str, Any]], list[bytes]]
FORMS = [as_it_stands, reversed_keys, white_space, byte_by_byte]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("harpd")) as peer:
        yield peer


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> Iterator[Harpcallerd]:
    hosts = {"web01": peer.port, "absent": 1}
    with Harpcallerd(tmp_path_factory.mktemp("transcripts"), hosts, settings={"start_within": 0}) as dispatcher:
        yield dispatcher


def exchange(dispatcher: Harpcallerd, pieces: list[bytes]) -> list[Any]:
    with dispatcher.connect() as client:
        for piece in pieces:
            client.send(piece)
        return client.messages()


def steps(transcript: str) -> Iterator[tuple[str, list[str]]]:
    """Return each request with its replies."""
    for step in transcript.split("-> ")[1:]:
        request, *replies = " ".join(step.split()).split(" <- ")
        yield request, replies


def check_match(expected: Any, got: Any, jobs: dict[str, str]) -> None:
    """Fail unless type, keys and values are equal; see the top for the strings."""
    if isinstance(expected, str) and expected.endswith("JOB"):
        assert got == jobs.setdefault(expected, got)
    elif expected == "TIME":
        assert type(got) is int
    elif isinstance(expected, str) and expected.startswith("~"):
        assert isinstance(got, str)
        assert expected[1:] in got
    elif isinstance(expected, dict):
        assert isinstance(got, dict)
        assert expected.keys() == got.keys()
        for key in expected:
            check_match(expected[key], got[key], jobs)
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for one, other in zip(expected, got, strict=True):
            check_match(one, other, jobs)
    else:
        assert (type(expected), expected) == (type(got), got)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transcript", TRANSCRIPTS.values(), ids=TRANSCRIPTS)
def test_client_server_transcript(dispatcher: Harpcallerd, transcript: str, form: Form) -> None:
    jobs: dict[str, str] = {}
    for request, replies in steps(transcript):
        for name, job in jobs.items():
            request = request.replace(f'"{name}"', f'"{job}"')
        got = exchange(dispatcher, form(json.loads(request)))
        assert len(got) == len(replies), got
        for expected, reply in zip(replies, got, strict=True):
            check_match(json.loads(expected), reply, jobs)


CALL = {"harpcaller": 1, "host": "h", "procedure": "p", "arguments": []}
MANY = {"host": "h", "procedure": "p", "arguments": []}
KINDS = (
    "expected exactly one of procedure, submit_many, cancel, "
    "get_result, get_status, get_details, follow_stream, read_stream, list_jobs, count_jobs, list_hosts, list_queues"
)

REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": (b"", "Expecting value at column 1"),
    "no JSON": (b"GET / HTTP/1.1", "Expecting value at column 1"),
    "a cut line": (b'{"harpcaller": 1', "Expecting ',' delimiter at column 17"),
    "no UTF-8": (b'{"harpcaller": "\xff"}', "not UTF-8 at byte 16"),
    "NaN": (b'{"harpcaller": 1, "get_result": NaN}', "NaN is not JSON"),
    "UTF-16": ('{"harpcaller": 1}'.encode("utf-16-le"), "~column 2"),
    "too deep": (json.dumps(CALL).encode()[:-1] + b', "info": ' + b"[" * 1001 + b"]" * 1001 + b"}", "~1000"),
    "too deep in an unknown key": (b'{"x": ' + b"[" * 1016 + b"]" * 1016 + b"}", "nested deeper than 1016"),
    "an array": ([CALL], "expected an object"),
    "a repeated key": (b'{"harpcaller": 1, "harpcaller": 1}', 'repeated key "harpcaller"'),
    "no version": ({"get_status": UNKNOWN}, "harpcaller: expected 1, got None"),
    "another version": ({**CALL, "harpcaller": 2}, "harpcaller: expected 1, got 2"),
    "a version that equals 1": ({**CALL, "harpcaller": True}, "harpcaller: expected 1, got True"),
    "no request": ({"harpcaller": 1}, KINDS),
    "two requests": ({"harpcaller": 1, "cancel": UNKNOWN, "get_result": UNKNOWN}, KINDS),
    "an unknown key": ({**CALL, "more": 1}, "unknown key more"),
    "a key of another request": ({**CALL, "wait": True}, "unknown key wait"),
    "no host": ({"harpcaller": 1, "procedure": "p", "arguments": []}, "host: missing"),
    "an empty host": ({**CALL, "host": ""}, "host: expected a name of 1 to 255 characters, got ''"),
    "a host that is no string": ({**CALL, "host": 5}, "host: expected a string, got a number"),
    "a procedure that is no string": ({**CALL, "procedure": None}, "procedure: expected a string, got null"),
    "no arguments": ({"harpcaller": 1, "host": "h", "procedure": "p"}, "arguments: missing"),
    "arguments that are none": ({**CALL, "arguments": "x"}, "arguments: expected an array or an object"),
    "no time": ({**CALL, "timeout": 0}, "timeout: expected a positive number of seconds, got 0"),
    "a negative time": ({**CALL, "max_exec_time": -1}, "max_exec_time: expected a positive number of seconds, got -1"),
    "a time that is none": ({**CALL, "timeout": "1"}, "timeout: expected a positive number of seconds, got '1'"),
    "a true time": ({**CALL, "timeout": True}, "timeout: expected a positive number of seconds, got True"),
    "a queue that is none": ({**CALL, "queue": []}, "queue: expected an object with a name"),
    "a queue without a name": ({**CALL, "queue": {}}, "queue: expected an object with a name"),
    "a queue's odd name": ({**CALL, "queue": {"name": "q"}}, "queue.name: expected an object of at most 4096 bytes"),
    "a queue with more": ({**CALL, "queue": {"name": {}, "size": 1}}, "queue: unknown key size"),
    "no concurrency": (
        {**CALL, "queue": {"name": {}, "concurrency": 0}},
        "queue.concurrency: expected a positive integer, got 0",
    ),
    "a wait that is none": ({"harpcaller": 1, "get_result": UNKNOWN, "wait": 1}, "wait: expected true or false"),
    "a negative number": (
        {"harpcaller": 1, "read_stream": UNKNOWN, "since": -1},
        "since: expected an integer of at least 0, got -1",
    ),
    "a number with a fraction": (
        {"harpcaller": 1, "follow_stream": UNKNOWN, "recent": 1.5},
        "recent: expected an integer of at least 0, got 1.5",
    ),
    "both numbers": (
        {"harpcaller": 1, "follow_stream": UNKNOWN, "since": 1, "recent": 1},
        "since and recent exclude each other",
    ),
    "many calls that are none": ({"harpcaller": 1, "submit_many": [MANY, 5]}, "submit_many[1]: expected an object"),
    "many calls with a bad one": (
        {"harpcaller": 1, "submit_many": [MANY, MANY, {**MANY, "timeout": 0}]},
        "submit_many[2]: timeout: expected a positive number of seconds, got 0",
    ),
    "a very long key": ({**CALL, "k" * 100_000: 1}, "the name of a member is too long"),
    "a long key": ({**CALL, "k" * 9_999: 1}, "unknown key " + "k" * 988 + "..."),
}


@pytest.mark.parametrize(("request_", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_request_is_refused(dispatcher: Harpcallerd, request_: Any, message: str) -> None:
    line = request_ if isinstance(request_, bytes) else json.dumps(request_).encode()
    (reply,) = exchange(dispatcher, [line + b"\n"])
    check_match({"error": {"type": "invalid_request", "message": message}}, reply, {})


def test_follow_yields_records_as_they_are_stored(dispatcher: Harpcallerd, peer: Peer) -> None:
    job = dispatcher.submit("web01", "feed", {"n": 0}, {"n": 1})
    with dispatcher.connect() as client:
        client.send({"harpcaller": 1, "follow_stream": job, "since": 0})
        assert client.message() == {"packet": 0, "data": {"n": 0}}
        assert client.message() == {"packet": 1, "data": {"n": 1}}
        conn = connection_of(peer, {"n": 0}, {"n": 1})
        conn.reply({"stream": "live"})
        assert client.message() == {"packet": 2, "data": "live"}
        assert dispatcher.ask(read_stream=job, recent=1) == [{"packet": 2, "data": "live"}, {"continue": True}]
        conn.reply({"result": None})
        assert client.messages() == [{"result": None}]


def test_follow_from_a_future_number_waits(dispatcher: Harpcallerd) -> None:
    job = dispatcher.submit("web01", "hang")
    for number in (2**31, 2**63 - 1, 2**63, 10**40):
        assert dispatcher.ask(read_stream=job, since=number) == [{"continue": True}]
        assert dispatcher.ask(read_stream=job, recent=number) == [{"continue": True}]
        with dispatcher.connect() as following:
            following.send({"harpcaller": 1, "follow_stream": job, "since": number})
            following.half_close()
            assert following.messages() == []
    with dispatcher.connect() as following:
        following.send({"harpcaller": 1, "follow_stream": job, "since": 10**40})
        assert dispatcher.ask(cancel=job) == [{"cancelled": True}]
        assert following.messages() == [{"cancelled": True}]


def test_waiting_client_receives_the_end(dispatcher: Harpcallerd) -> None:
    job = dispatcher.submit("web01", "hang")
    with dispatcher.connect() as waiting, dispatcher.connect() as following:
        waiting.send({"harpcaller": 1, "get_result": job})
        following.send({"harpcaller": 1, "follow_stream": job})
        assert dispatcher.ask(cancel=job) == [{"cancelled": True}]
        assert waiting.messages() == following.messages() == [{"cancelled": True}]


def test_interrupted_bound_job_ends_as_missing_result(peer: Peer, tmp_path: Path) -> None:
    with Harpcallerd(tmp_path / "dispatcher", {"web01": peer.port}) as dispatcher:
        job = dispatcher.submit("web01", "hang")
        wait_until(lambda: dispatcher.ask(get_status=job)[0]["time"]["start"], what="the start")
        dispatcher.restart(kill=True)
        (end,) = dispatcher.ask(get_result=job)
        check_match({"error": {"type": "missing_result", "message": "~"}}, end, {})
