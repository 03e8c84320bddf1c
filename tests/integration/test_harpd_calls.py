"""Calls through a real harpd: procedures, users, arguments, and the output on the wire and in the log."""

from __future__ import annotations

import os
import re
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.calls import ACKNOWLEDGED, error, nothing_is_left, printed, result
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd, LineClient
from support.procedures_file import PROCEDURES
from support.state_entries import read_entries

OWN = r"""
import json, os, sys, threading, time, warnings
from harpd.proc import Procedure, Result, StreamingProcedure, procedure, streaming_procedure

print("printed while loading")
plain_value = 5
LATE = []

@procedure
def named(**values):
    return values

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

class Adding(Procedure):
    def __call__(self, *args, **kwargs):
        return super().__call__("added", *args, **kwargs)

class Marked(StreamingProcedure):
    def __call__(self, *args, **kwargs):
        for record in super().__call__(*args, **kwargs):
            yield {"record": record}

class Summed(StreamingProcedure):
    def __call__(self, *args):
        self.sum = 0
        return map(self.add, super().__call__(*args))
    def add(self, number):
        self.sum += number
        return number
    def result(self):
        return self.sum

class Summary(StreamingProcedure):
    def result(self):
        return {"end": super().result()}

def numbers(many):
    yield from range(many)
    yield Result("end")

adding = Adding(lambda first, second: [first, second])
marked = Marked(numbers)
summed = Summed(numbers)
summary = Summary(numbers)

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
            "bytes": b"x", "key": {(1, 2): 3}, "keys": {"a": {1: "a", "1": "b"}}}[what]

@procedure
def raises_long(length):
    class_ = type("E" * length, (Exception,), {"__module__": "m" * length})
    raise class_("x" * length)

@procedure
def raises_chained():
    try:
        {}["key"]
    except KeyError as error:
        raise ValueError("outer") from error

@streaming_procedure
def stream_bad():
    yield 1
    yield {"a": [object()]}

@procedure
def raises(kind):
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
def nested(depth):
    value = []
    for _ in range(depth - 1):
        value = [value]
    return value

@procedure
def sizes(text):
    return [len(text), text]

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
    return [masks["SigBlk"], signal.getsignal(signal.SIGINT) == signal.SIG_DFL]
"""

STREAMING = {"harp": 1, "stream_result": True}


@pytest.fixture(scope="module")
def harpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    with Harpd(
        tmp_path_factory.mktemp("calls"), PROCEDURES + OWN, {"limits": {"max_calls": 300, "kill_grace": 1}}
    ) as harpd:
        yield harpd
        nothing_is_left(harpd)


def test_instances_are_exposed_under_variable_names(harpd: Harpd) -> None:
    assert result(harpd, "options") == "with options"
    assert result(harpd, "doubled", "ab") == "abab"
    assert harpd.call("counted", 2) == [STREAMING, {"stream": 0}, {"stream": 1}, {"result": 2}]
    assert result(harpd, "bare", "word") == "WORD"
    assert result(harpd, "adding", 1) == ["added", 1]
    assert harpd.call("adding", 1, 2)[-1]["exception"]["type"] == "TypeError"  # its own arguments are not checked
    assert result(harpd, "builtin", 1, 3, 2) == 3
    for name in ("alias", "class", "two words"):
        assert result(harpd, name, 1) == [1]


@pytest.mark.parametrize(
    ("procedure", "records", "end"),
    [("marked", [{"record": 0}, {"record": 1}], "end"), ("summed", [0, 1], 1), ("summary", [0, 1], {"end": "end"})],
)
def test_streaming_subclass_changes_records_and_result(
    harpd: Harpd, procedure: str, records: list[Any], end: Any
) -> None:
    assert harpd.call(procedure, 2) == [STREAMING, *({"stream": record} for record in records), {"result": end}]


@pytest.mark.parametrize("name", ["plain_value", "Procedure", "os", "__name__", "echo.function", "\ud800", "no"])
def test_name_without_decorator_is_not_exposed(harpd: Harpd, name: str) -> None:
    (message,) = harpd.call(name)
    assert message["error"]["type"] == "no_such_procedure"
    assert message["error"]["data"] == {"procedure": name}


