"""Calls through a real harpd: what runs, as whom, with which arguments, and what of it reaches the wire and the log."""

from __future__ import annotations

import os
import pwd
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd, LineClient, is_dead

PROCEDURES = r"""
import json, os, sys, threading, time, warnings
from harpd.proc import Procedure, Result, StreamingProcedure, procedure, streaming_procedure

print("printed while loading")
plain_value = 5
LATE = []

@procedure
def echo(*values, **named):
    return named or list(values)

@procedure
def long(length):
    return "x" * length

@streaming_procedure
def stream_long(length):
    yield "x" * length

@procedure(timeout=50)
def options():
    return "with options"

@procedure
def two(a, b, /, c=1, *, d="secret"):
    return [a, b, c, d]

class Doubled(Procedure):
    def __call__(self, /, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)

class Counted(StreamingProcedure):
    def __call__(self, many):
        yield from super().__call__(many)
        yield Result(many)

class Bare(Procedure):
    def __init__(self):
        pass
    def __call__(self, word):
        return word.upper()

doubled = Doubled(lambda word: word)
counted = Counted(range, timeout=50)
bare = Bare()
builtin = Procedure(max)
alias = echo
globals()["class"] = echo
globals()["two words"] = echo

@procedure
def takes_self(self):
    return self

@procedure
def give(what):
    class Strange: pass
    return {"set": {1}, "nan": [1.0, float("nan")], "deep": {"a": [0, {"b": Strange()}]},
            "bytes": b"x", "key": {(1, 2): 3}}[what]

@streaming_procedure
def stream_bad():
    yield 1
    yield {"a": [object()]}

@procedure
def fail(kind):
    class Broken(Exception):
        def __str__(self):
            raise SystemExit("not even this")
    class Moved(Exception):
        __module__ = None
    raise {"exit": SystemExit(3), "key": KeyError("k"), "broken": Broken(), "interrupt": KeyboardInterrupt(),
           "moved": Moved("m"), "surrogate": ValueError("\ud800"), "stop": StopIteration(1)}[kind]

@streaming_procedure
def fail_late():
    yield 1
    raise ValueError("late")

@streaming_procedure
def ends(how):
    yield 1
    if how == "yield":
        yield Result(2)
        yield 3
    elif how == "return":
        return Result(2)
    elif how == "return plain":
        return 2

@streaming_procedure
def no_generator(how):
    return {"list": [1, 2], "result": Result(7), "number": 7}[how]

@streaming_procedure
def cleans_up(path):
    try:
        yield Result("done")
    finally:
        with open(path, "w") as file:
            file.write("cleaned up")

def ids():
    return {"uid": os.getresuid(), "gid": os.getresgid(), "groups": sorted(os.getgroups()),
            "user": os.environ.get("USER"), "home": os.environ.get("HOME")}

@procedure
def identity():
    return ids()

@streaming_procedure
def stream_identity():
    yield ids()

@procedure
def surroundings():
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            fds[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            pass
    return {"call": os.environ["HARPD_CALL"], "fds": fds, "stdin": sys.stdin.read(), "sid": os.getsid(0) == os.getpid()}

@procedure
def executed():
    import subprocess
    listing = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False).stdout
    shown = subprocess.run(["sh", "-c", "ulimit -n; echo $HARPD_CALL; cat /proc/self/status"],
                           capture_output=True, text=True).stdout
    return [listing, shown]

@procedure
def prints(out="", err=""):
    sys.stdout.write(out)
    sys.stderr.write(err)

@procedure
def prints_then_waits(path):
    print("before the wait")
    while not os.path.exists(path):
        time.sleep(0.01)

@procedure
def prints_bytes(text, times):
    os.write(1, text.encode("latin-1") * times)

@procedure
def prints_around(how):
    if how == "closes":
        os.close(1); os.close(2)
    elif how == "replaces":
        sys.stdout = None
        sys.stderr = object()
    elif how == "surrogate":
        print("\ud800 and \u20ac")
    elif how == "shell":
        os.system("echo to stdout > /dev/stdout; echo to stderr > /dev/stderr")
    return how

@procedure
def closes_all(path):
    os.closerange(3, 4096)
    for _ in range(20):
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return "a result"

@procedure
def forks():
    if not os.fork():
        return "the child's"
    os.wait()
    return "the parent's"

@streaming_procedure
def forks_streaming():
    yield 0
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    yield 1
    yield Result(child > 0)

@procedure
def threads():
    done = []
    workers = [threading.Thread(target=lambda: done.append(1)) for _ in range(10)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    threading.Thread(target=time.sleep, args=(3600,)).start()
    return len(done)

@procedure
def registers():
    import atexit
    atexit.register(os._exit, 9)
    return "registered"

@procedure
def exits(code):
    os._exit(code)

@procedure
def nested(depth):
    value = []
    for _ in range(depth - 1):
        value = [value]
    return value

@procedure
def sizes(text):
    return [len(text), text]

@procedure
def waits(path):
    while not os.path.exists(path):
        time.sleep(0.01)
    return "waited"

@streaming_procedure
def floods(path, lines=1000):
    for number in range(lines):
        with open(path, "w") as file:
            file.write(str(number))
        yield "x" * 65536

@procedure
def signals():
    import signal
    with open("/proc/self/status") as status:
        masks = {line.split(":")[0]: int(line.split()[1], 16) for line in status if line.startswith("SigBlk")}
    return [masks["SigBlk"], signal.getsignal(signal.SIGINT) == signal.SIG_DFL,
            signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL]
"""

