"""The zygote (a fork server): it has loaded the procedures file and forks a worker process for each call.

It forks ahead: up to two *pre-forked* workers wait for a call, so that calls do not wait for a fork.

It is leaner than the supervisor, because the cost of a fork grows with the memory of its parent. It is executed, not
forked, so it has never had a key or a password in memory. As the parent of the workers, it reaps them and reports their
ends. It exits when the supervisor closes the socket, and is killed when the supervisor dies.

``python -m harpd.worker.zygote SOCKET SUPERVISOR``: the descriptor of a SOCK_SEQPACKET socket, and the supervisor's
pid. The messages are JSON objects:

    supervisor -> zygote, once, first:
        {"load": PATH, "path": [STR], "default_user": USER, "default_group": GROUP, "descriptors": NUMBER,
         "tracebacks": BOOL}
    zygote -> supervisor, the first for each procedure, then one of the others; after an error it exits:
        {"procedure": NAME, "streaming": BOOL, "timeout": SECONDS|null, "max_calls": NUMBER}
        {"loaded": NUMBER, "threads": NUMBER}
        {"error": MESSAGE}
    supervisor -> zygote, for each call that needs a new worker, with three descriptors (channel, stdout, stderr):
        {"fork": CALL, "procedure": NAME}
    zygote -> supervisor, one of these for each fork command:
        {"forked": CALL, "pid": PID, "start": TICKS}
        {"failed": CALL, "reason": MESSAGE}
    zygote -> supervisor, for each worker, when it is forked ahead and when it is reaped:
        {"preforked": PID, "start": TICKS}
        {"reaped": PID, "status": NUMBER, "cpu": SECONDS, "memory": BYTES}
"""

from __future__ import annotations

import errno
import gc
import io
import os
import resource
import select
import signal
import socket
import sys
import warnings

from harp.protocol.json_text import dumps, loads
from harpd.proc import Procedure
from harpd.processes.cookie import EnvCookie
from harpd.processes.prctl import become_subreaper, die_with_parent
from harpd.processes.procfs import start_time
from harpd.worker import arguments, signals
from harpd.worker.child import detach_from_zygote, flush_output, run_worker
from harpd.worker.procedures import ProceduresError, load_procedures

TYPE_CHECKING = False  # not from `typing`: the zygote's memory costs each fork
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, NoReturn

#: The most bytes of the first command, which has the search path, and of the others.
_MAX_LOAD_COMMAND_BYTES, _MAX_COMMAND_BYTES = 1 << 18, 1 << 15
#: How many descriptors come with a fork command, and how many bytes each takes.
_DESCRIPTOR_COUNT, _DESCRIPTOR_SIZE = 3, 4
_ANCILLARY_SIZE = socket.CMSG_SPACE(_DESCRIPTOR_COUNT * _DESCRIPTOR_SIZE)
_CALL_SIGNALS = frozenset({signal.SIGTERM, signal.SIGXCPU})
#: How many workers are forked ahead.
_MAX_PREFORKED = 2
#: Milliseconds without a command or a death before the next worker is forked ahead, unless none is left. A fork at the
#: start of a call takes processor time from the call: 3 to 6 ms, measured for single calls on a busy machine.
_PREFORK_DELAY = 8


