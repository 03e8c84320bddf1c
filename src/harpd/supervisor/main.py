"""The supervisor: it starts, watches and stops the worker processes of calls. No TLS, no event-loop library, no thread.

Theory of operation
===================

``python -m harpd.supervisor.main LIFELINE`` inherits a socket, of which the launcher has the other end, and reads its
settings, one JSON object, from stdin. It chooses an *instance id* and listens at ``supervisor-INSTANCE`` in the runtime
directory. When it can run calls, it also listens at ``supervisor``, instead of an earlier supervisor. It executes a
zygote (`harpd.worker.zygote`), which loads the procedures file and forks the workers. A reload starts a new zygote for
new calls; the old one exits after its last call. If the file cannot be loaded, the old zygote stays in use.

If the frontend runs as another user, that user has a listener of its own, in the directory ``frontend``. Of the
requests below, it accepts the link and the list of calls. Settings come from the launcher only, over the lifeline,
which is a socket pair: nobody else can send any.

A frontend opens one connection, the *link*, for all its calls; `harpd.supervisor.frames` has the format. Each call has
a channel of the link. The first frame of a channel has a header, a JSON object:

    START   {"call": ID, "procedure": NAME}, then the arguments
                                            start a connection-bound call, see `harpd.supervisor.sessions`
            ... with "resumable": {owner, secret, instance, disconnect_timeout, result_ttl, timeout, max_exec_time,
                                   received}
                                            start a resumable call, see `harpd.supervisor.sessions`
    ATTACH  {"attach": ID, "owner": ..., "secret": ..., "since": NUMBER}
                                            attach to a resumable call

START may have "caller", an object for `harpd.proc.caller`, and "secrets", JSON pointers to values of the arguments
whose texts are masked in the log.
START has the "user" whose password the frontend has checked; the supervisor checks the rights of this user.

Both may have "keep_alive": SECONDS, which the acknowledgement repeats. START may have "authentication": SECONDS, the
duration of the password check, which exit info repeats. The supervisor sends the lines for the client, see
docs/protocol.md. A connection with another first line receives one line:

    {"report": [...]}                           {"ok": true}: failed logins, see `harpd.supervisor.audit`
    {"calls": OWNER}                            the list of the owner's resumable calls
    {"metrics": true}                           {"metrics": {...}}, see `harpd.control.metrics`
    {"control": "status"}                       {"calls": N, "resumable": N, "supervisor": PID, "instance": NAME,
                                                 "accepting": BOOL, "zygote": PID, "procedures": [NAME]}
    {"control": "reload"}                       {"ok": true}, once the new zygote is in use; or {"error": MESSAGE}
    {"control": "drain"} or "resume"            {"ok": true}; new calls are rejected, or accepted again
    {"control": "retire"}                       {"ok": true}; it accepts no new calls and exits after its last one
    {"control": "shutdown"}                     {"ok": true}, once every call has ended with the error shutdown

Over the lifeline, a supervisor sends its instance id when it is active, and ``reload`` between line feeds when it has
received this request. The launcher reads the configuration again, and replies with the settings or {"error": MESSAGE}.
When its launcher closes the lifeline, it continues while it has calls if it has the setting `outlive`. Without it, the
runtime directory is temporary, and no other program could find the supervisor: it stops all calls and exits.

`harpd.config.loaded.SupervisorConfig.supervisor_settings` returns the settings. A call has the settings of its start.
`descriptors` is the limit of open files for calls; absent: this process's own at its start. The only secrets that the
supervisor has are the owners and secrets of calls.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, NoReturn

from harp import __version__
from harp.protocol.ends import Failed
from harp.protocol.harpd import encode_message
from harp.protocol.json_text import JSONObject, Raw, dumps, loads
from harp.protocol.lines import LineBuffer
from harp.protocol.schema import ProtocolError, check, required_string
from harp_daemon import logs
from harp_daemon.audit import AuditError
from harp_daemon.process import tune_memory
from harp_daemon.secret_values import texts_at
from harp_daemon.time_slices import take_short_slices
from harpd.auth.rights import UserRights
from harpd.supervisor.call import Call, CallContext, StopReason
from harpd.supervisor.dynamic_uids import NoFreeUid
from harpd.supervisor.event_loop import READ, EventLoop
from harpd.supervisor.fair_shares import Account
from harpd.supervisor.frames import VERSION
from harpd.supervisor.link import Link, LinkChannel, Links
from harpd.supervisor.listener import FinalReplies, Listener
from harpd.supervisor.registry import CallRegistry, read_seconds, read_texts
from harpd.supervisor.sessions import BoundSession, ResumableSession
from harpd.supervisor.spool import GUARANTEED_BYTES
from harpd.supervisor.state_files import CALL_ID
from harpd.supervisor.worker_process import OutputCollector
from harpd.supervisor.zygote_client import ZygoteClient

log = logging.getLogger("harpd.supervisor")

_READ_SIZE = 1 << 16
_DEFAULT_REQUEST_LINE, _DEFAULT_REQUEST_MEMORY = 16 * 1024 * 1024, 256 * 1024 * 1024
_RETAINED_BYTES, _MAPPED_BYTES = 16 * 1024 * 1024, 8 * 1024 * 1024

#: The most bytes of the settings that a launcher sends.
_MAX_SETTINGS_BYTES = 16 * 1024 * 1024
#: Seconds between two checks for dead supervisors; and while orphaned processes are dying, or the exit is near.
_CHECK_INTERVAL, _BUSY_CHECK_INTERVAL = 1.0, 0.05
#: Seconds until a dead zygote is started again.
_ZYGOTE_RESTART_DELAY = 1.0
#: At shutdown, seconds in which frontends may still read the last output of calls.
_FLUSH_TIMEOUT = 2.0
#: Seconds until the exit after all processes of calls were killed. The launcher waits 1 s longer.
_KILL_TIMEOUT = 2.0
#: Seconds after which a supervisor without calls and launcher exits.
_IDLE_EXIT_DELAY = 10.0
#: Most characters of a user name or a procedure name in the log.
_MAX_LOGGED_NAME = 64
#: The descriptor limit divided by this number is how many pipes of ended calls may stay open.
_RELEASED_PIPES_DIVISOR = 8


class Supervisor:
    """All calls of one process. The module's docstring describes the lifeline and the settings."""

    def __init__(self, loop: EventLoop, lifeline: socket.socket, settings: Mapping[str, Any]) -> None:
        self._loop = loop
        self._instance = secrets.token_hex(8)
        self._started_at = round(time.time(), 3)
        self._context = CallContext(loop, self._instance, settings)
        self._registry = CallRegistry(self._context)
        self._links = Links()
        self._replies = FinalReplies(loop)
        self._lifeline = lifeline
        self._settings_lines = LineBuffer(_MAX_SETTINGS_BYTES)
        self._reloads: deque[Callable[[dict[str, Any]], None]] = deque()  # replies to those that wait for settings
        max_released_pipes = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _RELEASED_PIPES_DIVISOR
        self._output = OutputCollector(loop, max_released_pipes, _output_limits(settings))
        self._zygote: ZygoteClient | None = None
        self._loading: ZygoteClient | None = None
        self._accepting = self._draining = self._retired = False
        self._idle_exit_at = math.inf  # the time from which on this process exits if it has no calls
        self._kill_at = self._exit_at = self._flush_until = 0.0  # during the shutdown: the latest times of its end
        self._shutdown_replies: list[Callable[[], None]] = []
        self._files_are_missing = False
        loop.watch(lifeline.fileno(), READ, self._on_lifeline)
        directory, frontend = settings["runtime_directory"], settings.get("frontend")
        self._listeners = [Listener(loop, directory, self._instance, self._handle_request)]
        self._frontend: tuple[int, int] | None = None if frontend is None else tuple(frontend)
        if self._frontend is not None:
            calls = Listener(loop, directory, self._instance, self._handle_call_request, self._frontend)
            self._listeners.append(calls)
        self._check_repeatedly()
        self._load(settings, self._on_first_load)

    def _check_repeatedly(self) -> None:
        """Clean up orphans, because another supervisor may die at any time; exit if that is due."""
        is_busy = self._retired
        if self._restore_files():
            is_busy |= self._registry.clean_up_orphans()
        if self._accepting and not all(listener.is_active for listener in self._listeners):
            self._retire()  # the launcher did not find the socket, which had been removed
        self._exit_if_idle()
        self._loop.call_later(_BUSY_CHECK_INTERVAL if is_busy else _CHECK_INTERVAL, self._check_repeatedly)

    def _restore_files(self) -> bool:
        """Create sockets and state file again if they have been removed; return whether they exist."""
        try:
            restored = [listener.restore() for listener in self._listeners]
            restored.append(self._context.state_files.restore())
        except OSError as error:
            if not self._files_are_missing:
                log.error("cannot create sockets and state file", extra={"reason": str(error)})
            self._files_are_missing = True
            return False
        if any(restored):
            log.warning("runtime directory was cleaned; files created again")
        self._files_are_missing = False
        return True

    # The zygote.

    def _load(self, settings: Mapping[str, Any], on_done: Callable[[str | None], None]) -> None:
        """Start a zygote with these settings, and use it when it has loaded. `on_done` receives None or the error."""
        if self._loading is not None:
            self._loading.abort_load("another load has begun")

        def on_loaded(error: str | None) -> None:
            self._loading = None
            needs_uids = any(procedure.has_dynamic_uid for procedure in zygote.procedures.values())
            if error is None and needs_uids and settings["dynamic_uids"] is None:
                error = "a procedure has uid='dynamic', which needs the setting dynamic_uids"
                zygote.retire()
            if error is None:
                if self._zygote is not None:
                    self._zygote.retire()
                self._zygote = zygote
                self._context.settings = settings
                self._context.rights = UserRights(settings["rights"])
                self._output.limits = _output_limits(settings)
                self._context.quota.limit = settings["spool_memory"]
                fields = {"file": settings["procedures"], "procedures": len(zygote.procedures)}
                log.info("procedures loaded", extra=fields)
                self._context.audit.record_command("loaded", file=settings["procedures"], instance=self._instance)
                if settings["default_user"] is None and os.geteuid() == 0:
                    hint = "write default_user into harpd.conf: another user, or root"
                    log.warning("procedures without uid run as root", extra={"hint": hint})
            on_done(error)

        def on_lost() -> None:
            if self._zygote is zygote:
                self._zygote = None
                self._loop.call_later(_ZYGOTE_RESTART_DELAY, self._restart_zygote)

        try:
            zygote = self._loading = ZygoteClient(settings, self._output, on_loaded, on_lost)
        except OSError as error:
            on_done(f"cannot create a process: {error.strerror}")

    def _on_first_load(self, error: str | None) -> None:
        if error is not None:
            log.error("cannot load procedures file", extra={"reason": error})
            self._close_listeners()
            logs.flush()
            os._exit(1)
        if not self._context.shutting_down and not self._retired:
            self._restore_files()  # they may have been removed during the load
            for listener in reversed(self._listeners):  # others look at the first one
                listener.become_active()
            self._accepting = True
            with contextlib.suppress(OSError):  # the launcher has died
                self._lifeline.send(self._instance.encode())

    def _restart_zygote(self) -> None:
        def on_done(error: str | None) -> None:
            if error is not None:
                log.error("cannot load procedures file", extra={"reason": error})
                self._loop.call_later(_ZYGOTE_RESTART_DELAY, self._restart_zygote)

        if self._zygote is None:
            self._load(self._context.settings, on_done)

    # Calls.

    def _handle_request(self, connection: socket.socket, request: JSONObject, received: bytes) -> None:
        """Handle any request: the peer is root, or has the user of this process."""
        if "control" in request:
            self._handle_control(connection, request)
        else:
            self._handle_call_request(connection, request, received)

    def _handle_call_request(self, connection: socket.socket, request: JSONObject, received: bytes) -> None:
        """Handle a request of a frontend."""
        if "link" in request:
            version = request.value("link")
            check(version == VERSION, f"link: expected version {VERSION}, got {version!r}")
            limits = self._context.settings["request_line"], self._context.settings["request_memory"]
            write_audit = self._context.audit.write
            link = Link(self._loop, connection, limits, self._on_start, self._registry.attach, self._links, write_audit)
            link.receive(received)
        elif "report" in request:
            self._context.audit.record_reports(request.value("report"))
            self._replies.send(connection, b'{"ok":true}\n')
        elif "metrics" in request:
            self._replies.send(connection, dumps({"metrics": self._measure()}) + b"\n")
        else:
            self._replies.send(connection, self._registry.list_calls(required_string(request, "calls")))

    def _measure(self) -> dict[str, Any]:
        """Return the numbers for `harpd.control.metrics`."""
        context, zygote = self._context, self._zygote
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "pid": os.getpid(),
            "version": __version__,
            "started_at": self._started_at,
            "accepting": self._accepting and not self._draining,
            "calls": len(context.calls),
            "calls_limit": context.settings["max_calls"],
            "resumable": len(self._registry),
            "started": context.started,
            "ended": context.ended,
            "rejected": context.rejected,
            "spool_bytes": context.quota.used,
            "spool_limit_bytes": context.quota.limit,
            "workers": zygote.count_waiting() if zygote is not None else {},
            "procedures": len(zygote.procedures) if zygote is not None else 0,
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 6),
        }

    def _on_start(self, channel: LinkChannel, header: Mapping[str, Any], arguments: Raw) -> None:
        call_id, name, user = read_texts({"user": "", **header}, "call", "procedure", "user")
        if not CALL_ID.fullmatch(call_id):
            raise ProtocolError(f"call: expected a UUID, got {call_id!r}")
        if arguments[:1] not in (b"[", b"{") or arguments.find(b"\n") >= 0:
            raise ProtocolError("arguments: expected an array or an object")
        authentication = read_seconds(header, "authentication")
        caller = header.get("caller")
        if not isinstance(caller, (dict, NoneType)):
            raise ProtocolError("caller: expected an object")
        if caller is not None:
            caller = {**caller, "user": user}
        secrets = header.get("secrets", [])
        if not isinstance(secrets, list) or not all(isinstance(pointer, str) for pointer in secrets):
            raise ProtocolError("secrets: expected an array of JSON pointers")
        texts = texts_at(arguments, secrets) if secrets else None
        caller_text = None if caller is None else dumps(caller)  # it may fail, and then there must be no call yet
        audit = self._context.audit
        call = audit.check_room() or self._create_call(channel, call_id, name, user, header)
        audit.record_start(call_id, name, header, arguments, call if isinstance(call, Failed) else None)
        if isinstance(call, Failed):
            self._context.rejected[call.type] += 1
            channel.reject(encode_message(call))
        else:
            self._context.started += 1
            call.start(arguments, authentication, caller_text, texts)

    def _create_call(
        self, channel: LinkChannel, call_id: str, name: str, user: str, header: Mapping[str, Any]
    ) -> Call | Failed:
        """Create a call, with a worker and a session; or return why it is rejected."""
        requested, keep_alive = header.get("resumable"), read_seconds(header, "keep_alive")
        if not isinstance(requested, (dict, NoneType)):
            raise ProtocolError("resumable: expected an object")
        zygote, context = self._zygote, self._context
        rejection = self._check_start(call_id, name, user, resumable=requested is not None)
        if rejection is not None:
            return rejection
        assert zygote is not None
        streaming = zygote.procedures[name].streaming
        session: BoundSession | ResumableSession | Failed
        if requested is None:
            buffer_size = min(context.settings["spool"], GUARANTEED_BYTES)
            session = BoundSession(channel, Account(user, ""), streaming, keep_alive, buffer_size)
        else:
            session = self._registry.create_session(call_id, user, requested, streaming)
            if isinstance(session, Failed):
                return session
        zygote.limit_idle(context.settings["max_calls"] - len(context.calls) - 1)
        uid: int | None = None
        try:
            if zygote.procedures[name].has_dynamic_uid:
                uid = context.dynamic_uids.allocate(*context.settings["dynamic_uids"])
            context.state_files.reserve(call_id)
            call = context.calls[call_id] = session.call = Call(context, zygote, call_id, name, session, uid)
        except (OSError, NoFreeUid) as error:
            if isinstance(session, ResumableSession):
                session.discard()
            context.state_files.remove(call_id)
            if uid is not None:
                context.dynamic_uids.release(uid)
            if isinstance(error, NoFreeUid):
                return Failed("too_many_calls", "all user ids of dynamic_uids are in use on this host")
            log.error("cannot start call", extra={"call": call_id, "reason": error.strerror})
            return Failed("system_error", f"cannot create a process: {error.strerror}")
        if isinstance(session, ResumableSession):
            session.attach(channel, 0, keep_alive)
        return call

    def _check_start(self, call_id: str, name: str, user: str, resumable: bool) -> Failed | None:
        if self._retired and resumable:
            return self._registry.wrong_instance()
        if self._context.shutting_down or self._retired:
            return Failed("shutdown", "harpd is shutting down")
        if self._draining:
            return Failed("shutdown", "harpd is draining and accepts no new calls")
        if self._zygote is None:
            return Failed("procedure_loading_error", "harpd is loading the procedures file again")
        if not self._context.rights.may_call(user, name):  # first, so that it does not learn which procedures exist
            return _deny_call(call_id, name, user, "its rights in the configuration of harpd")
        if name not in self._zygote.procedures:
            return Failed("no_such_procedure", f"there is no procedure {name!r}", {"procedure": name})
        users = self._zygote.procedures[name].users
        if users is not None and user not in users:
            return _deny_call(call_id, name, user, "the option users of the procedure")
        if self._frontend is not None and self._zygote.procedures[name].uid == self._frontend[0]:
            # It could connect to this process as the frontend does, and start every procedure.
            return Failed("system_error", f"procedure {name!r} would run as the user of the frontend; set another uid")
        limit = self._context.settings["max_calls"]
        if len(self._context.calls) >= limit:
            return Failed("too_many_calls", f"{limit} calls are running on this host, the limit max_calls")
        if call_id in self._context.calls:
            return Failed("call_refused", "a call with this id is running")
        return None

    # Control.

    def _handle_control(self, connection: socket.socket, request: JSONObject) -> None:
        def reply(message: dict[str, Any]) -> None:
            self._replies.send(connection, dumps(message) + b"\n")

        command = request.value("control")
        if command in ("reload", "drain", "resume", "retire", "shutdown"):
            self._context.audit.record_command(str(command))
        match command:
            case "status":
                zygote = self._zygote
                status = {
                    "calls": len(self._context.calls),
                    "resumable": len(self._registry),
                    "supervisor": os.getpid(),
                    "instance": self._instance,
                    "accepting": self._accepting and not self._draining,
                    "zygote": zygote.pid if zygote else None,
                    "procedures": sorted(zygote.procedures) if zygote else [],
                }
                reply(status)
            case "reload":
                self._request_settings(reply)
            case "drain" | "resume":
                self._draining = command == "drain"
                log.info("rejecting new calls" if self._draining else "accepting new calls again")
                reply({"ok": True})
            case "retire":
                self._retire()
                reply({"ok": True})
                self._exit_if_idle()
            case "shutdown":
                self._shutdown_replies.append(lambda: reply({"ok": True}))
                self._shut_down()
            case other:
                reply({"error": f"unknown control request {other!r}"})

    def _retire(self) -> None:
        counts = {"calls": len(self._context.calls), "resumable": len(self._registry)}
        log.info("supervisor retires", extra=counts)
        self._retired, self._accepting = True, False
        for listener in self._listeners:
            listener.retire()
        if self._zygote is not None:
            self._zygote.retire()
            self._zygote = None

    def _request_settings(self, reply: Callable[[dict[str, Any]], None]) -> None:
        """Have the launcher read the configuration; load the settings that it sends, then reply."""
        try:
            self._lifeline.send(b"\nreload\n")
        except OSError:  # it is closed, or full
            reply({"error": "the launcher of this supervisor has exited; start harpd again"})
        else:
            self._reloads.append(reply)

    def _on_settings(self, received: dict[str, Any]) -> None:
        reply = self._reloads.popleft()
        if "error" in received:
            reply(received)
            return
        kept = ("descriptors", "request_line", "request_memory")
        settings = {key: self._context.settings[key] for key in kept} | received
        self._load(settings, lambda error: reply(_finish_reload(settings, error)))

    # The end.

    def _on_lifeline(self) -> None:
        """Handle settings from the launcher, or that it has closed the lifeline."""
        try:
            data = self._lifeline.recv(_READ_SIZE)
        except OSError:
            data = b""
        if data:
            for line in self._settings_lines.feed(data):
                self._on_settings(loads(line))
            return
        self._loop.unwatch(self._lifeline.fileno())
        self._lifeline.close()
        while self._reloads:
            self._reloads.popleft()({"error": "the launcher of this supervisor has exited; start harpd again"})
        if self._context.shutting_down:
            return
        if self._context.settings["outlive"]:
            log.warning("launcher exited; resumable calls continue")
            self._idle_exit_at = self._loop.now() + _IDLE_EXIT_DELAY
        else:
            log.error("frontend died; stopping its calls")
            self._shut_down()

    def _exit_if_idle(self) -> None:
        idle = not (self._context.calls or self._registry or any(link.has_channels for link in self._links))
        if idle and not self._context.shutting_down and (self._retired or self._loop.now() >= self._idle_exit_at):
            self._retired = True  # a resumable start that arrives now is retried in the next supervisor
            self._shut_down()

    def _shut_down(self) -> None:
        if not self._context.shutting_down:
            self._context.shutting_down = True
            for call in list(self._context.calls.values()):
                call.stop(StopReason.SHUTDOWN)
            self._flush_until = self._loop.now() + _FLUSH_TIMEOUT
            self._kill_at = self._flush_until + 2 * self._context.settings["kill_grace"]
            # Exit in any case: other processes may not be able to kill it. The next supervisor kills survivors.
            self._exit_at = self._kill_at + _KILL_TIMEOUT
            self._exit_when_done()

    def _exit_when_done(self) -> None:
        """Exit once all calls have ended and frontends have read their output, or at a deadline."""
        now, calls = self._loop.now(), self._context.calls
        if calls:
            self._flush_until = now + _FLUSH_TIMEOUT
            if now >= self._kill_at:  # on a busy machine, the steps of many terminations are late
                self._kill_at = self._exit_at
                for call in calls.values():
                    call.kill()
        unread = any(link.has_channels for link in self._links) and now < self._flush_until
        if (calls or unread) and now < self._exit_at:
            self._loop.call_later(_BUSY_CHECK_INTERVAL, self._exit_when_done)
            return
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote = None
        for reply in self._shutdown_replies:
            reply()
        for link in list(self._links):
            link.finish(_FLUSH_TIMEOUT)
        self._close_listeners()
        self._context.state_files.close()
        self._context.dynamic_uids.close()
        self._context.audit.record_command("stop", instance=self._instance)
        self._context.audit.close()
        self._loop.stop()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()


