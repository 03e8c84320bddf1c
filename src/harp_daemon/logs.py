"""Structured logs: one event per line, a constant text, and a field for each value.

A log call passes its values in `extra`; both formatters print all of them:
``log.info("call started", extra={"call": call_id, "procedure": name})``. A line feed in a value does not start a new
line.
"""

from __future__ import annotations

import json
import logging
import logging.config
import logging.handlers
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

#: The attributes that every log record has; all others are from `extra`.
_STANDARD_ATTRIBUTES = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}

_SYSLOG_SOCKET = "/dev/log"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in record.__dict__.items() if key not in _STANDARD_ATTRIBUTES}


def _timestamp(record: logging.LogRecord) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{moment}.{int(record.msecs):03d}Z"


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""


class JSONFormatter(logging.Formatter):
    """An event as one JSON object: time, level, logger, event, then the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        event: dict[str, Any] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if traceback := _traceback(self, record):
            event["traceback"] = traceback
        return json.dumps(event, default=str)


class TextFormatter(logging.Formatter):
    """An event as text: time, level, logger, event, then ``field=value`` pairs.

    Args:
        timestamp: whether the line begins with the time; syslog adds its own.
    """

    def __init__(self, timestamp: bool = True) -> None:
        super().__init__()
        self._timestamp = timestamp

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        start = f"{_timestamp(record)} " if self._timestamp else ""
        pairs = "".join(f" {key}={_shown(value)}" for key, value in _fields(record).items())
        if traceback := _traceback(self, record):
            pairs += f" traceback={json.dumps(traceback)}"
        return f"{start}{record.levelname} {record.name}: {_one_line(record.getMessage())}{pairs}"


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    plain = text.isprintable() and text != "" and not any(mark in text for mark in ' "=')
    return text if plain or not isinstance(value, str) else json.dumps(text)


def _one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]


def configure(
    *,
    level: str = "INFO",
    form: str = "text",
    syslog: bool = False,
    name: str = "harp",
    config: Mapping[str, Any] | None = None,
) -> None:
    """Send the program's log to stderr or to syslog, and close the previous handlers.

    Args:
        level: the lowest level that is logged: ``DEBUG``, ``INFO``, ``WARNING`` or ``ERROR``.
        form: ``text`` or ``json``.
        syslog: whether to log to the local syslog socket instead of stderr.
        name: the program's name in syslog.
        config: the argument for `logging.config.dictConfig`; it replaces the other arguments.

    Raises:
        ValueError: `logging.config.dictConfig` rejects `config`; the message gives the reason.
        OSError: a log file or the syslog socket cannot be opened.
    """
    if config is not None:
        _configure_from(config)
        return
    handler: logging.Handler
    if syslog:
        handler = logging.handlers.SysLogHandler(_SYSLOG_SOCKET, logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.ident = f"{name}[{os.getpid()}]: "
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if form == "json" else TextFormatter(timestamp=not syslog))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    # Omit the record attributes that the formatters do not print: they are half of the cost of an event.
    logging.logThreads = logging.logMultiprocessing = logging.logProcesses = False
    logging._srcfile = None
    if hasattr(logging, "logAsyncioTasks"):
        logging.logAsyncioTasks = False


def _configure_from(config: Mapping[str, Any]) -> None:
    try:
        # Existing loggers continue to log even if the configuration does not name them.
        logging.config.dictConfig({"version": 1, **config, "disable_existing_loggers": False})
    except (ValueError, TypeError, AttributeError, ImportError, KeyError) as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise ValueError(f"{error}{cause}") from error


def reopen() -> None:
    """Reopen every log file, after a rotation; stdout and stderr stay open."""
    for handler in _all_handlers(logging.root.manager.loggerDict):
        if isinstance(handler, logging.FileHandler):
            handler.acquire()
            try:
                # A FileHandler without a stream opens its file again at the next event.
                if handler.stream is not None:
                    handler.stream.close()
                handler.stream = None
            finally:
                handler.release()
    logging.getLogger(__name__).info("log files reopened")


def _all_handlers(loggers: Mapping[str, object]) -> set[logging.Handler]:
    known = [logging.getLogger(), *(logger for logger in loggers.values() if isinstance(logger, logging.Logger))]
    return {handler for logger in known for handler in logger.handlers}
