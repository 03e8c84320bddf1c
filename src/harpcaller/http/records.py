"""The records of jobs: as JSON Lines, as server-sent events, or as text; with resume, and as fast as the client reads.

Spec: docs/http-api.md, Records.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from itertools import count
from typing import Annotated, Any, Literal, Protocol

from msgspec import Meta, Struct
from starlette.responses import Response

from harp.protocol.dispatcher import Continue, encode_reply
from harp.protocol.ends import End
from harp.protocol.json_text import Raw, dumps, loads
from harp.protocol.schema import encode_object
from harpcaller.access import AccessDenied
from harpcaller.access.policy import Action
from harpcaller.acting import ActingAs
from harpcaller.http.authentication import repeat_authentication
from harpcaller.http.jobs import job_of
from harpcaller.http.operations import Answer, APIRequest, Body, Operation
from harpcaller.http.problems import Problem
from harpcaller.http.streaming import ACCESS, EVENTS, JSON_LINES, RETRY, TEXT, Source, StreamResponse
from harpcaller.job_rows import write_row
from harpcaller.model.ids import is_job_id
from harpcaller.model.jobs import Job, Records
from harpcaller.notifier import RecordBatch
from harpcaller.record_stream import RecordStream
from harpcaller.store import RecordMatches, StorageError, UnknownJob

_MAX_SEARCHED = 64 * 1024 * 1024  #: Maximum bytes of records that one request looks through.
_MAX_JOBS = 100  #: Maximum number of jobs in one response.
_MAX_NUMBERS = 16 * 1024  #: Maximum bytes of the body with the numbers of the next records.

_PAGE_RECORDS, _PAGE_BYTES = 1000, 1024 * 1024  #: Limits of a response that does not follow.
_STEP_BYTES = 1024 * 1024  #: Bytes that are looked through in one step.


_SINCE = "number of the first record; default: 0, with `follow` that of the next record that comes"


class RecordsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of `read_records`."""

    since: Annotated[int, Meta(ge=0, description=_SINCE)] | None = None
    recent: Annotated[int, Meta(ge=0, description="that many of the newest records")] | None = None
    before: Annotated[int, Meta(ge=0, description="the records before this number, `limit` of them")] | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000, description="maximum number of records")] | None = None
    bytes: Annotated[int, Meta(ge=1024, le=8 * 1024 * 1024, description="maximum bytes of records")] | None = None
    follow: Annotated[bool, Meta(description="continue until the job ends")] = False
    timed: Annotated[bool, Meta(description="with the time of each record")] = True
    state: Annotated[bool, Meta(description="also the row of the job, when it changes")] = False
    grep: Annotated[str, Meta(min_length=1, max_length=1000, description="only records with this text")] | None = None
    fold: Annotated[bool, Meta(description="without regard to the case of ASCII letters")] = False
    form: Annotated[Literal["jsonl", "sse", "text"], Meta(description="the form of the records")] | None = None
    download: Annotated[bool, Meta(description="all records, with the name of a file")] = False


class ManyRecordsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of `follow_records`."""

    jobs: Annotated[str, Meta(description=f"job ids, {_MAX_JOBS} at most, separated by commas")]
    follow: Annotated[bool, Meta(description="continue until all jobs have ended")] = False
    timed: Annotated[bool, Meta(description="with the time of each record")] = True


class ResumeQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of `resume_records`."""

    follow: bool = True
    timed: bool = True


# Forms.


class Form(Protocol):
    """How records and the rest of a response are written. Every function returns whole lines or events."""

    media_type: str
    heartbeat: bytes
    start: bytes  #: What the response begins with.

    def records(self, batch: RecordBatch, timed: bool) -> bytes:
        """Write records."""

    def row(self, row: Raw) -> bytes:
        """Write the row of the job."""

    def end(self, end: End, number: int) -> bytes:
        """Write the end of a job with this number of records."""

    def close(self, name: str, data: Raw) -> bytes:
        """Write a last line that is no end."""


