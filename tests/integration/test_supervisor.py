"""The supervisor's socket: requests of the frontend and of other peers, and their replies."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harpd.proc import Procedure, StreamingProcedure
from harpd.supervisor.frames import CLOSED, COMMANDS, CREDIT, HANG_UP, PREFACE, START, encode_frame
from support import procedures
from support.deadline import wait_until
from support.procedures_file import PROCEDURES
from support.supervisor import CHANNEL, DEADLINE, PLAIN, Channel, Supervisor

COMMON = [name for name, value in vars(procedures).items() if isinstance(value, (Procedure, StreamingProcedure))]
OWN = """
import resource

@procedure
def descriptors():
    return resource.getrlimit(resource.RLIMIT_NOFILE)
"""


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    with Supervisor(tmp_path_factory.mktemp("supervisor"), PROCEDURES + OWN) as supervisor:
        yield supervisor


def test_start_bound_call_sends_lines_for_client(supervisor: Supervisor) -> None:
    with supervisor.call("echo", ["\xe4", 1]) as call:
        lines = list(iter(call.raw_line, b""))
    assert lines == [b'{"harp":1,"stream_result":false}', b'{"result":["\\u00e4",1]}']
    with supervisor.call("count", [2]) as call:
        lines = list(iter(call.raw_line, b""))
    assert lines == [b'{"harp":1,"stream_result":true}', b'{"stream":0}', b'{"stream":1}', b'{"result":2}']


def test_start_rejected_sends_error_only(supervisor: Supervisor) -> None:
    (refusal,) = supervisor.lines("nowhere")
    assert refusal.keys() == {"harp", "error"}
    assert refusal["error"]["type"] == "no_such_procedure"
    assert refusal["error"]["data"] == {"procedure": "nowhere"}


def test_status_reports_calls_and_processes(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor.call("wait_for", [str(tmp_path / "go")]) as call:
        assert call.line() == PLAIN
        status = supervisor.status()
        assert status.keys() == {"calls", "resumable", "supervisor", "instance", "accepting", "zygote", "procedures"}
        assert (status["calls"], status["resumable"], status["accepting"]) == (1, 0, True)
        assert status["procedures"] == sorted([*COMMON, "descriptors"])
        (tmp_path / "go").touch()
        assert len(call.lines()) == 1
    assert supervisor.status()["calls"] == 0


def test_call_has_descriptor_limit_of_harpd_start(supervisor: Supervisor) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Supervisor(supervisor.directory / "limited", PROCEDURES + OWN) as limited_not:
        assert limited_not.result("descriptors") == [soft, hard]
    limited = Supervisor(supervisor.directory / "limited", PROCEDURES + OWN)
    with limited.start((200, 1000)):
        assert limited.result("descriptors") == [200, 1000]
        own = Path(f"/proc/{limited.status()['supervisor']}/limits").read_text()
        assert "Max open files            1000                 1000" in own


@pytest.mark.parametrize(
    "garbage",
    [
        b"\n",
        b"garbage\n",
        b"[1]\n",
        b'{"call": "x", "procedure": "echo", "arguments": []}\n',
        b'{"calls": 5}\n',
        b'{"link": 0}\n',
        b'{"link": "1"}\n',
        b'{"control": "unheard of"}\n',
        b'{"control": 5}\n',
        b"\xff\xfe\n",
        b"[" * 5000 + b"\n",
    ],
)
def test_request_invalid_closes_its_connection_only(supervisor: Supervisor, garbage: bytes) -> None:
    with supervisor.connect() as stranger:
        stranger.send(garbage)
        assert all("error" in line for line in stranger.lines())
    assert supervisor.result("echo", 1) == [1]
    assert supervisor.status()["calls"] == 0


@pytest.mark.parametrize(
    ("header", "arguments"),
    [
        (b"", b"[]"),
        (b"garbage", b"[]"),
        (b"[1]", b"[]"),
        ({"call": "a"}, b"[]"),
        ({"call": "x", "procedure": "echo"}, b""),
        ({"call": 5, "procedure": "echo"}, b"[]"),
        ({"call": "x", "procedure": 5}, b"[]"),
        ({"call": "x", "procedure": []}, b"[]"),
        ({"call": "x", "procedure": "echo"}, b"5"),
        ({"call": "x", "procedure": "echo"}, b'[]\nx echo ["second line"]'),
        ({"call": "", "procedure": "echo"}, b"[]"),
        ({"call": "../x", "procedure": "echo"}, b"[]"),
        ({"call": "\0", "procedure": "echo"}, b"[]"),
        (b"\xff\xfe", b"[]"),
        (b"[" * 5000, b"[]"),
    ],
)
def test_start_invalid_closes_its_channel_only(supervisor: Supervisor, header: Any, arguments: bytes) -> None:
    with supervisor.open_channel(START, header, arguments) as stranger:
        assert stranger.lines() == []
    assert supervisor.result("echo", 1) == [1]
    assert supervisor.status()["calls"] == 0


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 100,
        encode_frame(1, 0),
        encode_frame(1, CLOSED),
        encode_frame(1, CREDIT, b"x"),
        encode_frame(1, START, b'{"call":"y","procedure":"echo"}\n[]'),
    ],
)
def test_frame_invalid_closes_its_link_only(supervisor: Supervisor, tmp_path: Path, garbage: bytes) -> None:
    with supervisor.call("wait_for", [str(tmp_path / "never")]) as call:
        assert call.line() == PLAIN
        call.socket.sendall(garbage)
        assert call.socket.recv(1) == b""
    wait_until(lambda: supervisor.status()["calls"] == 0, DEADLINE, "the end of the call of this link")
    assert supervisor.result("echo", 1) == [1]


def test_frames_of_closed_channels_are_ignored(supervisor: Supervisor) -> None:
    with supervisor.call("echo", [1]) as call:
        assert call.lines() == [PLAIN, {"result": [1]}]
        late = [encode_frame(CHANNEL, HANG_UP), encode_frame(CHANNEL, COMMANDS, b"{}\n"), encode_frame(5, HANG_UP)]
        again = encode_frame(2, START, b'{"call":"again","procedure":"echo"}\n[2]')
        call.socket.sendall(b"".join(late) + again)
        received = b""
        while encode_frame(2, CLOSED) not in received:
            received += call.socket.recv(1 << 16)
        assert b'{"result":[2]}' in received


def test_start_with_running_id_is_rejected(supervisor: Supervisor, tmp_path: Path) -> None:
    with supervisor.call("wait_for", [str(tmp_path / "go")]) as first:
        assert first.line() == PLAIN
        with supervisor.call("echo", [], call_id=first.id) as second:
            assert all("error" in line for line in second.lines())
        (tmp_path / "go").touch()
        assert [line.keys() for line in first.lines()] == [{"result"}]


def test_request_from_slow_peer_delays_no_other(supervisor: Supervisor) -> None:
    silent = [supervisor.connect() for _ in range(50)]
    start = PREFACE + encode_frame(CHANNEL, START, b'{"call":"slow","procedure":"echo"}\n[1]')
    for half in (b"", b"{", PREFACE, start[:-5]):
        with supervisor.connect() as leaving:
            leaving.send(half)
    with Channel(supervisor.connect().socket) as slow:
        for number, byte in enumerate(start):
            slow.socket.sendall(bytes([byte]))
            if number % 20 == 0:
                assert supervisor.result("echo", number) == [number]
        assert slow.lines() == [PLAIN, {"result": [1]}]
    for connection in silent:
        connection.close()


def test_silent_connections_give_way(supervisor: Supervisor) -> None:
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(supervisor.connect()) for _ in range(300)]
        assert supervisor.result("same", 5) == 5
        assert silent[0].lines() == []
        silent[-1].send({"control": "status"})
        assert "instance" in silent[-1].line()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_connection_of_other_user_is_rejected(supervisor: Supervisor) -> None:
    descriptor = os.open(supervisor.runtime_directory, os.O_PATH)
    child = os.fork()
    if child == 0:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                supervisor.runtime_directory.chmod(0o711)
                (supervisor.runtime_directory / "supervisor").chmod(0o777)
                os.chdir(descriptor)
                os.setresuid(65534, 65534, 65534)
                connection.settimeout(DEADLINE)
                connection.connect("supervisor")
                os._exit(0 if connection.recv(1) == b"" else 1)
        finally:
            os._exit(2)
    os.close(descriptor)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert supervisor.wait_event("rejected connection of another user", uid=65534)


def test_reload_of_missing_file_has_no_effect(supervisor: Supervisor, tmp_path: Path) -> None:
    zygote = supervisor.status()["zygote"]
    answer = supervisor.reload(procedures=str(tmp_path / "nowhere.py"))
    assert answer.keys() == {"error"}
    assert str(tmp_path / "nowhere.py") in answer["error"]
    assert supervisor.status()["zygote"] == zygote
    assert supervisor.result("echo", 1) == [1]


def test_reload_applies_settings(tmp_path: Path) -> None:
    with Supervisor(tmp_path / "supervisor", PROCEDURES + OWN) as supervisor:
        assert supervisor.reload(max_calls=1) == {"ok": True}
        with supervisor.call("wait_for", [str(tmp_path / "go")]) as running:
            assert running.line() == PLAIN
            (refusal,) = supervisor.lines("echo")
            assert refusal["error"]["type"] == "too_many_calls"
            (tmp_path / "go").touch()
            assert len(running.lines()) == 1
        assert supervisor.result("echo", 1) == [1]


def test_start_with_unloadable_file_exits(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "supervisor", "x = 1\nraise RuntimeError('broken')\n")
    supervisor.spawn()
    assert supervisor.wait() == 1
    (event,) = supervisor.events("cannot load procedures file")
    assert "procedures.py:2: RuntimeError: broken" in event["reason"]


@pytest.mark.root
def test_full_runtime_directory_rejects_calls_until_freed(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, PROCEDURES)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", str(supervisor.runtime_directory)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs to be root, with the right to mount")
    try:
        with supervisor:
            ballast = supervisor.runtime_directory / "ballast"
            with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            for call in (supervisor.call("echo", [1]), supervisor.call_resumable("echo", 1)):
                with call:
                    error = call.line()["error"]
                assert error["type"] == "system_error"
                assert re.fullmatch(
                    r"cannot create a process: state file /\S+: No space left on device", error["message"]
                )
            assert supervisor.status()["calls"] == 0
            ballast.unlink()
            assert supervisor.result("echo", 1) == [1]
    finally:
        subprocess.run(["umount", "--lazy", str(supervisor.runtime_directory)], check=True)
