"""The caller of a call: from the dispatcher's client to the procedure, and only to a harpd that has announced it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from harpd.proc import Caller
from support.calls import result
from support.harpd import Harpd
from support.system import System, running

PROCEDURES = """
import os
from harpd.proc import Caller, caller, procedure, streaming_procedure

AT_LOAD = caller()

def seen():
    found = caller()
    if found is None:
        return None
    try:
        found.principal = "root"
    except AttributeError:
        pass
    return {name: getattr(found, name) for name in ("principal", "job", "address", "user")}

@procedure
def who():
    assert AT_LOAD is None
    return seen()

@procedure(max_calls_per_process=100)
def who_again(wanted):
    return [os.getpid(), seen()]

@streaming_procedure
def stream_who():
    yield seen()
"""
JOB = str(uuid.uuid4())


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running(tmp_path_factory.mktemp("system"), PROCEDURES) as running_system:
        yield running_system


def request(harpd: Harpd, procedure: str, *arguments: Any, **members: Any) -> Any:
    with harpd.connect() as client:
        client.send({"harp": 1, "procedure": procedure, "arguments": arguments, "auth": harpd.auth, **members})
        *_, last = client.lines()
    return last["result"] if "result" in last else last["error"]["type"]


def test_job_has_its_client_as_caller(system: System) -> None:
    job = system.rpc.web01.who()
    found = job.get()
    principal, address = found.pop("principal"), found.pop("address")
    assert found == {"job": job.id(), "user": system.harpd.user}
    assert principal.startswith("anonymous@127.0.0.1:")
    assert address.startswith("127.0.0.1:")
    (streamed,) = list(system.rpc.web01.stream_who().follow(since=0))
    assert streamed["principal"] == principal
    assert system.harpd.wait_event("call accepted", job=job.id())["caller"] == principal


def test_direct_call_has_no_caller(system: System) -> None:
    assert system.server.who() is None
    assert result(system.harpd, "who") is None


def test_caller_of_a_request_is_that_of_its_call_only(system: System) -> None:
    harpd = system.harpd
    caller = {"principal": 'token:\t"shop" é', "job": JOB, "address": "192.0.2.1"}
    assert request(harpd, "who", caller=caller) == {**caller, "user": harpd.user}
    pid, found = request(harpd, "who_again", 1, caller=caller)
    assert found == {**caller, "user": harpd.user}
    assert request(harpd, "who_again", 2) == [pid, None], "the same process"
    least = {"principal": "p"}
    assert request(harpd, "who", caller=least) == {**least, "job": None, "address": None, "user": harpd.user}


@pytest.mark.parametrize(
    "caller",
    [
        None,
        "token:shop",
        {"principal": ""},
        {"principal": "x" * 256},
        {"principal": "p", "job": "not a UUID"},
        {"principal": "p", "user": "root"},
        {"principal": 7},
    ],
)
def test_invalid_caller_is_invalid_request(system: System, caller: Any) -> None:
    assert request(system.harpd, "who", caller=caller) == "invalid_request"


def test_caller_is_a_frozen_value() -> None:
    one = Caller("token:shop", JOB, None, "dispatcher")
    assert one == Caller("token:shop", JOB, None, "dispatcher") != Caller("token:shop")
    assert {one: 1}[Caller("token:shop", JOB, None, "dispatcher")] == 1
    assert repr(one) == f"Caller(principal='token:shop', job={JOB!r}, address=None, user='dispatcher')"
    with pytest.raises(AttributeError, match="frozen"):
        one.principal = "root"
    with pytest.raises(AttributeError, match="frozen"):
        del one.job
