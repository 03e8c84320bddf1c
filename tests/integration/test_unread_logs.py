"""Daemons with unread stderr continue to serve, enforce limits, and stop."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from support.daemonlog import DEADLINE
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd
from support.procedures_file import PROCEDURES

PRINTING = """
import sys
print("loading " * 100_000)  # more than a pipe holds

@procedure(timeout=1)
def print_forever():
    while True:
        print("x" * 100)
        print("y" * 100, file=sys.stderr)

@procedure
def print_lines(count):
    for number in range(count):
        print(number)
    return "printed"

@procedure(max_calls_per_process=10)
def print_empty_lines(count):
    sys.stdout.write("\\n" * count)
"""


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """The writing end of a pipe that has no room."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writing, True)
    yield writing
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("services", [False, True])
def test_harpd_with_unread_stderr_serves_and_enforces_limits(tmp_path: Path, full_pipe: int, services: bool) -> None:
    with Harpd(tmp_path, PROCEDURES + PRINTING, services=services, stderr=full_pipe) as harpd:
        with harpd.connect() as client:
            client.send(harpd.request("print_forever", []))
            assert harpd.call("echo", 1)[-1] == {"result": [1]}
            assert client.lines()[-1]["error"]["type"] == "timeout"
        assert harpd.reload()["event"] == "reloaded"
        assert harpd.call("echo", 2)[-1] == {"result": [2]}


def test_dispatcher_with_unread_stderr_serves_and_stops(tmp_path: Path, full_pipe: int) -> None:
    calls = tmp_path / "calls"
    dispatcher = Harpcallerd(tmp_path / "d", settings={"listen": [f"unix:{calls}"]})
    start = dispatcher.command("start", f"--config={dispatcher.config_file}")
    with subprocess.Popen(start, stdin=subprocess.DEVNULL, stdout=full_pipe, stderr=full_pipe) as running:
        try:
            assert dispatcher.control("status", "--wait", f"--timeout={DEADLINE:g}").returncode == 0
            for _ in range(12):  # the log has the arguments, at level debug: more than its queue holds
                call = {"harpcaller": 1, "procedure": "p", "arguments": ["x" * (1 << 20)], "host": "nowhere"}
                job = ask(calls, call)["job_id"]
            found: dict[str, Any] = {}
            deadline = time.monotonic() + DEADLINE
            while "error" not in found and time.monotonic() < deadline:
                found = ask(calls, {"harpcaller": 1, "get_result": job, "wait": True})
            assert found["error"]["type"] == "unknown_host"
            assert dispatcher.control("stop").returncode == 0
            assert running.wait(DEADLINE) == 0
        finally:
            running.kill()


def ask(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    with closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(DEADLINE)
        connection.connect(str(path))
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as lines:
            reply: dict[str, Any] = json.loads(lines.readline())
    return reply


def output(harpd: Harpd, procedure: str) -> tuple[list[str], int]:
    """Return the logged lines of a procedure, and how many were dropped."""
    texts = [event["text"] for event in harpd.events("call printed", procedure=procedure)]
    return texts, sum(event["lines"] for event in harpd.events("call output dropped", procedure=procedure))


def test_output_beyond_the_limit_is_dropped_and_counted(tmp_path: Path) -> None:
    configuration = {"limits": {"output_lines": 50, "output_bytes": 2048}}
    with Harpd(tmp_path, PROCEDURES + PRINTING, configuration) as harpd:
        assert harpd.wait_event("procedures file printed")["text"].startswith("loading loading ")
        assert harpd.wait_event("output of procedures file dropped")["bytes"] > 100_000
        assert harpd.call("print_lines", 50)[-1] == {"result": "printed"}
        assert harpd.call("print_lines", 20_000)[-1] == {"result": "printed"}
        for _ in range(2):  # two calls of one process
            assert harpd.call("print_empty_lines", 20_000)[-1] == {"result": None}
        assert harpd.call("print_forever")[-1]["error"]["type"] == "timeout"
    texts, dropped = output(harpd, "print_lines")
    assert texts[:100] == [str(number) for number in [*range(50), *range(50)]]
    assert dropped > 0
    assert len(texts) + dropped == 20_050
    assert all(event["call"] for event in harpd.events("call output dropped"))
    texts, dropped = output(harpd, "print_empty_lines")
    assert (texts, dropped) == (["", ""], 0), "of empty lines in a row, each call's first is logged"
    assert output(harpd, "print_forever")[1] > 0
    assert harpd.log_file.stat().st_size < 1 << 20


def test_last_lines_of_stderr_are_those_of_dropped_output(tmp_path: Path) -> None:
    own = """
@procedure
def fail(count):
    import os, sys
    for number in range(count):
        print(number, file=sys.stderr)
    os._exit(1)
"""
    configuration = {"limits": {"output_lines": 5}, "exit_info": {"stderr": True}}
    with Harpd(tmp_path, PROCEDURES + own, configuration) as harpd:
        with harpd.start_resumable("fail", 5000) as client:
            line = next(line for line in iter(client.message, None) if "exit_info" in line)
        assert line["exit_info"]["stderr"] == [str(number) for number in range(4980, 5000)]
