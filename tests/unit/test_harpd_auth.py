"""The authentication modules and hashes of crypt(3)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harp_daemon.passwords import PasswordCache, matches
from harpd.auth import AuthDB, inconfig, passfile
from support.deadline import wait_until

#: Hashes of "secret" in the forms that Debian and Red Hat write.
HASHES = {
    "sha256": "$5$saltsalt$0IyaXrmV7.sGNS6tirgqHLqX/G.FBvgkYA.lpPdS5sA",
    "sha512": ("$6$saltsalt$TVLlQcbpFVof5W3Yz4DTP6gRstiNuHwwTt6GLc1E5n0U0aDehy0S5knV8wiOQSpT0Y77vwPZN.Pq.H91p5hVO1"),
    "yescrypt": "$y$j9T$saltsaltsaltsalt$.Zt5W26jjocuW0wIHGgB6AJelofw6GEpOypHGyow2y5",
    "bcrypt": "$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW",
}
SHA512 = HASHES["sha512"]


@pytest.mark.parametrize("hashed", HASHES.values(), ids=HASHES)
def test_passfile_hash_format_accepts_only_its_password(hashed: str) -> None:
    assert matches("secret", hashed)
    assert not matches("secreT", hashed)
    assert not matches("", hashed)


@pytest.mark.parametrize(
    "hashed",
    [
        "",
        "*",
        "!",
        "!!",
        "*0",
        "*1",
        "x",
        f"!{SHA512}",
        SHA512[:-1],
        f"{SHA512}.",
        "$6$",
        "$6$saltsalt$",
        "$9$a$b",
        "é",
    ],
)
def test_invalid_hash_accepts_no_password(hashed: str) -> None:
    assert not matches("secret", hashed)
    assert not matches("", hashed)
    assert not matches(hashed, hashed)


def test_passfile_accepts_a_user_while_the_file_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, with an empty moment; a user who was removed is refused."""
    monkeypatch.setattr(passfile, "_SETTLE_SECONDS", 40.0)
    file = tmp_path / "users"
    file.write_text(f"alice:{SHA512}\nbob:{SHA512}\n")
    users = passfile.create({"file": str(file)})
    assert users.authenticate("alice", "secret")
    with ThreadPoolExecutor(1) as pool, file.open("w") as stream:
        login = pool.submit(users.authenticate, "alice", "secret")
        with pytest.raises(TimeoutError):
            login.result(0.3)  # it waits
        stream.write(f"alice:{SHA512}\n")
        stream.flush()
        assert login.result(30.0)
    monkeypatch.setattr(passfile, "_SETTLE_SECONDS", 0.1)
    assert not users.authenticate("bob", "secret")
    assert not users.authenticate("nobody", "secret")


@pytest.mark.parametrize("password", ["secret\0", "secret\0more", "\0", "\ud800", "secret\n"])
def test_password_is_compared_in_full(password: str) -> None:
    assert not matches(password, SHA512)


def test_hash_with_nul_accepts_no_password() -> None:
    assert not matches("secret", f"{SHA512}\0")


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    path = tmp_path / "users"
    path.write_text(
        f"# users\n\nalice:{SHA512}\n  bob:{HASHES['yescrypt']}:1000:Bob\nalice:$6$other\nlocked:!{SHA512}\n"
        f"empty:\nnocolon\n:{SHA512}\n"
    )
    return path


@pytest.mark.parametrize(
    ("user", "password", "allowed"),
    [
        ("alice", "secret", True),
        ("alice", "wrong", False),
        ("bob", "secret", True),
        ("locked", "secret", False),
        ("empty", "", False),
        ("nocolon", "", False),
        ("", "secret", False),
        ("carol", "secret", False),
        ("# users", "", False),
        ("alice\n", "secret", False),
    ],
)
def test_passfile_accepts_listed_users(users_file: Path, user: str, password: str, allowed: bool) -> None:
    users = passfile.create({"file": str(users_file)})
    assert users.authenticate(user, password) is allowed


