"""Door 2: the control socket, for the administrator. The socket is private to the daemon's user.

`harpcaller.api.control_client` is its other end and describes the protocol. Nothing that is given out here holds
credentials.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

from harp.protocol.ends import encode_end
from harp.protocol.fields import (
    ProtocolError,
    check,
    decode_object,
    is_container,
    is_count,
    is_seconds,
    member_value,
    reject_unknown_keys,
    required_string,
)
from harp.protocol.json_text import Envelope, JSONObject, Raw, dumps
from harp_daemon.sliced_json import decode_slices
from harpcaller.api.acceptor import Door
from harpcaller.api.connection import ClientLeft, Connection
from harpcaller.api.listeners import Listener
from harpcaller.config import ConfigError
from harpcaller.dispatcher import Dispatcher
from harpcaller.hosts.registry import RefreshFailed
from harpcaller.model.jobs import Job, State
from harpcaller.store import StorageError, UnknownJob

__all__ = ["COMMANDS", "Admin", "Program"]

log = logging.getLogger(__name__)

_CONNECTIONS = 64
_REQUEST_LINE = 16 * 1024 * 1024
_IDLE_TIMEOUT = 30.0

#: Who has cancelled a job, as its evidence says, when it was done over this socket.
_ADMINISTRATOR = "administrator"

#: Bytes of a list that are sent at once.
_PIECE = 64 * 1024

Items = AsyncGenerator[Envelope, None]


class Program(Protocol):
    """What the program that the dispatcher runs in can be asked for."""

    def stop(self) -> None:
        """Begin to stop."""

    def reload(self) -> Awaitable[list[str]]:
        """Read the configuration again; return the changed keys that need a restart.

        Raises:
            ConfigError: the configuration cannot be used; nothing has changed.
        """

    def reopen_logs(self) -> None:
        """Open log files anew."""


class Admin:
    """The door that the administrator comes through; an asynchronous context manager that closes it.

    Args:
        dispatcher: whose jobs, queues and hosts these are.
        program: what the dispatcher runs in.
        listener: the control socket.
    """

    def __init__(self, dispatcher: Dispatcher, program: Program, listener: Listener) -> None:
        self.dispatcher = dispatcher
        self.program = program
        self._listener = listener
        self._door = Door(self._answer, lambda: _CONNECTIONS, _error("too many connections to the control socket"))

    async def __aenter__(self) -> Self:
        await self._door.__aenter__()
        self._door.open(self._listener)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._door.__aexit__(kind, error, traceback)

    async def _answer(self, connection: Connection) -> None:
        await connection.send(await self._carry_out(connection))

    async def _carry_out(self, connection: Connection) -> bytes:
        """Read a request, carry it out and send its items; return the last line."""
        try:
            members = decode_object(await connection.request_line(_REQUEST_LINE, _IDLE_TIMEOUT), decode_slices)
            name = required_string(members, "command")
            check(name in COMMANDS, f"command: expected one of {', '.join(COMMANDS)}, got {name!r}")
            reject_unknown_keys(members, ("command", *COMMANDS[name].options))
            log.debug("command", extra={"command": name, "client": connection.client})
            async with aclosing(COMMANDS[name].run(self, members)) as items:
                await _send_items(items, connection)
        except ClientLeft:
            raise
        except UnknownJob as error:
            return _error(f"there is no job {error}")
        except (ProtocolError, StorageError, ConfigError, RefreshFailed) as error:
            return _error(str(error))
        except Exception:
            log.exception("command failed by a fault of the dispatcher")
            return _error("the dispatcher failed; its log says more")
        return _line(done=True)


async def _send_items(items: Items, connection: Connection) -> None:
    """Send items in pieces of some size, so that a long list needs few sends and no memory."""
    piece = bytearray()
    async for item in items:
        piece += _line(item=item)
        if len(piece) >= _PIECE:
            await connection.send(bytes(piece))
            piece.clear()
    if piece:
        await connection.send(bytes(piece))


def _line(**members: Any) -> bytes:
    return bytes(dumps(Envelope(members))) + b"\n"


def _error(message: str) -> bytes:
    return _line(error=message)


# What can be asked for.


async def _status(admin: Admin, _: JSONObject) -> Items:
    yield Envelope(pid=os.getpid(), calls=admin.dispatcher.active_calls)


async def _stop(admin: Admin, _: JSONObject) -> Items:
    log.info("asked to stop")
    admin.program.stop()  # this door closes, but not before this is answered
    yield Envelope(pid=os.getpid())


async def _reload(admin: Admin, _: JSONObject) -> Items:
    yield Envelope(reloaded=True, restart_needed=await admin.program.reload())


async def _reopen_logs(admin: Admin, _: JSONObject) -> Items:
    admin.program.reopen_logs()
    yield Envelope(reopened=True)


async def _list(admin: Admin, members: JSONObject) -> Items:
    with_queue = _flag(members, "queue")
    host = required_string(members, "host") if "host" in members else None
    queue = _queue(members, "of_queue") if "of_queue" in members else None
    check(host is None or queue is None, "host, of_queue: expected one of them, got both")
    newest = _newest(members)
    async for job in admin.dispatcher.list_jobs(ended=_flag(members, "all"), host=host, queue=queue, newest=newest):
        item = _listed(job)
        if with_queue:
            item["queue"] = job.queue
        yield item


async def _info(admin: Admin, members: JSONObject) -> Items:
    if _flag(members, "full"):
        yield Envelope(await admin.dispatcher.details(required_string(members, "job")))
        return
    job = await admin.dispatcher.get_job(required_string(members, "job"))
    yield Envelope(
        _listed(job),
        queue=job.queue,
        info=job.info,
        state=job.state.value,
        timeout=job.timeout,
        max_exec_time=job.max_exec_time,
        records=job.records,
        end=None if job.end is None else encode_end(job.end),
    )


async def _cancel(admin: Admin, members: JSONObject) -> Items:
    yield Envelope(cancelled=await admin.dispatcher.cancel(required_string(members, "job"), _ADMINISTRATOR))


async def _release(admin: Admin, members: JSONObject) -> Items:
    yield Envelope(released=await admin.dispatcher.release_slot(required_string(members, "job")))


async def _queue_list(admin: Admin, members: JSONObject) -> Items:
    if "queue" not in members:
        for queue in await admin.dispatcher.list_queues():
            yield Envelope(queue=queue.name, concurrency=queue.concurrency, running=queue.running, queued=queue.queued)
        return
    async for job in admin.dispatcher.list_jobs(queue=_queue(members)):
        yield Envelope(_listed(job), running=job.state is State.RUNNING)


async def _queue_cancel(admin: Admin, members: JSONObject) -> Items:
    yield Envelope(cancelled=await admin.dispatcher.cancel_queue(_queue(members), _ADMINISTRATOR))


async def _hosts_list(admin: Admin, _: JSONObject) -> Items:
    for host in admin.dispatcher.hosts():
        yield Envelope(hostname=host.hostname, address=host.address, port=host.port)


async def _hosts_refresh(admin: Admin, _: JSONObject) -> Items:
    yield Envelope(hosts=await admin.dispatcher.refresh_hosts())


async def _prune_jobs(admin: Admin, members: JSONObject) -> Items:
    age = member_value(members, "age") if "age" in members else admin.dispatcher.config.max_age_seconds
    check(age == 0 or is_seconds(age), f"age: expected a number of seconds, got {age!r}")
    yield Envelope(pruned=await admin.dispatcher.prune(age))


@dataclass(frozen=True, slots=True)
class Command:
    """A command: how it is carried out, and the keys that may stand beside its name."""

    run: Callable[[Admin, JSONObject], Items]
    options: tuple[str, ...] = ()


#: All commands by their names.
COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "status": Command(_status),
        "stop": Command(_stop),
        "reload": Command(_reload),
        "reopen-logs": Command(_reopen_logs),
        "list": Command(_list, ("all", "queue", "newest", "host", "of_queue")),
        "info": Command(_info, ("job", "full")),
        "cancel": Command(_cancel, ("job",)),
        "release": Command(_release, ("job",)),
        "queue-list": Command(_queue_list, ("queue",)),
        "queue-cancel": Command(_queue_cancel, ("queue",)),
        "hosts-list": Command(_hosts_list),
        "hosts-refresh": Command(_hosts_refresh),
        "prune-jobs": Command(_prune_jobs, ("age",)),
    }
)


def _flag(members: JSONObject, key: str) -> bool:
    flag = member_value(members, key) if key in members else False
    check(isinstance(flag, bool), f"{key}: expected true or false")
    return bool(flag)


def _newest(members: JSONObject) -> int | None:
    if "newest" not in members:
        return None
    newest = member_value(members, "newest")
    check(is_count(newest) and newest > 0, f"newest: expected a whole number from 1 on, got {newest!r}")
    return int(newest)


def _queue(members: JSONObject, key: str = "queue") -> Raw:
    check(key in members, f"{key}: missing")
    queue = members.payload(key)
    check(is_container(queue, (dict,)), f"{key}: expected an object")
    return Raw(queue)


def _listed(job: Job) -> Envelope:
    """A job as it stands in every list."""
    times = (job.submitted, job.started, job.ended)
    submit, start, end = (None if moment is None else int(moment) for moment in times)
    return Envelope(
        job=job.id,
        call=Envelope(host=job.host, procedure=job.procedure, arguments=job.arguments),
        time=Envelope(submit=submit, start=start, end=end),
    )
