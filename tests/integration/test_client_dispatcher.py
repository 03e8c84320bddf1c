"""The client with a scripted dispatcher; each test uses both shells."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import harp
from support.deadline import wait_until
from support.peers import Peer, PeerConnection, Script, answering, line_of, single_bytes
from support.shells import Shell

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"

GET_RESULT = {"harpcaller": 1, "get_result": JOB, "wait": True}
PEEK_RESULT = {"harpcaller": 1, "get_result": JOB, "wait": False}
GET_STATUS = {"harpcaller": 1, "get_status": JOB}
FOLLOW = {"harpcaller": 1, "follow_stream": JOB}
READ = {"harpcaller": 1, "read_stream": JOB}

NOT_YET = {"no_result": True}
#: The reply of a dispatcher to the question whether it supports `submit_many`.
KNOWS_MANY = answering({"harpcaller": 1, "job_ids": []}, request={"harpcaller": 1, "submit_many": []})
REFUSAL = {"error": {"type": "storage_error", "message": "the disk is full"}}


def status(start: int | None, end: int | None, arguments: Any = (1, "two")) -> dict[str, Any]:
    call = {"host": "web01", "procedure": "p", "arguments": arguments}
    return {"call": call, "time": {"submit": 100, "start": start, "end": end}, "info": {"for": "you"}}


def packets(*data: Any, begin: int = 0) -> list[dict[str, Any]]:
    return [{"packet": number, "data": item} for number, item in enumerate(data, begin)]


# Submission.


@pytest.mark.parametrize(
    ("options", "args", "kwargs", "sent"),
    [
        ({}, (), {}, {"arguments": []}),
        ({}, (1, None, "ü", 10**40, [0.1]), {}, {"arguments": [1, None, "ü", 10**40, [0.1]]}),
        ({}, (), {"self": 1, "args": [2], "host": "h"}, {"arguments": {"self": 1, "args": [2], "host": "h"}}),
        (
            {"queue": {"foo": "bar"}, "max_exec_time": 15},
            (),
            {},
            {"arguments": [], "queue": {"name": {"foo": "bar"}, "concurrency": 1}, "max_exec_time": 15},
        ),
        (
            {"queue": {}, "concurrency": 5, "timeout": 0.5, "info": [1]},
            (),
            {},
            {"arguments": [], "queue": {"name": {}, "concurrency": 5}, "timeout": 0.5, "info": [1]},
        ),
        (dict.fromkeys(("queue", "concurrency", "timeout", "max_exec_time", "info")), (), {}, {"arguments": []}),
        ({"info": False}, (), {}, {"arguments": [], "info": False}),
    ],
)
def test_submit_sends_exactly_the_arguments(
    shell: Shell, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], sent: dict[str, Any]
) -> None:
    request = {"harpcaller": 1, "host": "web01", "procedure": "p", **sent}
    with Peer(always=answering({"harpcaller": 1, "job_id": JOB}, request=request)) as peer:
        rpc = shell.caller(peer)
        for server in (rpc.web01(**options), rpc("web01", **options), rpc.host(host="web01", **options)):
            assert server.p(*args, **kwargs).id() == JOB
    assert len(peer.requests) == 3


def test_options_are_sent_as_they_were_when_set(shell: Shell) -> None:
    name = {"a": [1]}
    with Peer(always=answering({"harpcaller": 1, "job_id": JOB})) as peer:
        server = shell.caller(peer).web01(queue=name)
        procedure = server.p
        server(concurrency=2)(timeout=3)
        name["a"].append(2)
        procedure()
        server(timeout=None)
        procedure()
    first, second = peer.requests
    assert (first["queue"], first["timeout"]) == ({"name": {"a": [1]}, "concurrency": 2}, 3)
    assert "timeout" not in second


def test_submit_many_sends_one_request(shell: Shell) -> None:
    arguments: list[Any] = [1]
    calls = [
        harp.Call("web01", "p", arguments),
        harp.Call("web02", "q", {"a": 1}, queue={}, concurrency=2, timeout=0.5, info=[1]),
        harp.Call("web03", "r", {}),
    ]
    arguments.append(2)
    sent = [
        {"host": "web01", "procedure": "p", "arguments": [1]},
        {
            "host": "web02",
            "procedure": "q",
            "arguments": {"a": 1},
            "timeout": 0.5,
            "queue": {"name": {}, "concurrency": 2},
            "info": [1],
        },
        {"host": "web03", "procedure": "r", "arguments": {}},
    ]
    reply = {"harpcaller": 1, "job_ids": ["x", JOB, "y"]}
    with Peer(KNOWS_MANY, *[answering(reply, request={"harpcaller": 1, "submit_many": sent})] * 2) as peer:
        rpc = shell.caller(peer)
        for _ in range(2):  # the question is sent once
            assert [job.id() for job in rpc.submit_many(iter(calls))] == ["x", JOB, "y"]


def test_submit_many_refusal_is_raised(shell: Shell) -> None:
    with Peer(KNOWS_MANY, answering(REFUSAL)) as peer, pytest.raises(harp.RequestRefused, match="the disk is full"):
        shell.caller(peer).submit_many([harp.Call("web01", "p")])
    one_id = answering({"harpcaller": 1, "job_ids": [JOB]})
    with Peer(KNOWS_MANY, one_id) as peer, pytest.raises(harp.CommunicationError):
        shell.caller(peer).submit_many([harp.Call("web01", "p")] * 2)
    with Peer() as peer, pytest.raises(harp.HarpException, match=r"calls\[1\]: expected a harp.Call, got 'p'"):
        shell.caller(peer).submit_many([harp.Call("web01", "p"), "p"])


def test_submit_many_break_is_not_repeated(shell: Shell) -> None:
    """The dispatcher supports the request. It may have stored the job before it closed without a reply."""
    with Peer(KNOWS_MANY, answering()) as peer, pytest.raises(harp.CommunicationError, match="closed the connection"):
        shell.caller(peer).submit_many([harp.Call("web01", "p")] * 2)
    assert len(peer.requests) == 2


@pytest.mark.parametrize("keep_alive", [None, False])
def test_submit_many_on_legacy_dispatcher_sends_each_call(shell: Shell, keep_alive: bool | None) -> None:
    def submitted(number: int) -> Script:
        request = {"harpcaller": 1, "host": "web01", "procedure": "p", "arguments": [number], "timeout": 5}
        return answering({"harpcaller": 1, "job_id": f"job-{number}"}, request=request)

    calls = [harp.Call("web01", "p", [number], timeout=5) for number in range(3)]
    with Peer(answering(), *map(submitted, range(3)), submitted(0), answering(), submitted(0)) as peer:
        rpc = shell.caller(peer, keep_alive=keep_alive)
        assert [job.id() for job in rpc.submit_many(calls)] == ["job-0", "job-1", "job-2"]
        with pytest.raises(harp.CommunicationError, match="closed the connection") as caught:
            rpc.submit_many(calls)  # it refuses the second call
        assert caught.value.__notes__ == ["calls[0] to calls[0] were submitted, as job-0 and later jobs"]
        assert rpc.submit_many([]) == []
        assert [job.id() for job in rpc.submit_many(calls[:1])] == ["job-0"]
    assert peer.requests[0]["submit_many"] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"host": ""}, "host: expected a name"),
        ({"procedure": 1}, "procedure: expected a name"),
        ({"arguments": "text"}, "arguments: expected a list, a tuple or a dict"),
        ({"arguments": [object()]}, "argument 1 cannot be sent"),
        ({"timeout": 0}, "option 'timeout': expected a positive number"),
        ({"concurrency": 2}, "option 'concurrency' needs option 'queue'"),
    ],
)
def test_invalid_call_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(harp.HarpException, match=message):
        harp.Call(**{"host": "web01", "procedure": "p", **given})


def test_submit_error_reply_is_raised(shell: Shell) -> None:
    with Peer(answering({"error": {"type": "storage_error", "message": "full", "data": [1]}})) as peer:
        with pytest.raises(harp.RequestRefused, match="storage_error: full") as caught:
            shell.caller(peer).web01.p()
    assert caught.value.data == [1]


def test_request_returns_reply(shell: Shell) -> None:
    reply = {"harpcaller": 1, "error": {"type": "x", "message": "y"}, "more": 1}
    with Peer(answering(reply), answering([1])) as peer:
        rpc = shell.caller(peer)
        assert rpc.request({"get_status": JOB}) == reply
        with pytest.raises(harp.CommunicationError, match="expected an object"):
            rpc.request({"harpcaller": 2, "x": 1})
    assert peer.requests == [GET_STATUS, {"harpcaller": 2, "x": 1}]


def test_connect_returns_json_connection(shell: Shell) -> None:
    with Peer(answering({"a": 1}, [2], pieces=single_bytes)) as peer:
        with shell.caller(peer).connect() as conn:
            conn.send({"any": "thing"})
            assert (conn.receive(), conn.receive()) == ({"a": 1}, [2])
            with pytest.raises(harp.CommunicationError, match="closed the connection before the reply was complete"):
                conn.receive()
    assert peer.requests == [{"any": "thing"}]


# Results.

ENDS = [
    ({"result": {"a": [1, None]}}, {"a": [1, None]}),
    ({"result": None}, None),
    ({"exception": {"type": "ValueError", "message": "no"}}, harp.RemoteException("ValueError", "no")),
    ({"exception": {"type": "E", "message": "", "data": {"x": 1}}}, harp.RemoteException("E", "", {"x": 1})),
    ({"error": {"type": "timeout", "message": "m", "data": [5]}}, harp.RemoteError("timeout", "m", [5])),
    ({"error": {"type": "unknown_host", "message": "m"}}, harp.RemoteError("unknown_host", "m")),
    ({"cancelled": True}, harp.CALL_CANCELLED),
]


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, harp.HarpException):
        return type(found) is type(expected) and found.args == expected.args
    return found is expected or (type(found) is type(expected) and found == expected)


@pytest.mark.parametrize(("reply", "outcome"), ENDS)
def test_result_is_returned_and_stored(shell: Shell, reply: Any, outcome: Any) -> None:
    with Peer(answering(NOT_YET), answering(NOT_YET), answering(reply)) as peer:
        job = shell.caller(peer).job(JOB)
        assert job.result() is harp.CALL_NOT_FINISHED
        assert job.get(wait=False) is harp.CALL_NOT_FINISHED
        first, second = job.result(wait=True), job.result()
        assert same(first, outcome)
        assert same(second, outcome)
        if isinstance(outcome, harp.HarpException):
            with pytest.raises(type(outcome)) as caught:
                job.get()
            assert caught.value.args == outcome.args
            assert first is not second
        elif outcome is harp.CALL_CANCELLED:
            with pytest.raises(harp.CancelledException, match=JOB):
                job.get()
        else:
            assert same(job.get(), outcome)
    assert peer.requests == [PEEK_RESULT, PEEK_RESULT, GET_RESULT]


def test_result_is_a_new_value_each_time(shell: Shell) -> None:
    with Peer(answering({"result": [1]}), answering(status(1, 2))) as peer:
        job = shell.caller(peer).job(JOB)
        job.get().append(2)
        assert job.get() == [1]
        job.args().append(2)
        job.info()["changed"] = True
        assert (job.args(), job.info()) == ([1, "two"], {"for": "you"})


def test_unknown_job_is_not_stored_as_end(shell: Shell) -> None:
    unknown = answering({"error": {"type": "invalid_jobid", "message": "m"}})
    with Peer(unknown, unknown, answering({"result": 5})) as peer:
        job = shell.caller(peer).job(JOB)
        assert same(job.result(wait=True), harp.RemoteError("invalid_jobid", "m"))
        with pytest.raises(harp.RemoteError, match="invalid_jobid"):
            job.get()
        assert job.result() == 5


def test_unreachable_dispatcher_is_not_stored_as_end(shell: Shell) -> None:
    def cut(conn: PeerConnection) -> None:
        conn.expect(GET_RESULT)
        conn.send(b'{"result": ')

    with Peer(cut, cut, answering({"result": 5})) as peer:
        job = shell.caller(peer, reconnect=None).job(JOB)
        outcome = job.result(wait=True)
        assert isinstance(outcome, harp.CommunicationError)
        assert f"{peer.host}:{peer.port}" in str(outcome)
        assert "11 bytes into a line" in str(outcome)
        with pytest.raises(harp.CommunicationError):
            job.get()
        assert job.result(wait=True) == 5


def test_result_reply_no_result_to_waiting_request_raises(shell: Shell) -> None:
    with Peer(answering(NOT_YET), answering(NOT_YET)) as peer:
        job = shell.caller(peer).job(JOB)
        assert isinstance(job.result(wait=True), harp.CommunicationError)
        with pytest.raises(harp.CommunicationError, match="although the request waits"):
            job.get()


@pytest.mark.parametrize("cancelled", [True, False])
def test_cancel_returns_whether_job_was_stopped(shell: Shell, cancelled: bool) -> None:
    with Peer(
        answering({"cancelled": cancelled}, request={"harpcaller": 1, "cancel": JOB}), answering(REFUSAL)
    ) as peer:
        job = shell.caller(peer).job(JOB)
        assert job.cancel() is cancelled
        with pytest.raises(harp.RequestRefused, match="storage_error"):
            job.cancel()


# Status.


def test_submitted_facts_are_requested_once(shell: Shell) -> None:
    with Peer(answering(status(None, None), request=GET_STATUS)) as peer:
        job = shell.caller(peer).job(JOB)
        assert job.host() == "web01"
        assert job.procedure() == "p"
        assert job.args() == [1, "two"]
        assert job.info() == {"for": "you"}
        assert job.submit_time() == 100


def test_named_arguments_are_returned_as_dict(shell: Shell) -> None:
    with Peer(answering(status(None, None, {"z": 1, "a": 2}))) as peer:
        assert list(shell.caller(peer).job(JOB).args().items()) == [("z", 1), ("a", 2)]


def test_times_are_stored_when_final(shell: Shell) -> None:
    replies = [(None, None), (None, None), (101, None), (101, None), (101, 105)]
    with Peer(*(answering(status(start, end)) for start, end in replies)) as peer:
        job = shell.caller(peer).job(JOB)
        assert job.start_time() is None
        assert job.end_time() is None
        assert job.start_time() == 101
        assert job.start_time() == 101
        assert job.end_time() is None
        assert job.end_time() == 105
        assert (job.start_time(), job.end_time(), job.end_time()) == (101, 105, 105)


def test_start_of_job_ended_in_queue_stays_none(shell: Shell) -> None:
    with Peer(answering(status(None, 105))) as peer:
        job = shell.caller(peer).job(JOB)
        assert (job.start_time(), job.end_time(), job.start_time()) == (None, 105, None)


def test_status_error_reply_is_raised_and_not_stored(shell: Shell) -> None:
    with Peer(answering({"error": {"type": "invalid_jobid", "message": "m"}}), answering(status(1, 2))) as peer:
        job = shell.caller(peer).job(JOB)
        with pytest.raises(harp.RemoteError, match="invalid_jobid"):
            job.host()
        assert job.host() == "web01"


# Streams.


@pytest.mark.parametrize("method", ["follow", "stream"])
@pytest.mark.parametrize(("reply", "outcome"), ENDS)
def test_stream_end_is_stored_as_job_end(shell: Shell, method: str, reply: Any, outcome: Any) -> None:
    with Peer(answering(*packets("a", None, {"b": 1}), reply, pieces=single_bytes)) as peer:
        job = shell.caller(peer).job(JOB)
        assert list(getattr(job, method)(since=0)) == ["a", None, {"b": 1}]
        assert same(job.result(), outcome)
        assert same(job.result(wait=True), outcome)


@pytest.mark.parametrize(
    ("method", "options", "sent"),
    [
        ("follow", {}, FOLLOW),
        ("follow", {"since": 0}, {**FOLLOW, "since": 0}),
        ("follow", {"recent": 3}, {**FOLLOW, "recent": 3}),
        ("stream", {}, READ),
        ("stream", {"since": 7}, {**READ, "since": 7}),
        ("stream", {"recent": 0}, {**READ, "recent": 0}),
    ],
)
def test_stream_sends_its_request(shell: Shell, method: str, options: dict[str, int], sent: dict[str, Any]) -> None:
    begin = options.get("since", 4)
    with Peer(answering(*packets("x", "y", begin=begin), {"result": 1}, request=sent)) as peer:
        iterator = getattr(shell.caller(peer, reconnect=False).job(JOB), method)(**options, numbered=True)
        assert next(iterator) == (begin, "x")
        assert iterator.all() == [(begin + 1, "y")]
        assert iterator.all() == []
        with pytest.raises(StopIteration):
            next(iterator)


def test_stream_continue_does_not_end_the_job(shell: Shell) -> None:
    with Peer(answering(*packets(1, 2), {"continue": True}), answering(NOT_YET)) as peer:
        job = shell.caller(peer).job(JOB)
        assert job.stream().all() == [1, 2]
        assert job.result() is harp.CALL_NOT_FINISHED


WRONG_STREAMS: list[tuple[str, list[object], type[harp.HarpException], str]] = [
    ("follow", [*packets(1), REFUSAL], harp.RequestRefused, "storage_error"),
    ("stream", [{"error": {"type": "invalid_jobid", "message": "m"}}], harp.RemoteError, "invalid_jobid"),
    ("follow", [{"error": {"type": "invalid_request", "message": "m"}}], harp.RequestRefused, "invalid_request"),
    ("follow", [*packets(1)], harp.CommunicationError, "closed the connection before the reply was complete"),
    ("follow", [*packets(1), b'{"packet": 1, '], harp.CommunicationError, "14 bytes into a line"),
    ("follow", [*packets(1), {"continue": True}], harp.CommunicationError, "does not answer this request"),
    ("stream", [*packets(1), NOT_YET], harp.CommunicationError, "does not answer this request"),
    ("follow", [*packets(1), *packets(2, begin=2)], harp.CommunicationError, "packet 2: expected number 1"),
    ("follow", [*packets(1), *packets(1)], harp.CommunicationError, "packet 0: expected number 1"),
    ("stream", [*packets(1), b"garbage\n"], harp.CommunicationError, "column 1"),
    ("stream", [*packets(1), b"\xff\n"], harp.CommunicationError, "not UTF-8"),
    ("stream", [{"packet": 0}], harp.CommunicationError, "data: missing"),
]


@pytest.mark.parametrize(("method", "lines", "kind", "message"), WRONG_STREAMS)
def test_stream_errors_are_raised_and_not_stored(
    shell: Shell, method: str, lines: list[object], kind: type[harp.HarpException], message: str
) -> None:
    with Peer(answering(*lines), answering({"result": 5})) as peer:
        job = shell.caller(peer, reconnect=0).job(JOB)
        iterator = getattr(job, method)()
        for _ in range(2):  # an end after an error would be a wrong end
            with pytest.raises(kind, match=message):
                list(iterator)
        assert job.result() == 5


def endless(conn: PeerConnection) -> None:
    conn.expect()
    conn.send(b"".join(map(line_of, packets(1, 2))))
    conn.until_closed()


@pytest.mark.parametrize("how", ["close", "with", "forget", "raise"])
def test_stream_closed_early_closes_its_connection(shell: Shell, how: str) -> None:
    with Peer(endless) as peer:
        iterator = shell.caller(peer).job(JOB).follow(since=0)
        assert next(iterator) == 1
        match how:
            case "close":
                iterator.close()
                iterator.close()
            case "with":
                with iterator:
                    pass
            case "raise":
                with pytest.raises(KeyError), iterator:
                    raise KeyError
            case "forget":
                del iterator
        assert peer.connections[0].closed.wait(30)
        if how != "forget":
            assert list(iterator) == []


def test_stream_returns_records_as_they_arrive(shell: Shell) -> None:
    seen = threading.Event()

    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(*packets("first"))
        assert seen.wait(30)
        conn.reply({"result": 1})

    with Peer(script) as peer:
        iterator = shell.caller(peer).job(JOB).follow(since=0)
        assert next(iterator) == "first"
        seen.set()
        assert iterator.all() == []


def asked_for(conn: PeerConnection, *lines: bytes) -> None:
    conn.expect()
    conn.send(b"".join(line + b"\n" for line in lines))
    conn.until_closed()


@pytest.mark.parametrize(
    "wrong",
    [
        b'{"packet":4,"data":0}',
        b'{"packet":2,"data":0}',
        b'{"packet":3,"data":NaN}',
        b'{"packet":3,"data":1,"data":2}',
        b'{"packet":3,"data":1}x',
        b'{"packet":3,"data":"\xff"}',
    ],
)
def test_stream_returns_records_before_invalid_line(shell: Shell, wrong: bytes) -> None:
    """The records and the invalid line may arrive together."""
    right = [line_of(packet).strip() for packet in packets("a", "b", "c")]
    with Peer(lambda conn: asked_for(conn, *right, wrong, *right)) as peer:
        iterator = shell.caller(peer).job(JOB).follow(since=0)
        assert [next(iterator) for _ in right] == ["a", "b", "c"]
        for _ in range(2):
            with pytest.raises(harp.CommunicationError):
                next(iterator)


def test_stream_returns_batches_in_every_form(shell: Shell) -> None:
    """Records as HARP's dispatcher writes them, with spaces, with times, and mixed."""
    tight = [b'{"packet":%d,"data":[%d]}' % (number, number) for number in range(100)]
    spaced = [json.dumps(packet).encode() for packet in packets(*([n] for n in range(100)))]
    mixed = [tight[number] if number % 3 else spaced[number] for number in range(100)]
    timed = [b'{"packet":%d,"time":1.5,"data":[%d]}' % (number, number) for number in range(100)]
    end = b'{"result":null}'
    for lines in (tight, spaced, mixed):
        with Peer(lambda conn: asked_for(conn, *lines, end)) as peer:  # noqa: B023 - used immediately
            assert shell.caller(peer).job(JOB).follow(since=0).all() == [[number] for number in range(100)]
        with Peer(lambda conn: asked_for(conn, *lines[40:], end)) as peer:  # noqa: B023
            found = shell.caller(peer).job(JOB).follow(recent=60, numbered=True).all()
            assert found == [(number, [number]) for number in range(40, 100)]
    with Peer(lambda conn: asked_for(conn, *timed, end)) as peer:
        found = shell.caller(peer).job(JOB).follow(since=0, timed=True).all()
        assert found == [(number, 1.5, [number]) for number in range(100)]


