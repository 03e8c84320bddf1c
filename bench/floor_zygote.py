"""Program: the zygote of floor F2. It forks, and its children do what each call's process has to do, and nothing else.

`python -S -I bench/floor_zygote.py SOCKET`: the descriptor of a SOCK_SEQPACKET socket. Each byte that it receives asks
for a process. It sends ``f`` with three descriptors (channel, stdout, stderr) for each process that it has forked, and
``r`` for each that it has reaped. A process reads a line from its channel: the call's id, a space, its arguments.

Its modules are those that are written in C, because the pages of each module are copied in each child.
"""

import _json
import _signal
import _socket
import ctypes
import gc
import os
import select
import sys

_SET_CHILD_SUBREAPER, _SET_PDEATHSIG = 36, 1  # of prctl(2)
_FLAGS = os.O_CLOEXEC


class _Context:
    strict, memo = True, {}
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float


_decode = _json.make_scanner(_Context())
_encode = _json.make_encoder(None, None, _json.encode_basestring, None, ":", ",", False, False, False)
_prctl = ctypes.CDLL(None).prctl
_prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def echo(value):
    """Return the value: the procedure."""
    return value


def _call(zygote, unused, channel, stdout, stderr):
    """Do one call in a process of its own."""
    for descriptor in unused:
        os.close(descriptor)
    os.setsid()
    _prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _signal.set_wakeup_fd(-1)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    _prctl(_SET_PDEATHSIG, _signal.SIGKILL, 0, 0, 0)
    if os.getppid() != zygote:
        os._exit(1)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    call, _, arguments = os.read(channel, 65536).decode().partition(" ")
    os.environ["HARPD_CALL"] = call
    value = echo(*_decode(arguments, 0)[0])
    end = f'{{"result":{"".join(_encode(value, 0))}}}\n'.encode()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(channel, end)


def _fork(asking, unused):
    zygote = os.getpid()
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    (stdout, stdout_end), (stderr, stderr_end) = os.pipe2(_FLAGS), os.pipe2(_FLAGS)
    if os.fork() == 0:
        try:
            _call(zygote, (*unused, ours.fileno(), stdout, stderr), theirs.fileno(), stdout_end, stderr_end)
        finally:
            os._exit(0)
    sent = [ours.detach(), stdout, stderr]
    rights = b"".join(one.to_bytes(4, sys.byteorder) for one in sent)
    asking.sendmsg([b"f"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    for descriptor in (*sent, theirs.detach(), stdout_end, stderr_end):
        os.close(descriptor)


def _reap(asking):
    try:
        while os.wait4(-1, os.WNOHANG)[0]:
            asking.send(b"r")
    except ChildProcessError:
        pass


def main():
    """Fork and reap until the socket is closed."""
    asking = _socket.socket(fileno=int(sys.argv[1]))
    deaths, wakeup = os.pipe2(_FLAGS | os.O_NONBLOCK)
    for number in (_signal.SIGTERM, _signal.SIGXCPU, _signal.SIGCHLD):
        _signal.signal(number, lambda number, frame: None)
    _signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, {_signal.SIGTERM, _signal.SIGXCPU})
    gc.collect()
    gc.freeze()
    unused = asking.fileno(), deaths, wakeup
    poll = select.poll()
    poll.register(asking.fileno(), select.POLLIN)
    poll.register(deaths, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == deaths:
                os.read(deaths, 4096)
                _reap(asking)
            elif not asking.recv(1):
                return
            else:
                _fork(asking, unused)


main()