class JSONLines:
    """The lines of the client protocol."""

    media_type = JSON_LINES
    heartbeat = b"\n"
    start = b""

    def records(self, batch: RecordBatch, timed: bool) -> bytes:
        """See `Form`."""
        return batch.lines(timed)

    def row(self, row: Raw) -> bytes:
        """See `Form`."""
        return b'{"job":%b}\n' % row

    def end(self, end: End, number: int) -> bytes:
        """See `Form`."""
        return encode_reply(end)

    def close(self, name: str, data: Raw) -> bytes:
        """See `Form`."""
        return data + b"\n"


class ServerSentEvents:
    """Events whose id is the number of the record, so that a browser that connects again continues after it."""

    media_type = EVENTS
    heartbeat = b": hb\n\n"
    start = RETRY

    def records(self, batch: RecordBatch, timed: bool) -> bytes:
        """See `Form`."""
        return batch.encode(_encode_timed_events if timed else _encode_events)

    def row(self, row: Raw) -> bytes:
        """See `Form`."""
        return b"event: job\ndata: %b\n\n" % _one_line(row)

    def end(self, end: End, number: int) -> bytes:
        """See `Form`."""
        return b"id: %d\nevent: end\ndata: %b\n\n" % (number, _one_line(encode_object(end)))

    def close(self, name: str, data: Raw) -> bytes:
        """See `Form`."""
        return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


class PlainText:
    """Records only, for people: strings as their text, other values as JSON."""

    media_type = TEXT
    heartbeat = b""
    start = b""

    def records(self, batch: RecordBatch, timed: bool) -> bytes:
        """See `Form`."""
        return batch.encode(_encode_text)

    def row(self, row: Raw) -> bytes:
        """See `Form`."""
        return b""

    def end(self, end: End, number: int) -> bytes:
        """See `Form`."""
        return b""

    def close(self, name: str, data: Raw) -> bytes:
        """See `Form`."""
        return b""


_FORMS: dict[str, Form] = {"jsonl": JSONLines(), "sse": ServerSentEvents(), "text": PlainText()}


def _one_line(text: bytes) -> bytes:
    """Return JSON as one line of an event. A carriage return in it is white space between values."""
    return text.replace(b"\r", b" ") if b"\r" in text else text


def _encode_timed_events(first: int, records: Records) -> bytes:
    items = zip(count(first), count(first), map(dumps, records.timestamps), records.values, strict=False)
    form = b'id: %d\nevent: record\ndata: {"packet":%d,"time":%b,"data":%b}\n\n'
    return _one_line(b"".join([form % item for item in items]))


def _encode_events(first: int, records: Records) -> bytes:
    items = zip(count(first), count(first), records.values, strict=False)
    return _one_line(b"".join([b'id: %d\nevent: record\ndata: {"packet":%d,"data":%b}\n\n' % item for item in items]))


def _encode_text(first: int, records: Records) -> bytes:
    return b"".join([_to_text(value) + b"\n" for value in records.values])


def _to_text(value: bytes) -> bytes:
    if value.startswith(b'"'):
        return str(loads(value)).encode("utf-8", "backslashreplace")
    return value


# Sources.


