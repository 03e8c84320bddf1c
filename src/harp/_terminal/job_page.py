"""The command `show` of the program `harp`: one job on one page, from its state to its last records."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from harp._core.values import CALL_CANCELLED, CALL_NOT_FINISHED
from harp._terminal.lists import chosen_format, find_job
from harp._terminal.tables import OF_STATE, Line, Screen, Span, cut, format_duration, format_time, one_line
from harp.client import HarpCaller, RemoteCall
from harp.errors import HarpException, RemoteError, RemoteException
from harp.protocol.printing import escape_controls, print_escaped

_LABEL = 11  #: Characters.
_MAX_TEXT = 4000  #: Characters of a text of the job that are shown.


def show_job(caller: HarpCaller, options: Namespace, advise: Callable[[str], str | None]) -> None:
    """Print a job; `advise` returns what to do about a type of errors, or None."""
    screen = Screen()
    job_id, has_older = find_job(caller, options.words)
    if has_older:
        words = " ".join(options.words)
        print_escaped(f"harp: this is the newest job that matches; see harp jobs {words}", file=sys.stderr)
    job = caller.job(job_id)
    details = job.details()
    result = job.result(wait=False)
    records = job.stream(recent=options.recent, timed=True).all() if options.recent else []
    if chosen_format(options, screen) != "table":
        page = {**details, "arguments": job.args(), "info": job.info(), "end": _end_as_json(result)}
        recent = [{"packet": number, "time": at, "data": data} for number, at, data in records]
        screen.print_json([{**page, "recent_records": recent}])
        return
    screen.print(_page(job, details, result, advise))
    screen.print(_records(details, records, screen.width))


def _end_as_json(result: Any) -> Any:
    """Return the end of a job as its closing line has it; None: it has not ended."""
    match result:
        case RemoteException():
            return {"exception": {"type": result.type, "message": result.message, "data": result.data}}
        case RemoteError():
            return {"error": {"type": result.type, "message": result.message, "data": result.data}}
        case HarpException():
            raise result
    if result is CALL_NOT_FINISHED:
        return None
    return {"cancelled": True} if result is CALL_CANCELLED else {"result": result}


def _page(
    job: RemoteCall, details: Mapping[str, Any], result: Any, advise: Callable[[str], str | None]
) -> Iterator[Line]:
    now = time.time()
    times = _object(details, "time")
    submitted, started, ended = (_number(times.get(key)) for key in ("submit", "start", "end"))
    state = str(details.get("state", "unknown"))
    yield from _entry("job", job.id(), "title")
    yield from _entry("state", state, OF_STATE.get(state, ""))
    yield from _entry("why", str(details.get("why", "")))
    yield from _entry("call", f"{job.procedure()} on {job.host()}")
    yield from _entry("arguments", json.dumps(job.args()))
    if job.info() is not None:
        yield from _entry("info", json.dumps(job.info()))
    for key in ("queue", "owner"):
        if (value := details.get(key)) is not None:
            yield from _entry(key, value if isinstance(value, str) else json.dumps(value))
    yield from _entry("submitted", format_time(submitted, now, is_short=False))
    if started is not None:
        waited = "" if submitted is None else f", after {format_duration(started - submitted)} in the queue"
        yield from _entry("started", format_time(started, now, is_short=False) + waited)
    if ended is not None:
        took = "" if started is None else f", it took {format_duration(ended - started)}"
        yield from _entry("ended", format_time(ended, now, is_short=False) + took)
    yield from _end(result, advise)
    if (stop := details.get("stop")) is not None:
        by = f", requested by {who}" if (who := _requester(_object(details, "stop_request"))) else ""
        yield from _entry("stop", f"{stop}{by}", "" if stop == "confirmed" else "bad")
    yield from _exit(_object(details, "exit_info"), result)


def _requester(stop_request: Mapping[str, Any]) -> str | None:
    """Return who has stopped a job: the principal, as that of its owner, or what an older dispatcher knows."""
    principal, address = stop_request.get("principal"), stop_request.get("by")
    if isinstance(principal, str):
        return f"{principal} ({address})" if principal.startswith("anonymous@") else principal
    return None if address is None else str(address)


def _end(result: Any, advise: Callable[[str], str | None]) -> Iterator[Line]:
    match result:
        case RemoteException() | RemoteError():
            label = "exception" if isinstance(result, RemoteException) else "error"
            yield from _entry(label, str(result), "bad")
            if result.data is not None:
                yield from _entry("data", json.dumps(result.data))
            if isinstance(result, RemoteError) and (advice := advise(result.type)):
                yield from _entry("what to do", advice)
        case HarpException():
            raise result
        case _ if result is not CALL_NOT_FINISHED and result is not CALL_CANCELLED:
            yield from _entry("result", json.dumps(result), "good")


def _exit(info: Mapping[str, Any], result: Any) -> Iterator[Line]:
    how = [f"{name} {info[name]}" for name in ("exit", "signal") if info.get(name) is not None]
    # An exit status of 0 is news only if the job failed: beside an exception it would read as a success.
    is_usual = info.get("exit") == 0 and info.get("by", "itself") == "itself"
    if how and (isinstance(result, RemoteError) or not is_usual):
        by = f", ended by {info['by']}" if info.get("by") else ""
        yield from _entry("process", f"{how[0]}{by}")
    for key in ("stderr", "traceback"):
        value = info.get(key)
        text = "\n".join(map(str, value)) if isinstance(value, list) else value
        if isinstance(text, str) and text.strip():
            yield from _entry(key, text.rstrip("\n"))


def _records(
    details: Mapping[str, Any], records: Sequence[tuple[int, float, Any]], width: int | None
) -> Iterator[Line]:
    count = _number(_object(details, "records").get("count")) or 0
    if not records:
        if count:
            yield from _entry("records", f"{count:.0f}")
        return
    total = max(int(count), records[-1][0] + 1)
    shown = f"{total}" if len(records) == total else f"{total}, the last {len(records)}:"
    yield from _entry("records", shown)
    now = time.time()
    digits = len(str(records[-1][0]))
    for number, at, data in records:
        start = f"{number:>{digits + 2}}  {format_time(at, now)}  "
        text = one_line(data if isinstance(data, str) else json.dumps(data))
        yield [Span(start, "dim"), Span(cut(text, max(20, (width or _MAX_TEXT) - len(start))))]


def _entry(label: str, text: str, style: str = "") -> Iterator[Line]:
    """Yield the lines of an entry: the text of a job is harmless, and its own lines stay lines."""
    if len(text) > _MAX_TEXT:
        text = f"{text[:_MAX_TEXT]}... ({len(text)} characters)"
    for index, line in enumerate(escape_controls(text).replace("\t", "    ").split("\n")):
        yield [Span(f"{label if index == 0 else '':<{_LABEL}}", "dim"), Span(line, style)]


def _object(members: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = members.get(key)
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
