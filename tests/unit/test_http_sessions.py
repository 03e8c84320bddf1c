"""Sessions of browsers and one-time links: their file, their ends, and what is stored of them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from harpcaller.access import AuthError
from harpcaller.access.tokens import TokenStore, add_token, parse_token, revoke_token
from harpcaller.http import sessions
from harpcaller.http.sessions import Sessions

DAY = 86_400.0


class Clock:
    """A wall clock that tests set."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def opened(directory: Path, clock: Clock | None = None, tokens: TokenStore | None = None) -> Sessions:
    return Sessions(directory / "sessions", lambda: DAY / 2, lambda: 7 * DAY, lambda: tokens, clock or Clock())


async def test_session_survives_a_restart_and_its_file_has_no_secret(tmp_path: Path) -> None:
    before = opened(tmp_path)
    secret, session = await before.begin("user:alice", ("viewer",), agent="x" * 1000, address="127.0.0.1")
    assert secret not in (tmp_path / "sessions").read_text()
    assert (tmp_path / "sessions").stat().st_mode & 0o777 == 0o600
    after = opened(tmp_path)
    found = after.find(secret)
    assert found is not None
    assert (found.id, found.principal, found.roles, len(found.agent)) == (session.id, "user:alice", ("viewer",), 200)
    assert (after.find(secret[:-1]), after.find(""), after.find("\ud800"), after.find("x" * 10_000)) == (None,) * 4
    assert (secret not in repr(session), session.sha256 not in repr(session)) == (True, True)


async def test_session_ends_by_logout_also_after_a_restart(tmp_path: Path) -> None:
    before = opened(tmp_path)
    secret, session = await before.begin("user:alice")
    other, _ = await before.begin("user:bob")
    assert (await before.end(session.id), await before.end(session.id)) == (True, False)
    for one in (before, opened(tmp_path)):
        assert one.find(secret) is None
        assert one.find(other) is not None


async def test_session_ends_without_use_and_by_its_age(tmp_path: Path) -> None:
    clock = Clock()
    store = opened(tmp_path, clock)
    idle, _ = await store.begin("user:alice")
    used, session = await store.begin("user:bob")
    short, _ = await store.begin("user:carol", seconds=60)
    clock.now += 60
    assert (store.find(short), store.find(used) is None) == (None, False)
    for _ in range(13):
        clock.now += DAY / 2 - 1
        assert store.find(used) is not None
        assert store.find(idle) is None
    assert [one.principal for one in store.list()] == ["user:bob"]
    clock.now += DAY / 2 - 1
    assert (clock.now > session.expires, store.find(used)) == (True, None)
    _, session = await store.begin("user:dora", seconds=365 * DAY)
    assert session.expires == clock.now + 7 * DAY
    assert [json.loads(line)["principal"] for line in store.file.read_text().splitlines()] == ["user:dora"]


async def test_last_use_is_written_at_the_end(tmp_path: Path) -> None:
    clock = Clock()
    before = opened(tmp_path, clock)
    secret, _ = await before.begin("user:alice")
    clock.now += DAY / 3
    assert before.find(secret) is not None
    await before.aclose()
    clock.now += DAY / 3
    assert opened(tmp_path, clock).find(secret) is not None


async def test_session_of_a_token_has_its_roles_and_ends_with_it(tmp_path: Path) -> None:
    text, token = add_token(tmp_path / "tokens", "shop", ["viewer"])
    tokens = TokenStore(tmp_path / "tokens")
    store = opened(tmp_path, tokens=tokens)
    secret, session = await store.begin("token:shop", token=token)
    assert store.find(secret) is not None
    assert opened(tmp_path, tokens=None).find(secret) is None, "tokens_file was removed"
    revoke_token(tmp_path / "tokens", "shop")
    add_token(tmp_path / "tokens", "shop", ["admin"])
    tokens.refresh()
    assert store.find(secret) is None, "another token of the same name"
    assert not store.is_current(session)
    assert parse_token(text) is not None


async def test_link_is_valid_once_and_for_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    secret = store.add_link("alice", ("admin",), 60.0)
    assert len(secret) >= 43
    link = store.take_link(secret)
    assert (link.name, link.roles, link.seconds) == ("alice", ("admin",), 60.0)
    for wrong in (secret, "", "x", "\ud800", "y" * 100_000):
        with pytest.raises(AuthError, match="the link is not valid"):
            store.take_link(wrong)
    monkeypatch.setattr(sessions, "LINK_SECONDS", -1.0)
    with pytest.raises(AuthError):
        store.take_link(store.add_link("alice"))


async def test_links_and_sessions_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MAX_SESSIONS", 3)
    clock = Clock()
    store = opened(tmp_path, clock)
    links = [store.add_link("alice") for _ in range(101)]
    with pytest.raises(AuthError):
        store.take_link(links[0])
    assert store.take_link(links[1]).name == "alice"
    secrets = []
    for _ in range(4):
        clock.now += 1
        secrets.append((await store.begin("user:alice"))[0])
    assert [store.find(secret) is not None for secret in secrets] == [False, True, True, True]


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a\n", "role:admin"])
def test_name_of_a_link_is_checked(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="the name of a login"):
        opened(tmp_path).add_link(name)
    with pytest.raises(ValueError, match="role"):
        opened(tmp_path).add_link("alice", (name,))


@pytest.mark.parametrize("damage", ["mode", "text", "line", "key"])
async def test_file_that_cannot_be_used_ends_all_sessions(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret, session = await opened(tmp_path).begin("user:alice")
    file = tmp_path / "sessions"
    match damage:
        case "mode":
            file.chmod(0o644)
        case "text":
            file.write_bytes(file.read_bytes() + b"\xff\xfe\n")
        case "line":
            file.write_text(file.read_text().replace('"id":"', '"id":"x'))
        case "key":
            file.write_bytes(file.read_bytes().replace(b'"principal":', b'"princip\xff":'))
    assert opened(tmp_path).find(secret) is None
    assert "cannot read sessions" in caplog.text
    assert session.sha256 not in caplog.text


async def test_session_lasts_without_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Sessions(tmp_path / "missing" / "sessions", lambda: DAY, lambda: DAY, lambda: None)
    secret, _ = await store.begin("user:alice")
    assert store.find(secret) is not None
    assert "cannot write sessions" in caplog.text
    os.mkdir(tmp_path / "missing")
    assert store.find(secret) is not None
    await store.aclose()
    assert store.file.exists()


async def test_one_client_ends_no_sessions_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harpcaller.http.sessions._MAX_SESSIONS", 10)
    monkeypatch.setattr("harpcaller.http.sessions._MAX_OF_PRINCIPAL", 3)
    sessions = opened(tmp_path)
    victim, _ = await sessions.begin("user:victim")
    for _ in range(12):
        await sessions.begin("user:attacker")
    assert sessions.find(victim) is not None
    assert len(sessions.list()) == 4
