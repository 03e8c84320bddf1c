"""How calls are stopped: limits, disconnects, shutdown, resisting processes, deaths of harpd's processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from harpd.supervisor.frames import CLOSED, HANG_UP, PREFACE, START, Frame, FrameBuffer, encode_frame
from harpd.supervisor.state_files import ENTRY_SIZE, Purpose, encode_entry
from support.calls import nothing_is_left
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd, is_dead
from support.procedures_file import CHANGED, PROCEDURES
from support.supervisor import is_running
from support.worker_channel import CHANNEL

OWN = r'''
import os, signal, stat, sys, threading, time
from harpd.proc import Cancelled, Result, TimeLimit, procedure, streaming_procedure

def note(path, text):
    with open(path, "a") as file:
        file.write(text + "\n")

def note_pid(path):
    note(path, str(os.getpid()))

def pause():
    while True:
        time.sleep(3600)

def sleep_and_note(path):
    try:
        note_pid(path)
        pause()
    except BaseException as error:
        note(path, type(error).__name__)
        raise

sleeps = procedure(sleep_and_note)
limited = procedure(timeout=0.3)(sleep_and_note)

@procedure(timeout=0.3)
def gives_a_result_all_the_same(path):
    try:
        sleep_and_note(path)
    except TimeLimit:
        return "a result"

@streaming_procedure(timeout=0.5)
def limited_stream(path):
    try:
        while True:
            yield "x" * 1000
    except TimeLimit:
        note(path, "TimeLimit")
        yield "more"
    finally:
        note(path, "finally")

@streaming_procedure
def streams(path):
    note_pid(path)
    try:
        number = 0
        while True:
            yield number
            number += 1
    finally:
        note(path, "finally")

@procedure(timeout=0.3)
def counts_threads(path):
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        sleep_and_note(path)
    finally:
        stop.set()
        thread.join()
        note(path, "joined")

def ignore_signals():
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)

def escape(path, execute):
    """Fork twice with a new session; the grandchild, which has written its pid, resists."""
    noted, note_it = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            ignore_signals()
            note_pid(path)
            os.write(note_it, b"x")
            if execute:
                os.execvp("sh", ["sh", "-c", "while :; do sleep 3600; done"])
            while True:
                time.sleep(3600)
        os._exit(0)
    os.read(noted, 1)

def resist_and_escape(path):
    note_pid(path)
    escape(path, True)
    escape(path, False)
    ignore_signals()
    note(path, "ready")
    while True:
        time.sleep(3600)

resists = procedure(resist_and_escape)
resists_limit = procedure(timeout=0.5)(resist_and_escape)

def escape_and_obey(path):
    """The main process exits at SIGTERM; the escaped process does not."""
    note_pid(path)
    escape(path, True)
    escape(path, False)
    note(path, "ready")
    pause()

obeys = procedure(escape_and_obey)
obeys_limit = procedure(timeout=0.5)(escape_and_obey)

@procedure
def escapes_and_dies(path):
    note_pid(path)
    noted, note_it = os.pipe()
    if os.fork() == 0:
        note_pid(path)
        os.write(note_it, b"x")
        pause()
    os.read(noted, 1)
    escape(path, True)
    note(path, "ready")
    os.kill(os.getpid(), signal.SIGKILL)

@procedure
def breeds(path):
    """Children that escape, and have children that escape, until they are stopped."""
    ignore_signals()
    note_pid(path)
    note(path, "ready")
    while True:
        if os.fork() == 0:
            os.setsid()
            note_pid(path)
            if os.fork():
                os._exit(0)
        else:
            os.wait()
        time.sleep(0.002)

@procedure
def says_its_end_and_stays():
    send_all(channel(), b'{"result":"forged"}\n')
    ignore_signals()
    pause()

@procedure
def raises_its_own():
    raise TimeLimit("mine")
'''

ACKNOWLEDGED = {"harp": 1, "stream_result": False}
STREAMING = {"harp": 1, "stream_result": True}
GRACE = 0.5


@pytest.fixture(scope="module")
def harpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    limits = {"limits": {"kill_grace": GRACE}}
    with Harpd(tmp_path_factory.mktemp("stopping"), PROCEDURES + CHANNEL + OWN, limits) as harpd:
        yield harpd
        nothing_is_left(harpd)


@pytest.fixture
def own(tmp_path: Path) -> Harpd:
    """A harpd for one test, not started."""
    return Harpd(tmp_path / "harpd", PROCEDURES + CHANNEL + OWN, {"limits": {"kill_grace": GRACE}})


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "notes"


def words(notes: Path) -> list[str]:
    return notes.read_text().split("\n")[:-1] if notes.exists() else []


def pids(notes: Path) -> list[int]:
    return [int(word) for word in words(notes) if word.isdigit()]


def wait_word(notes: Path, word: str) -> None:
    wait_until(lambda: word in words(notes), DEADLINE, f"the note {word}")


def wait_pid(notes: Path) -> int:
    return wait_until(lambda: pids(notes), DEADLINE, "the procedure's start")[0]


def all_dead(found: list[int]) -> bool:
    return all(map(is_dead, found))


def test_limit_raises_in_procedure(harpd: Harpd, notes: Path) -> None:
    acknowledged, last = harpd.call("limited", str(notes))
    assert acknowledged == ACKNOWLEDGED
    message = "the procedure took more than its limit of 0.3 s"
    assert last == {"harp": 1, "error": {"type": "timeout", "message": message}}
    assert words(notes)[1:] == ["TimeLimit"]


@pytest.mark.parametrize("procedure", ["gives_a_result_all_the_same", "counts_threads"])
def test_limit_suppressed_still_ends_as_timeout(harpd: Harpd, procedure: str, notes: Path) -> None:
    assert harpd.call(procedure, str(notes))[-1]["error"]["type"] == "timeout"
    assert words(notes)[1] == "TimeLimit"


def test_limit_during_record_keeps_lines_whole(harpd: Harpd, notes: Path) -> None:
    first, *records, last = harpd.call("limited_stream", str(notes))
    assert first == STREAMING
    assert last["error"]["type"] == "timeout"
    assert all(record == {"stream": "x" * 1000} for record in records)
    wait_word(notes, "finally")


def test_limit_raised_by_procedure_is_call_died(harpd: Harpd) -> None:
    last = harpd.call("raises_its_own")[-1]
    assert (last["error"]["type"], last["error"]["data"]) == ("call_died", {"signal": "SIGXCPU"})


@pytest.mark.parametrize("procedure", ["resists_limit", "obeys_limit"])
def test_limit_kills_all_processes(harpd: Harpd, procedure: str, notes: Path) -> None:
    with harpd.connect() as client:
        client.send(harpd.request(procedure, [str(notes)]))
        _, last = client.lines()
    assert last["error"]["type"] == "timeout"
    assert len(pids(notes)) == 3
    assert all_dead(pids(notes))  # at once: the close proves it


def test_cancel_raises_in_procedure(harpd: Harpd, notes: Path) -> None:
    with harpd.connect() as client:
        client.send(harpd.request("sleeps", [str(notes)]))
        assert client.message() == ACKNOWLEDGED
        pid = wait_pid(notes)
    wait_word(notes, "Cancelled")
    call = harpd.call_id(client)
    harpd.wait_event("client disconnected; call stopped", call=call)
    assert is_dead(pid)
    assert harpd.wait_event("call ended", call=call)["end"] == "cancelled"


def test_disconnect_of_stream_cleans_up(harpd: Harpd, notes: Path) -> None:
    with harpd.connect() as client:
        client.send(harpd.request("streams", [str(notes)]))
        assert client.message() == STREAMING
        wait_pid(notes)
    wait_word(notes, "finally")
    harpd.wait_event("client disconnected; call stopped", call=harpd.call_id(client))
    assert all_dead(pids(notes))


@pytest.mark.parametrize("procedure", ["resists", "obeys"])
def test_cancel_kills_all_processes(harpd: Harpd, procedure: str, notes: Path) -> None:
    with harpd.connect() as client:
        client.send(harpd.request(procedure, [str(notes)]))
        assert client.message() == ACKNOWLEDGED
        wait_word(notes, "ready")
    harpd.wait_event("client disconnected; call stopped", call=harpd.call_id(client))
    assert len(pids(notes)) == 3
    assert all_dead(pids(notes))


def test_cancel_kills_breeding_processes(harpd: Harpd, notes: Path) -> None:
    with harpd.connect() as client:
        client.send(harpd.request("breeds", [str(notes)]))
        wait_until(lambda: len(pids(notes)) > 10, DEADLINE, "some children")
    harpd.wait_event("client disconnected; call stopped", call=harpd.call_id(client))
    assert all_dead(pids(notes))


def test_cancel_after_acknowledgement(harpd: Harpd, notes: Path) -> None:
    for _ in range(30):
        with harpd.connect() as client:
            client.send(harpd.request("sleeps", [str(notes)]))
            assert client.message() == ACKNOWLEDGED
    wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the end of all")
    assert all_dead(pids(notes))


def test_worker_death_kills_its_children(harpd: Harpd, notes: Path) -> None:
    last = harpd.call("escapes_and_dies", str(notes))[-1]
    assert (last["error"]["type"], last["error"]["data"]) == ("call_died", {"signal": "SIGKILL"})
    assert len(pids(notes)) == 3
    assert all_dead(pids(notes))


def test_worker_not_exiting_after_end_is_killed(harpd: Harpd) -> None:
    assert harpd.call("says_its_end_and_stays") == [ACKNOWLEDGED, {"result": "forged"}]
    wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the call's end")


def supervisor_connection(harpd: Harpd) -> socket.socket:
    """Open a connection to the supervisor like the frontend."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(DEADLINE)
    descriptor = os.open(harpd.runtime_directory, os.O_PATH)
    try:
        connection.connect(f"/proc/self/fd/{descriptor}/supervisor")
    finally:
        os.close(descriptor)
    return connection


