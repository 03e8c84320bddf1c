"""Staging: many jobs of one request are stored all or none, without a transaction that others wait for.

Theory of operation. Inserting a job costs about 11 us, mostly for indexes; 10,000 in one transaction would delay the
writes of all others by 110 ms. So the jobs are first written as a few long rows, without indexes, in parts of about
`_PART_BYTES`. The transaction of the last part stores them all. Then each row is replaced by its jobs, in a short
transaction, between those of others. The first jobs may start before the last are inserted. A store that is opened
inserts the jobs that were staged when a dispatcher died, and deletes parts without the last one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
from msgspec.structs import asdict

from harp.protocol.ends import Failed
from harp.protocol.json_text import Raw, dumps
from harpcaller.model.jobs import NewJob
from harpcaller.store import RequestIDReused

STEP_JOBS = 100  #: Jobs of one row, and so of one transaction.

_PART_BYTES = 256 * 1024  #: Bytes of a part, without its last row.
_TEXTS = ("arguments", "queue", "info")  # the attributes that are `Raw`


def split(jobs: Sequence[NewJob]) -> list[Sequence[NewJob]]:
    """Return the jobs in steps of at most `STEP_JOBS`."""
    return [jobs[first : first + STEP_JOBS] for first in range(0, len(jobs), STEP_JOBS)]


def join_rows(rows: Sequence[bytes]) -> list[list[bytes]]:
    """Return the rows in parts, each for one transaction."""
    parts: list[list[bytes]] = [[]]
    size = 0
    for row in rows:
        if size >= _PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += len(row)
    return parts


def check_calls(jobs: Sequence[NewJob], calls: dict[tuple[str, str], tuple[str, bytes]]) -> None:
    """Add the request ids of jobs to `calls`: the first job with each, and the digest of its call.

    Raises `RequestIDReused` if one belongs to another call.
    """
    for job in jobs:
        request_id = job.request_id or ""
        first, digest = calls.setdefault((request_id, job.request_ids_of), (job.id, job.call_digest))
        if digest != job.call_digest:
            raise RequestIDReused(request_id, first)


def encode_jobs(jobs: Sequence[NewJob]) -> bytes:
    """Return jobs as JSON: an object for each, with its attributes by their names. So later versions may add some.

    The limit of queued jobs is omitted, because it is checked before.
    """
    if all(map(_is_plain, jobs)):
        with suppress(UnicodeEncodeError):  # msgspec has no form for lone surrogates
            return msgspec.json.encode(jobs, enc_hook=Raw.decode)  # the same text in a fifth of the time
    return json.dumps([_to_members(job) for job in jobs], separators=(",", ":")).encode()


def _is_plain(job: NewJob) -> bool:
    """Return whether msgspec writes each attribute of a job as `_to_members` does."""
    return not job.call_digest and job.secrets is None and job.end is None and job.max_queued is None


def decode_jobs(row: bytes) -> list[NewJob]:
    """Return the jobs that `encode_jobs` encoded."""
    return [_from_members(members) for members in json.loads(row)]


def _to_members(job: NewJob) -> dict[str, Any]:
    members = asdict(job) | {"call_digest": job.call_digest.hex()}
    members["secrets"] = None if job.secrets is None else job.secrets.hex()
    del members["max_queued"]
    for name in _TEXTS:
        members[name] = _to_text(members[name])
    if job.end is not None:
        data = None if job.end.data is None else dumps(job.end.data)
        members["end"] = job.end.type, job.end.message, _to_text(data)
    return members


def _from_members(members: dict[str, Any]) -> NewJob:
    texts = {name: _to_raw(members[name]) for name in _TEXTS}
    end = None
    if members["end"] is not None:
        type_, message, data = members["end"]
        end = Failed(type_, message, _to_raw(data))
    secrets = None if members["secrets"] is None else bytes.fromhex(members["secrets"])
    digest = bytes.fromhex(members["call_digest"])
    return NewJob(**members | texts | {"call_digest": digest, "secrets": secrets, "end": end})


def _to_text(raw: Raw | None) -> str | None:
    return None if raw is None else raw.decode()


def _to_raw(text: str | None) -> Raw | None:
    return None if text is None else Raw(text.encode())
