"""The supervisor's side of a zygote: start it, have it fork workers, receive reports of their deaths.

Workers are forked ahead: a call is sent to a pre-forked worker, and then the next worker is forked. The zygote replies
to fork commands in their order. Workers that may serve another call of their procedure wait as idle workers. A worker
that has died or written output gets no call; once a call's line was sent to a worker, the call is not sent to another
worker.
"""

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from harp import __version__
from harp.protocol.json_text import encode_value, loads
from harpd.processes.cookie import reserve_cookie
from harpd.processes.process_tree import start_time, wait_status
from harpd.supervisor.event_loop import READ, WRITE
from harpd.supervisor.output_limit import OutputLimit
from harpd.supervisor.worker_process import OutputCollector, OutputPipe, WorkerProcess, WorkerUser
from harpd.worker.environment import call_environment
from harpd.worker.procedures import LOAD_TIMEOUT

log = logging.getLogger("harpd.supervisor")

_MAX_MESSAGE_BYTES = 1 << 18
#: How many pre-forked workers there are, unless calls have just used them up. With 2, more calls of 4 and 16 clients
#: wait for a fork; with 8, they are not faster. Each uses 0.7 MB.
_PREFORKED = 4
#: Seconds without a message while a reply is due; seconds until an idle worker is shut down; seconds for the death of a
#: zygote. The first two are checked every `_CHECK_INTERVAL` seconds.
_FORK_TIMEOUT, _IDLE_TIMEOUT, _DEATH_TIMEOUT = 10.0, 10.0, 5.0
_CHECK_INTERVAL = 2.0
#: Signals with their default effect in the zygote and in programs that it executes: also those that the supervisor
#: ignores, or the program that has started harpd.
_DEFAULT_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


@dataclass(frozen=True, slots=True)
class ProcedureInfo:
    """A procedure that a zygote has loaded."""

    number: int  # which workers receive instead of the name
    streaming: bool
    timeout: float | None  # seconds
    max_calls: int  # of one worker process
    uid: int | None  # of its calls; None: its user is unknown
    users: Sequence[str] | None  # who may call it; None: each user who has the right to
    memory: int | None  # bytes of the whole call, if it has a cgroup
    processes: int | None  # likewise
    has_dynamic_uid: bool  # each call has a user id of its own