class RecordSource:
    """The records of a job, at most `limit` of them and about `room` bytes; then its end, or where to continue."""

    def __init__(self, form: Form, timed: bool, limit: int | None = None, room: int | None = None) -> None:
        self.stream: RecordStream  #: Calls `wake` when it is ready.
        self.row: RowSource | None = None  #: With it, the rows of the job are sent, too.
        self.on_ready: Callable[[], object] = lambda: None
        self.heartbeat = form.heartbeat
        self.is_done = False
        self.next = 0  #: The number of the next record.
        self._form = form
        self._timed = timed
        self._limit = limit
        self._room = room
        self._start = form.start
        self._is_empty = True  # whether no record was written
        self._before: tuple[Any, ...] = ()  # the last item of the stream, and the state before it

    def wake(self) -> None:
        """Tell the response that there may be another part."""
        self.on_ready()

    def next_part(self) -> bytes | None:
        """See `Source`."""
        if self._start:
            start, self._start = self._start, b""
            return start
        if self.row is not None and (row := self.row.take()) is not None:
            return self._form.row(row)
        if self._limit == 0 or (self._room is not None and self._room <= 0):
            return self._continue()
        try:
            item = self.stream.next_item()
        except (AccessDenied, UnknownJob, StorageError) as error:
            return self.interrupt(_reason_of(error))
        if item is None:
            return None
        self._before = item, self.next, self._limit, self._room, self._is_empty
        if isinstance(item, RecordBatch):
            return self._write(item) or self.next_part()
        if isinstance(item, Continue):
            return self._continue()
        if self.row is not None and not self.row.is_final:
            self.stream.put_back(item)
            self.row.finish()
            return None
        self.is_done = True
        return self._form.end(item, self.next)

    def put_back(self) -> None:
        """See `Source`. Only records and ends may be so long that they are put back."""
        item, self.next, self._limit, self._room, self._is_empty = self._before
        self.stream.put_back(item)
        self.is_done = False

    def interrupt(self, reason: str) -> bytes:
        """See `Source`."""
        self.is_done = True
        data = b'{"interrupted":"%b","next":%d}' % (reason.encode(), self.next)
        return self._form.close("interrupted", Raw(data))

    def close(self) -> None:
        """See `Source`."""
        self.stream.close()
        if self.row is not None:
            self.row.close()

    def _continue(self) -> bytes:
        self.is_done = True
        return self._form.close("continue", Raw(b'{"continue":true,"next":%d}' % self.next))

    def _write(self, batch: RecordBatch) -> bytes:
        """Write the records that fit; nothing if the response has to end before them."""
        fitting = len(batch.records)
        if self._limit is not None:
            fitting = min(fitting, self._limit)
        if self._room is not None:
            fitting = self._count_fitting(batch.records, fitting, self._room)
        part = batch.part(batch.first, batch.first + fitting)
        self.next = batch.first + fitting
        if self._limit is not None:
            self._limit -= fitting
        self._is_empty = False
        return b"" if part is None else self._form.records(part, self._timed)

    def _count_fitting(self, records: Records, most: int, room: int) -> int:
        """Return how many of the first records fit into the rest of the response. A response has at least one."""
        for fitting, value in enumerate(records.values[:most]):
            if len(value) > room and not (self._is_empty and fitting == 0):
                self._room = 0
                return fitting
            room -= len(value)
        self._room = room
        return most


class RowSource:
    """The row of a job: first as it is, and again after each change."""

    def __init__(self, acting: ActingAs, job_id: str, on_ready: Callable[[], object]) -> None:
        self.is_final = False  #: Whether the row with the end of the job was taken.
        self._acting = acting
        self._job_id = job_id
        self._on_ready = on_ready
        self._row: Raw | None = None
        self._sent: Raw | None = None
        self._is_outdated = self._is_last = False
        self._task: asyncio.Task[None] | None = None
        self._stop_watching = acting.watch_changes(job_id, self._read)
        self._read()

    def take(self) -> Raw | None:
        """Return a row that has changed, once."""
        row, self._row = self._row, None
        return row

    def finish(self) -> None:
        """Read the last row; then `is_final` is set."""
        if not self._is_last:
            self._is_last = True
            self._read()

    def close(self) -> None:
        """Read no more."""
        self._stop_watching()
        if self._task is not None:
            self._task.cancel()

    def _read(self) -> None:
        if self._task is not None:
            self._is_outdated = True
            return
        is_last = self._is_last

        def on_read(task: asyncio.Task[None]) -> None:
            self._task = None
            if task.cancelled():
                return
            self.is_final = is_last
            if self._is_outdated:
                self._is_outdated = False
                self._read()
            self._on_ready()

        self._task = asyncio.create_task(self._read_row())
        self._task.add_done_callback(on_read)

    async def _read_row(self) -> None:
        try:
            summaries = await self._acting.get_summaries([self._job_id], Action.READ)
        except (StorageError, AccessDenied):
            return  # the stream of records ends with it
        for summary in summaries:
            row = write_row(summary, self._acting.rights(summary))
            if row != self._sent:
                self._row = self._sent = row


