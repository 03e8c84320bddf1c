"""The worker: change the user, check the arguments, run the procedure, write its output, exit.

The zygote has forked this process. Its channel is a stream socket whose other end the supervisor has: a line with the
call's id and arguments comes in, and the lines of the wire protocol go out.

A worker serves one call, or several calls of the same procedure, one after the other, if the procedure allows it. It
exits when it has served that many, or when the supervisor closes its end of the channel.
"""

from __future__ import annotations

import os
import signal
import sys

from harp.protocol.call_output import VERSION, encode_record
from harp.protocol.json_text import Envelope, InvalidJSON, NotJSON, Raw, dumps, encode_value, loads
from harpd.proc import Cancelled, Procedure, Result, TimeLimit
from harpd.processes.cookie import EnvCookie
from harpd.processes.prctl import become_subreaper, die_with_parent
from harpd.worker.arguments import WrongArguments, check_arguments
from harpd.worker.channel import Channel
from harpd.worker.privileges import UserError, drop_privileges, resolve_credentials
from harpd.worker.signals import SignalGuard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

#: The most bytes of a record or a result: clients and dispatchers read lines of up to 64 MiB, and 64 bytes are left for
#: the envelope.
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024 - 64
#: The most characters of a traceback.
_MAX_TRACEBACK_LENGTH = 16 * 1024


