"""`harp_daemon.logs`: the two forms of an event, and when events are written."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from harp_daemon.logs import JSONFormatter, TextFormatter
from support.daemonlog import DEADLINE

#: The beginning of a program that logs to stderr.
PROGRAM = """
import asyncio, logging, os, signal, sys, threading
from harp_daemon import logs
from harp_daemon.event_loop import run
logs.configure()
log = logging.getLogger("test")
"""


def record(event: str = "call started", **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("harpd.call", logging.INFO, "file", 1, event, (), None)
    made.__dict__.update(fields)
    made.created, made.msecs = 1_700_000_000.25, 250.0
    return made


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain-1", "plain-1"),
        ("\xe4", "\xe4"),
        ("", '""'),
        ("two words", '"two words"'),
        ('a="b"', '"a=\\"b\\""'),
        ("line\nfeed", '"line\\nfeed"'),
        ("\u2028", '"\\u2028"'),
        (1.5, "1.5"),
        (None, "null"),
        ([1, "a b"], '[1, "a b"]'),
        (signal.SIGTERM, "15"),
        (OSError("text"), '"text"'),
    ],
)
def test_text_form_of_a_field(value: object, shown: str) -> None:
    expected = f"2023-11-14T22:13:20.250Z INFO harpd.call: call started field={shown} other=1"
    assert TextFormatter().format(record(field=value, other=1)) == expected
    assert TextFormatter(timestamp=False).format(record()) == "INFO harpd.call: call started"


def test_text_form_is_one_line_in_any_case() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        made = record("event\nof two lines")
        made.exc_info = sys.exc_info()
    line = TextFormatter().format(made)
    assert "\n" not in line
    assert "harpd.call: event\\nof two lines traceback=" in line
    assert json.loads(line.partition("traceback=")[2]).endswith("ValueError: two\nlines")


@pytest.mark.parametrize("character", ["x", "\0", "\xe4", "\U0001f600", '"', " "])
@pytest.mark.parametrize("formatter", [TextFormatter(), JSONFormatter()])
def test_long_fields_are_cut_and_keep_their_length(formatter: logging.Formatter, character: str) -> None:
    fields = {f"field{number}": character * 20_000 for number in range(6)}
    line = formatter.format(record(**fields, values=[character * 3] * 1000, call="c", last=1))
    assert len(line.encode()) <= 4096
    assert line.count("... (20000 characters)") == 6
    assert re.search(r"values.*characters.*call\W+c\W.*last\W+1\b", line)
    if character == "x":
        assert "x" * 256 + "... (20000 characters)" in line
        assert "x" * 257 not in line
    short = formatter.format(record(field=character * 80))
    assert "characters)" not in short


@pytest.mark.parametrize(("name", "kept"), [("text", 8192), ("traceback", 16 * 1024)])
def test_output_and_tracebacks_have_longer_limits(name: str, kept: int) -> None:
    line = TextFormatter().format(record(**{name: "x" * 20_000}, call="c" * 300))
    assert f'{name}="{"x" * kept}... (20000 characters)" call="{"c" * 256}... (300 characters)"' in line


def test_json_form_has_all_fields_in_order() -> None:
    line = JSONFormatter().format(record(call="c", error=OSError("text")))
    assert list(json.loads(line).items()) == [
        ("time", "2023-11-14T22:13:20.250Z"),
        ("level", "info"),
        ("logger", "harpd.call"),
        ("event", "call started"),
        ("call", "c"),
        ("error", "text"),
    ]


def writes(program: str, expect: int = 0) -> list[list[str]]:
    """Run a program; return the events of each write to stderr."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        with subprocess.Popen([sys.executable, "-c", PROGRAM + program], stderr=far.fileno()) as running:
            far.close()
            found = [data.decode() for data in iter(lambda: near.recv(1 << 20), b"")]
        assert running.returncode == expect, found
    return [re.findall(r"INFO test: (\S+)", data) for data in found if "Traceback" not in data]