ACKNOWLEDGED = {"harp": 1, "stream_result": False}
STREAMING = {"harp": 1, "stream_result": True}


@pytest.fixture(scope="module")
def harpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    with Harpd(tmp_path_factory.mktemp("calls"), PROCEDURES, {"limits": {"calls": 300, "kill_grace": 1}}) as harpd:
        yield harpd
        nothing_is_left(harpd)


def nothing_is_left(harpd: Harpd) -> None:
    """No call, record or fault of the warden is left."""
    wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the end of the calls")
    assert not list((harpd.runtime_directory / "calls").iterdir())
    assert not harpd.events("fault in the warden")


def result(harpd: Harpd, procedure: str, *arguments: Any) -> Any:
    acknowledged, last = harpd.call(procedure, *arguments)
    assert acknowledged == ACKNOWLEDGED
    assert list(last) == ["result"], last
    return last["result"]


def error(harpd: Harpd, procedure: str, *arguments: Any) -> Any:
    *_, last = harpd.call(procedure, *arguments)
    assert "error" in last, last
    return last["error"]


def printed(harpd: Harpd, call: str) -> list[str]:
    return [event["text"] for event in harpd.events("call printed", call=call)]


def last_call(harpd: Harpd, procedure: str) -> str:
    return str(harpd.events("call started", procedure=procedure)[-1]["call"])


def test_every_instance_is_exposed_under_its_variables_name(harpd: Harpd) -> None:
    assert result(harpd, "options") == "with options"
    assert result(harpd, "doubled", "ab") == "abab"
    assert harpd.call("counted", 2) == [STREAMING, {"stream": 0}, {"stream": 1}, {"result": 2}]
    assert result(harpd, "bare", "word") == "WORD"
    assert result(harpd, "builtin", 1, 3, 2) == 3
    for name in ("alias", "class", "two words"):
        assert result(harpd, name, 1) == [1]


@pytest.mark.parametrize("name", ["plain_value", "Procedure", "os", "__name__", "echo.function", "\ud800", "no"])
def test_nothing_else_is(harpd: Harpd, name: str) -> None:
    (message,) = harpd.call(name)
    assert message["error"]["type"] == "no_such_procedure"
    assert message["error"]["data"] == {"procedure": name}


@pytest.mark.parametrize(
    ("procedure", "arguments", "says"),
    [
        ("two", [1], "missing a required argument: 'b'"),
        ("two", [1, 2, 3, 4], "too many positional arguments"),
        ("two", {"a": 1, "b": 2}, "'a"),
        ("options", {"x": 1}, "got an unexpected keyword argument 'x'"),
        ("counted", [], "missing a required argument: 'many'"),
        ("bare", [], "missing a required argument: 'word'"),
    ],
)
def test_arguments_that_do_not_fit(harpd: Harpd, procedure: str, arguments: Any, says: str) -> None:
    with harpd.connect() as client:
        client.send(harpd.request(procedure, arguments))
        _, last = client.lines()
    assert last["error"]["type"] == "invalid_argument_list"
    assert says in last["error"]["message"]
    assert "secret" not in last["error"]["message"]


