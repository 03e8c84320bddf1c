"""What the supervisor records in the audit file: calls and their ends, commands, and failed logins.

The frontend reads what strangers send, so it does not write the file. It reports failed logins in messages of bounded
size, see `harpd.frontend.login_reports`; their entries say so. Spec: docs/audit.md.

The entries of calls are written together, when their turn of the loop ends: each write costs as much as all else about
an entry. `CallAudit.write` is called before data is sent to a frontend or a worker, which is why nothing that was sent
lacks its entry if this process is killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import time
from typing import Any

from harp.protocol.ends import Failed
from harp.protocol.json_text import Raw
from harp.protocol.schema import ProtocolError, check, check_string
from harp_daemon.audit import DirectAuditLog
from harpd.supervisor.event_loop import EventLoop

#: The fields about the client of a dispatcher, and their keys in the header.
_OF_CALLER = [(f"caller_{key}", key) for key in ("principal", "job", "address")]
MAX_REPORTS = 100  #: Maximum number of failed logins in a message of the frontend.


class CallAudit:
    """The entries of a supervisor; none without the setting ``audit_file``. Raises `AuditError`."""

    def __init__(self, loop: EventLoop, settings: Mapping[str, Any]) -> None:
        file = settings.get("audit_file")
        self._log: DirectAuditLog | None = None
        if file is not None:
            self._log = DirectAuditLog(Path(file), settings["audit_file_bytes"], loop.call_soon, loop.call_later)

    def check_room(self) -> Failed | None:
        """Return why no call can start: its entries could not be written."""
        if self._log is None:
            return None
        self._log.check_room()
        if self._log.problem is None:
            return None
        return Failed("system_error", f"the audit file of this host cannot be written: {self._log.problem}")

    def record_start(
        self, call_id: str, procedure: str, header: Mapping[str, Any], arguments: Raw, rejection: Failed | None
    ) -> None:
        """Record a call before its procedure begins, or one that is rejected; `header` is that of the frontend."""
        if self._log is None:
            return
        user, peer = str(header.get("user", "")), str(header.get("peer", ""))
        entry: dict[str, Any] = {
            "time": time(),
            "action": "call",
            "decision": "allowed",
            "job": call_id,
            "principal": f"user:{user}",
            "peer": peer,
            "procedure": procedure,
            "arguments": arguments,
        }
        if (caller := header.get("caller")) is not None:
            for field, key in _OF_CALLER:
                entry[field] = str(caller.get(key))
        if rejection is None:
            self._log.record(entry)
        else:
            entry["decision"] = "denied" if rejection.type == "access_denied" else "failed"
            entry |= {"error": rejection.type, "reason": rejection.message}
            self._log.record(entry, repeats=(user, peer.rpartition(":")[0]))

    def record_end(self, fields: Mapping[str, Any], end: str, by: str | None, user: str | None) -> None:
        """Record the end of a call. `by`: why it was stopped; `user`: by whom."""
        if self._log is not None:
            names = {"job": fields["call"], "procedure": fields["procedure"]}
            entry = {"time": time(), "action": "end", **names, "end": end, "by": user or by, "why": by}
            self._log.record(entry)

    def write(self) -> None:
        """Write the recorded entries: data is about to be sent that tells of them."""
        if self._log is not None:
            self._log.write()

    def record_command(self, action: str, **fields: Any) -> None:
        """Write a command of an administrator, or an event of the supervisor."""
        if self._log is not None:
            self._log.record({"time": time(), "action": action, **fields})
            self._log.write()

    def record_reports(self, reports: object) -> None:
        """Write failed logins of a message of the frontend. Raises `ProtocolError`."""
        check(isinstance(reports, list) and len(reports) <= MAX_REPORTS, "report: expected a short array")
        assert isinstance(reports, list)
        for report in reports:
            if not isinstance(report, dict):
                raise ProtocolError("report: expected objects")
            user, peer, reason = (check_string(key, report.get(key)) for key in ("user", "peer", "reason"))
            count = report.get("count")
            check(type(count) is int, "count: expected an integer")
            if self._log is not None:
                entry = {"time": time(), "action": "authenticate", "decision": "denied", "principal": f"user:{user}"}
                entry |= {"peer": peer, "reason": reason, "reporter": "frontend"}
                entry["count"] = count if count != 1 else None
                self._log.record(entry, repeats=peer)
        self.write()

    def reopen(self) -> None:
        """Continue in another file if the file was renamed."""
        if self._log is not None:
            self._log.reopen()

    def close(self) -> None:
        """Write all entries, and close the file."""
        if self._log is not None:
            self._log.close()
