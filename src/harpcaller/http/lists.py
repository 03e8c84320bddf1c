"""The operations on many jobs: lists, counts, and numbers over time. Spec: docs/http-api.md, Jobs."""

from __future__ import annotations

import asyncio
import time
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import parse_qsl, urlencode

import msgspec
from msgspec import Meta, Struct
from starlette.responses import Response

from harp.protocol.dispatcher import COUNTED_BY
from harp.protocol.json_text import Envelope, Raw, dumps
from harpcaller.acting import ActingAs
from harpcaller.http.jobs import QueueNames
from harpcaller.http.operations import (
    TAG,
    TAG_HEADER,
    UNCHANGED,
    Answer,
    APIRequest,
    Operation,
    has_tag,
    not_modified,
    reference,
    tag_of,
    tagged_response,
)
from harpcaller.http.problems import Problem
from harpcaller.job_rows import dump_object, write_row, write_row_as_text
from harpcaller.model.job_filters import JobFilter, parse_filter, parse_time
from harpcaller.model.jobs import JobCounts

_MAX_BUCKETS = 1500
_STEP = 50  #: Rows that are encoded in one step of the event loop.


class JobFilterQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """The parameters of a filter of jobs. See docs/job-filters.md."""

    id: Annotated[str | None, Meta(description="A job id, or its first 8 digits or more.")] = None
    state: Annotated[str | None, Meta(description="States, separated by commas; or `open`, `ended`, `bad`.")] = None
    host: Annotated[str | None, Meta(description="Names, separated by commas; or one name with a `*`.")] = None
    procedure: Annotated[str | None, Meta(description="Names, separated by commas.")] = None
    owner: Annotated[str | None, Meta(description="Principals, separated by commas.")] = None
    queue: Annotated[str | None, Meta(description="Id of a queue; `-`: jobs without a queue.")] = None
    from_: Annotated[
        str | None, Meta(description="Submitted from this time on: Unix seconds, RFC 3339, or `-15m`, `-2h`, `-7d`.")
    ] = None
    to: Annotated[str | None, Meta(description="Submitted before this time.")] = None
    started_from: Annotated[str | None, Meta(description="Started from this time on.")] = None
    started_to: Annotated[str | None, Meta(description="Started before this time.")] = None
    ended_from: Annotated[str | None, Meta(description="Ended from this time on.")] = None
    ended_to: Annotated[str | None, Meta(description="Ended before this time.")] = None
    end_type: Annotated[str | None, Meta(description="Types of errors and exceptions, separated by commas.")] = None
    stop: Annotated[str | None, Meta(description="States of the stop, separated by commas.")] = None
    holds_slot: Annotated[str | None, Meta(description="`1`: jobs that hold a slot; `0`: that hold none.")] = None
    info: Annotated[str | None, Meta(description="A part of the JSON text of `info`.")] = None
    arguments: Annotated[str | None, Meta(description="A part of the JSON text of the arguments.")] = None
    rerun_of: Annotated[str | None, Meta(description="Jobs that repeat this one.")] = None
    q: Annotated[
        str | None,
        Meta(
            description="A search text: `key:value` words, and words to look for in host, procedure, `info` and the "
            "message of the end."
        ),
    ] = None

    def parse(self, now: float) -> JobFilter:
        """Return the filter. Raises `InvalidFilter`; `now` is Unix seconds."""
        values = {name: getattr(self, field) for name, field in _NAMES.items()}
        return parse_filter([(name, value) for name, value in values.items() if value is not None], now)


#: The attributes of the parameters.
_NAMES = {field.encode_name: field.name for field in msgspec.structs.fields(JobFilterQuery)}

_Order = Annotated[Literal["newest", "oldest"], Meta(description="Which jobs are first, in the order of submission.")]


class ListQuery(JobFilterQuery, frozen=True, kw_only=True, rename={"from_": "from"}):
    """The parameters of `list_jobs`."""

    order: _Order = "newest"
    limit: Annotated[int, Meta(ge=1, le=500, description="Maximum number of jobs.")] = 50
    cursor: Annotated[str | None, Meta(description="`next` of the page before.")] = None
    payloads: QueueNames = "raw"


class CountsQuery(JobFilterQuery, frozen=True, kw_only=True, rename={"from_": "from"}):
    """The parameters of `count_jobs`."""

    by: Annotated[str, Meta(description=f"Facets, separated by commas: {', '.join(COUNTED_BY)}.")] = "state"
    most: Annotated[int, Meta(ge=1, le=10_000, description="Jobs are counted up to this number.")] = 10_000


class StatisticsQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """The parameters of `get_statistics`."""

    from_: Annotated[str, Meta(description="Start of the time: Unix seconds, RFC 3339, or `-2h`.")] = "-1h"
    to: Annotated[str | None, Meta(description="Its end; by default now.")] = None
    step: Annotated[Literal[10, 60, 300, 3600, 86400], Meta(description="Seconds of a bucket.")] = 60
    state: Annotated[
        str | None,
        Meta(description="States of ended jobs, separated by commas: only ends in these states are counted."),
    ] = None