def test_named_arguments(harpd: Harpd) -> None:
    for procedure, arguments, expected in [
        ("echo", {"": 1, "b": [2], "self": 3, "class": 4}, {"": 1, "b": [2], "self": 3, "class": 4}),
        ("takes_self", {"self": 5}, 5),
    ]:
        with harpd.connect() as client:
            client.send(harpd.request(procedure, arguments))
            assert client.lines() == [ACKNOWLEDGED, {"result": expected}]


def test_deep_and_large_values(harpd: Harpd) -> None:
    deep: list[Any] = [[[]]]
    for _ in range(250):
        deep = [deep]
    assert result(harpd, "echo", deep) == [deep]
    value = result(harpd, "nested", 900)
    for _ in range(899):
        (value,) = value
    assert value == []
    text = "\u00e4\n" * 1_000_000 + "x" * 3_000_000
    assert result(harpd, "sizes", text) == [5_000_000, text]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("set", "type set has no form in JSON"),
        ("nan", "at [1]: nan is not a number of JSON"),
        ("deep", "at ['a'][1]['b']: type harpd_procedures.give.<locals>.Strange has no form"),
        ("bytes", "type bytes has no form in JSON"),
        ("key", "a key is of type tuple"),
    ],
)
def test_a_result_that_json_can_not_carry(harpd: Harpd, what: str, says: str) -> None:
    fault = error(harpd, "give", what)
    assert fault["type"] == "invalid_message"
    assert says in fault["message"]


@pytest.mark.parametrize("procedure", ["long", "stream_long"])
def test_what_is_too_long_for_a_line(harpd: Harpd, procedure: str) -> None:
    fault = error(harpd, procedure, 64 * 1024 * 1024)
    assert fault["type"] == "invalid_message"
    assert "67108866 bytes; a record or a result may have 67108800" in fault["message"]


def test_a_record_that_json_can_not_carry(harpd: Harpd) -> None:
    assert harpd.call("stream_bad")[:2] == [STREAMING, {"stream": 1}]
    fault = error(harpd, "stream_bad")
    assert fault["type"] == "invalid_message"
    assert fault["message"].startswith("record 1 can't be written as JSON: at ['a'][0]: type object")


@pytest.mark.parametrize(
    ("kind", "type", "message", "module"),
    [
        ("exit", "SystemExit", "3", "builtins"),
        ("key", "KeyError", "'k'", "builtins"),
        ("interrupt", "KeyboardInterrupt", "", "builtins"),
        ("broken", "Broken", "(the exception's text can't be made)", "harpd_procedures"),
        ("moved", "Moved", "m", "None"),
        ("surrogate", "ValueError", "\ud800", "builtins"),
        ("stop", "StopIteration", "1", "builtins"),
    ],
)
def test_exceptions(harpd: Harpd, kind: str, type: str, message: str, module: str) -> None:
    raised = {"type": type, "message": message, "data": {"class": type, "module": module}}
    assert harpd.call("fail", kind) == [ACKNOWLEDGED, {"exception": raised}]


def test_an_exception_after_records(harpd: Harpd) -> None:
    assert [list(message)[-1] for message in harpd.call("fail_late")] == ["stream_result", "stream", "exception"]


@pytest.mark.parametrize(("how", "end"), [("yield", 2), ("return", 2), ("return plain", None), ("none", None)])
def test_ends_of_a_stream(harpd: Harpd, how: str, end: Any) -> None:
    assert harpd.call("ends", how) == [STREAMING, {"stream": 1}, {"result": end}]


def test_streams_without_a_generator(harpd: Harpd) -> None:
    assert harpd.call("no_generator", "list") == [STREAMING, {"stream": 1}, {"stream": 2}, {"result": None}]
    assert harpd.call("no_generator", "result") == [STREAMING, {"result": 7}]
    assert harpd.call("no_generator", "number")[1]["exception"]["type"] == "TypeError"


def test_a_generator_cleans_up_after_its_result(harpd: Harpd, tmp_path: Path) -> None:
    assert harpd.call("cleans_up", str(tmp_path / "file")) == [STREAMING, {"result": "done"}]
    assert (tmp_path / "file").read_text() == "cleaned up"


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_that_ends_without_a_result(harpd: Harpd, code: int) -> None:
    message = f"the call's process ended without a result, exit code {code}"
    assert error(harpd, "exits", code) == {"type": "call_died", "message": message, "data": {"code": code}}


