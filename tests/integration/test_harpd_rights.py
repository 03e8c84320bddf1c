"""The rights of users: procedures and addresses, in the configuration and by `@procedure(users=...)`."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

import harp
from harpd.auth.rights import UserRights
from support.harpd import OWNER, SECRET, Harpd
from support.supervisor import Supervisor
from support.system import running

PROCEDURES = """
from harpd.proc import procedure

@procedure
def read_time():
    return "time"

@procedure
def restart():
    return "restarted"

@procedure(users=["ops", "both"])
def for_ops():
    return "for ops"
"""
USERS = {name: f"plain:{name}" for name in ("web", "ops", "both", "far", "other")}
RIGHTS: dict[str, Any] = {
    "web": {"procedures": ["read_*"]},
    "ops": {},
    "both": {"procedures": ["read_*", "for_ops"], "peers": ["127.0.0.0/8", "2001:db8::/32"]},
    "far": {"peers": ["192.0.2.0/24"]},
}


def configuration(**changes: Any) -> dict[str, Any]:
    return {"authentication": {"module": "harpd.auth.inconfig", "users": USERS}, "rights": RIGHTS, **changes}


def call(harpd: Harpd, user: str, procedure: str, **members: Any) -> Any:
    """Call a procedure as a user; return the closing line's value or error type."""
    auth = {"user": user, "password": user}
    with harpd.connect() as client:
        client.send({"harp": 1, "procedure": procedure, "arguments": [], "auth": auth, **members})
        *_, last = client.lines()
    return last["error"] if "error" in last else last["result"]


def test_user_calls_only_procedures_of_its_rights(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES, configuration()) as harpd:
        for _ in range(2):  # the second time, the password is in the cache
            assert call(harpd, "web", "read_time") == "time"
            denied = call(harpd, "web", "restart")
            assert (denied["type"], denied["data"]) == ("access_denied", {"procedure": "restart"})
            assert "user 'web' may not call 'restart'" in denied["message"]
        assert call(harpd, "web", "no_such")["type"] == "access_denied", "it learns no names"
        assert call(harpd, "ops", "restart") == "restarted"
        assert call(harpd, "ops", "no_such")["type"] == "no_such_procedure"
        assert call(harpd, "other", "read_time")["type"] == "access_denied", "rights are listed, so others have none"
        assert harpd.wait_event("call denied", user="other")["procedure"] == "read_time"
        assert len(harpd.events("call denied")) == 4
        harpd.configure(configuration(rights={"*": {"procedures": ["restart"]}, **RIGHTS}))
        assert harpd.reload()["event"] == "reloaded"
        assert call(harpd, "other", "restart") == "restarted"
        assert call(harpd, "web", "restart")["type"] == "access_denied"


def test_job_without_the_right_ends_with_the_error(tmp_path: Path) -> None:
    with running(tmp_path, PROCEDURES, {"rights": {Harpd.user: {"procedures": ["read_*"]}}}) as system:
        assert system.rpc.web01.read_time().get() == "time"
        with pytest.raises(harp.RemoteError) as denied:
            system.rpc.web01.restart().get()
        assert denied.value.type == "access_denied"
        events = system.harpd.wait_events(3, "call accepted", "call denied")
        assert len(events) == 3, "it is not tried again"


def test_option_users_narrows_rights(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES, configuration()) as harpd:
        assert call(harpd, "ops", "for_ops") == call(harpd, "both", "for_ops") == "for ops"
        assert call(harpd, "web", "for_ops")["type"] == "access_denied"
    with Harpd(tmp_path / "open", PROCEDURES, configuration(rights={})) as harpd:
        assert call(harpd, "ops", "for_ops") == "for ops"
        denied = call(harpd, "web", "for_ops")
        assert (denied["type"], "option users" in denied["message"]) == ("access_denied", True)
        assert call(harpd, "web", "restart") == "restarted"


def test_user_connects_only_from_addresses_of_its_rights(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES, configuration()) as harpd:
        for _ in range(2):
            assert call(harpd, "both", "read_time") == "time"
            denied = call(harpd, "far", "read_time")
            assert (denied["type"], "user 'far' may not connect" in denied["message"]) == ("access_denied", True)
        other_requests = (
            {"procedure": "-", "arguments": [], "calls": OWNER},
            {"attach": str(uuid.uuid4()), "owner": OWNER, "secret": SECRET, "since": 0},
        )
        for request in other_requests:
            with harpd.connect() as client:
                client.send({"harp": 1, "auth": {"user": "far", "password": "far"}, **request})
                assert client.lines()[-1]["error"]["type"] == "access_denied"
        with harpd.connect() as client:
            client.send({"harp": 1, "procedure": "x", "arguments": [], "auth": {"user": "far", "password": "wrong"}})
            assert client.lines()[-1]["error"]["type"] == "auth_error", "only a right password learns of the rights"


@pytest.mark.parametrize("user", [None, "web", "invented"])
def test_supervisor_does_not_trust_the_frontend(tmp_path: Path, user: str | None) -> None:
    """A frontend that was taken over starts calls of each user, and of nobody else."""
    with Supervisor(tmp_path / "supervisor", PROCEDURES, rights=RIGHTS) as supervisor:
        named: dict[str, Any] = {} if user is None else {"user": user}
        for procedure in ("restart", "for_ops", "no_such"):
            with supervisor.call(procedure, **named) as channel:
                assert channel.lines()[-1]["error"]["type"] == "access_denied"


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("192.0.2.7", True),
        ("::ffff:192.0.2.7", True),
        ("192.0.3.7", False),
        ("2001:db8::1", True),
        ("fe80::1%eth0", True),
        ("::1", False),
    ],
)
def test_addresses_of_rights(address: str, allowed: bool) -> None:
    rights = UserRights({"web": {"peers": ["192.0.2.0/24", "2001:db8::1", "fe80::/10"]}})
    assert rights.may_connect("web", address) == allowed
    assert not rights.may_call("other", "anything")
    assert UserRights({}).may_connect("other", address)


@pytest.mark.parametrize(
    ("rights", "error"),
    [
        ({"web": {"peers": ["192.0.2.0/33"]}}, "rights.web.peers: expected addresses or networks"),
        ({"web": {"peers": ["host.example"]}}, "rights.web.peers: expected addresses or networks"),
        ({"web": {"procedures": "read_*"}}, "rights.web.procedures: expected a list"),
        ({"web": 7}, "rights.web: expected a mapping"),
        ({"web": {"procedure": []}}, "rights.web.procedure: unknown key"),
    ],
)
def test_invalid_rights_are_errors(tmp_path: Path, rights: dict[str, Any], error: str) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES, configuration(rights=rights))
    found = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert error in found.stderr


def test_check_warns_of_a_pattern_without_procedure(tmp_path: Path) -> None:
    rights = {"web": {"procedures": ["read_*", "restrat", "r?start"]}, "ops": {}}
    harpd = Harpd(tmp_path / "harpd", PROCEDURES, configuration(rights=rights))
    found = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "config OK\n")
    (warning,) = [line for line in found.stderr.splitlines() if "rights" in line]
    assert warning == f"harpd: warning: {harpd.config_file}: rights.web.procedures: 'restrat' matches no procedure"


@pytest.mark.parametrize("users", ["'ops'", "[]", "[1]"])
def test_invalid_option_users_is_error(tmp_path: Path, users: str) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES.replace('["ops", "both"]', users))
    found = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
    assert (found.returncode, "users: expected" in found.stderr) == (1, True), found.stderr
