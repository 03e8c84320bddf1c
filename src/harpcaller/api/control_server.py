"""The control API for administrators, over a Unix socket that only the daemon's user can open.

`harpcaller.api.control_client` is the client and describes the protocol. No reply contains credentials.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple, TypeAlias

from harp.protocol import schema
from harp.protocol.json_text import Envelope, JSONObject, Raw, dumps
from harp.protocol.schema import ProtocolError, check, encode_object, member_value, required_string
from harp_daemon import logs
from harp_daemon.settings import ConfigError
from harp_daemon.sliced_json import decode_slices
from harp_daemon.sockets import Listener
from harpcaller.access import AccessDenied
from harpcaller.access.client import LOCAL_ADMINISTRATOR, Client
from harpcaller.access.identities import Identities
from harpcaller.access.policy import Action
from harpcaller.access.tokens import TokenError, TokenStore, add_token, describe_token, revoke_token
from harpcaller.acting import ActingAs
from harpcaller.api.connection import Connection, Server
from harpcaller.audit import ALLOWED, FAILED
from harpcaller.dispatcher import Dispatcher
from harpcaller.health import Health
from harpcaller.hosts.registry import RefreshFailed
from harpcaller.model.jobs import Job, State
from harpcaller.pruner import PruneRefused
from harpcaller.store import StorageError, UnknownJob

log = logging.getLogger(__name__)

MAX_CONTROL_CONNECTIONS = 64  #: Maximum number of connections.
_MAX_REQUEST = 16 * 1024 * 1024
_IDLE_TIMEOUT = 30.0
_MAX_SECONDS = 1e11  # 3,000 years, so that sums with times are times
_SEND_BYTES = 64 * 1024  # bytes of a list that are sent together

Items: TypeAlias = AsyncGenerator[Envelope, None]


class ControlServer(Server):
    """The server of the connections to the control socket.

    `stop` stops the daemon. `reload` reads the configuration again and returns the changed keys that need a restart, or
    raises `ConfigError`. `identities` returns the proofs that the daemon accepts, for the commands about tokens.
    `login_link` returns a one-time link to the console for a name, roles, and a number of seconds or None; it raises
    ValueError. None: there is no HTTP API.
    `health` has the checks of the daemon.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        stop: Callable[[], None],
        reload: Callable[[], Awaitable[list[str]]],
        identities: Callable[[], Identities | None] = lambda: None,
        login_link: Callable[[str, tuple[str, ...], float | None], str] | None = None,
        health: Health | None = None,
    ) -> None:
        rejection = _line(error="too many connections to the control socket")
        memory = MAX_CONTROL_CONNECTIONS * _MAX_REQUEST
        super().__init__(lambda: MAX_CONTROL_CONNECTIONS, rejection, memory, lambda: memory)
        self._dispatcher = dispatcher
        self._stop_daemon = stop
        self._reload_daemon = reload
        self._identities = identities
        self._login_link = login_link
        self._health = health or Health(dispatcher)

    def _identify(self, accepted: socket.socket, peer: str, listener: Listener) -> Client:
        return LOCAL_ADMINISTRATOR

    def _request_limits(self) -> tuple[int, float]:
        return _MAX_REQUEST, _IDLE_TIMEOUT

    def _write_timeout(self) -> float:
        return _IDLE_TIMEOUT

    def _on_request(self, connection: Connection, line: bytes) -> None:
        connection.run(self._run_command(connection, line))

    def _on_failed(self, connection: Connection, error: BaseException) -> None:
        match error:
            case UnknownJob():
                message = f"there is no job {error}"
            case (
                ProtocolError()
                | AccessDenied()
                | StorageError()
                | ConfigError()
                | RefreshFailed()
                | PruneRefused()
                | TokenError()
            ):
                message = str(error)
            case _:
                log.error("command failed: internal error", exc_info=error)
                message = "internal error of the dispatcher; see its log"
        connection.write(_line(error=message))
        connection.close()

    async def _run_command(self, connection: Connection, line: bytes) -> None:
        members = schema.decode_object(line, decode_slices)
        name = required_string(members, "command")
        check(name in _COMMANDS, f"command: expected one of {', '.join(_COMMANDS)}, got {name!r}")
        run, required, optional = _COMMANDS[name]
        schema.reject_unknown_keys(members, ("command", *required, *optional))
        options = {key: read(members, key) for key, read in required.items()}
        options |= {key: read(members, key) for key, read in optional.items() if key in members}
        log.debug("command", extra={"command": name, "client": connection.client.peer})
        piece = bytearray()  # of bounded size, so that a long list needs few sends and little memory
        acting = ActingAs(self._dispatcher, connection.client)
        try:
            async with aclosing(run(self, acting, **options)) as items:
                async for item in items:
                    piece += _line(item=item)
                    if len(piece) >= _SEND_BYTES:
                        await connection.send(bytes(piece))
                        piece.clear()
        except Exception as error:
            self._count(name, "error")
            if name in _RECORDED and not isinstance(error, AccessDenied):
                await self._record(connection.client, name, FAILED, options, reason=str(error))
            raise
        self._count(name, "ok")
        if name in _RECORDED:
            await self._record(connection.client, name, ALLOWED, options)
        connection.write(bytes(piece) + _line(done=True))
        connection.close()

    def _count(self, name: str, outcome: str) -> None:
        if self._dispatcher.metrics is not None:
            self._dispatcher.metrics.count_request("control", name.replace("-", "_"), outcome)

    async def _record(
        self, client: Client, name: str, decision: str, options: Mapping[str, Any], reason: str | None = None
    ) -> None:
        fields = {"target" if key == "name" else key: value for key, value in options.items()}
        await self._dispatcher.audit.record(client, name, decision, **fields, reason=reason)

    # The commands.

    async def _status(self, acting: ActingAs) -> Items:
        acting.require(Action.ADMIN)
        registry = self._dispatcher.registry.describe()
        yield Envelope(
            pid=os.getpid(),
            store=str(self._dispatcher.store.path),
            calls=self._dispatcher.active_calls,
            access=self._dispatcher.access.source.describe(),
            hosts_registry=registry,
            checks=[Envelope(check._asdict()) for check in await self._health.check()],
        )

    async def _stop(self, acting: ActingAs) -> Items:
        acting.require(Action.ADMIN)
        log.info("stop requested")
        self._stop_daemon()  # the reply is still sent
        yield Envelope(pid=os.getpid())

    async def _reload(self, acting: ActingAs) -> Items:
        acting.require(Action.ADMIN)
        restart_needed = await self._reload_daemon()
        yield Envelope(reloaded=True, restart_needed=restart_needed, problems=self._dispatcher.registry.problems())

    async def _reopen_logs(self, acting: ActingAs) -> Items:
        acting.require(Action.ADMIN)
        logs.reopen()
        self._dispatcher.audit.reopen()
        yield Envelope(reopened=True)

    async def _list(
        self,
        acting: ActingAs,
        all: bool = False,
        queue: bool = False,
        host: str | None = None,
        of_queue: Raw | None = None,
        newest: int | None = None,
    ) -> Items:
        check(host is None or of_queue is None, "host, of_queue: expected one of them, got both")
        async for job in acting.list_jobs(all, host, of_queue, newest):
            yield Envelope(_job_item(job), queue=job.queue) if queue else _job_item(job)

    async def _info(self, acting: ActingAs, job: str, full: bool = False) -> Items:
        if full:
            yield Envelope(await acting.details(job))
            return
        stored = await acting.get_job(job)
        yield Envelope(
            _job_item(stored),
            queue=stored.queue,
            info=stored.info,
            state=stored.state.value,
            timeout=stored.timeout,
            max_exec_time=stored.max_exec_time,
            records=stored.records,
            end=None if stored.end is None else encode_object(stored.end),
        )

    async def _cancel(self, acting: ActingAs, job: str) -> Items:
        yield Envelope(cancelled=await acting.cancel(job))

    async def _release_slot(self, acting: ActingAs, job: str) -> Items:
        yield Envelope(released=await acting.release_slot(job))

    async def _queue_list(self, acting: ActingAs, queue: Raw | None = None) -> Items:
        if queue is None:
            for lane in await acting.list_queues():
                yield Envelope(queue=lane.name, concurrency=lane.concurrency, running=lane.running, queued=lane.queued)
            return
        async for job in acting.list_jobs(queue=queue):
            yield Envelope(_job_item(job), running=job.state is State.RUNNING)

    async def _queue_cancel(self, acting: ActingAs, queue: Raw) -> Items:
        yield Envelope(cancelled=await acting.cancel_queue(queue))

    async def _hosts_list(self, acting: ActingAs, full: bool = False) -> Items:
        registry = self._dispatcher.registry
        sources = registry.describe()
        for host in acting.list_hosts():
            item = Envelope(hostname=host.hostname, address=host.address, port=host.port)
            if full:
                source = sources[registry.source_of(host.hostname)]
                item |= {key: source[key] for key in ("source", "age", "error")}
            yield item

    async def _hosts_refresh(self, acting: ActingAs, force: bool = False, diff: bool = False) -> Items:
        check(not (force and diff), "force, diff: expected one of them, got both")
        registry = self._dispatcher.registry
        if diff:
            for change, host in await acting.compare_hosts():
                yield Envelope(change=change, hostname=host.hostname, address=host.address, port=host.port)
        else:
            hosts = await acting.refresh_hosts(force)
            yield Envelope(hosts=hosts, problems=registry.problems())

    async def _prune_jobs(self, acting: ActingAs, age: float | None = None, trust_clock: bool = False) -> Items:
        yield Envelope(pruned=await acting.prune(age, trust_clock))

    async def _token_add(
        self, acting: ActingAs, name: str, roles: list[str] | None = None, expires: float | None = None
    ) -> Items:
        acting.require(Action.ADMIN)
        store = self._tokens()
        try:
            text, token = await asyncio.to_thread(add_token, store.file, name, roles or (), expires)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        store.refresh()
        log.info("token added", extra={"token": name, "roles": list(token.roles)})
        yield Envelope(token=text, **describe_token(token))

    async def _token_list(self, acting: ActingAs) -> Items:
        acting.require(Action.ADMIN)
        store = self._tokens()
        store.refresh()
        for token in store.list():
            yield Envelope(describe_token(token))

    async def _token_revoke(self, acting: ActingAs, name: str) -> Items:
        acting.require(Action.ADMIN)
        store = self._tokens()
        revoked = await asyncio.to_thread(revoke_token, store.file, name)
        store.refresh()
        if revoked:
            log.info("token revoked", extra={"token": name})
        yield Envelope(revoked=revoked)

    async def _web_login(
        self, acting: ActingAs, name: str, roles: list[str] | None = None, seconds: float | None = None
    ) -> Items:
        acting.require(Action.ADMIN)
        if self._login_link is None:
            raise ProtocolError("there is no HTTP API: section http is not set; set it and restart")
        login = Client((f"user:{name}",), "http", "", roles=tuple(roles or ()), needs_role=True)
        policy = self._dispatcher.access.policy_of(login)
        if not any(policy.may_ever(login, action) for action in Action):
            who = f"user:{name}" + "".join(f", role:{role}" for role in login.roles)
            where = (
                self._dispatcher.config.access_file or "without access_file, the roles are viewer, operator and admin"
            )
            raise ProtocolError(f"no rule allows anything to {who}: {where}")
        try:
            url = self._login_link(name, login.roles, seconds)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        log.info("login link made", extra={"principal": login.owner, "roles": list(login.roles)})
        yield Envelope(url=url)

    def _tokens(self) -> TokenStore:
        identities = self._identities()
        if identities is None or identities.tokens is None:
            raise ProtocolError("tokens_file is not set; set it and reload")
        return identities.tokens


