"""Calls that hosts hold for us and nobody here wants: jobs that ended, were given up, or are not known any more.

Each is stopped if it still runs, and forgotten by its host. What it has to say about its end is kept as evidence of its
job, if there is one; the end that was stored first stands.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial

from harp.protocol.daemon import Acknowledgement, Attach, Done, Evidence, Receipt, Record, StopCall, Stored
from harp.protocol.ends import End, Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.jsontext import Raw, loads
from harp.protocol.lines import LineTooLong
from harpcaller.conversation import Conversation, dial
from harpcaller.hostlink import FAULTS
from harpcaller.hosts import Host
from harpcaller.jobs import Facts
from harpcaller.store import StorageError, UnknownJob
from harpcaller.surroundings import Surroundings

__all__ = ["Unwanted"]

log = logging.getLogger(__name__)

#: How many are dealt with at once.
_AT_ONCE = 8


class Unwanted:
    """Looks through the lists of calls that hosts hold.

    Args:
        group: where the work is done.
        is_wanted: whether somebody looks after this job's call.
    """

    def __init__(self, group: asyncio.TaskGroup, is_wanted: Callable[[str], bool]) -> None:
        self._group = group
        self._is_wanted = is_wanted
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopped = False

    def look_at(self, host: Host, calls: Sequence[str], around: Surroundings) -> None:
        """Begin to get rid of those that nobody wants."""
        for call in calls:
            if not self._is_wanted(call) and call not in self._tasks and not self._stopped:
                task = self._tasks[call] = self._group.create_task(self._get_rid(host, call, around))
                task.add_done_callback(partial(self._done, call))

    def _done(self, call: str, _: asyncio.Task[None]) -> None:
        del self._tasks[call]

    def stop(self) -> None:
        """Stop what is under way; the hosts will list it again."""
        self._stopped = True
        for task in self._tasks.values():
            task.cancel()

    async def _get_rid(self, host: Host, call: str, around: Surroundings) -> None:
        about = {"job": call, "host": host.hostname}
        try:
            async with self._turn:
                if self._is_wanted(call) or await _holds_slot(call, around):
                    return
                log.info("a call that nobody wants is stopped", extra=about)
                since: int | None = 0
                while since is not None:
                    talk = await dial(host, around.tls, around.config)
                    try:
                        since = await _finish_off(talk, host, call, since, around)
                    finally:
                        talk.abort()
        except (*FAULTS, StorageError, ProtocolError, LineTooLong) as error:
            log.info("a call that nobody wants is left for later", extra={**about, "reason": str(error)})


async def _holds_slot(call: str, around: Surroundings) -> bool:
    try:
        return (await around.store.get_job(call)).holds_slot
    except UnknownJob:
        return False


async def _finish_off(talk: Conversation, host: Host, call: str, since: int, around: Surroundings) -> int | None:
    """Stop a call and have it forgotten; return the record to attach at instead, None: there is no more to do."""
    owner, secret = around.identity.owner_at(host.hostname), around.identity.secret(call)
    talk.ask(Attach(call, owner, secret, since, host.user, host.password))
    acknowledged = False
    number = since
    receipt: Raw | None = None
    evidence: Raw | None = None
    while (lines := await talk.read()) is not None:
        for line in lines:
            match message := talk.message(line):
                case Acknowledgement(_, terms):
                    acknowledged = True
                    if terms is not None:
                        talk.keep_contact(terms.elapsed, terms.keep_running)
                    talk.say(StopCall("unwanted"))
                case Record():
                    number += 1  # wanted no more, which is as good as stored
                    talk.say(Stored(number))
                case Receipt(found):
                    receipt = Raw(found)
                case Evidence(found):
                    evidence = Raw(found)
                case Failed("records_gone", _, data) if not acknowledged and isinstance(data, bytes):
                    return int(loads(data)["end"])
                case Failed() if not acknowledged:
                    return None
                case _ if isinstance(message, End):
                    await around.store.note_facts(call, Facts(receipt=receipt, evidence=evidence))
                    talk.say(Done())
                    talk.close()
                    return None
    return None