@pytest.mark.parametrize(
    ("procedure", "arguments", "quoted"),
    [
        ("two", [1], "missing a required argument: 'b'"),
        ("two", [1, 2, 3, 4], "too many positional arguments"),
        ("two", {"a": 1, "b": 2}, "'a"),
        ("options", {"x": 1}, "got an unexpected keyword argument 'x'"),
        ("counted", [], "missing a required argument: 'many'"),
        ("bare", [], "missing a required argument: 'word'"),
    ],
)
def test_arguments_not_fitting_are_rejected(harpd: Harpd, procedure: str, arguments: Any, quoted: str) -> None:
    with harpd.connect() as client:
        client.send(harpd.request(procedure, arguments))
        _, last = client.lines()
    assert last["error"]["type"] == "invalid_argument_list"
    assert quoted in last["error"]["message"]
    assert "secret" not in last["error"]["message"]


def test_named_arguments_are_passed(harpd: Harpd) -> None:
    for procedure, arguments, expected in [
        ("named", {"": 1, "b": [2], "self": 3, "class": 4}, {"": 1, "b": [2], "self": 3, "class": 4}),
        ("takes_self", {"self": 5}, 5),
    ]:
        with harpd.connect() as client:
            client.send(harpd.request(procedure, arguments))
            assert client.lines() == [ACKNOWLEDGED, {"result": expected}]


def test_values_deep_and_large_arrive(harpd: Harpd) -> None:
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
    ("what", "quoted"),
    [
        ("set", "type set has no form in JSON"),
        ("nan", "at [1]: nan is not a number of JSON"),
        ("deep", "at ['a'][1]['b']: type harpd_procedures.give.<locals>.Strange has no form"),
        ("bytes", "type bytes has no form in JSON"),
        ("key", "a key is of type tuple"),
        ("keys", "at ['a']: the keys 1 and '1' are the same in JSON"),
    ],
)
def test_result_not_json_is_invalid_message(harpd: Harpd, what: str, quoted: str) -> None:
    fault = error(harpd, "give", what)
    assert fault["type"] == "invalid_message"
    assert quoted in fault["message"]


@pytest.mark.parametrize("procedure", ["long", "stream_long"])
def test_payload_too_long_is_invalid_message(harpd: Harpd, procedure: str) -> None:
    fault = error(harpd, procedure, 64 * 1024 * 1024)
    assert fault["type"] == "invalid_message"
    assert "67108866 bytes; a record or a result may have 67108800" in fault["message"]


def test_record_not_json_is_invalid_message(harpd: Harpd) -> None:
    assert harpd.call("stream_bad")[:2] == [STREAMING, {"stream": 1}]
    fault = error(harpd, "stream_bad")
    assert fault["type"] == "invalid_message"
    assert fault["message"].startswith("cannot encode record 1 as JSON: at ['a'][0]: type object")


@pytest.mark.parametrize(
    ("kind", "type", "message", "module"),
    [
        ("exit", "SystemExit", "3", "builtins"),
        ("key", "KeyError", "'k'", "builtins"),
        ("interrupt", "KeyboardInterrupt", "", "builtins"),
        ("broken", "Broken", "(str() of the exception failed)", "harpd_procedures"),
        ("moved", "Moved", "m", "None"),
        ("surrogate", "ValueError", "\ud800", "builtins"),
        ("stop", "StopIteration", "1", "builtins"),
    ],
)
def test_exception_is_sent_with_class_and_module(harpd: Harpd, kind: str, type: str, message: str, module: str) -> None:
    raised = {"type": type, "message": message, "data": {"class": type, "module": module}}
    assert harpd.call("raises", kind) == [ACKNOWLEDGED, {"exception": raised}]


def test_exception_text_is_cut_with_a_mark(harpd: Harpd) -> None:
    exception = harpd.call("raises_long", 70_000_000)[-1]["exception"]
    end = "... (70000000 characters, cut at 65536)"
    for text, letter in [(exception["type"], "E"), (exception["message"], "x"), (exception["data"]["module"], "m")]:
        assert text == letter * 65536 + end
    with harpd.connect() as client:
        client.send(harpd.request("options", {"x" * 1_000_000: 1}))
        assert client.lines()[-1]["error"]["message"].endswith("cut at 65536)")


def test_traceback_is_logged_as_a_warning(harpd: Harpd) -> None:
    harpd.call("raises_chained")
    event = harpd.wait_event("procedure raised", call=harpd.last_call())
    assert event["level"] == "warning"
    first, *_, last = lines = event["traceback"].splitlines()
    assert (first, last) == ("Traceback (most recent call last):", "ValueError: outer")
    assert '    raise ValueError("outer") from error' in lines
    assert "KeyError: 'key'" in lines
    assert not [line for line in lines if "harpd/worker" in line]  # it begins with the procedure
    harpd.call("raises", "broken")
    event = harpd.wait_event("procedure raised", call=harpd.last_call())
    assert "Broken: <exception str() failed>" in event["traceback"]


