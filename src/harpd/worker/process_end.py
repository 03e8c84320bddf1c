"""The end of a worker's process: if its calls require it, the process ends as Python does.

Python joins threads, runs exit handlers (which remove temporary directories and end children of `multiprocessing`) and
closes files. That takes milliseconds. Nearly all calls need none of this: their workers end after a cheap check.

The interpreter is not finalized, because that would also end objects that the zygote has created for all workers: a
temporary directory, a connection. Exit handlers and finalizers that the procedures file registers while it is loaded
do not run. A file that it opens then is flushed but not closed.
"""

from __future__ import annotations

import _io
import _thread
import atexit
import gc
import os
import select
import sys

from harpd.proc import Cancelled, TimeLimit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sized
    from typing import Any

    from harpd.worker.signals import SignalGuard

#: The types in which Python buffers the data of files. Files of other types, as of `gzip`, have one of these.
_BUFFERS = {_io.TextIOWrapper, _io.BufferedWriter, _io.BufferedRandom, _io.BufferedRWPair}
_STDERR = 2


#: How many descriptors above those of the zygote are looked at: a call that leaves a file open has seldom more.
_DESCRIPTORS = 64


class ProcessEnd:
    """The end of workers. Create it in the zygote when the procedures file is loaded: it flushes the file's files."""

    def __init__(self) -> None:
        modules: dict[str, Any] = sys.modules
        atexit._clear()
        # Exit handlers of the standard library that the zygote has registered, and their inputs.
        self._handlers: list[Callable[[], object]] = []
        self._handler_inputs: list[Sized] = []
        self._always_finish = False
        if weakref := modules.get("weakref"):
            for info in weakref.finalize._registry.values():
                info.atexit = False
            self._handlers.append(weakref.finalize._exitfunc)
            self._handler_inputs.append(weakref.finalize._registry)
        if util := modules.get("multiprocessing.util"):
            children = modules["multiprocessing.process"]._children
            children.clear()
            self._handlers.append(util._exit_function)
            self._handler_inputs += [util._finalizer_registry, children]
        if logging := modules.get("logging"):
            self._handlers.append(logging.shutdown)
            self._handler_inputs.append(logging._handlerList)
            unbuffered = (logging.StreamHandler, logging.NullHandler)  # these do not buffer events
            self._always_finish = not all(
                isinstance(handler(), (*unbuffered, type(None))) for handler in logging._handlerList
            )
        # Those of stdout and stderr are flushed after each call.
        self._files = [file for file in gc.get_objects() if type(file) in _BUFFERS and not _is_standard(file)]
        _flush(self._files)
        self._descriptors = select.poll()
        lowest_free = os.dup(_STDERR)
        os.close(lowest_free)
        for descriptor in range(_STDERR + 1, lowest_free + _DESCRIPTORS):
            self._descriptors.register(descriptor, 0)
        self._counts_before = self._count()

    def record_counts(self) -> None:
        """Count the resources of a newly forked process. Threads of the zygote count, though they do not exist here."""
        self._counts_before = self._count()

    def _count(self) -> tuple[int, ...]:
        """Return the numbers of resources at the end: threads, exit handlers, closed descriptors, and others."""
        try:
            closed = len(self._descriptors.poll(0))  # the others have no event, as none was asked for
        except OSError:  # more descriptors than a process may have
            closed = -1
        return _thread._count(), atexit._ncallbacks(), closed, *map(len, self._handler_inputs)

    def finish(self, guard: SignalGuard) -> None:
        """Do what Python does when a process ends. A signal of the supervisor, which guard raises, cuts it short."""
        _flush(self._files)
        if self._count() == self._counts_before and not self._always_finish:
            return
        modules: dict[str, Any] = sys.modules
        try:
            guard.deliver()
            if threading := modules.get("threading"):
                threading._shutdown()
            atexit._run_exitfuncs()
            for handler in self._handlers:
                handler()
            _close_files()
            gc.collect()
        except (TimeLimit, Cancelled):
            pass
        except BaseException:  # noqa: BLE001 - the result was sent
            sys.excepthook(*sys.exc_info())
        guard.defer()
        if multiprocessing := modules.get("multiprocessing.process"):
            for child in multiprocessing.active_children():  # their end was waited for, and a signal has cut that short
                child.kill()
        _flush((*self._files, sys.stdout, sys.stderr))


def _is_standard(file: Any) -> bool:
    try:
        return bool(file.fileno() <= _STDERR)
    except (OSError, ValueError):  # in memory, or closed
        return False


def _flush(files: Iterable[Any]) -> None:
    for file in files:
        try:
            file.flush()
        except BaseException:  # noqa: BLE001, S110 - a procedure may have closed or replaced it
            pass


def _close_files() -> None:
    """Close the files that calls have opened, also those in cycles: first what writes to other files."""
    temporary = getattr(sys.modules.get("tempfile"), "_TemporaryFileWrapper", ())
    found = [item for item in gc.get_objects() if issubclass(type(item), (_io._BufferedIOBase, _io._TextIOBase))]
    wrappers = [item for item in gc.get_objects() if temporary and type(item) is temporary]
    found.sort(key=lambda file: (not isinstance(file, _io._TextIOBase), type(file) in _BUFFERS))
    for file in (*wrappers, *found):
        try:
            file.close()
        except (TimeLimit, Cancelled):
            raise
        except BaseException:  # noqa: BLE001 - as Python does at the end of a process
            sys.excepthook(*sys.exc_info())
