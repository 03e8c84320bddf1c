"""Inside a call's process: take the user, check the arguments, run the procedure, write what it says, exit.

The process was forked by the zygote for this call and is used once. Its channel is a stream socket whose other
end the warden holds: one line with the arguments comes in, the lines of the wire go out.

Where the procedure allows more calls per process, the process waits for the next call of the same procedure, until it
has served so many or the warden sends no more. A line has the call's id before its arguments: the process takes the
call's mark.
"""

from __future__ import annotations

import os
import signal
import sys

from harp.protocol import call_output as closing
from harp.protocol.strict_json import Envelope, InvalidJSON, NotJSON, Raw, dumps, loads
from harpd.proc import Cancelled, Procedure, Result, TimeLimit
from harpd.processes.cookie import EnvCookie
from harpd.processes.prctl import become_subreaper, die_with_parent
from harpd.worker.arguments import WrongArguments, check_arguments
from harpd.worker.channel import Channel
from harpd.worker.privileges import Credentials, UserError, drop_privileges, resolve_credentials
from harpd.worker.signals import SignalGuard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

__all__ = ["Descriptors", "detach_from_zygote", "run_worker"]


#: The most bytes of a record or a result: a line of 64 MiB, which clients and dispatchers read, less its envelope.
LONGEST_PAYLOAD = 64 * 1024 * 1024 - 64


#: The most characters of a traceback.
_LONGEST_TRACEBACK = 16 * 1024


class Descriptors:
    """What the warden gave the call: its channel, and pipes that become stdout and stderr."""

    __slots__ = ("channel", "stderr", "stdout")

    def __init__(self, channel: int, stdout: int, stderr: int) -> None:
        self.channel = channel
        self.stdout = stdout
        self.stderr = stderr


class _Refused(Exception):
    """The call ends with an error of harpd's, not with an exception of the procedure's."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type = type


def detach_from_zygote(zygote: int) -> None:
    """Leave the zygote's session and signals, in a freshly forked process that has no call yet.

    Args:
        zygote: the parent's pid.

    Raises:
        OSError: that failed; the process is of no use.
    """
    os.setsid()  # a process group and session of its own, to be stopped as one
    become_subreaper()  # what forks twice stays a descendant
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(zygote)


def run_worker(
    procedure: Procedure,
    descriptors: Descriptors,
    zygote: int,
    default_user: int | str | None,
    default_group: int | str | None,
    tracebacks: bool,
    mark: EnvCookie,
) -> NoReturn:
    """Run one call in this process, which has left the zygote, or as many as the procedure allows; then exit.

    Args:
        procedure: what to run.
        descriptors: the call's channel and pipes.
        zygote: the parent's pid.
        default_user: the user of a procedure that names none.
        default_group: the group of a procedure that names neither user nor group.
        tracebacks: whether the traceback of an exception goes to the warden, before the closing line.
        mark: what this process is known by.
    """
    process, limits = os.getpid(), SignalGuard()
    defaults = default_user, default_group
    try:
        channel = Channel(descriptors.channel, limits)
        prepared = False

        def prepare() -> None:
            nonlocal prepared
            if not prepared:
                limits.activate()
                _take_streams(descriptors)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the zygote has blocked what is the call's
                _become(procedure, zygote, defaults)
                prepared = True

        for served in range(1, procedure.max_calls_per_process + 1):
            lines = _carry_out(procedure, channel, limits, tracebacks, mark, prepare)
            if os.getpid() != process:
                os._exit(0)  # the procedure forked, and this is the child: it has nothing to say to the caller
            _flush_output()
            channel.write(lines)
            if served == procedure.max_calls_per_process or not prepared or not _next_comes(channel, limits):
                break
    except OSError:
        os._exit(1)  # the warden is gone, and with it whoever wanted to know
    os._exit(0)


def _next_comes(channel: Channel, limits: SignalGuard) -> bool:
    """Wait for a further call; whether there is one."""
    try:
        limits.deliver()
        return channel.wait_for_line()
    except (TimeLimit, Cancelled) as limit:
        limits.exit_with(limit)


def _take_streams(descriptors: Descriptors) -> None:
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for source, target in ((null, 0), (descriptors.stdout, 1), (descriptors.stderr, 2)):
        os.dup2(source, target)
        os.close(source)


def _carry_out(
    procedure: Procedure,
    channel: Channel,
    limits: SignalGuard,
    tracebacks: bool,
    mark: EnvCookie,
    prepare: Callable[[], None],
) -> bytes:
    """Prepare the process and run the procedure; return the last lines, whatever that raises."""
    try:
        try:
            prepare()
            positional, named = _arguments(procedure, channel, mark)
            value = procedure(*positional, **named)
            if procedure.streaming:
                value = _stream(value, channel)
        finally:
            limits.defer()  # from here on the warden's steps are enough
        return _returned(value)
    except _Refused as refused:
        return _line(Envelope(harp=closing.VERSION, **closing.error(refused.type, str(refused), None)))
    except (TimeLimit, Cancelled) as limit:
        _flush_output()
        limits.exit_with(limit)
    except BaseException as error:  # noqa: BLE001 - also SystemExit: the procedure's end is the caller's to know
        kind = type(error)
        data = {"class": kind.__name__, "module": str(kind.__module__)}
        traceback = _line({"traceback": _traceback(error)}) if tracebacks else b""
        return traceback + _line(closing.exception(kind.__name__, _text(error), data))


def _line(message: dict[str, Any]) -> bytes:
    return dumps(message) + b"\n"


def _become(procedure: Procedure, zygote: int, defaults: tuple[int | str | None, int | str | None]) -> None:
    """Take the procedure's user."""
    try:
        account = _account(procedure, *defaults)
        if account.uid is not None:
            # Pipes are opened anew by name, as /dev/stderr, in many a shell script.
            for stream in (1, 2):
                try:
                    os.fchown(stream, account.uid, -1)
                except (OSError, OverflowError):
                    break
        drop_privileges(account)
    except UserError as error:
        raise _Refused("system_error", str(error)) from error
    finally:
        die_with_parent(zygote)
    _set_environment(account)


