"""The interface and the loading of procedures files; the ids of a procedure's user and groups."""

from __future__ import annotations

import asyncio
import inspect
import pwd
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import Any

import pytest

from harpd.proc import Procedure, Result, StreamingProcedure, TimeLimit, procedure, streaming_procedure
from harpd.worker.privileges import UserError, resolve_credentials
from harpd.worker.procedures import ProceduresError, load_procedures


def function(a: int, b: int = 2) -> int:
    """Add."""
    return a + b


def test_decorator_with_and_without_options() -> None:
    kinds: list[tuple[Any, type[Procedure]]] = [(procedure, Procedure), (streaming_procedure, StreamingProcedure)]
    for decorator, kind in kinds:
        bare = decorator(function)
        assert type(bare) is kind
        assert (bare.timeout, bare.uid, bare.gid, bare.max_calls_per_process) == (None, None, None, 1)
        with_options = decorator(timeout=1.5, uid="u", gid=["g", 5], max_calls_per_process=3)(function)
        assert type(with_options) is kind
        assert (with_options.timeout, with_options.uid, with_options.gid) == (1.5, "u", ("g", 5))
        assert with_options.max_calls_per_process == 3
        assert type(decorator()(function)) is kind
        assert bare.__doc__ == "Add."
        assert bare.streaming is (kind is StreamingProcedure)
    assert procedure(function)(1) == 3
    assert repr(Procedure(function)) == "<Procedure function>"
    assert repr(Result([1])) == "Result([1])"


