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
import time

import pytest

from harp_daemon.logs import JSONFormatter, TextFormatter

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


def test_event_of_another_thread_is_written_at_once_after_earlier_ones() -> None:
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


def test_full_pipe_loses_nothing_and_delays_until_it_is_read() -> None:
    program = """
async def main():
    for number in range(3000):
        log.info(str(number), extra={"text": "x" * 100})
        if number % 7 == 0:
            await asyncio.sleep(0)
run(main())
"""
    reading, writing = os.pipe()
    with open(reading, "rb") as log, subprocess.Popen([sys.executable, "-c", PROGRAM + program], stderr=writing) as run:
        os.close(writing)
        time.sleep(0.5)
        assert run.poll() is None
        found = re.findall(rb"INFO test: (\S+)", log.read())
    assert found == [b"%d" % number for number in range(3000)]
