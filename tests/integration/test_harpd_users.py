"""The user of a call: users and groups, by id and by name, as root with real users."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.calls import nothing_is_left, result
from support.harpd import Harpd

USERS = """
import os
from harpd.proc import Procedure, StreamingProcedure, procedure, streaming_procedure

def ids(path=None):
    if path:
        open(path, "w").close()
    return {"uid": os.getresuid(), "gid": os.getresgid(), "groups": sorted(os.getgroups()),
            "names": [os.environ.get(name) for name in ("USER", "LOGNAME", "HOME")]}

def stream_ids(path=None):
    yield ids(path)

OPTIONS = {
    "nothing": {}, "name": {"uid": "daemon"}, "number": {"uid": NUMBER}, "text": {"uid": "NUMBER"},
    "user_and_group": {"uid": "daemon", "gid": "nogroup"}, "groups": {"uid": "daemon", "gid": ["nogroup", 7, "7", 8]},
    "group": {"gid": 7}, "unknown": {"uid": 54321}, "unknown_and_group": {"uid": 54321, "gid": [7]},
    "no_user": {"uid": "no-such-user"}, "no_group": {"uid": "daemon", "gid": "no-such-group"},
    "odd_user": {"uid": "a\\0b"}, "minus_one": {"uid": 2**32 - 1}, "huge": {"uid": 2**70, "gid": 1},
    "huge_group": {"gid": 2**70},
}
for name, options in OPTIONS.items():
    globals()["plain_" + name] = Procedure(ids, **options)
    globals()["stream_" + name] = StreamingProcedure(stream_ids, **options)

@procedure(uid="nobody")
def shell():
    os.system("echo to stdout > /dev/stdout; echo to stderr > /dev/stderr")

@procedure(uid="nobody")
def regain():
    for change in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):
        try:
            change()
        except PermissionError:
            continue
        return "regained"
    return "refused"

@procedure(uid="nobody")
def reach(pids):
    refused = []
    for pid in pids:
        for attempt in (lambda: os.kill(pid, 0), lambda: os.listdir(f"/proc/{pid}/fd"),
                        lambda: open(f"/proc/{pid}/mem", "rb"), lambda: open("/proc/self/mem", "rb"),
                        lambda: open(f"/proc/{os.getppid()}/environ", "rb").read()):
            try:
                attempt()
                refused.append(False)
            except PermissionError:
                refused.append(True)
    return refused
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")


def primary_group(name: str) -> list[int]:
    return [pwd.getpwnam(name).pw_gid]


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    procedures = USERS.replace("NUMBER", str(pwd.getpwnam("daemon").pw_uid))
    with Harpd(tmp_path_factory.mktemp("users"), procedures) as harpd:
        yield harpd
        nothing_is_left(harpd)


def ids(harpd: Harpd, kind: str, name: str, *arguments: Any) -> Any:
    messages = harpd.call(f"{kind}_{name}", *arguments)
    return messages[1].get("stream") or messages[1].get("result") or messages[1]


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("kind", ["plain", "stream"])
def test_call_runs_as_user_and_groups(users: Harpd, kind: str) -> None:
    daemon, nogroup = pwd.getpwnam("daemon"), pwd.getpwnam("nobody").pw_gid
    names = ["daemon", "daemon", daemon.pw_dir]
    uid = [daemon.pw_uid] * 3
    whole = {"uid": uid, "gid": [daemon.pw_gid] * 3, "groups": primary_group("daemon"), "names": names}
    for name in ("name", "number", "text"):
        assert ids(users, kind, name) == whole, name
    assert ids(users, kind, "user_and_group") == {**whole, "gid": [nogroup] * 3, "groups": [nogroup]}
    assert ids(users, kind, "groups") == {**whole, "gid": [nogroup] * 3, "groups": sorted([nogroup, 7, 8])}
    found = ids(users, kind, "group")
    assert (found["uid"], found["gid"], found["groups"]) == ([0] * 3, [7] * 3, [7])
    unknown = {"uid": [54321] * 3, "gid": [65534] * 3, "groups": [], "names": [None, None, "/"]}
    assert ids(users, kind, "unknown") == unknown
    assert ids(users, kind, "unknown_and_group") == {**unknown, "gid": [7] * 3, "groups": [7]}
    assert ids(users, kind, "nothing")["uid"] == [0, 0, 0]


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("kind", ["plain", "stream"])
@pytest.mark.parametrize("name", ["no_user", "no_group", "odd_user", "minus_one", "huge", "huge_group"])
def test_call_without_its_user_does_not_run(users: Harpd, kind: str, name: str, tmp_path: Path) -> None:
    found = ids(users, kind, name, str(tmp_path / "ran"))
    assert found["error"]["type"] == "system_error", found
    assert not (tmp_path / "ran").exists()


@pytest.mark.root
@needs_root
def test_user_change_is_irrevocable(users: Harpd) -> None:
    assert result(users, "regain") == "refused"
    assert all(result(users, "reach", [users.supervisor, users.zygote, users.pid]))
    assert result(users, "shell") is None
    for stream in ("stdout", "stderr"):
        users.wait_event("call printed", procedure="shell", stream=stream, text=f"to {stream}")


@pytest.mark.root
@needs_root
def test_default_user_and_group_apply(tmp_path: Path) -> None:
    procedures = USERS.replace("NUMBER", "1")
    daemon, nobody = pwd.getpwnam("daemon"), pwd.getpwnam("nobody")
    with Harpd(tmp_path / "user", procedures, options=("--default-user", "nobody")) as harpd:
        found = ids(harpd, "plain", "nothing")
        assert (found["uid"], found["groups"]) == ([nobody.pw_uid] * 3, primary_group("nobody"))
        assert ids(harpd, "stream", "name")["uid"] == [daemon.pw_uid] * 3
        assert ids(harpd, "plain", "group")["gid"] == [7] * 3
    options = ("--default-user", str(daemon.pw_uid), "--default-group", "7")
    with Harpd(tmp_path / "both", procedures, options=options) as harpd:
        found = ids(harpd, "stream", "nothing")
        assert (found["uid"], found["gid"], found["groups"]) == ([daemon.pw_uid] * 3, [7] * 3, [7])
        assert ids(harpd, "plain", "name")["groups"] == primary_group("daemon")


@pytest.mark.root
@needs_root
def test_user_change_without_root_fails(tmp_path: Path) -> None:
    """In a separate process as nobody: the worker's part, without the daemon."""
    nobody = pwd.getpwnam("nobody")
    program = (
        "from harpd.worker.privileges import *\n"
        "def change(uid, gid): drop_privileges(*resolve_credentials(uid, gid)[:3])\n"
        "change('nobody', None); change(None, None)\n"
        "print('own')\n"
        "for uid, gid in (('daemon', None), (0, None), (None, (7,)), ('nobody', (7,))):\n"
        "    try:\n        change(uid, gid)\n        print('taken')\n"
        "    except UserError as error:\n        print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import os, sys\nimport harpd.worker.privileges\n"
         f"os.setgroups({primary_group('nobody')}); os.setresgid(*[{nobody.pw_gid}] * 3); "
         f"os.setresuid(*[{nobody.pw_uid}] * 3)\nexec({program!r})"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["own", "refused", "refused", "refused", "refused"], done.stderr
