"""The operations on jobs. Payloads are the texts that were sent: no value is read as a number and written again.

Spec: docs/http-api.md, Jobs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct
from starlette.responses import Response

from harp.protocol.json_text import Envelope, Raw, dumps
from harp.protocol.schema import encode_object
from harpcaller.http.operations import Answer, APIRequest, Operation, json_response, reference
from harpcaller.model.ids import is_job_id
from harpcaller.model.jobs import ENDED, Job
from harpcaller.store import UnknownJob

Payloads = Annotated[
    Literal["raw", "text", "none"],
    Meta(description="how payloads are shown: as JSON, as a string that has the exact text, or not at all"),
]
_MAX_END = 256 * 1024  #: Bytes of an end above which the job has only its address.


class JobQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of `get_job`."""

    payloads: Payloads = "raw"


def job_of(request: APIRequest) -> str:
    """Return the job id in the path. Raises `UnknownJob` if it has not the form of one."""
    job_id = request.path["job"]
    if not is_job_id(job_id):
        raise UnknownJob(job_id[:100])
    return job_id


def show_payload(payload: Raw, form: str) -> Raw:
    """Return a payload as a client wants it, but for ``none``."""
    return dumps(payload.decode()) if form == "text" else payload


async def get_job(request: APIRequest) -> Response:
    """Answer with all of a job but its records."""
    job, details = await request.acting.describe(job_of(request))
    return json_response(show_job(request, job, Envelope(details)), headers={"ETag": etag_of(job)})


def etag_of(job: Job) -> str:
    """Return the tag of a job, which changes with its state, its stop and its slot."""
    return f'W/"{job.state.value}.{job.stop.value if job.stop else "-"}.{int(job.holds_slot)}"'


def show_job(request: APIRequest, job: Job, details: Envelope) -> Envelope:
    """Return the object `Job`."""
    form = request.query.payloads
    shown = Envelope(details)
    shown["start_within"] = job.start_within
    if form != "none":
        shown["arguments"] = show_payload(job.arguments, form)
        shown["info"] = show_payload(job.info, form)
    end = None if job.end is None else encode_object(job.end)
    base = f"{request.service.settings.base_path}/api/v1/jobs/{job.id}"
    is_long = end is not None and len(end) > _MAX_END
    if form != "none":
        shown["end"] = None if end is None or is_long else show_payload(end, form)
    shown["end_omitted"] = {"bytes": len(end), "href": f"{base}/end"} if end is not None and is_long else None
    shown["links"] = {
        "self": base,
        "end": f"{base}/end",
        "result": f"{base}/result",
        "records": f"{base}/records",
    }
    return shown


def has_ended(job: Job) -> bool:
    """Return whether a job has ended."""
    return job.state in ENDED


OPERATIONS = (
    Operation(
        method="GET",
        path="/jobs/{job}",
        operation_id="get_job",
        summary="Get a job",
        handler=get_job,
        query=JobQuery,
        action="read",
        problems=("invalid_jobid",),
        responses={200: Answer("the job", reference("Job"))},
    ),
)
