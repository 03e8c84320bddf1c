"""The worker, from its fork to its exit.

The zygote forks it before there is a call for it. It waits at its channel, two pipes to the supervisor, for the
line of a call: its id, the number of its procedure, and the arguments, with spaces between. Then it changes the user,
checks the arguments, runs the procedure, and writes the lines of the wire protocol to the channel. It exits after as
many calls as the procedure allows, or when the supervisor closes its end of the channel; see
`harpd.worker.process_end`.

This is the most expensive part of a short call: a page of memory that a worker touches is copied for it, which costs
2 to 4 microseconds. So all that can be prepared is prepared in the zygote, and no wrapper of the standard library is
used.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # without the enumerations of `signal`
import io
import os
import sys
from types import FunctionType

from harp.protocol.call_output import VERSION, encode_record
from harp.protocol.json_text import InvalidJSON, NotJSON, encode_value, loads
from harpd.proc import Cancelled, Procedure, Result, StreamingProcedure, TimeLimit, _set_caller, is_asynchronous
from harpd.processes.cookie import EnvCookie
from harpd.processes.keyring import make_session_keyring
from harpd.processes.prctl import become_subreaper, die_with_parent
from harpd.worker.environment import oom_score_is_changed, reset_oom_score
from harpd.worker.privileges import UserError, change_user, check_id_is_free, is_present_user
from harpd.worker.process_end import ProcessEnd
from harpd.worker.process_limits import RestrictionError, has_restrictions, restrict_process
from harpd.worker.signals import SignalGuard, exit_with

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, NoReturn

    from harpd.proc import Identity

#: The most bytes of a record or a result: peers read lines of up to 64 MiB, of which the envelope has 64 bytes.
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024 - 64
#: The most characters of an exception's text, and of a traceback.
MAX_TEXT_LENGTH, _MAX_TRACEBACK_LENGTH = 64 * 1024, 16 * 1024
_READ_SIZE = 1 << 16
#: Flags of a code object that has ``*args`` or ``**kwargs``.
_VARIABLE = 0x04 | 0x08
#: A function that shows the signature of another function has one of these attributes.
_SIGNATURE_ATTRIBUTES = ("__wrapped__", "__signature__", "__text_signature__")


class CallRejected(Exception):
    """The call ends with an error of harpd, not with an exception of the procedure. Arguments: type and message."""


class ArgumentCheck:
    """The check of one procedure's arguments; it is prepared in the zygote, before the first fork.

    Nearly all arguments fit, and nearly all procedures are plain functions: for these, a look at the code object is
    enough. All other cases need the large module `inspect`.
    """

    def __init__(self, procedure: Procedure) -> None:
        self._procedure = procedure
        self._names: tuple[str, ...] | None = None  # of the parameters that may be named
        # How many positional arguments certainly fit, at least and at most.
        self._least, self._most = 0, -1
        function = getattr(procedure, "function", None)  # missing in some subclasses
        if (
            type(procedure) not in (Procedure, StreamingProcedure)
            or type(function) is not FunctionType
            or function.__code__.co_flags & _VARIABLE
            or any(name in function.__dict__ for name in _SIGNATURE_ATTRIBUTES)
        ):
            import inspect  # noqa: F401 - so that not each call has to load it

            return
        code = function.__code__
        if len(function.__kwdefaults__ or ()) == code.co_kwonlyargcount:
            self._most = code.co_argcount
            self._least = code.co_argcount - len(function.__defaults__ or ())
            if not code.co_posonlyargcount:
                self._names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]

    def check(self, positional: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Check the arguments, all positional or all named. Raises `CallRejected`, which names the parameters."""
        names = self._names
        if not named:
            fits = self._least <= len(positional) <= self._most
        else:
            fits = (
                names is not None
                and all(name in names for name in named)
                and all(name in named for name in names[: self._least])
            )
        if fits:
            return
        try:
            signature = self._procedure.signature()
        except ValueError:  # as for some functions in C
            return
        try:
            signature.bind(*positional, **named)
        except TypeError as error:
            # Without the defaults, which may be secret.
            empty = type(signature).empty
            parameters = [
                str(parameter.replace(default=empty, annotation=empty)) + ("" if parameter.default is empty else "=...")
                for parameter in signature.parameters.values()
            ]
            message = f"{error}; the procedure takes ({', '.join(parameters)})"
            raise CallRejected("invalid_argument_list", message) from error