def test_passfile_edits_take_effect_immediately(users_file: Path) -> None:
    users = passfile.create({"file": str(users_file)})
    users_file.write_text(f"carol:{SHA512}\n")
    assert users.authenticate("carol", "secret")
    assert not users.authenticate("alice", "secret")


def test_passfile_that_is_missing_accepts_no_user(users_file: Path) -> None:
    users = passfile.create({"file": str(users_file)})
    users_file.unlink()
    assert users.authenticate("alice", "secret") is False


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        *((f"alice:{hashed}", "") for hashed in HASHES.values()),
        ("alice:!", ""),
        ("alice:*", ""),
        (f"alice:!{SHA512}", ""),
        (f"alice:{SHA512}:1000:Alice A.", ""),
        ("alice:$1$saltsalt$qjXMvbEw8oaL.CzflDtaK/", ""),
        ("alice:ab0Dvxf/tGWrc", ""),
        ("alice:$7$DU..../....2Q9obwLhin8qvQl6sisAO$E1HizYWxBmnIH4sdPkPgJXlOCPOSN/tbD2Oum1mvqN6", ""),
        ("alice:$apr1$saltsalt$2g6X8OP5wBNmmoQe0YgN0/", "this system does not know the format of the hash"),  # htpasswd
        (f"\ufeffalice:{SHA512}", "got a byte-order mark"),
        (f"al\udce9ice:{SHA512}", "in UTF-8, got another encoding of the user"),
        (f"alice: {SHA512}", "got a space in the hash"),
        (f"alice:{SHA512} # admin", "got a space in the hash"),
        (f"alice :{SHA512}", "got a space in the user"),
        (f"al\tice:{SHA512}", "got a space in the user"),
        (f"alice:{SHA512[:-1]}", "create a hash"),
        (f"alice:{SHA512}x", "create a hash"),
        ("alice:secret", "create a hash"),
        ("alice:a-password-of-some-length", "create a hash"),
        ("alice:5ebe2294ecd0e0f08eab7690d2a6ee69", "create a hash"),
        ("alice:", "create a hash"),
        ("alice", "create a hash"),
        (f":{SHA512}", "create a hash"),
        (f"bob:{SHA512}", "user bob has another line, 2, which counts"),
        (f"bob:!{SHA512}", "user bob has another line, 2, which counts"),
    ],
)
def test_passfile_line_that_accepts_no_user_is_a_problem(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "users"
    file.write_bytes(f"# users\nbob:{SHA512}\n\n{line}\n".encode("utf-8", "surrogateescape"))
    problems = passfile.create({"file": str(file)}).problems()
    assert [problem.startswith(f"{file}:4: ") and reason in problem for problem in problems] == [True] * bool(reason)
    assert not any("$6$" in problem for problem in problems)


def test_passfile_byte_order_mark_is_a_problem_of_line_1(tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.write_text(f"alice:{SHA512}\nbob:{SHA512}\n", "utf-8-sig")
    (problem,) = passfile.create({"file": str(file)}).problems()
    assert problem.startswith(f"{file}:1: expected user:crypt-hash, got a byte-order mark")


def test_passfile_without_users_warns(users_file: Path) -> None:
    assert passfile.create({"file": str(users_file)}).warnings() == []
    users_file.write_text("# users\n\n")
    (warning,) = passfile.create({"file": str(users_file)}).warnings()
    assert warning == f"{users_file}: it has no user; every call is refused"


def test_passfile_first_line_of_a_user_counts(tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.write_text(f"alice:{SHA512}\nalice:{HASHES['sha256'][:-1]}\n")
    assert passfile.create({"file": str(file)}).authenticate("alice", "secret")


def test_passfile_without_its_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file: .*nowhere: No such file or directory"):
        passfile.create({"file": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "file: expected the path of a file, got None"),
        ({"file": 5}, "file: expected the path of a file, got 5"),
        ({"module": "m", "file": "/dev/null", "files": 1}, "files: unknown key; expected file"),
    ],
)
def test_passfile_error_names_the_invalid_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        passfile.create(config)


def test_inconfig_accepts_plain_and_hashed_passwords() -> None:
    users = inconfig.create({"users": {"alice": "plain:s:e", "bob": f"crypt:{SHA512}", "no": "crypt:plain:s"}})
    assert not users.authenticate("no", "s")
    assert users.authenticate("alice", "s:e")
    assert not users.authenticate("alice", "s")
    assert users.authenticate("bob", "secret")
    assert not users.authenticate("bob", SHA512)
    assert not users.authenticate("carol", "s:e")
    assert not users.authenticate("alice", "\ud800")
    assert not users.authenticate("\ud800", "s:e")


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({}, "users"),
        ({"users": ["alice"]}, "users"),
        ({"users": {1: "plain:x"}}, "users"),
        ({"users": {}, "file": "x"}, "file"),
        ({"users": {"alice": "topsecret"}}, "users.alice"),
        ({"users": {"alice": 5}}, "users.alice"),
    ],
)
def test_inconfig_error_names_the_key_and_no_password(config: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError) as caught:
        inconfig.create(config)
    assert str(caught.value).startswith(f"{key}: ")
    assert "topsecret" not in str(caught.value)


