"""Conversion of jobs, ends, metadata and records to columns and back. Names and payloads are bytes in the file.

A name is a JSON string, so it may contain lone surrogates, which SQLite's text type cannot represent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from struct import Struct
from typing import Any

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned
from harp.protocol.json_text import Raw, dumps
from harp.protocol.schema import decode_as, encode_object
from harp_daemon.sliced_json import decode_slices
from harpcaller.model.jobs import PREVIEW_LENGTH, Job, State, StopState

# An entry of a chunk's timestamps: number of consecutive records with the same time, and the time.
_ENTRY = Struct("<Id")
ENTRY_BYTES = _ENTRY.size
#: Approximate bytes of a record's line in a reply without its value. They limit the number of tiny records in a batch.
PACKET_BYTES = 30


def encode_name(name: str) -> bytes:
    """Return the name of a host or procedure as it is stored."""
    return name.encode("utf-8", "surrogatepass")


def decode_name(name: bytes) -> str:
    """Return the name that `encode_name` encoded."""
    return name.decode("utf-8", "surrogatepass")


def encode_owner(owner: str | None) -> bytes | None:
    """Return the owner of a job as it is stored."""
    return None if owner is None else encode_name(owner)


def decode_owner(owner: bytes | None) -> str | None:
    """Return the owner that `encode_owner` encoded."""
    return None if owner is None else decode_name(owner)


def encode_end_body(end: End) -> bytes | None:
    """Return the bytes that are stored for an end in addition to its state, or None.

    A result is stored without its closing line: it may be long, and finding it in the line would require a scan.
    """
    if isinstance(end, Returned):
        return dumps(end.result)
    return None if isinstance(end, Cancelled) else encode_object(end)


def encode_end_preview(end: End) -> tuple[bytes | None, bytes | None]:
    """Return type and first characters of the message of an end, as they are stored."""
    if isinstance(end, Returned | Cancelled):
        return None, None
    return encode_name(end.type), encode_name(end.message[:PREVIEW_LENGTH])


def _decode_end(state: State, body: bytes | None) -> End | None:
    if state is State.CANCELLED:
        return Cancelled()
    if body is None:
        return None
    if state is State.RETURNED:
        return Returned(Raw(body))
    kind: type[Raised | Failed] = Raised if state is State.RAISED else Failed
    return decode_as(kind, decode_slices(body), None)


def decode_job(row: Sequence[Any]) -> Job:
    """Return the job in a row of the view job_view."""
    _, _, job_id, text, host, procedure, arguments, timeout, max_exec_time, queue, info, *state_columns = row
    submitted, started, ended, body, records, holds_slot, stop, start_within, tried, *call_columns = state_columns
    owner, max_running, *others = call_columns  # then `secrets`, `rerun_of` and `max_record_bytes`
    state = State(text)
    names = decode_name(host), decode_name(procedure)
    payloads = None if queue is None else Raw(queue), Raw(info)
    call = *names, Raw(arguments), timeout, max_exec_time, *payloads
    outcome = ended, _decode_end(state, body), records, bool(holds_slot), None if stop is None else StopState(stop)
    submitter = decode_owner(owner), max_running
    return Job(job_id, state, *call, submitted, started, *outcome, start_within, tried, *submitter, *others)


def join_records(records: Sequence[bytes]) -> bytes:
    """Return records as the bytes of a chunk. Raises `ValueError` if a record contains a line feed."""
    joined = b"\n".join(records)
    if joined.count(b"\n") != len(records) - 1:
        raise ValueError("a record contains a line feed")
    return joined


def split_records(chunk: bytes) -> list[bytes]:
    """Return the records that `join_records` joined."""
    return chunk.split(b"\n")


def join_timestamps(stored: bytes, timestamps: Sequence[float]) -> bytes:
    """Return the stored timestamps of a chunk, extended by those of further records."""
    entries = [(len(list(same)), time) for time, same in groupby(timestamps)]
    if stored and entries:
        count, time = _ENTRY.unpack_from(stored, len(stored) - ENTRY_BYTES)
        if time == entries[0][1]:
            stored = stored[:-ENTRY_BYTES]
            entries[0] = (count + entries[0][0], time)
    return stored + b"".join(_ENTRY.pack(count, time) for count, time in entries)


def split_timestamps(stored: bytes) -> list[float]:
    """Return the timestamps that `join_timestamps` joined."""
    times: list[float] = []
    for count, time in _ENTRY.iter_unpack(stored):
        times += [time] * count
    return times
