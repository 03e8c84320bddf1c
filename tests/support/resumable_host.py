"""A scripted harpd with resumable calls: its messages, the commands it receives, and the state of the job."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harp.protocol.ends import End
from harpcaller.dispatcher import Dispatcher
from harpcaller.model.jobs import Job
from support.certificates import server_files
from support.deadline import eventually
from support.dispatcher import call, until
from support.peers import Peer, PeerConnection, Script, server_context

TERMS = {
    "instance": "w1",
    "disconnect_timeout": 60.0,
    "result_ttl": 60.0,
    "kill_grace": 1.0,
    "elapsed": 0.0,
    "records": 0,
}
EXIT_INFO = {"exit_info": {"exit": 0, "by": "itself"}}
NO_SUCH_CALL = {"harp": 1, "error": {"type": "no_such_call", "message": "no", "data": {"instance": "w1"}}}


def acknowledgement(stream: bool = False, **terms: Any) -> dict[str, Any]:
    return {"harp": 1, "stream_result": stream, "call": {**TERMS, **terms}}


def stop_report(*survivors: int) -> dict[str, Any]:
    left = [{"pid": pid, "command": "x"} for pid in survivors]
    return {
        "stop_report": {"processes": [], "found": 1, "survivors": left, "complete": True, "began": 1.0, "ended": 2.0}
    }


def call_list(*calls: str, instance: str = "w1") -> Script:
    """Reply to the query for the list of calls."""

    def script(conn: PeerConnection) -> None:
        request = conn.expect()
        assert request.keys() == {"harp", "procedure", "arguments", "calls", "auth", "keep_alive"}
        conn.reply({"harp": 1, "calls": list(calls), "instance": instance})

    return script


def commands(conn: PeerConnection) -> Iterator[dict[str, Any]]:
    """Yield the commands of the dispatcher, without heartbeats."""
    while True:
        command = json.loads(conn.line())
        if "heartbeat" not in command:
            yield command


def started(conn: PeerConnection, **terms: Any) -> dict[str, Any]:
    """Receive a start and acknowledge it; return the request."""
    request: dict[str, Any] = conn.expect()
    assert "attach" not in request
    conn.reply(acknowledgement(**terms))
    return request


def attached(conn: PeerConnection, **terms: Any) -> dict[str, Any]:
    """Receive an attach and acknowledge it; return the request."""
    request: dict[str, Any] = conn.expect()
    assert request.keys() == {"harp", "attach", "owner", "secret", "since", "auth"}
    conn.reply(acknowledgement(**terms))
    return request


def ends(conn: PeerConnection, *lines: object) -> None:
    """Send the end and wait for its release."""
    conn.reply(*lines)
    assert next(command for command in commands(conn) if "ack" not in command) == {"release": True}


@contextmanager
def playing(directory: Path, *scripts: Script, **options: Any) -> Iterator[Peer]:
    with Peer(*scripts, tls=server_context(server_files(directory)), **options) as peer:
        yield peer


async def result_of(dispatcher: Dispatcher, **options: Any) -> tuple[str, End | None]:
    job_id = await dispatcher.submit(call(**options), "test")
    return job_id, await dispatcher.result(job_id)


async def settled(dispatcher: Dispatcher, job_id: str) -> Job:
    await until(dispatcher, job_id, lambda job: not job.holds_slot, "the release of the slot")
    return await dispatcher.get_job(job_id)


async def acknowledged(dispatcher: Dispatcher, job_id: str) -> None:
    """Wait until the host has acknowledged the job's call."""

    async def looked() -> bool:
        at = (await dispatcher.details(job_id))["call"]
        return isinstance(at, dict) and at["instance"] is not None

    predicate: Callable[[], bool | Awaitable[bool]] = looked
    await eventually(predicate, what="the acknowledgement")


async def lost(dispatcher: Dispatcher, job_id: str) -> None:
    """Wait until an outage of the job's host begins."""

    async def looked() -> bool:
        at = (await dispatcher.details(job_id))["call"]
        return isinstance(at, dict) and at["outage"] is not None

    predicate: Callable[[], bool | Awaitable[bool]] = looked
    await eventually(predicate, what="the loss of contact")
