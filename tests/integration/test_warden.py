"""The warden's socket: what the gate and strangers may say there, and what they hear."""

from __future__ import annotations

import json
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from harpd.proc import Procedure, StreamingProcedure
from support import procedures
from support.procedures_file import PROCEDURES
from support.warden import DEADLINE, PLAIN, Warden

COMMON = [name for name, value in vars(procedures).items() if isinstance(value, (Procedure, StreamingProcedure))]
OWN = """
import resource

@procedure
def descriptors():
    return resource.getrlimit(resource.RLIMIT_NOFILE)
"""


@pytest.fixture(scope="module")
def warden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warden]:
    with Warden(tmp_path_factory.mktemp("warden"), PROCEDURES + OWN) as warden:
        yield warden


def test_what_is_said_is_what_the_client_gets(warden: Warden) -> None:
    with warden.call("echo", ["\xe4", 1]) as call:
        lines = list(iter(call.raw_line, b""))
    assert lines == [b'{"harp":1,"stream_result":false}', b'{"result":["\\u00e4",1]}']
    with warden.call("count", [2]) as call:
        lines = list(iter(call.raw_line, b""))
    assert lines == [b'{"harp":1,"stream_result":true}', b'{"stream":0}', b'{"stream":1}', b'{"result":2}']


def test_an_error_stands_for_the_acknowledgement(warden: Warden) -> None:
    (refusal,) = warden.lines("nowhere")
    assert refusal.keys() == {"harp", "error"}
    assert refusal["error"]["type"] == "no_such_procedure"
    assert refusal["error"]["data"] == {"procedure": "nowhere"}


def test_status(warden: Warden, tmp_path: Path) -> None:
    with warden.call("wait_for", [str(tmp_path / "go")]) as call:
        assert call.line() == PLAIN
        status = warden.status()
        assert status.keys() == {"calls", "resumable", "supervisor", "instance", "accepting", "zygote", "procedures"}
        assert (status["calls"], status["resumable"], status["accepting"]) == (1, 0, True)
        assert status["procedures"] == sorted([*COMMON, "descriptors"])
        (tmp_path / "go").touch()
        assert len(call.lines()) == 1
    assert warden.status()["calls"] == 0


def test_a_call_has_the_limit_of_files_that_harpd_was_started_with(warden: Warden) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Warden(warden.directory / "limited", PROCEDURES + OWN) as limited_not:
        assert limited_not.result("descriptors") == [soft, hard]
    limited = Warden(warden.directory / "limited", PROCEDURES + OWN)
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
        b'{"call": "a"}\n',
        b'{"call": "x", "procedure": "echo"}\n',
        b'{"call": 5, "procedure": "echo", "arguments": []}\n',
        b'{"call": "x", "procedure": 5, "arguments": []}\n',
        b'{"call": "x", "procedure": [], "arguments": []}\n',
        b'{"call": "x", "procedure": "echo", "arguments": 5}\n',
        b'{"call": "", "procedure": "echo", "arguments": []}\n',
        b'{"call": "../x", "procedure": "echo", "arguments": []}\n',
        b'{"call": "\\u0000", "procedure": "echo", "arguments": []}\n',
        b'{"control": "unheard of"}\n',
        b'{"control": 5}\n',
        b'{"control": "reload"}\n',
        b'{"control": "reload", "settings": 5}\n',
        b"\xff\xfe\n",
        b"[" * 5000 + b"\n",
    ],
)
def test_garbage_is_refused_and_delays_nobody(warden: Warden, garbage: bytes) -> None:
    with warden.connect() as stranger:
        stranger.send(garbage)
        assert all("error" in line for line in stranger.lines())
    assert warden.result("echo", 1) == [1]
    assert warden.status()["calls"] == 0


def test_an_id_that_is_in_use_is_refused(warden: Warden, tmp_path: Path) -> None:
    with warden.call("wait_for", [str(tmp_path / "go")]) as first:
        assert first.line() == PLAIN
        with warden.call("echo", [], call_id=first.id) as second:
            assert all("error" in line for line in second.lines())
        (tmp_path / "go").touch()
        assert [line.keys() for line in first.lines()] == [{"result"}]


def test_silent_slow_and_leaving_peers_delay_nobody(warden: Warden) -> None:
    silent = [warden.connect() for _ in range(50)]
    for half in (b"", b"{", b'{"call": "x", "procedure": "echo", "argu'):
        with warden.connect() as leaving:
            leaving.send(half)
    with warden.connect() as slow:
        line = json.dumps({"call": "slow", "procedure": "echo", "arguments": [1], "user": "u", "peer": "p"}).encode()
        for number, byte in enumerate(line + b"\n"):
            slow.send(bytes([byte]))
            if number % 20 == 0:
                assert warden.result("echo", number) == [number]
        assert slow.lines() == [PLAIN, {"result": [1]}]
    for conversation in silent:
        conversation.close()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_is_not_heard(warden: Warden) -> None:
    descriptor = os.open(warden.runtime_directory, os.O_PATH)
    child = os.fork()
    if child == 0:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                warden.runtime_directory.chmod(0o711)
                (warden.runtime_directory / "warden").chmod(0o777)
                os.chdir(descriptor)
                os.setresuid(65534, 65534, 65534)
                connection.settimeout(DEADLINE)
                connection.connect("warden")
                os._exit(0 if connection.recv(1) == b"" else 1)
        finally:
            os._exit(2)
    os.close(descriptor)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert warden.wait_event("a connection of another user was refused", uid=65534)


def test_a_file_that_is_missing_changes_nothing(warden: Warden, tmp_path: Path) -> None:
    zygote = warden.status()["zygote"]
    answer = warden.reload(procedures=str(tmp_path / "nowhere.py"))
    assert answer.keys() == {"error"}
    assert str(tmp_path / "nowhere.py") in answer["error"]
    assert warden.status()["zygote"] == zygote
    assert warden.result("echo", 1) == [1]


def test_settings_come_with_a_reload(tmp_path: Path) -> None:
    with Warden(tmp_path / "warden", PROCEDURES + OWN) as warden:
        assert warden.reload(calls=1) == {"ok": True}
        with warden.call("wait_for", [str(tmp_path / "go")]) as running:
            assert running.line() == PLAIN
            (refusal,) = warden.lines("echo")
            assert refusal["error"]["type"] == "too_many_calls"
            (tmp_path / "go").touch()
            assert len(running.lines()) == 1
        assert warden.result("echo", 1) == [1]


def test_a_file_that_can_not_be_loaded_at_the_start_is_the_end(tmp_path: Path) -> None:
    warden = Warden(tmp_path / "warden", "x = 1\nraise RuntimeError('broken')\n")
    warden.spawn()
    assert warden.wait() == 1
    (event,) = warden.events("the procedures file can't be loaded")
    assert "procedures.py:2: RuntimeError: broken" in event["reason"]
