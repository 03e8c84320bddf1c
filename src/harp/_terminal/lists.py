"""The commands `jobs`, `hosts` and `queues` of the program `harp`: tables for people, JSON for programs."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from harp._core.lists import HostSummary, JobSummary, QueueSummary
from harp._core.values import ID_LENGTH
from harp._net.sync import ListIterator
from harp._terminal.tables import (
    MIN_FLEXIBLE,
    OF_STATE,
    Column,
    Line,
    Screen,
    Span,
    cut,
    format_duration,
    format_time,
    lay_out,
    one_line,
    width_of,
)
from harp.client import HarpCaller
from harp.errors import CommunicationError, HarpException, NotSupported, RemoteError, RequestRefused

T = TypeVar("T", JobSummary, HostSummary, QueueSummary)

FORMATS = ("table", "json", "lines")
#: Jobs in a table unless the command has --limit.
_USUAL_ROWS = 20
#: Jobs that a watch looks up one by one, because they are not listed any more.
_MAX_GONE = 100
_BAD = ("raised", "failed")  #: The states of jobs that ended with an error.
#: The length of job ids of which the end is omitted: that of the time and the version, and more of them.
_SHORT_IDS = (18, 23)
_MIN_BEGINNING = 8  #: Characters that the beginning of a job id must have, so that it is no word to search for.
_MAX_NAMED = 10  #: Maximum number of ids that an error lists.


class _Field(NamedTuple):
    """A column: how it is aligned, and its cell for an item at a time."""

    column: Column
    cell: Callable[[Any, float], Span]


def _duration(job: JobSummary, now: float) -> Span:
    if job.started is None:
        return Span("")
    return Span(format_duration((now if job.ended is None else job.ended) - job.started))


def _waited(job: JobSummary, now: float) -> Span:
    until = job.started or job.ended or now
    return Span("" if job.submitted is None else format_duration(until - job.submitted))


def _end(job: JobSummary, now: float) -> Span:
    if job.unreachable_since is not None:
        return Span(f"host unreachable since {format_time(job.unreachable_since, now)}", "bad")
    text = ": ".join(filter(None, (job.end_type, job.end_message)))
    if job.stop in ("pending", "failed", "unknown"):
        text = f"stop {job.stop}; {text}" if text else f"stop {job.stop}"
    return Span(text, OF_STATE.get(job.state, "") if job.state in _BAD else "")


def _text(name: str) -> Callable[[Any, float], Span]:
    return lambda item, now: Span(str(getattr(item, name) or ""))


def _number(name: str) -> Callable[[Any, float], Span]:
    return lambda item, now: Span("" if getattr(item, name) is None else str(getattr(item, name)))


def _time(name: str) -> Callable[[Any, float], Span]:
    return lambda item, now: Span(format_time(getattr(item, name), now))


def _state(item: Any, now: float) -> Span:
    return Span(item.state, OF_STATE.get(item.state, ""))


#: The columns of jobs by name.
JOB_COLUMNS: Mapping[str, _Field] = {
    "job": _Field(Column("JOB"), _text("id")),
    "state": _Field(Column("STATE"), _state),
    "host": _Field(Column("HOST", flexible=True), _text("host")),
    "procedure": _Field(Column("PROCEDURE", flexible=True), _text("procedure")),
    "queue": _Field(Column("QUEUE", flexible=True), _text("queue")),
    "owner": _Field(Column("OWNER", flexible=True), _text("owner")),
    "submitted": _Field(Column("SUBMITTED"), _time("submitted")),
    "started": _Field(Column("STARTED"), _time("started")),
    "ended": _Field(Column("ENDED"), _time("ended")),
    "waited": _Field(Column("WAITED", right=True), _waited),
    "took": _Field(Column("TOOK", right=True), _duration),
    "records": _Field(Column("RECORDS", right=True), _number("records")),
    "end": _Field(Column("END", flexible=True), _end),
    "stop": _Field(Column("STOP"), _text("stop")),
    "arguments": _Field(Column("ARGUMENTS", flexible=True), _text("arguments_preview")),
    "info": _Field(Column("INFO", flexible=True), _text("info_preview")),
    "rerun_of": _Field(Column("RERUN OF"), _text("rerun_of")),
}
USUAL_JOB_COLUMNS = ("job", "state", "host", "procedure", "submitted", "took", "end")
_HOST_COLUMNS = (
    _Field(Column("HOST", flexible=True), _text("name")),
    _Field(Column("STATE"), _state),
    _Field(Column("ADDRESS"), lambda host, now: Span(f"{host.address}:{host.port}")),
    _Field(
        Column("RUNNING", right=True),
        lambda host, now: Span(f"{host.running}/{host.limit}" if host.limit is not None else f"{host.running}"),
    ),
    _Field(Column("QUEUED", right=True), _number("queued")),
    _Field(Column("SINCE"), _time("since")),
    _Field(Column("ERROR", flexible=True), lambda host, now: Span(host.error or "", "bad")),
)
_QUEUE_COLUMNS = (
    _Field(Column("QUEUE", flexible=True), _text("name")),
    _Field(Column("RUNNING", right=True), lambda queue, now: Span(f"{queue.running}/{queue.concurrency}")),
    _Field(Column("QUEUED", right=True), _number("queued")),
    _Field(Column("OLDEST"), _time("oldest_submit")),
    _Field(Column("ID"), _text("id")),
)


def parse_columns(text: str) -> tuple[str, ...]:
    """Return the names of columns, separated by commas. Raises `ValueError`, which lists them."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in JOB_COLUMNS]:
        raise ValueError(f"unknown column {unknown[0]!r}; columns: {','.join(JOB_COLUMNS)}")
    return names