def supervisors_request(call: str, procedure: str, *arguments: Any) -> bytes:
    header = json.dumps({"call": call, "procedure": procedure}).encode()
    return PREFACE + encode_frame(1, START, header + b"\n" + json.dumps(arguments).encode())


def test_frontend_close_at_any_time_stops_call(harpd: Harpd, notes: Path) -> None:
    moments = random.Random(7)
    for number in range(60):
        request = supervisors_request(f"any-moment-{number}", "streams", str(notes))
        with supervisor_connection(harpd) as connection:
            connection.sendall(request[: moments.choice([0, 1, 20, len(request) - 1, *[len(request)] * 6])])
            if moments.random() < 0.5:
                connection.shutdown(socket.SHUT_WR)
            elif moments.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            if moments.random() < 0.3:
                connection.settimeout(moments.random() / 20)
                with contextlib.suppress(TimeoutError):
                    connection.recv(100)
    wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the end of all")
    assert all_dead(pids(notes))
    assert harpd.call("same", 1)[-1] == {"result": 1}


def test_supervisor_closes_after_processes_have_ended(harpd: Harpd, notes: Path) -> None:
    with supervisor_connection(harpd) as connection:
        connection.sendall(supervisors_request("proof", "resists", str(notes)))
        wait_word(notes, "ready")
        wait_until(lambda: connection.recv(65536, socket.MSG_PEEK), DEADLINE, "the acknowledgement")
        connection.sendall(encode_frame(1, HANG_UP))
        frames = FrameBuffer(1 << 20)
        received: list[Frame] = []
        while not received or received[-1].kind != CLOSED:
            received += frames.feed(connection.recv(65536))
    assert all_dead(pids(notes))
    assert [frame.body for frame in received] == [b'{"harp":1,"stream_result":false}\n', b""]


