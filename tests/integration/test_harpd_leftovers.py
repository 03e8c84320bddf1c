"""Running tasks and unsaved data of a call when its procedure returns: the table of docs/procedures.md, Leftovers."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.calls import nothing_is_left, printed
from support.calls import result as quick_result
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import Harpd, is_dead
from support.procedures_file import PROCEDURES

OWN = r"""
import atexit, gzip, logging, logging.handlers, multiprocessing, subprocess, sys, tempfile, threading, weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

KEPT = []
LOADED = tempfile.TemporaryDirectory()
LOADED_FILE = open(os.path.join(LOADED.name, "file"), "w")
atexit.register(append, os.path.join(LOADED.name, "handled"), "at exit")

def wait_and_append(path, go, text):
    wait_for_file(go)
    append(path, text)

def append_forever(path):
    append(path, f"{os.getpid()}\n")
    time.sleep(3600)

@procedure
def thread(path, go, daemon):
    threading.Thread(target=wait_and_append, args=(path, go, "thread"), daemon=daemon).start()

@procedure
def thread_pool(path, go):
    KEPT.append(ThreadPoolExecutor())
    KEPT[0].submit(wait_and_append, path, go, "pool")

@procedure
def exit_handler(path):
    def raises():
        raise ValueError("in a handler")
    atexit.register(append, path, "first registered\n")
    atexit.register(raises)
    atexit.register(append, path, "last registered\n")
    atexit.register(print, "printed at exit", end="")

@procedure
def finalizer(path):
    class Thing: pass
    KEPT.append(Thing())
    weakref.finalize(KEPT[0], append, path, "finalized")

@procedure
def temporary_directory():
    KEPT.append(tempfile.TemporaryDirectory())
    KEPT.append(tempfile.NamedTemporaryFile())
    return KEPT[0].name, KEPT[1].name

@procedure
def open_file(path, how):
    file = gzip.open(path, "wt") if how == "gzip" else open(path, "w")
    file.write("written")
    if how == "cycle":
        file = [file]
        file.append(file)
    else:
        KEPT.append(file)

@procedure
def loaded_file():
    LOADED_FILE.write("x")
    return LOADED.name

@procedure
def log_buffered(path):
    handler = logging.handlers.MemoryHandler(100, target=logging.FileHandler(path))
    logging.getLogger().addHandler(handler)
    logging.warning("buffered")

@procedure
def child_process(path, go):
    multiprocessing.get_context("fork").Process(target=wait_and_append, args=(path, go, "child")).start()

@procedure
def daemon_child(path):
    multiprocessing.get_context("fork").Process(target=append_forever, args=(path,), daemon=True).start()
    wait_for_file(path)

@procedure
def endless_child(path):
    multiprocessing.get_context("fork").Process(target=append_forever, args=(path,)).start()
    wait_for_file(path)

@procedure
def process_pool(path, go):
    KEPT.append(ProcessPoolExecutor(2, multiprocessing.get_context("fork")))
    KEPT[0].submit(wait_and_append, path, go, "process pool")

@procedure
def subprocess_left():
    return subprocess.Popen(["sleep", "3600"], start_new_session=True).pid

@procedure
def forks_a_child(path, go):
    if not os.fork():
        wait_and_append(path, go, "forked")

@procedure
def spawns(method):
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, context) as pool:
        squares = list(pool.map(square, range(3)))
    queue = context.Queue()
    child = context.Process(target=put, args=(queue, Point(1)))
    child.start()
    point = queue.get()
    child.join()
    return squares, point.x, child.exitcode

class Point:
    def __init__(self, x):
        self.x = x

def square(number):
    return number * number

def put(queue, value):
    queue.put(value)

def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return list(map(int, file.read().split()))

def wait_until_childless(but=()):
    while set(children()) - set(but):
        time.sleep(0.01)

@procedure(max_calls_per_process=2)
def adopts(many):
    for _ in range(many):
        subprocess.run(["sh", "-c", "sleep 0.05 &"], check=True)
    wait_until_childless()
    return children()