def chosen_format(options: Namespace, screen: Screen) -> str:
    """Return the format of the output: by default a table on a terminal, and JSON Lines elsewhere."""
    return options.format or ("table" if screen.is_terminal else "lines")


def list_jobs(caller: HarpCaller, options: Namespace) -> None:
    """Print the jobs that match the words of the command."""
    screen = Screen()
    filter = " ".join(options.words)
    chosen = chosen_format(options, screen)
    limit = options.limit if options.limit is not None else _USUAL_ROWS if chosen == "table" else 0
    if options.count is not None:
        _count_jobs(caller, filter, options.count, chosen, screen)
        return
    if options.watch:
        _watch(caller, filter, options, limit or _USUAL_ROWS, chosen, screen)
        return
    jobs = caller.jobs(filter, oldest_first=options.oldest, limit=limit or None)
    if chosen != "table":
        counted = _Counted(jobs)
        screen.print_json((job._row for job in counted), chosen == "json")
        _explain_failed(filter, counted.count)
        return
    found: list[JobSummary] = []
    progress = _Progress(jobs)
    if screen.can_redraw and sys.stderr.isatty():
        jobs._on_next_page = progress.show
    try:
        found += iter(jobs)
    finally:  # also after Ctrl-C in a long search
        progress.clear()
        if found:
            screen.print(_job_table(found, options.columns, screen.width))
    if screen.is_terminal:
        screen.print([[Span(_hint(found, filter, jobs.cursor is not None), "dim")]])
    _explain_failed(filter, len(found))


class _Counted:
    """An iterator that counts its items."""

    def __init__(self, items: Iterator[JobSummary]) -> None:
        self.count = 0
        self._items = items

    def __iter__(self) -> Iterator[JobSummary]:
        for item in self._items:
            self.count += 1
            yield item


def _explain_failed(filter: str, found: int) -> None:
    """Say which jobs ``state:failed`` leaves out: to a person, and in any case if no job matches."""
    states = {state for word in filter.split() if word.startswith("state:") for state in word[6:].split(",")}
    if "failed" in states and not states & {"raised", "bad", "ended"} and (not found or sys.stderr.isatty()):
        hint = "state:failed leaves out jobs whose procedure raised an exception (state:raised); state:bad is both"
        print(f"harp: {hint}", file=sys.stderr)


class _Progress:
    """How far a search has come that is not at its end, on a line of stderr that is written over."""

    def __init__(self, jobs: ListIterator[JobSummary]) -> None:
        self._jobs = jobs
        self._is_shown = False

    def show(self) -> None:
        """Show it before the search continues."""
        at = format_time(self._jobs.searched_to, time.time())
        text = f"searched {self._jobs.examined} jobs, back to {at}; Ctrl-C shows what was found"
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        self._is_shown = True

    def clear(self) -> None:
        """Clear the line."""
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _hint(found: Sequence[JobSummary], filter: str, is_cut: bool) -> str:
    if not found:
        return "no job matches" if filter else "there are no jobs"
    hints = ["harp show JOB explains one, with its last records"]
    if is_cut:
        hints.append("--limit N prints more, --limit 0 all")
    if "state:" not in filter and any(job.state not in _BAD for job in found):
        hints.append("state:bad lists only those that went wrong")
    return "; ".join(hints)


