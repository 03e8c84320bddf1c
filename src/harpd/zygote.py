"""The zygote: has loaded one generation of the procedures file, and forks a process for each call.

Leaner than the warden: a fork costs by what its parent holds. It has read no key and no password, for it is
exec'ed. It is the calls' parent: it reaps them and reports. It ends when the warden closes the socket, and is
killed when the warden dies.

``python -m harpd.zygote SOCKET WARDEN``: the descriptor of a SOCK_SEQPACKET socket, and the warden's pid. Messages are
JSON objects:

    warden -> zygote  {"load": PATH, "path": [STR], "default_user", "default_group", "descriptors"}      once, first
    zygote -> warden  {"procedure": NAME, "streaming": BOOL, "timeout": SECONDS|null}                    each, then
                      {"loaded": NUMBER, "threads": NUMBER}  or  {"fault": MESSAGE}, and it ends
    warden -> zygote  {"fork": CALL, "procedure": NAME}, with three descriptors: channel, stdout, stderr
    zygote -> warden  {"forked": CALL, "pid": PID, "start": TICKS}  or  {"refused": CALL, "reason": MESSAGE}
                      {"reaped": PID, "status": NUMBER}
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harp.protocol.jsontext import dumps, loads
from harpd.call import Descriptors, run_call
from harpd.prctl import become_subreaper, die_with_parent
from harpd.proc import Procedure
from harpd.procedures import ProceduresError, load_procedures
from harpd.processes import start_time

__all__ = ["main"]

_MESSAGE_SIZE = 1 << 18
#: Payloads may be nested this deep and need a frame or more for each level.
_RECURSION_LIMIT = 10_000


class _Zygote:
    def __init__(self, warden: socket.socket) -> None:
        self._warden = warden
        self._procedures: Mapping[str, Procedure] = {}
        self._defaults: tuple[int | str | None, int | str | None] = (None, None)
        self._children, self._child_ended = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def load(self) -> bool:
        """Load the procedures file that the first message names, and report."""
        order = loads(self._warden.recv(_MESSAGE_SIZE))
        sys.path[:] = order["path"]
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (order["descriptors"], hard))  # the warden has raised its own
        self._defaults = order["default_user"], order["default_group"]
        try:
            self._procedures = load_procedures(Path(order["load"]))
        except ProceduresError as error:
            self._say({"fault": str(error)})
            return False
        for name, procedure in self._procedures.items():
            self._say({"procedure": name, "streaming": procedure.streaming, "timeout": procedure.timeout})
        self._say({"loaded": len(self._procedures), "threads": len(os.listdir("/proc/self/task")) - 1})
        return True

    def serve(self) -> None:
        """Fork and reap until the warden closes the socket."""
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._child_ended, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()  # what is there now is never looked at again, and never copied for the look
        poll = select.poll()
        poll.register(self._warden, select.POLLIN)
        poll.register(self._children, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._children in ready:
                os.read(self._children, 4096)
                self._reap()
            if self._warden.fileno() in ready and not self._take_order():
                return

    def _take_order(self) -> bool:
        data, ancillary, _, _ = self._warden.recvmsg(_MESSAGE_SIZE, socket.CMSG_SPACE(3 * 4), socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        received = memoryview(b"".join(item for _, _, item in ancillary)).cast("i")
        descriptors = Descriptors(*received)
        order = loads(data)
        try:
            self._fork(order["fork"], self._procedures[order["procedure"]], descriptors)
        except OSError as error:
            self._say({"refused": order["fork"], "reason": f"no process can be made: {error.strerror}"})
        finally:
            for descriptor in received:
                os.close(descriptor)
        return True

    def _fork(self, call_id: str, procedure: Procedure, descriptors: Descriptors) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._say({"forked": call_id, "pid": pid, "start": start_time(pid)})
            return
        try:
            signal.set_wakeup_fd(-1)
            self._warden.close()
            os.close(self._children)
            os.close(self._child_ended)
            run_call(procedure, call_id, descriptors, parent, *self._defaults)
        finally:
            os._exit(1)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._say({"reaped": pid, "status": status})

    def _say(self, message: dict[str, Any]) -> None:
        self._warden.send(dumps(message))


def main() -> None:
    """Run the zygote."""
    descriptor, warden = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.setrecursionlimit(_RECURSION_LIMIT)
    become_subreaper()
    die_with_parent(warden)
    with socket.socket(fileno=descriptor) as channel, contextlib.suppress(ConnectionError):  # the warden is gone
        zygote = _Zygote(channel)
        if zygote.load():
            zygote.serve()


if __name__ == "__main__":
    main()