@procedure
def own_children():
    read, write = os.pipe()
    forked = os.fork()
    if not forked:
        os._exit(3)
    started = subprocess.Popen(["sh", "-c", "exit 4"])
    spawned = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 5"], os.environ)
    in_thread = []
    thread = threading.Thread(target=lambda: in_thread.append(subprocess.Popen(["sh", "-c", "exit 6"])))
    thread.start()
    thread.join()
    subprocess.run(["sh", "-c", "sleep 0.05 & sleep 0.05 &"], check=True)
    wait_until_childless({forked, started.pid, spawned, in_thread[0].pid})
    codes = [os.waitpid(forked, 0)[1] >> 8, os.waitpid(spawned, 0)[1] >> 8, started.wait(), in_thread[0].wait()]
    last = os.fork()
    if not last:
        os._exit(7)
    waited = os.wait()
    return codes, waited == (last, 7 << 8), os.system("exit 8") >> 8

@procedure
def endless_thread():
    threading.Thread(target=time.sleep, args=(3600,)).start()

@procedure
def ends_handler_never():
    atexit.register(time.sleep, 3600)

@procedure(max_calls_per_process=2)
def twice(path):
    atexit.register(append, path, "exit")
    append(path, "call ")
"""


@pytest.fixture(scope="module")
def harpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    with Harpd(
        tmp_path_factory.mktemp("leftovers"), PROCEDURES + OWN, {"limits": {"max_calls": 300, "kill_grace": 5}}
    ) as harpd:
        yield harpd
        nothing_is_left(harpd)


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    """A harpd with a short `kill_grace`."""
    with Harpd(tmp_path_factory.mktemp("impatient"), PROCEDURES + OWN, {"limits": {"kill_grace": 0.5}}) as harpd:
        yield harpd
        nothing_is_left(harpd)


def result(harpd: Harpd, procedure: str, *arguments: Any) -> Any:
    """Return the result of a call whose process has ended."""
    value = quick_result(harpd, procedure, *arguments)
    wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the process's end")
    return value


def text_in(path: Path, length: int = 1) -> str:
    """Return the text of a file once it has so many characters."""
    wait_until(lambda: path.exists() and path.stat().st_size >= length, DEADLINE, str(path))
    return path.read_text()


@pytest.mark.parametrize(
    ("procedure", "arguments", "text"),
    [
        ("thread", [False], "thread"),
        ("thread_pool", [], "pool"),
        ("child_process", [], "child"),
        ("process_pool", [], "process pool"),
        ("forks_a_child", [], "forked"),
    ],
)
def test_unfinished_work_is_finished_after_result(
    harpd: Harpd, tmp_path: Path, procedure: str, arguments: list[object], text: str
) -> None:
    path, go = tmp_path / "path", tmp_path / "go"
    with harpd.connect() as client:
        client.send(harpd.request(procedure, [str(path), str(go), *arguments]))
        client.message()
        assert client.message() == {"result": None}  # it does not wait for the leftovers
        go.touch()
        assert client.lines() == []
    assert text_in(path) == text
    wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the call's end")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_works_with_each_start_method(harpd: Harpd, method: str) -> None:
    assert result(harpd, "spawns", method) == [[0, 1, 4], 1, 0]


def test_adopted_children_are_reaped(harpd: Harpd) -> None:
    assert result(harpd, "adopts", 20) == result(harpd, "adopts", 5) == []


def test_own_children_are_reaped_by_the_procedure_only(harpd: Harpd) -> None:
    for _ in range(5):
        assert result(harpd, "own_children") == [[3, 5, 4, 6], True, 8]


def test_own_children_are_not_reaped_if_subprocess_loads_early(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a `.pth` file of a package or a ``sitecustomize`` may do."""
    (tmp_path / "sitecustomize.py").write_text("import subprocess\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with Harpd(tmp_path / "harpd", PROCEDURES + OWN) as other:
        for _ in range(3):
            assert result(other, "own_children") == [[3, 5, 4, 6], True, 8]


def test_exit_handlers_run_in_reverse_order(harpd: Harpd, tmp_path: Path) -> None:
    assert result(harpd, "exit_handler", str(tmp_path / "path")) is None
    assert (tmp_path / "path").read_text() == "last registered\nfirst registered\n"
    call = harpd.last_call()
    wait_until(lambda: "printed at exit" in printed(harpd, call), DEADLINE, "the output")
    assert any("ValueError: in a handler" in line for line in printed(harpd, call))


def test_finalizer_runs(harpd: Harpd, tmp_path: Path) -> None:
    result(harpd, "finalizer", str(tmp_path / "path"))
    assert (tmp_path / "path").read_text() == "finalized"


def test_temporary_files_are_removed(harpd: Harpd) -> None:
    directory, file = result(harpd, "temporary_directory")
    assert not os.path.exists(directory)
    assert not os.path.exists(file)


@pytest.mark.parametrize("how", ["global", "cycle", "gzip"])
def test_open_file_is_written(harpd: Harpd, tmp_path: Path, how: str) -> None:
    result(harpd, "open_file", str(tmp_path / "path"), how)
    data = (tmp_path / "path").read_bytes()
    assert (gzip.decompress(data) if how == "gzip" else data) == b"written"


def test_buffered_log_events_are_written(harpd: Harpd, tmp_path: Path) -> None:
    result(harpd, "log_buffered", str(tmp_path / "path"))
    assert (tmp_path / "path").read_text() == "buffered\n"


def test_resources_of_the_procedures_file_stay(harpd: Harpd) -> None:
    for number in (1, 2):
        directory = result(harpd, "loaded_file")
        assert Path(directory, "file").read_text() == "x" * number  # the workers share its position
        assert os.listdir(directory) == ["file"]  # the exit handler has not run


def test_worker_of_many_calls_ends_so_after_the_last(harpd: Harpd, tmp_path: Path) -> None:
    path = tmp_path / "path"
    for text in ("call ", "call call exitexit"):
        result(harpd, "twice", str(path))
        assert text_in(path, len(text)) == text


def test_daemon_thread_and_daemon_child_are_ended(harpd: Harpd, tmp_path: Path) -> None:
    assert result(harpd, "thread", str(tmp_path / "path"), str(tmp_path / "go"), True) is None
    (tmp_path / "go").touch()
    assert result(harpd, "daemon_child", str(tmp_path / "child")) is None
    assert is_dead(int((tmp_path / "child").read_text()))
    assert not (tmp_path / "path").exists()


def test_subprocess_continues(harpd: Harpd) -> None:
    child = psutil.Process(result(harpd, "subprocess_left"))
    assert child.is_running()
    child.kill()
    wait_until(lambda: is_dead(child.pid), DEADLINE, "its end")


@pytest.mark.parametrize("procedure", ["endless_thread", "ends_handler_never"])
def test_endless_leftover_is_ended_after_kill_grace(impatient: Harpd, procedure: str) -> None:
    seen = len(impatient.events("process does not exit; sending signal"))
    assert result(impatient, procedure) is None
    events = impatient.wait_events(seen + 1, "process does not exit; sending signal")[seen:]
    assert [event["signal"] for event in events] == ["SIGTERM"]


def test_endless_child_is_killed_after_kill_grace(impatient: Harpd, tmp_path: Path) -> None:
    assert result(impatient, "endless_child", str(tmp_path / "child")) is None
    wait_until(lambda: is_dead(int((tmp_path / "child").read_text())), DEADLINE, "the child's end")


def test_resumable_call_ends_when_its_leftovers_end(harpd: Harpd, tmp_path: Path) -> None:
    """Its result is sent after the process has ended, so that exit info and slot are right."""
    path, go = tmp_path / "path", tmp_path / "go"
    with harpd.start_resumable("thread", str(path), str(go), False) as client:
        client.message()
        harpd.wait_event("call ended", call=client.call, end="result")
        assert len(harpd.list_calls()["calls"]) == 1
        go.touch()
        lines = [client.message(), client.message()]
        assert lines[0]["exit_info"]["exit"] == 0
        assert lines[1] == {"result": None}
        assert path.read_text() == "thread"
        client.send({"release": True})
        assert client.lines() == []
