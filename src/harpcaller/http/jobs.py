"""The operations on jobs. Payloads are the texts that were sent: no value is read as a number and written again.

Spec: docs/http-api.md, Jobs.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta, Struct
from starlette.responses import Response

from harp.protocol.dispatcher import MAX_CALLS, SECRETS, Call, NoResult, Queue, decode_calls, decode_queue
from harp.protocol.ends import End, Failed, Raised, Returned
from harp.protocol.json_text import Envelope, Raw, dumps
from harp.protocol.schema import (
    Arguments,
    Kind,
    Name,
    Payload,
    ProtocolError,
    Seconds,
    SecondsOrZero,
    WireObject,
    decode_as,
    decode_object,
    encode_object,
)
from harp_daemon.event_loop import LONG_LINE, run_in_turn
from harp_daemon.sliced_json import decode_slices
from harpcaller.access import AccessDenied
from harpcaller.access.policy import Action
from harpcaller.http.operations import (
    TAG_HEADER,
    UNCHANGED,
    Answer,
    APIRequest,
    Body,
    Operation,
    has_tag,
    json_response,
    not_modified,
    reference,
)
from harpcaller.http.problems import Problem
from harpcaller.model.ids import is_job_id
from harpcaller.model.jobs import PREVIEW_LENGTH, Job
from harpcaller.store import StorageError, UnknownJob

T = TypeVar("T")

MAX_WAIT = 60  #: Maximum seconds that a request waits for a job.
_MAX_END = 256 * 1024  #: Bytes of an end above which the job has only its address.
_STEP = 64 * 1024  #: Characters of a payload that are encoded in one step of the event loop.
_KEY = re.compile(r"[!-~]{1,255}", re.ASCII)

Payloads = Annotated[
    Literal["raw", "text", "none"],
    Meta(description="How payloads are shown: as JSON, as a string that has the exact text, or not at all."),
]
QueueNames = Annotated[
    Literal["raw", "text"],
    Meta(description="How the names of queues are shown: as JSON, or as a string that has the exact text."),
]
WaitSeconds = Annotated[float, Meta(ge=0, le=MAX_WAIT, description="Maximum seconds to wait for the end of the job.")]


class JobQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of `get_job` and `submit_job`."""

    payloads: Payloads = "raw"
    wait: WaitSeconds = 0.0


class RerunQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of `rerun_job`."""

    payloads: Payloads = "raw"


class WaitQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of `get_end`."""

    wait: WaitSeconds = 0.0


class ResultQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of `get_result`."""

    wait: WaitSeconds = 0.0
    download: Annotated[bool, Meta(description="Whether a browser shall store the result as a file.")] = False


class ManyCalls(WireObject):
    """The body of `submit_many`."""

    calls: Annotated[Sequence[Call], Kind(decode=decode_calls)]


def _is_wait(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_WAIT


class CallChanges(WireObject):
    """The body of `rerun_job`: the members of a call that differ."""

    host: Name | None = None
    procedure: Name | None = None
    arguments: Arguments | None = None
    timeout: Seconds | None = None
    max_exec_time: Seconds | None = None
    queue: Annotated[Queue | None, Kind(decode=decode_queue)] = None
    info: Payload = None
    start_within: SecondsOrZero | None = None
    secrets: Annotated[Sequence[str] | None, SECRETS] = None


class Cancellation(WireObject):
    """The body of `cancel_job`."""

    wait: Annotated[float, Kind(_is_wait, f"a number of seconds from 0 to {MAX_WAIT}, got {{!r}}")] = 0.0


class NoMembers(WireObject):
    """A body without members."""


# Parts of requests.


def job_of(request: APIRequest) -> str:
    """Return the job id in the path. Raises `UnknownJob` if it has not the form of one."""
    job_id = request.path["job"]
    if not is_job_id(job_id):
        raise UnknownJob(job_id[:100])
    return job_id


async def decode_body(request: APIRequest, decode: Callable[[bytes], T]) -> T:
    """Return what a function returns for the body; it is called in a thread if the body is long.

    Line feeds in the body, which can only be between values, become spaces: stored payloads are lines.
    """
    body = request.body
    if len(body) < LONG_LINE:
        return decode(body.replace(b"\n", b" "))
    return await run_in_turn(lambda text: decode(text.replace(b"\n", b" ")), body, request.client.owner)


def decoder_of(kind: type[WireObject]) -> Callable[[bytes], Any]:
    """Return a function that decodes a body as a message of a kind."""
    return lambda body: decode_as(kind, decode_object(body, decode_slices))


def request_id_of(request: APIRequest) -> str | None:
    """Return the request id for the header ``Idempotency-Key``, which is the same for its client and path only."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise Problem("invalid_request", "Idempotency-Key: expected 1 to 255 visible ASCII characters")
    scope = "\0".join((request.client.owner, request.http.url.path, key))
    return f"http:{blake2b(scope.encode('utf-8', 'surrogatepass'), digest_size=32).hexdigest()}"