def test_events_of_a_turn_are_written_together_in_order() -> None:
    program = """
log.info("before")
async def main():
    log.info("1")
    log.info("2")
    await asyncio.sleep(0)
    log.info("3")
    log.info("4")
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(log.info, "5")
run(main())
log.info("after")
"""
    assert writes(program) == [["before"], ["1", "2"], ["3", "4"], ["5"], ["after"]]


def test_event_of_another_thread_is_written_immediately_in_order() -> None:
    program = """
async def main():
    log.info("1")
    thread = threading.Thread(target=log.info, args=("2",))
    thread.start()
    thread.join()
    log.info("3")
    os.kill(os.getpid(), signal.SIGKILL)
run(main())
"""
    assert writes(program, -signal.SIGKILL) == [["1", "2"]]


def test_sigkill_loses_events_of_the_present_turn_only() -> None:
    program = """
async def main():
    for number in range(100):
        log.info(str(number))
        await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGKILL)
run(main())
"""
    assert writes(program, -signal.SIGKILL) == [[str(number)] for number in range(100)]


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("raise ValueError", 1),
        ("sys.exit(3)", 3),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("logs.flush(); os._exit(4)", 4),
        ("asyncio.get_running_loop().stop(); await asyncio.sleep(1)", 1),
    ],
)
def test_no_event_is_lost_at_the_end(end: str, status: int) -> None:
    program = f"""
async def main():
    log.info("1")
    await asyncio.sleep(0)
    log.info("2")
    {end}
run(main())
"""
    assert [event for write in writes(program, status) for event in write] == ["1", "2"]


def test_configuration_is_replaced_without_loss() -> None:
    program = """
async def main():
    log.info("1")
    logs.configure(form="text")
    log.info("2")
    os.kill(os.getpid(), signal.SIGKILL)
run(main())
"""
    assert writes(program, -signal.SIGKILL) == [["1"]]


def start(program: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM + program], **options)


def dropped(log: str) -> int:
    return sum(
        int(number) for number in re.findall(r"WARNING harp_daemon.log_queue: log events dropped events=(\d+)", log)
    )


FLOOD = """
async def main():
    for number in range(COUNT):
        log.info(str(number), extra={"text": "x" * 8000})
        if number % 7 == 0:
            await asyncio.sleep(0)
    print("done", flush=True)
    sys.stdin.read()  # the test has begun to read the log
run(main())
"""


def detached(kind: int) -> tuple[int, int]:
    near, far = socket.socketpair(socket.AF_UNIX, kind)
    return near.detach(), far.detach()


#: Makers of the two ends of a log.
MAKERS: dict[str, Callable[[], tuple[int, int]]] = {
    "pipe": os.pipe,
    "socket": lambda: detached(socket.SOCK_STREAM),
    "packets": lambda: detached(socket.SOCK_SEQPACKET),
    "terminal": os.openpty,
}


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_unread_stderr_delays_no_program(kind: str) -> None:
    """9 MiB are more than a queue holds, so events are dropped, counted and reported, in their place."""
    reading, writing = MAKERS[kind]()
    count = 1200
    with (
        open(reading, "rb", buffering=0) as log,
        start(FLOOD.replace("COUNT", str(count)), stderr=writing, stdin=PIPE, stdout=PIPE) as running,
    ):
        os.close(writing)
        assert running.stdout is not None
        assert running.stdin is not None
        assert running.stdout.readline() == b"done\n"
        text = ""
        while "log events dropped" not in text:
            text += log.read(1 << 20).decode()
        running.stdin.close()
        text += read_all(log).decode()
    assert running.returncode == 0
    found = [int(number) for number in re.findall(r"INFO test: (\d+) text=x{8000}\r?\n", text)]
    assert found == sorted(found)
    assert found[:100] == [*range(100)]
    assert dropped(text) > 0
    assert len(found) + dropped(text) == count


def read_all(log: FileIO) -> bytes:
    found = bytearray()
    with suppress(OSError):  # a terminal has an error as its end
        while data := log.read(1 << 20):
            found += data
    return bytes(found)


