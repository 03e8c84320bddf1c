"""The synopses of docs/client-api.md, executed literally with scripted peers."""

from __future__ import annotations

import asyncio
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from support.certificates import server_files
from support.peers import Peer, Script, answering, server_context

PAGE = (Path(__file__).parents[2] / "docs/client-api.md").read_text()
JOB = "8b0e5a1e-0a4f-4d0e-9d0a-4b8f6f3b1c11"
OLD_JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"


def synopsis(title: str) -> str:
    found = re.search(rf"^### {title}\n+```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def call(procedure: str, arguments: list[Any], **options: Any) -> dict[str, Any]:
    return {"harpcaller": 1, "host": "localhost", "procedure": procedure, "arguments": arguments, **options}


SUBMITTED = {"harpcaller": 1, "job_id": JOB}


@pytest.mark.parametrize(
    ("last", "output"),
    [
        ({"no_result": True}, "still running"),
        ({"cancelled": True}, "cancelled"),
        ({"error": {"type": "timeout", "message": "m"}}, "failed: timeout: m"),
        ({"result": [1]}, "returned [1]"),
    ],
)
def test_synopsis_with_a_dispatcher(capsys: pytest.CaptureFixture[str], last: Any, output: str) -> None:
    queued = call("stream_infinity", [], queue={"name": {"foo": "bar"}, "concurrency": 1}, max_exec_time=15)
    scripts: list[Script] = [
        answering(SUBMITTED, request=queued),
        answering(
            *({"packet": number, "data": {"number": number}} for number in range(3)),
            {"error": {"type": "timeout", "message": "maximum execution time"}},
            request={"harpcaller": 1, "follow_stream": JOB, "since": 0},
        ),
        answering(request={"harpcaller": 1, "submit_many": [], "keep_alive": True}),  # as a legacy dispatcher
        answering(SUBMITTED, request=call("return_immediate", ["bar", "baz"])),
        answering({"result": "bar baz"}, request={"harpcaller": 1, "get_result": JOB, "wait": True}),
        answering(last, request={"harpcaller": 1, "get_result": OLD_JOB, "wait": False}),
    ]
    with Peer(*scripts) as peer:
        program = synopsis("With a dispatcher").replace('"localhost")\n\n', f'"127.0.0.1", {peer.port})\n\n', 1)
        exec(program, {})
    assert capsys.readouterr().out.splitlines() == [
        '{"number": 0}',
        '{"number": 1}',
        '{"number": 2}',
        JOB,
        "timeout: maximum execution time",
        output,
    ]


def test_synopsis_with_a_harpd(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def request(procedure: str, arguments: list[Any]) -> dict[str, Any]:
        auth = {"user": "username", "password": "secret"}
        return {"harp": 1, "procedure": procedure, "arguments": arguments, "auth": auth, "keep_alive": True}

    scripts = [
        answering({"harp": 1, "stream_result": False}, {"result": 123}, request=request("current_time", [])),
        answering(
            {"harp": 1, "stream_result": True},
            {"stream": "one"},
            {"stream": {"two": 2}},
            {"result": {"lines": 2}},
            request=request("logs_in_next_minutes", [10]),
        ),
    ]
    with Peer(*scripts, tls=server_context(server_files(tmp_path))) as peer:
        program = synopsis("With a harpd").replace('host="localhost",', f'host="localhost", port={peer.port},')
        exec(program, {})
    assert capsys.readouterr().out.splitlines() == [
        "123",
        'log message: "one"',
        'log message: {"two": 2}',
        '{"lines": 2}',
    ]


def test_synopsis_with_asyncio(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = [
        answering(SUBMITTED, request=call("stream_infinity", [])),
        answering({"packet": 0, "data": 1}, {"result": 2}),
    ]
    with Peer(*scripts) as peer:
        body = synopsis("With asyncio").replace('"localhost")', f'"127.0.0.1", {peer.port})')
        scope: dict[str, Any] = {}
        exec("async def main():\n" + textwrap.indent(body, "    "), scope)
        asyncio.run(scope["main"](), debug=True)
    assert capsys.readouterr().out.splitlines() == ["1", "2"]