def with_request_id(call: Call, request_id: str | None) -> Call:
    """Return a call with the request id of the header. Raises `ProtocolError` if it has its own."""
    if request_id is None:
        return call
    if call.request_id is not None:
        raise ProtocolError("request_id: expected none beside Idempotency-Key")
    return replace(call, request_id=request_id)


def repeated_headers(request: APIRequest) -> dict[str, str]:
    """Return the headers of a submission that was submitted before."""
    return {"Idempotency-Replayed": "true"} if request.acting.is_repeated else {}


async def wait_until_ended(request: APIRequest, job_id: str, seconds: float) -> None:
    """Wait until a job has ended, or the time is over."""
    if seconds > 0:
        waiting = request.acting.result(job_id)
        try:
            await request.service.wait(request.http, request.client, waiting, seconds)
        finally:
            waiting.cancel()


async def wait_until_changed(request: APIRequest, job_id: str, seconds: float) -> None:
    """Wait until a job has another tag than the client has, or the time is over.

    Raises `UnknownJob` if the right to the job is revoked.
    """
    changed = asyncio.Event()

    async def wait() -> None:
        while has_tag(request, etag_of(await request.acting.get_job(job_id))):
            await changed.wait()
            changed.clear()
            request.renew_rights()

    def check_rights() -> None:
        if not request.acting.is_current:
            changed.set()

    end_watch = request.acting.watch_changes(job_id, changed.set)
    end_rights_watch = request.acting.watch_changes(None, check_rights)
    waiting = asyncio.ensure_future(wait())
    try:
        await request.service.wait(request.http, request.client, waiting, seconds)
    finally:
        end_watch()
        end_rights_watch()
        waiting.cancel()
        request.renew_rights()


# Representations.


def show_payload(payload: Raw, form: str) -> Raw:
    """Return a payload in one of the forms ``raw`` and ``text``."""
    return dumps(payload.decode()) if form == "text" else payload


async def show_long_payload(payload: Raw, form: str) -> Raw:
    """Return what `show_payload` does, in short steps of the event loop."""
    if form != "text" or len(payload) <= _STEP:
        return show_payload(payload, form)
    text, pieces = payload.decode(), []
    for at in range(0, len(text), _STEP):
        pieces.append(dumps(text[at : at + _STEP])[1:-1])
        await asyncio.sleep(0)
    return Raw(b'"%b"' % b"".join(pieces))


def etag_of(job: Job) -> str:
    """Return the tag of a job, which changes with its state, its stop and its slot."""
    return f"{job.state.value}.{job.stop.value if job.stop else '-'}.{int(job.holds_slot)}"


