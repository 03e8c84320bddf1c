"""The control API for administrators, over a Unix socket that only the daemon's user can open.

`harpcaller.api.control_client` is the client and describes the protocol. No reply contains credentials.
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
from harp_daemon.listeners import Listener
from harp_daemon.sliced_json import decode_slices
from harpcaller.api.connection import ClientDisconnected, Connection, close_acceptor, make_acceptor
from harpcaller.config import ConfigError
from harpcaller.dispatcher import Dispatcher
from harpcaller.hosts.registry import RefreshFailed
from harpcaller.model.jobs import Job, State
from harpcaller.store import StorageError, UnknownJob

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 64
_MAX_REQUEST = 16 * 1024 * 1024
_IDLE_TIMEOUT = 30.0

#: The `by` of a job that was cancelled over this socket.
_ADMINISTRATOR = "administrator"

#: Bytes of a list that are sent together.
_SEND_BYTES = 64 * 1024

Items = AsyncGenerator[Envelope, None]


class Program(Protocol):
    """The daemon, as far as commands control it."""

    def stop(self) -> None:
        """Start to stop the daemon."""

    def reload(self) -> Awaitable[list[str]]:
        """Read the configuration again; return the changed keys that need a restart.

        Raises:
            ConfigError: the configuration cannot be used; nothing has changed.
        """

    def reopen_logs(self) -> None:
        """Reopen the log files."""


class ControlServer:
    """The server of the control API; an asynchronous context manager that closes it.

    Args:
        dispatcher: the dispatcher.
        program: the daemon that runs the dispatcher.
        listener: the control socket.
    """

    def __init__(self, dispatcher: Dispatcher, program: Program, listener: Listener) -> None:
        self.dispatcher = dispatcher
        self.program = program
        self._listener = listener
        self._acceptor = make_acceptor(
            self._answer, lambda: _MAX_CONNECTIONS, _error("too many connections to the control socket")
        )

    async def __aenter__(self) -> Self:
        self._acceptor.open([self._listener])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await close_acceptor(self._acceptor)

    async def _answer(self, connection: Connection) -> None:
        await connection.send(await self._run_command(connection))

    async def _run_command(self, connection: Connection) -> bytes:
        """Run a command and send its items; return the last line."""
        try:
            members = decode_object(await connection.read_request(_MAX_REQUEST, _IDLE_TIMEOUT), decode_slices)
            name = required_string(members, "command")
            check(name in COMMANDS, f"command: expected one of {', '.join(COMMANDS)}, got {name!r}")
            reject_unknown_keys(members, ("command", *COMMANDS[name].options))
            log.debug("command", extra={"command": name, "client": connection.client})
            async with aclosing(COMMANDS[name].run(self, members)) as items:
                await _send_items(items, connection)
        except ClientDisconnected:
            raise
        except UnknownJob as error:
            return _error(f"there is no job {error}")
        except (ProtocolError, StorageError, ConfigError, RefreshFailed) as error:
            return _error(str(error))
        except Exception:
            log.exception("command failed: internal error")
            return _error("internal error of the dispatcher; see its log")
        return _line(done=True)


async def _send_items(items: Items, connection: Connection) -> None:
    """Send items in pieces of bounded size, so that a long list needs few sends and little memory."""
    piece = bytearray()
    async for item in items:
        piece += _line(item=item)
        if len(piece) >= _SEND_BYTES:
            await connection.send(bytes(piece))
            piece.clear()
    if piece:
        await connection.send(bytes(piece))


def _line(**members: Any) -> bytes:
    return bytes(dumps(Envelope(members))) + b"\n"


def _error(message: str) -> bytes:
    return _line(error=message)


# The commands.


async def _status(server: ControlServer, _: JSONObject) -> Items:
    yield Envelope(pid=os.getpid(), calls=server.dispatcher.active_calls)


async def _stop(server: ControlServer, _: JSONObject) -> Items:
    log.info("stop requested")
    server.program.stop()  # the reply is still sent
    yield Envelope(pid=os.getpid())


async def _reload(server: ControlServer, _: JSONObject) -> Items:
    yield Envelope(reloaded=True, restart_needed=await server.program.reload())


async def _reopen_logs(server: ControlServer, _: JSONObject) -> Items:
    server.program.reopen_logs()
    yield Envelope(reopened=True)


async def _list(server: ControlServer, members: JSONObject) -> Items:
    with_queue = _flag(members, "queue")
    host = required_string(members, "host") if "host" in members else None
    queue = _queue(members, "of_queue") if "of_queue" in members else None
    check(host is None or queue is None, "host, of_queue: expected one of them, got both")
    newest = _newest(members)
    async for job in server.dispatcher.list_jobs(ended=_flag(members, "all"), host=host, queue=queue, newest=newest):
        item = _job_item(job)
        if with_queue:
            item["queue"] = job.queue
        yield item


async def _info(server: ControlServer, members: JSONObject) -> Items:
    if _flag(members, "full"):
        yield Envelope(await server.dispatcher.details(required_string(members, "job")))
        return
    job = await server.dispatcher.get_job(required_string(members, "job"))
    yield Envelope(
        _job_item(job),
        queue=job.queue,
        info=job.info,
        state=job.state.value,
        timeout=job.timeout,
        max_exec_time=job.max_exec_time,
        records=job.records,
        end=None if job.end is None else encode_end(job.end),
    )


async def _cancel(server: ControlServer, members: JSONObject) -> Items:
    yield Envelope(cancelled=await server.dispatcher.cancel(required_string(members, "job"), _ADMINISTRATOR))


async def _release_slot(server: ControlServer, members: JSONObject) -> Items:
    yield Envelope(released=await server.dispatcher.release_slot(required_string(members, "job")))


async def _queue_list(server: ControlServer, members: JSONObject) -> Items:
    if "queue" not in members:
        for queue in await server.dispatcher.list_queues():
            yield Envelope(queue=queue.name, concurrency=queue.concurrency, running=queue.running, queued=queue.queued)
        return
    async for job in server.dispatcher.list_jobs(queue=_queue(members)):
        yield Envelope(_job_item(job), running=job.state is State.RUNNING)


async def _queue_cancel(server: ControlServer, members: JSONObject) -> Items:
    yield Envelope(cancelled=await server.dispatcher.cancel_queue(_queue(members), _ADMINISTRATOR))


async def _hosts_list(server: ControlServer, _: JSONObject) -> Items:
    for host in server.dispatcher.hosts():
        yield Envelope(hostname=host.hostname, address=host.address, port=host.port)


async def _hosts_refresh(server: ControlServer, _: JSONObject) -> Items:
    yield Envelope(hosts=await server.dispatcher.refresh_hosts())


async def _prune_jobs(server: ControlServer, members: JSONObject) -> Items:
    age = member_value(members, "age") if "age" in members else server.dispatcher.config.max_age_seconds
    check(age == 0 or is_seconds(age), f"age: expected a number of seconds, got {age!r}")
    yield Envelope(pruned=await server.dispatcher.prune(age))


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its function, and its keys beside ``command``."""

    run: Callable[[ControlServer, JSONObject], Items]
    options: tuple[str, ...] = ()


#: All commands by name.
COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "status": Command(_status),
        "stop": Command(_stop),
        "reload": Command(_reload),
        "reopen-logs": Command(_reopen_logs),
        "list": Command(_list, ("all", "queue", "newest", "host", "of_queue")),
        "info": Command(_info, ("job", "full")),
        "cancel": Command(_cancel, ("job",)),
        "release-slot": Command(_release_slot, ("job",)),
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
    check(is_count(newest) and newest > 0, f"newest: expected a whole number of at least 1, got {newest!r}")
    return int(newest)


def _queue(members: JSONObject, key: str = "queue") -> Raw:
    check(key in members, f"{key}: missing")
    queue = members.payload(key)
    check(is_container(queue, (dict,)), f"{key}: expected an object")
    return Raw(queue)


def _job_item(job: Job) -> Envelope:
    """Return a job as it appears in every list."""
    times = (job.submitted, job.started, job.ended)
    submit, start, end = (None if moment is None else int(moment) for moment in times)
    return Envelope(
        job=job.id,
        call=Envelope(host=job.host, procedure=job.procedure, arguments=job.arguments),
        time=Envelope(submit=submit, start=start, end=end),
    )