def _deny_call(call_id: str, name: str, user: str, cause: str) -> Failed:
    """Log that a user has called a procedure without the right to; return the error. `cause`: what denies it."""
    fields = {"call": call_id, "procedure": name[:_MAX_LOGGED_NAME], "user": user[:_MAX_LOGGED_NAME], "cause": cause}
    log.warning("call denied", extra=fields)
    message = f"user {user!r} may not call {name!r} on this host, because of {cause}"
    return Failed("access_denied", message, {"procedure": name})


def _output_limits(settings: Mapping[str, Any]) -> tuple[int, int]:
    return settings["output_lines"], settings["output_bytes"]


def _finish_reload(settings: Mapping[str, Any], error: str | None) -> dict[str, Any]:
    """Return the reply to a reload. The log is configured last, so that a failed reload has no effect."""
    if error is not None:
        return {"error": error}
    try:
        logs.configure(name="harpd", **settings["logging"])
    except (ValueError, OSError) as failure:  # unlikely: the frontend has tried the same settings
        log.error("cannot configure log", extra={"reason": str(failure)})
    return {"ok": True}


def main() -> NoReturn:
    (lifeline,) = map(int, sys.argv[1:])
    settings = loads(sys.stdin.buffer.read())
    logs.configure(name="harpd", **settings["logging"])
    sys.setrecursionlimit(10_000)  # each level of a nested payload needs one frame or more
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # zygotes are not waited for: their sockets show their ends
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the launcher handles signals to all of harpd
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(lifeline, False)
    tune_memory(_RETAINED_BYTES, _MAPPED_BYTES)
    take_short_slices()
    loop = EventLoop()
    logs.write_per_turn(loop.call_soon)
    defaults = {  # for a launcher of an earlier version
        "descriptors": soft,
        "request_line": _DEFAULT_REQUEST_LINE,
        "request_memory": _DEFAULT_REQUEST_MEMORY,
    }
    try:
        Supervisor(loop, socket.socket(fileno=lifeline), defaults | settings)
    except AuditError as error:
        log.error("cannot open audit file", extra={"reason": str(error)})
        logs.flush()
        os._exit(1)
    loop.run()
    logs.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
