"""Payloads over HTTP are the texts that were sent, byte for byte, in all forms."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harp.protocol.json_text import Raw
from harp_daemon.sliced_json import decode_slices
from support.certificates import server_files
from support.dispatcher import host_line
from support.http_api import RunningAPI, running_api
from support.peers import Peer, PeerConnection, server_context

EXAMPLES = 100 if os.environ.get("HARP_LONG") else 12
JSON = {"Content-Type": "application/json"}
SCALARS = st.sampled_from(
    [
        *("1.50", "1e400", "-1E-400", "-0", "0.10", "1970670598291982290", str(2**80), "9" * 400, "true", "null"),
        *(
            '"\\ud800"',
            '"\\uDC00x"',
            '"\\u00e9"',
            '"é"',
            '"\\/"',
            '"\\u0000"',
            '"\U0001f600"',
            '"</script>"',
            '"\u2028"',
        ),
        *('{"10":1,"2":2,"a":1.50}', '{"a":1,"a":2}', "[ 1 ,\t2 ]", "{ }", '""', '"harp"'),
    ]
)


def _array(items: list[str]) -> str:
    return f"[{', '.join(items)}]"


def _object(items: list[str]) -> str:
    return "{" + ",".join(f'"{len(items) - number}": {item}' for number, item in enumerate(items)) + "}"


VALUES = st.recursive(
    SCALARS,
    lambda values: st.lists(values, max_size=4).map(_array) | st.lists(values, max_size=4).map(_object),
    max_leaves=12,
)


def returning_arguments(conn: PeerConnection) -> None:
    """Return the arguments as they came, and send them as a record before: an array, which the form text shows, too."""
    line = conn.line()  # it is not decoded, because Python refuses integers of more than 4,300 digits
    start = line.index(b'"arguments":') + len(b'"arguments":')
    arguments = bytes(decode_slices(line).payload("arguments"))
    assert line[start:].startswith(arguments)
    conn.reply({"harp": 1, "stream_result": True}, b'{"stream":%b}\n' % arguments, b'{"result":%b}\n' % arguments)


def member(body: bytes, name: str) -> bytes:
    return bytes(decode_slices(body.rstrip(b"\n")).payload(name))


async def check_identity(api: RunningAPI, value: str) -> None:
    arguments, info = f"[{value}]".encode(), value.encode()
    body = b'{"host":"web01","procedure":"p","arguments":%b,"info":%b}' % (arguments, info)
    reply = await api.client.post("/jobs?wait=30", content=body, headers=JSON)
    assert reply.status_code == 201, reply.text
    job = json.loads(member(reply.content, "job"))
    raw = await api.client.get(f"/jobs/{job}")
    assert (member(raw.content, "arguments"), member(raw.content, "info")) == (arguments, info)
    assert raw.content == reply.content
    if len(arguments) < 256 * 1024:
        assert member(raw.content, "end") == b'{"result":%b}' % arguments
    text = json.loads((await api.client.get(f"/jobs/{job}?payloads=text")).content)
    assert (text["arguments"].encode(), text["info"].encode()) == (arguments, info)
    assert (await api.client.get(f"/jobs/{job}/result")).content == arguments
    assert (await api.client.get(f"/jobs/{job}/end")).content == b'{"result":%b}\n' % arguments
    if len(arguments) < 256 * 1024:
        assert text["end"].encode() == b'{"result":%b}' % arguments
    await check_records(api, job, arguments)
    again = await api.client.post(f"/jobs/{job}/rerun")
    assert (member(again.content, "arguments"), member(again.content, "info")) == (arguments, info)
    repeated = json.loads(member(again.content, "job"))
    assert (await api.client.get(f"/jobs/{repeated}/result?wait=30")).content == arguments
    many = await api.client.post("/jobs/many", content=b'{"calls":[%b,%b]}' % (body, body), headers=JSON)
    for one in many.json()["jobs"]:
        stored = (await api.client.get(f"/jobs/{one}")).content
        assert (member(stored, "arguments"), member(stored, "info")) == (arguments, info)


async def check_records(api: RunningAPI, job: str, record: bytes) -> None:
    """Check the record in each form of the records."""
    line = b'{"packet":0,"data":%b}' % record
    for query in ("", "&follow=1&since=0", "&download=1", "&recent=1"):
        records = (await api.client.get(f"/jobs/{job}/records?timed=0{query}")).content
        assert records.split(b"\n")[0] == line, query
    timed = (await api.client.get(f"/jobs/{job}/records")).content.split(b"\n")[0]
    assert timed.endswith(b',"data":%b}' % record)
    for query in ("", "&follow=1&since=0"):
        events = (await api.client.get(f"/jobs/{job}/records?timed=0&form=sse{query}")).content
        assert b"id: 0\nevent: record\ndata: %b\n\n" % line in events, query
    of_several = (await api.client.get(f"/records?jobs={job}&timed=0")).content.split(b"\n")[0]
    assert of_several == b'{"job":"%b","packet":0,"data":%b}' % (job.encode(), record)
    as_text = (await api.client.get(f"/jobs/{job}/records?form=text")).content
    assert as_text == record + b"\n"


@pytest.mark.timeout(120 + 10 * EXAMPLES)
def test_http_payloads_are_unchanged(tmp_path: Path) -> None:
    with (
        Peer(always=returning_arguments, tls=server_context(server_files(tmp_path))) as peer,
        asyncio.Runner() as runner,
    ):
        stack = AsyncExitStack()
        api = runner.run(stack.enter_async_context(running_api(tmp_path, host_line(peer.port))))

        @settings(max_examples=EXAMPLES, deadline=None)
        @given(VALUES)
        @example("[1970670598291982290, 1e400, -1E-400, 1.50, %s]" % ("9" * 5000))
        @example('{"b": 1, "a": {"b": 2, "a": 1}, "a": 3, "": null}')
        @example('["\\ud800", "\\uDC00x", "\\ud83d", "\\u0000", "\\/", "\\u00e9"]')
        @example("[" * 998 + "]" * 998)
        @example('"%s"' % ("x" * 1024 * 1024))
        @example('"x%s"' % ("\U0001f600" * 70_000))
        def check(value: str) -> None:
            runner.run(check_identity(api, value))

        try:
            check()
        finally:
            runner.run(stack.aclose())


async def test_http_line_breaks_between_values_become_spaces(tmp_path: Path) -> None:
    async with running_api(tmp_path) as api:
        body = b'{\r\n  "host": "nohost",\n  "procedure": "p",\n  "arguments": [\n1.50,\n"a\\nb"\n],"info":\n{ }\n}\n'
        reply = await api.client.post("/jobs", content=body, headers=JSON)
        assert reply.status_code == 201
        assert member(reply.content, "arguments") == b'[ 1.50, "a\\nb" ]'
        queued = b'{"host":"nohost","procedure":"p","arguments":[],"queue":{"name":{"n":\n1.50}}}'
        job = (await api.client.post("/jobs", content=queued, headers=JSON)).json()["job"]
        assert b'"name":{"n": 1.50}' in (await api.client.get(f"/jobs/{job}")).content
        shown = (await api.client.get(f"/jobs/{job}?payloads=text")).json()["queue"]["name"]
        assert Raw(shown.encode()) == b'{"n": 1.50}'