def test_gid_of_one_group() -> None:
    assert Procedure(function, gid=0).gid == (0,)
    assert Procedure(function, gid="adm").gid == ("adm",)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"timeout": "5"},
        {"timeout": True},
        {"max_calls_per_process": 0},
        {"max_calls_per_process": True},
        {"max_calls_per_process": 1.5},
        {"max_calls_per_process": "3"},
        {"uid": -1},
        {"uid": True},
        {"uid": 1.0},
        {"gid": []},
        {"gid": [-1]},
        {"gid": b"adm"},
        {"gid": {"adm"}},
        {"gid": [["adm"]]},
    ],
)
def test_options_invalid_raise(options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises((TypeError, ValueError), match=f"^{key}: expected"):
        Procedure(function, **options)


def test_decorator_of_non_function_raises() -> None:
    with pytest.raises(TypeError, match="expected a function, got 5"):
        Procedure(5)  # type: ignore[arg-type]


def test_signature_of_function_or_own_call() -> None:
    class Own(Procedure):
        def __call__(self, word: str) -> Any:
            return word

    class Inherited(Own):
        pass

    class Wrapping(Procedure):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    assert Procedure(function).signature() == inspect.signature(function)
    Wrapping(function).signature().bind("any", arguments="fit")  # it may add some to those of the call
    assert StreamingProcedure(function).signature() == inspect.signature(function)
    for kind in (Own, Inherited):
        assert list(kind(function).signature().parameters) == ["word"]
    with pytest.raises(ValueError, match="no signature"):
        Procedure(max).signature()


@pytest.mark.parametrize("function", [lambda n: [*range(n), Result("end")], lambda n: iter([*range(n), Result("end")])])
def test_streaming_procedure_iterates_records_only(function: Any) -> None:
    records = streaming_procedure(function)
    assert records.result() is None
    assert list(records(2)) == [0, 1]
    assert records.result() == "end"
    assert next(records(1)) == 0
    assert records.result() is None


def generate(numbers: int) -> Generator[Any, None, Result]:
    try:
        yield from range(numbers)
    except TimeLimit as limit:
        yield f"cleaned up: {limit}"
    return Result("returned")


async def generate_async(numbers: int) -> AsyncIterator[Any]:
    for number in range(numbers):
        yield number
    yield Result("end")


def test_streaming_procedure_forwards_generators() -> None:
    records = StreamingProcedure(generate)
    assert list(records(2)) == [0, 1]
    assert records.result() == "returned"
    iterator = records(2)
    next(iterator)
    with pytest.raises(TimeLimit):
        iterator.throw(TimeLimit("now"))

    async def read(records: StreamingProcedure) -> list[Any]:
        return [record async for record in records(2)]

    asynchronous = StreamingProcedure(generate_async)
    assert asyncio.run(read(asynchronous)) == [0, 1]
    assert asynchronous.result() == "end"
    assert list(streaming_procedure(lambda: Result(7))()) == []
    with pytest.raises(TypeError, match="not iterable"):
        streaming_procedure(len)("")  # type: ignore[arg-type]


def load(directory: Path, text: str) -> Any:
    path = directory / "procedures of \u00fc.py"
    path.write_text(text)
    return load_procedures(path)


def test_load_exposes_procedures(tmp_path: Path) -> None:
    text = """
from harpd.proc import Procedure, procedure
class Lazy:
    @property
    def __class__(self):
        raise RuntimeError("not now")
class Bare(Procedure):
    gid = "adm"
    def __init__(self): pass
    def __call__(self): pass
lazy, bare, number = Lazy(), Bare(), 5
one = two = procedure(len)
_hidden = procedure(len)
def plain(x: int): pass
ANNOTATION = plain.__annotations__["x"]
globals()["class"] = one if ANNOTATION is int else None  # without the __future__ imports of the loader
"""
    found = load(tmp_path, text)
    assert sorted(found) == ["_hidden", "bare", "class", "one", "two"]
    assert found["bare"].gid == ("adm",)
    assert (found["bare"].timeout, found["bare"].uid) == (None, None)
    with pytest.raises(TypeError):
        found["three"] = found["one"]


def test_load_supports_dataclasses_and_pickle(tmp_path: Path) -> None:
    text = """
import dataclasses, pickle
from harpd.proc import procedure
@dataclasses.dataclass
class Point:
    x: "int"
assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
p = procedure(Point)
"""
    assert list(load(tmp_path, text)) == ["p"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = (\n", ".py:1: SyntaxError: '(' was never closed"),
        ("\n\n1/0\n", ".py:3: ZeroDivisionError: division by zero"),
        ("raise SystemExit('no\\nmore')\n", ".py:1: SystemExit: no more"),
        ("raise KeyboardInterrupt\n", ".py:1: KeyboardInterrupt: "),
        ("def f():\n  import nowhere\nf()\n", ".py:2: ModuleNotFoundError: No module named 'nowhere'"),
        ("class E(Exception):\n def __str__(s): 1/0\nraise E\n", ".py:3: E: (str() of the exception failed)"),
        ("\0", "null bytes"),
        *[
            (f"from harpd.proc import *\nimport functools\n{text}", f".py: {name}: the function is a generator; expose")
            for name, text in [
                ("f", "@procedure\ndef f(): yield 1\n"),
                ("f", "@procedure\nasync def f(): yield 1\n"),
                ("f", "f = procedure(functools.partial(lambda a: (yield a), 1))\n"),
                ("f", "class A:\n  def __call__(self): yield 1\nf = procedure(A())\n"),
                ("f", "@procedure\n@streaming_procedure\ndef f(): yield 1\n"),
                ("f", "class P(Procedure):\n  def __call__(self): yield 1\nf = P(len)\n"),
            ]
        ],
        ("from harpd.proc import *\np = procedure(len)\np.timeout = -1\n", ".py: p: timeout: expected a positive"),
        (
            "from harpd.proc import *\np = procedure(len)\np.max_calls_per_process = 0\n",
            ".py: p: max_calls_per_process: expected a number of calls, at least 1",
        ),
        ("from harpd.proc import *\nclass P(Procedure): uid = 1.5\np = P(len)\np.uid = 1.5\n", ".py: p: uid: expected"),
    ],
)
def test_load_failure_names_line_and_cause(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ProceduresError) as caught:
        load(tmp_path, text)
    assert reason in str(caught.value)
    assert "procedures of \u00fc.py" in str(caught.value)


def test_load_failure_text_is_cut(tmp_path: Path) -> None:
    with pytest.raises(ProceduresError) as caught:
        load(tmp_path, "raise ValueError('x' * 10**6)")
    assert len(str(caught.value)) < 5000


def test_load_missing_file_fails(tmp_path: Path) -> None:
    with pytest.raises(ProceduresError, match=r"none\.py: No such file or directory"):
        load_procedures(tmp_path / "none.py")


def resolved(uid: int | str | None, gid: list[int | str] | None) -> tuple[object, ...]:
    *ids, entry = resolve_credentials(uid, gid)
    name, home = (entry.pw_name, entry.pw_dir) if isinstance(entry, pwd.struct_passwd) else (None, None)
    return *ids, name, home


def test_resolve_credentials() -> None:
    daemon = pwd.getpwnam("daemon")
    by_name = resolved("daemon", None)
    assert by_name == (daemon.pw_uid, daemon.pw_gid, (daemon.pw_gid,), "daemon", daemon.pw_dir)
    assert resolved(daemon.pw_uid, None) == resolved(str(daemon.pw_uid), None) == by_name
    assert resolved(None, None) == (None, None, None, None, None)
    assert resolved(54321, None) == (54321, 65534, (), None, None)
    assert resolved(54321, [5, "6", 5]) == (54321, 5, (5, 6), None, None)
    assert resolved(None, ["root"]) == (None, 0, (0,), None, None)


@pytest.mark.parametrize("uid", ["no-such-user", "", "a\0b", "\ud800", "-1"])
def test_resolve_unknown_user_or_group_fails(uid: str) -> None:
    with pytest.raises(UserError, match="unknown user"):
        resolve_credentials(uid, None)
    with pytest.raises(UserError, match="unknown group"):
        resolve_credentials(None, [uid])