class ZygoteClient:
    """A zygote process, which loads the procedures file once. Raises OSError if it cannot be created.

    `on_loaded` is called once: with None when the file is loaded, else with the error. `on_lost` is called if the
    zygote dies or does not fork, unless it has retired.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        output: OutputCollector,
        on_loaded: Callable[[str | None], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._loop = output.loop
        self._output = output
        self._on_loaded: Callable[[str | None], None] | None = on_loaded
        self._on_lost = on_lost
        self._unsent: deque[tuple[bytes, Sequence[int]]] = deque()
        # Pre-forked workers, oldest first. Some may be dead, the last ones not forked yet.
        self._preforked: deque[WorkerProcess] = deque()
        self._forking: deque[WorkerProcess] = deque()  # in the order of the fork commands without a reply
        self._idle_since: dict[WorkerProcess, float] = {}  # idle workers, the longest idle one first
        self._children: dict[int, WorkerProcess] = {}
        self._retired = self._stuck = False
        self._pinged = False  # whether a ping has no reply yet
        self._silent_checks = 0  # how many checks ago the zygote last sent a message, while a reply is due
        self._pidfds: dict[int, int] = {}  # of workers, by pid, if the zygote is stuck
        self.procedures: dict[str, ProcedureInfo] = {}  # by name; complete once it has loaded
        self._socket, zygote_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        limit = OutputLimit(output.loop, output.limits, _log_dropped_output)
        with zygote_end, contextlib.ExitStack() as undo, contextlib.ExitStack() as closing:
            undo.callback(self._socket.close)
            self._pipes = []
            for stream in ("stdout", "stderr"):
                self._pipes.append(OutputPipe(output, stream, limit, "procedures file printed"))
                closing.callback(os.close, self._pipes[-1].writing_end)
            environment = call_environment(os.environ, settings["environment"])
            self.pid = _spawn(zygote_end, environment, *(pipe.writing_end for pipe in self._pipes))
            self._pidfd = os.pidfd_open(self.pid)
            undo.pop_all()
        self._socket.setblocking(False)
        self._loop.watch(self._socket.fileno(), READ, self._on_ready)
        self._created_at = self._loop.now()
        self._check_repeatedly()
        search_path = settings["python_path"]
        command = {
            "version": __version__,
            "load": settings["procedures"],
            # Absolute, because the zygote has another working directory.
            "path": [*map(os.path.abspath, (*search_path["prepend"], *sys.path, *search_path["append"]))],
            "default_user": settings["default_user"],
            "default_group": settings["default_group"],
            "descriptors": settings["descriptors"],
        }
        self._send(encode_value(command))

    def abort_load(self, reason: str) -> None:
        self.kill()
        self._report_load(reason)

    def _report_load(self, error: str | None) -> None:
        report, self._on_loaded = self._on_loaded, None
        if report is not None:
            for pipe in self._pipes:
                pipe.drain()
            report(error)

    def worker_identities(self) -> set[tuple[int, int]]:
        return {worker.identity for worker in self._children.values()}

    def assign(self, call: WorkerUser, call_id: str, procedure: str) -> WorkerProcess:
        """Return a worker for a call, which may not be forked yet. Raises OSError if no descriptor is free."""
        worker = self._pop_worker(procedure) or self._fork()
        worker.assign(call, procedure, {"call": call_id, "procedure": procedure})
        self._loop.call_soon(self._fork_ahead)  # after this call has its arguments
        return worker

    def _pop_worker(self, procedure: str) -> WorkerProcess | None:
        """Remove and return an idle worker of the procedure, else the oldest pre-forked one; None: both are missing."""
        if self._idle_since:  # rarely
            for worker in [worker for worker in reversed(self._idle_since) if worker.procedure == procedure]:
                del self._idle_since[worker]
                if worker.is_quiet():
                    return worker
                worker.shut_down()
        while self._preforked:
            worker = self._preforked.popleft()
            if worker.is_quiet():
                return worker
            worker.shut_down()
        return None

    def may_reuse(self, worker: WorkerProcess) -> bool:
        return worker.served < self.procedures[worker.procedure].max_calls and not self._retired

    def count_waiting(self) -> dict[str, int]:
        """Return how many workers wait for a call."""
        return {"idle": len(self._idle_since), "preforked": len(self._preforked)}

    def add_idle(self, worker: WorkerProcess) -> None:
        worker.become_idle()
        self._idle_since[worker] = self._loop.now()

    def limit_idle(self, max_idle: int) -> None:
        """Shut down the longest idle workers if there are more than `most`."""
        while self._idle_since and len(self._idle_since) > max_idle:
            worker = next(iter(self._idle_since))
            del self._idle_since[worker]
            worker.shut_down()

    def _fork_ahead(self) -> None:
        try:
            while len(self._preforked) < _PREFORKED and not self._retired:
                self._preforked.append(self._fork())
        except OSError:
            pass  # no descriptor is free; a call that needs one reports the error

    def _fork(self) -> WorkerProcess:
        """Return a worker that is being forked. Raises OSError."""
        worker = WorkerProcess(self._output)
        self._forking.append(worker)
        self._send(b"fork", worker.child_descriptors)  # which closes them here
        return worker

    def _check_repeatedly(self) -> None:
        """Check the time limits, until the zygote is closed. One timer serves all: one per worker would cost time."""
        now = self._loop.now()
        self.limit_idle(sum(since > now - _IDLE_TIMEOUT for since in self._idle_since.values()))
        if self._on_loaded is not None and now - self._created_at > LOAD_TIMEOUT:
            self.abort_load(f"loading took longer than {LOAD_TIMEOUT:g} s")
        # Checks are counted, not seconds: after a suspension of the system, the zygote has had no time to reply.
        self._silent_checks += 1 if self._forking or self._pinged else -self._silent_checks
        if self._stuck:
            self._watch_workers()
        elif self._silent_checks > _FORK_TIMEOUT / _CHECK_INTERVAL:
            self._on_stuck()
        elif not self._pinged and any(worker.served for worker in self._children.values()):
            self._pinged = True
            self._send(b"ping")
        if self._socket.fileno() >= 0:
            self._loop.call_later(_CHECK_INTERVAL, self._check_repeatedly)

    def _on_stuck(self) -> None:
        """Abandon a zygote that does not reply: it hangs, or a procedure has halted it. Its calls continue.

        It reports no deaths, so the workers are watched. A worker that it forks later finds its channel closed and
        exits. It is killed after its last call.
        """
        self._stuck = True
        log.error("zygote does not respond", extra={"zygote": self.pid, "seconds": _FORK_TIMEOUT})
        for worker in [*self._forking]:
            worker.on_fork_failed(f"cannot create a process: the zygote did not answer within {_FORK_TIMEOUT:g} s")
        if not self._retired:
            self.retire()
            self._on_lost()
        self._watch_workers()

    def _watch_workers(self) -> None:
        """Watch the workers of a zygote that is stuck; kill it if it has no workers."""
        for pid in self._children.keys() - self._pidfds.keys():
            try:
                self._pidfds[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                self._loop.call_soon(partial(self._on_unreported_death, pid))
            except OSError:
                pass  # no descriptor is free; the next check tries again
            else:
                self._loop.watch(self._pidfds[pid], READ, partial(self._on_unreported_death, pid))
        if not self._children:
            self.kill()

    def _on_unreported_death(self, pid: int) -> None:
        """Report the death of a worker. Its zygote is stuck."""
        self._unwatch_worker(pid)
        if worker := self._children.pop(pid, None):
            worker.on_reaped(wait_status(pid), None, None)
        if not self._children:
            self.kill()

    def _unwatch_worker(self, pid: int) -> None:
        if (pidfd := self._pidfds.pop(pid, None)) is not None:
            self._loop.unwatch(pidfd)
            os.close(pidfd)

    def retire(self) -> None:
        """Have the zygote exit once its last call has ended, and the workers without a call immediately."""
        self._retired = True
        self.limit_idle(0)
        while self._preforked:
            self._preforked.popleft().shut_down()
        self._close_if_done()

    def kill(self) -> None:
        """Kill the zygote, and with it its calls; wait for its death, at most 5 s."""
        if self._socket.fileno() >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            death = select.poll()
            death.register(self._pidfd, select.POLLIN)
            death.poll(_DEATH_TIMEOUT * 1000)
        self.retire()
        self._close()

    def _close_if_done(self) -> None:
        if self._retired and not self._forking and not self._children:
            self._close()

    def _close(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            os.close(self._pidfd)
            for pipe in self._pipes:
                pipe.release()
        while self._unsent:
            _close_all(self._unsent.popleft()[1])

    def _on_closed(self) -> None:
        """Report the death of the zygote, and of its workers, which are killed with it."""
        lost = self._on_loaded is None and not self._retired
        self._close()
        self.retire()
        self._report_load("the zygote ended while it loaded the procedures file")
        while self._forking:
            self._forking.popleft().on_fork_failed("cannot create a process: the zygote died")
        for worker in [*self._children.values()]:
            worker.on_reaped(signal.SIGKILL, None, None)
        self._children.clear()
        if lost:
            log.error("zygote died", extra={"zygote": self.pid})
            self._on_lost()

    def _send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        self._unsent.append((message, descriptors))
        self._flush()

    def _flush(self) -> None:
        while self._unsent:
            data, descriptors = self._unsent[0]
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                self._socket.sendmsg([data], passed)
            except BlockingIOError:
                self._loop.watch(self._socket.fileno(), READ | WRITE, self._on_ready)
                return
            except OSError:
                return  # the zygote has died; the next read reports it
            self._unsent.popleft()
            _close_all(descriptors)

    def _on_ready(self) -> None:
        if self._unsent:
            self._loop.watch(self._socket.fileno(), READ, self._on_ready)
            self._flush()
        try:
            data = self._socket.recv(_MAX_MESSAGE_BYTES)  # one message; the loop calls again if there are more
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if data:
            self._on_message(data)
        else:
            self._on_closed()

    def _on_message(self, message: bytes) -> None:
        self._silent_checks = 0
        match message.split(b" ", 1):
            case b"forked", pid_text:
                pid = int(pid_text)
                worker = self._children[pid] = self._forking.popleft()
                worker.on_forked(pid, start_time(pid, parent=self.pid))
            case b"reaped", numbers:
                pid, status, cpu, memory = map(int, numbers.split())
                self._unwatch_worker(pid)
                if dead_worker := self._children.pop(pid, None):  # else it was an orphan of a call
                    dead_worker.on_reaped(status, cpu / 1e6, 1024 * memory)
                self._close_if_done()
            case [b"pong"]:
                self._pinged = False
            case b"failed", reason:
                self._forking.popleft().on_fork_failed(reason.decode())
                self._close_if_done()
            case _:
                self._on_load_message(loads(message))

    def _on_load_message(self, message: dict[str, Any]) -> None:
        match message:
            case {"procedure": name, **options}:
                self.procedures[name] = ProcedureInfo(len(self.procedures), **options)
            case {"loaded": _, "threads": threads}:
                if threads:  # threads do not survive fork, so the calls do not have them
                    log.warning("procedures file started threads", extra={"threads": threads})
                self._fork_ahead()
                self._report_load(None)
            case {"error": error}:
                self._retired = True
                self._report_load(error)


def _log_dropped_output(lines: int, size: int) -> None:
    log.warning("output of procedures file dropped", extra={"lines": lines, "bytes": size})


def _spawn(zygote_end: socket.socket, environment: Mapping[str, str], stdout: int, stderr: int) -> int:
    """Execute a zygote with its end of the socket and its output; other descriptors close on exec. Return its pid."""
    os.set_inheritable(zygote_end.fileno(), True)
    # `-m` would load modules that no worker needs. The path is an argument, because calls do not get PYTHONPATH.
    program = "import sys; sys.path[:] = sys.argv[3:]; from harpd.worker.zygote import main; main()"
    numbers = [str(zygote_end.fileno()), str(os.getpid())]
    arguments = [sys.executable, "-P", "-c", program, *numbers, *map(os.path.abspath, sys.path)]
    # The linker resolves all symbols at the start: otherwise each worker resolves those that it uses, and copies pages.
    environment = {**environment, **reserve_cookie(), "LD_BIND_NOW": "1"}
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, stdout, 1),
        (os.POSIX_SPAWN_DUP2, stderr, 2),
    ]
    return os.posix_spawn(
        sys.executable, arguments, environment, file_actions=files, setsigdef=_DEFAULT_SIGNALS, setsigmask=()
    )


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
