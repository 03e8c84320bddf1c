"""The phases of a job: where its time went. Pure. Spec: docs/protocol.md, Details."""

from __future__ import annotations

from typing import Any

from msgspec import DecodeError, Struct
from msgspec.json import Decoder

from harp.protocol.json_text import InvalidJSON, Raw, loads

_MAX_SECONDS = 2.0**40  #: Times and durations from a host are ignored from this value on, in seconds.


def measure_phases(
    submitted: float, started: float | None, ended: float | None, connect_seconds: float | None, exit_info: Raw | None
) -> dict[str, float | None]:
    """Return the duration of each phase in seconds; None: unknown, or not completed. Times are Unix seconds.

    The host measures its phases with its clock. `other` is the remaining time between the job's start and end, for
    transfers and the storage of the last records.
    """
    began, finished, fork, authentication = _read_times(exit_info)
    phases = {
        "wait": _between(submitted, started),
        "connect": connect_seconds,
        "authenticate": authentication,
        "fork": fork,
        "run": None if fork is None or began is None else _between(began + fork, finished),
    }
    measured = sum(seconds for name, seconds in phases.items() if name != "wait" and seconds is not None)
    total = _between(started, ended)
    phases["other"] = None if total is None or phases["run"] is None else _between(measured, total)
    return phases


def narrow_clock_skew(skew: float | None, started: float | None, ended: float, exit_info: Raw | None) -> float | None:
    """Return the clock skew of a host that fits one of its calls and is nearest to `skew`; None: unknown.

    The clock skew is by how many seconds the host's clock is ahead. The process of a call began after its job got the
    slot, at `started`, and its end was received before `ended`: so the skew is between two values. They are far apart
    if the start of the process or the end took long to arrive, not if the call ran long.
    """
    began, finished, _, _ = _read_times(exit_info)
    if started is None or began is None or finished is None:
        return skew
    least, most = finished - ended, began - started
    if least > most:  # one of the clocks was set during the call
        return skew
    return min(max(skew or 0.0, least), most)


class _Times(Struct):
    """The times in exit info, as they are."""

    started: Any = None
    ended: Any = None
    fork: Any = None
    authentication: Any = None


_decode_times = Decoder(_Times).decode  # ten times as fast as a decoder of all members; each job with metrics needs it


def _read_times(exit_info: Raw | None) -> tuple[float | None, float | None, float | None, float | None]:
    if exit_info is None:
        return None, None, None, None
    try:
        times = _decode_times(exit_info)
    except (DecodeError, RecursionError):  # for example a number that is too long, or half a character
        found = read_object(exit_info)
        times = _Times(*map(found.get, _Times.__struct_fields__))
    return _plausible(times.started), _plausible(times.ended), _plausible(times.fork), _plausible(times.authentication)


def read_object(text: Raw | None) -> dict[str, Any]:
    """Return a JSON object; empty if it is missing or cannot be decoded: data of hosts is stored unchecked."""
    try:
        value = None if text is None else loads(text)
    except InvalidJSON:  # for example a number that is too long
        value = None
    return value if isinstance(value, dict) else {}


def read_seconds(values: dict[str, Any], key: str) -> float | None:
    """Return a number of seconds from a host, or None if it is not plausible."""
    return _plausible(values.get(key))


def _plausible(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _MAX_SECONDS:
        return None
    return float(value)


def _between(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else round(max(0.0, after - before), 6)