def test_stream_closed_drops_buffered_records(shell: Shell) -> None:
    with Peer(lambda conn: asked_for(conn, *(line_of(packet).strip() for packet in packets(1, 2, 3)))) as peer:
        iterator = shell.caller(peer).job(JOB).follow(since=0)
        assert next(iterator) == 1
        iterator.close()
        assert list(iterator) == []


def test_stream_iterator_constructed_directly() -> None:
    with (
        Peer(answering(*packets(1), {"result": 2}), answering(*packets(1), {"continue": True})) as peer,
    ):
        rpc = harp.HarpCaller(peer.host, peer.port)
        job = rpc.job(JOB)
        for request, numbered, items in ((FOLLOW, True, [(0, 1)]), (READ, False, [1])):
            conn = rpc.connect()
            conn.send(request)
            assert harp.RemoteCall.StreamIterator(job, conn, numbered).all() == items
        assert job.result() == 2


def test_iterators_and_connections_refuse_copies() -> None:
    with Peer(endless) as peer:
        rpc = harp.HarpCaller(peer.host, peer.port)
        conn = rpc.connect()
        conn.send(FOLLOW)
        iterator = harp.RemoteCall.StreamIterator(rpc.job(JOB), conn, numbered=True)
        for item in (iterator, conn):
            for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="cannot be copied or pickled"):
                    duplicate(item)
        iterator.close()


