"""A call's arguments: whether they fit the procedure, and what to say if they don't.

Nearly all calls fit, and nearly all procedures are plain functions: for these a look at the code object is enough. What
it leaves open `inspect` decides, which is large: a file whose procedures need it has it loaded before the first fork.
"""

from __future__ import annotations

from types import FunctionType

from harpd.proc import Procedure, StreamingProcedure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import inspect
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

__all__ = ["WrongArguments", "check_arguments", "preload_inspect"]

#: Of a code object's flags: it takes any further positional, any further named arguments.
_VARIABLE = 0x04 | 0x08
#: Functions that show another's signature have one of these.
_DISGUISES = ("__wrapped__", "__signature__", "__text_signature__")


class WrongArguments(Exception):
    """The arguments don't fit. The message says why, and what the procedure takes."""


def preload_inspect(procedures: Iterable[Procedure]) -> None:
    """Load now what these procedures' calls would load each for itself."""
    if not all(map(_is_plain, procedures)):
        import inspect  # noqa: F401


def check_arguments(procedure: Procedure, positional: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Check a call's arguments against the procedure's signature.

    Raises:
        WrongArguments: they don't fit.
    """
    if _is_plain(procedure) and _surely_fit(procedure.function, len(positional), named):
        return
    try:
        signature = procedure.signature()
    except ValueError:  # some functions that are written in C have none
        return
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        raise WrongArguments(f"{error}; the procedure takes {_parameters(signature)}") from error


def _is_plain(procedure: Procedure) -> bool:
    """Whether a call is nothing but a call of a function that is what it looks like."""
    if type(procedure) not in (Procedure, StreamingProcedure):
        return False
    function = procedure.function
    return (
        type(function) is FunctionType
        and not function.__code__.co_flags & _VARIABLE
        and not any(name in function.__dict__ for name in _DISGUISES)
    )


def _surely_fit(function: Any, given: int, named: Mapping[str, Any]) -> bool:
    """Whether the arguments fit; False leaves it open. A call has positional arguments or named ones."""
    code = function.__code__
    optional = len(function.__defaults__ or ())
    if len(function.__kwdefaults__ or ()) != code.co_kwonlyargcount:
        return False
    if not named:
        return bool(code.co_argcount - optional <= given <= code.co_argcount)
    if given or code.co_posonlyargcount:
        return False
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return all(name in names for name in named) and all(name in named for name in names[: code.co_argcount - optional])


def _parameters(signature: inspect.Signature) -> str:
    """The parameters' names; not their defaults, which are nobody's business."""
    empty = type(signature).empty
    names = [
        str(parameter.replace(default=empty, annotation=empty)) + ("" if parameter.default is empty else "=...")
        for parameter in signature.parameters.values()
    ]
    return f"({', '.join(names)})"
