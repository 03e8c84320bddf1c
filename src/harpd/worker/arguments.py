"""The check of a call's arguments against its procedure's signature.

Nearly all arguments fit, and nearly all procedures are plain functions: for these, a look at the code object is enough.
All other cases need the large module `inspect`. If a procedures file needs it, it is loaded before the first fork.
"""

from __future__ import annotations

from types import FunctionType

from harpd.proc import Procedure, StreamingProcedure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

#: Flags of a code object that has ``*args`` or ``**kwargs``.
_VARIABLE = 0x04 | 0x08
#: A function that shows the signature of another one has one of these attributes.
_SIGNATURE_ATTRIBUTES = ("__wrapped__", "__signature__", "__text_signature__")


class WrongArguments(Exception):
    """The arguments do not fit. The message names the cause and the procedure's parameters."""


class ArgumentCheck:
    """The check of one procedure's arguments; it is prepared in the zygote, before the first fork."""

    def __init__(self, procedure: Procedure) -> None:
        self._procedure = procedure
        self._names: tuple[str, ...] | None = None  # of the parameters that may be named
        # How many positional arguments certainly fit, at least and at most.
        self._least, self._most = 0, -1
        function = getattr(procedure, "function", None)  # missing in some subclasses
        if (
            type(procedure) not in (Procedure, StreamingProcedure)
            or type(function) is not FunctionType
            or function.__code__.co_flags & _VARIABLE
            or any(name in function.__dict__ for name in _SIGNATURE_ATTRIBUTES)
        ):
            import inspect  # noqa: F401 - so that not each call has to load it

            return
        code = function.__code__
        if len(function.__kwdefaults__ or ()) == code.co_kwonlyargcount:
            self._most = code.co_argcount
            self._least = code.co_argcount - len(function.__defaults__ or ())
            if not code.co_posonlyargcount:
                self._names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]

    def check(self, positional: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Check the arguments of a call. A call has positional arguments or named ones, not both.

        Raises:
            WrongArguments: they do not fit.
        """
        names = self._names
        if not named:
            fits = self._least <= len(positional) <= self._most
        elif names is None:
            fits = False  # this is not certain
        else:
            fits = all(name in names for name in named) and all(name in named for name in names[: self._least])
        if not fits:
            self._bind(positional, named)

    def _bind(self, positional: Sequence[Any], named: Mapping[str, Any]) -> None:
        try:
            signature = self._procedure.signature()
        except ValueError:  # as for some functions in C
            return
        try:
            signature.bind(*positional, **named)
        except TypeError as error:
            # Without the defaults, which may be secret.
            empty = type(signature).empty
            names = [
                str(parameter.replace(default=empty, annotation=empty)) + ("" if parameter.default is empty else "=...")
                for parameter in signature.parameters.values()
            ]
            raise WrongArguments(f"{error}; the procedure takes ({', '.join(names)})") from error