def _job_table(jobs: Sequence[JobSummary], names: Sequence[str], width: int | None) -> list[Line]:
    """Return the table of jobs; on a narrow terminal with cut ids, and without columns that tell least."""
    lines: list[Line] = []
    for are_short, least, omitted in _FORMS:
        shown = names if names != USUAL_JOB_COLUMNS else [name for name in names if name not in omitted]
        lines = _lay_out_jobs(jobs, shown, width, are_short, least)
        if width is None or all(sum(width_of(span.text) for span in line) <= width for line in lines):
            break
    return lines


#: The forms of a table, the widest first: whether ids are cut, the least width of flexible columns, omitted columns.
_FORMS = (
    (False, 24, ()),
    (True, 24, ()),
    (True, MIN_FLEXIBLE, ()),
    (True, MIN_FLEXIBLE, ("took",)),
    (True, MIN_FLEXIBLE, ("took", "submitted")),
)


def _lay_out_jobs(
    jobs: Sequence[JobSummary], names: Sequence[str], width: int | None, are_short: bool, least: int
) -> list[Line]:
    now = time.time()
    fields = [JOB_COLUMNS[name] for name in names]
    rows = [[field.cell(job, now) for field in fields] for job in jobs]
    if are_short:
        rows = [[_shorten_id(jobs, field, cell) for field, cell in zip(fields, row, strict=True)] for row in rows]
    return lay_out([field.column for field in fields], rows, width, least)


def _shorten_id(jobs: Sequence[JobSummary], field: _Field, cell: Span) -> Span:
    """Return a job's id as the beginning that no other listed job has; commands that take a job take it, too."""
    if field is not JOB_COLUMNS["job"]:
        return cell
    for length in _SHORT_IDS:
        if len({job.id[:length] for job in jobs}) == len(jobs):
            return Span(cell.text[:length], cell.style)
    return cell


def _count_jobs(caller: HarpCaller, filter: str, by: str, chosen: str, screen: Screen) -> None:
    counts = caller.count_jobs(filter, by).by.get(by, ())
    rows = [{by: each.value, "count": each.count, "more": each.more} for each in counts]
    if chosen != "table":
        screen.print_json(rows, chosen == "json")
    else:
        cells = [
            [
                Span(each.value or "-", OF_STATE.get(each.value or "", "")),
                Span(f"{each.count}{'+' if each.more else ''}"),
            ]
            for each in counts
        ]
        screen.print(lay_out([Column(by.upper()), Column("JOBS", right=True)], cells, screen.width))


# Watching.


def _watch(caller: HarpCaller, filter: str, options: Namespace, limit: int, chosen: str, screen: Screen) -> None:
    """Show the jobs again and again: in place on a terminal, and elsewhere each job that is new or has changed."""
    polls = _poll(caller, filter, options, limit)
    if chosen == "table" and screen.can_redraw:
        _redraw(polls, options, filter, screen)
        return
    shown: dict[str, Mapping[str, Any]] = {}
    for jobs, error in polls:
        if error is not None:
            continue
        current = {job.id: job for job in reversed(jobs)}
        # Jobs that are not listed any more may change until their host has confirmed their end.
        gone = [job_id for job_id, row in shown.items() if job_id not in current and not _is_final(row)]
        found = [job for job in map(partial(_look_up, caller), gone[-_MAX_GONE:]) if job is not None]
        changed = [job for job in (*found, *current.values()) if shown.get(job.id) != job._row]
        shown = {job.id: job._row for job in (*found, *current.values())}
        if chosen != "table":
            screen.print_json(job._row for job in changed)
        elif changed:
            screen.print(_job_table(changed, options.columns, None))


def _is_final(row: Mapping[str, Any]) -> bool:
    times = row.get("time")
    return isinstance(times, Mapping) and times.get("end") is not None and not row.get("holds_slot")


def _look_up(caller: HarpCaller, job_id: str) -> JobSummary | None:
    try:
        return next(caller.jobs(f"id:{job_id}", limit=1), None)
    except CommunicationError:
        return None


