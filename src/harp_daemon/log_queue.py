"""Delivers log events to stderr, to syslog, or to any handler of `logging`, and never delays the program.

Theory of operation
===================

Each destination has a queue of bounded size. An event loop delivers the events of one turn together, see
`EventQueue.turn`: a write for each event would cost as much as its text. SIGKILL loses at most the events of the
present turn.

Stderr and syslog reject data instead of blocking, so the program writes to them directly. Only while they reject data,
a thread writes, in the same order. Other handlers may block, so a thread always calls them.

An event is dropped if the queue has no room, or if its delivery fails. The event ``log events dropped`` has the number,
as soon as the destination accepts events again. A handler that fails is also reported on stderr.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import stat
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

#: The most bytes of undelivered events in a queue, about; and those that an event needs beside its text.
_MAX_BYTES, _EVENT_BYTES = 8 * 1024 * 1024, 256
#: Bytes of one write, unless a line is longer: a pipe accepts them as a whole, so lines of processes do not mix.
_WRITE_BYTES = select.PIPE_BUF
#: The most bytes of an event in syslog; a socket of datagrams rejects more than about 200 KiB.
_SYSLOG_BYTES = 60 * 1024
#: At the end, seconds without an accepted event after which the remaining events are dropped; and the longest time in
#: seconds for a destination that accepts events slowly.
_CLOSE_TIMEOUT, _MAX_CLOSE_TIME = 1.0, 5.0
#: Seconds until the next attempt at a destination that rejects data: the longest time, and the shortest.
_MAX_WAIT, _MIN_WAIT = 1.0, 0.001
#: Seconds between two reports of a handler that fails.
_REPORT_INTERVAL = 60.0
#: The socket of syslog.
SYSLOG_ADDRESS = "/dev/log"
_DAEMON_FACILITY = 3 << 3


class EventQueue(logging.Handler):
    """The events that a destination has not accepted. `direct`: the destination never blocks."""

    #: Calls a function at the end of the loop's turn, and the thread of that loop; None: no delay.
    turn: ClassVar[tuple[Callable[[Callable[[], None]], object], int] | None] = None
    #: The number of events by level; None: they are not counted.
    events: ClassVar[Counter[str] | None] = None

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self._direct = direct
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[tuple[int, Any]] = deque()  # bytes, and what `_prepare` has returned
        self._bytes = self._dropped = self._delivered = 0
        self._reason = ""  # why the last event was dropped
        self._flush_is_due = self._thread_delivers = self._ended = False
        self._thread: threading.Thread | None = None

    def _prepare(self, record: logging.LogRecord) -> tuple[int, Any]:
        """Return the size of an event in bytes and the event in the form for `_deliver`."""
        raise NotImplementedError

    def _deliver(self) -> tuple[int, bytes]:
        """Deliver one or more events; return how many, and what remains of the last one.

        Raises BlockingIOError: it does not accept data now. After any other exception, the first event is lost.
        """
        raise NotImplementedError

    def _wait(self) -> None:
        """Wait until the destination may accept data again."""
        time.sleep(_MAX_WAIT)

    def handle(self, record: logging.LogRecord) -> bool:
        """Add an event. A thread other than the loop's delivers it immediately, after the waiting events."""
        if self.events is not None:
            with self._lock:
                self.events[record.levelname.lower()] += 1
        try:
            self._add(*self._prepare(record))
        except Exception as error:  # noqa: BLE001 - a log call never raises
            self._drop(str(error))
        if self.turn is None or threading.get_ident() != self.turn[1]:
            self.flush()
        elif not self._flush_is_due:
            self._flush_is_due = True
            try:
                self.turn[0](self.flush)
            except RuntimeError:  # the loop is closed
                self.flush()
        return True

    def _add(self, size: int, item: Any) -> None:
        with self._lock:
            if self._bytes + size > _MAX_BYTES and self._waiting:
                self._drop("the destination does not accept events")
            else:
                self._waiting.append((size, item))
                self._bytes += size

    def _drop(self, reason: str) -> None:
        with self._lock:
            self._dropped += 1
            self._reason = reason

    def flush(self) -> None:
        """Deliver all events that wait, or have the thread deliver them. It does not block."""
        with self._lock:
            self._flush_is_due = False
            if self._thread_delivers or self._ended or not self._waiting:
                return
            if self._direct:
                with suppress(BlockingIOError):
                    while self._waiting:
                        self._deliver_next()
                    return
            self._thread_delivers = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="log")
                self._thread.start()
            else:
                self._changed.notify_all()

    def _run(self) -> None:
        """Deliver all events whenever `_thread_delivers` is set."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread_delivers = False
                    self._changed.notify_all()
                while not self._thread_delivers:
                    if self._ended:
                        return
                    self._changed.wait()
            try:
                self._deliver_next()
            except BlockingIOError:
                self._wait()

    def _deliver_next(self) -> None:
        """Deliver the next events; report dropped events once there is room. Raises BlockingIOError."""
        reason = rest = None
        try:
            count, rest = self._deliver()
        except BlockingIOError:
            raise
        except Exception as error:  # noqa: BLE001 - a handler may raise anything
            count, reason = 1, str(error) or type(error).__name__
        with self._lock:
            self._delivered += count
            for _ in range(count):
                self._bytes -= self._waiting.popleft()[0]
            if rest:
                self._waiting.appendleft((len(rest), rest))
                self._bytes += len(rest)
            if reason is not None:
                self._drop(reason)
                self._on_failure(reason)
            elif self._dropped and self._bytes <= _MAX_BYTES // 2:
                fields = {"events": self._dropped, "reason": self._reason}
                self._dropped = 0
                self._add(*self._prepare(_warning("log events dropped", fields)))

    def _on_failure(self, reason: str) -> None:
        """Handle that an event was lost."""

    def drain(self) -> bool:
        """Deliver all events; return whether that was possible. It waits while the destination accepts some."""
        self.flush()
        deadline = time.monotonic() + _MAX_CLOSE_TIME
        with self._lock:
            before = -1
            while self._thread_delivers and before != self._delivered and time.monotonic() < deadline:
                before = self._delivered
                self._changed.wait_for(lambda: not self._thread_delivers, _CLOSE_TIMEOUT)
            return not self._thread_delivers

    def close(self) -> None:
        """Deliver the last events, like `drain`, and end the thread."""
        delivered = self.drain()
        with self._lock:
            if not self._ended:
                self._ended = True
                self._changed.notify_all()  # the thread
                self._on_closed(delivered)
        super().close()

    def _on_closed(self, delivered: bool) -> None:
        """Release the destination. Unless all is delivered, the thread still uses it."""


class OutputQueue(EventQueue):
    """Writes lines to a descriptor, stderr by default."""

    def __init__(self, format: Callable[[logging.LogRecord], str], descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._format = format
        self._own: socket.socket | int | None = None
        super().__init__(self._open())

    def _open(self) -> bool:
        """Open the destination again, without the flag that other processes share; return whether it never blocks."""
        try:
            mode = os.fstat(self._descriptor).st_mode
            if stat.S_ISSOCK(mode):  # as from systemd
                self._own = socket.socket(fileno=os.dup(self._descriptor))
            elif not stat.S_ISREG(mode):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._own = os.open(f"/proc/self/fd/{self._descriptor}", flags)
        except OSError:  # another user's terminal or pipe
            return False
        return True

    def reopen(self) -> None:
        """Use the present file of the descriptor."""
        with self._lock:
            self._release()
            self._direct = self._open()

    def _release(self) -> None:
        own, self._own = self._own, None
        if isinstance(own, socket.socket):
            own.close()
        elif own is not None:
            os.close(own)

    def _prepare(self, record: logging.LogRecord) -> tuple[int, bytes]:
        try:
            found: Any = self.filter(record) if self.filters else record
            if not found:
                return 0, b""
            line = self._format(found if isinstance(found, logging.LogRecord) else record)
        except Exception as error:  # noqa: BLE001 - a filter or format of the operator may raise anything
            line = f"{record.levelname} {record.name}: {record.msg} (cannot format this event: {error})"
        data = f"{line}\n".encode("utf-8", "backslashreplace")
        return len(data), data

    def _deliver(self) -> tuple[int, bytes]:
        data, count = self._waiting[0][1], 1
        while count < len(self._waiting) and len(data) + self._waiting[count][0] <= _WRITE_BYTES:
            data += self._waiting[count][1]
            count += 1
        if not data:
            return count, b""
        if isinstance(self._own, socket.socket):
            written = self._own.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        else:
            written = os.write(self._descriptor if self._own is None else self._own, data)
        return count, data[written:]

    def _wait(self) -> None:
        _wait_writable(self._descriptor)

    def _on_closed(self, delivered: bool) -> None:
        if delivered:
            self._release()


class SyslogQueue(EventQueue):
    """Sends events to the local syslog. `name`: the program's. Raises OSError if syslog cannot be reached.

    While syslog restarts, events wait in the queue.
    """

    def __init__(self, format: Callable[[logging.LogRecord], str], name: str) -> None:
        self._format = format
        self._ident = f"{name}[{os.getpid()}]: "
        self._socket: socket.socket | None = _connect_syslog()
        super().__init__(direct=True)

    def _prepare(self, record: logging.LogRecord) -> tuple[int, bytes]:
        level = record.levelno
        severity = 7 if level < 20 else 6 if level < 30 else 4 if level < 40 else 3 if level < 50 else 2
        text = f"<{_DAEMON_FACILITY | severity}>{self._ident}{self._format(record)}"
        data = text.encode("utf-8", "backslashreplace")[:_SYSLOG_BYTES] + b"\0"
        return len(data), data

    def _deliver(self) -> tuple[int, bytes]:
        data = self._waiting[0][1]
        for _ in range(2):
            try:
                if self._socket is None:
                    self._socket = _connect_syslog()
                written = self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                return 1, data[written:]
            except BlockingIOError:
                raise
            except OSError:  # syslog has restarted and has another socket
                if self._socket is not None:
                    self._socket.close()
                self._socket = None
        raise BlockingIOError

    def _wait(self) -> None:
        if self._socket is None:
            time.sleep(_MAX_WAIT)
        else:
            _wait_writable(self._socket.fileno())

    def _on_closed(self, delivered: bool) -> None:
        if delivered and self._socket is not None:
            self._socket.close()
            self._socket = None


class HandlerQueue(EventQueue):
    """Calls any other handler, in a thread. `report` gets an event when it fails."""

    def __init__(self, handler: logging.Handler, report: logging.Handler) -> None:
        super().__init__(direct=False)
        self.setLevel(handler.level)
        self._handler = handler
        self._report = report
        self._reported_at = -_REPORT_INTERVAL
        self._error: BaseException | None = None
        handler.handleError = self._on_error  # type: ignore[method-assign]  # otherwise it would print to stderr

    def _on_error(self, record: logging.LogRecord) -> None:
        self._error = sys.exc_info()[1]

    def reopen(self) -> None:
        """Have the handler reopen its file, if it has one, after the events before."""
        if isinstance(self._handler, logging.FileHandler):
            self._add(0, None)
            self.flush()

    def _prepare(self, record: logging.LogRecord) -> tuple[int, logging.LogRecord]:
        texts = sum([len(value) for value in record.__dict__.values() if isinstance(value, str)])
        return _EVENT_BYTES + texts, record

    def _deliver(self) -> tuple[int, bytes]:
        handler, record = self._handler, self._waiting[0][1]
        self._error = None
        try:
            if record is not None:
                handler.handle(record)
            elif isinstance(handler, logging.FileHandler) and handler.stream is not None:
                handler.stream.close()
                handler.stream = None  # it opens its file again at the next event
        except Exception as error:  # noqa: BLE001 - a handler may raise anything
            self._error = error
        if self._error is not None:
            raise RuntimeError(str(self._error) or type(self._error).__name__)
        return 1, b""

    def _on_failure(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._reported_at >= _REPORT_INTERVAL:
            self._reported_at = now
            fields = {"handler": type(self._handler).__name__, "reason": reason}
            self._report.handle(_warning("log handler failed", fields))

    def _on_closed(self, delivered: bool) -> None:
        if not delivered:  # its thread is inside the handler: `logging` would wait for its lock at the exit
            self._handler.createLock()
            for name in ("flush", "close"):
                setattr(self._handler, name, lambda: None)


def _warning(event: str, fields: dict[str, Any]) -> logging.LogRecord:
    level = {"levelno": logging.WARNING, "levelname": "WARNING"}
    return logging.makeLogRecord({"name": __name__, "msg": event, **level, **fields})


def _connect_syslog() -> socket.socket:
    """Return a connection to syslog. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        connection.connect(SYSLOG_ADDRESS)
    except OSError as error:
        connection.close()
        raise OSError(error.errno, error.strerror, SYSLOG_ADDRESS) from error
    return connection


def _wait_writable(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll(_MAX_WAIT * 1000)
    time.sleep(_MIN_WAIT)  # gather what follows; and a destination may count as writable and reject this event