class _CallRejected(Exception):
    """The call ends with an error of harpd, not with an exception of the procedure."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type = type


def detach_from_zygote(zygote: int) -> None:
    """Leave the session and the signal handlers of the zygote, the parent. A forked process calls it before its call.

    Raises:
        OSError: a step failed; the process cannot be used.
    """
    os.setsid()  # its own session and process group, so that they can be stopped as a whole
    become_subreaper()  # processes that fork twice remain descendants
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(zygote)


def run_worker(
    procedure: Procedure,
    channel_descriptor: int,
    pipes: tuple[int, int],
    zygote: int,
    defaults: tuple[int | str | None, int | str | None],
    tracebacks: bool,
    cookie: EnvCookie,
) -> NoReturn:
    """Run one call, or as many as the procedure allows, in a process that has left the zygote; then exit.

    `pipes` become stdout and stderr. `defaults` are the user of a procedure that names none, and the group of one that
    names neither user nor group. `tracebacks`: whether the supervisor gets the traceback of an exception.
    """
    own_pid, guard = os.getpid(), SignalGuard()
    try:
        channel = Channel(channel_descriptor, guard)
        prepared = False

        def prepare() -> None:
            nonlocal prepared
            if not prepared:
                guard.activate()
                _redirect_streams(*pipes)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the zygote has blocked the signals of calls
                _change_user(procedure, zygote, defaults)
                prepared = True

        for served in range(1, procedure.max_calls_per_process + 1):
            lines = _run_procedure(procedure, channel, guard, tracebacks, cookie, prepare)
            if os.getpid() != own_pid:
                os._exit(0)  # the procedure has forked, and this is the child: it must not write to the caller
            flush_output()
            channel.write(lines)
            if served == procedure.max_calls_per_process or not prepared or not _wait_for_next_call(channel, guard):
                break
    except OSError:
        os._exit(1)  # the supervisor has died: nobody reads the result
    os._exit(0)


def _wait_for_next_call(channel: Channel, guard: SignalGuard) -> bool:
    """Wait for another call; return whether there is one."""
    try:
        guard.deliver()
        return channel.wait_for_line()
    except (TimeLimit, Cancelled) as interruption:
        guard.exit_with(interruption)


def _redirect_streams(stdout: int, stderr: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for source, target in ((null, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
        os.close(source)


def _run_procedure(
    procedure: Procedure,
    channel: Channel,
    guard: SignalGuard,
    tracebacks: bool,
    cookie: EnvCookie,
    prepare: Callable[[], None],
) -> bytes:
    """Prepare the process and run the procedure; return the last lines, whichever exception is raised."""
    try:
        try:
            prepare()
            positional, named = _read_arguments(procedure, channel, cookie)
            value = procedure(*positional, **named)
            if procedure.streaming:
                value = _write_records(value, channel)
        finally:
            guard.defer()  # from here on, the supervisor's termination sequence is sufficient
        return _encode_result(value)
    except _CallRejected as rejected:
        return _line(Envelope(harp=VERSION, error=Envelope(type=rejected.type, message=str(rejected))))
    except (TimeLimit, Cancelled) as interruption:
        flush_output()
        guard.exit_with(interruption)
    except BaseException as error:  # noqa: BLE001 - SystemExit too: the caller receives the procedure's end
        kind = type(error)
        data = {"class": kind.__name__, "module": str(kind.__module__)}
        traceback = _line({"traceback": _format_traceback(error)}) if tracebacks else b""
        return traceback + _line(Envelope(exception=Envelope(type=kind.__name__, message=_message(error), data=data)))


def _line(message: dict[str, Any]) -> bytes:
    return dumps(message) + b"\n"


def _change_user(procedure: Procedure, zygote: int, defaults: tuple[int | str | None, int | str | None]) -> None:
    """Change to the user of the procedure. Raises `_CallRejected`."""
    try:
        if procedure.uid is not None:
            credentials = resolve_credentials(procedure.uid, procedure.gid)
        else:
            user, group = defaults
            credentials = resolve_credentials(user, procedure.gid or (None if group is None else (group,)))
        if credentials.uid is not None:
            # Many shell scripts open these pipes again by name, as /dev/stderr.
            for stream in (1, 2):
                try:
                    os.fchown(stream, credentials.uid, -1)
                except (OSError, OverflowError):
                    break
        drop_privileges(credentials)
    except UserError as error:
        raise _CallRejected("system_error", str(error)) from error
    finally:
        die_with_parent(zygote)
    if credentials.entry is not None:
        name = credentials.entry.pw_name
        os.environ.update(USER=name, LOGNAME=name, HOME=credentials.entry.pw_dir or "/")
    elif credentials.uid is not None:  # a user that the system does not know, so the variables are another user's
        os.environ["HOME"] = "/"
        os.environ.pop("USER", None)
        os.environ.pop("LOGNAME", None)


def _read_arguments(procedure: Procedure, channel: Channel, cookie: EnvCookie) -> tuple[list[Any], dict[str, Any]]:
    """Read the call's line, write the cookie, and check the arguments against the procedure's signature."""
    call_id, _, text = channel.read_line().partition(b" ")
    cookie.write(call_id.decode())
    try:
        arguments = loads(text)
    except InvalidJSON as error:
        raise _CallRejected("invalid_request", f"arguments: {error}") from error
    positional: list[Any] = arguments if isinstance(arguments, list) else []
    named: dict[str, Any] = arguments if isinstance(arguments, dict) else {}
    try:
        check_arguments(procedure, positional, named)
    except WrongArguments as wrong:
        raise _CallRejected("invalid_argument_list", str(wrong)) from wrong
    return positional, named


def _encode_payload(value: Any) -> Raw:
    """Encode a value as JSON that fits into a line. Raises `NotJSON`."""
    text = dumps(value)
    if len(text) > MAX_PAYLOAD_BYTES:
        raise _too_long(text)
    return text


def _too_long(text: bytes) -> NotJSON:
    return NotJSON("", f"{len(text)} bytes; a record or a result may have {MAX_PAYLOAD_BYTES}")


def _encode_result(value: Any) -> bytes:
    try:
        return _line(Envelope(result=_encode_payload(value)))
    except NotJSON as error:
        raise _CallRejected("invalid_message", f"cannot encode the result as JSON: {error}") from error


def _write_records(records: Any, channel: Channel) -> Any:
    """Write the records of an iterable; return the value of its `Result`, or None if it has none."""
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
                text = encode_value(record)
                if len(text) > MAX_PAYLOAD_BYTES:
                    raise _too_long(text)
                channel.write(encode_record(text))
            except NotJSON as error:
                message = f"cannot encode record {number} as JSON: {error}"
                raise _CallRejected("invalid_message", message) from error
            except (TimeLimit, Cancelled) as interruption:
                if hasattr(iterator, "throw"):  # a generator, which did not run when it was raised here, cleans up
                    iterator.throw(interruption)
                raise
            number += 1
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # noqa: BLE001 - a broken __str__ must not hide the exception
        return "(str() of the exception failed)"


def _format_traceback(error: BaseException) -> str:
    """Return the exception's traceback from the procedure on; only its end if it is long."""
    import traceback  # not at the top: the zygote must stay lean

    try:
        frames = error.__traceback__
        text = "".join(traceback.format_exception(type(error), error, frames and (frames.tb_next or frames)))
    except BaseException:  # noqa: BLE001 - a broken __repr__ must not hide the exception
        text = "(formatting the traceback failed)"
    return text[-_MAX_TRACEBACK_LENGTH:]


def flush_output() -> None:
    """Flush stdout and stderr, as far as that is possible."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # noqa: BLE001, S110 - the procedure may have closed or replaced it
            pass
