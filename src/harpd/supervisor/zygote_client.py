"""The supervisor's side of a zygote: start it, request forks, receive reports of deaths."""

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
from harpd.supervisor.worker_process import IdleWorkers, WorkerProcess, WorkerUser

log = logging.getLogger("harpd.supervisor")

_MAX_MESSAGE_BYTES = 1 << 18
#: Seconds for a fork, and for the death of a zygote that was killed.
_FORK_TIMEOUT, _DEATH_TIMEOUT = 10.0, 5.0
#: Signals that the supervisor ignores. They have their default effect in the zygote and in programs that it executes.
_IGNORED_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class ProcedureInfo:
    """A procedure that a zygote has loaded.

    Attributes:
        streaming: whether it yields records.
        timeout: its limit in seconds; None: no limit.
        max_calls: how many calls a worker process of it may serve.
    """

    streaming: bool
    timeout: float | None
    max_calls: int


class ZygoteClient:
    """A zygote process, which has loaded the procedures file once.

    Args:
        settings: the supervisor's settings, see `harpd.supervisor.main`.
        output: creates the pipes of the workers.
        on_loaded: called once: with None when the file is loaded, else with the error.
        on_died: called when the process has ended unexpectedly after it had loaded.
        on_stuck: called when it does not fork. Its calls may continue; it should get no more calls.

    Raises:
        OSError: no process or descriptor is available.

    Attributes:
        idle_workers: its workers that wait for another call.
        procedures: its procedures by name; complete once it has loaded.
    """

    def __init__(
        self,
        loop: EventLoop,
        settings: Mapping[str, Any],
        output: OutputCollector,
        on_loaded: Callable[[str | None], None],
        on_died: Callable[[], None],
        on_stuck: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._output = output
        self._on_loaded: Callable[[str | None], None] | None = on_loaded
        self._on_died = on_died
        self._on_stuck = on_stuck
        self._unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._forking: dict[str, tuple[WorkerProcess, Timer]] = {}
        self._children: dict[int, WorkerProcess] = {}
        self._retired = False
        self.procedures: dict[str, ProcedureInfo] = {}
        self._preforked: dict[int, int] = {}  # workers without a call: start times by pid
        self.idle_workers = IdleWorkers(loop)
        self._socket, zygote_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with zygote_end, contextlib.ExitStack() as undo:
            undo.callback(self._socket.close)
            self.pid = _spawn(zygote_end)
            self._pidfd = os.pidfd_open(self.pid)
            undo.pop_all()
        self._socket.setblocking(False)
        self._loop.watch(self._socket.fileno(), READ, self._on_ready)
        search_path = settings["python_path"]
        command = {
            "load": settings["procedures"],
            "path": [*search_path["prepend"], *sys.path, *search_path["append"]],
            "default_user": settings["default_user"],
            "default_group": settings["default_group"],
            "descriptors": settings["descriptors"],
            "tracebacks": settings["exit_info"]["traceback"],
        }
        self._send(command)

    def worker_identities(self) -> set[tuple[int, int]]:
        """Return the pids and start times of all its workers."""
        return {*self._preforked.items(), *(worker.identity for worker in self._children.values())}

    def assign(self, call: WorkerUser, call_id: str, procedure: str) -> WorkerProcess:
        """Return a worker for a call: an idle one of its procedure, else a new one that is being forked.

        Raises:
            OSError: no descriptor is free.
        """
        fields = {"call": call_id, "procedure": procedure}
        idle = self.idle_workers.pop(procedure)
        if idle is not None:
            idle.assign(call, fields)
            return idle
        max_calls = self.procedures[procedure].max_calls
        worker = WorkerProcess(self._loop, self._output, fields, call, procedure, max_calls, self.idle_workers)
        self._forking[call_id] = worker, self._loop.call_later(_FORK_TIMEOUT, lambda: self._on_fork_timeout(call_id))
        self._send({"fork": call_id, "procedure": procedure}, worker.child_descriptors)  # which closes them here
        return worker

    def _on_fork_timeout(self, call_id: str) -> None:
        """Abandon a fork. If the worker starts later, it finds its channel closed and exits."""
        log.error("zygote does not fork", extra={"zygote": self.pid, "call": call_id, "seconds": _FORK_TIMEOUT})
        reason = f"cannot create a process: the zygote did not answer within {_FORK_TIMEOUT:g} s"
        self._fail_fork(call_id, reason)
        if not self._retired:
            self._on_stuck()

    def _take_pending(self, call_id: str) -> tuple[WorkerProcess, WorkerUser] | None:
        """Remove and return the worker of a fork and its call; None if the fork was abandoned."""
        if call_id not in self._forking:
            return None
        worker, deadline = self._forking.pop(call_id)
        deadline.cancel()
        assert worker.call is not None  # it is not released before this
        return worker, worker.call

    def _fail_fork(self, call_id: str, reason: str) -> None:
        if pending := self._take_pending(call_id):
            pending[1].on_fork_failed(reason)

    def retire(self) -> None:
        """Have the zygote exit once its last call has ended."""
        self._retired = True
        self.idle_workers.close()
        self._close_if_idle()

    def kill(self) -> None:
        """Kill the zygote, and with it its calls; wait for its death, at most 5 s."""
        self._retired = True
        self.idle_workers.close()
        if self._closed:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        death = select.poll()
        death.register(self._pidfd, select.POLLIN)
        death.poll(_DEATH_TIMEOUT * 1000)
        self._close()

    def _close_if_idle(self) -> None:
        if self._retired and not self._forking and not self._children:  # pre-forked workers have no call
            self._close()

    @property
    def _closed(self) -> bool:
        return self._socket.fileno() < 0

    def _close(self) -> None:
        if not self._closed:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            os.close(self._pidfd)
        while self._unsent:
            _close_all(self._unsent.popleft()[1])

    def _send(self, message: Mapping[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        self._unsent.append((dumps(dict(message)), descriptors))
        self._flush()

    def _flush(self) -> None:
        while self._unsent:
            data, descriptors = self._unsent[0]
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                self._socket.sendmsg([data], passed)
            except BlockingIOError:
                break
            except OSError:
                return  # the zygote has died; the next read reports it
            self._unsent.popleft()
            _close_all(descriptors)
        self._loop.watch(self._socket.fileno(), READ | (WRITE if self._unsent else 0), self._on_ready)

    def _on_ready(self) -> None:
        self._flush()
        while not self._closed:  # a message may lead to its close
            try:
                data = self._socket.recv(_MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            if not data:
                self._on_closed()
                return
            self._on_message(loads(data))

    def _on_message(self, message: dict[str, Any]) -> None:
        match message:
            case {"preforked": pid, "start": start}:
                self._preforked[pid] = start
            case {"forked": call_id, "pid": pid, "start": start}:
                self._preforked.pop(pid, None)
                if pending := self._take_pending(call_id):
                    worker, call = pending
                    self._children[pid] = worker
                    worker.identity = pid, start
                    call.on_forked()
            case {"reaped": pid, "status": status, "cpu": cpu, "memory": memory}:
                self._preforked.pop(pid, None)
                if dead_worker := self._children.pop(pid, None):
                    dead_worker.on_reaped(status, cpu, memory)
                self._close_if_idle()
            case {"failed": call_id, "reason": reason}:
                self._fail_fork(call_id, reason)
                self._close_if_idle()
            case {"procedure": name, "streaming": streaming, "timeout": timeout, "max_calls": max_calls}:
                self.procedures[name] = ProcedureInfo(streaming, timeout, max_calls)
            case {"loaded": _, "threads": threads}:
                if threads:  # threads do not survive fork, so the calls do not have them
                    log.warning("procedures file started threads", extra={"threads": threads})
                self._report_load(None)
            case {"error": error}:
                self._report_load(error)

    def _report_load(self, error: str | None) -> None:
        callback, self._on_loaded = self._on_loaded, None
        if callback is not None:
            callback(error)

    def _on_closed(self) -> None:
        self._close()
        self.idle_workers.close()
        self._report_load("the zygote ended while it loaded the procedures file")
        for call_id in list(self._forking):
            self._fail_fork(call_id, "cannot create a process: the zygote died")
        for worker in [*self._children.values()]:
            worker.on_reaped(signal.SIGKILL, None, None)  # workers are killed when their zygote dies
        self._children.clear()
        if not self._retired:
            self._on_died()


def _spawn(zygote_end: socket.socket) -> int:
    """Execute a zygote with its end of the socket; all other descriptors close on exec. Return its pid."""
    os.set_inheritable(zygote_end.fileno(), True)
    arguments = [sys.executable, "-P", "-m", "harpd.worker.zygote", str(zygote_end.fileno()), str(os.getpid())]
    return os.posix_spawn(sys.executable, arguments, reserve_cookie(), setsigdef=_IGNORED_SIGNALS, setsigmask=())


def _close_all(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