async def show_job(request: APIRequest, job_id: str, form: str, is_new: bool = False) -> tuple[Job, Envelope]:
    """Return a job, and the object `Job`; `is_new`: the request has just submitted it. Raises `UnknownJob`."""
    acting = request.acting
    stored, details = await acting.describe(job_id, is_new)
    job = stored.job
    base = address_of(request, job.id)
    end = None if job.end is None else encode_object(job.end)
    is_omitted = end is not None and len(end) > _MAX_END
    shown = Envelope(details)
    if job.queue is not None:
        shown["queue"] = Envelope(id=stored.queue_id, name=show_payload(job.queue, form))
    error = job.end if isinstance(job.end, (Failed, Raised)) else None
    shown["end_type"] = None if error is None else error.type
    shown["end_message"] = None if error is None else error.message[:PREVIEW_LENGTH]
    shown.update(unreachable_since=acting.find_outage(job.id), run=None, rerun_of=job.rerun_of)
    shown["can"] = list(acting.rights_to(job))
    if form != "none":
        shown["arguments"] = await show_long_payload(job.arguments, form)
        shown["info"] = await show_long_payload(job.info, form)
        shown["end"] = None if end is None or is_omitted else await show_long_payload(end, form)
    shown["end_omitted"] = {"bytes": len(end), "href": f"{base}/end"} if end is not None and is_omitted else None
    shown["links"] = {name: f"{base}/{name}" for name in ("end", "result", "records")} | {"self": base}
    return job, shown


def address_of(request: APIRequest, job_id: str) -> str:
    """Return the path of a job."""
    return f"{request.service.settings.base_path}/api/v1/jobs/{job_id}"


# Handlers.


async def submit_job(request: APIRequest) -> Response:
    """Store a job, and perhaps wait for its end."""
    received_at = asyncio.get_running_loop().time()
    request.service.check_waits(request.client, request.query.wait)
    request_id = request_id_of(request)
    call = with_request_id(await decode_body(request, decoder_of(Call)), request_id)
    job_id = await request.acting.submit(call, received_at)
    return await show_submitted(request, job_id, request.query.wait, len(request.body) < LONG_LINE)


async def show_submitted(request: APIRequest, job_id: str, wait: float = 0.0, is_short: bool = False) -> Response:
    """Return the response to a submission: the job, perhaps after its end. `is_short`: its payloads are short."""
    headers = {"Location": address_of(request, job_id), **repeated_headers(request)}
    try:
        await wait_until_ended(request, job_id, wait)
        is_new = is_short and not wait and not request.acting.is_repeated
        _, shown = await show_job(request, job_id, request.query.payloads, is_new)
    except (UnknownJob, AccessDenied, StorageError):  # the job is stored, but cannot be shown
        shown = Envelope(job=job_id)
    return json_response(shown, 201, headers)


async def submit_many(request: APIRequest) -> Response:
    """Store jobs, all or none."""
    request_id = request_id_of(request)
    calls = (await decode_body(request, decoder_of(ManyCalls))).calls
    if request_id is not None:
        calls = [with_request_id(call, f"{request_id}:{index}") for index, call in enumerate(calls)]
    job_ids = await request.acting.submit_many(calls, as_one=request_id is not None)
    return json_response({"jobs": job_ids}, 201, repeated_headers(request))


async def get_job(request: APIRequest) -> Response:
    """Answer with all of a job but its records."""
    job_id, seconds = job_of(request), request.query.wait
    request.service.check_waits(request.client, seconds)
    if "if-none-match" not in request.headers:
        await wait_until_ended(request, job_id, seconds)
    elif seconds > 0:
        await wait_until_changed(request, job_id, seconds)
    job, shown = await show_job(request, job_id, request.query.payloads)
    tag = etag_of(job)
    if has_tag(request, tag):
        return not_modified(tag)
    return json_response(shown, headers={"ETag": f'W/"{tag}"'})


async def get_end(request: APIRequest) -> Response:
    """Answer with the end of a job."""
    end = await _wait_for_end(request)
    return json_response(encode_object(NoResult()), 202) if end is None else json_response(encode_object(end))