@pytest.mark.parametrize(
    "garbage",
    [b"\n", b"[]\n", b"\xff\n", b"{}\n", b'{"procedure":[]}\n', b'{"control":5}\n'],
)
def test_supervisor_socket_garbage_is_rejected(harpd: Harpd, garbage: bytes) -> None:
    with supervisor_connection(harpd) as connection:
        connection.sendall(garbage)
        connection.recv(1000)
    assert harpd.call("same", 1)[-1] == {"result": 1}


def test_zygote_retired_exits_after_last_call(own: Harpd, notes: Path) -> None:
    with own, own.connect() as first, own.connect() as second:
        for client in (first, second):
            client.send(own.request("sleeps", [str(notes)]))
            assert client.message() == ACKNOWLEDGED
        wait_until(lambda: len(pids(notes)) == 2, DEADLINE, "both")
        old = own.zygote
        own.procedures_file.write_text(CHANGED + OWN)
        assert own.reload()["event"] == "reloaded"
        assert own.call("version")[-1] == {"result": 2}
        first.close()
        wait_until(lambda: own.status()["calls"] == 1, DEADLINE, "the first call's end")
        assert not is_dead(old)
        second.close()
        wait_until(lambda: is_dead(old), DEADLINE, "the old zygote's end")
        own.procedures_file.write_text("import os\nos._exit(1)\n")
        assert own.reload()["event"] == "reload failed; nothing is changed"
        assert own.call("version")[-1] == {"result": 2}
        nothing_is_left(own)