async def list_jobs(request: APIRequest) -> Response:
    """Answer with a page of the jobs that fit a filter."""
    query: ListQuery = request.query
    acting, wanted = request.acting, query.parse(time.time())
    normal_form = wanted.normal_form()
    times = wanted.submitted, wanted.started, wanted.ended  # relative ones differ each time
    question = repr((normal_form, times, query.order, query.limit, query.cursor, query.payloads))
    tag = acting.tag_list(question)
    rights = await acting.begin_list(wanted)
    if tag is not None and has_tag(request, tag):
        return not_modified(tag)
    shown = wanted, query.order, query.limit, query.cursor, query.payloads
    page = await request.service.pages.get((*shown, rights), partial(_read_page, acting, *shown))
    if tag is None:
        tag = tag_of(page.compared)
        if has_tag(request, tag):
            return not_modified(tag)
    headers = {"ETag": f'W/"{tag}"'}
    if page.next is not None:
        scope = request.http.scope
        headers["Link"] = f'<{_address_of_next(scope["path"], scope["query_string"], page.next)}>; rel="next"'
    return Response(page.text, headers=headers, media_type="application/json")


@lru_cache(16)
def _address_of_next(path: str, query_string: bytes, cursor: str) -> str:
    """Return the address of the next page: that of the request with another cursor. Equal clients share it."""
    given = [pair for pair in parse_qsl(query_string.decode(), True) if pair[0] != "cursor"]
    return f"{path}?{urlencode([*given, ('cursor', cursor)])}"


class _Page(NamedTuple):
    """A page of a list, for all clients that ask for it at the same time."""

    text: bytes
    compared: bytes  # what differs when a job has changed
    next: str | None  # cursor of the next page


async def _read_page(
    acting: ActingAs, wanted: JobFilter, order: str, limit: int, cursor: str | None, form: str
) -> _Page:
    page = await acting.read_list(wanted, order == "newest", limit, cursor)
    write = write_row_as_text if form == "text" else write_row
    rights_to = acting.rights_finder()
    rows: list[Raw] = []
    for at in range(0, len(page.summaries), _STEP):
        rows += [write(each, rights_to(each)) for each in page.summaries[at : at + _STEP]]
        await asyncio.sleep(0)
    normal_form = wanted.normal_form()
    joined = b",".join(rows)
    body = Envelope(
        jobs=Raw(b"[%b]" % joined),
        next=page.next,
        complete=page.complete,
        examined=page.examined,
        searched_to=page.searched_to,
        filter=normal_form,
    )
    compared = b"%b %b" % (joined, dumps([page.complete, normal_form]))
    return _Page(dump_object(body) + b"\n", compared, page.next)


async def count_jobs(request: APIRequest) -> Response:
    """Answer with the numbers of jobs by facet and value."""
    query: CountsQuery = request.query
    facets = list(dict.fromkeys(query.by.split(",")))
    for facet in facets:
        if facet not in COUNTED_BY:
            raise Problem("invalid_request", f"by: expected some of {', '.join(COUNTED_BY)}, got {facet[:100]!r}")
    counts = await request.acting.count_jobs(query.parse(time.time()), facets, query.most)
    shown = encode_counts(counts)
    return tagged_response(request, shown, [shown["by"], shown["exact"]])


def encode_counts(counts: JobCounts) -> dict[str, Any]:
    """Return the object `Counts`."""
    by = {
        facet: [{"value": found.value, "count": found.count, "more": found.more} for found in values]
        for facet, values in counts.by.items()
    }
    return {"by": by, "exact": counts.exact, "at": counts.at}


async def get_statistics(request: APIRequest) -> Response:
    """Answer with the numbers of jobs that were submitted and ended, over time."""
    query: StatisticsQuery = request.query
    now = time.time()
    since = parse_time("from", query.from_, now)
    until = now if query.to is None else parse_time("to", query.to, now)
    if (until - since) / query.step > _MAX_BUCKETS:
        raise Problem("invalid_request", f"step: expected at most {_MAX_BUCKETS} buckets; use a larger step")
    states = frozenset() if query.state is None else parse_filter([("state", query.state)], now).states
    found = await request.acting.job_statistics(since, until, float(query.step), states)
    buckets = [msgspec.structs.asdict(bucket) for bucket in found.buckets]
    return tagged_response(request, {"step": query.step, "buckets": buckets, "complete": found.complete})


OPERATIONS = (
    Operation(
        method="GET",
        path="/jobs",
        operation_id="list_jobs",
        summary="List jobs",
        description="One page of the jobs that fit the filter; see [filters](job-filters.md). A page may be empty "
        "although there are more jobs: continue with `next` until `complete` is true. `Link` has the next page, too. "
        "While no job changes, the tag stays the same, and a request with it reads nothing from the store.",
        headers=TAG_HEADER,
        handler=list_jobs,
        query=ListQuery,
        action="list",
        problems=("access_denied", "invalid_cursor"),
        responses={
            200: Answer("the page", reference("JobPage"), headers={"Link": "the next page", **TAG}),
            304: UNCHANGED,
        },
    ),
    Operation(
        method="GET",
        path="/jobs/counts",
        operation_id="count_jobs",
        summary="Count jobs by state, host, procedure, queue, owner or end type",
        description="Each facet is counted under all other parts of the filter. `more`: there are more than `count`.",
        handler=count_jobs,
        query=CountsQuery,
        action="list",
        problems=("access_denied",),
        headers=TAG_HEADER,
        responses={200: Answer("the numbers", reference("JobCounts"), headers=TAG), 304: UNCHANGED},
    ),
    Operation(
        method="GET",
        path="/jobs/stats",
        operation_id="get_statistics",
        summary="Get the numbers of jobs over time",
        description=f"At most {_MAX_BUCKETS:,} buckets. `complete` is false if there were too many jobs to count all.",
        handler=get_statistics,
        query=StatisticsQuery,
        action="list",
        problems=("access_denied",),
        headers=TAG_HEADER,
        responses={200: Answer("the numbers in each bucket", reference("JobStatistics"), headers=TAG), 304: UNCHANGED},
    ),
)