async def _wait_for_end(request: APIRequest) -> End | None:
    """Return the end of a job, perhaps after a wait; None: it has not ended."""
    job_id, seconds = job_of(request), request.query.wait
    request.service.check_waits(request.client, seconds)
    await wait_until_ended(request, job_id, seconds)
    return (await request.acting.get_job(job_id)).end


async def get_result(request: APIRequest) -> Response:
    """Answer with the value that a job has returned, and nothing else."""
    if (end := await _wait_for_end(request)) is None:
        return json_response(encode_object(NoResult()), 202)
    if not isinstance(end, Returned):
        text = encode_object(end)
        members = {"end": text} if len(text) <= _MAX_END else {}
        raise Problem("no_result", "the job has not returned a value; see its end", members=members)
    headers = (
        {"Content-Disposition": f'attachment; filename="{job_of(request)}.json"'} if request.query.download else {}
    )
    return Response(bytes(end.result), headers=headers, media_type="application/json")


async def cancel_job(request: APIRequest) -> Response:
    """Cancel a job, and perhaps wait for the outcome of its stop."""
    job_id = job_of(request)
    seconds = (await decode_body(request, decoder_of(Cancellation))).wait
    request.service.check_waits(request.client, seconds)
    await request.acting.require_on_job(Action.CANCEL, job_id)
    cancelled = await request.acting.cancel(job_id)
    if not cancelled:
        await request.acting.get_job(job_id)  # raises `UnknownJob`
    stop = None
    if seconds:
        waiting = asyncio.ensure_future(request.acting.wait_stopped(job_id))
        try:
            details = await request.service.wait(request.http, request.client, waiting, seconds)
        finally:
            waiting.cancel()
        request.renew_rights()
        await request.acting.require_on_job(Action.CANCEL, job_id)
        if details is not None and details.job.stop is not None:
            stop = Envelope(state=details.job.stop.value, stop_report=details.metadata.stop_report)
    return json_response(Envelope(cancelled=cancelled, stop=stop))


async def release_job(request: APIRequest) -> Response:
    """Release the slot of a job that has ended."""
    job_id = job_of(request)
    await decode_body(request, decoder_of(NoMembers))
    request.acting.require_ever(Action.MANAGE)
    await request.acting.require_on_job(Action.MANAGE, job_id)
    released = await request.acting.release_slot(job_id)
    if not released:
        await request.acting.get_job(job_id)  # raises `UnknownJob`
    return json_response({"released": released})


async def rerun_job(request: APIRequest) -> Response:
    """Submit a job again, perhaps with changes."""
    job_id, request_id = job_of(request), request_id_of(request)

    def decode(body: bytes) -> dict[str, Any]:
        members = decode_object(body, decode_slices)
        changes = decode_as(CallChanges, members)
        return {name: getattr(changes, name) for name in members}

    changes = await decode_body(request, decode)
    return await show_submitted(request, await request.acting.rerun(job_id, changes, request_id))


_CALL_EXAMPLE = {
    "host": "web01",
    "procedure": "restart_nginx",
    "arguments": ["blog"],
    "queue": {"name": {"site": "blog"}},
}
_KEY_HEADER = {
    "Idempotency-Key": "1 to 255 visible ASCII characters. Submissions of a client with the same key are one: the "
    "second one gets the ids of the first one, and the header Idempotency-Replayed."
}
_REPLAYED = {"Idempotency-Replayed": "true: the key was used before, and these are the jobs of that submission"}
_NO_RESULT = Answer("the job has not ended", reference("NoResult"))

