"""Recorder of function entries. Python imports it at the start of each process whose PYTHONPATH has this directory.

While recording is switched on, each entry appends one line to a file that all processes share: process id,
module, function. Each line is written immediately, so no entry is lost when a process leaves by `os._exit`.
A forked process inherits the recorder; threads inherit it from `threading`.

An entry is a `call` event of `sys.setprofile`: the call of a Python function, or the resumption of a generator or a
coroutine. The recorder imports only built-in modules, because the zygote must stay lean.
"""

from __future__ import annotations

import mmap
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

__all__ = ["DIRECTORY", "ENTRIES", "SWITCH", "make_recorder"]

#: The environment variable that names the directory of the two files.
DIRECTORY = "HARP_TRACE"
#: The file of the entries, and the file of one byte that is not 0 while recording is switched on.
ENTRIES, SWITCH = "entries", "switch"


def make_recorder(directory: str) -> Callable[[FrameType, str, Any], None]:
    """Return the function for `sys.setprofile`.

    Args:
        directory: the directory of the two files.

    Raises:
        OSError: a file cannot be opened.
    """
    entries = os.open(os.path.join(directory, ENTRIES), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    with open(os.path.join(directory, SWITCH), "rb") as file:
        switch = mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ)
    threads_follow = False

    def record(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal threads_follow
        if event != "call":
            return
        if not threads_follow and (set_profile := getattr(sys.modules.get("threading"), "setprofile", None)):
            threads_follow = True
            set_profile(record)
        if switch[0]:
            names = frame.f_globals
            module = names.get("__name__")
            if module == "__main__" and names.get("__spec__"):
                module = names["__spec__"].name
            line = f"{os.getpid()}\t{module}\t{frame.f_code.co_qualname}\n"
            os.write(entries, line.encode())

    return record


if DIRECTORY in os.environ:
    sys.setprofile(make_recorder(os.environ[DIRECTORY]))
