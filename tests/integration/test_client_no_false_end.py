"""No false end: a scripted dispatcher that replies anything at any moment never leads to a wrong end, a gap or a hang.

A seed makes a history: a job with some records and an end, and for each connection a way to break off: an empty reply,
a cut within or between lines, a reset, a refusal, garbage, a delay, half a line. Both shells read the job. An error may
be raised; then the reader asks again, as a program would. Its records at the end must be those of the job.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

import harp
from support.peers import Peer, PeerConnection, line_of
from support.shells import Shell

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
SEEDS = range(12)
#: After this many broken connections, the dispatcher replies as it should.
PATIENCE = 12
#: Seconds after which a reader hangs.
HANGS = 60

ENDS: list[tuple[dict[str, Any], Any]] = [
    ({"result": {"n": 1}}, {"n": 1}),
    ({"result": None}, None),
    ({"exception": {"type": "ValueError", "message": "m"}}, ("RemoteException", "ValueError")),
    ({"error": {"type": "timeout", "message": "m"}}, ("RemoteError", "timeout")),
    (
        {"error": {"type": "too_many_connections", "message": "m", "data": None}},
        ("RemoteError", "too_many_connections"),
    ),
    ({"cancelled": True}, "cancelled"),
]

REFUSALS = ["too_many_connections", "internal_error", "invalid_request", "storage_error"]
#: Lines that are never a valid reply, or not to these requests.
GARBAGE = [
    b"\n",
    b"garbage\n",
    b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
    b"{}\n",
    b"[]\n",
    b"null\n",
    b'{"result": 1, "cancelled": true}\n',
    b'{"job_id": "x"}\n',
    b'{"no_result": 1}\n',
    b'{"cancelled": false}\n',
    b'{"error": null}\n',
    b'{"error": {"type": 5, "message": "m"}}\n',
    b'{"packet": -1, "data": 1}\n',
    b'{"packet": 1000000, "data": 1}\n',
    b'{"result": NaN}\n',
    b'{"result": "\xff"}\n',
    b'{"keep_alive": 60}\n',
]


class History:
    """A job, and a dispatcher that has it and misbehaves for `PATIENCE` connections."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._connections = 0
        self.records = self._rng.randrange(8)
        self.end, self.outcome = self._rng.choice(ENDS)
        #: Records that exist when a connection is made: more with each connection.
        self._stored = 0

    def _next(self) -> tuple[int, bool, random.Random]:
        """Return how many records are stored now, whether the job has ended, and the chance of this connection."""
        with self._lock:
            self._connections += 1
            patient = self._connections > PATIENCE
            self._stored = self.records if patient else min(self.records, self._stored + self._rng.randrange(3))
            ended = patient or (self._stored == self.records and self._rng.random() < 0.5)
            return self._stored, ended, random.Random(self._rng.random())

    def play(self, conn: PeerConnection) -> None:
        """Serve a connection; a script."""
        stored, ended, rng = self._next()
        with suppress(OSError, AssertionError):
            broken = self._connections <= PATIENCE and rng.random() < 0.9
            if broken and rng.random() < 0.15:
                self._break(conn, rng, b"")  # before the request
                return
            reply = self._reply(conn.expect(), stored, ended)
            if not broken:
                conn.send(reply)
                if not ended:
                    conn.closed.wait(0.05)
                return
            keep = reply[: rng.randrange(len(reply) + 1)] if rng.random() < 0.5 else _lines(reply, rng)
            for piece in _pieces(keep, rng):
                conn.send(piece)
            self._break(conn, rng, keep)

    def _break(self, conn: PeerConnection, rng: random.Random, sent: bytes) -> None:
        """End a connection in some way. Garbage and refusals begin a line, so that they are separate lines."""
        at_line = not sent or sent.endswith(b"\n")
        match rng.randrange(6):
            case 0:
                conn.reset()
            case 1 if at_line:
                conn.send(rng.choice(GARBAGE))
            case 2 | 3 if at_line:
                conn.reply({"error": {"type": rng.choice(REFUSALS), "message": "not now"}})
            case 4:
                conn.closed.wait(0.05)
            case 5:
                conn.sock.shutdown(socket.SHUT_WR)

    def _reply(self, request: dict[str, Any], stored: int, ended: bool) -> bytes:
        """Return the replies that a dispatcher may have sent before an interruption."""
        if "get_result" in request:
            return line_of(self.end) if ended else b"" if request.get("wait", True) else line_of({"no_result": True})
        if "get_status" in request:
            call = {"host": "web01", "procedure": "p", "arguments": []}
            time = {"submit": 1, "start": 2, "end": 3 if ended else None}
            return line_of({"call": call, "time": time, "info": None})
        follow = "follow_stream" in request
        first = request.get("since")
        if first is None:
            first = max(stored - request.get("recent", 0 if follow else stored), 0)
        lines = [{"packet": number, "data": f"r{number}"} for number in range(first, stored)]
        closing = [self.end] if ended else [] if follow else [{"continue": True}]
        return b"".join(map(line_of, [*lines, *closing]))


