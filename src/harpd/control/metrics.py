"""The metrics of harpd as text for Prometheus: for ``harpd status --metrics`` and for the listener.

Each supervisor counts for itself, and has the label `supervisor`, its process id: during an upgrade there are several,
and a sum of their counters would decrease when one exits. Spec: docs/monitoring.md.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harp_daemon.expiry import Validity, read_validities
from harp_daemon.exposition import Family, gauge, labelled

#: Metrics with one value for each supervisor: name, kind, meaning, and key of the supervisor's reply.
_SINGLE = (
    ("harpd_start_time_seconds", "gauge", "Start of the supervisor, Unix time.", "started_at"),
    ("harpd_accepting", "gauge", "Whether the supervisor accepts new calls.", "accepting"),
    ("harpd_calls", "gauge", "Running calls.", "calls"),
    ("harpd_calls_limit", "gauge", "Limit of running calls, limits.max_calls.", "calls_limit"),
    ("harpd_resumable_calls", "gauge", "Resumable calls, also ended ones that were not fetched.", "resumable"),
    ("harpd_calls_started_total", "counter", "Calls that were started.", "started"),
    ("harpd_spool_bytes", "gauge", "Buffered data of all calls.", "spool_bytes"),
    ("harpd_spool_limit_bytes", "gauge", "Limit of this, limits.spool_memory.", "spool_limit_bytes"),
    ("harpd_procedures", "gauge", "Procedures of the procedures file.", "procedures"),
    ("harpd_supervisor_cpu_seconds_total", "counter", "CPU time of the supervisor itself.", "cpu_seconds"),
)
#: Metrics with another label: name, kind, meaning, label, and key.
_LABELLED = (
    ("harpd_calls_ended_total", "counter", "Calls that have ended.", "end", "ended"),
    ("harpd_calls_rejected_total", "counter", "Starts that were rejected.", "type", "rejected"),
    ("harpd_workers", "gauge", "Workers that wait for a call.", "state", "workers"),
)


def supervisor_families(supervisors: Sequence[Mapping[str, Any]]) -> list[Family]:
    """Return the metrics of supervisors, from their replies."""
    found = {str(each["pid"]): each for each in supervisors}
    versions = {(pid, str(each["version"]), platform.python_version()): 1 for pid, each in found.items()}
    families = [
        labelled("harpd_build_info", "gauge", "Versions.", ("supervisor", "version", "python"), versions),
        gauge("harpd_up", "Whether a supervisor runs.", int(bool(found))),
    ]
    for name, kind, help, key in _SINGLE:
        values = {(pid,): float(each[key]) for pid, each in found.items()}
        families.append(labelled(name, kind, help, ("supervisor",), values))
    for name, kind, help, label, key in _LABELLED:
        several = {(pid, kind): number for pid, each in found.items() for kind, number in each[key].items()}
        families.append(labelled(name, kind, help, ("supervisor", label), several))
    return families


def certificate_family(validities: Iterable[Validity]) -> Family:
    """Return when the certificate of harpd, or one of its chain, ends."""
    ends: dict[tuple[str, ...], float] = {}
    for validity in validities:
        key = (str(validity.file),)
        ends[key] = min(validity.ends.timestamp(), ends.get(key, float("inf")))
    help = "End of the certificate, Unix time."
    return labelled("harpd_certificate_expiry_timestamp_seconds", "gauge", help, ("file",), ends)


def read_certificate(file: Path) -> list[Validity]:
    """Return the validities of a certificate's file; none if it cannot be read. May block."""
    try:
        return read_validities(file)
    except OSError:
        return []