@pytest.mark.parametrize("kind", MAKERS)
def test_full_stderr_loses_no_event_that_has_room(kind: str) -> None:
    reading, writing = MAKERS[kind]()
    with (
        open(reading, "rb", buffering=0) as log,
        start(FLOOD.replace("COUNT", "60"), stderr=writing, stdin=PIPE, stdout=PIPE) as running,
    ):
        os.close(writing)
        assert running.stdout is not None
        assert running.stdin is not None
        assert running.stdout.readline() == b"done\n"
        running.stdin.close()
        text = read_all(log).decode()
    assert re.findall(r"INFO test: (\S+)", text) == [str(number) for number in range(60)]


@pytest.mark.parametrize("device", ["pipe", "closed pipe", "/dev/full", "closed"])
def test_program_ends_although_its_log_is_not_read(device: str) -> None:
    program = "import time\nbefore = time.monotonic()\n" + FLOOD.replace("COUNT", "400") + "sys.exit(3)"
    reading, writing = os.pipe()
    if device == "closed pipe":
        os.close(reading)
    elif device == "/dev/full":
        os.close(writing)
        writing = os.open(device, os.O_WRONLY)
    command = [sys.executable, "-c", PROGRAM + program]
    if device == "closed":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    with subprocess.Popen(command, stderr=writing, stdin=subprocess.DEVNULL, stdout=PIPE) as running:
        assert running.communicate()[0] == b"done\n"
    os.close(writing)
    if device != "closed pipe":
        os.close(reading)
    assert running.returncode == 3


#: A program whose log goes to handlers of an operator.
CONFIGURED = """
class Raising(logging.Handler):
    def emit(self, record):
        raise ValueError("a handler of the operator")

class Hanging(logging.Handler):
    def emit(self, record):
        threading.Event().wait()

def configure(**handlers):
    formatters = {"message": {"format": "%(levelname)s %(message)s"}, "json": {"()": "harp_daemon.logs.JSONFormatter"}}
    root = {"level": "INFO", "handlers": list(handlers)}
    logs.configure(config={"formatters": formatters, "handlers": handlers, "root": root})

async def main():
    for number in range(20):
        log.info("event", extra={"number": number, "text": "two words"})
        await asyncio.sleep(0)
"""


def run_configured(program: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, "-c", PROGRAM + CONFIGURED + program], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_message_of_an_operators_format_has_the_fields(tmp_path: Path) -> None:
    file = {"class": "logging.FileHandler", "filename": str(tmp_path / "log"), "formatter": "message"}
    stderr = {"class": "logging.StreamHandler", "formatter": "message"}
    json_file = {"class": "logging.FileHandler", "filename": str(tmp_path / "json"), "formatter": "json"}
    text = run_configured(f"""
configure(file={file!r}, stderr={stderr!r}, json={json_file!r})
run(main())
log.warning("a %s of a library", "message")
""")
    expected = [f'INFO event number={number} text="two words"' for number in range(20)]
    expected += ["WARNING a message of a library"]
    assert text.splitlines() == (tmp_path / "log").read_text().splitlines() == expected
    events = [json.loads(line) for line in (tmp_path / "json").read_text().splitlines()]
    assert [event["event"] for event in events] == ["event"] * 20 + ["a message of a library"]
    assert [event["number"] for event in events[:20]] == [*range(20)]


def test_handler_failure_does_not_stop_program_or_others(tmp_path: Path) -> None:
    file = {"class": "logging.FileHandler", "filename": str(tmp_path / "log"), "formatter": "message"}
    text = run_configured(
        f"""
configure(raising={{"()": Raising}}, hanging={{"()": Hanging}}, file={file!r})
run(main())
logs.configure()
log.info("the hanging handler is replaced")
sys.exit(3)
""",
        status=3,
    )
    assert len((tmp_path / "log").read_text().splitlines()) == 20
    (failed,) = re.findall(r"WARNING harp_daemon.log_queue: log handler failed .*", text)
    assert 'handler=Raising reason="a handler of the operator"' in failed
    assert "the hanging handler is replaced" in text