OPERATIONS = (
    Operation(
        method="POST",
        path="/jobs",
        operation_id="submit_job",
        summary="Submit a job",
        description="The response comes when the job is on stable storage; with `wait`, when it has ended or the time "
        "is over. A client that may not read the job gets its id only. An unknown host is accepted: the job then ends "
        "as `unknown_host`.",
        handler=submit_job,
        query=JobQuery,
        body=Body(reference("Call"), _CALL_EXAMPLE),
        headers=_KEY_HEADER,
        action="call",
        problems=("access_denied", "key_reused", "rate_limited"),
        responses={201: Answer("the job", reference("Job"), headers={"Location": "path of the job", **_REPLAYED})},
    ),
    Operation(
        method="POST",
        path="/jobs/many",
        operation_id="submit_many",
        summary="Submit jobs, all or none",
        description=f"Up to {MAX_CALLS:,} calls.",
        handler=submit_many,
        body=Body(reference("ManyCalls"), {"calls": [_CALL_EXAMPLE, {**_CALL_EXAMPLE, "host": "web02"}]}),
        headers=_KEY_HEADER,
        action="call",
        problems=("access_denied", "key_reused", "rate_limited"),
        responses={
            201: Answer("the ids of the jobs, in the order of the calls", reference("JobIDs"), headers=_REPLAYED)
        },
    ),
    Operation(
        method="GET",
        path="/jobs/{job}",
        operation_id="get_job",
        summary="Get a job",
        description="With `wait`, the response comes when the job has ended; with `If-None-Match`, too, when its tag "
        "is another one.",
        handler=get_job,
        query=JobQuery,
        headers=TAG_HEADER,
        action="read",
        problems=("invalid_jobid",),
        responses={
            200: Answer("the job", reference("Job"), headers={"ETag": "changes with the job's state, stop and slot"}),
            304: UNCHANGED,
        },
    ),
    Operation(
        method="GET",
        path="/jobs/{job}/end",
        operation_id="get_end",
        summary="Get the end of a job",
        handler=get_end,
        query=WaitQuery,
        action="read",
        problems=("invalid_jobid",),
        responses={200: Answer("how the job has ended", reference("End")), 202: _NO_RESULT},
    ),
    Operation(
        method="GET",
        path="/jobs/{job}/result",
        operation_id="get_result",
        summary="Get the value that a job has returned",
        description="The body is the value, byte for byte as the procedure has returned it.",
        handler=get_result,
        query=ResultQuery,
        action="read",
        problems=("invalid_jobid", "no_result"),
        responses={200: Answer("the value", {}), 202: _NO_RESULT},
    ),
    Operation(
        method="POST",
        path="/jobs/{job}/cancel",
        operation_id="cancel_job",
        summary="Cancel a job",
        description="`cancelled` is false if the job has ended before. With `wait`, `stop` is the outcome for its "
        "processes; null if the time is over, or if there were none.",
        handler=cancel_job,
        body=Body(reference("Cancellation"), {"wait": 0}, required=False),
        action="cancel",
        problems=("access_denied", "invalid_jobid"),
        responses={200: Answer("whether this request has cancelled it", reference("Cancelled"))},
    ),
    Operation(
        method="POST",
        path="/jobs/{job}/release",
        operation_id="release_job",
        summary="Release the slot of a job that has ended",
        description="For a host that does not confirm the end of the job's call. `released` is false if the job holds "
        "no slot.",
        handler=release_job,
        body=Body(reference("NoMembers"), {}, required=False),
        action="manage",
        problems=("access_denied", "invalid_jobid"),
        responses={200: Answer("whether it held one", reference("Released"))},
    ),
    Operation(
        method="POST",
        path="/jobs/{job}/rerun",
        operation_id="rerun_job",
        summary="Submit a job again",
        description="The new job has the host, procedure, arguments, info, queue and limits of the old one, payloads "
        "to the byte, but for the members of the body.",
        handler=rerun_job,
        query=RerunQuery,
        body=Body(reference("CallChanges"), {"host": "web02"}, required=False),
        headers=_KEY_HEADER,
        action="call",
        problems=("access_denied", "cannot_rerun", "invalid_jobid", "key_reused", "rate_limited"),
        responses={
            201: Answer("the new job", reference("Job"), headers={"Location": "path of the new job", **_REPLAYED})
        },
    ),
)