class _Channel:
    """The channel of this process, and not of the processes that it forks. Both directions may raise OSError.

    `calls` and `lines` are the ends of the pipes from and to the supervisor.
    """

    def __init__(self, calls: int, lines: int) -> None:
        self._calls = calls
        self._lines = lines
        self._owner = os.getpid()
        self._file = os.fstat(lines)

    def read_line(self) -> bytes:
        """Wait for the line of the next call; return b"" if the supervisor has closed its end."""
        pieces = [os.read(self._calls, _READ_SIZE)]
        while pieces[-1] and not pieces[-1].endswith(b"\n"):
            pieces.append(os.read(self._calls, _READ_SIZE))
        return b"".join(pieces) if pieces[-1] else b""

    def exit_if_forked(self) -> None:
        """Exit if the procedure has forked and this is the child: it must not write to the caller."""
        if os.getpid() != self._owner:
            os._exit(0)

    def write(self, lines: bytes) -> None:
        """Write complete lines; wait while the supervisor does not read. Signals must be deferred."""
        # The procedure may have closed the descriptor, and its number may belong to another file by now.
        file = os.fstat(self._lines)
        if file.st_ino != self._file.st_ino or file.st_dev != self._file.st_dev:
            raise ConnectionAbortedError("the procedure closed the channel")
        while lines:  # a signal may interrupt the write
            lines = lines[os.write(self._lines, lines) :]


