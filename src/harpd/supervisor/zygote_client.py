"""The warden's side of a zygote: starting it, asking it for forks, hearing of deaths."""

from __future__ import annotations

import array
import contextlib
import logging
import os
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harp.protocol.json_text import dumps, loads
from harpd.processes.cookie import reserve_cookie
from harpd.supervisor.event_loop import READ, WRITE, EventLoop, Timer
from harpd.supervisor.output import OutputCollector
from harpd.supervisor.worker_process import ForkListener, IdleWorkers, Usage, WorkerProcess

__all__ = ["ProcedureInfo", "ZygoteClient"]

log = logging.getLogger("harpd.supervisor")

_MESSAGE_SIZE = 1 << 18
#: Seconds for a fork, and for the death of a zygote that was killed.
_FORK, _DEATH = 10.0, 5.0
#: What the warden ignores; a procedures file and what it executes find the usual effect.
_OUR_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class ProcedureInfo:
    """A procedure that a zygote has loaded.

    Attributes:
        streaming: whether it yields records.
        timeout: its own limit in seconds; None: it has none.
        max_calls: how many calls a process of it may serve.
    """

    streaming: bool
    timeout: float | None
    max_calls: int


class ZygoteClient:
    """A process that has loaded one generation of the procedures file.

    Args:
        loop: the event loop.
        settings: the warden's settings, see `harpd.supervisor.main`.
        on_loaded: called once: None when the file is loaded, else the fault.
        on_died: called when the process has ended unasked after it had loaded.
        on_stuck: called when it does not fork. Its calls may go on; it should get no more of them.

    Raises:
        OSError: there is no process or descriptor to be had.

    Attributes:
        pid: its process.
        spares: its processes that have no call yet: start times by pid.
        resting: its processes that wait for a further call.
        procedures: what it offers, by name; whole once it has loaded.
    """

    def __init__(
        self,
        loop: EventLoop,
        settings: Mapping[str, Any],
        on_loaded: Callable[[str | None], None],
        on_died: Callable[[], None],
        on_stuck: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._on_loaded: Callable[[str | None], None] | None = on_loaded
        self._on_died = on_died
        self._on_stuck = on_stuck
        self._waiting: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._forking: dict[str, tuple[ForkListener, Timer]] = {}
        self._children: dict[int, ForkListener] = {}
        self._retired = False
        self.procedures: dict[str, ProcedureInfo] = {}
        self.preforked: dict[int, int] = {}
        self.idle_workers = IdleWorkers(loop)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(self._socket.close)
            self.pid = _spawn(theirs)
            self._process = os.pidfd_open(self.pid)
            undo.pop_all()
        self._socket.setblocking(False)
        self._loop.watch(self._socket.fileno(), READ, self._on_ready)
        path = _search_path(settings.get("python_path") or {})
        order = {
            "load": settings["procedures"],
            "path": path,
            "default_user": settings.get("default_user"),
            "default_group": settings.get("default_group"),
            "descriptors": settings["descriptors"],
            "tracebacks": settings["evidence"]["traceback"],
        }
        self._say(order)

    @property
    def is_idle(self) -> bool:
        """Whether it has no processes but spares."""
        return not self._forking and not self._children

    def assign(
        self, call: ForkListener, call_id: str, procedure: str, output: OutputCollector, fields: Mapping[str, str]
    ) -> WorkerProcess:
        """Return a process for a call: an idle one of its procedure, else a new one that is being forked.

        Args:
            call: the call; it is notified of the fork and of the death of the process.
            call_id: its id.
            procedure: the name of its procedure.
            output: where the pipes of a new process are made.
            fields: the fields of the log events of its output.

        Raises:
            OSError: no descriptor is free.
        """
        idle = self.idle_workers.pop(procedure)
        if idle is not None:
            idle.assign(call, fields)
            return idle
        most = self.procedures[procedure].max_calls
        process = WorkerProcess(self._loop, output, fields, call, procedure, most, self.idle_workers)
        self._forking[call_id] = process, self._loop.call_later(_FORK, lambda: self._give_up(call_id))
        self._say(
            {"fork": call_id, "procedure": procedure}, process.child_descriptors
        )  # which closes the descriptors here
        return process

    def _give_up(self, call_id: str) -> None:
        """Wait no longer for a fork. A process that still comes finds its channel closed, and ends without a word."""
        parent, _ = self._forking.pop(call_id)
        log.error("a zygote does not fork", extra={"zygote": self.pid, "call": call_id, "seconds": _FORK})
        parent.on_fork_failed(f"the process that makes processes did not answer within {_FORK:g} s")
        if not self._retired:
            self._on_stuck()

    def _born(self, call_id: str) -> ForkListener | None:
        """Who asked for this fork, if anybody still waits for it."""
        parent, deadline = self._forking.pop(call_id, (None, None))
        if deadline is not None:
            deadline.cancel()
        return parent

    def retire(self) -> None:
        """End it once its last call has ended."""
        self._retired = True
        self.idle_workers.close()
        self._end_if_idle()

    def kill(self) -> None:
        """End it now, and wait until it has ended, if it can. Its calls, if it has any, end with it."""
        self._retired = True
        self.idle_workers.close()
        if self._closed:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        ended = select.poll()
        ended.register(self._process, select.POLLIN)
        ended.poll(_DEATH * 1000)
        self._close()

    def _end_if_idle(self) -> None:
        if self._retired and self.is_idle:
            self._close()

    @property
    def _closed(self) -> bool:
        return self._socket.fileno() < 0

    def _close(self) -> None:
        if not self._closed:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            os.close(self._process)
        while self._waiting:
            _close_all(self._waiting.popleft()[1])

    def _say(self, message: Mapping[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        self._waiting.append((dumps(dict(message)), descriptors))
        self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting:
            data, descriptors = self._waiting[0]
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                self._socket.sendmsg([data], passed)
            except BlockingIOError:
                break
            except OSError:
                return  # it is gone: reading tells so
            self._waiting.popleft()
            _close_all(descriptors)
        self._loop.watch(self._socket.fileno(), READ | (WRITE if self._waiting else 0), self._on_ready)

    def _on_ready(self) -> None:
        self._send_waiting()
        while not self._closed:  # what is said may lead to its end
            try:
                data = self._socket.recv(_MESSAGE_SIZE)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            if not data:
                self._on_closed()
                return
            self._take(loads(data))

    def _take(self, message: dict[str, Any]) -> None:
        match message:
            case {"spare": pid, "start": start}:
                self.preforked[pid] = start
            case {"forked": call_id, "pid": pid, "start": start}:
                self.preforked.pop(pid, None)
                if parent := self._born(call_id):
                    self._children[pid] = parent
                    parent.on_forked(pid, start)
            case {"reaped": pid, "status": status, "cpu": cpu, "memory": memory}:
                self.preforked.pop(pid, None)
                if ended := self._children.pop(pid, None):
                    ended.on_reaped(status, Usage(cpu, memory))
                self._end_if_idle()
            case {"refused": call_id, "reason": reason}:
                if parent := self._born(call_id):
                    parent.on_fork_failed(reason)
                self._end_if_idle()
            case {"procedure": name, "streaming": streaming, "timeout": timeout, "max_calls": max_calls}:
                self.procedures[name] = ProcedureInfo(streaming, timeout, max_calls)
            case {"loaded": _, "threads": threads}:
                if threads:
                    log.warning(
                        "the procedures file leaves threads running; no call has them", extra={"threads": threads}
                    )
                self._loaded(None)
            case {"fault": fault}:
                self._loaded(fault)

    def _loaded(self, fault: str | None) -> None:
        callback, self._on_loaded = self._on_loaded, None
        if callback is not None:
            callback(fault)

    def _on_closed(self) -> None:
        self._close()
        self.idle_workers.close()
        self._loaded("the process that loads the procedures file ended")
        for call_id in list(self._forking):
            if parent := self._born(call_id):
                parent.on_fork_failed("the process that makes processes died")
        for parent in [*self._children.values()]:
            parent.on_reaped(signal.SIGKILL, Usage())  # they are killed with it
        self._children.clear()
        if not self._retired:
            self._on_died()


def _spawn(theirs: socket.socket) -> int:
    """Exec a zygote with its end of the socket; what else is open here closes on exec."""
    os.set_inheritable(theirs.fileno(), True)
    arguments = [sys.executable, "-P", "-m", "harpd.worker.zygote", str(theirs.fileno()), str(os.getpid())]
    environment = reserve_cookie()
    return os.posix_spawn(sys.executable, arguments, environment, setsigdef=_OUR_SIGNALS, setsigmask=())


def _search_path(changes: Mapping[str, list[str]]) -> list[str]:
    return [*changes.get("prepend", ()), *sys.path, *changes.get("append", ())]


def _close_all(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
