"""Tokens and their file: what is stored, who can read it, changes by several processes."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from harpcaller.access import tokens
from harpcaller.access.attempts import FailedAttempts
from harpcaller.access.tokens import TokenError, TokenStore, add_token, parse_token, read_tokens, revoke_token
from harpcaller.cli import parser


def found(store: TokenStore, text: str) -> bool:
    name, digest = parse_token(text) or ("", "")
    return store.find(name, digest) is not None


def test_token_file_has_digests_and_is_private(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    text, token = add_token(file, "shop", ["web", "web", "ops"], expires=time.time() + 100)
    assert (file.stat().st_mode & 0o777, (tmp_path / "tokens.lock").stat().st_mode & 0o777) == (0o600, 0o600)
    secret = text.rpartition("_")[2]
    assert len(bytes.fromhex(secret)) == 32
    for path in tmp_path.iterdir():
        assert secret not in path.read_text()
    [stored] = [json.loads(line) for line in file.read_text().splitlines()]
    assert (stored["name"], stored["roles"]) == ("shop", ["web", "ops"])
    assert secret not in repr(token)
    assert stored["sha256"] not in repr(token)
    assert found(TokenStore(file), text)


def test_token_names_and_duplicates_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    for name in ("", "a b", "-x", "x" * 65, "ä", "a\n", "a:b", "a/b", "*"):
        with pytest.raises(ValueError, match="name: expected 1 to 64"):
            add_token(file, name)
    with pytest.raises(ValueError, match="role: expected"):
        add_token(file, "shop", ["a b"])
    with pytest.raises(ValueError, match="in the future"):
        add_token(file, "shop", expires=1)
    assert not read_tokens(file)
    add_token(file, "shop_2")
    with pytest.raises(ValueError, match="a token shop_2 exists"):
        add_token(file, "shop_2")


@pytest.mark.parametrize("text", ["", "harp_", "harp_shop", "harp_shop_", "shop_" + "0" * 64, "harp__" + "0" * 64])
def test_text_that_is_no_token_is_not_parsed(text: str) -> None:
    assert parse_token(text) is None


def test_token_is_found_only_with_its_secret(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    first, second = (add_token(file, name)[0] for name in ("shop", "shop_x"))
    store = TokenStore(file)
    assert found(store, first)
    assert found(store, second)
    assert not found(store, first.replace("shop", "shop_x"))
    assert not found(store, first[:-1] + ("0" if first[-1] != "0" else "1"))
    assert not found(store, first.upper())
    assert not found(store, first + "\n")


def test_store_uses_added_and_refuses_revoked_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    store = TokenStore(file)
    text, _ = add_token(file, "shop")
    name, digest = parse_token(text) or ("", "")
    token = store.find(name, digest)
    assert token is not None
    assert store.is_current(token)
    assert revoke_token(file, "shop")
    assert not revoke_token(file, "shop")
    store.refresh()
    assert not store.is_current(token)
    assert not found(store, text)
    again, _ = add_token(file, "shop")  # another secret under the same name
    store.refresh()
    assert found(store, again)
    assert not found(store, text)
    assert not store.is_current(token)


def test_token_expires(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    text, token = add_token(file, "shop", expires=time.time() + 0.05)
    store = TokenStore(file)
    time.sleep(0.1)
    assert not found(store, text)
    assert not store.is_current(token)


def test_token_whose_end_is_made_earlier_is_void(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    _, token = add_token(file, "shop", expires=time.time() + 3600)
    store = TokenStore(file)
    assert store.is_current(token)
    file.write_bytes(file.read_bytes().replace(str(token.expires).encode(), str(time.time() - 1).encode()))
    store.refresh()
    assert not store.is_current(token)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name":"a"}\n', "line 1: expected a token"),
        ("harp_secret\n", "line 1: expected a token"),
        ('{"name":"a","sha256":"' + "0" * 64 + '","created":1}', "ends in the middle of a line"),
        (('{"name":"a","sha256":"' + "0" * 64 + '","created":1}\n') * 2, "line 2: a second token a"),
        ('{"name":"a b","sha256":"' + "0" * 64 + '","created":1}\n', "line 1: expected a token"),
        ('{"name":"a","sha256":"' + "0" * 63 + '\\n","created":1}\n', "line 1: expected a token"),
        ('{"name":"a","sha\udcff":1}\n', "line 1: expected a token"),
    ],
)
def test_invalid_file_is_refused_and_the_old_tokens_stay(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "tokens"
    good, _ = add_token(file, "shop")
    store = TokenStore(file)
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(TokenError, match=reason) as caught:
        read_tokens(file)
    assert "harp_secret" not in str(caught.value)
    store.refresh()
    assert found(store, good)
    with pytest.raises(TokenError):
        add_token(file, "other")
    assert file.read_bytes() == text.encode(errors="surrogateescape")


def test_file_that_is_not_private_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    add_token(file, "shop")
    file.chmod(0o640)
    with pytest.raises(TokenError, match="expected mode 0600, got 0640"):
        read_tokens(file)
    file.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(file)
    with pytest.raises(TokenError, match="must not be a symbolic link"):
        read_tokens(link)
    directory = tmp_path / "directory"
    directory.mkdir()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    for path in (directory, fifo):
        with pytest.raises(TokenError, match="regular file"):
            read_tokens(path)


def test_planted_files_beside_the_file_are_not_written(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    file = tmp_path / "tokens"
    (tmp_path / "tokens.new").symlink_to(victim)
    add_token(file, "shop")
    (tmp_path / "tokens.lock").unlink()
    (tmp_path / "tokens.lock").symlink_to(victim)
    with pytest.raises(TokenError):
        add_token(file, "other")
    assert victim.read_text() == "untouched"
    assert list(read_tokens(file)) == ["shop"]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_file_made_by_root_belongs_to_the_owner_of_its_directory(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    add_token(tmp_path / "tokens", "shop")
    add_token(tmp_path / "tokens", "other")
    for path in tmp_path.iterdir():
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (12345, 0o600), path


def test_held_lock_ends_a_change_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_LOCK_TIMEOUT", 0.1)
    file = tmp_path / "tokens"
    add_token(file, "shop")
    with (tmp_path / "tokens.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TokenError, match="another process has held its lock"):
            add_token(file, "other")
    add_token(file, "other")


def test_changes_by_several_processes_are_all_stored(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    add = (
        "import sys; from pathlib import Path; from harpcaller.access.tokens import add_token\n"
        "for number in range(10): add_token(Path(sys.argv[1]), f'{sys.argv[2]}-{number}')"
    )
    processes = [subprocess.Popen([sys.executable, "-c", add, file, name]) for name in "abc"]
    used, store = 0, TokenStore(file)
    while any(process.poll() is None for process in processes):
        store.refresh()
        for token in store.list():
            store.record_use(token)
        store.write_uses()
        used += 1
    assert used
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert set(read_tokens(file)) == {f"{name}-{number}" for name in "abc" for number in range(10)}


def test_last_use_is_written_and_listed(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    _, token = add_token(file, "shop")
    store = TokenStore(file)
    assert store.list()[0].last_used is None
    store.record_use(token)
    assert store.list()[0].last_used is not None
    store.write_uses()
    store.refresh()
    assert read_tokens(file)["shop"].last_used == store.list()[0].last_used
    revoke_token(file, "shop")
    store.record_use(token)
    store.write_uses()
    assert not read_tokens(file)


def test_failed_attempts_are_delayed_by_peer_and_name() -> None:
    attempts = FailedAttempts()
    delays = [attempts.record_failure("192.0.2.1", "shop") for _ in range(12)]
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays[-1] == 30.0
    assert attempts.record_failure("192.0.2.2", "shop") == 0.1
    assert attempts.record_failure("192.0.2.1", "other") == 0.1
    attempts.reset("192.0.2.1", "shop")
    assert attempts.record_failure("192.0.2.1", "shop") == 0.1
    for number in range(20_000):  # it does not grow without limit
        attempts.record_failure("192.0.2.3", str(number))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("2030-01-31", "2030-01-31T00:00:00+00:00"),
        ("2030-01-31T08:00", "2030-01-31T08:00:00+00:00"),
        ("2030-01-31T08:00+02:00", "2030-01-31T06:00:00+00:00"),
    ],
)
def test_end_of_a_token_has_the_time_zone_that_is_given(given: str, meant: str) -> None:
    options = parser().parse_args(["token", "add", "shop", f"--expires={given}"])
    assert options.expires == datetime.fromisoformat(meant).timestamp()
