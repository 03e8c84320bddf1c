"""The log of a daemon under test: JSON lines, and any other output on its stdout and stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.deadline import wait_until

#: Seconds within which a program has to do what takes a moment; never waited for in full when all is well.
DEADLINE = 60.0


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
        found = []
        for line in self.log_lines():
            if line.startswith("{") and line.endswith("}"):
                event = json.loads(line)
                if (not names or event["event"] in names) and fields.items() <= event.items():
                    found.append(event)
        return found

    def wait_event(self, name: str, **fields: Any) -> dict[str, Any]:
        """Wait until the log has the event; return the first match."""
        return wait_until(lambda: self.events(name, **fields), DEADLINE, f"the event {name!r} {fields}")[0]
