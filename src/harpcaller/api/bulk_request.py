"""The fast decoder of a request that submits many jobs, beside that of `harp.protocol.requests`."""

from __future__ import annotations

import msgspec

from harp.protocol.fields import ProtocolError
from harp.protocol.json_text import InvalidJSON, Raw, decode_checked
from harp.protocol.requests import MAX_CALLS, VERSION, Call, Queue, Request, SubmitMany

_ABSENT = msgspec.Raw()

#: Numbers of up to so many digits are converted here.
_MAX_DIGITS = 9


class _Queue(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: msgspec.Raw
    concurrency: msgspec.Raw = _ABSENT


class _Call(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    host: str
    procedure: str
    arguments: msgspec.Raw
    timeout: msgspec.Raw = _ABSENT
    max_exec_time: msgspec.Raw = _ABSENT
    queue: _Queue | None = None
    info: msgspec.Raw = _ABSENT


class _Request(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    harpcaller: int
    submit_many: list[_Call]
    keep_alive: bool = False


_decoder = msgspec.json.Decoder(_Request)


def decode_bulk_request(line: bytes) -> tuple[Request, bool] | None:
    """Return the request of a line, and whether the client requests keep-alive.

    Returns:
        None if it is another request, or unusual or invalid: then decode it with `harp.protocol.requests`.
    """
    try:
        decode_checked(line)
        request = _decoder.decode(line)
        # msgspec keeps the last of repeated members. It has read the line exactly if it writes as much, without spaces.
        written = msgspec.json.encode(request)
        if len(written) - written.count(b" ") != len(line) - line.count(b" "):
            return None
        if request.harpcaller != VERSION or len(request.submit_many) > MAX_CALLS:
            return None
        queues: dict[bytes, Queue] = {}
        return SubmitMany([_to_call(call, queues) for call in request.submit_many]), request.keep_alive
    except (msgspec.MsgspecError, InvalidJSON, ProtocolError, ValueError, RecursionError):
        return None


def _to_call(call: _Call, queues: dict[bytes, Queue]) -> Call:
    """Return a call; `queues` are those of the earlier calls by their text."""
    queue = None
    if call.queue is not None:
        name, concurrency = bytes(call.queue.name), bytes(call.queue.concurrency)
        key = b"%b %b" % (concurrency, name)
        queue = queues.get(key)
        if queue is None:
            queue = queues[key] = Queue(Raw(name), _to_int(concurrency) or 1)
    info = bytes(call.info)
    return Call(
        call.host,
        call.procedure,
        Raw(call.arguments),
        _to_int(bytes(call.timeout)),
        _to_int(bytes(call.max_exec_time)),
        queue,
        Raw(info) if info else None,
    )


def _to_int(text: bytes) -> int | None:
    """Return a number, or None if it is absent. Raises `ValueError` if it is not a positive integer of usual size."""
    if not text:
        return None
    if not text.isdigit() or len(text) > _MAX_DIGITS or text.startswith(b"0"):
        raise ValueError("another number")
    return int(text)
