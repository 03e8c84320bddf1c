"""The client over a Unix socket of the dispatcher. Each test uses both shells."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import harp
from harp import aio
from support.harpcallerd import Harpcallerd
from support.scripted import scripted_harpd
from support.shells import Shell


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dispatcher as in its setting `listen`."""
    directory = tmp_path_factory.mktemp("d")
    found = f"unix:{directory / 'calls'}"
    with scripted_harpd(directory) as peer, Harpcallerd(directory, {"web01": peer.port}, settings={"listen": [found]}):
        yield found


@pytest.mark.parametrize("keep_alive", [None, True, False])
def test_unix_socket_is_used_as_in_listen(shell: Shell, address: str, keep_alive: bool | None) -> None:
    rpc = shell.caller_at(address, 3502, keep_alive=keep_alive)
    job = rpc.web01.count(3)
    assert job.follow(since=0).all() == [0, 1, 2]
    assert rpc.job(job.id()).get() == "counted"
    assert rpc.job(job.id()).stream().all() == [0, 1, 2]
    assert job.procedure() == "count"
    assert rpc.request({"get_result": job.id(), "wait": False}) == {"result": "counted"}
    assert len(rpc.submit_many([harp.Call("web01", "echo", [number]) for number in range(3)])) == 3
    with rpc.connect() as conn:
        assert address in repr(conn)


def test_unix_socket_needs_no_port(address: str) -> None:
    with harp.HarpCaller(address) as rpc:
        assert rpc.web01.echo(1).get() == [1]
        assert repr(rpc).startswith(f"HarpCaller({address!r}")
    assert repr(aio.AsyncHarpCaller(address)).startswith(f"AsyncHarpCaller({address!r}")


@pytest.mark.parametrize("from_environment", [True, False])
def test_unix_socket_in_command_line(address: str, from_environment: bool) -> None:
    program = "import sys; from harp.cli import main; sys.exit(main())"
    option = [] if from_environment else ["--dispatcher", address]
    done = subprocess.run(
        [sys.executable, "-c", program, *option, "call", "--wait", "web01", "echo", "5"],
        env={**os.environ, "HARP_DISPATCHER": address if from_environment else "nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[5]\n", "")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nonexistent/calls", "unix:/nonexistent/calls: cannot connect: No such file or directory"),
        ("/" + "x" * 200, "too long"),
        ("/a\0b", "cannot connect"),
    ],
)
def test_unix_socket_that_cannot_be_used_raises(shell: Shell, path: str, message: str) -> None:
    with pytest.raises(harp.CommunicationError, match=message):
        shell.caller_at(f"unix:{path}", 3502).web01.p()


def test_wrong_unix_addresses_are_refused(shell: Shell) -> None:
    for wrong in ("unix:", "unix:relative/path"):
        with pytest.raises(harp.HarpException, match="expected the absolute path of a Unix socket"):
            shell.caller_at(wrong, 3502)
    for direct in (harp.HarpServer, aio.AsyncHarpServer):
        with pytest.raises(harp.HarpException, match="over TLS on a TCP port"):
            direct("unix:/run/harpd", "u", "p")
    with pytest.raises(harp.HarpException, match="over TLS on a TCP port"):
        harp.JSONSSLConnection("unix:/run/harpd", 4306)


def listening(path: Path, stack: ExitStack) -> socket.socket:
    """Return a listener whose queue is full."""
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(path))
    listener.listen(0)
    stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
    return listener


def test_unix_socket_with_full_queue_times_out(shell: Shell, tmp_path: Path) -> None:
    """Connecting does not wait in the kernel as it does over TCP."""
    with ExitStack() as stack:
        listening(tmp_path / "calls", stack)
        rpc = shell.caller_at(f"unix:{tmp_path / 'calls'}", 3502, request_timeout=0.3)
        with pytest.raises(harp.CommunicationError, match="cannot connect"):
            rpc.web01.p()


def test_unix_socket_connects_when_queue_has_room(shell: Shell, tmp_path: Path) -> None:
    def serve() -> None:
        listener.accept()[0].close()
        conn, _ = listener.accept()
        with conn:
            conn.recv(1000)
            conn.sendall(b'{"harpcaller": 1, "job_id": "x"}\n')

    with ExitStack() as stack:
        listener = listening(tmp_path / "calls", stack)
        timer = threading.Timer(0.3, serve)
        timer.start()
        submitted: Any = shell.caller_at(f"unix:{tmp_path / 'calls'}", 3502).web01.p()
        timer.join()
    assert submitted.id() == "x"
