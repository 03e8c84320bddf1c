"""Jobs, ends, metadata and records as columns, and back. Names and payloads are bytes in the file.

A name is a string of JSON, so it may hold lone surrogates, which SQLite's own text can't.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from struct import Struct
from typing import Any, TypeAlias

from harp.protocol.ends import Cancelled, End, Returned, decode_end, encode_end
from harp.protocol.json_text import Raw, dumps, open_sliced
from harpcaller.model.jobs import Job, JobMetadata, State, StopState

__all__ = [
    "RUN_BYTES",
    "decode_job",
    "decode_metadata",
    "decode_name",
    "encode_end_body",
    "encode_metadata",
    "encode_name",
    "join_records",
    "join_timestamps",
    "payload_size",
    "split_records",
    "split_timestamps",
]

Row: TypeAlias = Sequence[Any]

# Records that were made at one time: how many, and the time.
_RUN = Struct("<Id")

#: How many bytes such a run takes.
RUN_BYTES = _RUN.size

_CLOSING_KEYS = {State.RAISED: "exception", State.FAILED: "error"}


def encode_name(name: str) -> bytes:
    """A host's or procedure's name as it is stored."""
    return name.encode("utf-8", "surrogatepass")


def decode_name(name: bytes) -> str:
    """The reverse of `encode_name`."""
    return name.decode("utf-8", "surrogatepass")


def encode_end_body(end: End) -> bytes | None:
    """What is stored of an end beside its state; None for nothing.

    A result is stored as it is, as it may be long: scanning it to find where it ends would cost.
    """
    match end:
        case Returned(result):
            return dumps(result)
        case Cancelled():
            return None
        case _:
            return dumps(encode_end(end))


def _decode_end(state: State, body: bytes | None) -> End | None:
    if state is State.CANCELLED:
        return Cancelled()
    if body is None:
        return None
    if state is State.RETURNED:
        return Returned(Raw(body))
    return decode_end(_CLOSING_KEYS[state], open_sliced(body))


def decode_job(row: Row) -> Job:
    """The job in a row of the view job_view."""
    (_, _, id_, state, host, procedure, arguments, timeout, max_exec_time, queue, info, *rest) = row
    submitted, started, ended, body, records, holds_slot, stop = rest
    return Job(
        id=id_,
        state=State(state),
        host=decode_name(host),
        procedure=decode_name(procedure),
        arguments=Raw(arguments),
        timeout=timeout,
        max_exec_time=max_exec_time,
        queue=None if queue is None else Raw(queue),
        info=Raw(info),
        submitted=submitted,
        started=started,
        ended=ended,
        end=_decode_end(State(state), body),
        records=records,
        holds_slot=bool(holds_slot),
        stop=None if stop is None else StopState(stop),
    )


def payload_size(row: Row) -> int:
    """How many bytes the payloads in a row of the view job_view have."""
    return sum(len(column) for column in row if isinstance(column, bytes))


def encode_metadata(metadata: JobMetadata) -> Mapping[str, bytes | None]:
    """The parameters of a statement that stores metadata."""
    return {
        "call": metadata.call,
        "stop_request": metadata.stop_request,
        "stop_report": metadata.stop_report,
        "exit_info": metadata.exit_info,
    }


def decode_metadata(row: Row) -> JobMetadata:
    """The metadata in a row of the table."""
    return JobMetadata(*(None if fact is None else Raw(fact) for fact in row))


def join_records(records: Sequence[Raw]) -> bytes:
    """Records as the bytes of a chunk. Raises `ValueError` when one holds a line feed: it is no `Raw`, then."""
    joined = b"\n".join(records)
    if joined.count(b"\n") != len(records) - 1:
        raise ValueError("a record holds a line feed")
    return joined


def split_records(chunk: bytes) -> list[Raw]:
    """The reverse of `join_records`."""
    return [Raw(record) for record in chunk.split(b"\n")]


def join_timestamps(begun: bytes, made: Sequence[float]) -> bytes:
    """The times of a chunk's first records, as stored, followed by those of more."""
    runs = [(len(list(same)), time) for time, same in groupby(made)]
    if begun and runs:
        count, time = _RUN.unpack_from(begun, len(begun) - RUN_BYTES)
        if time == runs[0][1]:
            begun = begun[:-RUN_BYTES]
            runs[0] = (count + runs[0][0], time)
    return begun + b"".join(_RUN.pack(count, time) for count, time in runs)


def split_timestamps(made: bytes) -> list[float]:
    """The reverse of `join_timestamps`."""
    times: list[float] = []
    for count, time in _RUN.iter_unpack(made):
        times += [time] * count
    return times