def test_authentication_module_derives_from_the_base_class() -> None:
    class Anybody(AuthDB):
        def authenticate(self, user: str, password: str) -> bool:
            return True

    assert Anybody().authenticate("a", "b")
    with pytest.raises(TypeError):
        AuthDB()  # type: ignore[abstract]


def settle(file: Path) -> None:
    """Wait until the file counts as unchanged; the change time of an inode cannot be set."""
    users = passfile.create({"file": str(file)})
    wait_until(
        lambda: users.authenticate("alice", "secret") and users.check_cached("alice", "secret"),
        what="a file that was not changed for a while",
    )


def test_passfile_caches_passwords_until_the_file_changes(users_file: Path) -> None:
    users = passfile.create({"file": str(users_file)})
    settle(users_file)
    assert not users.check_cached("alice", "secret")
    assert not users.authenticate("alice", "wrong")
    assert not users.check_cached("alice", "wrong")
    assert users.authenticate("alice", "secret")
    assert users.check_cached("alice", "secret")
    assert not users.check_cached("alice", "wrong")
    assert not users.check_cached("bob", "secret")
    users_file.write_text(users_file.read_text())
    assert not users.check_cached("alice", "secret")
    users_file.unlink()
    assert not users.check_cached("alice", "secret")


def test_passfile_changed_just_now_is_not_cached(users_file: Path) -> None:
    """The file could change again within the same tick of the clock."""
    users = passfile.create({"file": str(users_file)})
    users_file.write_text(users_file.read_text())
    assert users.authenticate("alice", "secret")
    assert not users.check_cached("alice", "secret")


def test_inconfig_caches_correct_passwords() -> None:
    users = inconfig.create({"users": {"alice": f"crypt:{SHA512}", "bob": "plain:word"}})
    assert not users.check_cached("carol", "word")
    for user, password in (("alice", "secret"), ("bob", "word")):
        assert not users.check_cached(user, password)
        assert users.authenticate(user, password)
        assert users.check_cached(user, password)
        assert not users.check_cached(user, f"{password} ")


def test_cached_password_belongs_to_one_user_and_hash() -> None:
    cache = PasswordCache()
    assert cache.check("alice", "secret", {"alice": "plain:secret"})
    assert cache.contains("alice", "secret", {"alice": "plain:secret"})
    for user, password, stored in (
        ("bob", "secret", "plain:secret"),
        ("alice", "tsecret", "plain:secre"),
        ("alice", "", "plain:secret"),
    ):
        assert not cache.contains(user, password, {user: stored})
    assert cache.check("bob", "\ud800", {"bob": "plain:\ud800"})
