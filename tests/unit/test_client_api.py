"""The public API: everything in docs/client-api.md exists, and inspecting objects sends no request."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import pytest

import harp
import harp.client
from harp import aio

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"

#: Every class and method of the page, with its parameters; without `self`. The parameters after ``*`` are additions
#: to the published interface, and so are `HarpCaller.submit_many`, the methods for lists,
#: `Call`, `RemoteCall.details` and `RemoteCall.why`.
SIGNATURES = {
    "HarpCaller": (
        "(host, port=3502, *, reconnect=300.0, keep_alive=None, request_timeout=30.0, "
        "token=None, ca_file=None, certfile=None, keyfile=None, tls=None)"
    ),
    "HarpCaller.__getattr__": "(host)",
    "HarpCaller.__call__": "(host, **kwargs)",
    "HarpCaller.connect": "()",
    "HarpCaller.host": "(host, **kwargs)",
    "HarpCaller.job": "(job_id)",
    "HarpCaller.request": "(req)",
    "HarpCaller.submit_many": "(calls)",
    "HarpCaller.jobs": "(filter='', *, oldest_first=False, limit=None, cursor=None)",
    "HarpCaller.hosts": "(text='', *, limit=None, cursor=None)",
    "HarpCaller.queues": "(text='', *, limit=None, cursor=None)",
    "HarpCaller.count_jobs": "(filter='', by='state', *, most=10000)",
    "Call": (
        "(host, procedure, arguments=(), *, queue=None, concurrency=None, timeout=None, max_exec_time=None, "
        "info=None, start_within=None, request_id=None)"
    ),
    "RemoteServer": "(dispatcher, hostname)",
    "RemoteServer.__str__": "()",
    "RemoteServer.__getattr__": "(procedure)",
    "RemoteServer.__call__": "(**kwargs)",
    "RemoteProcedure": "(dispatcher, server, procedure)",
    "RemoteProcedure.__call__": "(*args, **kwargs)",
    "RemoteProcedure.host": "()",
    "RemoteProcedure.procedure": "()",
    "RemoteCall": "(dispatcher, job_id)",
    "RemoteCall.StreamIterator": "(remote_call, conn, numbered=False)",
    "RemoteCall.StreamIterator.all": "()",
    "RemoteCall.args": "()",
    "RemoteCall.cancel": "(*, wait=False)",
    "RemoteCall.details": "()",
    "RemoteCall.end_time": "()",
    "RemoteCall.follow": "(since=None, recent=None, numbered=False, *, timed=False)",
    "RemoteCall.get": "(wait=True, *, timeout=None)",
    "RemoteCall.host": "()",
    "RemoteCall.id": "()",
    "RemoteCall.info": "()",
    "RemoteCall.procedure": "()",
    "RemoteCall.result": "(wait=False, *, timeout=None)",
    "RemoteCall.start_time": "()",
    "RemoteCall.stream": "(since=None, recent=None, numbered=False, *, timed=False)",
    "RemoteCall.submit_time": "()",
    "RemoteCall.why": "()",
    "HarpServer": (
        "(host, user, password, port=4306, ca_file=None, *, keep_alive=True, tls_minimum='1.2', verify_hostname=True)"
    ),
    "HarpServer.__getattr__": "(procedure)",
    "HarpProcedure": "(server, name)",
    "HarpProcedure.__call__": "(*args, **kwargs)",
    "HarpStreamIterator": "(orig_iterator)",
    "Result": "(value)",
    "Secret": "(value)",
    "JSONConnection": "(host, port)",
    "JSONConnection.close": "()",
    "JSONConnection.connect": "()",
    "JSONConnection.receive": "()",
    "JSONConnection.send": "(obj)",
    "JSONSSLConnection": "(host, port, ca_file=None, *, tls_minimum='1.2', verify_hostname=True)",
    "JSONSSLConnection.close": "()",
    "JSONSSLConnection.connect": "()",
    "JSONSSLConnection.receive": "()",
    "JSONSSLConnection.send": "(obj)",
    "RemoteException": "(type, message, data=None)",
    "RemoteError": "(type, message, data=None)",
    "RequestRefused": "(type, message, data=None)",
    "AuthenticationFailed": "(type, message, data=None)",
    "AccessDenied": "(type, message, data=None)",
    "RateLimited": "(type, message, data=None)",
}

#: Methods whose asyncio version has another name.
SYNC_ITERATION = {"__next__": "__anext__", "__iter__": "__aiter__", "__enter__": "__aenter__", "__exit__": "__aexit__"}


def find(name: str, root: Any = harp) -> Any:
    for part in name.split("."):
        root = inspect.getattr_static(root, part) if inspect.isclass(root) else getattr(root, part)
    return root


def signature(found: Callable[..., Any]) -> str:
    parameters = inspect.signature(found).parameters.values()
    texts = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in texts:
            texts.append("*")
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        texts.append(f"{stars}{parameter.name}{default}")
    if inspect.isfunction(found) and texts and texts[0] == "self":
        del texts[0]
    return f"({', '.join(texts)})"


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_equals_documented_signature(name: str) -> None:
    assert signature(find(name)) == SIGNATURES[name]


def test_docs_page_contains_every_signature() -> None:
    page = (Path(__file__).parents[2] / "docs/client-api.md").read_text()
    missing = []
    for name, parameters in SIGNATURES.items():
        short = name.rpartition(".")[2]
        if f"`{name}{parameters}`" not in page and f"`{short}{parameters}`" not in page:
            missing.append(name + parameters)
    assert not missing


def test_dunder_all_lists_exactly_the_documented_names() -> None:
    named = {name.partition(".")[0] for name in SIGNATURES}
    assert set(harp.__all__) == named | {
        "CALL_CANCELLED",
        "CALL_NOT_FINISHED",
        "CancelledException",
        "CommunicationError",
        "HarpException",
        "HostSummary",
        "JobCounts",
        "JobSummary",
        "NotSupported",
        "QueueSummary",
        "ValueCount",
    }
    assert all(getattr(harp, name) is not None for name in harp.__all__)
    assert set(harp.__all__) <= set(dir(harp))
    with pytest.raises(AttributeError, match="nothing"):
        _ = harp.nothing  # type: ignore[attr-defined]


TWINS = [
    name
    for name in SIGNATURES
    if name.startswith(("Harp", "Remote", "JSON")) and hasattr(aio, f"Async{name.partition('.')[0]}")
]


@pytest.mark.parametrize("name", TWINS)
def test_async_signature_equals_sync_signature(name: str) -> None:
    assert signature(find(f"Async{name}", aio)) == signature(find(name))


def test_async_class_has_all_public_methods() -> None:
    assert len({name.partition(".")[0] for name in TWINS}) == 9
    for class_name in {name.partition(".")[0] for name in TWINS}:
        sync, twin = getattr(harp, class_name), getattr(aio, f"Async{class_name}")
        public = {name for name in dir(sync) if not name.startswith("_")}
        assert public <= {name for name in dir(twin) if not name.startswith("_")}
        for name in SYNC_ITERATION.keys() & set(dir(sync)):
            assert hasattr(twin, SYNC_ITERATION[name]), (class_name, name)
    assert set(aio.__all__) == {f"Async{name.partition('.')[0]}" for name in TWINS}


PLAIN = {
    "id",
    "follow",
    "stream",
    "job",
    "jobs",
    "hosts",
    "queues",
    "HarpCaller.host",
    "RemoteProcedure.host",
    "RemoteProcedure.procedure",
}


def test_async_method_that_sends_is_a_coroutine() -> None:
    for name in TWINS:
        short = name.rpartition(".")[2]
        if inspect.isfunction(find(name)) and not short.startswith("__"):
            plain = short in PLAIN or name in PLAIN
            assert inspect.iscoroutinefunction(find(f"Async{name}", aio)) is not plain, name
    assert inspect.iscoroutinefunction(aio.AsyncRemoteProcedure.__call__)
    assert inspect.iscoroutinefunction(aio.AsyncHarpProcedure.__call__)


def test_exceptions_derive_from_harp_exception() -> None:
    for name in ("CommunicationError", "CancelledException", "RemoteException", "RemoteError"):
        assert issubclass(getattr(harp, name), harp.HarpException)
    assert issubclass(harp.RequestRefused, harp.CommunicationError)
    assert issubclass(harp.NotSupported, harp.CommunicationError)
    assert not issubclass(harp.RequestRefused, harp.RemoteError)
    error = harp.RemoteError("timeout", "reading the result", {"seconds": 5})
    assert (error.type, error.message, error.data) == ("timeout", "reading the result", {"seconds": 5})
    assert str(error) == "timeout: reading the result"
    assert harp.RemoteException("ValueError", "m").data is None
    for made in (error, harp.RequestRefused("storage_error", "full")):
        same = pickle.loads(pickle.dumps(made))
        assert (type(same), same.args, same.type) == (type(made), made.args, made.type)


@pytest.mark.parametrize("module", ["harp", "harp.client", "harp.cli"])
def test_import_does_not_load_asyncio(module: str) -> None:
    program = f"import sys, {module}, harp; harp.HarpCaller, harp.HarpServer; sys.exit('asyncio' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_client_loads_only_the_standard_library() -> None:
    program = (
        "import pkgutil, sys, harp\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "for module in pkgutil.walk_packages(harp.__path__, 'harp.'): __import__(module.name)\n"
        "found = {name.partition('.')[0] for name in sys.modules} - before - sys.stdlib_module_names\n"
        "assert 'harp._terminal.tables' in sys.modules\n"
        "sys.exit(', '.join(found - {'harp'}) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_import_of_protocol_loads_no_client_or_network() -> None:
    program = (
        "import sys, harp.protocol.harpd, harp.protocol.dispatcher, harp.errors\n"
        "heavy = {'socket', 'ssl', 'asyncio', 'logging', 'threading', 'harp.client'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_aio_is_imported_on_first_use() -> None:
    program = "import harp, sys; harp.aio.AsyncHarpCaller('h'); sys.exit('asyncio' not in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# Nothing listens on port 1: every request fails.
def objects() -> list[Any]:
    rpc, arpc = harp.HarpCaller("127.0.0.1", 1), aio.AsyncHarpCaller("127.0.0.1", 1)
    server = harp.HarpServer("127.0.0.1", "u", "secret", 1, ca_file="/nowhere/ca.pem")
    aserver = aio.AsyncHarpServer("127.0.0.1", "u", "secret", 1)
    found: list[Any] = [server, server.procedure, aserver, aserver.procedure]
    for caller in (rpc, arpc):
        found += [caller, caller.web01, caller.web01(queue={"q": 1}, info=[1]), caller.web01.procedure, caller.job(JOB)]
    return found


@pytest.mark.parametrize("item", objects(), ids=repr)
def test_inspection_sends_no_request(item: Any) -> None:
    assert "secret" not in repr(item)
    assert "secret" not in str(item)
    dir(item)
    inspect.getmembers(type(item))
    for name in (
        "_ipython_display_",
        "_repr_html_",
        "__wrapped__",
        "__len__",
        "_x",
        "__array__",
        "__html__",
        "__await__",
    ):
        assert not hasattr(item, name)
    for same in (copy.copy(item), copy.deepcopy(item), pickle.loads(pickle.dumps(item))):
        assert type(same) is type(item)
        assert repr(same) == repr(item)
    assert hash(item) == hash(item)
    assert bool(item)


def test_attribute_returns_object_without_call() -> None:
    rpc = harp.HarpCaller("127.0.0.1", 1)
    assert hasattr(rpc, "anything")
    assert hasattr(rpc.web01, "anything")
    assert isinstance(rpc.web01.keys, harp.RemoteProcedure)
    assert (rpc.web01.restart.host(), rpc.web01.restart.procedure()) == ("web01", "restart")
    assert [str(host) for host in (rpc.web01, rpc("web01"), rpc.host("web01"), rpc.host(host="web01"))] == ["web01"] * 4
    server = rpc.web01
    assert server(queue={"a": 1}) is server
    name = "_private"
    with pytest.raises(AttributeError, match=name):
        getattr(rpc, name)
    assert harp.RemoteProcedure(rpc, server, name).procedure() == name


async def check_types_of_lists(rpc: harp.HarpCaller, arpc: aio.AsyncHarpCaller) -> None:
    """Let the type checker look at the items of lists; nothing calls this."""
    assert_type(next(rpc.jobs()), harp.JobSummary)
    assert_type(rpc.hosts().all(), list[harp.HostSummary])
    assert_type([queue.name for queue in rpc.queues()], list[str])
    assert_type(rpc.count_jobs(), harp.JobCounts)
    assert_type(await arpc.jobs().all(), list[harp.JobSummary])


def test_attributes_have_static_types() -> None:
    rpc, arpc = harp.HarpCaller("h"), harp.aio.AsyncHarpCaller("h")
    assert_type(rpc.web01, harp.RemoteServer)
    assert_type(rpc.web01(queue={"a": 1}, timeout=5).restart, harp.RemoteProcedure)
    assert_type(harp.HarpServer("h", "u", "p").current_time, harp.HarpProcedure)
    assert_type(arpc.web01(info=1).restart, aio.AsyncRemoteProcedure)


def test_methods_can_be_pickled() -> None:
    """As for `multiprocessing.Pool.map(harp.RemoteCall.get, jobs)`."""
    for module in (harp, aio):
        for name in module.__all__:
            for method in vars(getattr(module, name)).values() if inspect.isclass(getattr(module, name)) else ():
                if inspect.isfunction(method) and method.__module__.startswith("harp"):
                    assert pickle.loads(pickle.dumps(method)) is method
    assert harp.RemoteCall.get.__qualname__ == "RemoteCall.get"
    assert harp.RemoteProcedure.__call__.__name__ == "__call__"
    program = """
