"""Logins by name and password over HTTP: the file of users, wrong passwords, and the ends of their sessions."""

from __future__ import annotations

import asyncio
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from harp_daemon.settings import ConfigError
from harpcaller.access.attempts import FailedAttempts
from harpcaller.access.tokens import TokenError
from harpcaller.access.users import read_users
from harpcaller.config import HTTPSettings
from support.http_api import RunningAPI, running_api


def write_users(file: Path, *lines: str) -> HTTPSettings:
    file.touch(0o600)
    file.write_text("".join(line + "\n" for line in lines))
    return HTTPSettings(users_file=file)


@pytest.fixture(scope="module")
def hashes() -> dict[str, str]:
    def make(password: str) -> str:
        command = ["openssl", "passwd", "-6", "-salt", "saltsalt", password]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return {password: make(password) for password in ("open sesame", "friend")}


def browser(api: RunningAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=api.client.base_url, headers={"Sec-Fetch-Site": "same-origin"}, timeout=60)


async def log_in(client: httpx.AsyncClient, user: str, password: str) -> httpx.Response:
    return await client.post("/session", json={"user": user, "password": password})


async def test_http_password_logs_in_with_the_roles_of_the_user(tmp_path: Path, hashes: dict[str, str]) -> None:
    file = tmp_path / "users"
    alice, bob = f"alice:{hashes['open sesame']}:viewer,operator", f"bob:{hashes['friend']}:"
    http = write_users(file, "# comment", "", alice, bob)
    async with running_api(tmp_path, rules=None, http=http) as api, browser(api) as client, browser(api) as other:
        reply = await log_in(client, "alice", "open sesame")
        assert (reply.status_code, reply.json()["principal"]) == (201, "user:alice")
        assert (await client.get("/me")).json()["roles"] == ["viewer", "operator"]
        assert (await log_in(other, "bob", "friend")).status_code == 201
        assert (await other.get("/me")).json()["can"] == []
        write_users(file, bob, f"alice:{hashes['friend']}:viewer,operator")
        async with asyncio.timeout(30):
            while (await client.get("/me")).status_code != 401:
                await asyncio.sleep(0.1)
        assert (await other.get("/me")).status_code == 200, "the line of this user has not changed"


async def test_http_wrong_passwords_are_refused_alike_and_slower(
    tmp_path: Path, hashes: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    http = write_users(tmp_path / "users", f"alice:{hashes['open sesame']}:viewer", "locked:!:viewer")
    async with running_api(tmp_path, rules=None, http=http) as api, browser(api) as client:
        bodies: set[Any] = set()
        for name, password in (("alice", "friend"), ("nobody", "friend"), ("locked", "!"), ("x" * 2000, "friend")):
            began = time.monotonic()
            reply = await log_in(client, name, password)
            assert reply.status_code == 401
            assert time.monotonic() - began >= 0.1
            bodies.add((reply.json()["code"], reply.json()["detail"]))
        assert len(bodies) == 1
        replies = await asyncio.gather(*(log_in(client, "mallory", "friend") for _ in range(30)))
        assert {reply.status_code for reply in replies} == {401, 429}
        limited = next(reply for reply in replies if reply.status_code == 429)
        assert (limited.json()["code"], int(limited.headers["retry-after"]) > 0) == ("rate_limited", True)
        assert (await log_in(client, "alice", "open sesame")).status_code == 201, "others are not locked out"
        assert "friend" not in caplog.text
        assert "open sesame" not in caplog.text


async def test_http_password_without_users_is_refused(tmp_path: Path) -> None:
    async with running_api(tmp_path, rules=None) as api, browser(api) as client:
        reply = await log_in(client, "alice", "open sesame")
        assert (reply.status_code, reply.json()["code"]) == (401, "auth_error")


@pytest.mark.parametrize(
    "line", ["alice", "alice:", "al ice:x:viewer", ":x:viewer", "alice:x y:viewer", "alice:x:view er", "alice:x:,"]
)
def test_http_users_file_error_quotes_no_line(tmp_path: Path, line: str) -> None:
    write_users(tmp_path / "users", "bob:secret-hash:", line)
    with pytest.raises(TokenError, match="line 2: expected NAME:CRYPT-HASH:ROLE,ROLE") as refusal:
        read_users(tmp_path / "users")
    assert "alice" not in str(refusal.value)


async def test_http_users_file_that_others_can_read_is_an_error(tmp_path: Path) -> None:
    http = write_users(tmp_path / "users", "bob:x:viewer", "bob:y:viewer")
    with pytest.raises(ConfigError, match=r"http\.users_file: .*line 2: a second user bob"):
        async with running_api(tmp_path, rules=None, http=http):
            pass
    http = write_users(tmp_path / "users", "bob:x:viewer")
    (tmp_path / "users").chmod(0o644)
    (tmp_path / "tokens").unlink()
    with pytest.raises(ConfigError, match="expected mode 0600"):
        async with running_api(tmp_path, rules=None, http=http):
            pass


def test_failed_attempts_have_a_remaining_time() -> None:
    attempts = FailedAttempts()
    assert attempts.remaining("peer", "name") == 0
    delays = [attempts.record_failure("peer", "name") for _ in range(12)]
    assert delays[:3] == [0.1, 0.2, 0.4]
    assert 29 < attempts.remaining("peer", "name") <= delays[-1] == 30
    assert attempts.remaining("peer", "other") == 0
    attempts.reset("peer", "name")
    assert attempts.remaining("peer", "name") == 0
