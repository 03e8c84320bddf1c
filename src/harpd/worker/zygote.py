"""The zygote: has loaded one generation of the procedures file, and forks a process for each call.

It forks ahead: a few processes, the *spares*, wait for a call each, so that no call waits for a fork. Each is used
once, or for up to ``max_calls_per_process`` calls of the same procedure.

Leaner than the warden: a fork costs by what its parent holds. It has read no key and no password, for it is
exec'ed. It is the calls' parent: it reaps them and reports. It ends when the warden closes the socket, and is
killed when the warden dies.

``python -m harpd.worker.zygote SOCKET WARDEN``: the descriptor of a SOCK_SEQPACKET socket, and the warden's pid.
Messages are
JSON objects:

    warden -> zygote  {"load": PATH, "path": [STR], "default_user", "default_group", "descriptors", "tracebacks"}
                                                                                                         once, first
    zygote -> warden  {"procedure": NAME, "streaming": BOOL, "timeout": SECONDS|null, "max_calls": NUMBER}  each, then
                      {"loaded": NUMBER, "threads": NUMBER}  or  {"fault": MESSAGE}, and it ends
    warden -> zygote  {"fork": CALL, "procedure": NAME}, with three descriptors: channel, stdout, stderr
    zygote -> warden  {"spare": PID, "start": TICKS}                                                     before
                      {"forked": CALL, "pid": PID, "start": TICKS}  or  {"refused": CALL, "reason": MESSAGE}
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

from harp.protocol.strict_json import dumps, loads
from harpd.proc import Procedure
from harpd.processes.cookie import EnvCookie
from harpd.processes.prctl import become_subreaper, die_with_parent
from harpd.processes.procfs import start_time
from harpd.worker import arguments
from harpd.worker import signals as limits
from harpd.worker.child import Descriptors, detach_from_zygote, run_worker
from harpd.worker.procedures import ProceduresError, load_procedures

TYPE_CHECKING = False  # not from `typing`: a fork costs by what its parent holds
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, NoReturn

__all__ = ["main"]

#: The most bytes of the first order, which has the search path, and of others.
_FIRST_ORDER_SIZE, _ORDER_SIZE = 1 << 18, 1 << 15
#: How many descriptors come with an order to fork, and how many bytes each takes.
_DESCRIPTORS, _DESCRIPTOR_SIZE = 3, 4
_ROOM = socket.CMSG_SPACE(_DESCRIPTORS * _DESCRIPTOR_SIZE)
_LIMITS = frozenset({signal.SIGTERM, signal.SIGXCPU})
#: How many processes wait for a call.
_SPARES = 2
#: Milliseconds without anything to do after which another one is forked. A fork beside a call that has just begun takes
#: a processor from it; with none left there is no choice.
_FORK_PAUSE = 8
#: Bytes that are read at once of the signals that came.
_CHILDREN_SIZE = 4096
#: Payloads may be nested this deep and need a frame or more for each level.
_RECURSION_LIMIT = 10_000


class _Spare:
    """A process that waits for a call, and our end of the socket by which it gets one."""

    __slots__ = ("pid", "socket", "start")

    def __init__(self, pid: int, start: int, socket: socket.socket) -> None:
        self.pid = pid
        self.start = start
        self.socket = socket


class _Zygote:
    def __init__(self, warden: socket.socket) -> None:
        self._warden = warden
        self._mark = EnvCookie()
        self._procedures: Mapping[str, Procedure] = {}
        self._defaults: tuple[int | str | None, int | str | None] = (None, None)
        self._tracebacks = False
        self._spares: dict[int, _Spare] = {}
        self._children, self._child_ended = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def load(self) -> bool:
        """Load the procedures file that the first message names, and report."""
        order = loads(self._warden.recv(_FIRST_ORDER_SIZE))
        sys.path[:] = order["path"]
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (order["descriptors"], hard))  # the warden has raised its own
        self._defaults = order["default_user"], order["default_group"]
        self._tracebacks = order["tracebacks"]
        try:
            self._procedures = load_procedures(order["load"])
        except ProceduresError as error:
            self._say({"fault": str(error)})
            return False
        arguments.preload_inspect(self._procedures.values())
        _settle_streams()
        # The warden's own warning of threads says it once, and to the right person.
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        for name, procedure in self._procedures.items():
            offered = {
                "streaming": procedure.streaming,
                "timeout": procedure.timeout,
                "max_calls": procedure.max_calls_per_process,
            }
            self._say({"procedure": name, **offered})
        self._say({"loaded": len(self._procedures), "threads": len(os.listdir("/proc/self/task")) - 1})
        return True

    def serve(self) -> None:
        """Fork and reap until the warden closes the socket."""
        _ignore_signals()  # the file may have set its own
        limits.install()
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._child_ended, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, _LIMITS)  # each call takes them as it begins
        gc.collect()
        gc.freeze()  # what is there now is never looked at again, and never copied for the look
        poll = select.poll()
        poll.register(self._warden, select.POLLIN)
        poll.register(self._children, select.POLLIN)
        while True:
            ready = poll.poll(self._fork_pause())
            for descriptor, _ in ready:
                if descriptor == self._children:
                    os.read(descriptor, _CHILDREN_SIZE)
                    self._reap()
                elif not self._take_order():
                    return
            if not ready:
                try:
                    self._fork_spare()
                except OSError:
                    poll.poll()  # no process is to be had now; a call that needs one will say so

    def _fork_pause(self) -> int | None:
        """Milliseconds to wait for something to do, after which a process is forked; None: there are enough."""
        if not self._spares:
            return 0
        return _FORK_PAUSE if len(self._spares) < _SPARES else None

    def _take_order(self) -> bool:
        data, ancillary, _, _ = self._warden.recvmsg(_ORDER_SIZE, _ROOM, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        received = [item for _, _, item in ancillary]
        descriptors = memoryview(b"".join(received)).cast("i")
        call_id = loads(data)["fork"]
        try:
            if len(descriptors) != _DESCRIPTORS:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            spare = self._give_to_spare(data, received)
            self._say({"forked": call_id, "pid": spare.pid, "start": spare.start})
        except OSError as error:
            self._say({"refused": call_id, "reason": f"no process can be made: {error.strerror}"})
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _give_to_spare(self, order: bytes, descriptors: list[bytes]) -> _Spare:
        """Give an order to a spare that lives. Raises OSError."""
        while True:
            if not self._spares:
                self._fork_spare()
            spare = self._spares.pop(next(iter(self._spares)))
            with spare.socket:
                try:
                    spare.socket.sendmsg(
                        [order], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, item) for item in descriptors]
                    )
                except ConnectionError:
                    continue  # somebody has killed it
            return spare

    def _fork_spare(self) -> None:
        """Fork a process that waits for a call. Raises OSError."""
        parent = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if pid == 0:
                ours.close()
                self._become_spare(theirs, parent)
        spare = self._spares[pid] = _Spare(pid, start_time(pid), ours)
        self._say({"spare": pid, "start": spare.start})

    def _become_spare(self, orders: socket.socket, parent: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            os.close(self._warden.detach())
            os.close(self._children)
            os.close(self._child_ended)
            for spare in self._spares.values():
                spare.socket.close()
            detach_from_zygote(parent)
            data, ancillary, _, _ = orders.recvmsg(_ORDER_SIZE, _ROOM, socket.MSG_CMSG_CLOEXEC)
            orders.close()
            if data:
                order = loads(data)
                descriptors = Descriptors(*memoryview(b"".join(item for _, _, item in ancillary)).cast("i"))
                procedure = self._procedures[order["procedure"]]
                run_worker(procedure, descriptors, parent, *self._defaults, self._tracebacks, self._mark)
        except BaseException:  # noqa: BLE001 - nothing may go up into the zygote's own code
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
            if spare := self._spares.pop(pid, None):
                spare.socket.close()
            cpu = round(usage.ru_utime + usage.ru_stime, 6)
            self._say({"reaped": pid, "status": status, "cpu": cpu, "memory": 1024 * usage.ru_maxrss})

    def _say(self, message: dict[str, Any]) -> None:
        self._warden.send(dumps(message))


def _ignore_signals() -> None:
    """What is sent to harpd as a whole is the gate's to act on. By a handler: what the file executes inherits none."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)


def _settle_streams() -> None:
    """Leave nothing in the streams that each call would write again, and no number that a call's own could take."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001, S110 - the file may have closed or replaced it
            pass
    while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        pass
    os.close(descriptor)


def main() -> NoReturn:
    """Run the zygote."""
    descriptor, warden = map(int, sys.argv[1:])
    _ignore_signals()
    sys.setrecursionlimit(_RECURSION_LIMIT)
    for stream in (sys.stdout, sys.stderr):  # a line is in the log when it is printed, and printing does not fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    become_subreaper()
    die_with_parent(warden)
    with socket.socket(fileno=descriptor) as channel:
        try:
            zygote = _Zygote(channel)
            if zygote.load():
                zygote.serve()
        except ConnectionError:
            pass  # the warden is gone
    os._exit(0)  # threads that the procedures file left must not keep a retired zygote


if __name__ == "__main__":
    main()
