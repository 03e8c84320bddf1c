"""Inside a call's process: take the user, bind the arguments, run the procedure, write what it says, exit.

The process was forked by the zygote for this call and is used once. Its channel is a stream socket whose other
end the warden holds: one line with the arguments comes in, the lines of the wire go out. A limit or a cancel
raises in the procedure's own code and nowhere else: never in the middle of a line.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from harp.protocol.daemon import Message, Record, encode_message
from harp.protocol.ends import Failed, Raised, Returned
from harp.protocol.jsontext import InvalidJSON, NotJSON, dumps, loads
from harpd.prctl import become_subreaper, die_with_parent
from harpd.proc import Cancelled, Procedure, Result, TimeLimit
from harpd.users import Account, UserError, resolve, take

__all__ = ["CALL_VARIABLE", "Descriptors", "run_call"]

#: The environment variable by which what a call started is known as the call's.
CALL_VARIABLE = "HARPD_CALL"

_RAISING: Mapping[int, type[BaseException]] = {signal.SIGXCPU: TimeLimit, signal.SIGTERM: Cancelled}
_READ_SIZE = 1 << 16


@dataclass(frozen=True)
class Descriptors:
    """What the warden gave the call: its channel, and pipes that become stdout and stderr."""

    channel: int
    stdout: int
    stderr: int


def run_call(
    procedure: Procedure,
    call_id: str,
    descriptors: Descriptors,
    zygote: int,
    default_user: int | str | None,
    default_group: int | str | None,
) -> NoReturn:
    """Run one call in this freshly forked process, and exit.

    Args:
        procedure: what to run.
        call_id: the call's id, for the environment.
        descriptors: the call's channel and pipes.
        zygote: the parent's pid.
        default_user: the user of a procedure that names none.
        default_group: the group of a procedure that names neither user nor group.
    """
    try:
        channel = _Channel(descriptors.channel)
        _detach(descriptors)
        call = os.getpid()
        end = _prepare_and_run(procedure, call_id, channel, zygote, (default_user, default_group))
        if os.getpid() != call:
            os._exit(0)  # the procedure forked, and this is the child: it has nothing to say to the caller
        _flush_output()
        channel.write(end)
    except OSError:
        os._exit(1)  # the warden is gone, and with it whoever wanted to know
    os._exit(0)


def _detach(descriptors: Descriptors) -> None:
    """Leave the zygote's session and streams. Later steps rely on this order."""
    os.setsid()  # a process group and session of its own, to be stopped as one
    become_subreaper()  # what forks twice stays a descendant
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for source, target in ((null, 0), (descriptors.stdout, 1), (descriptors.stderr, 2)):
        os.dup2(source, target)
        os.close(source)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)


def _prepare_and_run(
    procedure: Procedure,
    call_id: str,
    channel: _Channel,
    zygote: int,
    defaults: tuple[int | str | None, int | str | None],
) -> Message:
    try:
        account = _account(procedure, *defaults)
        take(account)
    except UserError as error:
        die_with_parent(zygote)
        return Failed("system_error", str(error))
    die_with_parent(zygote)
    _set_environment(call_id, account)
    try:
        arguments = loads(channel.read_line())
        bound = procedure.signature().bind(*_positional(arguments), **_named(arguments))
    except InvalidJSON as error:
        return Failed("invalid_request", f"arguments: {error}")
    except TypeError as error:
        return Failed("invalid_argument_list", str(error))
    return _run(lambda: procedure(*bound.args, **bound.kwargs), procedure.streaming, channel)


def _account(procedure: Procedure, user: int | str | None, group: int | str | None) -> Account:
    if procedure.uid is not None:
        return resolve(procedure.uid, procedure.gid)
    return resolve(user, procedure.gid or (None if group is None else (group,)))


def _set_environment(call_id: str, account: Account) -> None:
    os.environ[CALL_VARIABLE] = call_id
    if account.name is not None:
        os.environ.update(USER=account.name, LOGNAME=account.name, HOME=account.home or "/")


def _positional(arguments: Any) -> list[Any]:
    return arguments if isinstance(arguments, list) else []


def _named(arguments: Any) -> dict[str, Any]:
    return arguments if isinstance(arguments, dict) else {}


def _run(function: Callable[[], Any], streaming: bool, channel: _Channel) -> Message:
    """Run the procedure's code; whatever it raises becomes the end."""
    try:
        with _limits_raise():
            value = _stream(function(), channel) if streaming else function()
        return Returned(dumps(value))
    except NotJSON as error:
        return Failed("invalid_message", f"the result can't be written as JSON: {error}")
    except _BadRecord as error:
        return Failed("invalid_message", str(error))
    except (TimeLimit, Cancelled) as error:
        _die_of(error)
        raise  # not reached
    except BaseException as error:  # noqa: BLE001 - also SystemExit: the procedure's end is the caller's to know
        kind = type(error)
        data = {"class": kind.__name__, "module": kind.__module__}
        return Raised(kind.__name__, _text(error), data)


class _BadRecord(Exception):
    """A record that JSON can't carry."""


def _stream(records: Any, channel: _Channel) -> Any:
    """Write the records of an iterable; return the value of its `Result`, None without one."""
    iterator = iter(records)
    try:
        number = 0
        while True:
            try:
                record = next(iterator)
            except StopIteration as stop:
                return stop.value.value if isinstance(stop.value, Result) else None
            if isinstance(record, Result):
                return record.value
            try:
                channel.write(Record(record))
            except NotJSON as error:
                raise _BadRecord(f"record {number} can't be written as JSON: {error}") from error
            except (TimeLimit, Cancelled) as limit:
                _throw(iterator, limit)
                raise
            number += 1
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


def _throw(iterator: Any, limit: BaseException) -> None:
    """A limit that came while a record was being written is the procedure's to handle, too."""
    throw = getattr(iterator, "throw", None)
    if throw is not None:
        throw(limit)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a broken __str__ must not hide the exception
        return "(the exception's text can't be made)"


@contextmanager
def _limits_raise() -> Iterator[None]:
    """Within the context a limit and a cancel raise; outside they wait, for the warden goes on by itself."""
    for number in _RAISING:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _RAISING)


def _raise(number: int, frame: FrameType | None) -> None:
    raise _RAISING[number]("the call's time is over" if number == signal.SIGXCPU else "the call was cancelled")


def _die_of(error: BaseException) -> NoReturn:
    """End by the signal that raised: the warden knows whether it sent it."""
    number = signal.SIGXCPU if isinstance(error, TimeLimit) else signal.SIGTERM
    _flush_output()
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(1)


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001, S110 - the procedure may have closed or replaced it
            pass


class _Channel:
    """The call's end of its channel. Lines are written whole, whatever signals come."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unwritten = bytearray()  # the rest of a line whose writing a limit interrupted goes first

    def read_line(self) -> bytes:
        pieces: list[bytes] = []
        while not pieces or not pieces[-1].endswith(b"\n"):
            piece = os.read(self._descriptor, _READ_SIZE)
            if not piece:
                raise ConnectionAbortedError("the warden closed the channel")
            pieces.append(piece)
        os.set_blocking(self._descriptor, False)
        return b"".join(pieces)

    def write(self, message: Message) -> None:
        """Write a message's line; wait while the warden does not take it. Raises NotJSON."""
        self._unwritten += encode_message(message)
        while self._unwritten:
            # A signal's exception between the write and the count of what was written would tear the line.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _RAISING)
            try:
                del self._unwritten[: os.write(self._descriptor, self._unwritten)]
            except BlockingIOError:
                pass
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if self._unwritten:
                select.select([], [self._descriptor], [])
