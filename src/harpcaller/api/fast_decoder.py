"""The fast decoder of the usual requests: calls, many calls, and waiting for a result.

`harp.protocol.requests` alone defines what a request is. This decoder returns the same values in a fraction of the
time, or None for a line that it does not know or that is invalid; `decode_request` then gives that to the other one.
"""

from __future__ import annotations

import msgspec

from harp.protocol.fields import ProtocolError
from harp.protocol.json_text import InvalidJSON, Raw, decode_checked
from harp.protocol.requests import MAX_CALLS, VERSION, Call, GetResult, Queue, Request, SubmitMany
from harp.protocol.requests import decode_request as decode_any_request
from harp_daemon.sliced_json import decode_slices

_ABSENT = msgspec.Raw()

#: Numbers of up to so many digits are converted here.
_MAX_DIGITS = 9


class _Queue(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: msgspec.Raw
    concurrency: msgspec.Raw = _ABSENT


class _Call(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    host: str = ""
    procedure: str = ""
    arguments: msgspec.Raw = _ABSENT
    timeout: msgspec.Raw = _ABSENT
    max_exec_time: msgspec.Raw = _ABSENT
    queue: _Queue | None = None
    info: msgspec.Raw = _ABSENT


class _Request(_Call, forbid_unknown_fields=True, omit_defaults=True):
    harpcaller: int = 0
    submit_many: list[_Call] | None = None
    get_result: str = ""
    wait: bool | None = None
    keep_alive: bool = False


_decoder = msgspec.json.Decoder(_Request)


def decode_request(line: bytes) -> tuple[Request, bool]:
    """Return the request of a line, with payloads as `Raw`, and whether the client requests keep-alive.

    Raises:
        ProtocolError: the line is not a request.
    """
    return decode_usual_request(line) or decode_any_request(line, decode_slices)


def decode_usual_request(line: bytes) -> tuple[Request, bool] | None:
    """Return what `decode_request` returns, or None if the line is unusual or invalid."""
    try:
        decode_checked(line)
        members = _decoder.decode(line)
        # msgspec keeps the last of repeated members. It has read the line exactly if it writes as much, without spaces.
        written = msgspec.json.encode(members)
        if len(written) - written.count(b" ") != len(line) - line.count(b" ") or members.harpcaller != VERSION:
            return None
        request = _to_request(members)
    except (msgspec.MsgspecError, InvalidJSON, ProtocolError, ValueError, RecursionError):
        return None
    return None if request is None else (request, members.keep_alive)


def _to_request(members: _Request) -> Request | None:
    kinds = (members.procedure != "") + (members.submit_many is not None) + (members.get_result != "")
    if kinds != 1 or (members.wait is not None and not members.get_result):
        return None
    if members.procedure:
        return _to_call(members, {})
    if (
        members.host
        or members.queue
        or any((bytes(members.arguments), bytes(members.timeout), bytes(members.max_exec_time), bytes(members.info)))
    ):
        return None
    if members.get_result:
        return GetResult(members.get_result, members.wait is not False)
    calls = members.submit_many
    if calls is None or len(calls) > MAX_CALLS:
        return None
    queues: dict[bytes, Queue] = {}
    return SubmitMany([_to_call(call, queues) for call in calls])


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
        None if info in (b"", b"null") else Raw(info),
    )


def _to_int(text: bytes) -> int | None:
    """Return a number, or None if it is absent. Raises `ValueError` if it is not a positive integer of usual size."""
    if not text:
        return None
    if not text.isdigit() or len(text) > _MAX_DIGITS or text.startswith(b"0"):
        raise ValueError("another number")
    return int(text)
