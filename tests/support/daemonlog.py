"""The log of a daemon under test: JSON lines, and any other output on its stdout and stderr."""

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
        return wait_until(lambda: self.events(name, **fields), DEADLINE, f"the event {name!r} {fields}")[0]
