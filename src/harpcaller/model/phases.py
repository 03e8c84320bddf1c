"""The phases of a job: where its time went. Pure. Spec: docs/protocol.md, Details."""

from __future__ import annotations

from typing import Any

from harp.protocol.json_text import InvalidJSON, Raw, loads

_MAX_SECONDS = 2.0**40  #: Times and durations from a host are ignored from this value on, in seconds.


def measure_phases(
    submitted: float, started: float | None, ended: float | None, connect_seconds: float | None, exit_info: Raw | None
) -> dict[str, float | None]:
    """Return the duration of each phase in seconds; None: unknown, or not completed. Times are Unix seconds.

    The host measures its phases with its clock. `other` is the remaining time between the job's start and end, for
    transfers and the storage of the last records.
    """
    info = read_object(exit_info)
    began, finished, fork = (read_seconds(info, key) for key in ("started", "ended", "fork"))
    phases = {
        "wait": _between(submitted, started),
        "connect": connect_seconds,
        "authenticate": read_seconds(info, "authentication"),
        "fork": fork,
        "run": None if fork is None or began is None else _between(began + fork, finished),
    }
    measured = sum(seconds for name, seconds in phases.items() if name != "wait" and seconds is not None)
    total = _between(started, ended)
    phases["other"] = None if total is None or phases["run"] is None else _between(measured, total)
    return phases


def read_object(text: Raw | None) -> dict[str, Any]:
    """Return a JSON object; empty if there is none, or it cannot be decoded: data of hosts is stored unchecked."""
    try:
        value = None if text is None else loads(text)
    except InvalidJSON:  # for example a number that is too long
        value = None
    return value if isinstance(value, dict) else {}


def read_seconds(values: dict[str, Any], key: str) -> float | None:
    """Return a number of seconds from a host, or None if it is not plausible."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _MAX_SECONDS:
        return None
    return float(value)


def _between(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else round(max(0.0, after - before), 6)