class Worker:
    """The work of a worker. It is prepared once, in the zygote; each worker is a process that has called `run`.

    The supervisor names the procedures by their index. `default_user` is for procedures without `uid` (None: that of
    harpd), `default_group` for those without `uid` and `gid` (None: the groups of the user).
    """

    def __init__(
        self,
        procedures: Sequence[Procedure],
        cookie: EnvCookie,
        default_user: Identity | None,
        default_group: Identity | None,
    ) -> None:
        #: Its handlers have to be installed before the first fork.
        self.guard = SignalGuard()
        self._zygote = os.getpid()
        self._procedures = [(procedure, ArgumentCheck(procedure)) for procedure in procedures]
        self._restricted = {id(procedure) for procedure in procedures if has_restrictions(procedure)}
        self._cookie = cookie
        self._default_user = default_user
        self._default_groups = None if default_group is None else (default_group,)
        if default_group is None and is_present_user(default_user):
            self._default_user = None  # no call has to change anything: each look-up costs as much as a short call
        if any(map(is_asynchronous, procedures)):
            import harpd.worker.coroutines  # noqa: F401 - so that not each call has to load it
        self._resets_oom_score = oom_score_is_changed()
        self._end = ProcessEnd()

    def run(self, calls: int, lines: int, stdout: int, stderr: int) -> NoReturn:
        """Serve calls in this process, which the zygote has just forked, with these descriptors; then exit."""
        try:
            os.setsid()  # its own session and process group, so that they can be stopped as a whole
            become_subreaper()  # processes that fork twice remain descendants
            die_with_parent(self._zygote)
            for number in (_signal.SIGHUP, _signal.SIGINT):
                _signal.signal(number, _signal.SIG_DFL)
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.close(stdout)
            os.close(stderr)
            if self._resets_oom_score:
                reset_oom_score()
            self.guard.deferred = None  # a signal that the zygote has received
            self._end.record_counts()
            self._serve_calls(_Channel(calls, lines))
        except OSError:
            os._exit(1)  # the supervisor has died: no process reads the result
        self._end.finish(self.guard)
        os._exit(0)

    def _serve_calls(self, channel: _Channel) -> None:
        line, served = channel.read_line(), 0
        while line:
            head, arguments = line.split(b"\t", 1)  # which is no character of the caller's JSON text
            call_id, number, uid, caller = head.split(b" ", 3)
            procedure, check = self._procedures[int(number)]
            _set_caller(caller)
            served += 1
            last = served == procedure.max_calls_per_process
            try:
                if served == 1:
                    self._become_worker_of(procedure, None if uid == b"-" else int(uid))
                lines = self._run_call(call_id, procedure, check, arguments, channel)
            except CallRejected as rejected:
                kind, message = rejected.args
                error = {"type": kind, "message": _shorten_text(message)}
                lines, last = encode_value({"harp": VERSION, "error": error}) + b"\n", True
            channel.exit_if_forked()
            flush_output()
            channel.write(lines)
            if last:
                return
            try:
                self.guard.deliver()
                line = channel.read_line()
                self.guard.defer()
            except (TimeLimit, Cancelled) as interruption:
                exit_with(interruption)

    def _become_worker_of(self, procedure: Procedure, dynamic_uid: int | None) -> None:
        """Accept the signals of calls, become the procedure's user, and apply its restrictions. Raises `CallRejected`.

        With `dynamic_uid`, the call has this user id, and without `gid` the group id of the same number.
        """
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())  # the zygote has blocked them
        user, groups = procedure.uid, procedure.gid
        if dynamic_uid is not None:
            user, groups = dynamic_uid, groups or (dynamic_uid,)
        elif user is None:
            user, groups = self._default_user, groups or self._default_groups
        try:
            if os.geteuid() == 0:
                make_session_keyring()
            if dynamic_uid is not None:
                check_id_is_free(dynamic_uid)
            if user is not None or groups is not None:
                try:
                    change_user(user, groups)
                finally:
                    die_with_parent(self._zygote)
            if id(procedure) in self._restricted:
                restrict_process(procedure)
        except (UserError, RestrictionError) as error:
            raise CallRejected("system_error", str(error)) from error

    def _run_call(
        self, call_id: bytes, procedure: Procedure, check: ArgumentCheck, arguments: bytes, channel: _Channel
    ) -> bytes:
        """Run the procedure; return the last lines, also after an exception. Raises `CallRejected`."""
        try:
            try:
                self.guard.deliver()
                self._cookie.write(call_id)
                positional, named = _decode_arguments(arguments, check)
                # These classes would only call the function, and look for the `Result`, as this code does.
                run = procedure.function if type(procedure) in (Procedure, StreamingProcedure) else procedure
                value = run(*positional, **named)
                streaming = procedure.streaming
                if hasattr(type(value), "__await__") or (streaming and hasattr(type(value), "__aiter__")):
                    from harpd.worker.coroutines import run_to_end

                    value = run_to_end(value, self.guard, self._record_writer(channel) if streaming else None)
                if streaming:
                    value = self._write_records(value, procedure, channel)
            finally:
                self.guard.defer()  # from here on, the supervisor's termination sequence is sufficient
            return b'{"result":%b}\n' % _encode_payload(value)
        except CallRejected:
            raise
        except (TimeLimit, Cancelled) as interruption:
            flush_output()
            exit_with(interruption)
        except BaseException as error:  # noqa: BLE001 - SystemExit too: the caller receives the procedure's end
            return encode_value({"traceback": _format_traceback(error)}) + b"\n" + _encode_exception(error)

    def _record_writer(self, channel: _Channel) -> Callable[[Any, int], None]:
        """Return a function that writes a record with its number. It raises `CallRejected`."""

        def write(record: Any, number: int) -> None:
            line = encode_record(_encode_payload(record, number))
            channel.exit_if_forked()
            self.guard.defer()  # an exception would cut the line; a stop is not delayed: its output is read
            channel.write(line)
            self.guard.deliver()

        return write

    def _write_records(self, records: Any, procedure: Procedure, channel: _Channel) -> Any:
        """Write the records of an iterable; return the value of its `Result`, else that of the procedure's `result`."""
        if isinstance(records, Result):
            return records.value
        write, iterator = self._record_writer(channel), iter(records)
        number = 0
        try:
            while True:
                try:
                    record = next(iterator)
                except StopIteration as stop:
                    record = stop.value
                    if not isinstance(record, Result):
                        break
                if isinstance(record, Result):
                    return record.value
                try:
                    write(record, number)
                except (TimeLimit, Cancelled) as interruption:
                    if hasattr(iterator, "throw"):  # a generator, which did not run when it was raised here, cleans up
                        iterator.throw(interruption)
                    raise
                number += 1
        finally:
            if hasattr(iterator, "close"):
                iterator.close()
        return procedure.result() if isinstance(procedure, StreamingProcedure) else None


