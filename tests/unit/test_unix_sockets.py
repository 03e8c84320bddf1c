"""Unix sockets of peers that pass descriptors: nobody waits for what the peer makes slow to close.

The peer is another process, so that the process with `UnixSocket` has the last copy.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from harp_daemon.unix_sockets import _SO_PASSRIGHTS, UnixSocket, refuse_descriptors
from support.deadline import wait_until
from support.lingering import LINGERING

PEER = """
import sys
peer = socket.socket(fileno=int(sys.argv[1]))
connection, *kept = lingering()
one = connection
for _ in range(int(sys.argv[2])):  # in the buffer of a socket, which is itself passed
    outer, inner = socket.socketpair(type=peer.type)
    socket.send_fds(inner, [b"x"], [one.fileno()])
    one, inner = outer, inner.close()
try:
    if peer.type == socket.SOCK_SEQPACKET:
        peer.send(b"")
    socket.send_fds(peer, [b"data"], [one.fileno()])
    print("passed", flush=True)
except OSError as error:
    print("refused", flush=True)
    peer.send(b"data")
    input()
os.close(one.detach())
connection.close() if one is not connection else None
print("closed", flush=True)
input()
"""


@contextlib.contextmanager
def passing(kind: socket.SocketKind, nested: int, older_kernel: bool) -> Iterator[tuple[UnixSocket, str]]:
    """Yield a socket, and whether its peer has ``passed`` a descriptor to it or was ``refused``."""
    own, peer = socket.socketpair(type=kind)
    with contextlib.closing(UnixSocket(own)) as receiving:
        if older_kernel:
            with contextlib.suppress(OSError):
                receiving.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 1)
        command = [sys.executable, "-c", LINGERING + PEER, str(peer.fileno()), str(nested)]
        with peer:
            process = subprocess.Popen(
                command, pass_fds=[peer.fileno()], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert process.stdout is not None
        try:
            outcome = process.stdout.readline().strip()
            if outcome == "passed":
                assert process.stdout.readline() == "closed\n"
            yield receiving, outcome
        finally:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("nested", [0, 2])
def test_passed_descriptor_that_lingers_halts_no_read(kind: socket.SocketKind, nested: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with passing(kind, nested, older_kernel=True) as (receiving, outcome):
        assert outcome == "passed"
        if kind == socket.SOCK_SEQPACKET:
            assert receiving.recv(100) == b""
        assert receiving.recv(100) == b"", "the peer counts as disconnected"
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, what="all descriptors closed")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_passed_descriptor_that_is_not_received_halts_no_close(kind: socket.SocketKind) -> None:
    with passing(kind, 0, older_kernel=True) as (receiving, outcome):
        assert outcome == "passed"
        receiving.close()


def test_kernel_refuses_descriptors_if_it_can() -> None:
    with passing(socket.SOCK_STREAM, 0, older_kernel=False) as (receiving, outcome):
        try:
            receiving.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS)
        except OSError:
            pytest.skip("this kernel cannot refuse them")
        assert outcome == "refused"
        assert receiving.recv(100) == b"data"


def test_connections_of_a_listener_refuse_descriptors(tmp_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.bind(f"{tmp_path}/socket")
        refuse_descriptors(listening)
        listening.listen()
        try:
            listening.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS)
        except OSError:
            pytest.skip("this kernel cannot refuse them")
        client.connect(f"{tmp_path}/socket")
        with pytest.raises(PermissionError):  # before it is accepted
            socket.send_fds(client, [b"data"], [0])