@pytest.mark.parametrize("in_loop", [False, True])
def test_event_rejected_by_an_operators_format_is_logged_plainly(in_loop: bool) -> None:
    """The format has a field that few events have. Neither is an event lost nor does a log call raise."""
    stderr = {"class": "logging.StreamHandler", "formatter": "call"}
    config: dict[str, Any] = {
        "formatters": {"call": {"format": "%(call)s %(message)s"}},
        "handlers": {"stderr": stderr},
    }
    config["root"] = {"level": "INFO", "handlers": ["stderr"]}
    text = run_configured(f"""
logs.configure(config={config!r})
async def log_all():
    for _ in range(2):
        log.info("without")
        log.info("with", extra={{"call": "1"}})
        await asyncio.sleep(0)
{"run" if in_loop else "asyncio.run"}(log_all())
""")
    plain = "INFO test: without (cannot format this event: Formatting field not found in record: 'call')"
    assert text.splitlines() == [plain, "1 with call=1"] * 2


def test_log_directory_missing_loses_counted_events_only(tmp_path: Path) -> None:
    directory = tmp_path / "log"
    directory.mkdir()
    file = {"class": "logging.handlers.WatchedFileHandler", "filename": str(directory / "log"), "formatter": "message"}
    text = run_configured(f"""
import shutil
configure(file={file!r})
run(main())
logs.flush()
shutil.rmtree({str(directory)!r})
run(main())
logs.flush()
os.mkdir({str(directory)!r})
log.info("back")
""")
    assert 'log handler failed handler=WatchedFileHandler reason="[Errno 2] No such file' in text
    first, second = (directory / "log").read_text().splitlines()
    assert first == "INFO back"
    assert second.startswith("WARNING log events dropped events=20 reason=")


def test_reopened_file_is_opened_again_and_keeps_the_order(tmp_path: Path) -> None:
    file = {"class": "logging.FileHandler", "filename": str(tmp_path / "log"), "formatter": "message"}
    run_configured(f"""
configure(file={file!r})
run(main())
log.info("last")
os.rename({str(tmp_path / "log")!r}, {str(tmp_path / "old")!r})
logs.reopen()
log.info("first")
""")
    assert (tmp_path / "old").read_text().splitlines()[-1] == "INFO last"
    assert (tmp_path / "log").read_text().splitlines() == ["INFO log files reopened", "INFO first"]


def test_failed_configuration_leaves_a_log_on_stderr(tmp_path: Path) -> None:
    file = {"class": "logging.FileHandler", "filename": str(tmp_path / "nowhere" / "log")}
    text = run_configured(f"""
try:
    configure(file={file!r})
except OSError:
    log.info("configuration failed")
""")
    assert "INFO test: configuration failed" in text


SYSLOG = """
from harp_daemon import log_queue
log_queue.SYSLOG_ADDRESS = PATH
logs.configure(syslog=True, name="test")
async def main():
    for number in range(COUNT):
        log.info(str(number), extra={"text": "x" * 1000})
        await asyncio.sleep(0)
    print("done", flush=True)
    await asyncio.to_thread(sys.stdin.read)
run(main())
"""


def test_unread_syslog_delays_no_program_and_gets_its_events(tmp_path: Path) -> None:
    """The socket of syslog is replaced as well, as by a restart of syslog."""
    address = tmp_path / "log"
    program = SYSLOG.replace("PATH", repr(str(address))).replace("COUNT", "500")
    with ExitStack() as closing:
        listening = closing.enter_context(listen_syslog(address))
        running = closing.enter_context(start(program, stdin=PIPE, stdout=PIPE, stderr=PIPE))
        assert running.stdout is not None
        assert running.stdin is not None
        assert running.stdout.readline() == b"done\n"
        found = [listening.recv(1 << 16) for _ in range(5)]
        listening.close()
        address.unlink()
        restarted = closing.enter_context(listen_syslog(address))
        while not re.search(rb"INFO test: 499 ", found[-1]):
            found.append(restarted.recv(1 << 16))
        running.stdin.close()
    assert running.returncode == 0
    numbers = [int(number) for number in re.findall(rb"<30>test\[\d+\]: INFO test: (\d+) text=x+\0", b"".join(found))]
    assert numbers == sorted(numbers)
    assert len(numbers) > 450  # those in the old socket are lost with it


def listen_syslog(address: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.settimeout(DEADLINE)
    listening.bind(str(address))
    return listening
