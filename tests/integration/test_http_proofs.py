"""Clients of the HTTP API that prove themselves by their connection: certificates, and users of Unix sockets."""

from __future__ import annotations

import asyncio
import os
import pwd
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from harpcaller.config import Address, HTTPSettings
from support.certificates import give_unreadable_name, make_client, server_files, write_revocations
from support.deadline import eventually
from support.http_api import RunningAPI, running_api

RULES = """\
[[rule]]
who = ["cert:shop"]
allow = ["list"]

[[rule]]
who = ["uid:*"]
allow = ["list", "read"]
jobs = "any"
"""


def settings_of(directory: Path) -> HTTPSettings:
    """Return settings with a TLS listener that accepts certificates of the authority of the tests."""
    write_revocations(directory)
    return HTTPSettings(
        listen=(Address("127.0.0.1", 0, tls=True),),
        certfile=directory / "server.pem",
        keyfile=directory / "server.key",
        client_ca_file=directory / "ca.pem",
        crl_file=directory / "crl.pem",
    )


def client_of(api: RunningAPI, certificate: tuple[Path, Path] | None, **headers: str) -> httpx.AsyncClient:
    context = ssl.create_default_context(cafile=api.directory / "ca.pem")
    if certificate is not None:
        context.load_cert_chain(*certificate)
    url, limits = f"https://localhost:{api.port}/api/v1", httpx.Limits(keepalive_expiry=None)  # it stays connected
    return httpx.AsyncClient(base_url=url, verify=context, headers=headers, limits=limits)


async def test_http_certificate_is_a_principal_and_no_page_can_use_it(tmp_path: Path) -> None:
    server_files(tmp_path)
    shop, other = make_client(tmp_path, "DNS:shop"), make_client(tmp_path, "DNS:other")
    async with running_api(tmp_path, rules=RULES, http=settings_of(tmp_path)) as api:
        async with client_of(api, shop) as client:
            me = (await client.get("/me")).json()
            assert (me["principal"], me["can"], me["session"]) == ("cert:shop", ["list"], None)
            can = await client.post("/me/can", json={"action": "list"})
            assert (can.status_code, can.json()["allowed"]) == (200, True)
            for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
                foreign = await client.post("/me/can", json={"action": "list"}, headers=headers)
                assert (foreign.status_code, foreign.json()["code"]) == (403, "cross_origin")
            token = await client.get("/me", headers=api.headers_of("app", "web"))
            assert token.json()["principal"] == "token:app", "a token is the stronger proof"
            link = api.api.make_login_link("alice", (), None)
            assert link.startswith(f"https://127.0.0.1:{api.port}/login#k=")
            origin = {"Origin": f"https://localhost:{api.port}"}
            login = await client.post("/session", json={"link": link.partition("#k=")[2]}, headers=origin)
            assert login.headers["set-cookie"].startswith("__Host-harp=")
            assert "Secure" in login.headers["set-cookie"]
            assert (await client.get("/me")).json()["principal"] == "user:alice"
        async with client_of(api, other) as client:
            assert (await client.get("/me")).json()["can"] == []
            assert (await client.get("/hosts")).status_code == 403
        async with client_of(api, None) as client:
            assert (await client.get("/me")).status_code == 401


async def test_http_certificate_with_an_unreadable_name_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server_files(tmp_path)
    odd, shop = make_client(tmp_path, "DNS:odd"), make_client(tmp_path, "DNS:shop")
    give_unreadable_name(tmp_path, odd[0])
    async with running_api(tmp_path, rules=RULES, http=settings_of(tmp_path)) as api:
        async with client_of(api, odd) as client:
            with pytest.raises(httpx.TransportError):
                await client.get("/me")
        async with client_of(api, shop) as client:
            assert (await client.get("/me")).status_code == 200
    assert "connection failed" not in caplog.messages


async def test_http_revoked_certificate_is_refused_when_connected(tmp_path: Path) -> None:
    server_files(tmp_path)
    shop = make_client(tmp_path, "DNS:shop")
    async with (
        running_api(tmp_path, rules=RULES, http=settings_of(tmp_path)) as api,
        client_of(api, shop) as client,
    ):
        assert (await client.get("/me")).status_code == 200
        write_revocations(tmp_path, shop[0])
        tls = api.api.server.tls
        assert tls is not None
        async with asyncio.timeout(30):
            while not tls.version:
                _ = tls.context
                await asyncio.sleep(0.05)
        refused = await client.get("/me")
        assert (refused.status_code, refused.json()["code"]) == (401, "auth_error")


