"""A leaver: one command ends all that a token has opened, at every door, and nothing of others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd, LineClient
from support.peers import Peer

RULES = '[[rule]]\nwho = ["token:*"]\nallow = ["call", "read", "cancel", "list"]\n'
SAME_ORIGIN = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def dispatcher(tmp_path: Path, peer: Peer) -> Iterator[Harpcallerd]:
    (tmp_path / "access.toml").write_text(RULES)
    settings: dict[str, Any] = {
        "listen": ["127.0.0.1:0", f"unix:{tmp_path}/calls"],
        "tokens_file": "tokens",
        "access_file": "access.toml",
        "http": {"listen": ["127.0.0.1:0"]},
    }
    with Harpcallerd(tmp_path, {"web01": peer.port}, settings=settings) as found:
        yield found


class Person:
    """A client with a token, at each door; each of `open` waits until its right has ended, or the dispatcher stops."""

    def __init__(self, dispatcher: Harpcallerd, name: str, stack: ExitStack) -> None:
        self._dispatcher, self._stack = dispatcher, stack
        self.token = dispatcher.control("token", "add", name).stdout.strip()
        self.auth = {"auth": {"token": self.token}}
        self.job = dispatcher.submit("web01", "hang", **self.auth)
        [port] = [event["port"] for event in dispatcher.events("harpcallerd is serving HTTP")]
        self.base = f"http://127.0.0.1:{port}/api/v1"
        self.lines: dict[str, LineClient] = {}
        self.streams: dict[str, Iterator[str]] = {}

    def new_client(self, **headers: str) -> httpx.Client:
        return self._stack.enter_context(httpx.Client(base_url=self.base, headers=headers, timeout=DEADLINE))

    def open(self) -> None:
        requests: dict[str, dict[str, Any]] = {
            "idle": {"cancel": "no-such-job", "keep_alive": True},
            "result": {"get_result": self.job},
            "stream": {"follow_stream": self.job},
        }
        for name, request in requests.items():
            self.lines[name] = self._stack.enter_context(self._dispatcher.connect())
            self.lines[name].send({"harpcaller": 1, **request, **self.auth})
        assert self.lines["idle"].message()["cancelled"] is False
        bearer = {"Authorization": f"Bearer {self.token}"}
        browser = self.new_client(**SAME_ORIGIN)
        assert browser.post("/session", json={"token": self.token}).status_code == 201
        for kind, client in (("token", self.new_client(**bearer)), ("session", browser)):
            for path in ("/events", f"/jobs/{self.job}/records?follow=1&form=sse", "/events?topics=counts"):
                reply = self._stack.enter_context(client.stream("GET", path))
                assert reply.status_code == 200
                self.streams[f"{kind} {path}"] = iter(reply.iter_lines())
                next(self.streams[f"{kind} {path}"])


def test_revoked_token_ends_what_it_has_opened_at_each_door(dispatcher: Harpcallerd) -> None:
    with ExitStack() as stack:
        leaver, colleague = (Person(dispatcher, name, stack) for name in ("leaver", "colleague"))
        for person in (leaver, colleague):
            person.open()
        assert dispatcher.control("token", "revoke", "leaver").returncode == 0
        for name in ("result", "stream"):
            assert leaver.lines[name].message()["error"]["type"] == "auth_error", name
            assert leaver.lines[name].line() == b""
        assert leaver.lines["idle"].line() == b""
        for name, lines in leaver.streams.items():
            assert "access" in "".join(lines), name  # until the response ends
        refused = leaver.new_client(Authorization=f"Bearer {leaver.token}").get("/jobs")
        assert refused.status_code == 401
        [reply] = dispatcher.ask(get_status=leaver.job, **leaver.auth)
        assert reply["error"]["type"] == "auth_error"
        # All of a colleague's is open: the end of its job arrives everywhere.
        assert dispatcher.ask(cancel=colleague.job, **colleague.auth) == [{"cancelled": True}]
        for name in ("result", "stream"):
            assert colleague.lines[name].message() == {"cancelled": True}
        colleague.lines["idle"].send({"harpcaller": 1, "cancel": "no-such-job"})
        assert colleague.lines["idle"].message()["cancelled"] is False
        for name, lines in colleague.streams.items():
            assert any("cancelled" in line for line in lines), name


def test_tokens_file_that_was_edited_ends_connections(dispatcher: Harpcallerd) -> None:
    """Without a command: another program has removed the line."""
    with ExitStack() as stack:
        leaver, colleague = (Person(dispatcher, name, stack) for name in ("leaver", "colleague"))
        leaver.open()
        file = dispatcher.directory / "tokens"
        kept = [line for line in file.read_bytes().splitlines(True) if json.loads(line)["name"] != "leaver"]
        new = file.with_name("edited")
        new.touch(0o600)
        new.write_bytes(b"".join(kept))
        new.replace(file)
        assert leaver.lines["result"].message()["error"]["type"] == "auth_error"
        for name, lines in leaver.streams.items():
            assert "access" in "".join(lines), name
        assert wait_until(lambda: dispatcher.ask(get_status=colleague.job, **colleague.auth), what="a status")[0][
            "call"
        ]