# Lines written by other programs.


@pytest.mark.parametrize("pieces", [lambda data: [data], single_bytes], ids=["whole", "bytes"])
def test_reply_layout_does_not_matter(shell: Shell, pieces: Any) -> None:
    lines = [
        b' { "job_id" : "%s" , "harpcaller" : 1 , "x" : 0 } \r\n' % JOB.encode(),
        b'\t{"extra":null,\t"result" : [ 1 ] }\n',
        b'{"info":1,"time":{"end":3,"start":2,"submit":1,"x":0},"call":{"arguments":{},"procedure":"p","host":"h"}}\n',
    ]
    with Peer(*(answering(line, pieces=pieces) for line in lines)) as peer:
        job = shell.caller(peer).web01.p()
        assert job.get() == [1]
        assert (job.host(), job.args(), job.end_time()) == ("h", {}, 3)


VALUES = [10**40, 0.1, "\ud800", {"z": 1, "a": 2}, {"": [{}]}, [[[[[]]]]], "x" * 5_000_000]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_values_arrive_unchanged(shell: Shell, value: Any) -> None:
    with Peer(answering({"harpcaller": 1, "job_id": JOB}), answering({"result": value})) as peer:
        found = shell.caller(peer).web01.p(value).get()
    assert json.dumps(found) == json.dumps(value) == json.dumps(peer.requests[0]["arguments"][0])