def test_a_child_that_the_procedure_forked_has_nothing_to_say(harpd: Harpd) -> None:
    assert result(harpd, "forks") == "the parent's"
    assert harpd.call("forks_streaming") == [STREAMING, {"stream": 0}, {"stream": 1}, {"result": True}]


def test_threads_and_exit_handlers_do_not_outlive_the_procedure(harpd: Harpd) -> None:
    assert result(harpd, "threads") == 10
    assert result(harpd, "registers") == "registered"


def test_what_a_procedure_does_to_descriptors_never_hits_a_file(harpd: Harpd, tmp_path: Path) -> None:
    assert error(harpd, "closes_all", str(tmp_path / "file"))["type"] == "call_died"
    assert (tmp_path / "file").read_bytes() == b""
    for how in ("closes", "replaces"):
        assert result(harpd, "prints_around", how) == how


def test_the_surroundings_of_a_call(harpd: Harpd) -> None:
    found = result(harpd, "surroundings")
    assert re.fullmatch(r"[0-9a-f-]{36}", found["call"])
    assert found["call"] == last_call(harpd, "surroundings")
    assert found["stdin"] == ""
    assert found["sid"]
    kinds = sorted(re.sub(r"\d+", "N", target) for target in found["fds"].values())
    assert kinds == ["/dev/null", "pipe:[N]", "pipe:[N]", "socket:[N]"]  # and its own channel, nothing else


def test_what_it_executes_inherits_nothing_but_the_three_streams(harpd: Harpd) -> None:
    listing, shown = result(harpd, "executed")
    targets = [line.split(" -> ")[1] for line in listing.splitlines() if " -> " in line]
    assert not [target for target in targets if target.startswith(("socket", "anon_inode"))]
    assert len(targets) == 4, listing  # three streams, and what ls itself has open
    limit, call, *status = shown.splitlines()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert int(limit) >= min(soft, 1024)
    assert call == last_call(harpd, "executed")
    blocked = next(line for line in status if line.startswith("SigBlk"))
    assert int(blocked.split()[1], 16) == 0


def test_signals_have_their_usual_effect(harpd: Harpd) -> None:
    assert result(harpd, "signals") == [0, True, True]


def test_what_is_printed_is_in_the_log_with_the_calls_id_and_not_on_the_wire(harpd: Harpd) -> None:
    assert harpd.call("prints", "one\ntwo\n\nno line feed", "to stderr\n") == [ACKNOWLEDGED, {"result": None}]
    call = last_call(harpd, "prints")
    wait_until(lambda: len(printed(harpd, call)) >= 5, DEADLINE, "the lines in the log")
    events = [(event["stream"], event["text"]) for event in harpd.events("call printed", call=call)]
    assert [text for stream, text in events if stream == "stdout"] == ["one", "two", "", "no line feed"]
    assert [text for stream, text in events if stream == "stderr"] == ["to stderr"]
    assert "printed while loading" not in printed(harpd, call)


def test_a_line_is_in_the_log_when_it_is_printed(harpd: Harpd, tmp_path: Path) -> None:
    with harpd.connect() as client:
        client.send(harpd.request("prints_then_waits", [str(tmp_path / "go")]))
        harpd.wait_event("call printed", procedure="prints_then_waits", text="before the wait")
        (tmp_path / "go").touch()
        assert client.lines()[-1] == {"result": None}


def test_bytes_and_long_lines_in_the_log(harpd: Harpd) -> None:
    result(harpd, "prints_bytes", "\x00\xff\xfe\n", 1)
    call = last_call(harpd, "prints_bytes")
    wait_until(lambda: printed(harpd, call) == ["\x00\\xff\\xfe"], DEADLINE, "the bytes")
    text = "x" + "\u20ac" * 1000
    result(harpd, "prints_bytes", text.encode().decode("latin-1"), 100)
    call = last_call(harpd, "prints_bytes")
    wait_until(lambda: "".join(printed(harpd, call)) == text * 100, DEADLINE, "all of the long line")
    assert 30 < len(printed(harpd, call)) < 60
    assert result(harpd, "prints_around", "surrogate") == "surrogate"
    harpd.wait_event("call printed", call=last_call(harpd, "prints_around"), text="\\ud800 and \u20ac")


