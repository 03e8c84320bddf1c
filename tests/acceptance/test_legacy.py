"""Every pairing with legacy programs, which `support.legacy` implements from the protocol specification."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import harp
from support.certificates import server_files
from support.harpcallerd import Harpcallerd
from support.legacy import (
    LegacyDispatcher,
    legacy_client,
    legacy_dispatcher_call,
    legacy_harpd,
    legacy_tls_server,
    server,
)
from support.procedures_file import PROCEDURES
from support.system import System, running

UNKNOWN = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running(tmp_path_factory.mktemp("legacy"), PROCEDURES) as system:
        yield system


# A legacy dispatcher and our harpd.


@pytest.mark.parametrize("pieces", [None, 1])
def test_legacy_dispatcher_calls_harpd(system: System, pieces: int | None) -> None:
    def call(procedure: str, arguments: object) -> list[dict[str, object]]:
        return legacy_dispatcher_call(
            system.harpd.port, procedure, arguments, system.harpd.user, system.harpd.password, pieces
        )

    assert call("echo", [1, "é"]) == [{"harp": 1, "stream_result": False}, {"result": [1, "é"]}]
    assert call("count", {"numbers": 2}) == [
        {"harp": 1, "stream_result": True},
        {"stream": 0},
        {"stream": 1},
        {"result": 2},
    ]
    acknowledgement, end = call("fail", ["missing"])
    assert acknowledgement == {"harp": 1, "stream_result": False}
    assert end == {
        "exception": {"type": "ValueError", "message": "missing", "data": {"class": "ValueError", "module": "builtins"}}
    }
    assert call("nothing", [])[-1]["error"]["type"] == "no_such_procedure"  # type: ignore[index]
    assert call("echo", {"wrong": 1})[-1]["error"]["type"] == "invalid_argument_list"  # type: ignore[index]
    assert call("unwritable", [])[-1]["error"]["type"] == "invalid_message"  # type: ignore[index]


def test_legacy_dispatcher_wrong_password_is_auth_error(system: System) -> None:
    (refusal,) = legacy_dispatcher_call(system.harpd.port, "echo", [], "nobody", "wrong")
    assert refusal["error"]["type"] == "auth_error"
    assert set(refusal) == {"harp", "error"}


# Our dispatcher and a legacy harpd.


@pytest.fixture(scope="module")
def port_with_legacy_harpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    directory = tmp_path_factory.mktemp("old-harpd")
    files = server_files(directory)
    with server(legacy_harpd, legacy_tls_server(files.certfile, files.keyfile)) as port:
        with Harpcallerd(directory, hosts={"old": port}, credentials=("u", "p")) as dispatcher:
            yield dispatcher.port


@pytest.fixture
def with_legacy_harpd(port_with_legacy_harpd: int) -> Iterator[harp.HarpCaller]:
    with harp.HarpCaller("127.0.0.1", port_with_legacy_harpd) as rpc:
        yield rpc


def test_dispatcher_calls_legacy_harpd(with_legacy_harpd: harp.HarpCaller) -> None:
    old = with_legacy_harpd.old
    assert old.echo(1, {"b": 1, "a": 2}).get() == [1, {"b": 1, "a": 2}]
    job = old.stream(5)
    assert list(job.follow(since=0)) == [{"n": number} for number in range(5)]
    assert job.get() is None


@pytest.mark.parametrize(
    ("procedure", "type_", "data"),
    [
        ("error", "read_error", None),
        ("nothing", "no_such_procedure", {"procedure": "nothing"}),
        ("close", "network_error", ...),
        ("garbage", "protocol_error", ...),
    ],
)
def test_legacy_harpd_error_becomes_job_error(
    with_legacy_harpd: harp.HarpCaller, procedure: str, type_: str, data: object
) -> None:
    error = getattr(with_legacy_harpd.old, procedure)().result(wait=True)
    assert isinstance(error, harp.RemoteError)
    assert error.type == type_
    assert data is ... or error.data == data


def test_legacy_harpd_exception_is_raised(with_legacy_harpd: harp.HarpCaller) -> None:
    exception = getattr(with_legacy_harpd.old, "raise")().result(wait=True)
    assert isinstance(exception, harp.RemoteException)
    assert (exception.type, exception.data) == ("TypeError", {"class": "TypeError"})


def test_cancel_closes_connection_to_legacy_harpd(with_legacy_harpd: harp.HarpCaller) -> None:
    job = with_legacy_harpd.old.hang()  # its server's thread ends only when the connection is closed
    assert job.cancel() is True
    assert job.result(wait=True) is harp.CALL_CANCELLED


@pytest.mark.parametrize("keep", [False, True])
def test_client_calls_legacy_harpd(tmp_path: Path, keep: bool) -> None:
    files = server_files(tmp_path)
    with server(legacy_harpd, legacy_tls_server(files.certfile, files.keyfile)) as port:
        old = harp.HarpServer("127.0.0.1", "u", "p", port, ca_file=str(files.ca_file), keep_alive=keep)
        assert old.echo("a") == ["a"]
        *records, result = old.stream(2)
        assert (records, result.value) == ([{"n": 0}, {"n": 1}], None)
        with pytest.raises(harp.RemoteException, match="TypeError"):
            getattr(old, "raise")()
        with pytest.raises(harp.RemoteError, match="read_error"):
            old.error()
        with pytest.raises(harp.CommunicationError):
            old.garbage()
        with pytest.raises(harp.CommunicationError):
            old.close()


# A legacy client and our dispatcher: every reply has exactly the keys of version 1.


def test_legacy_client_uses_dispatcher(system: System) -> None:
    port = system.dispatcher.port
    (accepted,) = legacy_client(
        port, host="web01", procedure="count", arguments=[2], queue={"name": {}, "concurrency": 1}
    )
    assert set(accepted) == {"harpcaller", "job_id"}
    job = accepted["job_id"]
    assert system.rpc.job(job).details()["limits"]["start_within"] == 10, "the default of the dispatcher"
    packets = [{"packet": 0, "data": 0}, {"packet": 1, "data": 1}]
    assert legacy_client(port, follow_stream=job, since=0) == [*packets, {"result": 2}]
    assert legacy_client(port, get_result=job, wait=True) == [{"result": 2}]
    assert legacy_client(port, get_result=job, wait=False) == [{"result": 2}]
    assert legacy_client(port, read_stream=job) == [*packets, {"result": 2}]
    assert legacy_client(port, read_stream=job, recent=1) == [packets[1], {"result": 2}]
    assert legacy_client(port, cancel=job) == [{"cancelled": False}]
    (status,) = legacy_client(port, get_status=job)
    assert set(status) == {"call", "time", "info"}
    assert status["call"] == {"host": "web01", "procedure": "count", "arguments": [2]}
    assert set(status["time"]) == {"submit", "start", "end"}
    assert all(type(seconds) is int for seconds in status["time"].values())


def test_legacy_client_unknown_job_is_invalid_jobid(system: System) -> None:
    port = system.dispatcher.port
    job = legacy_client(port, host="web01", procedure="sleep", arguments=[600])[0]["job_id"]
    assert legacy_client(port, get_result=job, wait=False) == [{"no_result": True}]
    assert legacy_client(port, read_stream=job)[-1] == {"continue": True}
    assert legacy_client(port, cancel=job) == [{"cancelled": True}]
    assert legacy_client(port, follow_stream=job) == [{"cancelled": True}]
    for request in ({"get_result": UNKNOWN, "wait": True}, {"get_status": UNKNOWN}, {"follow_stream": UNKNOWN}):
        (refusal,) = legacy_client(port, **request)
        assert set(refusal) == {"error"}
        assert refusal["error"]["type"] == "invalid_jobid"
    assert legacy_client(port, cancel=UNKNOWN) == [{"cancelled": False}]
    job = legacy_client(port, host="nowhere", procedure="p", arguments=[])[0]["job_id"]
    assert legacy_client(port, get_result=job, wait=True)[0]["error"]["type"] == "unknown_host"


# Our client and a legacy dispatcher.


def test_client_uses_legacy_dispatcher() -> None:
    old = LegacyDispatcher()
    with server(old) as port:
        rpc = harp.HarpCaller("127.0.0.1", port)
        job = rpc.host("h", queue={"q": 1}, concurrency=2, timeout=5, max_exec_time=6, info=[1]).p(1)
        assert job.id() == old.JOB
        assert job.result() is harp.CALL_NOT_FINISHED
        assert (job.host(), job.procedure(), job.args(), job.info()) == ("h", "p", [1], None)
        assert (job.submit_time(), job.start_time(), job.end_time()) == (1, 2, None)
        assert list(job.stream(numbered=True)) == [(0, 0)]
        assert list(job.follow(since=1)) == [1, 2]
        assert rpc.job(job.id()).get() == [1]
        assert job.cancel() is True
        assert rpc.job(UNKNOWN).cancel() is False
        with pytest.raises(harp.CommunicationError, match=str(port)):
            list(rpc.job(UNKNOWN).follow())
        with pytest.raises(harp.CommunicationError, match="start_within"):
            rpc.host("h", start_within=5).p()
        with pytest.raises(harp.CommunicationError, match="start_within"):
            rpc.submit_many([harp.Call("h", "p", start_within=5)])
