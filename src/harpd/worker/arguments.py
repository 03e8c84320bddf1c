"""The check of a call's arguments against its procedure's signature.

Nearly all arguments fit, and nearly all procedures are plain functions: for these, a look at the code object is enough.
All other cases need the large module `inspect`. If a procedures file needs it, it is loaded before the first fork.
"""

from __future__ import annotations

from types import FunctionType

from harpd.proc import Procedure, StreamingProcedure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import inspect
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

#: Flags of a code object that has ``*args`` or ``**kwargs``.
_VARIABLE = 0x04 | 0x08
#: A function that shows the signature of another one has one of these attributes.
_SIGNATURE_ATTRIBUTES = ("__wrapped__", "__signature__", "__text_signature__")


class WrongArguments(Exception):
    """The arguments do not fit. The message names the cause and the procedure's parameters."""


def preload_inspect(procedures: Iterable[Procedure]) -> None:
    """Load `inspect` now if calls of these procedures need it, so that not each call has to load it."""
    if not all(map(_is_plain, procedures)):
        import inspect  # noqa: F401


def check_arguments(procedure: Procedure, positional: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Check the arguments of a call against the procedure's signature.

    Raises:
        WrongArguments: they do not fit.
    """
    if _is_plain(procedure) and _fits_plain_signature(procedure.function, len(positional), named):
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
    """Return whether a call runs a plain function, whose code object shows its signature."""
    if type(procedure) not in (Procedure, StreamingProcedure):
        return False
    function = procedure.function
    return (
        type(function) is FunctionType
        and not function.__code__.co_flags & _VARIABLE
        and not any(name in function.__dict__ for name in _SIGNATURE_ATTRIBUTES)
    )


def _fits_plain_signature(function: Any, given: int, named: Mapping[str, Any]) -> bool:
    """Return True if the arguments fit, False if that is not certain.

    `given` is the number of positional arguments. A call has positional arguments or named ones, not both.
    """
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
    """Return the parameters' names as text, without their defaults, which may be secret."""
    empty = type(signature).empty
    names = [
        str(parameter.replace(default=empty, annotation=empty)) + ("" if parameter.default is empty else "=...")
        for parameter in signature.parameters.values()
    ]
    return f"({', '.join(names)})"
