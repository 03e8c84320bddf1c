"""The warden: starts, watches and ends call processes. Lean: no TLS, no event-loop library, no thread.

Theory of operation
===================

``python -m harpd.warden LISTENER LIFELINE`` inherits a listening Unix socket and a pipe, and reads its settings, one
JSON object, from stdin. The end of the pipe means that the gate has died: all calls are ended, then the warden is.
It exec's a zygote (`harpd.zygote`), which loads the procedures file and forks a process for each call. A reload is
a new zygote for new calls; the old one retires with its last call; a file that can't be loaded changes nothing.

The gate makes one connection per call, JSON lines:

    gate -> warden   {"call": ID, "procedure": NAME, "arguments": ..., "user": NAME, "peer": ADDRESS}
    warden -> gate   the lines for the client, as docs/protocol.md has them: acknowledgement, records, end

Half-closing or closing the connection stops the call. The warden closes its side only when the call's processes are
gone: a close is the proof of death. A connection whose first line has the key ``control`` gets one line back:

    {"control": "status"}                       {"calls": N, "warden": PID, "zygote": PID, "procedures": [NAME]}
    {"control": "reload", "settings": {...}}    {"ok": true} or {"error": MESSAGE}
    {"control": "shutdown"}                     {"ok": true}, once every call has ended, with the error shutdown

The settings: `procedures` (path), `python_path` (prepend, append), `default_user`, `default_group`, `calls` (the most
at once), `kill_grace` (seconds), `spool` (bytes of a call that may wait for the gate), `runtime_directory`, `logging`.
`descriptors`, the limit of open files that calls have, may be absent: then it is the warden's own at its start.
Nothing secret ever comes here.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from harp.protocol.daemon import encode_message
from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError, check, is_container, string
from harp.protocol.jsontext import InvalidJSON, Members, dumps, loads, open_sliced
from harp.protocol.lines import LineBuffer, LineTooLong
from harpd import logs
from harpd.eventloop import READ, WRITE, EventLoop
from harpd.nursery import Zygote
from harpd.output import Output
from harpd.processes import Process, snapshot
from harpd.records import CallRecords
from harpd.running import RunningCall, Stop

__all__ = ["main"]

log = logging.getLogger("harpd.warden")

_READ_SIZE = 1 << 16
#: The most bytes of a first line; the gate has its own, lower limit for what comes from outside.
_LONGEST_LINE = 1 << 30
#: Seconds that a look at all processes stays good.
_LOOK_LASTS = 0.02
#: Seconds until a dead zygote is started again, and that a procedures file has to load: less than the gate waits.
_ZYGOTE_PAUSE, _LOAD = 1.0, 50.0
#: Seconds without a look at new connections when there is no descriptor for them.
_ACCEPT_PAUSE = 0.1
#: At the end, seconds in which gates may still take what calls have said before.
_LAST_WORDS = 2.0
#: The share of descriptors that may belong to what ended calls have left running, as its output.
_LEFT_SHARE = 8
_RECURSION_LIMIT = 10_000
_CREDENTIALS = struct.Struct("3i")
#: What a call's id may be: it names a file and is an entry of the environment. A UUID is what the gate gives.
_CALL_ID = re.compile(r"[0-9A-Za-z-]{1,36}")


class Warden:
    """All calls of one harpd."""

    def __init__(self, loop: EventLoop, listener: socket.socket, lifeline: int, settings: Mapping[str, Any]) -> None:
        self._loop = loop
        self._listener = listener
        self._settings = settings
        self._calls: set[RunningCall] = set()
        self._speaking: set[RunningCall] = set()
        self._lifeline = lifeline
        self._records = CallRecords(Path(settings["runtime_directory"]))
        self._output = Output(loop, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _LEFT_SHARE)
        self._zygote: Zygote | None = None
        self._give_up: Callable[[str], None] = lambda reason: None  # the load that is under way, if there is one
        self._closing: Callable[[], None] | None = None
        self._looked_at, self._processes = 0.0, dict[int, Process]()
        if killed := self._records.sweep():
            log.warning("processes of an earlier warden's calls were killed", extra={"processes": killed})
        loop.watch(lifeline, READ, self._on_gate_died)
        self._load(settings, self._on_first_loaded)

    # The zygote.

    def _load(self, settings: Mapping[str, Any], done: Callable[[str | None], None]) -> None:
        """Start a zygote with these settings; take it when it has loaded. The last request counts."""
        self._give_up("another load has begun")

        def give_up(reason: str) -> None:
            zygote.end()
            on_loaded(reason)

        def on_loaded(fault: str | None) -> None:
            deadline.cancel()
            self._give_up = lambda reason: None
            if fault is None:
                if self._zygote is not None:
                    self._zygote.retire()
                self._zygote, self._settings = zygote, settings
                log.info(
                    "procedures loaded", extra={"file": settings["procedures"], "procedures": len(zygote.procedures)}
                )
            done(fault)

        def on_died() -> None:
            if self._zygote is zygote:
                self._zygote = None
                log.error("the zygote died", extra={"zygote": zygote.pid})
                self._loop.after(_ZYGOTE_PAUSE, self._load_again)

        try:
            zygote = Zygote(self._loop, settings, on_loaded, on_died)
        except OSError as error:
            done(f"no process can be made: {error.strerror}")
            return
        self._give_up = give_up
        deadline = self._loop.after(_LOAD, lambda: give_up(f"loading took longer than {_LOAD:g} s"))

    def _on_first_loaded(self, fault: str | None) -> None:
        if fault is not None:
            log.error("the procedures file can't be loaded", extra={"reason": fault})
            os._exit(1)
        self._listener.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        if self._closing is None:
            self._loop.watch(self._listener.fileno(), READ, self._accept)

    def _load_again(self) -> None:
        if self._zygote is None:
            self._load(self._settings, self._on_loaded_again)

    def _on_loaded_again(self, fault: str | None) -> None:
        if fault is not None:
            log.error("the procedures file can't be loaded", extra={"reason": fault})
            self._loop.after(_ZYGOTE_PAUSE, self._load_again)

    # Connections.

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptor is free: the listener stays ready, so look away
            log.error("a connection can't be taken", extra={"reason": str(error)})
            self._loop.forget(self._listener.fileno())
            self._loop.after(_ACCEPT_PAUSE, self._listen)
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid not in (0, os.geteuid()):
            log.error("a connection of another user was refused", extra={"uid": uid})
            connection.close()
            return
        connection.setblocking(False)
        _FirstLine(self._loop, connection, self._serve)

    def _serve(self, connection: socket.socket, request: Members) -> None:
        if "control" in request:
            self._control(connection, request)
            return
        call_id, name = string(request, "call"), string(request, "procedure")
        arguments = request.payload("arguments")
        check(_CALL_ID.fullmatch(call_id) is not None, f"call: expected a UUID, got {call_id!r}")
        check(all(call.id != call_id for call in self._calls), f"call: {call_id} runs already")
        check(is_container(arguments, (list, dict)), "arguments: expected an array or an object")
        refusal = self._refusal(name)
        if refusal is not None:
            _Farewell(self._loop, connection, encode_message(refusal))
            return
        assert self._zygote is not None
        try:
            call = RunningCall(
                self._loop,
                connection,
                call_id,
                name,
                self._zygote.procedures[name],
                self._zygote,
                self._settings["kill_grace"],
                self._settings["spool"],
                self._records,
                self._look,
                self._output,
                self._on_call_gone,
                self._on_call_closed,
            )
        except OSError as error:
            failed = Failed("system_error", f"no process can be made: {error.strerror}")
            _Farewell(self._loop, connection, encode_message(failed))
            return
        self._calls.add(call)
        self._speaking.add(call)
        call.give(arguments)

    def _refusal(self, name: str) -> Failed | None:
        if self._closing is not None:
            return Failed("shutdown", "harpd is being stopped")
        if self._zygote is None:
            return Failed("procedure_loading_error", "the procedures are being loaded again")
        if name not in self._zygote.procedures:
            return Failed("no_such_procedure", f"there is no procedure {name!r}", {"procedure": name})
        most = self._settings["calls"]
        if len(self._calls) >= most:
            return Failed("too_many_calls", f"{most} calls run already, which is the limit of this host")
        return None

    def _control(self, connection: socket.socket, request: Members) -> None:
        def answer(message: dict[str, Any]) -> None:
            _Farewell(self._loop, connection, dumps(message) + b"\n")

        match request.value("control"):
            case "status":
                answer(
                    {
                        "calls": len(self._calls),
                        "warden": os.getpid(),
                        "zygote": self._zygote.pid if self._zygote else None,
                        "procedures": sorted(self._zygote.procedures) if self._zygote else [],
                    }
                )
            case "reload":
                given = request.value("settings")
                check(isinstance(given, dict), "settings: expected an object")
                settings = {"descriptors": self._settings["descriptors"], **given}
                self._load(settings, lambda fault: answer(_reloaded(settings, fault)))
            case "shutdown":
                self._shut_down(lambda: answer({"ok": True}))
            case other:
                answer({"error": f"unknown control request {other!r}"})

    # The end.

    def _on_call_gone(self, call: RunningCall) -> None:
        self._calls.discard(call)
        self._end_if_done()

    def _on_call_closed(self, call: RunningCall) -> None:
        self._speaking.discard(call)
        self._end_if_done()

    def _on_gate_died(self) -> None:
        self._loop.forget(self._lifeline)
        log.error("the gate died; its calls are ended")
        self._shut_down(lambda: None)

    def _shut_down(self, done: Callable[[], None]) -> None:
        self._closing = done
        self._loop.forget(self._listener.fileno())
        for call in list(self._calls):
            call.stop(Stop.SHUTDOWN)
        # In any case: without a gate there is nobody else to end this, and the next warden sweeps what is left.
        self._loop.after(2 * self._settings["kill_grace"] + _LAST_WORDS, self._end)
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._closing is None or self._calls:
            return
        if self._speaking:
            self._loop.after(_LAST_WORDS, self._end)
        else:
            self._end()

    def _end(self) -> None:
        assert self._closing is not None
        if self._zygote is not None:
            self._zygote.end()
            self._zygote = None
        self._closing()
        self._closing = lambda: None
        self._loop.after(0, self._loop.stop)

    def _look(self, moment: float) -> Mapping[int, Process]:
        """All processes as they were at `moment` or later, and not long ago; many calls share a look."""
        if self._looked_at < max(moment, time.monotonic() - _LOOK_LASTS):
            self._looked_at = time.monotonic()
            self._processes = snapshot()
        return self._processes


def _reloaded(settings: Mapping[str, Any], fault: str | None) -> dict[str, Any]:
    """The answer to a reload. The log changes last: a reload that fails changes nothing."""
    if fault is not None:
        return {"error": fault}
    try:
        logs.configure(settings["logging"])
    except (ValueError, OSError) as error:  # the gate has tried the same settings
        log.error("the log can't be set up anew", extra={"reason": str(error)})
    return {"ok": True}


class _FirstLine:
    """Reads a connection's first line, however slowly it comes."""

    def __init__(
        self, loop: EventLoop, connection: socket.socket, done: Callable[[socket.socket, Members], None]
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._done = done
        self._buffer = LineBuffer(_LONGEST_LINE)
        loop.watch(connection.fileno(), READ, self._on_ready)

    def _on_ready(self) -> None:
        try:
            data = self._connection.recv(_READ_SIZE)
            lines = self._buffer.feed(data)
            if data and not lines:
                return
            self._loop.forget(self._connection.fileno())
            if not data:
                self._connection.close()
                return
            request = open_sliced(lines[0])
        except BlockingIOError:
            return
        except (OSError, LineTooLong, InvalidJSON) as error:
            log.error("a connection without a request was closed", extra={"reason": str(error)})
            self._loop.forget(self._connection.fileno())
            self._connection.close()
            return
        try:
            self._done(self._connection, request)
        except (KeyError, InvalidJSON, ProtocolError) as error:
            log.error("a request that is none was refused", extra={"reason": repr(error)})
            self._connection.close()


class _Farewell:
    """Sends the last bytes on a connection, then closes it."""

    def __init__(self, loop: EventLoop, connection: socket.socket, data: bytes) -> None:
        self._loop = loop
        self._connection = connection
        self._rest = memoryview(data)
        self._send()

    def _send(self) -> None:
        try:
            self._rest = self._rest[self._connection.send(self._rest) :]
        except BlockingIOError:
            pass
        except OSError:
            self._rest = self._rest[:0]
        if self._rest:
            self._loop.watch(self._connection.fileno(), WRITE, self._send)
        else:
            self._loop.forget(self._connection.fileno())
            self._connection.close()


def main() -> NoReturn:
    """Run the warden."""
    listener, lifeline = map(int, sys.argv[1:])
    settings = loads(sys.stdin.buffer.read())
    logs.configure(settings["logging"])
    sys.setrecursionlimit(_RECURSION_LIMIT)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # zygotes are not waited for; their sockets tell of their end
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # for the gate to act on, if all of harpd gets it
        signal.signal(number, signal.SIG_IGN)
    for descriptor in (listener, lifeline):
        os.set_inheritable(descriptor, False)
    loop = EventLoop()
    Warden(loop, socket.socket(fileno=listener), lifeline, {"descriptors": soft, **settings})
    loop.run()
    os._exit(0)


if __name__ == "__main__":
    main()
