"""Loads the procedures file: runs it, and finds what it exposes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType

from harpd.proc import Procedure

__all__ = ["ProceduresError", "load_procedures"]

#: The name that the file's module has. It is registered, as some modules look their classes' modules up.
MODULE_NAME = "harpd_procedures"


class ProceduresError(Exception):
    """The procedures file can't be loaded. The message names file, line and cause."""


def load_procedures(path: Path) -> Mapping[str, Procedure]:
    """Run a procedures file and return its procedures by name.

    Args:
        path: the file.

    Raises:
        ProceduresError: it can't be read, or raised; SystemExit counts as raising.
    """
    module = ModuleType(MODULE_NAME)
    module.__file__ = str(path)
    before = sys.modules.get(MODULE_NAME)
    sys.modules[MODULE_NAME] = module
    try:
        exec(compile(path.read_bytes(), path, "exec"), module.__dict__)  # noqa: S102 - running it is the purpose
    except BaseException as error:
        if before is not None:
            sys.modules[MODULE_NAME] = before
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ProceduresError(_describe(path, error)) from error
    return MappingProxyType({name: value for name, value in vars(module).items() if isinstance(value, Procedure)})


def _describe(path: Path, error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename == str(path):
        return f"{path}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}: {type(error).__name__}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    return f"{where}: {type(error).__name__}: {text}"
