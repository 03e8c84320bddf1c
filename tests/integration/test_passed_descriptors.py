"""Local peers that pass descriptors which are slow to close. The workers of harpd: see `test_supervisor_hostile`."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator

import pytest

from support.daemonlog import DEADLINE
from support.harpcallerd import Harpcallerd
from support.lingering import LINGERING

ATTACK: dict[str, object] = {}
exec(compile(LINGERING, "lingering", "exec"), ATTACK)  # its text is for processes, too


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpcallerd]:
    directory = tmp_path_factory.mktemp("d")
    listen = ["127.0.0.1:0", f"unix:{directory}/calls"]
    settings = {"listen": listen, "http": {"listen": [f"unix:{directory}/http"]}}
    with Harpcallerd(directory, settings=settings) as running:
        yield running


@pytest.mark.parametrize("name", ["calls", "http", "control"])
def test_client_halts_no_dispatcher_by_a_descriptor(dispatcher: Harpcallerd, name: str) -> None:
    path = dispatcher.socket if name == "control" else dispatcher.directory / name
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        os.kill(dispatcher.pid, signal.SIGSTOP)  # so that it receives the last copy
        try:
            _, *kept = ATTACK["pass_lingering"]([client])  # type: ignore[operator]
        finally:
            os.kill(dispatcher.pid, signal.SIGCONT)
        with dispatcher.connect() as other:
            other.socket.settimeout(DEADLINE)
            other.send({"harp": 1, "status": "no job"})
            assert other.message()["error"]["type"]
    for one in kept:
        for each in one if isinstance(one, list) else [one]:
            each.close()