class SearchSource:
    """The records of a job that have a text, from one number on. It looks through a limited number of bytes."""

    def __init__(self, form: Form, acting: ActingAs, job: Job, first: int, query: RecordsQuery) -> None:
        self.on_ready: Callable[[], object] = lambda: None
        self.heartbeat = form.heartbeat
        self.is_done = False
        self._form = form
        self._acting = acting
        self._job = job
        self._next = first
        self._text = query.grep or ""
        self._fold = query.fold
        self._timed = query.timed
        self._limit = query.limit or _PAGE_RECORDS
        self._room = query.bytes or _PAGE_BYTES
        self._unsearched = _MAX_SEARCHED
        self._scanned = self._matches = 0
        self._parts: deque[bytes] = deque([form.start] if form.start else [])
        self._last = b""
        self._is_over = False
        self._step: asyncio.Task[RecordMatches] | None = None

    def next_part(self) -> bytes | None:
        """See `Source`."""
        if self._parts:
            self._last = self._parts.popleft()
            self.is_done = self._is_over and not self._parts
            return self._last
        if self._step is None:
            self._search()
        return None

    def put_back(self) -> None:
        """See `Source`."""
        self._parts.appendleft(self._last)
        self.is_done = False

    def interrupt(self, reason: str) -> bytes:
        """See `Source`."""
        data = b'{"interrupted":"%b","next":%d}' % (reason.encode(), self._next)
        return self._form.close("interrupted", Raw(data))

    def close(self) -> None:
        """See `Source`."""
        if self._step is not None:
            self._step.cancel()

    def _search(self) -> None:
        searching = self._acting.search_records(
            self._job.id, self._text, self._fold, self._next, self._job.records, self._limit, _STEP_BYTES
        )
        self._step = asyncio.create_task(searching)
        self._step.add_done_callback(self._on_searched)

    def _on_searched(self, step: asyncio.Task[RecordMatches]) -> None:
        self._step = None
        if step.cancelled():
            return
        if (error := step.exception()) is not None:
            self._end(self.interrupt(_reason_of(error)))
        else:
            self._add(step.result())
        self.on_ready()

    def _add(self, found: RecordMatches) -> None:
        for number, value, time in found.records:
            batch = RecordBatch(number, Records((value,), (time,)))
            self._parts.append(self._form.records(batch, self._timed))
            self._room -= len(value)
        self._matches += len(found.records)
        self._limit -= len(found.records)
        self._scanned += found.next - self._next
        self._next = found.next
        self._unsearched -= found.searched_bytes
        if self._next >= self._job.records and self._job.end is not None:
            self._end(self._form.end(self._job.end, self._job.records))
        elif self._next >= self._job.records or min(self._limit, self._room, self._unsearched) <= 0:
            data = b'{"continue":true,"next":%d,"scanned":%d,"matches":%d}'
            numbers = self._next, self._scanned, self._matches
            self._end(self._form.close("continue", Raw(data % numbers)))

    def _end(self, last: bytes) -> None:
        self._parts.append(last)
        self._is_over = True