def test_exception_after_records_is_sent(harpd: Harpd) -> None:
    assert [list(message)[-1] for message in harpd.call("fail_late")] == ["stream_result", "stream", "exception"]


@pytest.mark.parametrize(("how", "end"), [("yield", 2), ("return", 2), ("return plain", None), ("none", None)])
def test_stream_ends_with_result(harpd: Harpd, how: str, end: Any) -> None:
    assert harpd.call("ends", how) == [STREAMING, {"stream": 1}, {"result": end}]


def test_stream_from_iterable_without_generator(harpd: Harpd) -> None:
    assert harpd.call("no_generator", "list") == [STREAMING, {"stream": 1}, {"stream": 2}, {"result": None}]
    assert harpd.call("no_generator", "result") == [STREAMING, {"result": 7}]
    assert harpd.call("no_generator", "number")[1]["exception"]["type"] == "TypeError"


def test_generator_is_closed_after_result(harpd: Harpd, tmp_path: Path) -> None:
    assert harpd.call("cleans_up", str(tmp_path / "file")) == [STREAMING, {"result": "done"}]
    assert (tmp_path / "file").read_text() == "cleaned up"


@pytest.mark.parametrize("code", [0, 3])
def test_worker_exit_without_result_is_call_died(harpd: Harpd, code: int) -> None:
    message = f"the call's process ended without a result, exit code {code}"
    assert error(harpd, "leave", code) == {"type": "call_died", "message": message, "data": {"code": code}}


def test_forked_child_cannot_write_result(harpd: Harpd) -> None:
    assert result(harpd, "forks") == "the parent's"
    assert harpd.call("forks_streaming") == [STREAMING, {"stream": 0}, {"stream": 1}, {"result": True}]


def test_threads_and_exit_handlers_do_not_change_result(harpd: Harpd) -> None:
    assert result(harpd, "threads") == 10
    assert result(harpd, "registers") == "registered"


def test_closed_descriptors_never_corrupt_files(harpd: Harpd, tmp_path: Path) -> None:
    assert error(harpd, "closes_all", str(tmp_path / "file"))["type"] == "call_died"
    assert (tmp_path / "file").read_bytes() == b""
    for how in ("closes", "replaces"):
        assert result(harpd, "prints_around", how) == how


def test_call_environment(harpd: Harpd) -> None:
    found = result(harpd, "surroundings")
    assert re.fullmatch(r"[0-9a-f-]{36}", found["call"])
    assert found["call"] == harpd.last_call()
    assert found["stdin"] == ""
    assert found["sid"]
    kinds = sorted(re.sub(r"\d+", "N", target) for target in found["fds"].values())
    assert kinds == ["/dev/null", *["pipe:[N]"] * 4]  # its output, its own channel, and nothing else


def test_executed_program_inherits_standard_streams_only(harpd: Harpd) -> None:
    listing, shown = result(harpd, "executed")
    targets = [line.split(" -> ")[1] for line in listing.splitlines() if " -> " in line]
    assert not [target for target in targets if target.startswith(("socket", "anon_inode"))]
    assert len(targets) == 4, listing  # three streams, and the directory that ls lists
    limit, call, *status = shown.splitlines()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert int(limit) >= min(soft, 1024)
    assert call == harpd.last_call()
    blocked = next(line for line in status if line.startswith("SigBlk"))
    assert int(blocked.split()[1], 16) == 0


def test_signals_have_default_effect(harpd: Harpd) -> None:
    assert result(harpd, "signals") == [0, True]


def test_printed_lines_are_logged_with_call_id(harpd: Harpd) -> None:
    assert harpd.call("prints", "one\ntwo\n\nno line feed", "to stderr\n") == [ACKNOWLEDGED, {"result": None}]
    call = harpd.last_call()
    wait_until(lambda: len(printed(harpd, call)) >= 5, DEADLINE, "the lines in the log")
    events = [(event["stream"], event["text"]) for event in harpd.events("call printed", call=call)]
    assert [text for stream, text in events if stream == "stdout"] == ["one", "two", "", "no line feed"]
    assert [text for stream, text in events if stream == "stderr"] == ["to stderr"]
    assert "printed while loading" not in printed(harpd, call)


