"""`ArgumentCheck` of `harpd.worker.child`: the check by the code object agrees with `inspect`."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from harpd.proc import Procedure, StreamingProcedure, procedure
from harpd.worker.child import ArgumentCheck, CallRejected


def none() -> None: ...
def one(a: Any) -> None: ...
def optional(a: Any, b: Any = 1) -> None: ...
def positional_only(a: Any, /, b: Any = 1) -> None: ...
def keyword_only(a: Any, *, k: Any) -> None: ...
def keyword_optional(a: Any = 0, *, k: Any = 1) -> None: ...
def mixed(a: Any, /, b: Any, c: Any = 1, *, k: Any, m: Any = 2) -> None: ...
def any_positional(*args: Any) -> None: ...
def any_named(**kwargs: Any) -> None: ...
def anything(a: Any, *args: Any, k: Any = 1, **kwargs: Any) -> None: ...


@functools.wraps(one)
def wrapper(*args: Any, **kwargs: Any) -> None: ...


class Callable_:
    def __call__(self, a: Any, b: Any = 1) -> None: ...


class Own(Procedure):
    def __call__(self, word: Any, /) -> Any:
        return word


class Local:
    """Local variables are not parameters."""

    @staticmethod
    def function(a: Any) -> None:
        b = k = a
        del b, k


FUNCTIONS: list[Callable[..., Any]] = [none, one, optional, positional_only, keyword_only, keyword_optional, mixed]
FUNCTIONS += [wrapper, any_positional, any_named, anything, Local.function, Callable_(), len]
FUNCTIONS += [functools.partial(mixed, 1)]
PROCEDURES = [*map(Procedure, FUNCTIONS), StreamingProcedure(one), Own(one)]
GIVEN: list[tuple[list[int], dict[str, int]]] = [([0] * count, {}) for count in range(5)]
GIVEN += [([], dict.fromkeys(names, 0)) for size in range(1, 4) for names in product("abckmz", repeat=size)]


@pytest.mark.parametrize("one", PROCEDURES, ids=repr)
def test_check_arguments_agrees_with_inspect(one: Procedure) -> None:
    signature, check = one.signature(), ArgumentCheck(one)
    for positional, named in GIVEN:
        try:
            signature.bind(*positional, **named)
        except TypeError as error:
            with pytest.raises(CallRejected) as caught:
                check.check(positional, named)
            kind, message = caught.value.args
            assert kind == "invalid_argument_list"
            assert message.startswith(str(error))
        else:
            check.check(positional, named)


def test_check_arguments_uses_changed_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one, "__defaults__", (5,))
    ArgumentCheck(procedure(one)).check([], {})


def test_check_arguments_uses_given_signature() -> None:
    def disguised(a: Any) -> None: ...

    disguised.__signature__ = inspect.signature(optional)  # type: ignore[attr-defined]
    ArgumentCheck(procedure(disguised)).check([1, 2], {})


def test_check_arguments_without_signature_passes() -> None:
    with pytest.raises(ValueError, match="signature"):
        Procedure(max).signature()
    ArgumentCheck(Procedure(max)).check([1, 2, 3, 4], {})


def loaded(directory: Path, text: str) -> set[str]:
    """Return the modules of a process that has loaded a procedures file with this text, like a zygote."""
    file = directory / "procedures.py"
    file.write_text(text)
    program = """
import sys
from harpd.worker import zygote
from harpd.worker.child import ArgumentCheck
from harpd.worker.procedures import load_procedures
checks = [*map(ArgumentCheck, load_procedures(sys.argv[1]).values())]
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-P", "-c", program, file], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_zygote_imports_are_lean(tmp_path: Path) -> None:
    """The modules of the zygote cost each fork; `threading` alone costs a fifth of a short call."""
    plain = "from harpd.proc import *\n@procedure\ndef f(a): return a\n"
    heavy = {"typing", "dataclasses", "inspect", "logging", "threading", "asyncio", "ssl", "subprocess"}
    heavy |= {"json", "re", "enum", "socket", "signal", "functools"}  # wrappers, which a worker does without
    assert not heavy & loaded(tmp_path, plain)


def test_supervisor_imports_are_lean() -> None:
    """These modules need 3 MB on each host."""
    program = "import sys, harpd.supervisor.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert not {"asyncio", "ssl", "subprocess", "yaml", "logging.config", "argparse"} & set(done.stdout.split())


def test_preload_inspect_if_calls_need_it(tmp_path: Path) -> None:
    assert "inspect" in loaded(tmp_path, "from harpd.proc import *\n@procedure\ndef f(*a): return a\n")
