"""Replies to the requests for lists and counts. Spec: docs/protocol.md, Lists of jobs."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from itertools import islice

from harp.protocol import dispatcher as protocol
from harp.protocol.json_text import Raw, dumps
from harpcaller.acting import ActingAs
from harpcaller.cursors import InvalidCursor
from harpcaller.job_rows import write_row_as_text
from harpcaller.model.job_filters import parse_search

_STEP = 50  #: Jobs that are encoded in one turn of the event loop.


async def list_jobs(acting: ActingAs, request: protocol.ListJobs) -> protocol.JobsListed:
    """Return a page of the jobs that match. Raises `InvalidFilter`, `InvalidCursor`, `AccessDenied`."""
    wanted = parse_search(request.filter, time.time())
    limit = request.limit or protocol.DEFAULT_LISTED
    page = await acting.find_jobs(wanted, not request.oldest_first, limit, request.cursor)
    rows = []
    for number, summary in enumerate(page.summaries):
        if number % _STEP == _STEP - 1:
            await asyncio.sleep(0)
        # As text: a number in the name of a queue may be one that the client cannot represent.
        rows.append(write_row_as_text(summary, acting.rights(summary)))
    return protocol.JobsListed(_array(rows), page.next, page.examined, page.searched_to)


async def count_jobs(acting: ActingAs, request: protocol.CountJobs) -> protocol.JobsCounted:
    """Return numbers of the jobs that match. Raises `InvalidFilter`, `AccessDenied`."""
    wanted = parse_search(request.filter, time.time())
    counts = await acting.count_jobs(wanted, request.by, request.most or protocol.MAX_COUNTED)
    by = {
        key: [{"value": each.value, "count": each.count, "more": each.more} for each in found]
        for key, found in counts.by.items()
    }
    return protocol.JobsCounted({"by": by, "exact": counts.exact, "at": counts.at})


async def list_hosts(acting: ActingAs, request: protocol.ListHosts) -> protocol.HostsListed:
    """Return a page of the hosts with a text in their name. Raises `InvalidCursor`, `AccessDenied`."""
    after = "" if request.cursor is None else _decode_cursor(request.cursor)
    names = acting.find_host_names(request.text.lower(), after)
    page = [*islice(names, request.limit or protocol.DEFAULT_LISTED)]
    has_more = next(names, None) is not None
    rows = []
    for known in await acting.describe_hosts(page, wanted=request.text):
        host = known.host
        row = {"name": host.hostname, "address": host.address, "port": host.port, "state": known.reachability.value}
        row |= {"since": known.since, "running": known.running, "queued": known.queued, "error": known.error}
        row["limit"] = known.limit
        rows.append(dumps(row))
    return protocol.HostsListed(_array(rows), _encode_cursor(page[-1]) if has_more else None)


async def list_queues(acting: ActingAs, request: protocol.ListQueues) -> protocol.QueuesListed:
    """Return a page of the queues with a text in their name. Raises `InvalidCursor`, `AccessDenied`."""
    text = request.text.lower()
    fits = lambda queue: text in _text(queue.name).lower()  # noqa: E731
    limit = request.limit or protocol.DEFAULT_LISTED
    queues, following = await acting.find_queues(limit, request.cursor, request.text, fits)
    rows = []
    for queue in queues:
        numbers = {"concurrency": queue.concurrency, "running": queue.running, "queued": queue.queued}
        rows.append(dumps({"id": queue.id, "name": _text(queue.name), **numbers, "oldest_submit": queue.oldest}))
    return protocol.QueuesListed(_array(rows), following)


def _text(name: Raw) -> str:
    return name.decode("utf-8", "replace")


def _array(rows: Sequence[bytes]) -> Raw:
    return Raw(b"[%b]" % b",".join(rows))


def _encode_cursor(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode("utf-8", "surrogatepass")).decode()


def _decode_cursor(cursor: str) -> str:
    try:
        return base64.urlsafe_b64decode(cursor).decode("utf-8", "surrogatepass")
    except ValueError as error:
        raise InvalidCursor("expected a cursor of this list") from error
