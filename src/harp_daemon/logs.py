"""Structured logs: one event per line, a constant text, and a field for each value in `extra` of the log call.

`harp_daemon.log_queue` delivers them, so that no log call blocks or raises.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from _json import encode_basestring_ascii, make_encoder
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from harp_daemon.log_queue import EventQueue, HandlerQueue, OutputQueue, SyslogQueue

#: How many attributes each log record has; those of `extra` follow them, and some that other formatters add.
_STANDARD_ATTRIBUTES = len(logging.makeLogRecord({}).__dict__)
_ADDED_ATTRIBUTES = ("message", "asctime")
#: Maximum number of characters of a field; those of a traceback and of a line that a call has printed.
_MAX_LENGTH, _MAX_LENGTHS = 256, {"traceback": 16 * 1024, "text": 8192}
#: Maximum length of all longer fields of an event together, as they are written: a log line has at most 4 KiB. A field
#: of up to `_SHORT` characters is written in any case.
_MAX_FIELDS, _SHORT = 2200, 64
#: Text that needs no quotes.
_PLAIN = re.compile(r'[^ "=]+')

#: Yields the pieces of a value's text. `json` makes an encoder anew for each value, which is a seventh of an event.
_encode_pieces = make_encoder(None, str, encode_basestring_ascii, None, ": ", ", ", False, False, True)


def _encode(value: Any) -> str:
    return "".join(_encode_pieces(value, 0))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = dict(islice(record.__dict__.items(), _STANDARD_ATTRIBUTES, None))
    for key in _ADDED_ATTRIBUTES:
        fields.pop(key, None)
    for value in fields.values():
        if type(value) is str and len(value) <= _SHORT and value.isascii() and value.isprintable():
            continue
        if value is not None and not isinstance(value, (bool, int, float)):
            return _cut_fields(fields)
    return fields


def _cut_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Cut values that are too long: peers choose some of them. Their length is written in their place."""
    room = _MAX_FIELDS
    for key, value in fields.items():
        length = _MAX_LENGTHS.get(key, _MAX_LENGTH)
        if value is None or isinstance(value, (bool, int, float)):
            continue
        is_simple = isinstance(value, str) and value.isascii() and value.isprintable()
        if is_simple and len(value) <= max(_SHORT, min(length, room)):
            room -= len(value) if len(value) > _SHORT else 0
            continue
        text = value if isinstance(value, str) else _encode(value)
        kept, allowed = text[:length], 4 * length if key in _MAX_LENGTHS else min(4 * length, room)
        while len(written := _encode(kept)) > allowed and kept:
            kept = kept[: len(kept) * allowed // len(written)]
        if len(kept) < len(text):
            fields[key] = f"{kept}... ({len(text)} characters)"
        if key not in _MAX_LENGTHS:
            room = max(room - len(written), 0)
    return fields


def _fields_text(fields: Mapping[str, Any]) -> str:
    """Return `` NAME=VALUE`` for each field."""
    text = ""
    for key, value in fields.items():
        plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.isprintable()
        text += f" {key}={value if plain else _encode(value)}"
    return text


#: Returns the event without the fields, which `_EventRecord` adds.
_get_event = logging.LogRecord.getMessage


class _EventFormatter(logging.Formatter):
    """The part that both forms of an event share."""

    _second, _second_text = 0, ""

    def _timestamp(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second:
            self._second, self._second_text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._second_text}.{int(record.msecs):03d}Z"

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        fields = _fields(record)
        if record.exc_info:
            fields |= _cut_fields({"traceback": self.formatException(record.exc_info)})
        return fields


class JSONFormatter(_EventFormatter):
    """An event as one JSON object: time, level, logger, event, then the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time, level, event = self._timestamp(record), record.levelname.lower(), _get_event(record)
        fields = self._fields(record) if record.exc_info else _fields(record)
        return _encode({"time": time, "level": level, "logger": record.name, "event": event, **fields})


class TextFormatter(_EventFormatter):
    """An event as text: time, level, logger, event, then ``field=value`` pairs. Syslog adds its own time."""

    def __init__(self, timestamp: bool = True) -> None:
        super().__init__()
        self._has_timestamp = timestamp

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        start = f"{self._timestamp(record)} " if self._has_timestamp else ""
        event = _get_event(record)
        line = f"{start}{record.levelname} {record.name}: {event if event.isprintable() else _encode(event)[1:-1]}"
        return line + _fields_text(self._fields(record))


class _EventRecord(logging.LogRecord):
    """A log record whose message has the fields, too: for a format of the operator with ``%(message)s`` only."""

    def getMessage(self) -> str:
        """Return event and fields as text."""
        message = super().getMessage()
        fields = _fields_text(_fields(self))
        # A handler may pass on a copy whose event is the message.
        return message if fields in message else message + fields


def write_per_turn(call_soon: Callable[[Callable[[], None]], object] | None) -> None:
    """Deliver the events of each turn of this thread's event loop together; None: the loop has ended.

    `call_soon` has a function called at the end of the loop's turn. Events of other threads are delivered immediately.
    """
    flush()
    EventQueue.turn = None if call_soon is None else (call_soon, threading.get_ident())


def flush() -> None:
    """Deliver all events, as far as that is possible within a bounded time: for the end of the process."""
    for queue in _queues():
        queue.drain()


def _loggers() -> list[logging.Logger]:
    return [logging.root, *(one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger))]


def _queues() -> list[EventQueue]:
    found = [handler for logger in _loggers() for handler in logger.handlers if isinstance(handler, EventQueue)]
    return list(dict.fromkeys(found))


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
    has the reason. Raises OSError: a log file or the syslog socket cannot be opened. After an error, the program logs
    to stderr.
    """
    for queue in [*_queues(), logging.lastResort]:
        if isinstance(queue, EventQueue):
            queue.close()
    for logger in _loggers():
        logger.handlers = [one for one in logger.handlers if not isinstance(one, EventQueue)]
    # Python would write these to stderr, which may block.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    sys.unraisablehook = _log_unraisable
    logging.setLogRecordFactory(logging.LogRecord if config is None else _EventRecord)
    try:
        if config is None:
            formatter = JSONFormatter() if form == "json" else TextFormatter(timestamp=not syslog)
            handler = SyslogQueue(formatter.format, name) if syslog else OutputQueue(formatter.format)
            logging.basicConfig(handlers=[handler], level=level, force=True)
        else:
            _apply(config)
    except BaseException:
        logging.basicConfig(handlers=[OutputQueue(TextFormatter().format)], level=logging.INFO, force=True)
        raise
    # Omit the record attributes that the formatters do not print: they are half of the cost of an event.
    if config is None:
        logging.logThreads = logging.logMultiprocessing = logging.logProcesses = False
        logging._srcfile = None
        if hasattr(logging, "logAsyncioTasks"):
            logging.logAsyncioTasks = False


def _apply(config: Mapping[str, Any]) -> None:
    """Apply a configuration for `logging.config.dictConfig`, and put a queue before each of its handlers."""
    import logging.config  # large, and only needed here

    try:
        # Existing loggers continue to log even if the configuration does not name them.
        logging.config.dictConfig({"version": 1, **config, "disable_existing_loggers": False})
    except (ValueError, TypeError, AttributeError, ImportError, KeyError) as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise ValueError(f"{error}{cause}") from error
    stderr = OutputQueue(TextFormatter().format)  # not before `dictConfig`, which closes all handlers
    stderr.setLevel(logging.WARNING)
    logging.lastResort = stderr  # for events without handler; Python's own handler may block
    queues: dict[logging.Handler, EventQueue] = {}
    for logger in _loggers():
        for handler in logger.handlers:
            if handler not in queues:
                queues[handler] = _queue(handler, stderr)
        logger.handlers = [queues[handler] for handler in logger.handlers]


def _queue(handler: logging.Handler, stderr: OutputQueue) -> EventQueue:
    if type(handler) is not logging.StreamHandler or handler.stream not in (sys.stderr, sys.stdout):
        return HandlerQueue(handler, stderr)
    queue = OutputQueue(handler.format, handler.stream.fileno())
    queue.setLevel(handler.level)
    queue.filters = handler.filters
    return queue


def _log_unraisable(unraisable: Any) -> None:
    """Log an exception that Python cannot raise, for example of a finalizer."""
    where = f"{unraisable.err_msg or 'Exception ignored in'}: {unraisable.object!r}"
    raised = (unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback)
    logging.getLogger(__name__).error("unexpected error", exc_info=raised, extra={"where": where})


def count_events() -> Counter[str]:
    """Count the events from now on, by level; return the counter."""
    if EventQueue.events is None:
        EventQueue.events = Counter({"debug": 0, "info": 0, "warning": 0, "error": 0})
    return EventQueue.events


def reopen() -> None:
    """Reopen every log file, after a rotation; stdout and stderr stay open."""
    for queue in _queues():
        if isinstance(queue, HandlerQueue):
            queue.reopen()
    logging.getLogger(__name__).info("log files reopened")


def reopen_stderr() -> None:
    """Log to the file that stderr refers to now; the previous one is closed."""
    for queue in [*_queues(), logging.lastResort]:
        if isinstance(queue, OutputQueue):
            queue.reopen()
