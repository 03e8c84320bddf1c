"""Logins over HTTP: links, sessions, cookies, what a foreign page cannot do, built-in roles."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from harpcaller.access.policy import Action
from harpcaller.access.tokens import revoke_token
from harpcaller.config import HTTPSettings
from support.audit_entries import read_audit
from support.deadline import eventually
from support.dispatcher import call, host_line
from support.http_api import RunningAPI, running_api
from support.peers import reserved_port

OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}


def browser(api: RunningAPI) -> httpx.AsyncClient:
    """Return a client with cookies and without a token, which sends what a browser sends for a page of the console."""
    return httpx.AsyncClient(base_url=api.client.base_url, headers=OWN_PAGE, timeout=30)


def secret_of(link: str) -> str:
    return link.partition("#k=")[2]


async def log_in(api: RunningAPI, client: httpx.AsyncClient, *roles: str, name: str = "alice") -> httpx.Response:
    link = api.api.make_login_link(name, roles, None)
    reply = await client.post("/session", json={"link": secret_of(link)})
    assert reply.status_code == 201, reply.text
    return reply


async def test_http_link_logs_in_once_and_logout_ends_the_session(tmp_path: Path) -> None:
    async with running_api(tmp_path, rules=None) as api, browser(api) as alice:
        assert (await alice.get("/me")).status_code == 401
        link = api.api.make_login_link("alice", ("viewer",), None)
        assert link.startswith(f"http://127.0.0.1:{api.port}/login#k=")
        reply = await alice.post("/session", json={"link": secret_of(link)})
        assert (reply.status_code, reply.json()["principal"]) == (201, "user:alice")
        cookie = reply.headers["set-cookie"]
        assert cookie.startswith("harp=")
        assert {part.strip() for part in cookie.split(";")[1:]} == {"HttpOnly", "Path=/", "SameSite=strict"}
        assert secret_of(link) not in cookie
        again = await alice.post("/session", json={"link": secret_of(link)})
        assert (again.status_code, again.json()["code"]) == (401, "auth_error")
        me = (await alice.get("/me")).json()
        assert (me["principal"], me["roles"], me["can"]) == ("user:alice", ["viewer"], ["read", "list", "metrics"])
        assert me["session"]["expires"] == reply.json()["expires"]
        kept = alice.cookies["harp"]
        out = await alice.delete("/session")
        assert (out.status_code, out.content, "Max-Age=0" in out.headers["set-cookie"]) == (204, b"", True)
        assert (await alice.get("/me", headers={"Cookie": f"harp={kept}"})).status_code == 401


async def test_http_login_of_a_stranger_is_no_denial(tmp_path: Path) -> None:
    """A page asks who is logged in, and for the job of its address, before it shows the login."""
    file = tmp_path / "audit.jsonl"
    async with running_api(tmp_path, rules=None, audit_file=file) as api, browser(api) as alice:
        for path in ("/me", f"/jobs/{'0' * 8}-0000-0000-0000-{'0' * 12}"):
            assert (await alice.get(path)).status_code == (await alice.head(path)).status_code == 401
        await log_in(api, alice, "viewer")
        assert not read_audit(file, decision="denied")
        for cookie in ("harp=ended", ""):
            refused = [
                await alice.get("/me", headers={"Cookie": cookie, "Authorization": "" if cookie else "Bearer x"}),
                await alice.post("/jobs", json={}, headers={"Cookie": cookie}),
                await alice.post("/session", json={"link": "wrong"}, headers={"Cookie": cookie}),
            ]
            assert [reply.status_code for reply in refused] == [401] * 3
        assert len(read_audit(file, decision="denied")) == 6


async def test_http_token_logs_in_and_its_session_ends_with_it(tmp_path: Path) -> None:
    async with running_api(tmp_path, rules=None) as api, browser(api) as shop:
        api.headers_of("shop", "viewer")
        reply = await shop.post("/session", json={"token": api.tokens["shop"]})
        assert (reply.status_code, reply.json()["principal"]) == (201, "token:shop")
        me = (await shop.get("/me")).json()
        assert (me["principal"], me["roles"]) == ("token:shop", ["viewer"])
        revoke_token(tmp_path / "tokens", "shop")
        api.refresh()
        assert (await shop.get("/me")).status_code == 401
        wrong = await shop.post("/session", json={"token": api.tokens["shop"]})
        assert (wrong.status_code, wrong.headers["www-authenticate"]) == (401, 'Bearer realm="harp"')


async def test_http_login_with_another_body_is_refused(tmp_path: Path) -> None:
    wrong = (b"", b"[]", b"{}", b'{"link": 1}', b'{"link": "x", "token": "y"}', b'{"links": "x"}', b'{"link"')
    async with running_api(tmp_path, rules=None) as api, browser(api) as client:
        for body in wrong:
            reply = await client.post("/session", content=body, headers={"Content-Type": "application/json"})
            assert (reply.status_code, reply.json()["code"]) in ((400, "invalid_request"), (422, "invalid_request"))


FOREIGN: tuple[Mapping[str, str], ...] = (
    {"Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"},
    {"Sec-Fetch-Site": "same-site", "Content-Type": "application/json"},
    {"Origin": "http://evil.example", "Content-Type": "application/json"},
    {"Origin": "null", "Content-Type": "application/json"},
    {"Sec-Fetch-Site": "same-origin", "Content-Type": "text/plain"},
    {"Origin": "http://evil.example", "Content-Type": "text/plain"},
)


async def test_http_foreign_page_changes_nothing_with_the_cookie(tmp_path: Path) -> None:
    async with running_api(tmp_path, rules=None) as api, browser(api) as alice:
        await log_in(api, alice, "admin")
        cookie = {"Cookie": f"harp={alice.cookies['harp']}"}
        job_id = await api.dispatcher.submit(call(host="nohost"), "test")
        body = json.dumps({"host": "nohost", "procedure": "p", "arguments": []}).encode()
        async with httpx.AsyncClient(base_url=api.client.base_url) as foreign:
            for headers in (*FOREIGN, {"Content-Type": "application/json"}):
                for path in ("/jobs", "/session", f"/jobs/{job_id}/cancel", "/me/can"):
                    reply = await foreign.post(path, content=body, headers={**headers, **cookie})
                    refused = reply.status_code, reply.json()["code"]
                    assert refused in ((403, "cross_origin"), (404, "not_found"), (405, "method_not_allowed")), path
                if headers["Content-Type"] == "application/json":
                    reply = await foreign.delete("/session", headers={**headers, **cookie})
                    assert (reply.status_code, reply.json()["code"]) == (403, "cross_origin")
            origin = {"Origin": f"http://127.0.0.1:{api.port}", "Content-Type": "application/json"}
            can = await foreign.post("/me/can", json={"action": "call"}, headers={**origin, **cookie})
            assert (can.status_code, can.json()["allowed"]) == (200, True)
        jobs = [job async for job in api.dispatcher.list_jobs(ended=True)]
        assert [job.id for job in jobs] == [job_id]
        assert (await alice.get("/me")).status_code == 200


async def test_http_foreign_page_cannot_log_a_person_in(tmp_path: Path) -> None:
    async with running_api(tmp_path, rules=None) as api:
        secret = secret_of(api.api.make_login_link("mallory", ("viewer",), None))
        async with httpx.AsyncClient(base_url=api.client.base_url) as foreign:
            for headers in FOREIGN:
                reply = await foreign.post("/session", content=json.dumps({"link": secret}), headers=headers)
                assert (reply.status_code, reply.json()["code"]) == (403, "cross_origin")
                assert "set-cookie" not in reply.headers
            assert (await foreign.post("/session", json={"link": secret})).status_code == 201, "it was not used up"


async def test_http_request_for_another_host_is_refused(tmp_path: Path) -> None:
    async with running_api(tmp_path, rules=None, http=HTTPSettings(hosts=("harp.example.net",))) as api:
        hosts = ("evil.example", f"evil.example:{api.port}", "127.0.0.1.evil.example", "")
        for path, host in product(("/api/v1/me", "/api/v1/openapi.json", "/login", "/", "/nothing"), hosts):
            request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{api.authorization}Connection: close\r\n\r\n"
            head, _, body = (await api.send(request.encode())).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 421 "), head
            assert json.loads(body)["code"] == "wrong_host"
        path = "/api/v1/me"
        for host in ("Harp.example.net", f"localhost:{api.port}", "127.0.0.1"):
            request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{api.authorization}Connection: close\r\n\r\n"
            assert b" 421 " not in (await api.send(request.encode())).partition(b"\r\n")[0]


async def test_http_roles_without_an_access_file_restrict(tmp_path: Path) -> None:
    async with running_api(tmp_path, rules=None) as api:
        job_id = await api.dispatcher.submit(call(host="nohost"), "test")
        wanted = {
            "viewer": ["read", "list", "metrics"],
            "operator": ["call", "read", "cancel", "list", "manage", "metrics"],
            "admin": [*Action],
            "web": [],
        }
        for role, actions in wanted.items():
            async with browser(api) as client:
                await log_in(api, client, role)
                me = (await client.get("/me")).json()
                assert (me["roles"], me["can"]) == ([role], actions)
                for action in wanted["admin"]:
                    reply = await client.post("/me/can", json={"action": action, "host": "web01", "procedure": "p"})
                    assert reply.json()["allowed"] == (action in actions), (role, action)
                read = await client.get(f"/jobs/{job_id}")
                assert read.status_code == (200 if "read" in actions else 404)
        assert (await api.client.get(f"/jobs/{job_id}", headers=api.headers_of("app", "web"))).status_code == 404


async def test_http_sessions_are_ended_by_owner_and_administrator(tmp_path: Path) -> None:
    async with (
        running_api(tmp_path, rules=None) as api,
        browser(api) as alice,
        browser(api) as bob,
        browser(api) as root,
    ):
        for client, name, role in ((alice, "alice", "viewer"), (bob, "bob", "operator"), (root, "root", "admin")):
            await log_in(api, client, role, name=name)

        async def listed(client: httpx.AsyncClient) -> list[Any]:
            sessions: list[Any] = (await client.get("/sessions")).json()["sessions"]
            return sessions

        [own] = await listed(alice)
        assert (own["principal"], own["current"], "sha256" in own) == ("user:alice", True, False)
        assert [one["principal"] for one in await listed(root)] == ["user:alice", "user:bob", "user:root"]
        for path in (f"/sessions/{own['id']}", "/sessions/0123456789abcdef"):
            refused = await bob.delete(path)
            assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
        assert (await root.delete(f"/sessions/{own['id']}")).status_code == 204
        assert (await alice.get("/me")).status_code == 401
        assert (await bob.get("/me")).status_code == 200


async def test_http_login_replaces_the_session_of_the_browser(tmp_path: Path) -> None:
    async with running_api(tmp_path, rules=None) as api, browser(api) as client:
        await log_in(api, client, "viewer", name="alice")
        before = client.cookies["harp"]
        await log_in(api, client, "viewer", name="bob")
        assert (await client.get("/me")).json()["principal"] == "user:bob"
        async with httpx.AsyncClient(base_url=api.client.base_url, headers={"Cookie": f"harp={before}"}) as old:
            assert (await old.get("/me")).status_code == 401


async def test_http_wrong_token_is_refused_even_beside_a_valid_cookie(tmp_path: Path) -> None:
    async with running_api(tmp_path, rules=None) as api, browser(api) as client:
        await log_in(api, client, "admin")
        wrong = ("Bearer x", "Bearer", "Basic YWxpY2U6eA==", "", api.client.headers["Authorization"][:-1] + "x")
        for header in wrong:
            reply = await client.get("/me", headers={"Authorization": header})
            assert (reply.status_code, reply.json()["code"]) == (401, "auth_error"), header


async def test_http_failed_attempts_are_delayed_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with running_api(tmp_path, rules=None) as api:
        wrong = f"harp_admin_{'0' * 64}"
        loop = asyncio.get_running_loop()
        times = []
        for _ in range(3):
            began = loop.time()
            assert (await api.client.get("/me", headers={"Authorization": f"Bearer {wrong}"})).status_code == 401
            times.append(loop.time() - began)
        assert times[0] >= 0.1
        assert times[1] >= 0.2
        assert times[2] >= 0.4
        began = loop.time()
        assert (await api.client.get("/me")).status_code == 200
        assert loop.time() - began < 0.4, "a right token is accepted at once"
        assert "0" * 64 not in caplog.text
        assert secret_of(api.api.make_login_link("x", (), None)) not in caplog.text


async def test_http_cookie_of_tls_has_its_prefix_and_is_secure(tmp_path: Path) -> None:
    http = HTTPSettings(behind_proxy=True, hosts=("harp.example.net",), base_path="/harp")
    async with running_api(tmp_path, rules=None, http=http) as api:
        link = api.api.make_login_link("alice", ("viewer",), None)
        assert link.startswith("https://harp.example.net/harp/login#k=")
        headers = {"Origin": "https://harp.example.net", "Host": "harp.example.net"}
        async with httpx.AsyncClient(base_url=api.client.base_url, headers=headers) as client:
            reply = await client.post("/session", json={"link": secret_of(link)})
            assert reply.status_code == 201
            cookie = reply.headers["set-cookie"]
            assert cookie.startswith("__Host-harp=")
            assert {"Secure", "HttpOnly", "Path=/"} <= {part.strip() for part in cookie.split(";")}
            value = cookie.partition(";")[0]
            plain = value.removeprefix("__Host-")
            assert (await client.get("/me", headers={"Cookie": value})).status_code == 200
            assert (await client.get("/me", headers={"Cookie": plain})).status_code == 401
            foreign = await client.post(
                "/me/can", json={}, headers={"Cookie": value, "Origin": "http://harp.example.net"}
            )
            assert foreign.json()["code"] == "cross_origin"


async def test_http_waiting_request_ends_when_its_proof_becomes_void(tmp_path: Path) -> None:
    with reserved_port() as dead:
        async with running_api(tmp_path, host_line(dead), rules=None, start_within=600.0) as api, browser(api) as alice:
            await log_in(api, alice, "viewer")
            job = await api.dispatcher.submit(call(), "test")
            [session] = api.api.service.sessions.list()
            tokens = tmp_path / "tokens"

            async def log_out() -> None:
                root = await api.client.delete(f"/sessions/{session.id}")
                assert root.status_code == 204

            async def revoke() -> None:
                assert revoke_token(tokens, "guest")
                api.refresh()

            headers = api.headers_of("guest", "viewer")
            for client, more, end in ((alice, {}, log_out), (api.client, headers, revoke)):
                waiting = asyncio.create_task(client.get(f"/jobs/{job}?wait=60", headers=more))
                await eventually(lambda: api.api.service.waits, what="the wait")
                await end()
                reply = await asyncio.wait_for(waiting, 30)
                assert (reply.status_code, reply.json()["code"]) == (401, "auth_error")
            assert api.api.service.waits == 0


async def test_http_logout_is_answered_although_it_ends_its_own_proof(tmp_path: Path) -> None:
    """The entry of the audit file takes longer than the checks of proofs."""
    async with (
        running_api(tmp_path, rules=None, audit_file=tmp_path / "audit.jsonl") as api,
        browser(api) as alice,
    ):
        await log_in(api, alice, "viewer")
        audit_log = api.dispatcher.audit.log
        assert audit_log is not None
        with audit_log._file._lock:  # noqa: SLF001 - the disk is slow
            out = asyncio.create_task(alice.delete("/session"))
            await eventually(lambda: not api.api.service.sessions.list(), what="the end of the session")
            await asyncio.sleep(0.6)
        assert (await out).status_code == 204
