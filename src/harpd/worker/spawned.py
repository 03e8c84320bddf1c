"""The main module of processes that `multiprocessing` spawns in a call: it loads the procedures file.

The process is executed, not forked. It imports this module as its main module, before it looks up the function to run:
pickle names the function as a member of the module of the procedures file. See `announce`.
"""

from __future__ import annotations

import os
import sys

from harpd.worker.procedures import load_procedures

_VARIABLE = "HARPD_PROCEDURES"


def announce(path: str) -> None:
    """Have `multiprocessing` use this module in processes that it spawns from this process or its children."""
    os.environ[_VARIABLE] = path
    main = sys.modules["__main__"]
    main.__spec__ = sys.modules[__name__].__spec__


if __name__ == "__mp_main__":
    load_procedures(os.environ[_VARIABLE])
