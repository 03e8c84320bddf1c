"""The zygote (a fork server): it has loaded the procedures file, forks the workers and reaps them.

The supervisor has it fork workers before there are calls for them, and gives calls to the workers without the zygote.
It is leaner than the supervisor, because the cost of a fork grows with the memory of its parent. It is executed, not
forked, so it has never had a key or a password in memory. It exits when the supervisor closes the socket, and is killed
when the supervisor dies.

`main` has two arguments: the descriptor of a SOCK_SEQPACKET socket, and the supervisor's pid; `sys.path` follows. The
messages about loading are JSON objects, those about workers are words and numbers, because writing JSON in a process
that has just forked copies 20 pages:

    supervisor -> zygote, once, first:
        {"version": VERSION, "load": PATH, "path": [STR], "default_user": USER, "default_group": GROUP,
         "descriptors": NUMBER}
    zygote -> supervisor, the first for each procedure, then one of the others; after an error it exits:
        {"procedure": NAME, "streaming": BOOL, "timeout": SECONDS|null, "max_calls": NUMBER,
         "uid": NUMBER|null, "users": [NAME]|null, "memory": BYTES|null, "processes": NUMBER|null,
         "has_dynamic_uid": BOOL}
        {"loaded": NUMBER, "threads": NUMBER}
        {"error": MESSAGE}
    supervisor -> zygote, for each worker, with four descriptors (calls, lines, stdout, stderr):
        fork
    supervisor -> zygote, while calls run, to learn whether it still works; and its reply:
        ping
        pong
    zygote -> supervisor, one of these for each fork command, in their order:
        forked PID
        failed MESSAGE
    zygote -> supervisor, for each worker, with its wait status, its microseconds of CPU, and its memory in KiB:
        reaped PID STATUS CPU MEMORY

The workers number the procedures in the order of these messages.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import errno
import gc
import io
import os
import resource
import select
import sys
from _socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, socket
from os import fork  # not the one of `AdoptedChildren`, which records children

from harp import __version__
from harp.protocol.json_text import encode_value, loads
from harp_daemon.time_slices import take_usual_slices
from harpd.proc import DYNAMIC_UID
from harpd.processes.cookie import EnvCookie
from harpd.processes.prctl import become_subreaper, die_with_parent
from harpd.worker.adopted import AdoptedChildren
from harpd.worker.child import Worker, flush_output
from harpd.worker.environment import enter_surroundings
from harpd.worker.privileges import user_id
from harpd.worker.procedures import ProceduresError, load_procedures
from harpd.worker.signals import CALL_SIGNALS
from harpd.worker.spawned import announce

TYPE_CHECKING = False  # not from `typing`: the zygote's memory costs each fork
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, NoReturn

#: The most bytes of the first command, which has the search path, and of the others.
_MAX_LOAD_COMMAND_BYTES, _MAX_COMMAND_BYTES = 1 << 18, 16
#: How many descriptors come with a fork command, and their size in the message: 4 bytes each.
_DESCRIPTORS, _ANCILLARY_SIZE = 4, CMSG_SPACE(4 * 4)


class _Zygote:
    """The zygote. `supervisor` is the socket to its supervisor."""

    def __init__(self, supervisor: socket) -> None:
        self._supervisor = supervisor
        self._cookie = EnvCookie()
        self._adopted = AdoptedChildren()
        self._child_deaths, self._wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def load(self) -> Worker:
        """Load the procedures file that the first command names, and report the result; exit if it cannot be loaded."""
        command = loads(self._supervisor.recv(_MAX_LOAD_COMMAND_BYTES))
        if (version := command.get("version")) != __version__:  # another version may have other messages
            upgraded = f"harpd {version or 'of an earlier version'} runs, and {__version__} is installed"
            self._send({"error": f"{upgraded}; reload harpd-supervisor, or restart harpd"})
            os._exit(0)
        sys.path[:] = command["path"]
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # The supervisor has raised its own limit, which this process has inherited.
        resource.setrlimit(resource.RLIMIT_NOFILE, (command["descriptors"], hard))
        announce(command["load"])
        try:
            procedures = load_procedures(command["load"])
        except ProceduresError as error:
            self._send({"error": str(error)})
            os._exit(0)
        for name, procedure in procedures.items():
            message = {"procedure": name, "streaming": procedure.streaming, "timeout": procedure.timeout}
            user = command["default_user"] if procedure.uid is None else procedure.uid
            message |= {"max_calls": procedure.max_calls_per_process, "uid": user_id(user), "users": procedure.users}
            message |= {"memory": procedure.memory, "processes": procedure.processes}
            message["has_dynamic_uid"] = procedure.uid == DYNAMIC_UID
            self._send(message)
        worker = Worker(list(procedures.values()), self._cookie, command["default_user"], command["default_group"])
        # Flush the streams, so that workers do not write buffered text again, and occupy the descriptors 0 to 2.
        flush_output()
        while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
            pass
        os.dup2(descriptor, 0)
        os.close(descriptor)
        threads = len(os.listdir("/proc/self/task")) - 1
        if threads:  # Python warns when a process with threads forks; the supervisor logs one warning instead
            import warnings

            warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        self._send({"loaded": len(procedures), "threads": threads})
        return worker

    def serve(self, worker: Worker) -> None:
        """Fork and reap until the supervisor closes the socket."""
        _ignore_signals()  # the file may have set its own handlers
        worker.guard.install()
        self._adopted.install()
        _signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, CALL_SIGNALS)  # each worker unblocks them when it begins a call
        gc.collect()
        gc.freeze()  # the collector ignores these objects, so that it causes no copy-on-write
        poll = select.poll()
        poll.register(self._supervisor, select.POLLIN)
        poll.register(self._child_deaths, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._child_deaths:
                    os.read(descriptor, _MAX_COMMAND_BYTES)  # a short buffer is no page of its own
                    self._reap()
                elif not self._handle_command(worker):
                    return

    def _handle_command(self, worker: Worker) -> bool:
        """Fork a worker; return False if the supervisor has closed the socket instead."""
        data, ancillary, _, _ = self._supervisor.recvmsg(_MAX_COMMAND_BYTES, _ANCILLARY_SIZE, MSG_CMSG_CLOEXEC)
        if not data:
            return False
        if data == b"ping":
            self._supervisor.send(b"pong")
            return True
        rights = ancillary[0][2] if ancillary else b""
        descriptors = [int.from_bytes(rights[at : at + 4], sys.byteorder) for at in range(0, len(rights), 4)]
        try:
            if len(descriptors) != _DESCRIPTORS:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            pid = fork()
            if not pid:
                self._run_worker(worker, *descriptors)
            reply = b"forked %d" % pid
        except OSError as error:
            reply = f"failed cannot create a process: {error.strerror}".encode()
        # Before the reply: from then on, the supervisor sees the worker's death by its channel, although this process
        # may be halted anywhere.
        for descriptor in descriptors:
            os.close(descriptor)
        self._supervisor.send(reply)
        return True

    def _run_worker(self, worker: Worker, calls: int, lines: int, stdout: int, stderr: int) -> NoReturn:
        try:
            _signal.set_wakeup_fd(-1)
            self._supervisor.close()
            os.close(self._child_deaths)
            os.close(self._wakeup)
            self._adopted.start_reaping()
            worker.run(calls, lines, stdout, stderr)
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
            cpu = int(1e6 * (usage.ru_utime + usage.ru_stime))
            self._supervisor.send(b"reaped %d %d %d %d" % (pid, status, cpu, usage.ru_maxrss))

    def _send(self, message: dict[str, Any]) -> None:
        self._supervisor.send(encode_value(message))


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Ignore a signal: a handler, unlike SIG_IGN, is not inherited by executed programs."""


def _ignore_signals() -> None:
    """Ignore signals that are sent to all of harpd."""
    for number in (_signal.SIGINT, _signal.SIGHUP, _signal.SIGTERM):
        _signal.signal(number, _do_nothing)


def main() -> NoReturn:
    """Run the zygote."""
    descriptor, supervisor = map(int, sys.argv[1:3])
    enter_surroundings()
    take_usual_slices()
    os.environ.pop("LD_BIND_NOW", None)  # set in this process only
    _ignore_signals()
    sys.setrecursionlimit(10_000)  # each level of a nested payload needs one frame or more
    for stream in (sys.stdout, sys.stderr):  # a line is logged when it is printed, and printing does not fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    become_subreaper()
    die_with_parent(supervisor)
    try:
        zygote = _Zygote(socket(fileno=descriptor))
        zygote.serve(zygote.load())
    except ConnectionError:
        pass  # the supervisor has died
    os._exit(0)  # also if the procedures file has started threads that still run