def test_load_hanging_is_replaced_by_next(own: Harpd) -> None:
    with own:
        started, procedures = own.directory / "started", own.procedures_file.read_text()
        own.procedures_file.write_text(f"import time\nopen({str(started)!r}, 'w')\ntime.sleep(3600)\n")
        with supervisor_connection(own) as connection:
            connection.sendall(b'{"control":"reload"}\n')
            wait_until(started.exists, DEADLINE, "the hanging load")
            assert own.call("version")[-1] == {"result": 1}
            own.procedures_file.write_text(procedures)
            assert own.reload()["event"] == "reloaded"
            assert json.loads(connection.recv(1000)) == {"error": "another load has begun"}
        nothing_is_left(own)


def test_shutdown_kills_resisting_calls(own: Harpd, notes: Path) -> None:
    own.start()
    with own.connect() as client, own.connect() as obeying:
        client.send(own.request("resists", [str(notes)]))
        obeying.send(own.request("obeys", [str(notes)]))
        for one in (client, obeying):
            assert one.message() == ACKNOWLEDGED
        wait_until(lambda: words(notes).count("ready") == 2, DEADLINE, "both")
        assert own.stop() == 0
        for one in (client, obeying):
            assert one.message()["error"]["type"] == "shutdown"
    assert len(pids(notes)) == 6
    assert all_dead(pids(notes))
    assert not own.events("callback failed")
    assert not own.events("supervisor did not stop; killing it")


def test_signal_to_all_processes_ends_in_order(own: Harpd, notes: Path) -> None:
    own.start()
    with own.connect() as client:
        client.send(own.request("sleeps", [str(notes)]))
        assert client.message() == ACKNOWLEDGED
        wait_pid(notes)
        for pid in (own.zygote, own.supervisor):
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                os.kill(pid, number)
        assert own.call("same", 1)[-1] == {"result": 1}
        assert own.stop() == 0
        assert client.message()["error"]["type"] == "shutdown"


def test_frontend_death_stops_bound_calls(own: Harpd, notes: Path) -> None:
    own.start()
    with own.connect() as client:
        client.send(own.request("resists", [str(notes)]))
        wait_word(notes, "ready")
        supervisor = own.supervisor
        own.kill()
        wait_until(lambda: all_dead(pids(notes)), DEADLINE, "the end of the call's processes")
        wait_until(lambda: is_dead(supervisor), DEADLINE, "the end of a supervisor that nobody wants")
    assert len(own.events("launcher exited; resumable calls continue")) == 1


def test_frontend_death_without_directory_stops_all(own: Harpd, notes: Path) -> None:
    own.without_runtime_directory().start()
    with own.connect() as client:
        client.send(own.request("resists", [str(notes)]))
        wait_word(notes, "ready")
        family = psutil.Process(own.pid).children(recursive=True)
        own.kill()
        wait_until(lambda: not any(map(is_running, family)), DEADLINE, "the end of everything")
    assert all_dead(pids(notes))
    assert len(own.events("frontend died; stopping its calls")) == 1


def test_zygote_hanging_does_not_delay_shutdown(own: Harpd, notes: Path) -> None:
    own.start()
    with own.connect() as client:
        zygote, supervisor = own.zygote, own.supervisor
        os.kill(zygote, signal.SIGSTOP)
        for preforked in psutil.Process(zygote).children():
            preforked.kill()
            wait_until(partial(is_dead, preforked.pid), DEADLINE, "the death of a pre-forked worker")
        client.send(own.request("sleeps", [str(notes)]))
        wait_until(lambda: own.status()["calls"] == 1, DEADLINE, "the call that can't begin")
        own.kill()
    with own:  # the next supervisor works, and kills the remaining processes in the end
        assert own.call("version")[-1] == {"result": 1}
        assert not all_dead([supervisor])
    wait_until(lambda: all_dead([zygote, supervisor]), DEADLINE, "the end of both")
    assert not notes.exists()


def test_zygote_death_kills_processes_of_its_calls(own: Harpd, notes: Path) -> None:
    with own, own.connect() as client:
        client.send(own.request("resists", [str(notes)]))
        assert client.message() == ACKNOWLEDGED
        wait_word(notes, "ready")
        os.kill(own.zygote, signal.SIGKILL)
        assert client.message()["error"]["type"] == "call_died"
        assert client.lines() == []
        assert all_dead(pids(notes))
        wait_until(lambda: own.status()["zygote"], DEADLINE, "the next zygote")
        assert own.call("same", 1)[-1] == {"result": 1}
        nothing_is_left(own)