def _lines(reply: bytes, rng: random.Random) -> bytes:
    """Return the first lines of a reply, without its last one."""
    lines = reply.splitlines(keepends=True)
    return b"".join(lines[: rng.randrange(len(lines))]) if lines else b""


def _pieces(data: bytes, rng: random.Random) -> Iterator[bytes]:
    while data:
        size = rng.choice((1, 7, 1000))
        yield data[:size]
        data = data[size:]


def described(outcome: Any) -> Any:
    """Return an outcome in the form of `ENDS`."""
    if outcome is harp.CALL_CANCELLED:
        return "cancelled"
    if isinstance(outcome, (harp.RemoteError, harp.RemoteException)):
        return type(outcome).__name__, outcome.type
    return outcome


def until_answered(ask: Callable[[], Any]) -> Any:
    """Repeat a request until there is an answer, as a program does that gets `CommunicationError`."""
    for _ in range(PATIENCE * 3):
        try:
            outcome = ask()
        except harp.CommunicationError:
            continue
        if not isinstance(outcome, harp.CommunicationError) and outcome is not harp.CALL_NOT_FINISHED:
            return outcome
    raise AssertionError("the dispatcher was patient, but there was no answer")


def follow_all(job: Any) -> list[Any]:
    """Follow the records of a job to its end, with as many iterators as it takes."""
    found: list[Any] = []
    for _ in range(PATIENCE * 3):
        iterator = None
        try:
            iterator = job.follow(since=len(found), numbered=True)
            for number, record in iterator:
                assert (number, record) == (len(found), f"r{number}"), f"{number} after {len(found)} records"
                found.append(record)
        except harp.CommunicationError:
            if iterator is not None:
                with pytest.raises(harp.CommunicationError):  # it never turns into an end
                    next(iterator)
        else:
            return found
    raise AssertionError("the dispatcher was patient, but the stream has not ended")


def in_time(work: Callable[[], Any]) -> Any:
    """Return the value of a function. Fail if it takes longer than `HANGS` seconds."""
    found: dict[str, Any] = {}

    def run() -> None:
        try:
            found["value"] = work()
        except BaseException as error:  # noqa: BLE001  is raised below
            found["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANGS)
    assert found, f"it hangs: no outcome within {HANGS} s"
    if "error" in found:
        raise found["error"]
    return found["value"]


@pytest.mark.parametrize("reconnect", [0, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_result_is_never_a_false_end(shell: Shell, seed: int, reconnect: float) -> None:
    history = History(seed)
    with Peer(always=history.play) as peer:
        job = shell.caller(peer, reconnect=reconnect, request_timeout=5).job(JOB)
        wait = {"timeout": 5} if seed % 2 else {"wait": True}
        outcome = in_time(lambda: until_answered(lambda: job.result(**wait)))
        assert described(outcome) == history.outcome
        assert described(job.result()) == history.outcome


@pytest.mark.parametrize("reconnect", [0, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_follow_has_no_gap_and_no_false_end(shell: Shell, seed: int, reconnect: float) -> None:
    history = History(seed)
    with Peer(always=history.play) as peer:
        job = shell.caller(peer, reconnect=reconnect, request_timeout=5).job(JOB)
        assert in_time(lambda: follow_all(job)) == [f"r{number}" for number in range(history.records)]
        assert described(job.result()) == history.outcome  # it came with the stream


@pytest.mark.parametrize("seed", SEEDS)
def test_stream_has_no_gap_and_no_false_end(shell: Shell, seed: int) -> None:
    history = History(seed)
    with Peer(always=history.play) as peer:
        job = shell.caller(peer, reconnect=0, request_timeout=5).job(JOB)

        def read() -> None:
            found: list[Any] = []
            for _ in range(PATIENCE * 3):
                with suppress(harp.CommunicationError):
                    for number, record in job.stream(since=len(found), numbered=True):
                        assert (number, record) == (len(found), f"r{number}")
                        found.append(record)
                with suppress(harp.CommunicationError):
                    if job.end_time() is not None and len(found) == history.records:
                        return
            raise AssertionError(f"{len(found)} of {history.records} records")

        in_time(read)
        assert described(in_time(lambda: until_answered(job.result))) == history.outcome


@pytest.mark.parametrize("seed", SEEDS)
def test_follow_from_now_has_no_gap(shell: Shell, seed: int) -> None:
    """Without a number, the first record is any; later records follow without a gap."""
    history = History(seed)
    with Peer(always=history.play) as peer:
        job = shell.caller(peer, reconnect=5, request_timeout=5).job(JOB)

        def read() -> list[int]:
            numbers: list[int] = []
            with suppress(harp.CommunicationError):
                for number, record in job.follow(recent=seed % 3, numbered=True):
                    assert record == f"r{number}"
                    numbers.append(number)
                assert not numbers or numbers[-1] == history.records - 1
                assert described(job.result()) == history.outcome
            return numbers

        numbers = in_time(read)
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
