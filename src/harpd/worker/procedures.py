"""Loads the procedures file: runs it, and finds what it exposes."""

from __future__ import annotations

import os
import sys
from types import MappingProxyType, ModuleType

from harpd.proc import Procedure, check_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ProceduresError", "load_procedures"]

#: The name that the file's module has. It is registered, as some modules look their classes' modules up.
MODULE_NAME = "harpd_procedures"


#: The most characters of an exception's text that go into a message.
_LONGEST_TEXT = 2000


class ProceduresError(Exception):
    """The procedures file can't be loaded. The message names file, line and cause."""


def load_procedures(file: str | os.PathLike[str]) -> Mapping[str, Procedure]:
    """Run a procedures file and return its procedures by name.

    Args:
        file: its path.

    Raises:
        ProceduresError: it can't be read, or raised; SystemExit counts as raising.
    """
    path = os.fspath(file)
    module = sys.modules[MODULE_NAME] = ModuleType(MODULE_NAME)
    module.__file__ = path
    try:
        with open(path, "rb") as opened:
            text = opened.read()
        code = compile(text, path, "exec", dont_inherit=True)  # our own __future__ is not the file's
        exec(code, module.__dict__)  # noqa: S102 - running it is the purpose
    except BaseException as error:
        raise ProceduresError(_describe(path, error)) from error
    # By the type itself: `isinstance` asks the value, and a lazy one may answer with an exception.
    found = {name: value for name, value in vars(module).items() if issubclass(type(value), Procedure)}
    for name, procedure in found.items():
        try:
            check_options(procedure)
        except (AttributeError, TypeError, ValueError) as error:
            raise ProceduresError(f"{path}: {name}: {error}") from error
    return MappingProxyType(found)


def _describe(path: str, error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename == path:
        return f"{path}: {error.strerror}"
    try:
        text = " ".join(str(error).split())[:_LONGEST_TEXT]
    except BaseException:  # noqa: BLE001 - the exception's own __str__ may fail, too
        text = "(the exception's text can't be made)"
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}: {type(error).__name__}: {error.msg}"
    import traceback  # large, and only needed here

    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"{path}:{lines[-1]}" if lines else path
    return f"{where}: {type(error).__name__}: {text}"