def _line(**members: Any) -> bytes:
    return bytes(dumps(Envelope(members))) + b"\n"


def _job_item(job: Job) -> Envelope:
    """Return a job as it appears in every list."""
    submit, start, end = (None if time is None else int(time) for time in (job.submitted, job.started, job.ended))
    return Envelope(
        job=job.id,
        call=Envelope(host=job.host, procedure=job.procedure, arguments=job.arguments),
        time=Envelope(submit=submit, start=start, end=end),
    )


# The options of commands: each function returns a checked value from the request.


def _flag(members: JSONObject, key: str) -> bool:
    flag = member_value(members, key)
    check(isinstance(flag, bool), f"{key}: expected true or false")
    return bool(flag)


def _count(members: JSONObject, key: str) -> int:
    count = member_value(members, key)
    check(schema.is_count(count) and count > 0, f"{key}: expected a whole number of at least 1, got {count!r}")
    return int(count)


def _seconds(members: JSONObject, key: str) -> Any:
    seconds = member_value(members, key)
    check(schema.is_seconds(seconds), f"{key}: expected a number of seconds above 0, got {seconds!r}")
    check(seconds < _MAX_SECONDS, f"{key}: expected fewer than {_MAX_SECONDS:.0f} seconds")
    return seconds


def _names(members: JSONObject, key: str) -> list[str]:
    names = member_value(members, key)
    is_valid = isinstance(names, list) and all(isinstance(name, str) for name in names)
    check(is_valid, f"{key}: expected an array of strings")
    return list(names)