def _decode_arguments(text: bytes, check: ArgumentCheck) -> tuple[list[Any], dict[str, Any]]:
    """Decode the arguments of a call and check them. Raises `CallRejected`."""
    try:
        arguments = loads(text)
    except InvalidJSON as error:
        raise CallRejected("invalid_request", f"arguments: {error}") from error
    positional, named = (arguments, {}) if isinstance(arguments, list) else ([], arguments)
    check.check(positional, named)
    return positional, named


def _encode_payload(value: Any, record: int | None = None) -> bytes:
    """Encode the result, or the record with this number, as JSON that fits into a line. Raises `CallRejected`."""
    try:
        text = encode_value(value)
        if len(text) > MAX_PAYLOAD_BYTES:
            raise NotJSON("", f"{len(text)} bytes; a record or a result may have {MAX_PAYLOAD_BYTES}")
    except NotJSON as error:
        name = "the result" if record is None else f"record {record}"
        hint = "; expose it with @streaming_procedure" if hasattr(value, "__next__") else ""
        raise CallRejected("invalid_message", f"cannot encode {name} as JSON: {error}{hint}") from error
    return text


def _encode_exception(error: BaseException) -> bytes:
    """Return the closing line of a procedure that has raised an exception."""
    kind = type(error)
    name = _shorten_text(kind.__name__)
    try:
        message = _shorten_text(str(error))
    except BaseException:  # noqa: BLE001 - a broken __str__ must not hide the exception
        message = "(str() of the exception failed)"
    data = {"class": name, "module": _shorten_text(str(kind.__module__))}
    return encode_value({"exception": {"type": name, "message": message, "data": data}}) + b"\n"


def _shorten_text(text: str) -> str:
    """Return a text, or its beginning with a mark if it is longer than the text of an exception may be."""
    if len(text) <= MAX_TEXT_LENGTH:
        return text
    return f"{text[:MAX_TEXT_LENGTH]}... ({len(text)} characters, cut at {MAX_TEXT_LENGTH})"


def _format_traceback(error: BaseException) -> str:
    """Return the exception's traceback from the procedure on; only its end if it is long."""
    # The interpreter's own function: the module `traceback` is large, and loading it would cost more than most calls.
    stderr, text = sys.stderr, io.StringIO()
    sys.stderr = text
    try:
        frames = error.__traceback__
        sys.__excepthook__(type(error), error.with_traceback(frames and (frames.tb_next or frames)), None)
    except BaseException:  # noqa: BLE001 - a broken __repr__ must not hide the exception
        return "(formatting the traceback failed)"
    finally:
        sys.stderr = stderr
    return text.getvalue()[-_MAX_TRACEBACK_LENGTH:]


def flush_output() -> None:
    """Flush stdout and stderr, as far as that is possible."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # noqa: BLE001, S110 - the procedure may have closed or replaced it
            pass