class _Zygote:
    """The zygote's state: the loaded procedures and the pre-forked workers. `supervisor` is the socket to it."""

    def __init__(self, supervisor: socket.socket) -> None:
        self._supervisor = supervisor
        self._cookie = EnvCookie()
        self._procedures: Mapping[str, Procedure] = {}
        self._defaults: tuple[int | str | None, int | str | None] = (None, None)
        self._tracebacks = False
        # Workers that wait for their first call: by pid: start time, and the socket over which they get it.
        self._preforked: dict[int, tuple[int, socket.socket]] = {}
        self._child_deaths, self._wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def load(self) -> bool:
        """Load the procedures file that the first command names; report the result and return whether it succeeded."""
        command = loads(self._supervisor.recv(_MAX_LOAD_COMMAND_BYTES))
        sys.path[:] = command["path"]
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # The supervisor has raised its own limit, which this process has inherited.
        resource.setrlimit(resource.RLIMIT_NOFILE, (command["descriptors"], hard))
        self._defaults = command["default_user"], command["default_group"]
        self._tracebacks = command["tracebacks"]
        try:
            self._procedures = load_procedures(command["load"])
        except ProceduresError as error:
            self._send({"error": str(error)})
            return False
        arguments.preload_inspect(self._procedures.values())
        _reset_streams()
        # The supervisor logs one warning about threads instead.
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        for name, procedure in self._procedures.items():
            options = {
                "streaming": procedure.streaming,
                "timeout": procedure.timeout,
                "max_calls": procedure.max_calls_per_process,
            }
            self._send({"procedure": name, **options})
        self._send({"loaded": len(self._procedures), "threads": len(os.listdir("/proc/self/task")) - 1})
        return True

    def serve(self) -> None:
        """Fork and reap until the supervisor closes the socket."""
        _ignore_signals()  # the file may have set its own handlers
        signals.install()
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, _CALL_SIGNALS)  # each worker unblocks them when it begins a call
        gc.collect()
        gc.freeze()  # the collector ignores these objects, so that it causes no copy-on-write
        poll = select.poll()
        poll.register(self._supervisor, select.POLLIN)
        poll.register(self._child_deaths, select.POLLIN)
        while True:
            ready = poll.poll(self._poll_timeout())
            for descriptor, _ in ready:
                if descriptor == self._child_deaths:
                    os.read(descriptor, 4096)
                    self._reap()
                elif not self._handle_command():
                    return
            if not ready:
                try:
                    self._prefork()
                except OSError:
                    poll.poll()  # no process can be created now; the next fork command reports the error

    def _poll_timeout(self) -> int | None:
        """Return after how many milliseconds without events a worker is forked ahead; None: there are enough."""
        if not self._preforked:
            return 0
        return _PREFORK_DELAY if len(self._preforked) < _MAX_PREFORKED else None

    def _handle_command(self) -> bool:
        data, ancillary, _, _ = self._supervisor.recvmsg(_MAX_COMMAND_BYTES, _ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        received = [item for _, _, item in ancillary]
        descriptors = memoryview(b"".join(received)).cast("i")
        call_id = loads(data)["fork"]
        try:
            if len(descriptors) != _DESCRIPTOR_COUNT:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            pid, start = self._hand_over(data, received)
            self._send({"forked": call_id, "pid": pid, "start": start})
        except OSError as error:
            self._send({"failed": call_id, "reason": f"cannot create a process: {error.strerror}"})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _hand_over(self, command: bytes, descriptors: list[bytes]) -> tuple[int, int]:
        """Send a command to a live worker; return its pid and start time. Raises OSError."""
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, item) for item in descriptors]
        while True:
            if not self._preforked:
                self._prefork()
            pid = next(iter(self._preforked))
            start, commands = self._preforked.pop(pid)
            with commands:
                try:
                    commands.sendmsg([command], passed)
                except ConnectionError:
                    continue  # another process has killed it
            return pid, start

    def _prefork(self) -> None:
        """Fork a worker that waits for a call. Raises OSError."""
        parent = os.getpid()
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            try:
                pid = os.fork()
            except OSError:
                near.close()
                raise
            if pid == 0:
                near.close()
                self._run_preforked(far, parent)
        start = start_time(pid)
        self._preforked[pid] = start, near
        self._send({"preforked": pid, "start": start})

    def _run_preforked(self, commands: socket.socket, parent: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            os.close(self._supervisor.detach())
            os.close(self._child_deaths)
            os.close(self._wakeup)
            for _, other in self._preforked.values():
                other.close()
            detach_from_zygote(parent)
            data, ancillary, _, _ = commands.recvmsg(_MAX_COMMAND_BYTES, _ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC)
            commands.close()
            if data:
                command = loads(data)
                channel, stdout, stderr = memoryview(b"".join(item for _, _, item in ancillary)).cast("i")
                procedure = self._procedures[command["procedure"]]
                pipes = stdout, stderr
                run_worker(procedure, channel, pipes, parent, self._defaults, self._tracebacks, self._cookie)
        except BaseException:  # noqa: BLE001 - no exception may reach the zygote's code
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if preforked := self._preforked.pop(pid, None):
                preforked[1].close()
            cpu = round(usage.ru_utime + usage.ru_stime, 6)
            self._send({"reaped": pid, "status": status, "cpu": cpu, "memory": 1024 * usage.ru_maxrss})

    def _send(self, message: dict[str, Any]) -> None:
        self._supervisor.send(dumps(message))


def _ignore_signals() -> None:
    """Ignore signals that are sent to all of harpd. By handlers, which executed programs do not inherit."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)


def _reset_streams() -> None:
    """Flush the streams, so that workers do not write buffered text again, and occupy the descriptors 0 to 2."""
    flush_output()
    while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        pass
    os.close(descriptor)


def main() -> NoReturn:
    """Run the zygote."""
    descriptor, supervisor = map(int, sys.argv[1:])
    _ignore_signals()
    sys.setrecursionlimit(10_000)  # each level of a nested payload needs one frame or more
    for stream in (sys.stdout, sys.stderr):  # a line is logged when it is printed, and printing does not fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    become_subreaper()
    die_with_parent(supervisor)
    with socket.socket(fileno=descriptor) as channel:
        try:
            zygote = _Zygote(channel)
            if zygote.load():
                zygote.serve()
        except ConnectionError:
            pass  # the supervisor has died
    os._exit(0)  # threads that the procedures file has started do not keep a retired zygote alive


if __name__ == "__main__":
    main()