class ManySource:
    """The records of several jobs, each line with its job."""

    def __init__(self, timed: bool) -> None:
        self.on_ready: Callable[[], object] = lambda: None
        self.heartbeat = b"\n"
        self.is_done = False
        self.streams: dict[str, RecordStream] = {}  #: By job; those that have ended are removed.
        self.next: dict[str, int] = {}  #: The number of the next record, by job.
        self._ready: deque[str] = deque()  # the jobs whose stream may have an item; the one served last is the last
        self._timed = timed
        self._last: tuple[str, int, Any] = ("", 0, None)
        self._removed: dict[str, RecordStream] = {}  # the last one, in case its part is put back

    def add(self, job_id: str, stream: RecordStream, first: int) -> None:
        """Add a job."""
        self.streams[job_id] = stream
        self.next[job_id] = first
        self._ready.append(job_id)

    def wake(self, job_id: str) -> None:
        """Note that a stream may have an item."""
        if job_id in self.streams and job_id not in self._ready:
            self._ready.append(job_id)
        self.on_ready()

    def next_part(self) -> bytes | None:
        """See `Source`."""
        while self._ready:
            job_id = self._ready.popleft()
            stream = self.streams.get(job_id)
            if stream is None:
                continue
            try:
                item = stream.next_item()
            except (AccessDenied, UnknownJob, StorageError) as error:
                self._remove(job_id)
                return self._line(job_id, b'"interrupted":"%b"' % _reason_of(error).encode())
            if item is None:
                continue
            self._last = job_id, self.next[job_id], item
            if isinstance(item, RecordBatch):
                self._ready.append(job_id)
                self.next[job_id] = item.next
                return _add_job(job_id, item.lines(self._timed))
            if isinstance(item, Continue):
                self._remove(job_id)
                return self._line(job_id, b'"continue":true,"next":%d' % self.next[job_id])
            self._remove(job_id)
            return self._line(job_id, b'"end":%b' % encode_object(item))
        if not self.streams and not self.is_done:
            self.is_done = True
            return b'{"done":true}\n'
        return None

    def put_back(self) -> None:
        """See `Source`. Only records and ends may be so long that they are put back."""
        job_id, first, item = self._last
        stream = self._removed.pop(job_id, None) or self.streams[job_id]
        self.streams[job_id] = stream
        self.next[job_id] = first
        stream.put_back(item)
        if job_id not in self._ready:
            self._ready.append(job_id)

    def interrupt(self, reason: str) -> bytes:
        """See `Source`."""
        return b'{"interrupted":"%b","next":%b}\n' % (
            reason.encode(),
            dumps({id_: self.next[id_] for id_ in self.streams}),
        )

    def close(self) -> None:
        """See `Source`."""
        for stream in (*self.streams.values(), *self._removed.values()):
            stream.close()

    def _remove(self, job_id: str) -> None:
        for stream in self._removed.values():
            stream.close()
        self._removed = {job_id: self.streams.pop(job_id)}

    def _line(self, job_id: str, members: bytes) -> bytes:
        return b'{"job":"%b",%b}\n' % (job_id.encode(), members)


def _add_job(job_id: str, lines: bytes) -> bytes:
    """Return the lines with the job as their first member."""
    start = b'{"job":"%b",' % job_id.encode()
    return start + lines[1:-1].replace(b"\n{", b"\n" + start) + b"\n"


def _reason_of(error: BaseException) -> str:
    """Return why a response ends early."""
    match error:
        case AccessDenied():
            return ACCESS
        case UnknownJob():
            return "deleted"
        case StorageError():
            return "storage_error"
        case _:
            raise error


# Operations.


async def read_records(request: APIRequest) -> Response:
    """Answer with the records of a job."""
    query: RecordsQuery = request.query
    job_id = job_of(request)
    form, headers = _FORMS[_choose_form(request)], {}
    last_id = _read_last_id(request) if form.media_type == EVENTS else None
    _check(query, last_id)
    if query.download:
        extension = "txt" if form.media_type == TEXT else "jsonl"
        headers["Content-Disposition"] = f'attachment; filename="{job_id}.{extension}"'
    admitted = request.service.streams.admit(request.client, "records", query.follow or query.download)
    try:
        if query.grep is not None:
            job = await request.acting.get_job(job_id)
            source: Source = SearchSource(form, request.acting, job, query.since or 0, query)
        else:
            found = await _open_records(request, job_id, form, last_id)
            if found is None:
                admitted.release()
                return Response(status_code=204)
            source = found
    except BaseException:
        admitted.release()
        raise
    return StreamResponse(admitted, source, form.media_type, repeat_authentication(request), headers)