def test_zygote_hanging_delays_new_calls_only(own: Harpd, notes: Path) -> None:
    with own, own.connect() as running, own.connect() as waiting, own.connect() as leaving:
        running.send(own.request("streams", [str(notes)]))
        assert running.message() == STREAMING
        zygote = own.zygote
        os.kill(zygote, signal.SIGSTOP)
        try:
            waiting.send(own.request("same", [2]))
            leaving.send(own.request("sleeps", [str(notes) + "2"]))
            wait_until(lambda: own.status()["calls"] == 3, DEADLINE, "all three")
            leaving.close()
            for number in range(1000):
                assert running.message() == {"stream": number}
        finally:
            os.kill(zygote, signal.SIGCONT)
        assert waiting.lines() == [ACKNOWLEDGED, {"result": 2}]
        running.close()
        nothing_is_left(own)
        assert all_dead(pids(notes) + pids(Path(str(notes) + "2")))


def test_supervisor_death_kills_escaped_processes(own: Harpd, notes: Path) -> None:
    with own:
        with own.connect() as client:
            client.send(own.request("resists", [str(notes)]))
            assert client.message() == ACKNOWLEDGED
            wait_word(notes, "ready")
            os.kill(own.supervisor, signal.SIGKILL)
            assert client.message()["error"]["type"] == "call_died"
        assert own.call("same", 1)[-1] == {"result": 1}  # so the next supervisor has cleaned up
        assert len(pids(notes)) == 3
        assert all_dead(pids(notes))
        own.wait_event("killed orphaned processes")
        nothing_is_left(own)


def record(harpd: Harpd, *contents: str) -> Path:
    """Write the state file of a dead supervisor, an entry for each content."""
    file = harpd.runtime_directory / "calls" / "dead.1"
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    entries = [encode_entry(Purpose.STOP_AND_REPORT, content.encode()) for content in contents]
    file.write_bytes(b"".join(entry.ljust(ENTRY_SIZE, b"\0") for entry in entries))
    return file


def test_state_file_with_reused_pid_kills_no_other(own: Harpd) -> None:
    """A session without its leader, like that of a daemon, and processes whose pids a state file names."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    program = "import os, sys, time\nos.setsid()\nif os.fork(): os._exit(0)\nprint(os.getpid(), flush=True)\n"
    leader = subprocess.Popen([sys.executable, "-c", program + "time.sleep(3600)"], stdout=subprocess.PIPE)
    plain = subprocess.Popen(["sleep", "3600"])
    assert leader.stdout is not None
    stranger = int(leader.stdout.readline())
    leader.wait()
    start = int(Path(f"/proc/{plain.pid}/stat").read_text().rsplit(") ", 1)[1].split()[19])
    try:
        states = [
            {"call": "session", "boot": boot, "pid": leader.pid, "start": 1},
            {"call": "another-start", "boot": boot, "pid": plain.pid, "start": start - 1},
            {"call": "another-boot", "boot": "another", "pid": plain.pid, "start": start},
        ]
        file = record(own, *map(json.dumps, states), "", '{"pid": 1', "[]", '{"pid": 1, "start": 0}')
        with own:
            assert own.call("same", 1)[-1] == {"result": 1}
            assert not own.events("killed orphaned processes")
            assert not file.exists()
        assert not is_dead(stranger)
        assert plain.poll() is None
    finally:
        leader.stdout.close()
        os.kill(stranger, signal.SIGKILL)
        plain.kill()
        plain.wait()


def test_hundred_resisting_calls_are_stopped_together(own: Harpd, notes: Path) -> None:
    with own:
        own.call("same", 1)  # an address that has authenticated may have more connections
        clients = [own.connect() for _ in range(100)]
        for client in clients:
            client.send(own.request("resists", [str(notes)]))
        wait_until(lambda: words(notes).count("ready") == 100, DEADLINE, "all calls")
        began = time.monotonic()
        for client in clients:
            client.close()
        wait_until(lambda: own.status()["calls"] == 0, DEADLINE, "the end of all")
        assert time.monotonic() - began < 100 * GRACE  # the time that one after the other would take
        assert len(pids(notes)) == 300
        assert all_dead(pids(notes))
        nothing_is_left(own)