def test_two_hundred_calls_at_once(harpd: Harpd, tmp_path: Path) -> None:
    clients: list[LineClient] = []
    try:
        for _ in range(200):
            client = harpd.connect()
            clients.append(client)
            client.send(harpd.request("waits", [str(tmp_path / "go")]))
        for client in clients:
            assert client.message() == ACKNOWLEDGED
        assert harpd.status()["calls"] == 200
        (tmp_path / "go").touch()
        for client in clients:
            assert client.lines() == [{"result": "waited"}]
    finally:
        for client in clients:
            client.close()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_calls_leave_nothing_behind(harpd: Harpd) -> None:
    status = harpd.status()
    result(harpd, "echo", 1)
    wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the call's end")
    processes = (status["warden"], status["zygote"])
    before = [descriptors(pid) for pid in processes]
    workers = [threading.Thread(target=lambda: [harpd.call("echo", 1) for _ in range(75)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # A pipe closes when its end is seen, a moment after the call.
    wait_until(lambda: [descriptors(pid) for pid in processes] <= before, DEADLINE, f"{before} descriptors")
    assert not list((harpd.runtime_directory / "calls").iterdir())


def test_a_client_that_does_not_read_holds_up_its_own_call_alone(harpd: Harpd, tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    with harpd.connect() as deaf:
        deaf.send(harpd.request("floods", [str(progress)]))
        assert deaf.message() == STREAMING
        last = ""

        def stands() -> bool:
            nonlocal last
            before, last = last, progress.read_text() if progress.exists() else ""
            return last != "" and before == last

        def has_stopped() -> bool:
            time.sleep(0.2)  # long against what a record takes
            return stands()

        wait_until(has_stopped, DEADLINE, "the flood's standstill")
        assert int(last) < 500
        memory = int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{harpd.warden}/status").read_text())[0])
        assert memory < 100_000
        assert result(harpd, "echo", 1) == [1]
        spent = cpu(harpd.warden)
        time.sleep(0.5)  # what is measured is what the time costs
        assert cpu(harpd.warden) - spent < 0.2, "the warden is busy with a call that stands"
        assert [next(iter(message)) for message in deaf.lines()] == ["stream"] * 1000 + ["result"]


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_more_calls_than_allowed(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES, {"limits": {"calls": 1, "kill_grace": 1}}) as harpd:
        with harpd.connect() as client:
            client.send(harpd.request("waits", [str(tmp_path / "go")]))
            assert client.message() == ACKNOWLEDGED
            (refusal,) = harpd.call("echo", 1)
            assert refusal["error"]["type"] == "too_many_calls"
            (tmp_path / "go").touch()
            assert client.lines() == [{"result": "waited"}]
        wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the call's end")
        assert result(harpd, "echo", 1) == [1]
        nothing_is_left(harpd)


def test_without_descriptors_calls_are_refused_and_those_that_run_can_be_stopped(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES, {"limits": {"kill_grace": 1}}, descriptors=200) as harpd:
        clients: list[LineClient] = []
        try:
            for _ in range(60):
                client = harpd.connect()
                clients.append(client)
                client.send(harpd.request("waits", [str(tmp_path / "never")]))
            answers = [client.message() for client in clients]
            refused = [answer for answer in answers if "error" in answer]
            assert 10 < len(refused) < 60
            assert {answer["error"]["type"] for answer in refused} == {"system_error"}
        finally:
            for client in clients:
                client.close()
        wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the end of all calls")
        assert result(harpd, "echo", 1) == [1]
        nothing_is_left(harpd)


USERS = """
import os
from harpd.proc import Procedure, StreamingProcedure, procedure, streaming_procedure

def ids(path=None):
    if path:
        open(path, "w").close()
    return {"uid": os.getresuid(), "gid": os.getresgid(), "groups": sorted(os.getgroups()),
            "names": [os.environ.get(name) for name in ("USER", "LOGNAME", "HOME")]}

def stream_ids(path=None):
    yield ids(path)

OPTIONS = {
    "nothing": {}, "name": {"uid": "daemon"}, "number": {"uid": NUMBER}, "text": {"uid": "NUMBER"},
    "user_and_group": {"uid": "daemon", "gid": "nogroup"}, "groups": {"uid": "daemon", "gid": ["nogroup", 7, "7", 8]},
    "group": {"gid": 7}, "unknown": {"uid": 54321}, "unknown_and_group": {"uid": 54321, "gid": [7]},
    "no_user": {"uid": "no-such-user"}, "no_group": {"uid": "daemon", "gid": "no-such-group"},
    "odd_user": {"uid": "a\\0b"}, "minus_one": {"uid": 2**32 - 1}, "huge": {"uid": 2**70, "gid": 1},
    "huge_group": {"gid": 2**70},
}
for name, options in OPTIONS.items():
    globals()["plain_" + name] = Procedure(ids, **options)
    globals()["stream_" + name] = StreamingProcedure(stream_ids, **options)

@procedure(uid="nobody")
def shell():
    os.system("echo to stdout > /dev/stdout; echo to stderr > /dev/stderr")

@procedure(uid="nobody")
def regain():
    for change in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):
        try:
            change()
        except PermissionError:
            continue
        return "regained"
    return "refused"

@procedure(uid="nobody")
def reach(pids):
    refused = []
    for pid in pids:
        for attempt in (lambda: os.kill(pid, 0), lambda: os.listdir(f"/proc/{pid}/fd"),
                        lambda: open(f"/proc/{pid}/mem", "rb"), lambda: open("/proc/self/mem", "rb"),
                        lambda: open(f"/proc/{os.getppid()}/environ", "rb").read()):
            try:
                attempt()
                refused.append(False)
            except PermissionError:
                refused.append(True)
    return refused
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")


def user_groups(name: str) -> list[int]:
    return sorted(set(os.getgrouplist(name, pwd.getpwnam(name).pw_gid)))


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    procedures = USERS.replace("NUMBER", str(pwd.getpwnam("daemon").pw_uid))
    with Harpd(tmp_path_factory.mktemp("users"), procedures) as harpd:
        yield harpd
        nothing_is_left(harpd)


def ids(harpd: Harpd, kind: str, name: str, *arguments: Any) -> Any:
    messages = harpd.call(f"{kind}_{name}", *arguments)
    return messages[1].get("stream") or messages[1].get("result") or messages[1]


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("kind", ["plain", "stream"])
def test_users_and_groups(users: Harpd, kind: str) -> None:
    daemon, nogroup = pwd.getpwnam("daemon"), pwd.getpwnam("nobody").pw_gid
    names = ["daemon", "daemon", daemon.pw_dir]
    uid = [daemon.pw_uid] * 3
    whole = {"uid": uid, "gid": [daemon.pw_gid] * 3, "groups": user_groups("daemon"), "names": names}
    for name in ("name", "number", "text"):
        assert ids(users, kind, name) == whole, name
    assert ids(users, kind, "user_and_group") == {**whole, "gid": [nogroup] * 3, "groups": [nogroup]}
    assert ids(users, kind, "groups") == {**whole, "gid": [nogroup] * 3, "groups": sorted([nogroup, 7, 8])}
    found = ids(users, kind, "group")
    assert (found["uid"], found["gid"], found["groups"]) == ([0] * 3, [7] * 3, [7])
    unknown = {"uid": [54321] * 3, "gid": [65534] * 3, "groups": [], "names": [None, None, "/"]}
    assert ids(users, kind, "unknown") == unknown
    assert ids(users, kind, "unknown_and_group") == {**unknown, "gid": [7] * 3, "groups": [7]}
    assert ids(users, kind, "nothing")["uid"] == [0, 0, 0]


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("kind", ["plain", "stream"])
@pytest.mark.parametrize("name", ["no_user", "no_group", "odd_user", "minus_one", "huge", "huge_group"])
def test_a_call_that_can_not_take_its_user_does_not_run(users: Harpd, kind: str, name: str, tmp_path: Path) -> None:
    found = ids(users, kind, name, str(tmp_path / "ran"))
    assert found["error"]["type"] == "system_error", found
    assert not (tmp_path / "ran").exists()


@pytest.mark.root
@needs_root
def test_a_user_once_taken_can_not_be_left(users: Harpd) -> None:
    assert result(users, "regain") == "refused"
    assert all(result(users, "reach", [users.warden, users.zygote, users.pid]))
    assert result(users, "shell") is None
    for stream in ("stdout", "stderr"):
        users.wait_event("call printed", procedure="shell", stream=stream, text=f"to {stream}")


@pytest.mark.root
@needs_root
def test_the_default_user_and_group(tmp_path: Path) -> None:
    procedures = USERS.replace("NUMBER", "1")
    daemon, nobody = pwd.getpwnam("daemon"), pwd.getpwnam("nobody")
    with Harpd(tmp_path / "user", procedures, options=("--default-user", "nobody")) as harpd:
        found = ids(harpd, "plain", "nothing")
        assert (found["uid"], found["groups"]) == ([nobody.pw_uid] * 3, user_groups("nobody"))
        assert ids(harpd, "stream", "name")["uid"] == [daemon.pw_uid] * 3
        assert ids(harpd, "plain", "group")["gid"] == [7] * 3
    options = ("--default-user", str(daemon.pw_uid), "--default-group", "7")
    with Harpd(tmp_path / "both", procedures, options=options) as harpd:
        found = ids(harpd, "stream", "nothing")
        assert (found["uid"], found["gid"], found["groups"]) == ([daemon.pw_uid] * 3, [7] * 3, [7])
        assert ids(harpd, "plain", "name")["groups"] == user_groups("daemon")


@pytest.mark.root
@needs_root
def test_without_root_no_other_user_can_be_taken(tmp_path: Path) -> None:
    """In a process of its own as nobody: the call's own part, without the daemon around it."""
    nobody = pwd.getpwnam("nobody")
    program = (
        "from harpd.users import *\n"
        "take(resolve('nobody', None)); take(resolve(None, None)); print('own')\n"
        "for uid, gid in (('daemon', None), (0, None), (None, (7,)), ('nobody', (7,))):\n"
        "    try:\n        take(resolve(uid, gid))\n        print('taken')\n"
        "    except UserError as error:\n        print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import os, sys\nimport harpd.users\n"
         f"os.setgroups({user_groups('nobody')}); os.setresgid(*[{nobody.pw_gid}] * 3); "
         f"os.setresuid(*[{nobody.pw_uid}] * 3)\nexec({program!r})"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["own", "refused", "refused", "refused", "refused"], done.stderr


UNRULY = """
import atexit, os, signal, sys, threading
from harpd.proc import procedure
atexit.register(os._exit, 7)
os.chdir("/")
os.umask(0o077)
os.environ["SET"] = "here"
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGXCPU):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU})
sys.argv[:] = ["other"]
sys.stdout.write("no line feed")
os.close(0)
threading.Thread(target=threading.Event().wait, args=(3600,)).start()

@procedure(timeout=0.2)
def slow():
    import time
    try:
        time.sleep(3600)
    finally:
        print("cleaned up")

@procedure
def setting():
    return [os.getcwd(), os.environ["SET"], os.read(0, 10).decode(), __name__]
"""


def test_a_procedures_file_may_do_what_it_likes(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "with a space and \u00fc", UNRULY, {"limits": {"kill_grace": 1}})
    with harpd:
        assert harpd.wait_event("the procedures file leaves threads running; no call has them")["threads"] == 1
        assert result(harpd, "setting")[:3] == ["/", "here", ""]
        assert error(harpd, "slow")["type"] == "timeout"
        harpd.wait_event("call printed", procedure="slow", text="cleaned up")
        assert "no line feed" not in printed(harpd, last_call(harpd, "setting"))
        zygote = harpd.zygote
        assert harpd.reload()["event"] == "reloaded"
        wait_until(lambda: is_dead(zygote), DEADLINE, "the end of the zygote that has threads")
        nothing_is_left(harpd)


def test_a_service_goes_on_and_goes_on_printing(tmp_path: Path) -> None:
    procedures = """
import os, subprocess
from harpd.proc import procedure
@procedure
def start(script, pid):
    child = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    with open(pid, "w") as file:
        file.write(str(child.pid))
"""
    go, pid = tmp_path / "go", tmp_path / "pid"
    script = f"while [ ! -e {go} ]; do sleep 0.05; done; echo still here; echo and here >&2; echo $? > {go}"
    with Harpd(tmp_path / "harpd", procedures) as harpd:
        assert result(harpd, "start", script, str(pid)) is None
        call = last_call(harpd, "start")
        wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the call's end")
        assert harpd.reload()["event"] == "reloaded"
        assert not is_dead(int(pid.read_text()))
        go.touch()
        wait_until(lambda: sorted(printed(harpd, call)) == ["and here", "still here"], DEADLINE, "what it prints")
        wait_until(lambda: go.read_text() == "0\n", DEADLINE, "the service's end")
        nothing_is_left(harpd)
