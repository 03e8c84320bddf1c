"""The log of a daemon under test: JSON lines, and any other output on its stdout and stderr.

A daemon writes its events at the end of a turn of its loop, or in a thread: later than a reply of that turn. So a test
waits for events, and counts them when it has waited for one that is behind them in the log of the same process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from support.deadline import wait_until

#: Seconds within which a program has to do what takes a moment; never waited for in full when all is well.
DEADLINE = 60.0

#: Each event begins so.
_BEGIN = '{"time": "'


def decode_events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the events of a log. Behind a part of one, whose writer was killed, the next program's first one is found.

    Raises:
        ValueError: a line is no event.
    """
    for line in lines:
        if line.startswith("{") and line.endswith("}"):
            yield json.loads(line[max(0, line.rfind(_BEGIN)) :])


class DaemonLog:
    """The part of a daemon's harness that reads its log.

    Attributes:
        log_file: where stdout and stderr go.
    """

    log_file: Path

    def log_lines(self) -> list[str]:
        """All that it wrote to its log, stdout and stderr."""
        return self.log_file.read_text("utf-8", "replace").splitlines()

    def events(self, *names: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of its log that have one of these names (none: any) and these fields."""
        return [
            event
            for event in decode_events(self.log_lines())
            if (not names or event["event"] in names) and fields.items() <= event.items()
        ]

    def wait_event(self, name: str, **fields: Any) -> dict[str, Any]:
        """Wait until the log has the event; return the first match."""
        return self.wait_events(1, name, **fields)[0]

    def wait_events(self, count: int, *names: str, **fields: Any) -> list[dict[str, Any]]:
        """Wait until the log has so many events with one of these names and with these fields; return all."""

        def found() -> list[dict[str, Any]] | None:
            events = self.events(*names, **fields)
            return events if len(events) >= count else None

        return wait_until(found, DEADLINE, f"{count} events {names} {fields}") or []