def _queue(members: JSONObject, key: str) -> Raw:
    check(key in members, f"{key}: missing")
    queue = members.payload(key)
    check(schema.is_object(queue), f"{key}: expected an object")
    return Raw(queue)


class Command(NamedTuple):
    """A command: its function, and the functions that read its keys other than ``command``."""

    run: Callable[..., Items]
    required: Mapping[str, Callable[[JSONObject, str], Any]] = {}
    optional: Mapping[str, Callable[[JSONObject, str], Any]] = {}


#: The commands that change something. `harpcaller.acting` records the cancellations.
_RECORDED = (
    *("stop", "reload", "reopen-logs", "release-slot", "hosts-refresh", "prune-jobs"),
    *("token-add", "token-revoke", "web-login"),
)
_LIST_OPTIONS = {"all": _flag, "queue": _flag, "newest": _count, "host": required_string, "of_queue": _queue}
_COMMANDS = {
    "status": Command(ControlServer._status),
    "stop": Command(ControlServer._stop),
    "reload": Command(ControlServer._reload),
    "reopen-logs": Command(ControlServer._reopen_logs),
    "list": Command(ControlServer._list, optional=_LIST_OPTIONS),
    "info": Command(ControlServer._info, {"job": required_string}, {"full": _flag}),
    "cancel": Command(ControlServer._cancel, {"job": required_string}),
    "release-slot": Command(ControlServer._release_slot, {"job": required_string}),
    "queue-list": Command(ControlServer._queue_list, optional={"queue": _queue}),
    "queue-cancel": Command(ControlServer._queue_cancel, {"queue": _queue}),
    "hosts-list": Command(ControlServer._hosts_list, optional={"full": _flag}),
    "hosts-refresh": Command(ControlServer._hosts_refresh, optional={"force": _flag, "diff": _flag}),
    "token-add": Command(ControlServer._token_add, {"name": required_string}, {"roles": _names, "expires": _seconds}),
    "token-list": Command(ControlServer._token_list),
    "token-revoke": Command(ControlServer._token_revoke, {"name": required_string}),
    "web-login": Command(ControlServer._web_login, {"name": required_string}, {"roles": _names, "seconds": _seconds}),
    "prune-jobs": Command(ControlServer._prune_jobs, optional={"age": _seconds, "trust_clock": _flag}),
}