def _account(procedure: Procedure, user: int | str | None, group: int | str | None) -> Credentials:
    if procedure.uid is not None:
        return resolve_credentials(procedure.uid, procedure.gid)
    return resolve_credentials(user, procedure.gid or (None if group is None else (group,)))


def _set_environment(account: Credentials) -> None:
    if account.name is not None:
        os.environ.update(USER=account.name, LOGNAME=account.name, HOME=account.home or "/")
    elif account.uid is not None:  # a user that the system does not know, and surely not ours
        os.environ["HOME"] = "/"
        os.environ.pop("USER", None)
        os.environ.pop("LOGNAME", None)


def _arguments(procedure: Procedure, channel: Channel, mark: EnvCookie) -> tuple[list[Any], dict[str, Any]]:
    """Read the arguments and check them against the procedure's signature."""
    call_id, _, text = channel.read_line().partition(b" ")
    mark.write(call_id.decode())
    try:
        arguments = loads(text)
    except InvalidJSON as error:
        raise _Refused("invalid_request", f"arguments: {error}") from error
    positional: list[Any] = arguments if isinstance(arguments, list) else []
    named: dict[str, Any] = arguments if isinstance(arguments, dict) else {}
    try:
        check_arguments(procedure, positional, named)
    except WrongArguments as wrong:
        raise _Refused("invalid_argument_list", str(wrong)) from wrong
    return positional, named


def _payload(value: Any) -> Raw:
    """A value as JSON, short enough for its line. Raises NotJSON."""
    text = dumps(value)
    if len(text) > LONGEST_PAYLOAD:
        raise NotJSON("", f"{len(text)} bytes; a record or a result may have {LONGEST_PAYLOAD}")
    return text


def _returned(value: Any) -> bytes:
    try:
        return _line(closing.result(_payload(value)))
    except NotJSON as error:
        raise _Refused("invalid_message", f"the result can't be written as JSON: {error}") from error


def _stream(records: Any, channel: Channel) -> Any:
    """Write the records of an iterable; return the value of its `Result`, None without one."""
    if isinstance(records, Result):
        return records.value
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
                channel.write(closing.record(_payload(record)))
            except NotJSON as error:
                fault = f"record {number} can't be written as JSON: {error}"
                raise _Refused("invalid_message", fault) from error
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
    except BaseException:  # noqa: BLE001 - a broken __str__ must not hide the exception
        return "(the exception's text can't be made)"


def _traceback(error: BaseException) -> str:
    """The exception's traceback, from the procedure on; its end, when it is long."""
    import traceback  # here, for the zygote must stay lean

    try:
        frames = error.__traceback__
        text = "".join(traceback.format_exception(type(error), error, frames and (frames.tb_next or frames)))
    except BaseException:  # noqa: BLE001 - a broken __repr__ must not hide the exception
        text = "(the traceback can't be made)"
    return text[-_LONGEST_TRACEBACK:]


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # noqa: BLE001, S110 - the procedure may have closed or replaced it
            pass
