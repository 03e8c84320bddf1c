"""Metrics of a daemon, and their text for Prometheus. It needs the standard library only.

A sample is one line. Lines are made by f-strings and not by a library, because a scrape with many hosts has thousands.
Those of histograms are made when the text is, perhaps in another thread.
Histograms are two list operations, so that each step of a job can be measured. They are not locked: one thread changes
a histogram, and another one may read it meanwhile.

Spec: https://prometheus.io/docs/instrumenting/exposition_formats/ and OpenMetrics 1.0.
"""

from __future__ import annotations

import gc
import os
import resource
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

#: The media types of the two formats.
TEXT, OPENMETRICS = (
    "text/plain; version=0.0.4; charset=utf-8",
    "application/openmetrics-text; version=1.0.0; charset=utf-8",
)
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class Family(NamedTuple):
    """A metric with its samples, each a line without line feed. A counter's name ends with ``_total``."""

    name: str
    kind: str  # counter, gauge or histogram
    help: str
    samples: Iterable[str]


class Histogram:
    """A distribution of values: how many are at most as large as each bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  #: By the first bound that is not exceeded; the last one: by none.
        self.sum: float = 0

    def observe(self, value: float) -> None:
        """Add a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """The number of values."""
        return sum(self.counts)

    def lines(self, name: str, labels: str = "") -> list[str]:
        """Return the samples of a metric; `labels` are those of `join_labels` without braces."""
        head = f'{name}_bucket{{{labels},le="' if labels else f'{name}_bucket{{le="'
        braces = f"{{{labels}}}" if labels else ""
        totals = [*accumulate(self.counts)]
        lines = [f"{head}{bound}{total}" for bound, total in zip(_bound_texts(self.bounds), totals, strict=True)]
        lines.append(f"{name}_count{braces} {totals[-1]}")
        lines.append(f"{name}_sum{braces} {float(self.sum)!r}")
        return lines


@cache
def _bound_texts(bounds: tuple[float, ...]) -> list[str]:
    return [*(f'{float(bound)}"}} ' for bound in bounds), '+Inf"} ']


def escape(value: str) -> str:
    """Return the value of a label as it is between quotes. Other text could end the line."""
    if "\\" in value or '"' in value or "\n" in value:
        value = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return value


def join_labels(**labels: str) -> str:
    """Return labels as they are between braces."""
    return ",".join(f'{name}="{escape(value)}"' for name, value in labels.items())


def gauge(name: str, help: str, value: float | None) -> Family:
    """Return a gauge without labels; without a value it has no sample."""
    return Family(name, "gauge", help, () if value is None else (f"{name} {value}",))


def counter(name: str, help: str, value: float) -> Family:
    """Return a counter without labels."""
    return Family(name, "counter", help, (f"{name} {value}",))


def labelled(name: str, kind: str, help: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Family:
    """Return a counter or gauge with the value for each combination of labels' values, a tuple."""
    samples = [
        f"{name}{{{join_labels(**dict(zip(labels, key, strict=True)))}}} {value}"
        for key, value in sorted(values.items())
    ]
    return Family(name, kind, help, samples)


def histogram(name: str, help: str, found: Histogram) -> Family:
    """Return a histogram without labels. Its lines are made when they are needed."""
    return Family(name, "histogram", help, (line for each in (found,) for line in each.lines(name)))


def histograms(name: str, help: str, label: str, found: Mapping[str, Histogram]) -> Family:
    """Return a histogram with one label. Its lines are made when they are needed."""
    lines = (line for key, one in sorted(found.items()) for line in one.lines(name, f'{label}="{escape(key)}"'))
    return Family(name, "histogram", help, lines)


def render(families: Iterable[Family], openmetrics: bool = False) -> bytes:
    """Return the text of metrics, in one of the two formats."""
    lines: list[str] = []
    for name, kind, help, samples in families:
        about = name.removesuffix("_total") if openmetrics and kind == "counter" else name
        lines.append(f"# HELP {about} {help}")
        lines.append(f"# TYPE {about} {kind}")
        lines += samples
    if openmetrics:
        lines.append("# EOF")
    lines.append("")
    return "\n".join(lines).encode("utf-8", "replace")


def accepts_openmetrics(accept: str) -> bool:
    """Return whether a scraper asks for OpenMetrics, by its header ``Accept``."""
    return "application/openmetrics-text" in accept


def read_process() -> list[Family]:
    """Return the metrics of this process and its garbage collector, with the usual names. May take milliseconds."""
    families = []
    with suppress(OSError, ValueError, IndexError):
        # The name of the program, in parentheses, may have any character. Bytes, because a process without rights may
        # be unable to load a codec.
        fields = Path("/proc/self/stat").read_bytes().rpartition(b") ")[2].split()
        virtual, resident = int(fields[20]), int(fields[21]) * _PAGE
        usage = resource.getrusage(resource.RUSAGE_SELF)
        started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[19]) / _TICKS
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        families = [
            counter("process_cpu_seconds_total", "CPU time.", round(usage.ru_utime + usage.ru_stime, 6)),
            gauge("process_virtual_memory_bytes", "Virtual memory.", virtual),
            gauge("process_resident_memory_bytes", "Resident memory.", resident),
            gauge("process_start_time_seconds", "Start of the process, Unix time.", round(started, 2)),
            gauge("process_open_fds", "Open descriptors.", len(os.listdir("/proc/self/fd"))),
            gauge("process_max_fds", "Limit of open descriptors.", soft),
        ]
    return [*families, *_read_collector()]


def _read_collector() -> list[Family]:
    stats = {(str(generation),): stat for generation, stat in enumerate(gc.get_stats())}
    of_key: Callable[[str], dict[tuple[str, ...], float]] = lambda key: {  # noqa: E731
        generation: stat[key] for generation, stat in stats.items()
    }
    counts = (
        ("python_gc_collections_total", "collections", "Runs of the garbage collector."),
        ("python_gc_objects_collected_total", "collected", "Objects that the garbage collector has freed."),
        ("python_gc_objects_uncollectable_total", "uncollectable", "Objects that the collector could not free."),
    )
    return [labelled(name, "counter", help, ("generation",), of_key(key)) for name, key, help in counts]