import harp, multiprocessing
jobs = [harp.HarpCaller("127.0.0.1", 1).job("1")] * 2
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(harp.RemoteCall.id, jobs), *map(type, pool.map(harp.RemoteCall.result, jobs)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"['1', '1'] {harp.CommunicationError} {harp.CommunicationError}\n"


def test_sentinel_copies_are_the_same_object() -> None:
    for sentinel, text in ((harp.CALL_NOT_FINISHED, "<CallNotFinished>"), (harp.CALL_CANCELLED, "<CallCancelled>")):
        assert repr(sentinel) == text
        assert copy.copy(sentinel) is copy.deepcopy(sentinel) is pickle.loads(pickle.dumps(sentinel)) is sentinel


def test_result_compares_by_value() -> None:
    assert harp.Result([1]).value == [1]
    assert harp.Result(1) == harp.Result(1) != harp.Result(2)
    assert pickle.loads(pickle.dumps(harp.Result({"a": 1}))) == harp.Result({"a": 1})


WRONG_OPTIONS = [
    (
        {"colour": 1},
        "unknown option 'colour', expected one of queue, concurrency, timeout, max_exec_time, info, start_within",
    ),
    ({"queue": "name"}, "option 'queue': expected a dict, got 'name'"),
    ({"queue": {"a": {1, 2}}}, r"option 'queue' cannot be sent as JSON: at \['a'\]: type set"),
    ({"concurrency": 0}, "option 'concurrency': expected a positive integer, got 0"),
    ({"concurrency": True}, "option 'concurrency'"),
    ({"concurrency": 1.5}, "option 'concurrency'"),
    ({"timeout": 0}, "option 'timeout': expected a positive number of seconds, got 0"),
    ({"timeout": -1}, "option 'timeout'"),
    ({"timeout": "5"}, "option 'timeout'"),
    ({"timeout": 10**5000}, "option 'timeout'"),
    ({"max_exec_time": float("nan")}, "option 'max_exec_time'"),
    ({"max_exec_time": float("inf")}, "option 'max_exec_time'"),
    ({"max_exec_time": False}, "option 'max_exec_time'"),
    ({"start_within": -1}, "option 'start_within': expected a number of seconds of at least 0, got -1"),
    ({"start_within": True}, "option 'start_within'"),
    ({"info": object()}, "option 'info' cannot be sent as JSON: type object"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_invalid_option_is_refused_immediately(options: dict[str, Any], message: str) -> None:
    for rpc in (harp.HarpCaller("127.0.0.1", 1), aio.AsyncHarpCaller("127.0.0.1", 1)):
        with pytest.raises(harp.HarpException, match=message):
            rpc.web01(**options)
        with pytest.raises(harp.HarpException, match=message):
            rpc.host("web01", **options)
        with pytest.raises(harp.HarpException, match=message):
            rpc("web01", **options)


WRONG_CALLS: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((1,), {"a": 2}, "positional and named arguments cannot be mixed"),
    ((1, {1, 2}), {}, "argument 2 cannot be sent as JSON: type set has no form"),
    (([0, {"a": object()}],), {}, r"argument 1 cannot be sent as JSON: at \[1\]\['a'\]: type object"),
    ((), {"good": 1, "name": b"bytes"}, "argument 'name' cannot be sent as JSON: type bytes"),
    ((float("nan"),), {}, "argument 1 cannot be sent as JSON: nan"),
    (({(1, 2): 3},), {}, "argument 1 cannot be sent as JSON: a key is of type tuple"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), WRONG_CALLS)
def test_invalid_arguments_are_refused_before_sending(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(harp.HarpException, match=message) as caught:
        harp.HarpCaller("127.0.0.1", 1).web01.procedure(*args, **kwargs)
    assert type(caught.value) is harp.HarpException  # it did not connect
    with pytest.raises(harp.HarpException, match=message) as caught:
        harp.HarpServer("127.0.0.1", "u", "p", 1).procedure(*args, **kwargs)
    assert type(caught.value) is harp.HarpException


async def test_invalid_arguments_are_refused_with_asyncio() -> None:
    with pytest.raises(harp.HarpException, match="mixed"):
        await aio.AsyncHarpCaller("127.0.0.1", 1).web01.procedure(1, a=2)
    with pytest.raises(harp.HarpException, match="argument 1"):
        await aio.AsyncHarpServer("127.0.0.1", "u", "p", 1).procedure(object())


def test_concurrency_without_queue_is_refused_at_submission() -> None:
    server = harp.HarpCaller("127.0.0.1", 1).web01(concurrency=2)  # the queue may be set later
    with pytest.raises(harp.HarpException, match="option 'concurrency' needs option 'queue'"):
        server.procedure()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: harp.HarpCaller(""), "host: expected a name"),
        (lambda: harp.HarpCaller(None), "host: expected a name"),  # type: ignore[arg-type]
        (lambda: harp.HarpCaller("h:3502"), "host: .* the port is an argument of its own, got 'h:3502'"),
        (lambda: harp.HarpCaller("https://h"), "host: expected a name or an address"),
        (lambda: harp.HarpServer("[::1]", "u", "p"), "host: expected a name or an address without brackets"),
        (lambda: harp.HarpCaller("h", 0), "port: expected a number"),
        (lambda: harp.HarpCaller("h", "3502"), "port: expected a number"),  # type: ignore[arg-type]
        (lambda: harp.HarpCaller("h", 65536), "port: expected a number"),
        (lambda: harp.HarpCaller("h", reconnect=-1), "reconnect: expected seconds of at least 0, or None, got -1"),
        (lambda: harp.HarpCaller("h", reconnect=True), "reconnect: expected seconds"),
        (lambda: harp.HarpCaller("h", reconnect=float("nan")), "reconnect: expected seconds"),
        (lambda: harp.HarpCaller("h", reconnect="5"), "reconnect: expected seconds"),  # type: ignore[arg-type]
        (lambda: harp.HarpCaller("h").host(""), "host: expected a name"),
        (lambda: harp.HarpCaller("h").job(""), "job_id: expected a name"),
        (lambda: harp.HarpCaller("h").job(5), "job_id: expected a name"),  # type: ignore[arg-type]
        (lambda: harp.HarpCaller("h").job(JOB).follow(since=-1), "since: expected an integer of at least 0"),
        (lambda: harp.HarpCaller("h").job(JOB).stream(recent="5"), "recent: expected"),  # type: ignore[arg-type]
        (lambda: harp.HarpCaller("h").job(JOB).follow(1, 2), "since and recent exclude each other"),
        (lambda: harp.HarpCaller("h").job(JOB).stream(10**5000), "digits"),
        (lambda: harp.HarpCaller("h").request([]), "request: expected a dict"),  # type: ignore[arg-type]
        (lambda: harp.HarpCaller("h").request({"x": {1}}), r"the request cannot be sent as JSON: at \['x'\]"),
        (lambda: harp.HarpServer("h", "u", None), "password: expected a string, got NoneType"),  # type: ignore[arg-type]
        (lambda: harp.HarpServer("h", 5, "p"), "user: expected a string, got int"),  # type: ignore[arg-type]
        (lambda: harp.HarpProcedure(harp.HarpServer("h", "u", "p"), ""), "procedure: expected a name"),
        # A web application may get names from its users.
        (lambda: harp.HarpCaller("h").host("x" * 300).p(), "host: expected a name of 1 to 255 characters"),
        (lambda: getattr(harp.HarpCaller("h").web01, "x" * 300)(), "procedure: expected a name of 1 to 255 characters"),
        (lambda: harp.HarpCaller("h").web01(queue={"a": "x" * 5000}).p(), "queue.name: expected an object of at most"),
        (lambda: harp.Call("x" * 300, "p"), "host: expected a name of 1 to 255 characters"),
        (lambda: getattr(harp.HarpServer("h", "u", "p"), "x" * 300)(), "procedure: expected a name of 1 to 255"),
        (lambda: harp.HarpServer("h", "u" * 300, "p").p(), "auth.user: expected a string of at most 255 characters"),
        (lambda: harp.HarpServer("h", "u", "p" * 5000).p(), "auth.password: expected a string of at most 4096"),
    ],
)
def test_invalid_parameter_is_refused_immediately(make: Callable[[], object], message: str) -> None:
    with pytest.raises(harp.HarpException, match=message):
        make()
