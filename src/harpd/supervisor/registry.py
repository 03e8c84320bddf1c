"""The kept calls of a warden: whose they are, who may attach, and which ids can never start here.

A dispatcher proves a call to be its own by its owner id and by the call's secret; of the secret only a digest is
kept. What is not its own looks to it as if it were not there. The answer "not here" is a promise: the id is barred from
then on, so that a start of it that is still on its way finds the door closed. Ids that were used are barred as well.
They are barred for longer than a start may be on its way: one whose connection is older is refused.

Spec: docs/protocol.md, Kept calls.
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

__all__ = ["CallRegistry"]

log = logging.getLogger("harpd.supervisor")

#: Seconds that a start may have been on its way, and for which an id is barred at least.
_OLDEST_START, _BARRED = 120.0, 150.0
#: How many ended calls are held for each that may run, before no new one is kept.
_HELD_SHARE = 20

_WARDEN_DIED = Failed("call_died", "the warden of the calls died")


class CallRegistry:
    """All kept calls of one warden.

    Args:
        loop: the event loop.
        warden: this warden's incarnation.
        settings: the warden's settings, see `harpd.supervisor.main`.
        records: where calls are recorded.
        memory: what all calls hold together.
        sweep: looks for wardens that have died, and has their calls buried here.
        on_forgotten: called when a call is not kept any more.
    """

    def __init__(
        self,
        loop: EventLoop,
        warden: str,
        settings: Mapping[str, Any],
        records: StateDir,
        memory: SpoolQuota,
        sweep: Callable[[], object],
        on_forgotten: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._warden = warden
        self._records = records
        self._call_forgotten = on_forgotten
        self._calls: dict[str, ResumableSession] = {}
        self._barred = TombstoneSet(_BARRED, loop.now())
        self._memory = memory
        self._sweep = sweep
        self.update_settings(settings)

    def update_settings(self, settings: Mapping[str, Any]) -> None:
        """Take these settings for the calls to come."""
        self._settings = settings

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def attached(self) -> bool:
        """Whether somebody is attached to an ended call and may yet say that it has stored the end."""
        return any(call.attached for call in self._calls.values())

    def create_session(self, call_id: str, asked: JSONObject, streaming: bool) -> ResumableSession | Failed:
        """Keep a new call, or say why not. It has nobody attached yet."""
        if required_string(asked, "instance") != self._warden:
            return self.wrong_instance()
        begun = float(member_value(asked, "received"))
        terms = self._terms(asked)
        if self._loop.now() - begun > min(_OLDEST_START, terms.disconnect_timeout):
            return Failed("call_refused", "the start was too long on its way; it did not happen")
        if self._memory.exhausted or len(self._calls) >= _HELD_SHARE * self._settings["max_calls"]:
            return Failed("too_many_calls", "the calls whose ends nobody has fetched hold as much as they may")
        owner = required_string(asked, "owner")
        if call_id in self._calls or self._barred.contains(owner, call_id):
            return Failed("call_refused", "a call of this id was started, or given up, before")
        return self._keep(call_id, Ownership(owner, _digest(required_string(asked, "secret"))), terms, streaming, begun)

    def _terms(self, asked: JSONObject) -> SessionLimits:
        return SessionLimits(
            disconnect_timeout=min(_seconds(asked, "disconnect_timeout"), self._settings["disconnect_timeout"]),
            result_ttl=min(_seconds(asked, "result_ttl"), self._settings["result_ttl"]),
            timeout=_seconds(asked, "timeout"),
            max_exec_time=_seconds(asked, "max_exec_time"),
        )

    def wrong_instance(self) -> Failed:
        """The answer to a start that names another warden, or one that comes to a warden that starts no more."""
        return Failed("wrong_instance", "the start was meant for another warden; it did not happen", self._data())

    def adopt_orphans(self, calls: Mapping[str, CallState], receipts: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the kept calls of wardens that have died, as calls that have died with them.

        Args:
            calls: what the records say of them.
            receipts: of those of which something survives, and of earlier ones of which that is gone by now.
        """
        for call_id in receipts.keys() & self._calls.keys() - calls.keys():
            self._calls[call_id].on_closed(dumps(receipts[call_id]))
        for call_id, record in calls.items():
            try:
                kept = record.session["resumable"]
                claim = Ownership(str(kept["owner"]), str(kept["secret"]))
                terms = SessionLimits(
                    *(float(kept[key]) for key in ("disconnect_timeout", "result_ttl", "timeout", "max_exec_time"))
                )
                streaming = bool(kept["streaming"])
            except (KeyError, TypeError, ValueError):
                continue  # a tied call: nobody asks for it
            kept_call = self._keep(call_id, claim, terms, streaming, self._loop.now())
            receipt = dumps(receipts[call_id]) if call_id in receipts else None
            kept_call.adopt(_WARDEN_DIED, dumps({"by": "unknown", "supervisor": "died"}), receipt)
            self._record_again(call_id, record)

    def _record_again(self, call_id: str, record: CallState) -> None:
        """So that whoever comes after this warden can tell of it, too."""
        try:
            self._records.write(call_id, record)
        except OSError as error:
            log.error("a call can't be recorded", extra={"call": call_id, "reason": str(error)})
        self._records.mark_ended(call_id)

    def _keep(
        self, call_id: str, claim: Ownership, terms: SessionLimits, streaming: bool, begun: float
    ) -> ResumableSession:
        settings = self._settings
        kept = self._calls[call_id] = ResumableSession(
            self._loop,
            call_id,
            claim,
            terms,
            streaming,
            begun,
            settings["kill_grace"],
            self._warden,
            settings["spool"],
            self._memory,
            self._on_forgotten,
        )
        return kept

    @staticmethod
    def stored_session(kept: ResumableSession, streaming: bool) -> dict[str, Any]:
        """What the next warden has to know to `bury` a call."""
        terms = kept.limits
        return {
            "resumable": {
                "owner": kept.ownership.owner,
                "secret": kept.ownership.secret,
                "disconnect_timeout": terms.disconnect_timeout,
                "result_ttl": terms.result_ttl,
                "timeout": terms.timeout,
                "max_exec_time": terms.max_exec_time,
                "streaming": streaming,
            }
        }

    def attach(self, connection: socket.socket, request: JSONObject, behind: bytes) -> Failed | None:
        """Attach a connection to a call, or say why not. `behind`: what came behind the request."""
        call_id, owner = required_string(request, "attach"), required_string(request, "owner")
        since = member_value(request, "since")
        check(is_count(since), "since: expected a count")
        if call_id not in self._calls:
            self._sweep()  # its warden may have died just now
        kept = self._calls.get(call_id)
        claim = Ownership(owner, _digest(required_string(request, "secret")))
        if kept is None or not _same(kept.ownership, claim):
            self._barred.add(owner, call_id, self._loop.now())
            return Failed("no_such_call", "there is no such call here, and none of this id will start", self._data())
        if not kept.has_records_from(since):
            first, end = kept.available_range
            data = {"first": first, "end": end}
            return Failed("records_gone", "not all of the call's records from this number on are here", data)
        log.info("dispatcher attached to its call", extra={"call": call_id, "since": since})
        kept.attach(connection, since, behind, member_value(request, "keep_alive") if "keep_alive" in request else None)
        return None

    def list_calls(self, owner: str) -> bytes:
        """The line that lists an owner's calls."""
        self._sweep()
        calls = tuple(
            call_id
            for call_id, kept in self._calls.items()
            if hmac.compare_digest(_bytes(kept.ownership.owner), _bytes(owner))
        )
        return encode_message(CallList(calls, self._warden))

    def _on_forgotten(self, kept: ResumableSession) -> None:
        del self._calls[kept.id]
        self._records.mark_reported(kept.id)
        self._barred.add(kept.ownership.owner, kept.id, self._loop.now())
        self._call_forgotten()

    def _data(self) -> dict[str, str]:
        return {"instance": self._warden}


def _seconds(members: JSONObject, key: str) -> float:
    seconds = member_value(members, key)
    check(is_seconds(seconds), f"{key}: expected a positive number of seconds")
    return float(seconds)


def _digest(secret: str) -> str:
    return hashlib.sha256(_bytes(secret)).hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _same(one: Ownership, other: Ownership) -> bool:
    return hmac.compare_digest(_bytes(one.owner), _bytes(other.owner)) and hmac.compare_digest(one.secret, other.secret)
