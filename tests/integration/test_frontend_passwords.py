"""Many and wrong passwords: an address that sends them delays itself, and no other."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from harpd.cli import parser
from harpd.config.loaded import CommandLine, load_config
from harpd.frontend.authenticator import Authenticator, PasswordNotChecked
from support.deadline import wait_until
from support.harpd import Harpd

MODULE = """
import os
import time
from harpd.auth import AuthDB

class Users(AuthDB):
    def __init__(self, config):
        self.log = config["log"]
        self.hold = config["hold"]
        self.accepted = set()

    def authenticate(self, user, password):
        with open(self.log, "a") as log:
            log.write(user + "\\n")
        while os.path.exists(self.hold):
            time.sleep(0.01)
        if password == "right":
            self.accepted.add(user)
        return password == "right"

    def check_cached(self, user, password):
        with open(self.log + ".asked", "a") as log:
            log.write(user + "\\n")
        return user.startswith("cached") and user in self.accepted and password == "right"

create = Users
"""
PROCEDURES = """
from harpd.proc import procedure

@procedure()
def echo(value):
    return value
"""
ATTACKER, OTHER = "127.0.0.2", "127.0.0.3"
WRONG = {"harp": 1, "error": {"type": "auth_error", "message": "unknown user or wrong password"}}


class Users:
    """A harpd with the module above, whose checks wait while the file `hold` exists."""

    def __init__(self, directory: Path, **limits: Any) -> None:
        self.log, self.hold = directory / "checks", directory / "hold"
        self.log.touch()
        (directory / "users_module.py").write_text(MODULE)
        section = {"module": "users_module", "log": str(self.log), "hold": str(self.hold)}
        settings = {"authentication": section, "limits": limits, "python": {"path": str(directory)}}
        self.harpd = Harpd(directory / "harpd", PROCEDURES, settings)

    @property
    def checks(self) -> list[str]:
        """The users whose passwords the module has begun to check."""
        return self.log.read_text().split()

    def wait_queued(self, *users: str) -> None:
        """Wait until these users wait for a check, or have had one: the cache is asked twice before."""
        asked = self.log.with_name("checks.asked")
        wait_until(
            lambda: all(asked.read_text().split().count(user) >= 2 for user in users), what=f"requests of {users}"
        )

    def ask(self, user: str, password: str, address: str) -> Any:
        """Send a call from an address; return the last line of the reply."""
        context = ssl.create_default_context(cafile=str(self.harpd.ca_file))
        request = self.harpd.request("echo", [1], auth={"user": user, "password": password})
        plain = socket.create_connection(("127.0.0.1", self.harpd.port), 60.0, (address, 0))
        with plain, context.wrap_socket(plain, server_hostname="localhost") as connection:
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as replies:
                return json.loads(replies.readlines()[-1])


def test_many_wrong_passwords_delay_no_other_address(tmp_path: Path) -> None:
    users = Users(tmp_path, authentication_threads=2, authentication_timeout=60)
    users.hold.touch()
    with users.harpd, ThreadPoolExecutor(40) as threads:
        attacks = [threads.submit(users.ask, f"attacker{n}", "wrong", ATTACKER) for n in range(30)]
        wait_until(lambda: len(users.checks) == 2, what="two checks")
        good = threads.submit(users.ask, "good", "right", OTHER)
        users.wait_queued("good")
        users.hold.unlink()
        assert good.result() == {"result": 1}
        assert [attack.result() for attack in attacks] == [WRONG] * 30


def test_addresses_and_users_take_turns(tmp_path: Path) -> None:
    users = Users(tmp_path, authentication_threads=1, authentication_timeout=60)
    users.hold.touch()
    with users.harpd, ThreadPoolExecutor(40) as threads:
        first = threads.submit(users.ask, "first", "wrong", ATTACKER)
        wait_until(lambda: users.checks == ["first"], what="the first check")
        attacks = [threads.submit(users.ask, f"attacker{n}", "wrong", ATTACKER) for n in range(10)]
        users.wait_queued(*(f"attacker{n}" for n in range(10)))
        good = threads.submit(users.ask, "good", "right", OTHER)
        users.wait_queued("good")
        users.hold.unlink()
        assert good.result() == {"result": 1}
        assert users.checks.index("good") <= 2
        for attack in [first, *attacks]:
            attack.result()


def test_wrong_passwords_delay_the_next_check_of_their_user(tmp_path: Path) -> None:
    users = Users(tmp_path, authentication_timeout=1, authentication_delay=60)
    with users.harpd:
        assert users.ask("cached", "right", ATTACKER) == {"result": 1}
        for _ in range(3):
            assert users.ask("good", "wrong", ATTACKER) == WRONG
        replies: list[Any] = []
        while not replies or replies[-1] == WRONG:  # delays of 0.25, 0.5, 1 s
            replies.append(users.ask("good", "wrong", ATTACKER))
        assert len(replies) <= 4
        assert replies[-1]["error"]["type"] == "authentication_timeout"
        checks = len(users.checks)
        refused = users.ask("good", "right", ATTACKER)
        if len(users.checks) == checks:  # the delay was not over
            assert refused["error"]["type"] == "authentication_timeout"
        assert users.ask("good", "right", OTHER) == {"result": 1}, "another address does not wait"
        assert users.ask("other", "right", ATTACKER) == {"result": 1}, "another user does not wait"
        assert users.ask("cached", "right", ATTACKER) == {"result": 1}


@pytest.mark.parametrize("attacked", ["same", "many"])
def test_accepted_user_does_not_wait_for_failures_of_others(tmp_path: Path, attacked: str) -> None:
    users = Users(tmp_path, authentication_timeout=1, authentication_delay=60)
    with users.harpd:
        assert users.ask("good", "right", ATTACKER) == {"result": 1}
        with ThreadPoolExecutor(10) as threads:
            names = [f"user{n if attacked == 'many' else 0}" for n in range(40)]
            replies = list(threads.map(lambda name: users.ask(name, "wrong", ATTACKER), names))
        kinds = {reply["error"]["type"] for reply in replies}
        assert kinds == {"auth_error", "authentication_timeout"}, "the address is delayed, too"
        assert len(users.checks) < 41
        assert users.ask("good", "right", ATTACKER) == {"result": 1}


async def test_addresses_of_one_ipv6_network_share_their_delays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which `load_config` adds
    monkeypatch.setitem(sys.modules, "users_module", None)
    del sys.modules["users_module"]
    harpd = Users(tmp_path, authentication_timeout=1, authentication_delay=60).harpd
    arguments = ["--config", str(harpd.config_file), "--procedures", str(harpd.procedures_file)]
    authenticator = Authenticator(load_config(CommandLine(**vars(parser().parse_args(arguments)))))

    async def ask(address: str) -> bool | None:
        try:
            return await authenticator.authenticate("good", "wrong", address, {})
        except PasswordNotChecked:
            return None

    replies = [await ask(f"2001:db8::{number:x}") for number in range(8)]
    assert replies[0] is False
    assert replies[-1] is None, "the check waits for longer than the time limit"
    async with asyncio.timeout(30):
        assert await ask("2001:db8:0:1::1") is False, "another network does not wait"


def test_unknown_user_costs_as_much_as_a_known_one(tmp_path: Path) -> None:
    """Otherwise, the time of a refusal would reveal which names exist. It is measured as processor time of harpd."""
    users = tmp_path / "users"
    users.touch(0o600)
    for user, salt in (("cheap", "saltsalt"), ("known", "rounds=1000000$saltsalt")):
        command = ["openssl", "passwd", "-6", "-salt", salt, "right"]
        hashed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        users.write_text(f"{users.read_text()}{user}:{hashed}")
    users_of_file = {"module": "harpd.auth.passfile", "file": str(users)}
    with Harpd(tmp_path / "harpd", PROCEDURES, {"authentication": users_of_file}) as harpd:
        process = psutil.Process(harpd.pid)

        def cost(user: str) -> float:
            least = math.inf
            for _ in range(2):
                began = sum(process.cpu_times()[:2])
                with harpd.connect() as client:
                    client.send(harpd.request("echo", [1], auth={"user": user, "password": "wrong"}))
                    assert client.message() == WRONG
                least = min(least, sum(process.cpu_times()[:2]) - began)
            return least

        known = cost("known")
        assert known > 0.1, "it is much more than all else"
        assert known / 2 < cost("unknown") < 2 * known
