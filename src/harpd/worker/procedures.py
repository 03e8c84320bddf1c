"""The procedures file: run it, and find the procedures that it exposes."""

from __future__ import annotations

import os
import sys
from types import MappingProxyType, ModuleType

from harp_daemon.regular_files import read_regular
from harpd.proc import Procedure, check_function, check_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: The file's module is in `sys.modules` by this name, because some libraries look up the module of a class.
_MODULE_NAME = "harpd_procedures"
#: Seconds for a procedures file to load. The frontend waits longer.
LOAD_TIMEOUT = 50.0
_MAX_TEXT_LENGTH = 2000  # of an exception in an error message, in characters


class ProceduresError(Exception):
    """The procedures file cannot be loaded. The message names file, line and cause."""


def load_procedures(file: str | os.PathLike[str]) -> Mapping[str, Procedure]:
    """Run a procedures file and return its procedures by name. Raises `ProceduresError`."""
    path = os.fspath(file)
    module = sys.modules[_MODULE_NAME] = ModuleType(_MODULE_NAME)
    module.__file__ = path
    try:
        text = read_regular(path)
        code = compile(text, path, "exec", dont_inherit=True)  # without the __future__ imports of this module
        exec(code, module.__dict__)  # noqa: S102 - running it is the purpose
    except BaseException as error:
        raise ProceduresError(_describe(path, error)) from error
    # By type: `isinstance` reads ``__class__`` of the value, which may raise for a lazy object.
    found = {name: value for name, value in vars(module).items() if issubclass(type(value), Procedure)}
    for name, procedure in found.items():
        try:
            check_options(procedure)
            check_function(procedure)
        except (AttributeError, TypeError, ValueError) as error:
            raise ProceduresError(f"{path}: {name}: {error}") from error
    return MappingProxyType(found)


def _describe(path: str, error: BaseException) -> str:
    """Return the message for an exception of a procedures file: file, line and cause."""
    if isinstance(error, OSError) and error.filename == path:
        return f"{path}: {error.strerror}"
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}: {type(error).__name__}: {error.msg}"
    try:
        text = " ".join(str(error).split())[:_MAX_TEXT_LENGTH]
    except BaseException:  # noqa: BLE001 - the exception's own __str__ may fail, too
        text = "(str() of the exception failed)"
    import traceback  # large, and only needed here

    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"{path}:{lines[-1]}" if lines else path
    return f"{where}: {type(error).__name__}: {text}"