async def _open_records(request: APIRequest, job_id: str, form: Form, last_id: int | None) -> RecordSource | None:
    """Return the records that a request wants, when it is known that the client may read the job.

    None: a browser connects again after the end.
    """
    query: RecordsQuery = request.query
    since, recent, limit, room = query.since, query.recent, query.limit, query.bytes
    if last_id is not None:
        since, recent = last_id + 1, None
    if query.before is not None:
        limit = min(limit or _PAGE_RECORDS, query.before)
        since = query.before - limit
    if not (query.follow or query.download):
        limit = _PAGE_RECORDS if limit is None else limit
        room = _PAGE_BYTES if room is None else room
    source, ready = RecordSource(form, query.timed, limit, room), asyncio.Event()
    source.on_ready = ready.set
    source.stream = stream = request.acting.stream(job_id, since, recent, query.follow, source.wake)
    try:
        await _wait_read(stream, ready)
    except BaseException:
        stream.close()
        raise
    if last_id is not None and stream.final_count is not None and last_id >= stream.final_count:
        stream.close()
        return None
    source.next = stream.next
    if query.state:
        source.row = RowSource(request.acting, job_id, source.wake)
    return source


async def _wait_read(stream: RecordStream, ready: asyncio.Event) -> None:
    """Wait until it is known whether the client may read a job; raise the error of its stream. `ready` is its event."""
    while not stream.is_read:
        await ready.wait()
        ready.clear()
    if stream.error is not None:
        raise stream.error


def _choose_form(request: APIRequest) -> str:
    """Return the form that the query or the header ``Accept`` names."""
    query: RecordsQuery = request.query
    if query.form is not None:
        return query.form
    accepted = request.headers.get("accept", "")
    kinds = {JSON_LINES: "jsonl", EVENTS: "sse", TEXT: "text"}
    found = [(accepted.find(kind), form) for kind, form in kinds.items() if kind in accepted]
    return min(found)[1] if found else "jsonl"


