"""Requests of a hostile client whose password is right: they cost only their own connection, and no call of others."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import OWNER, SECRET, Harpd, LineClient
from support.procedures_file import PROCEDURES


@pytest.fixture(scope="module")
def harpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    with Harpd(tmp_path_factory.mktemp("hostile"), PROCEDURES, services=True) as harpd:
        yield harpd


class Others:
    """Calls of others that run at the same time: a connection-bound and a resumable call."""

    def __init__(self, harpd: Harpd, directory: Path) -> None:
        self._harpd = harpd
        self._go = directory / "go"
        self._bound = harpd.connect()
        self._bound.send(harpd.request("wait_for", [str(self._go), "bound"]))
        self._resumable = harpd.start_resumable("wait_for", str(self._go), "resumable")
        for client in (self._bound, self._resumable):
            assert client.message()["stream_result"] is False

    def check(self) -> None:
        """Check that both calls return on their own connections, and that a new connection is accepted."""
        assert self._harpd.call("echo", 1)[-1] == {"result": [1]}
        self._go.touch()
        assert self._bound.message() == {"result": "bound"}
        while "result" not in (line := self._resumable.message()):
            assert "exit_info" in line
        assert line == {"result": "resumable"}
        self._resumable.send({"release": True})
        self._bound.close()
        self._resumable.close()
        wait_until(lambda: self._harpd.status()["calls"] == 0, DEADLINE, "the end of all calls")


@pytest.fixture
def others(harpd: Harpd, tmp_path: Path) -> Iterator[Others]:
    others = Others(harpd, tmp_path)
    yield others
    others.check()


#: Texts of JSON values, which no member of a request expects, or only some do.
ODD = [
    *("null", "true", "-1", "0", "1e400", "-1e400", "1e-400", "1" + "0" * 400, "0.0", "1.5", '""', '"x"', "[]", "{}"),
    *('"\\ud800"', '"\\u0000"', '"' + "x" * 5000 + '"', '[[[{"a":1}]]]', '{"stop":true}'),
]


def usual_terms(harpd: Harpd) -> dict[str, Any]:
    usual = {"id": str(uuid.uuid4()), "owner": OWNER, "secret": SECRET, "disconnect_timeout": 60, "result_ttl": 1}
    return {**usual, "timeout": 60, "max_exec_time": 60, "instance": harpd.status()["instance"]}


def replies(harpd: Harpd, line: bytes) -> list[bytes]:
    """Send a line; return the replies until the connection closes, or until the closing line of a call."""
    received: list[bytes] = []
    with harpd.connect() as client:
        client.send(line)
        while reply := client.line():
            received.append(reply)
            if reply.startswith((b'{"result"', b'{"exception"')):
                break
    return received


@pytest.mark.parametrize(
    "member", ["id", "owner", "secret", "disconnect_timeout", "result_ttl", "timeout", "max_exec_time", "instance", "x"]
)
def test_odd_terms_of_a_call_cost_only_their_connection(harpd: Harpd, others: Others, member: str) -> None:
    for odd in ODD:
        terms = ",".join(f'"{key}":{json.dumps(value)}' for key, value in usual_terms(harpd).items() if key != member)
        request = harpd.request("echo", [1], call={"TERMS": 0})
        line = json.dumps(request).replace('{"TERMS": 0}', f'{{{terms},"{member}":{odd}}}').encode() + b"\n"
        assert replies(harpd, line), odd


@pytest.mark.parametrize("member", ["attach", "owner", "secret", "since", "auth", "keep_alive", "x"])
def test_odd_attach_costs_only_its_connection(harpd: Harpd, others: Others, member: str) -> None:
    for odd in ODD:
        usual = {"harp": 1, "attach": str(uuid.uuid4()), "owner": OWNER, "secret": SECRET, "since": 0}
        request = {**usual, "auth": harpd.auth}
        request.pop(member, None)
        line = json.dumps(request)[:-1] + f',"{member}":{odd}}}'
        assert replies(harpd, line.encode() + b"\n"), odd


@pytest.mark.parametrize("member", ["procedure", "arguments", "auth", "keep_alive", "call", "calls", "harp", "x"])
def test_odd_request_costs_only_its_connection(harpd: Harpd, others: Others, member: str) -> None:
    for odd in ODD:
        request = harpd.request("echo", [1])
        request.pop(member, None)
        line = json.dumps(request)[:-1] + f',"{member}":{odd}}}'
        assert replies(harpd, line.encode() + b"\n"), odd


@pytest.mark.parametrize(
    "line",
    [
        *(b'{"ack":%b}\n' % odd.encode() for odd in ODD),
        *(b'{"heartbeat":%b}\n' % odd.encode() for odd in ODD),
        *(b'{"stop":%b}\n' % odd.encode() for odd in ODD[:3]),
        b'{"release":true}\n',
        b"\n" * 1000,
        b"{" * 5000,
        b"\xff\n",
    ],
)
def test_odd_command_costs_only_its_connection(harpd: Harpd, others: Others, line: bytes) -> None:
    def unanswered(client: LineClient) -> None:
        client.send(line)
        client.close()

    client = harpd.start_resumable("echo", 1, result_ttl=1)
    client.message()
    unanswered(client)
