"""One job -> one call on a host: start it once, keep its records, follow it through cuts, settle its end and its slot.

Theory of operation. A `Run` lives as long as its job holds its slot. It starts the call, listens to it, and when the
contact is lost attaches to it again, until the host says that the call is over, or has been given up as lost.

A call is *kept* when its host's harpd knows how (`harpcaller.hosts.capabilities`); else it is *tied* to its
connection, as with
the harpd of the field: closing stops it, nobody confirms that, a cut ends the job.

At most once: the request is written a single time, without waiting in between the last look at whether the call is
still wanted and the writing. A start may be tried again only when the host says that it surely did not happen
(``other_warden``). If contact is lost before the acknowledgement, attaching settles it: a host that does not hold the
call has barred its id with that answer.

A host that breaks the protocol in the middle of a kept call has ended its job. What it has still to say of the call is
worth nothing but for the receipt: it is attached to once more, behind all its records, to have it stopped.

Whoever wants the call to stop (cancel, a limit) has stored the job's end before. What then remains is the stop: it is
ordered, as soon as there is contact, and the receipt is stored when it comes. Waits can be interrupted
(`harpcaller.runs.interruptible_wait`); what is to be done is looked up after every wait, in one place.

A run sees the store's interface and never a backend.
"""

from __future__ import annotations

import asyncio
import logging
import time
from enum import Enum, IntEnum
from typing import Any

from harp.protocol.ends import End, Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import (
    Acknowledgement,
    Done,
    Evidence,
    KeptTerms,
    Message,
    Receipt,
    RecordsAt,
    StopCall,
    Stored,
)
from harp.protocol.json_text import Raw, dumps, loads
from harp.protocol.lines import LineTooLong
from harpcaller.hosts.connecting import (
    HostUnreachable,
    describe_host,
    map_connect_errors,
    to_failed,
    to_protocol_error,
)
from harpcaller.hosts.connection import PAST_END, HarpdConnection, open_connection, parse_end_of_records
from harpcaller.hosts.inventory import Host
from harpcaller.model.jobs import NO_FACTS, Facts, Job, Stop
from harpcaller.runs.context import Surroundings, fields
from harpcaller.runs.deadlines import Limits
from harpcaller.runs.interruptible_wait import Interrupted, Waiting
from harpcaller.runs.outage import LostContact, Pace
from harpcaller.runs.outcome_writer import Settling
from harpcaller.runs.record_writer import Recording

__all__ = ["Run"]

log = logging.getLogger(__name__)

#: Seconds that a cancel waits for the acknowledgement of a request that is out.
_CANCEL_WAIT = 2.0

#: How often a start is tried that surely did not happen.
_STARTS = 3

_STOPPED = Failed("missing_result", "the dispatcher was stopped while the job was running; its end is not known")
_INTERNAL = Failed("internal_error", "the dispatcher failed; its log says more")


class Phase(IntEnum):
    """How far the start is."""

    BEFORE = 0  # the request has not been sent
    SENT = 1  # it is out, and nothing has come back
    ANSWERED = 2  # the host has answered, or the contact is lost
    OVER = 3  # the run has ended


class Outcome(Enum):
    """How a conversation ended."""

    OVER = "nothing is left to do"
    LOST = "the contact is lost; the call may run on"
    AGAIN = "the start surely did not happen"


