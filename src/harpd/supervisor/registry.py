"""The registry of a supervisor's resumable calls: their owners, attachment, and tombstones.

A dispatcher proves that a call is its own by its owner id and the call's secret; only a digest of the secret is stored.
A call of another dispatcher is reported as absent. The reply that a call is absent is a promise: its id gets a
tombstone, so that a delayed start of it is rejected. Used ids get a tombstone, too. A tombstone stays for
`_TOMBSTONE_TTL` seconds, longer than `_MAX_START_AGE`: a start that the frontend received longer ago is rejected.

Spec: docs/protocol.md, Resumable calls.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Mapping
from typing import Any

from harp.protocol.ends import Failed
from harp.protocol.harpd import CallList, encode_message
from harp.protocol.schema import ProtocolError, check, check_string, is_count, is_seconds_or_zero
from harpd.supervisor.call import CallContext
from harpd.supervisor.fair_shares import Account, FairShares
from harpd.supervisor.link import LinkChannel
from harpd.supervisor.sessions import ResumableSession, SessionTerms
from harpd.supervisor.state_files import CleanupResult, Purpose

log = logging.getLogger("harpd.supervisor")

#: The most tombstones in each of two periods: about 70 MB. Beyond it, requests about unknown calls are answered later.
_MAX_TOMBSTONES = 1_000_000
#: Seconds by which a start may be delayed, and for which a tombstone stays at least.
_MAX_START_AGE, _TOMBSTONE_TTL = 120.0, 150.0
#: New calls are rejected while there are this many sessions for each call of `max_calls`, unless their account is below
#: its share.
_SESSIONS_PER_CALL = 20


class TombstoneSet:
    """Tombstones by owner. Each stays for `ttl` seconds at least, and twice as long at most while others are added.

    A busy host adds hundreds a second, so a tombstone is a hash of 64 bits, and all of a period are deleted together.
    """

    def __init__(self, ttl: float, now: float) -> None:
        self._ttl = ttl
        self._period_start = now
        self._current: set[int] = set()
        self._previous: set[int] = set()

    def add(self, owner: str, call_id: str, now: float) -> None:
        age = now - self._period_start
        if age > self._ttl:
            self._previous = self._current if age <= 2 * self._ttl else set()
            self._current = set()
            self._period_start = now
        self._current.add(hash((owner, call_id)))

    def is_full(self, now: float) -> bool:
        """Whether this period has so many that only used ids get further ones."""
        return len(self._current) >= _MAX_TOMBSTONES and now - self._period_start <= self._ttl

    def contains(self, owner: str, call_id: str) -> bool:
        tombstone = hash((owner, call_id))
        return tombstone in self._current or tombstone in self._previous


class CallRegistry:
    """All resumable calls of one supervisor."""

    def __init__(self, context: CallContext) -> None:
        self._context = context
        self._loop = context.loop
        self._instance = context.instance
        self._sessions: dict[str, ResumableSession] = {}
        self._shares = FairShares()  # how many sessions each account has
        self._tombstones = TombstoneSet(_TOMBSTONE_TTL, self._loop.now())

    def __len__(self) -> int:
        return len(self._sessions)

    def create_session(
        self, call_id: str, user: str, requested: Mapping[str, Any], streaming: bool
    ) -> ResumableSession | Failed:
        """Create the session of a new call, with no connection attached; or return why the call is rejected."""
        instance, secret = read_texts(requested, "instance", "secret")
        received_at = requested["received"]
        now = self._loop.now()
        check(is_seconds_or_zero(received_at), "received: expected seconds")
        check(received_at <= now, "received: the time is in the future")  # it would count as contact until then
        if instance != self._instance:
            return self.wrong_instance()
        settings = self._context.settings
        members = {**requested, "secret": _digest(secret), "streaming": streaming, "user": user}
        terms = SessionTerms.decode(members, limits=settings)
        if now - received_at > min(_MAX_START_AGE, terms.disconnect_timeout):
            message = "the start was delayed for too long; the call did not start"
            return Failed("call_refused", message, {"reason": "delayed"})  # no tombstone: it may be sent again
        account = Account(terms.user, terms.owner)
        has_place = self._shares.may_add(account, _SESSIONS_PER_CALL * settings["max_calls"])
        if not has_place or self._context.quota.is_exhausted(account):
            return Failed("too_many_calls", "this host stores too many ends that this dispatcher has not fetched")
        if call_id in self._sessions or self._tombstones.contains(terms.owner, call_id):
            return Failed("call_refused", "a call with this id was started or given up before")
        return self._add_session(call_id, terms, received_at)

    def wrong_instance(self) -> Failed:
        """Return the error of a start that names another instance, or is sent to a retired one."""
        message = "the start was meant for another instance of the supervisor; the call did not start"
        return Failed("wrong_instance", message, {"instance": self._instance})

    def _add_session(self, call_id: str, terms: SessionTerms, contact_at: float) -> ResumableSession:
        session = ResumableSession(self._context, call_id, terms, contact_at, self._on_discarded)
        self._sessions[call_id] = session
        self._shares.add(session.account, 1)
        return session

    def _on_discarded(self, session: ResumableSession) -> None:
        del self._sessions[session.id]
        self._shares.add(session.account, -1)
        self._context.state_files.mark_reported(session.id)
        self._tombstones.add(session.terms.owner, session.id, self._loop.now())

    def attach(self, channel: LinkChannel, header: Mapping[str, Any]) -> None:
        """Attach a link channel to a call, or reject the request. Raises KeyError and `ProtocolError`."""
        call_id, owner, secret = read_texts(header, "attach", "owner", "secret")
        since = header["since"]
        check(is_count(since), "since: expected a count")
        keep_alive = read_seconds(header, "keep_alive")
        if call_id not in self._sessions:
            self.clean_up_orphans()  # perhaps its supervisor has just died
        session = self._sessions.get(call_id)
        digest = _digest(secret)
        if session is not None and _are_equal(session.terms.owner, owner) and _are_equal(session.terms.secret, digest):
            rejection = session.attach(channel, since, keep_alive)
        elif self._tombstones.is_full(self._loop.now()):
            rejection = Failed("too_many_calls", "this host got too many requests about unknown calls; ask again later")
        else:
            self._tombstones.add(owner, call_id, self._loop.now())
            message = "there is no such call here, and it will not start"
            rejection = Failed("no_such_call", message, {"instance": self._instance})
        if rejection is None:
            log.info("dispatcher attached to call", extra={"call": call_id, "since": since})
        else:
            channel.reject(encode_message(rejection))

    def list_calls(self, owner: str) -> bytes:
        self.clean_up_orphans()
        calls = [call_id for call_id, session in self._sessions.items() if _are_equal(session.terms.owner, owner)]
        return encode_message(CallList(tuple(calls), self._instance))

    def clean_up_orphans(self) -> bool:
        """Kill the calls of dead supervisors and adopt the resumable calls; return whether to repeat it soon."""
        if self._context.shutting_down:  # the next supervisor adopts them
            return False
        result = self._context.state_files.clean_up(self._adopt)
        if result.killed:
            log.warning("killed orphaned processes", extra={"processes": result.killed})
        return result.repeat_soon

    def _adopt(self, result: CleanupResult) -> None:
        """Adopt the ends of the resumable calls that a clean-up has found."""
        stop_reports = result.stop_reports
        for call_id in stop_reports.keys() & self._sessions.keys() - result.calls.keys():
            self._sessions[call_id].on_closed(stop_reports[call_id])
        for call_id, state in result.calls.items():
            if state.session is None:
                continue  # a connection-bound call: no dispatcher attaches to it
            try:
                terms = SessionTerms.decode(state.session)
            except (KeyError, TypeError, ProtocolError) as error:
                log.warning("cannot read state of call", extra={"call": call_id, "reason": repr(error)})
                continue
            session = self._add_session(call_id, terms, self._loop.now())
            session.adopt(stop_reports.get(call_id))
            try:  # so that a later supervisor can report its end
                self._context.state_files.write(call_id, state.tree, session.stored, Purpose.ONLY_REPORT)
            except OSError as error:
                log.error("cannot write state of call", extra={"call": call_id, "reason": str(error)})


def read_texts(members: Mapping[str, Any], *keys: str) -> list[str]:
    """Return the strings of these keys. Raises KeyError and `ProtocolError`."""
    return [check_string(key, members[key]) for key in keys]


def read_seconds(members: Mapping[str, Any], key: str) -> float | None:
    """Return the number of an optional key. Raises `ProtocolError`."""
    seconds = members.get(key)
    check(seconds is None or is_seconds_or_zero(seconds), f"{key}: expected seconds")
    return seconds


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _are_equal(first: str, second: str) -> bool:
    """Compare two texts in a time that does not depend on where they differ."""
    return hmac.compare_digest(first.encode("utf-8", "surrogatepass"), second.encode("utf-8", "surrogatepass"))
