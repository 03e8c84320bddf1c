"""The keys of lanes, which decide the order in which queued jobs get their slot. Pure: no clock, no input or output.

Each queued job is in one lane: the lane of its queue or, if it has no queue, the lane of its host. Only the head of a
lane may start; between heads, the order of submission decides. A search for jobs to start therefore reads only heads.

Jobs without a queue that have a limit for their owner are in a lane of their host and owner. So an owner who has
reached its limit delays nobody else. A queue has one lane for all owners, because its jobs start first in, first out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from typing import Any

from harp.protocol.json_text import Raw, decode_checked, decode_text, reject_constant

_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)


class _Number(str):
    """The canonical text of a number, or another text that is written as it is."""


def _canonical_number(text: str) -> _Number:
    try:
        number = Decimal(text, _EXACT)
        return _Number("0" if number.is_zero() else str(number.normalize(_EXACT)))
    except ArithmeticError:  # the exponent is too large for a decimal: such numbers are compared as text
        return _Number(text)


_scan_value: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(
    parse_constant=reject_constant, parse_int=_canonical_number, parse_float=_canonical_number
).scan_once  # type: ignore[attr-defined]


def canonical(text: bytes) -> str:
    """Return the same text for JSON texts with equal values: ``1`` equals ``1.0``, but not ``true``."""
    return _write_canonical(decode_text(decode_checked(text), _scan_value))


def _write_canonical(value: Any) -> str:
    pieces: list[str] = []
    rest = [value]  # what is written next is the last one; without recursion, for names that are nested deeply
    while rest:
        value = rest.pop()
        if isinstance(value, _Number):
            pieces.append(value)
        elif isinstance(value, dict):
            members = [[_Number(json.dumps(key) + ":"), value[key]] for key in sorted(value)]
            rest += _enclose("{", members, "}")
        elif isinstance(value, list):
            rest += _enclose("[", [[item] for item in value], "]")
        else:
            pieces.append(json.dumps(value))
    return "".join(pieces)


def _enclose(start: str, parts: list[list[Any]], end: str) -> list[Any]:
    """Return parts with commas between them, and their enclosing characters, the last one first."""
    written = [_Number(start)]
    for index, part in enumerate(parts):
        written += [_Number(","), *part] if index else part
    return [_Number(end), *reversed(written)]


def queue_lane(name: Raw) -> str:
    """Return the key of the lane of a queue with this name, a JSON object. Spec: docs/protocol.md, Call."""
    return "queue:" + _digest(canonical(name))


def queue_id(lane: str) -> str:
    """Return the id of the queue with this lane, for clients."""
    return lane.removeprefix("queue:")


def host_lane(host: str) -> str:
    """Return the key of the lane for the jobs of this host that have no queue."""
    return "host:" + _digest(host)


def owner_lane(host: str, owner: str) -> str:
    """Return the key of the lane for the jobs of this host and owner that have no queue, and a limit for the owner."""
    return f"{host_lane(host)}/{_digest(owner)}"


def lane_of_host(lane: str) -> str | None:
    """Return the lane of the host of an owner's lane; None if the lane is of another kind."""
    host, separator, _ = lane.partition("/")
    return host if separator else None


def _digest(text: str) -> str:
    # 128 bits: two queues never share a key, and a name of any length has a short key
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