class Run:
    """The call of one job that holds a slot.

    Args:
        job: the job.
        surroundings: what the run needs.
        resumed: whether an earlier dispatcher has claimed it, and perhaps started its call.
    """

    def __init__(self, job: Job, surroundings: Surroundings, resumed: bool = False) -> None:
        self.job = job
        self._around = surroundings
        self._resumed = resumed
        self._recording = Recording(
            job.id, job.records, surroundings.store, surroundings.news, surroundings.trouble, self._on_stored
        )
        self._settling = Settling(job, surroundings, self.facts)
        self._phase = Phase.BEFORE
        self._moved = asyncio.Event()
        self._waiting = Waiting()
        self._leaving = False
        self._order: StopCall | None = None
        self._talk: HarpdConnection | None = None
        self._host: Host | None = None
        self._terms: KeptTerms | None = None
        self._named = False  # the start, or the attach, was one of a kept call
        self._limits = Limits(job, surroundings.config.acknowledgement_timeout)
        self._ordered = False  # in the conversation now under way, as the next
        self._over_there = False  # the closing line has come
        self._attempts = 0
        self._pace = Pace()
        self._lost: LostContact | None = None
        self._made: float | None = None

    async def run(self) -> None:
        """Carry the call out, or go on with it. Returns when all is stored, or when it is left to itself by `leave`."""
        begin = time.monotonic()
        log.info("call is taken up again" if self._resumed else "call started", extra=fields(self.job))
        try:
            outcome = await self._carry_out()
        except Exception:
            log.exception("call failed by a fault of the dispatcher", extra=fields(self.job))
            outcome = await self._give_up_on_itself()
        finally:
            self._reach(Phase.OVER)
            self._recording.give_up()
        what = "call ended" if outcome is Outcome.OVER else "call is left to its host"
        log.info(what, extra={**fields(self.job), **self._settling.told, "seconds": round(time.monotonic() - begin, 3)})

    async def _carry_out(self) -> Outcome:
        outcome = await (self._take_up() if self._resumed else self._begin())
        while outcome is Outcome.LOST and not self._leaving:
            outcome = await self._attach_again()
        return outcome

    async def _give_up_on_itself(self) -> Outcome:
        """End the job of a run that failed. What was sent may run: then the slot is kept, till the next start looks.

        Nobody looks after the stop any more: it is not pending.
        """
        sent = self._phase is not Phase.BEFORE
        if self._settling.ended or not await self._settling.finish(_INTERNAL, Stop.FAILED if sent else None, sent):
            await self._settling.settle(Stop.FAILED if sent else Stop.CONFIRMED, keep_slot=sent)
        return Outcome.OVER

    # What others want of the run.

    async def cancel(self, by: str | None) -> None:
        """Stop the call of a job that is cancelled in the store; no start of it follows this function's return.

        Args:
            by: who cancelled it, for the evidence.
        """
        self._settling.ended = True
        if self._phase is Phase.SENT:
            try:
                async with asyncio.timeout(_CANCEL_WAIT):
                    await self._moved.wait()
            except TimeoutError:
                log.warning("cancelled before the host acknowledged the call", extra=fields(self.job))
        self._order = self._order or StopCall("cancelled", by)
        self._waiting.interrupt()

    def drop(self) -> None:
        """It was cancelled before its run came to be: it is not started, and stopped if it was before."""
        self._settling.ended = True
        self._order = StopCall("cancelled")

    @property
    def ended(self) -> bool:
        """Whether the job has an end, as far as is known here."""
        return self._settling.ended

    def leave(self) -> None:
        """Leave a kept call to its host, where the next dispatcher finds it; end a tied one."""
        self._leaving = True
        self._waiting.interrupt()

    def facts(self) -> dict[str, Any]:
        """Where and how the call runs, for `details`. Spec: docs/protocol.md, Details."""
        host, terms = self._host, self._terms
        return {
            "address": host.address if host else None,
            "port": host.port if host else None,
            "attempts": self._attempts,
            "connecting": self._limits.connecting,
            "kept": terms is not None or (self._named and self._lost is not None),
            "warden": terms.warden if terms else None,
        }

    def contact(self, now: float) -> float | None:
        """When something was heard of the call the last time; Unix seconds, as `now` is. None: nothing yet."""
        if self._lost is not None:
            return self._lost.wall
        return None if self._talk is None else now - (time.monotonic() - self._talk.last_received_at)

    def lost_in(self) -> float:
        """Seconds until the host is given up as lost, if it stays as it is."""
        return 0.0 if self._lost is None else self._lost.deadline(self._lost_after()) - time.monotonic()

    @property
    def is_acknowledged(self) -> bool:
        """Whether the host has acknowledged the call."""
        return self._limits.acknowledged

    @property
    def lost(self) -> LostContact | None:
        """The contact that is lost; None: it is not."""
        return self._lost

    def _reach(self, phase: Phase) -> None:
        self._phase = max(self._phase, phase)
        if self._phase >= Phase.ANSWERED:
            self._moved.set()

    # The start.

    async def _begin(self) -> Outcome:
        job = self.job
        host = self._host = self._around.find_host(job.host)
        if host is None:
            return await self._conclude(Failed("unknown_host", f"the hosts registry has no host {job.host}"))
        outcome = Outcome.AGAIN
        for _ in range(_STARTS):
            outcome = await self._start(host)
            if outcome is not Outcome.AGAIN:
                return outcome
        return await self._conclude(
            Failed("network_error", f"{describe_host(host)}: its warden changes with every start")
        )

    async def _start(self, host: Host) -> Outcome:
        around = self._around
        try:
            while True:
                self._waiting.look_up()
                if not self._is_wanted() or time.monotonic() >= self._limits.deadline:
                    return await self._never_sent()
                self._attempts += 1
                try:
                    warden = None
                    with map_connect_errors(host):
                        if around.config.kept_calls:
                            warden = await self._waiting.wait(
                                around.hosts.get_instance(host, around.tls, around.config), self._limits.deadline
                            )
                        talk = around.idle.get(host, around.tls)
                        if talk is None:
                            dialling = open_connection(host, around.tls, around.config)
                            talk = await self._waiting.wait(dialling, self._limits.deadline)
                    break
                except Interrupted:
                    continue
        except HostUnreachable as unreachable:
            return await self._conclude(unreachable.error)
        request = around.start_request(self.job, host, warden)
        # Nothing may be awaited between this look and the writing.
        if not self._is_wanted():
            talk.abort()
            return await self._never_sent()
        talk.send_request(request)
        self._phase = Phase.SENT
        self._named = warden is not None
        return await self._listen(talk, host)

    def _is_wanted(self) -> bool:
        return self._order is None

    async def _never_sent(self) -> Outcome:
        if self._settling.ended:
            return await self._settle(Stop.CONFIRMED)
        return await self._conclude(self._limits.too_long())

    # A conversation.

    async def _listen(self, talk: HarpdConnection, host: Host) -> Outcome:
        """Listen until there is nothing more to hear. Closes the connection."""
        self._talk = talk
        self._over_there = False
        self._limits.asked(again=self._lost is not None)
        try:
            while True:
                try:
                    if (outcome := await self._look_up(talk, host)) is not None:
                        return outcome
                    if self._recording.full if self._terms is None else self._recording.flooded:
                        await self._waiting.wait(self._recording.stored())
                        self._limits.heard()
                        continue
                    lines = await self._waiting.wait(talk.read(), self._limits.due(self._settling.ended))
                except Interrupted:
                    continue
                except LineTooLong as error:
                    return await self._broken_off(error, host)
                except OSError as error:
                    return await self._broken(to_failed(error, host, talk.phase_text), host)
                if lines is None:
                    closed = Failed(
                        "network_error", f"{describe_host(host)}: it closed the connection {talk.describe_state}"
                    )
                    return await self._broken(closed, host)
                for message in talk.messages(lines):
                    self._limits.heard()
                    if isinstance(message, ProtocolError):
                        return await self._broken_off(message, host)
                    if (outcome := await self._hear(message, talk, host)) is not None:
                        return outcome
                if self._recording.refused:
                    self._on_stored(self._recording.count)
        finally:
            self._talk = None
            talk.abort()

    async def _look_up(self, talk: HarpdConnection, host: Host) -> Outcome | None:
        """Do what is to be done now, whoever asked for it."""
        self._waiting.look_up()
        if self._recording.refused and not self._settling.ended:
            await self._stop_with(_INTERNAL, "internal_error")
        elif (end := self._overdue(host)) is not None:
            if not self._limits.acknowledged and self._named and end.type != "timeout":
                self._lose(end.message)  # whether it has started will be known once we are attached
                return Outcome.LOST
            await self._stop_with(end, "limit")
        if self._order is not None:
            if not self._named:
                return await self._cut()
            if self._limits.acknowledged:
                self._say_order(talk)
        if self._leaving and self._limits.acknowledged:
            if self._terms is not None:
                return Outcome.LOST
            return await self._conclude(_STOPPED, stop=Stop.UNKNOWN)
        return None

    def _overdue(self, host: Host) -> Failed | None:
        if self._around.trouble.waiting:
            self._limits.put_off()  # what the host has said in time may still wait here
        return self._limits.overdue(describe_host(host), self._settling.ended)

    def _say_order(self, talk: HarpdConnection) -> None:
        if self._order is not None and not self._ordered:
            self._ordered = True
            talk.send_command(self._order)

    async def _hear(self, message: Message | list[Raw], talk: HarpdConnection, host: Host) -> Outcome | None:
        match message:
            case list(records):
                self._limits.brought()
                self._recording.add(records, self._around.wall() if self._made is None else self._made)
            case RecordsAt(moment):
                self._made = moment
            case Acknowledgement(_, terms):
                await self._on_acknowledged(terms, talk, host)
            case Evidence(evidence):
                self._settling.evidence = Raw(evidence)
            case Receipt(receipt):
                self._settling.receipt = Raw(receipt)
                if self._over_there:
                    return await self._on_over(talk)
            case Failed() if not self._limits.acknowledged:
                return await self._on_refused(message, host)
            case _ if isinstance(message, End):
                if self._terms is None:
                    return await self._conclude(message)
                self._over_there = True
                return await self._on_over(talk, message)
        return None

    async def _on_acknowledged(self, terms: KeptTerms | None, talk: HarpdConnection, host: Host) -> None:
        self._reach(Phase.ANSWERED)
        self._limits.acknowledge(None if terms is None else terms.elapsed)
        self._terms = terms
        if terms is None:
            if self._named:  # it was replaced by an older one since we asked
                self._named = False
                self._around.hosts.set_instance(host, None)
            return
        self._ordered = False
        self._say_order(talk)  # at once: what comes next may break the connection
        again = self._lost is not None
        if self._lost is not None:
            lost, self._lost = self._lost, None
            log.info("contact is there again", extra={**fields(self.job), "attempts": lost.attempts})
        talk.start_heartbeat(terms.elapsed, terms.keep_running, at_once=again)

    async def _on_refused(self, error: Failed, host: Host) -> Outcome:
        """An error that stands for the acknowledgement."""
        self._reach(Phase.ANSWERED)
        if self._lost is not None:  # of an attach
            match error.type:
                case "no_such_call":
                    return await self._not_held(host)
                case "records_gone":
                    return await self._records_gone(error, host)
                case _:
                    self._lost.failed(f"{describe_host(host)}: {error.type}: {error.message}")
                    return Outcome.LOST
        if error.type == "other_warden" and self._named:
            self._around.hosts.invalidate(host)
            return Outcome.AGAIN
        return await self._conclude(error)

    async def _on_over(self, talk: HarpdConnection, end: End | None = None) -> Outcome | None:
        """The call is over on its host, but for what survives. None: something does, and there is more to hear."""
        await self._recording.stored()
        survives = self._settling.survives
        stop = Stop.FAILED if survives else Stop.CONFIRMED
        if end is not None and not self._settling.ended:
            if not await self._settling.finish(end, None if self._settling.receipt is None else stop, survives):
                await self._settle(stop, survives)  # somebody has cancelled it meanwhile
        else:
            await self._settle(stop, survives)
        if survives:
            log.error("processes of a job survive on its host", extra=fields(self.job))
            return None
        await asyncio.sleep(0)  # those who wait for the end go first
        talk.send_command(Done())
        assert self._host is not None
        self._around.idle.put(self._host, self._around.tls, talk)
        return Outcome.OVER

    async def _broken(self, end: Failed, host: Host) -> Outcome:
        """The connection broke."""
        if not self._named:
            self._reach(Phase.ANSWERED)
            if self._settling.ended:
                return await self._settle(Stop.UNKNOWN)
            return await self._conclude(end)
        self._lose(end.message)
        return Outcome.LOST

    async def _broken_off(self, error: ProtocolError | LineTooLong, host: Host) -> Outcome:
        """What came is not of the protocol. Of a kept call that is its job's end: it would come again."""
        end = to_protocol_error(error, host)
        if self._named and self._limits.acknowledged:
            await self._recording.stored()
            end = Failed(end.type, f"{end.message} (record {self._recording.expected} was to come)")
            await self._stop_with(end, "protocol_error")
            self._recording.skip_to(PAST_END)
        return await self._broken(end, host)

    # Limits.

    async def _stop_with(self, end: Failed, why: str) -> None:
        """End the job from here; its call is to be stopped."""
        if not self._settling.ended:
            stopped = dumps({"why": why, "by": "dispatcher", "at": self._around.wall()})
            if not await self._settling.finish(end, Stop.PENDING, True, Facts(stopped=stopped)):
                return  # it was cancelled, and the order to stop it is on its way here
        self._order = self._order or StopCall(why, "dispatcher")

    async def _cut(self) -> Outcome:
        """Stop a tied call, the only way there is."""
        self._reach(Phase.ANSWERED)
        return await self._settle(Stop.UNKNOWN)

    # Contact lost.

    def _lose(self, error: str) -> None:
        if self._lost is None:
            heard = self._talk.last_received_at if self._talk is not None else time.monotonic()
            self._lost = LostContact.begin(time.monotonic() - heard, self._around.wall())
            log.warning("contact is lost; the host keeps the call", extra={**fields(self.job), "reason": error})
            if self._host is not None:
                self._around.hosts.invalidate(self._host)
        self._lost.failed(error)
        self._reach(Phase.ANSWERED)

    async def _take_up(self) -> Outcome:
        """Go on with what an earlier dispatcher began."""
        self._phase = Phase.ANSWERED
        self._moved.set()
        self._named = True
        facts = await self._settling.facts()
        self._lost = LostContact.begin(0.0, self._around.wall())
        if self.job.end is not None and self._order is None:
            stopped = loads(facts.stopped) if facts.stopped else {}
            self._order = StopCall(str(stopped.get("why", "cancelled")), stopped.get("by"))
        return Outcome.LOST

    async def _attach_again(self) -> Outcome:
        """Try to reach the call once more; pauses before that when the last attempt failed."""
        assert self._lost is not None
        lost, around = self._lost, self._around
        give_up_at = lost.deadline(self._lost_after())
        try:
            if pause := self._pace.pause():
                await self._waiting.wait(asyncio.sleep(pause), give_up_at)
        except Interrupted:
            self._waiting.look_up()
            if self._leaving:
                return Outcome.LOST
        if time.monotonic() >= give_up_at:
            return await self._give_up()
        self._attempts += 1
        self._pace.tried()
        lost.attempts += 1
        self._host = host = around.find_host(self.job.host) or self._host
        if host is None:
            lost.failed(f"the hosts registry has no host {self.job.host}")
            return Outcome.LOST
        self._waiting.look_up()
        talk: HarpdConnection | None = None
        try:
            with map_connect_errors(host):
                warden = await self._waiting.wait(
                    around.hosts.get_instance(host, around.tls, around.config), give_up_at
                )
                if warden is None and self._terms is None:
                    return await self._was_tied(host)
                talk = await self._waiting.wait(open_connection(host, around.tls, around.config), give_up_at)
        except Interrupted:
            lost.failed(lost.error or "reaching it took too long")
        except HostUnreachable as unreachable:
            lost.failed(f"{unreachable.error.type}: {unreachable.error.message}")
        if talk is None:
            return Outcome.LOST
        talk.send_request(around.attach_request(self.job.id, host, self._recording.expected))
        return await self._listen(talk, host)

    def _lost_after(self) -> float:
        """Seconds without contact after which nothing of the call runs any more: its host ended it before."""
        terms, after = self._terms, self._around.config.host_lost_after
        return after if terms is None else max(after, terms.keep_running + 2 * terms.kill_grace + 5.0)

    async def _give_up(self) -> Outcome:
        """The host is lost: the job must not hold its slot any longer."""
        assert self._lost is not None
        outage = self._lost.as_json()
        message = f"host {self.job.host} could not be reached for {self._lost_after():g} s, {self._lost.told()}"
        if not self._settling.ended:
            return await self._conclude(Failed("host_lost", message, dumps(outage)), Stop.FAILED)
        return await self._settle(Stop.FAILED, facts=Facts(receipt=dumps({"lost": outage})))

    async def _not_held(self, host: Host) -> Outcome:
        assert self._lost is not None
        if self._settling.ended:
            return await self._settle(Stop.CONFIRMED, facts=Facts(receipt=Raw(b'{"held":false}')))
        message = (
            f"{describe_host(host)} does not hold the job's call: it never started, or its end was lost; the contact"
        )
        return await self._conclude(Failed("missing_result", f"{message} was lost {self._lost.told()}"))

    async def _was_tied(self, host: Host) -> Outcome:
        """An earlier dispatcher has called a harpd of the field: its end of the connection was the call's."""
        if self._settling.ended:
            return await self._settle(Stop.UNKNOWN)
        message = f"the dispatcher stopped while the job was running; {describe_host(host)} can't keep calls"
        return await self._conclude(Failed("missing_result", message), Stop.UNKNOWN)

    async def _records_gone(self, error: Failed, host: Host) -> Outcome:
        """Records between what is stored here and what the host still has are lost: a store from a backup, say."""
        assert self._lost is not None
        message = f"{describe_host(host)}: records of the job are gone, from number {self._recording.expected} on"
        try:
            end = parse_end_of_records(error)
        except ProtocolError as fault:
            self._lost.failed(to_protocol_error(fault, host).message)
            return Outcome.LOST
        await self._recording.stored()
        await self._stop_with(Failed("missing_result", message), "records_gone")
        self._recording.skip_to(end)
        self._lost.failed(message)
        return Outcome.LOST

    # The end.

    async def _conclude(self, end: End, stop: Stop | None = None, facts: Facts | None = None) -> Outcome:
        """Store the end of a call that is over, or never was; its slot is free then."""
        await self._recording.stored()
        if not await self._settling.finish(end, stop, facts=facts or NO_FACTS):
            await self._settle(
                stop or (Stop.CONFIRMED if self._terms or not self._limits.acknowledged else Stop.UNKNOWN)
            )
        return Outcome.OVER

    async def _settle(self, stop: Stop, keep_slot: bool = False, facts: Facts = NO_FACTS) -> Outcome:
        await self._settling.settle(stop, keep_slot, facts)
        return Outcome.OVER

    def _on_stored(self, count: int) -> None:
        if not self._recording.refused:
            self._pace.progress()
        if self._talk is not None and self._terms is not None and self._limits.acknowledged:
            self._talk.send_command(Stored(count))