# Threads.


def test_threads_share_a_job() -> None:
    replies: dict[str, Any] = {"get_result": {"result": [1]}, "get_status": status(1, 2)}

    def script(conn: PeerConnection) -> None:
        request = conn.expect()
        conn.reply(next(reply for key, reply in replies.items() if key in request))

    with Peer(always=script) as peer, ThreadPoolExecutor(16) as pool:
        job = harp.HarpCaller(peer.host, peer.port, keep_alive=False).job(JOB)
        asked = [pool.submit(ask) for _ in range(50) for ask in (job.result, job.end_time, job.host, job.args)]
        assert [future.result(60) for future in asked] == [[1], 2, "web01", [1, "two"]] * 50
        assert len(peer.connections) <= 32


def test_threads_share_an_iterator() -> None:
    count = 500
    with Peer(answering(*packets(*range(count)), {"result": 1})) as peer, ThreadPoolExecutor(8) as pool:
        iterator = harp.HarpCaller(peer.host, peer.port).job(JOB).follow(since=0)
        parts = list(pool.map(lambda _: list(iterator), range(8)))
    assert sorted(item for part in parts for item in part) == list(range(count))
    assert all(part == sorted(part) for part in parts)


def test_close_wakes_a_reading_thread() -> None:
    read: list[Any] = []

    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(*packets(1))
        wait_until(lambda: read, what="the first item, after which the thread reads on")
        conn.reply(*packets(2, begin=1))
        conn.until_closed()

    with Peer(script) as peer, ThreadPoolExecutor(1) as pool:
        iterator = harp.HarpCaller(peer.host, peer.port).job(JOB).follow(since=0)
        reading = pool.submit(read.extend, iterator)
        wait_until(lambda: len(read) == 2, what="the second item")
        iterator.close()
        reading.result(60)
        assert read == [1, 2]


def test_peer_failed_script_fails_the_test() -> None:
    """The scripted peers of these tests detect a wrong request."""
    wrong: Script = answering({"result": 1}, request={"harpcaller": 2})
    with pytest.raises(AssertionError, match="expected"), Peer(wrong) as peer:
        harp.HarpCaller(peer.host, peer.port).job(JOB).result()
    with pytest.raises(AssertionError, match="were not run"), Peer(wrong):
        pass
    with pytest.raises(AssertionError, match="more connections than scripts"), Peer() as peer:
        harp.HarpCaller(peer.host, peer.port).job(JOB).result()
