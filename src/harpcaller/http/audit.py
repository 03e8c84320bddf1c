"""The operation that reads the audit file, for administrators. Spec: docs/http-api.md, Audit."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import Annotated, Any

from msgspec import Meta, Struct, field
from starlette.responses import Response

from harp_daemon.audit_file import format_time, parse_time
from harp_daemon.audit_reading import Cursor
from harpcaller.cursors import InvalidCursor
from harpcaller.http.operations import Answer, APIRequest, Operation, json_response
from harpcaller.http.problems import Problem
from harpcaller.model.job_filters import parse_time as parse_query_time

_CURSOR = re.compile(r"(\d{1,20})-(\d{1,20})-([0-9a-f]{64})", re.ASCII)
_FIELDS = ("principal", "action", "decision", "host", "procedure", "job")

Glob = Annotated[str, Meta(max_length=255, description="only entries with this value; `*` and `?` are placeholders")]
TimeText = Annotated[str, Meta(max_length=64)]


class AuditQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of `list_audit`."""

    principal: Annotated[Glob, Meta(description="also the owner of the job, and who has ended it")] | None = None
    action: Glob | None = None
    decision: Glob | None = None
    host: Glob | None = None
    procedure: Glob | None = None
    job: Glob | None = None
    since: TimeText | None = field(default=None, name="from")
    until: TimeText | None = field(default=None, name="to")
    limit: Annotated[int, Meta(ge=1, le=500)] = 100
    cursor: Annotated[str, Meta(max_length=200)] | None = None


async def list_audit(request: APIRequest) -> Response:
    """Answer with entries of the audit file, the newest first."""
    query, now = request.query, time.time()
    globs = {name: glob for name in _FIELDS if (glob := getattr(query, name)) is not None}
    since = None if query.since is None else format_time(parse_query_time("from", query.since, now))
    until = None if query.until is None else format_time(parse_query_time("to", query.until, now))
    cursor = None if query.cursor is None else _decode_cursor(query.cursor)
    page = await request.acting.read_audit(globs, since, until, cursor, query.limit)
    if page is None:
        raise Problem("not_found", "there is no audit file; set audit_file")
    following = None if page.next is None else f"{page.next.first}-{page.next.offset}-{page.next.hash}"
    return json_response(
        {
            "entries": [_show(entry) for entry in page.entries],
            "next": following,
            "examined": page.examined,
            "searched_to": _to_seconds(page.searched_to),
            "omitted_files": page.omitted,
            "chain": {
                "ok": page.problem is None,
                "problem": page.problem,
                "entry": page.head.entry,
                "head": page.head.hash,
            },
        }
    )


def _show(entry: dict[str, Any]) -> dict[str, Any]:
    members = {key: value for key, value in entry.items() if key not in ("entry", "time", "previous")}
    return {"seq": entry["entry"], "at": _to_seconds(entry.get("time")), **members}


def _to_seconds(text: Any) -> float | None:
    with suppress(ValueError):
        return None if text is None else parse_time(str(text))
    return None


def _decode_cursor(text: str) -> Cursor:
    found = _CURSOR.fullmatch(text)
    if found is None:
        raise InvalidCursor("expected a cursor of this list")
    return Cursor(int(found[1]), int(found[2]), found[3])


_ENTRY = {
    "type": "object",
    "required": ["seq", "at", "action"],
    "properties": {
        "seq": {"type": "integer", "description": "the number of the entry"},
        "at": {"type": ["number", "null"]},
        "action": {"type": "string"},
    },
    "description": "also the other fields of the entry, see docs/audit.md",
}
_PAGE = {
    "type": "object",
    "required": ["entries", "next", "examined", "searched_to", "omitted_files", "chain"],
    "properties": {
        "entries": {"type": "array", "items": _ENTRY},
        "next": {"type": ["string", "null"]},
        "examined": {"type": "integer", "description": "number of lines that were looked at"},
        "searched_to": {"type": ["number", "null"], "description": "time of the last of these lines"},
        "omitted_files": {
            "type": "integer",
            "description": "number of compressed files with older entries; `harpcallerd audit search` reads them",
        },
        "chain": {
            "type": "object",
            "description": "whether these lines are as they were written; number and hash of the last entry",
        },
    },
}

OPERATIONS = (
    Operation(
        method="GET",
        path="/audit",
        operation_id="list_audit",
        summary="List entries of the audit file, the newest first",
        handler=list_audit,
        query=AuditQuery,
        action="admin",
        problems=("invalid_cursor", "not_found"),
        responses={200: Answer("entries, and what the hashes of the lines prove", _PAGE)},
    ),
)
