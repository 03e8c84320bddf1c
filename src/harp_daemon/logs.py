"""Structured logs: one event per line, a constant text, and a field for each value in `extra` of the log call.

An event loop writes the events of one turn together, see `write_per_turn`: a write for each event would cost as much as
its text. SIGKILL loses at most the events of the present turn.
"""

from __future__ import annotations

import json
import logging
import logging.config
import logging.handlers
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

#: How many attributes each log record has; those of `extra` follow them, and some that other formatters add.
_STANDARD_ATTRIBUTES = len(logging.makeLogRecord({}).__dict__)
_ADDED_ATTRIBUTES = ("message", "asctime")
#: Text that needs no quotes.
_PLAIN = re.compile(r'[^ "=]+')
_STDERR = 2

_encode = json.JSONEncoder(default=str).encode


class _EventFormatter(logging.Formatter):
    """The part that both forms of an event share."""

    _second, _second_text = 0, ""

    def _timestamp(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second:
            self._second, self._second_text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._second_text}.{int(record.msecs):03d}Z"

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        items = islice(record.__dict__.items(), _STANDARD_ATTRIBUTES, None)
        fields = {key: value for key, value in items if key not in _ADDED_ATTRIBUTES}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return fields


class JSONFormatter(_EventFormatter):
    """An event as one JSON object: time, level, logger, event, then the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time, level, event = self._timestamp(record), record.levelname.lower(), record.getMessage()
        return _encode({"time": time, "level": level, "logger": record.name, "event": event, **self._fields(record)})


class TextFormatter(_EventFormatter):
    """An event as text: time, level, logger, event, then ``field=value`` pairs. Syslog adds its own time."""

    def __init__(self, timestamp: bool = True) -> None:
        super().__init__()
        self._has_timestamp = timestamp

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        start = f"{self._timestamp(record)} " if self._has_timestamp else ""
        event = record.getMessage()
        line = f"{start}{record.levelname} {record.name}: {event if event.isprintable() else _encode(event)[1:-1]}"
        for key, value in self._fields(record).items():
            plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.isprintable()
            line += f" {key}={value if plain else _encode(value)}"
        return line


class _EventWriter(logging.Handler):
    """A handler that writes lines to stderr: at once, or the lines of one turn of an event loop together."""

    #: Calls a function at the end of the loop's turn, and the thread of that loop; None: lines are written at once.
    turn: tuple[Callable[[Callable[[], None]], object], int] | None = None

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._format = formatter.format
        self._lines: list[str] = []
        self._flush_is_due = False

    def handle(self, record: logging.LogRecord) -> bool:
        """Add an event. Another thread than the loop's writes it at once, after those that wait."""
        try:
            self._lines.append(self._format(record))
        except Exception:  # noqa: BLE001 - a log call never raises
            self.handleError(record)
        if self.turn is None or threading.get_ident() != self.turn[1]:
            self.flush()
        elif not self._flush_is_due:
            self._flush_is_due = True
            try:
                self.turn[0](self.flush)
            except RuntimeError:  # the loop is closed
                self.flush()
        return True

    def flush(self) -> None:
        """Write all lines that wait. They are lost if stderr is closed or, while it does not block, is full."""
        self._flush_is_due = False
        assert self.lock is not None
        with self.lock:  # other threads may append meanwhile, at the end
            count = len(self._lines)
            data = "".join([f"{line}\n" for line in self._lines[:count]]).encode("utf-8", "backslashreplace")
            del self._lines[:count]
            try:
                while data:
                    data = data[os.write(_STDERR, data) :]
            except OSError:
                pass


def write_per_turn(call_soon: Callable[[Callable[[], None]], object] | None) -> None:
    """Write the events of each turn of this thread's event loop together; None: the loop has ended.

    `call_soon` has a function called at the end of the loop's turn. Events of other threads are written at once.
    """
    flush()
    _EventWriter.turn = None if call_soon is None else (call_soon, threading.get_ident())


def flush() -> None:
    """Write all events that wait for the end of the turn: call this before the process ends without cleaning up."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def configure(
    *,
    level: str = "INFO",
    form: str = "text",
    syslog: bool = False,
    name: str = "harp",
    config: Mapping[str, Any] | None = None,
) -> None:
    """Send the program's log to stderr or to syslog, and close the previous handlers.

    `level` is the lowest level that is logged, `form` is ``text`` or ``json``, `name` is the program's name in syslog.
    `config`, the argument for `logging.config.dictConfig`, replaces the other arguments; if it is rejected, ValueError
    has the reason. Raises OSError: a log file or the syslog socket cannot be opened.
    """
    flush()
    if config is not None:
        try:
            # Existing loggers continue to log even if the configuration does not name them.
            logging.config.dictConfig({"version": 1, **config, "disable_existing_loggers": False})
        except (ValueError, TypeError, AttributeError, ImportError, KeyError) as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from error
            cause = f": {error.__cause__}" if error.__cause__ else ""
            raise ValueError(f"{error}{cause}") from error
        return
    formatter = JSONFormatter() if form == "json" else TextFormatter(timestamp=not syslog)
    handler: logging.Handler
    if syslog:
        handler = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.ident = f"{name}[{os.getpid()}]: "
        handler.setFormatter(formatter)
    else:
        handler = _EventWriter(formatter)
    logging.basicConfig(handlers=[handler], level=level, force=True)
    # Omit the record attributes that the formatters do not print: they are half of the cost of an event.
    logging.logThreads = logging.logMultiprocessing = logging.logProcesses = False
    logging._srcfile = None
    if hasattr(logging, "logAsyncioTasks"):
        logging.logAsyncioTasks = False


def reopen() -> None:
    """Reopen every log file, after a rotation; stdout and stderr stay open."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
        if isinstance(handler, logging.FileHandler) and handler.lock is not None:
            with handler.lock:
                if handler.stream is not None:
                    handler.stream.close()
                handler.stream = None  # it opens its file again at the next event
    logging.getLogger(__name__).info("log files reopened")