def _poll(
    caller: HarpCaller, filter: str, options: Namespace, limit: int
) -> Iterator[tuple[Sequence[JobSummary], CommunicationError | None]]:
    """Yield the newest jobs every interval; while the dispatcher is unreachable, the last ones and the error."""
    jobs: Sequence[JobSummary] = ()
    reached_at: float | None = None
    while True:
        try:
            jobs = caller.jobs(filter, oldest_first=options.oldest, limit=limit).all()
        except CommunicationError as error:
            permanent = isinstance(error, (NotSupported, RequestRefused))
            if permanent or reached_at is None or time.monotonic() - reached_at > options.reconnect:
                raise
            yield jobs, error
        else:
            reached_at = time.monotonic()
            yield jobs, None
        time.sleep(options.interval)


def _redraw(
    polls: Iterable[tuple[Sequence[JobSummary], CommunicationError | None]],
    options: Namespace,
    filter: str,
    screen: Screen,
) -> None:
    with screen.redrawn() as redraw:
        for jobs, error in polls:
            width, height = screen.size or (80, 24)
            at = format_time(time.time(), time.time())
            status = Span(f"{at}  not reachable: {error}", "bad") if error else Span(f"{at}  Ctrl-C ends", "dim")
            title = [Span(f"harp jobs {filter}".rstrip(), "title"), Span("  "), status]
            table = _job_table(jobs, options.columns, width) if jobs else [[Span("no job matches", "dim")]]
            redraw([_fit(line, width) for line in (title, [], *table)][:height])


def _fit(line: Line, width: int) -> Line:
    """Return a line that does not wrap."""
    spans, remaining = [], width
    for span in line:
        text = cut(one_line(span.text), remaining)
        spans.append(Span(text, span.style))
        remaining -= width_of(text)
        if remaining <= 0:
            break
    return spans


# Hosts and queues.


def list_hosts(caller: HarpCaller, options: Namespace) -> None:
    """Print the hosts of the registry."""
    _print_items(caller.hosts(" ".join(options.words), limit=options.limit or None), _HOST_COLUMNS, "host", options)


def list_queues(caller: HarpCaller, options: Namespace) -> None:
    """Print the queues that have jobs."""
    _print_items(caller.queues(" ".join(options.words), limit=options.limit or None), _QUEUE_COLUMNS, "queue", options)


def _print_items(items: Iterable[T], fields: Sequence[_Field], noun: str, options: Namespace) -> None:
    screen = Screen()
    chosen = chosen_format(options, screen)
    if chosen != "table":
        screen.print_json((item._row for item in items), chosen == "json")
        return
    now = time.time()
    rows = [[field.cell(item, now) for field in fields] for item in items]
    if screen.is_terminal and not rows:
        screen.print([[Span(f"no {noun} matches" if options.words else f"there are no {noun}s", "dim")]])
    else:
        screen.print(lay_out([field.column for field in fields], rows, screen.width))


def find_job(caller: HarpCaller, words: Sequence[str]) -> tuple[str, bool]:
    """Return the id of the job that words name, and whether older ones match, too.

    The words are a job id, the beginning of one, or a filter. Raises `RemoteError` if no job matches, and
    `HarpException` if several ids have this beginning.
    """
    filter = " ".join(words)
    if (job_id := find_id(caller, filter)) is not None:
        return job_id, False
    found = caller.jobs(filter, limit=2).all()
    if not found:
        raise RemoteError("invalid_jobid", f"no job matches {filter!r}")
    return found[0].id, len(found) > 1


def find_id(caller: HarpCaller, text: str) -> str | None:
    """Return the job id that a text is or begins; None: the text has another form.

    Only the beginning of an id, of at least 8 characters, needs a request. Raises `RemoteError` if no id that the
    client may list has this beginning, and `HarpException` with the ids if several have it.
    """
    if len(text) < _MIN_BEGINNING or set(text.lower()) - set("0123456789abcdef-"):
        return None
    if len(text) == ID_LENGTH:
        return text
    found = [job.id for job in caller.jobs(text, limit=_MAX_NAMED + 1)]
    if not found:
        raise RemoteError("invalid_jobid", f"there is no job whose id begins with {text}")
    if len(found) > 1:
        more = ", and more" if len(found) > _MAX_NAMED else ""
        raise HarpException(f"several jobs begin with {text}: {', '.join(found[:_MAX_NAMED])}{more}")
    return found[0]
