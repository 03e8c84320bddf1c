"""The registry of a supervisor's resumable calls: their owners, attachment, and ids that can no longer start.

A dispatcher proves that a call is its own by its owner id and the call's secret; only a digest of the secret is stored.
Other dispatchers' calls look as if they were absent. The reply that a call is absent is a promise: its id gets a
tombstone, so that a delayed start of it is rejected. Ids that were used get one, too. A tombstone stays longer than a
start may be delayed: a start whose connection is older is rejected.

Spec: docs/protocol.md, Resumable calls.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

from harp.protocol.ends import Failed
from harp.protocol.fields import check, is_count, is_seconds, member_value, required_string
from harp.protocol.harpd import CallList, encode_message
from harp.protocol.json_text import JSONObject, dumps
from harpd.supervisor.event_loop import EventLoop
from harpd.supervisor.resumable_session import Ownership, ResumableSession, SessionLimits
from harpd.supervisor.spool import SpoolQuota
from harpd.supervisor.state_files import CallState, StateDir
from harpd.supervisor.tombstones import TombstoneSet

log = logging.getLogger("harpd.supervisor")

#: Seconds by which a start may be delayed, and for which a tombstone stays at least.
_MAX_START_AGE, _TOMBSTONE_TTL = 120.0, 150.0
#: How many sessions there may be for each call that may run, before new ones are rejected.
_SESSIONS_PER_CALL = 20

_SUPERVISOR_DIED = Failed("call_died", "the supervisor of the call died")


class CallRegistry:
    """All resumable calls of one supervisor.

    Args:
        loop: the event loop.
        instance: this supervisor's instance id.
        settings: the supervisor's settings, see `harpd.supervisor.main`.
        state_dir: the state files of running calls.
        quota: the memory of all calls.
        clean_up_orphans: looks for dead supervisors, and has their calls adopted here.
        on_discarded: called when a session was discarded.
    """

    def __init__(
        self,
        loop: EventLoop,
        instance: str,
        settings: Mapping[str, Any],
        state_dir: StateDir,
        quota: SpoolQuota,
        clean_up_orphans: Callable[[], object],
        on_discarded: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._instance = instance
        self._settings = settings
        self._state_dir = state_dir
        self._notify_discarded = on_discarded
        self._sessions: dict[str, ResumableSession] = {}
        self._tombstones = TombstoneSet(_TOMBSTONE_TTL, loop.now())
        self._quota = quota
        self._clean_up_orphans = clean_up_orphans

    def update_settings(self, settings: Mapping[str, Any]) -> None:
        """Use these settings for new calls."""
        self._settings = settings

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def attached(self) -> bool:
        """Whether a dispatcher is attached to a call."""
        return any(session.attached for session in self._sessions.values())

    def create_session(self, call_id: str, requested: JSONObject, streaming: bool) -> ResumableSession | Failed:
        """Create the session of a new call, with no connection attached; or return why the call is rejected."""
        if required_string(requested, "instance") != self._instance:
            return self.wrong_instance()
        received_at = float(member_value(requested, "received"))
        limits = self._limits(requested)
        if self._loop.now() - received_at > min(_MAX_START_AGE, limits.disconnect_timeout):
            return Failed("call_refused", "the start was delayed for too long; the call did not start")
        if self._quota.exhausted or len(self._sessions) >= _SESSIONS_PER_CALL * self._settings["max_calls"]:
            return Failed("too_many_calls", "this host stores too many ends that were not fetched")
        owner = required_string(requested, "owner")
        if call_id in self._sessions or self._tombstones.contains(owner, call_id):
            return Failed("call_refused", "a call with this id was started or given up before")
        ownership = Ownership(owner, _digest(required_string(requested, "secret")))
        return self._add_session(call_id, ownership, limits, streaming, received_at)

    def _limits(self, requested: JSONObject) -> SessionLimits:
        configured = self._settings
        return SessionLimits(
            disconnect_timeout=min(_seconds(requested, "disconnect_timeout"), configured["disconnect_timeout"]),
            result_ttl=min(_seconds(requested, "result_ttl"), configured["result_ttl"]),
            timeout=_seconds(requested, "timeout"),
            max_exec_time=_seconds(requested, "max_exec_time"),
        )

    def wrong_instance(self) -> Failed:
        """Return the error of a start that names another instance, or is sent to a retired one."""
        message = "the start was meant for another instance of the supervisor; the call did not start"
        return Failed("wrong_instance", message, self._instance_data())

    def adopt_orphans(self, calls: Mapping[str, CallState], stop_reports: Mapping[str, Mapping[str, Any]]) -> None:
        """Adopt the resumable calls of dead supervisors, as calls that have died with them.

        Args:
            calls: their states, by id.
            stop_reports: of calls of which a process survives, and of earlier ones of which none does any more.
        """
        for call_id in stop_reports.keys() & self._sessions.keys() - calls.keys():
            self._sessions[call_id].on_closed(dumps(stop_reports[call_id]))
        for call_id, state in calls.items():
            try:
                stored = state.session["resumable"]
                ownership = Ownership(str(stored["owner"]), str(stored["secret"]))
                limits = SessionLimits(
                    *(float(stored[key]) for key in ("disconnect_timeout", "result_ttl", "timeout", "max_exec_time"))
                )
                streaming = bool(stored["streaming"])
            except (KeyError, TypeError, ValueError):
                continue  # a connection-bound call: no dispatcher attaches to it
            session = self._add_session(call_id, ownership, limits, streaming, self._loop.now())
            stop_report = dumps(stop_reports[call_id]) if call_id in stop_reports else None
            session.adopt(_SUPERVISOR_DIED, dumps({"by": "unknown", "supervisor": "died"}), stop_report)
            self._write_state(call_id, state)

    def _write_state(self, call_id: str, state: CallState) -> None:
        """Write the state file of an adopted call, so that a later supervisor can report its end."""
        try:
            self._state_dir.write(call_id, state)
        except OSError as error:
            log.error("cannot write state file", extra={"call": call_id, "reason": str(error)})
        self._state_dir.mark_ended(call_id)

    def _add_session(
        self, call_id: str, ownership: Ownership, limits: SessionLimits, streaming: bool, contact_at: float
    ) -> ResumableSession:
        settings = self._settings
        session = self._sessions[call_id] = ResumableSession(
            self._loop,
            call_id,
            ownership,
            limits,
            streaming,
            contact_at,
            settings["kill_grace"],
            self._instance,
            settings["spool"],
            self._quota,
            self._on_discarded,
        )
        return session

    @staticmethod
    def stored_session(session: ResumableSession, streaming: bool) -> dict[str, Any]:
        """Return the members of a state file from which a later supervisor can adopt the call."""
        limits = session.limits
        return {
            "resumable": {
                "owner": session.ownership.owner,
                "secret": session.ownership.secret,
                "disconnect_timeout": limits.disconnect_timeout,
                "result_ttl": limits.result_ttl,
                "timeout": limits.timeout,
                "max_exec_time": limits.max_exec_time,
                "streaming": streaming,
            }
        }

    def attach(self, connection: socket.socket, request: JSONObject, received: bytes) -> Failed | None:
        """Attach a connection to a call, or return why not. `received`: data that was received after the request."""
        call_id, owner = required_string(request, "attach"), required_string(request, "owner")
        since = member_value(request, "since")
        check(is_count(since), "since: expected a count")
        if call_id not in self._sessions:
            self._clean_up_orphans()  # its supervisor may have died just now
        session = self._sessions.get(call_id)
        ownership = Ownership(owner, _digest(required_string(request, "secret")))
        if session is None or not _is_same(session.ownership, ownership):
            self._tombstones.add(owner, call_id, self._loop.now())
            return Failed("no_such_call", "there is no such call here, and it will not start", self._instance_data())
        if not session.has_records_from(since):
            first, end = session.available_range
            data = {"first": first, "end": end}
            return Failed("records_gone", "some of the call's records from this number on are gone", data)
        log.info("dispatcher attached to call", extra={"call": call_id, "since": since})
        keep_alive = member_value(request, "keep_alive") if "keep_alive" in request else None
        session.attach(connection, since, received, keep_alive)
        return None

    def list_calls(self, owner: str) -> bytes:
        """Return the line that lists an owner's calls."""
        self._clean_up_orphans()
        calls = tuple(
            call_id
            for call_id, session in self._sessions.items()
            if hmac.compare_digest(_encode(session.ownership.owner), _encode(owner))
        )
        return encode_message(CallList(calls, self._instance))

    def _on_discarded(self, session: ResumableSession) -> None:
        del self._sessions[session.id]
        self._state_dir.mark_reported(session.id)
        self._tombstones.add(session.ownership.owner, session.id, self._loop.now())
        self._notify_discarded()

    def _instance_data(self) -> dict[str, str]:
        return {"instance": self._instance}


def _seconds(members: JSONObject, key: str) -> float:
    seconds = member_value(members, key)
    check(is_seconds(seconds), f"{key}: expected a positive number of seconds")
    return float(seconds)


def _digest(secret: str) -> str:
    return hashlib.sha256(_encode(secret)).hexdigest()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _is_same(one: Ownership, other: Ownership) -> bool:
    same_owner = hmac.compare_digest(_encode(one.owner), _encode(other.owner))
    return same_owner and hmac.compare_digest(one.secret, other.secret)