def _read_last_id(request: APIRequest) -> int | None:
    """Return the number of the last event that a browser has received."""
    text = request.headers.get("last-event-id", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Problem("invalid_request", "Last-Event-ID: expected the number of a record")
    return int(text)


def _check(query: RecordsQuery, last_id: int | None) -> None:
    """Raise `Problem` for parameters that exclude each other."""
    starts = [name for name in ("since", "recent", "before") if getattr(query, name) is not None]
    if len(starts) > 1:
        raise Problem("invalid_request", f"{starts[1]}: not together with {starts[0]}")
    for name in ("before", "limit", "bytes", "grep"):
        if query.follow and getattr(query, name) is not None:
            raise Problem("invalid_request", f"{name}: not together with follow")
    if query.grep is not None and starts not in ([], ["since"]):
        raise Problem("invalid_request", f"{starts[0]}: not together with grep")
    if query.grep is not None and query.state:
        raise Problem("invalid_request", "state: not together with grep")
    if query.grep is None and query.fold:
        raise Problem("invalid_request", "fold: expected grep beside it")
    if query.before is not None and last_id is not None:
        raise Problem("invalid_request", "before: not together with Last-Event-ID")


async def follow_records(request: APIRequest) -> Response:
    """Answer with the records of several jobs."""
    query: ManyRecordsQuery = request.query
    jobs = dict.fromkeys(query.jobs.split(","))
    return await _send_many(request, jobs)


async def resume_records(request: APIRequest) -> Response:
    """Answer with the records of several jobs, each from a number on."""
    body = loads(request.body)
    jobs = body.get("jobs") if isinstance(body, dict) else None
    if not isinstance(jobs, dict) or len(body) != 1:
        reason = "expected an object: the number of the next record of each job"
        raise Problem("invalid_request", f"jobs: {reason}, and no other member", 422, [("/jobs", reason)])
    for job_id, since in jobs.items():
        if since is not None and (type(since) is not int or not 0 <= since < 2**63):
            pointer = f"/jobs/{job_id[:40]}"
            reason = "expected the number of the first record"
            raise Problem("invalid_request", f"jobs: {reason}", 422, [(pointer, reason)])
    return await _send_many(request, jobs)


async def _send_many(request: APIRequest, jobs: Mapping[str, int | None]) -> Response:
    if not 1 <= len(jobs) <= _MAX_JOBS:
        raise Problem("invalid_request", f"jobs: expected 1 to {_MAX_JOBS} job ids, got {len(jobs)}")
    for job_id in jobs:
        if not is_job_id(job_id):
            raise UnknownJob(job_id[:100])
    query: ManyRecordsQuery | ResumeQuery = request.query
    admitted = request.service.streams.admit(request.client, "records")
    source, ready = ManySource(query.timed), asyncio.Event()
    source.on_ready = ready.set
    try:
        for job_id, since in jobs.items():
            wake = lambda of_job=job_id: source.wake(of_job)  # noqa: E731
            source.add(job_id, request.acting.stream(job_id, since or 0, None, query.follow, wake), since or 0)
        for stream in list(source.streams.values()):
            await _wait_read(stream, ready)
    except BaseException:
        source.close()
        admitted.release()
        raise
    return StreamResponse(admitted, source, JSON_LINES, repeat_authentication(request))


_RECORDS_RULES = """\
Without `since`, `recent` and `before`, the response begins with the first record, but with `follow` after the
records that are stored already, as `recent=0` does: of a job that has ended, only the end comes. For all records and
those to come, send `follow=1&since=0`.

JSON Lines have a line `{"packet":N,"time":T,"data":ANY}` for each record, in this spelling, and a last line:
the end of the job as in the client protocol, `{"continue":true,"next":N}` if there may be more, or
`{"interrupted":REASON,"next":N}`. A response without a last line is incomplete; continue with `since`.
While nothing comes, a response with `follow` has an empty line each 15 seconds. With `state`, there are also lines
`{"job":ROW}`, or events `job`: the row of the job, first as it is, and after each change.

Events have the number of the record as id and the name `record`. The last one is `end`, `continue` or
`interrupted`. A browser that connects again sends `Last-Event-ID` and gets the records after it; after the end
it gets 204 and stops. Heartbeats are comments. The form `text` is for people: strings as their text, other
values as JSON.

With `grep`, up to 64 MiB of records are looked through; `scanned` and `matches` of the last line are numbers of
records.
"""

_LINES = Answer("the records", None, JSON_LINES)

OPERATIONS = (
    Operation(
        method="GET",
        path="/jobs/{job}/records",
        operation_id="read_records",
        summary="Read or follow the records of a job",
        description=_RECORDS_RULES,
        handler=read_records,
        query=RecordsQuery,
        action="read",
        problems=("invalid_jobid",),
        headers={"Last-Event-ID": "the number of the last record that was received; instead of `since`"},
        responses={
            200: Answer("the records", None, JSON_LINES, other_media_types=(EVENTS, TEXT)),
            204: Answer("the client has received the end of the job already"),
        },
    ),
    Operation(
        method="GET",
        path="/records",
        operation_id="follow_records",
        summary="Read or follow the records of several jobs",
        description="The lines begin with the job: "
        '`{"job":ID,"packet":N,"time":T,"data":ANY}`, then for each job `{"job":ID,"end":{...}}`, '
        '`{"job":ID,"continue":true,"next":N}` or `{"job":ID,"interrupted":REASON}`. The last line is `{"done":true}`.',
        handler=follow_records,
        query=ManyRecordsQuery,
        action="read",
        problems=("invalid_jobid",),
        responses={200: _LINES},
    ),
    Operation(
        method="POST",
        path="/records",
        operation_id="resume_records",
        summary="Continue with the records of several jobs",
        description="As `follow_records`; the body has the number of the next record of each job.",
        handler=resume_records,
        query=ResumeQuery,
        body=Body(
            {
                "type": "object",
                "properties": {
                    "jobs": {
                        "type": "object",
                        "additionalProperties": {"type": ["integer", "null"], "minimum": 0},
                        "minProperties": 1,
                        "maxProperties": _MAX_JOBS,
                    }
                },
                "required": ["jobs"],
                "additionalProperties": False,
            },
            {"jobs": {"0199e9c1-0000-7000-8000-000000000000": 41}},
            most=_MAX_NUMBERS,
        ),
        action="read",
        problems=("invalid_jobid",),
        responses={200: _LINES},
    ),
)