async def test_http_expired_certificate_ends_a_stream(tmp_path: Path) -> None:
    server_files(tmp_path)
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=5)
    shop = make_client(tmp_path, "DNS:shop", expires=expires)
    async with running_api(tmp_path, rules=RULES, http=settings_of(tmp_path)) as api, client_of(api, shop) as client:
        last = await last_of_stream(client)
        assert datetime.now(UTC) >= expires
        assert '"reason":"access"' in last


async def test_http_user_who_leaves_a_group_loses_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    http, groups = HTTPSettings(listen=(Address(None, 0, tmp_path / "http"),)), [0, 3_999_999]
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: list(groups))  # as a directory service
    rules = '[[rule]]\nwho = ["gid:3999999"]\nallow = ["list"]\njobs = "any"\n'
    async with running_api(tmp_path, rules=rules, http=http) as api:
        api.refresh()
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "http"))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/api/v1") as client:
            assert (await client.get("/me")).json()["can"] == ["list"]
            stream = asyncio.create_task(last_of_stream(client))
            await eventually(lambda: api.api.service.streams.kinds.total() == 1, what="the stream")
            groups.remove(3_999_999)
            assert '"reason":"access"' in await asyncio.wait_for(stream, 30)
            assert (await client.get("/hosts")).status_code == 403


async def test_http_token_or_session_keeps_no_principal_of_a_revoked_certificate(tmp_path: Path) -> None:
    server_files(tmp_path)
    shop = make_client(tmp_path, "DNS:shop")
    rules = '[[rule]]\nwho = ["cert:shop"]\nallow = ["list"]\n'
    async with running_api(tmp_path, rules=rules, http=settings_of(tmp_path)) as api:
        headers = api.headers_of("app", "web")
        api.refresh()
        async with (
            client_of(api, shop, Origin=f"https://localhost:{api.port}") as with_session,
            client_of(api, shop, **headers) as with_token,
            client_of(api, shop, **headers) as reader,
        ):
            link = api.api.make_login_link("alice", (), None).partition("#k=")[2]
            await with_session.post("/session", json={"link": link})
            for client in (with_session, with_token):
                assert (await client.get("/me")).json()["can"] == ["list"]
            stream = asyncio.create_task(last_of_stream(reader))
            await eventually(lambda: api.api.service.streams.kinds.total() == 1, what="the stream")
            tls = api.api.server.tls
            assert tls is not None
            write_revocations(tmp_path, shop[0])
            await eventually(lambda: tls.context is not None and bool(tls.version), what="the list of revocations")
            assert '"reason":"access"' in await asyncio.wait_for(stream, 30)
            for client in (with_session, with_token):  # the same connections
                me = await client.get("/me")
                assert (me.status_code, me.json()["can"]) == (200, [])


async def last_of_stream(client: httpx.AsyncClient) -> str:
    """Follow events until the stream ends; return its last line."""
    async with client.stream("GET", "/events", headers={"Accept": "application/jsonl"}, timeout=30) as reply:
        assert reply.status_code == 200
        return [line async for line in reply.aiter_lines() if line][-1]


async def test_http_user_of_a_unix_socket_is_a_principal(tmp_path: Path) -> None:
    http = HTTPSettings(listen=(Address(None, 0, tmp_path / "http"),))
    name = pwd.getpwuid(os.geteuid()).pw_name
    async with running_api(tmp_path, rules=RULES, http=http):
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "http"))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/api/v1") as client:
            me = (await client.get("/me")).json()
            assert (me["principal"], me["can"]) == (f"uid:{name}", ["read", "list"])
            assert (
                await client.post("/jobs", json={"host": "h", "procedure": "p", "arguments": []})
            ).status_code == 403
            wrong = await client.get("/me", headers={"Host": "evil.example"})
            assert (wrong.status_code, wrong.json()["code"]) == (421, "wrong_host")


async def test_http_connection_has_no_rights_without_access_file(tmp_path: Path) -> None:
    http = HTTPSettings(listen=(Address(None, 0, tmp_path / "http"),))
    async with running_api(tmp_path, rules=None, http=http):
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "http"))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/api/v1") as client:
            assert (await client.get("/me")).json()["can"] == []
            call = {"host": "h", "procedure": "p", "arguments": []}
            for reply in (await client.post("/jobs", json=call), await client.get("/jobs"), await client.get("/hosts")):
                assert (reply.status_code, reply.json()["code"]) == (403, "access_denied")
