"""The warden: starts, watches and ends call processes. Lean: no TLS, no event-loop library, no thread.

Theory of operation
===================

``python -m harpd.supervisor.main LIFELINE`` inherits a socket whose other end its keeper holds, and reads its
settings, one
JSON object, from stdin. It gives itself a name, its *incarnation*, and listens at ``warden-INCARNATION`` in the
runtime directory; once it can take calls, at ``warden`` too, in the place of an earlier one. It exec's a zygote
(`harpd.worker.zygote`), which loads the procedures file and forks a process for each call. A reload is a new zygote
for new
calls; the old one retires with its last call; a file that can't be loaded changes nothing.

The gate makes one connection per call, JSON lines. The first line says what is wanted:

    {"call": ID, "procedure": NAME, "arguments": ..., "user": NAME, "peer": ADDRESS}    a tied call, see
    `harpd.supervisor.bound_session`
    ... with "resumable": {owner, secret, instance, disconnect_timeout, result_ttl, timeout, max_exec_time, received}
                                                                                         a resumable call
    {"attach": ID, "owner": ..., "secret": ..., "since": NUMBER, "user": NAME, "peer": ADDRESS}    to a kept one again
    {"calls": OWNER}                                                                               which there are

The first three may have "keep_alive": SECONDS, which the acknowledgement then repeats; the first two may have
"authentication": SECONDS, how long that took, which the exit info then repeats.

and what comes back are the lines for the client, as docs/protocol.md has them. Half-closing or closing the connection
stops a tied call; the warden closes its side only when that call's processes are gone: a close is the proof of death. A
connection whose first line has the key ``control`` gets one line back:

    {"control": "status"}                       {"calls": N, "resumable": N, "supervisor": PID, "instance": NAME,
                                                 "accepting": BOOL, "zygote": PID, "procedures": [NAME]}
    {"control": "reload", "settings": {...}}    {"ok": true} or {"error": MESSAGE}
    {"control": "drain"}, {"control": "resume"} {"ok": true}; new calls are refused, or taken again
    {"control": "retire"}                       {"ok": true}; it takes no new call ever, and ends with its last one
    {"control": "launcher"}                     {"ok": true}; the connection stays: a keeper, as at the lifeline
    {"control": "shutdown"}                     {"ok": true}, once every call has ended, with the error shutdown

When its last keeper goes, a warden whose settings say `outlive` goes on for as long as it holds calls; one whose
runtime directory is temporary, where nobody would find it again, ends all calls and itself.

The settings: `procedures` (path), `python_path` (prepend, append), `default_user`, `default_group`, `max_calls`,
`kill_grace` (seconds), `spool` and `spool_memory` (bytes that a kept call, and all calls, may have said that nobody has
stored), `disconnect_timeout` and `result_ttl` (the most seconds that may be asked for), `exit_info` (stderr,
traceback: whether), `cgroup` (directory or null), `outlive`, `runtime_directory`, `logging`. `descriptors`, the limit
of open files that calls have, may be absent: then it is the warden's own at its start. Nothing secret but the calls'
owners and secrets ever comes here.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import secrets
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from harp.protocol.ends import Failed
from harp.protocol.fields import check, is_container, required_string
from harp.protocol.harpd import encode_message
from harp.protocol.json_text import JSONObject, dumps, loads
from harpd.config import log_settings as logs
from harpd.processes.cgroup import Cgroups, delegated_cgroup
from harpd.processes.cookie import cookie_for
from harpd.processes.process_tree import CallTree, Snapshot, has_possible_escapes, take_snapshot
from harpd.supervisor.bound_session import BoundSession
from harpd.supervisor.call import Call, CallContext, StopReason
from harpd.supervisor.event_loop import READ, EventLoop
from harpd.supervisor.listener import FinalReply, Listener
from harpd.supervisor.output import OutputCollector
from harpd.supervisor.registry import CallRegistry
from harpd.supervisor.resumable_session import ResumableSession
from harpd.supervisor.spool import GUARANTEED_BYTES, SpoolQuota
from harpd.supervisor.state_files import StateDir
from harpd.supervisor.zygote_client import ZygoteClient

__all__ = ["main"]

log = logging.getLogger("harpd.supervisor")

#: Seconds between two looks for wardens that have died; and while what they have left is dying.
_SWEEP, _SWEEP_AGAIN = 1.0, 0.05
#: Seconds that a look at all processes stays good.
_LOOK_LASTS = 0.02
#: Seconds until a dead zygote is started again, and that a procedures file has to load: less than the gate waits.
_ZYGOTE_PAUSE, _LOAD = 1.0, 50.0
#: At the end, seconds in which gates may still take what calls have said before.
_LAST_WORDS = 2.0
#: Seconds after which a warden that holds no call and has no keeper ends itself.
_UNWANTED = 10.0
#: The share of descriptors that may belong to what ended calls have left running, as its output.
_LEFT_SHARE = 8
#: How many ended calls' marks are known.
_REMEMBERED = 1000
_RECURSION_LIMIT = 10_000
#: What a call's id may be: it names a file and is an entry of the environment. A UUID is what the gate gives.
_CALL_ID = re.compile(r"[0-9A-Za-z-]{1,36}")


class Supervisor:
    """All calls that one process watches."""

    def __init__(self, loop: EventLoop, lifeline: socket.socket, settings: Mapping[str, Any]) -> None:
        self._loop = loop
        self._incarnation = secrets.token_hex(8)
        self._settings = settings
        self._calls: dict[str, Call] = {}
        self._tied: set[BoundSession] = set()
        self._keepers: set[socket.socket] = set()
        self._accepting, self._draining, self._retired = False, False, False
        self._records = StateDir(Path(settings["runtime_directory"]), self._incarnation)
        self._output = OutputCollector(loop, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _LEFT_SHARE)
        self._cgroups = Cgroups(settings["cgroup"] or delegated_cgroup())
        self._memory = SpoolQuota(settings["spool_memory"])
        self._held = CallRegistry(
            loop, self._incarnation, settings, self._records, self._memory, self._sweep, self._end_if_done
        )
        self._zygote: ZygoteClient | None = None
        self._give_up: Callable[[str], None] = lambda reason: None  # the load that is under way, if there is one
        self._closing = False
        self._done: list[Callable[[], None]] = []  # who waits for the end
        self._looked_at, self._processes = 0.0, Snapshot()
        self._past = deque[bytes](maxlen=_REMEMBERED)  # marks of ended calls: they may have left services running
        self._sweep_now_and_then()
        self._keep(lifeline)
        self._reception = Listener(loop, settings["runtime_directory"], self._incarnation, self._serve)
        self._load(settings, self._on_first_loaded)

    def _sweep_now_and_then(self) -> None:
        """One may die beside us."""
        again = self._sweep()
        self._loop.call_later(_SWEEP_AGAIN if again else _SWEEP, self._sweep_now_and_then)

    def _sweep(self) -> bool:
        """End what wardens that have died left behind, and know it; whether that should be done again soon."""
        if self._closing:
            return False
        swept = self._records.clean_up()
        if swept.killed:
            log.warning("processes of an earlier warden's calls were killed", extra={"processes": swept.killed})
        self._held.adopt_orphans(swept.calls, swept.stop_reports)
        return swept.again

    # The zygote.

    def _load(self, settings: Mapping[str, Any], done: Callable[[str | None], None]) -> None:
        """Start a zygote with these settings; take it when it has loaded. The last request counts."""
        self._give_up("another load has begun")

        def give_up(reason: str) -> None:
            zygote.kill()
            on_loaded(reason)

        def on_loaded(fault: str | None) -> None:
            deadline.cancel()
            self._give_up = lambda reason: None
            if fault is None:
                if self._zygote is not None:
                    self._zygote.retire()
                self._zygote, self._settings = zygote, settings
                self._held.update_settings(settings)
                self._memory.limit = settings["spool_memory"]
                log.info(
                    "procedures loaded", extra={"file": settings["procedures"], "procedures": len(zygote.procedures)}
                )
            done(fault)

        def on_died() -> None:
            if self._zygote is zygote:
                self._zygote = None
                log.error("the zygote died", extra={"zygote": zygote.pid})
                self._loop.call_later(_ZYGOTE_PAUSE, self._load_again)

        def on_stuck() -> None:
            if self._zygote is zygote:
                self._zygote = None
                zygote.retire()
                self._load_again()

        try:
            zygote = ZygoteClient(self._loop, settings, on_loaded, on_died, on_stuck)
        except OSError as error:
            done(f"no process can be made: {error.strerror}")
            return
        self._give_up = give_up
        deadline = self._loop.call_later(_LOAD, lambda: give_up(f"loading took longer than {_LOAD:g} s"))

    def _on_first_loaded(self, fault: str | None) -> None:
        if fault is not None:
            log.error("the procedures file can't be loaded", extra={"reason": fault})
            self._reception.close()
            os._exit(1)
        if not self._closing and not self._retired:
            self._accepting = True
            self._reception.become_current()

    def _load_again(self) -> None:
        if self._zygote is None:
            self._load(self._settings, self._on_loaded_again)

    def _on_loaded_again(self, fault: str | None) -> None:
        if fault is not None:
            log.error("the procedures file can't be loaded", extra={"reason": fault})
            self._loop.call_later(_ZYGOTE_PAUSE, self._load_again)

    # Requests.

    def _serve(self, connection: socket.socket, request: JSONObject, behind: bytes) -> None:
        if "control" in request:
            self._control(connection, request)
        elif "calls" in request:
            FinalReply(self._loop, connection, self._held.list_calls(required_string(request, "calls")))
        elif "attach" in request:
            self._attach(connection, request, behind)
        else:
            self._start(connection, request, behind)

    def _attach(self, connection: socket.socket, request: JSONObject, behind: bytes) -> None:
        refusal = self._held.attach(connection, request, behind)
        if refusal is not None:
            FinalReply(self._loop, connection, encode_message(refusal))

    def _start(self, connection: socket.socket, request: JSONObject, behind: bytes) -> None:
        call_id, name = required_string(request, "call"), required_string(request, "procedure")
        arguments = request.payload("arguments")
        check(_CALL_ID.fullmatch(call_id) is not None, f"call: expected a UUID, got {call_id!r}")
        check(is_container(arguments, (list, dict)), "arguments: expected an array or an object")
        asked = request.nested_object("resumable") if "resumable" in request else None
        keep = request.value("keep_alive") if "keep_alive" in request else None
        authentication = request.value("authentication") if "authentication" in request else None
        failed = self._refusal(call_id, name, asked)
        if failed is None:
            assert self._zygote is not None
            if asked is None:
                failed = self._start_tied(connection, call_id, name, self._zygote, keep)
            else:
                failed = self._start_kept(connection, call_id, name, self._zygote, asked, behind, keep)
        if failed is not None:
            FinalReply(self._loop, connection, encode_message(failed))
        else:
            self._calls[call_id].send_arguments(arguments, authentication)

    def _refusal(self, call_id: str, name: str, asked: JSONObject | None) -> Failed | None:
        if self._retired and asked is not None:
            return self._held.wrong_instance()
        if self._closing or self._retired:
            return Failed("shutdown", "harpd is being stopped")
        if self._draining:
            return Failed("shutdown", "harpd takes no new calls for the moment")
        if self._zygote is None:
            return Failed("procedure_loading_error", "the procedures are being loaded again")
        if name not in self._zygote.procedures:
            return Failed("no_such_procedure", f"there is no procedure {name!r}", {"procedure": name})
        most = self._settings["max_calls"]
        if len(self._calls) >= most:
            return Failed("too_many_calls", f"{most} calls run already, which is the limit of this host")
        if call_id in self._calls:
            return Failed("call_refused", "a call of this id runs already")
        return None

    def _start_tied(
        self, connection: socket.socket, call_id: str, name: str, zygote: ZygoteClient, keep: float | None
    ) -> Failed | None:
        streaming = zygote.procedures[name].streaming
        tied = BoundSession(
            self._loop, connection, streaming, keep, min(self._settings["spool"], GUARANTEED_BYTES), lambda: closed()
        )

        def closed() -> None:
            self._tied.discard(tied)
            self._end_if_done()

        try:
            call = self._run(call_id, name, zygote, tied, {})
        except OSError as error:
            tied.release()
            return _no_process(error)
        tied.bind_call(call)
        self._tied.add(tied)
        return None

    def _start_kept(
        self,
        connection: socket.socket,
        call_id: str,
        name: str,
        zygote: ZygoteClient,
        asked: JSONObject,
        behind: bytes,
        keep: float | None,
    ) -> Failed | None:
        streaming = zygote.procedures[name].streaming
        kept = self._held.create_session(call_id, asked, streaming)
        if isinstance(kept, Failed):
            return kept
        try:
            call = self._run(call_id, name, zygote, kept, self._held.stored_session(kept, streaming))
        except OSError as error:
            kept.discard()
            return _no_process(error)
        kept.bind_call(call)
        kept.attach(connection, 0, behind, keep)
        return None

    def _run(
        self,
        call_id: str,
        name: str,
        zygote: ZygoteClient,
        audience: BoundSession | ResumableSession,
        record: Mapping[str, Any],
    ) -> Call:
        settings = self._settings
        if len(self._calls) + len(zygote.idle_workers) >= settings["max_calls"]:
            zygote.idle_workers.shut_down_oldest()
        around = CallContext(
            loop=self._loop,
            kill_grace=settings["kill_grace"],
            state_dir=self._records,
            take_snapshot=self._look,
            has_possible_escapes=partial(self._has_strays, zygote),
            output=self._output,
            cgroups=self._cgroups,
            quota=self._memory,
            keep_stderr=settings["exit_info"]["stderr"],
            keep_tracebacks=settings["exit_info"]["traceback"],
        )
        call = Call(around, call_id, name, zygote.procedures[name], zygote, audience, record, self._on_call_gone)
        self._calls[call_id] = call
        return call

    # Control.

    def _control(self, connection: socket.socket, request: JSONObject) -> None:
        def answer(message: dict[str, Any]) -> None:
            FinalReply(self._loop, connection, dumps(message) + b"\n")

        match request.value("control"):
            case "status":
                answer(self._status())
            case "reload":
                given = request.value("settings")
                check(isinstance(given, dict), "settings: expected an object")
                settings = {"descriptors": self._settings["descriptors"], **given}
                self._load(settings, lambda fault: answer(_reloaded(settings, fault)))
            case "drain" | "resume" as command:
                self._draining = command == "drain"
                log.info("new calls are refused" if self._draining else "new calls are taken again")
                answer({"ok": True})
            case "retire":
                self._retire()
                answer({"ok": True})
                self._end_if_unwanted()
            case "launcher":
                connection.send(b'{"ok":true}\n')
                self._keep(connection)
            case "shutdown":
                self._shut_down(lambda: answer({"ok": True}))
            case other:
                answer({"error": f"unknown control request {other!r}"})

    def _status(self) -> dict[str, Any]:
        return {
            "calls": len(self._calls),
            "resumable": len(self._held),
            "supervisor": os.getpid(),
            "instance": self._incarnation,
            "accepting": self._accepting and not self._draining,
            "zygote": self._zygote.pid if self._zygote else None,
            "procedures": sorted(self._zygote.procedures) if self._zygote else [],
        }

    def _keep(self, keeper: socket.socket) -> None:
        keeper.setblocking(False)
        self._keepers.add(keeper)
        self._loop.watch(keeper.fileno(), READ, lambda: self._on_keeper(keeper))

    def _on_keeper(self, keeper: socket.socket) -> None:
        try:
            if keeper.recv(1):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._loop.unwatch(keeper.fileno())
        keeper.close()
        self._keepers.discard(keeper)
        if self._keepers or self._closing:
            return
        if self._settings["outlive"]:
            log.warning("the keeper has gone; kept calls go on")
            self._loop.call_later(_UNWANTED, self._end_if_unwanted)
        else:
            log.error("the gate died; its calls are ended")
            self._shut_down(lambda: None)

    # The end.

    def _retire(self) -> None:
        log.info("warden retires", extra={"calls": len(self._calls), "held": len(self._held)})
        self._retired, self._accepting = True, False
        if self._zygote is not None:
            self._zygote.retire()
            self._zygote = None

    def _end_if_unwanted(self) -> None:
        """End a warden that holds no call and gets no new ones."""
        if self._closing or self._calls or self._tied or self._held:
            return
        if self._retired or not self._keepers:
            self._shut_down(lambda: None)

    def _on_call_gone(self, call: Call) -> None:
        del self._calls[call.id]
        self._past.append(cookie_for(call.id))
        self._end_if_done()

    def _shut_down(self, done: Callable[[], None]) -> None:
        self._done.append(done)
        if self._closing:
            return
        self._closing = True
        for call in list(self._calls.values()):
            call.stop(StopReason.SHUTDOWN)
        # In any case: without a gate there is nobody else to end this, and the next warden sweeps what is left.
        self._loop.call_later(2 * self._settings["kill_grace"] + _LAST_WORDS, self._end)
        self._end_if_done()

    def _end_if_done(self) -> None:
        if not self._closing:
            if self._retired or not self._keepers:
                self._loop.call_later(0, self._end_if_unwanted)
        elif not self._calls:
            if self._tied or self._held.attached:
                self._loop.call_later(_LAST_WORDS, self._end)
            else:
                self._end()

    def _end(self) -> None:
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote = None
        while self._done:
            self._done.pop()()
        self._reception.close()
        self._records.close()
        self._loop.call_later(0, self._loop.stop)

    # Processes.

    def _look(self, moment: float) -> Snapshot:
        """All processes as they were at `moment` or later, and not long ago; many calls share a look."""
        if self._looked_at < max(moment, time.monotonic() - _LOOK_LASTS):
            self._looked_at = time.monotonic()
            self._processes = take_snapshot()
        return self._processes

    def _has_strays(self, zygote: ZygoteClient, processes: Snapshot, tree: CallTree) -> bool:
        """Whether something may have escaped from a call whose main process has ended."""
        mains = (
            {call.main_process for call in self._calls.values()}
            | zygote.preforked.items()
            | zygote.idle_workers.identities()
        )
        marks = {*self._past, *map(cookie_for, self._calls)}
        return has_possible_escapes(tree, zygote.pid, processes, mains, marks)


def _no_process(error: OSError) -> Failed:
    return Failed("system_error", f"no process can be made: {error.strerror}")


def _reloaded(settings: Mapping[str, Any], fault: str | None) -> dict[str, Any]:
    """The answer to a reload. The log changes last: a reload that fails changes nothing."""
    if fault is not None:
        return {"error": fault}
    try:
        logs.configure(settings["logging"])
    except (ValueError, OSError) as error:  # the gate has tried the same settings
        log.error("the log can't be set up anew", extra={"reason": str(error)})
    return {"ok": True}


def main() -> NoReturn:
    """Run the warden."""
    (lifeline,) = map(int, sys.argv[1:])
    settings = loads(sys.stdin.buffer.read())
    logs.configure(settings["logging"])
    sys.setrecursionlimit(_RECURSION_LIMIT)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # zygotes are not waited for; their sockets tell of their end
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # for the keeper to act on, if all of harpd gets it
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(lifeline, False)
    loop = EventLoop()
    Supervisor(loop, socket.socket(fileno=lifeline), {"descriptors": soft, **settings})
    loop.run()
    os._exit(0)


if __name__ == "__main__":
    main()
