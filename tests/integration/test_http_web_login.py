"""The command web-login of a real dispatcher: who gets in by its link, for how long, and what is recorded of it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from support.audit_entries import read_audit
from support.harpcallerd import Harpcallerd

HTTP = {"listen": ["127.0.0.1:0"]}


def link_of(dispatcher: Harpcallerd, *options: str) -> str:
    done = dispatcher.control("web-login", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def log_in(link: str) -> tuple[httpx.Client, dict[str, Any]]:
    parts = urlsplit(link)
    client = httpx.Client(base_url=f"{parts.scheme}://{parts.netloc}/api/v1", headers={"Sec-Fetch-Site": "same-origin"})
    reply = client.post("/session", json={"link": parts.fragment.removeprefix("k=")})
    assert reply.status_code == 201, reply.text
    return client, reply.json()


def port_of(dispatcher: Harpcallerd) -> int:
    return int(dispatcher.events("harpcallerd is serving HTTP")[-1]["port"])


def test_web_login_session_survives_a_killed_dispatcher(tmp_path: Path) -> None:
    settings = {"http": HTTP, "tokens_file": "tokens", "audit_file": "audit.jsonl"}
    with Harpcallerd(tmp_path, settings=settings) as dispatcher:
        assert dispatcher.control("token", "add", "shop", "--role=viewer").returncode == 0
        link = link_of(dispatcher, "--as=alice", "--role=viewer", "--role=operator", "--hours=1")
        alice, login = log_in(link)
        gone, _ = log_in(link_of(dispatcher))
        token = dispatcher.control("token", "add", "app", "--role=viewer").stdout.strip()
        app = httpx.Client(base_url=alice.base_url, headers={"Sec-Fetch-Site": "same-origin"})
        assert app.post("/session", json={"token": token}).status_code == 201
        with closing(alice), closing(gone), closing(app):
            root = gone.get("/me").json()
            assert (root["roles"], root["principal"].startswith("user:")) == (["admin"], True)
            assert gone.delete("/session").status_code == 204
            cookie = dict(alice.cookies)
            dispatcher.restart(kill=True)
            base = f"http://127.0.0.1:{port_of(dispatcher)}/api/v1"
            with httpx.Client(base_url=base, cookies=cookie) as again:
                me = again.get("/me").json()
                assert (me["principal"], me["roles"]) == ("user:alice", ["viewer", "operator"])
                assert me["session"]["expires"] == login["expires"]
                assert 3000 < login["expires"] - me["server"]["now"] <= 3600
            with httpx.Client(base_url=base, cookies=dict(app.cookies)) as again:
                assert again.get("/me").json()["principal"] == "token:app"
                assert dispatcher.control("token", "revoke", "app").returncode == 0
                assert again.get("/me").status_code == 401
            with httpx.Client(base_url=base, headers={"Sec-Fetch-Site": "same-origin"}) as late:
                used = late.post("/session", json={"link": urlsplit(link).fragment.removeprefix("k=")})
                assert used.status_code == 401
    secrets = (token, urlsplit(link).fragment[2:], *cookie.values())
    for file in (dispatcher.log_file, tmp_path / "audit.jsonl", dispatcher.store_directory / "sessions"):
        text = file.read_text()
        for secret in secrets:
            assert secret not in text, file
    entries = read_audit(tmp_path / "audit.jsonl")
    actions = [(entry["action"], entry["principal"]) for entry in entries if "principal" in entry]
    assert ("web-login", "administrator") in actions
    assert ("login", "user:alice") in actions
    assert ("login", "token:app") in actions
    assert ("logout", root["principal"]) in actions


def test_web_login_refuses_what_would_open_nothing(tmp_path: Path) -> None:
    rules = '[roles]\nops = []\n\n[[rule]]\nwho = ["role:ops", "user:carol"]\nallow = ["list"]\n'
    (tmp_path / "access.toml").write_text(rules)
    with Harpcallerd(tmp_path, settings={"http": HTTP, "access_file": "access.toml"}) as dispatcher:
        refused = dispatcher.control("web-login", "--as=alice")
        assert refused.returncode == 1
        assert "no rule allows anything to user:alice, role:admin" in refused.stderr
        for options in (("--as=alice", "--role=ops"), ("--as=carol",)):
            client, _ = log_in(link_of(dispatcher, *options))
            with closing(client):
                assert client.get("/me").json()["can"] == ["list"]
        assert dispatcher.control("web-login", "--as=a b", "--role=ops").returncode == 1
        assert dispatcher.control("web-login", "--hours=0").returncode == 2


def test_web_login_without_the_http_api_is_refused(tmp_path: Path) -> None:
    with Harpcallerd(tmp_path) as dispatcher:
        refused = dispatcher.control("web-login")
        assert (refused.returncode, "there is no HTTP API" in refused.stderr) == (1, True)