def test_printed_line_is_logged_immediately(harpd: Harpd, tmp_path: Path) -> None:
    with harpd.connect() as client:
        client.send(harpd.request("prints_then_waits", [str(tmp_path / "go")]))
        harpd.wait_event("call printed", procedure="prints_then_waits", text="before the wait")
        (tmp_path / "go").touch()
        assert client.lines()[-1] == {"result": None}


def test_printed_bytes_and_long_lines_are_logged(harpd: Harpd) -> None:
    result(harpd, "prints_bytes", "\x00\xff\xfe\n", 1)
    call = harpd.last_call()
    wait_until(lambda: printed(harpd, call) == ["\x00\\xff\\xfe"], DEADLINE, "the bytes")
    text = "x" + "\u20ac" * 1000
    result(harpd, "prints_bytes", text.encode().decode("latin-1"), 60)
    call = harpd.last_call()
    wait_until(lambda: "".join(printed(harpd, call)) == text * 60, DEADLINE, "all of the long line")
    assert 18 < len(printed(harpd, call)) < 36
    assert result(harpd, "prints_around", "surrogate") == "surrogate"
    harpd.wait_event("call printed", call=harpd.last_call(), text="\\ud800 and \u20ac")


def test_calls_two_hundred_in_parallel_return(harpd: Harpd, tmp_path: Path) -> None:
    clients: list[LineClient] = []
    try:
        for _ in range(200):
            client = harpd.connect()
            clients.append(client)
            client.send(harpd.request("wait_for", [str(tmp_path / "go")]))
        for client in clients:
            assert client.message() == ACKNOWLEDGED
        assert harpd.status()["calls"] == 200
        (tmp_path / "go").touch()
        for client in clients:
            assert client.lines() == [{"result": "there"}]
    finally:
        for client in clients:
            client.close()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_calls_leave_no_descriptors_or_files(harpd: Harpd) -> None:
    status = harpd.status()
    result(harpd, "echo", 1)
    wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the call's end")
    processes = (status["supervisor"], status["zygote"])
    before = [descriptors(pid) for pid in processes]
    workers = [threading.Thread(target=lambda: [harpd.call("echo", 1) for _ in range(75)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # A pipe closes when its end is seen, a moment after the call. Pre-forked processes, each with a few descriptors,
    # come and go; one descriptor left by each call would be 300.
    for pid, number in zip(processes, before, strict=True):
        wait_until(lambda pid=pid, most=number + 30: descriptors(pid) < most, DEADLINE, f"{number} descriptors")  # type: ignore[misc]
    assert read_entries(harpd.runtime_directory) == {}


def test_client_not_reading_pauses_its_call_only(harpd: Harpd, tmp_path: Path) -> None:
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
            time.sleep(0.2)  # long compared with the time of a record
            return stands()

        wait_until(has_stopped, DEADLINE, "the flood's standstill")
        assert int(last) < 500
        memory = int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{harpd.supervisor}/status").read_text())[0])
        assert memory < 100_000
        assert result(harpd, "echo", 1) == [1]
        spent = cpu(harpd.supervisor)
        time.sleep(0.5)  # the processor time of this interval is measured
        assert cpu(harpd.supervisor) - spent < 0.2, "the supervisor is busy with a call that stands"
        assert [next(iter(message)) for message in deaf.lines()] == ["stream"] * 1000 + ["result"]


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_calls_above_limit_are_rejected(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES + OWN, {"limits": {"max_calls": 1, "kill_grace": 1}}) as harpd:
        with harpd.connect() as client:
            client.send(harpd.request("wait_for", [str(tmp_path / "go")]))
            assert client.message() == ACKNOWLEDGED
            (refusal,) = harpd.call("echo", 1)
            assert refusal["error"]["type"] == "too_many_calls"
            (tmp_path / "go").touch()
            assert client.lines() == [{"result": "there"}]
        wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the call's end")
        assert result(harpd, "echo", 1) == [1]
        nothing_is_left(harpd)


def test_call_without_free_descriptor_is_rejected(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES + OWN, {"limits": {"kill_grace": 1}}, descriptors=180) as harpd:
        clients: list[LineClient] = []
        try:
            for _ in range(60):
                client = harpd.connect()
                clients.append(client)
                client.send(harpd.request("wait_for", [str(tmp_path / "never")]))
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
