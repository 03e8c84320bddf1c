"""The public interface of procedures files: decorators, result, base classes, the caller of a call.

It imports no other module of harpd.

    from harpd.proc import procedure, streaming_procedure, Result

Spec: docs/procedures.md.
"""

from __future__ import annotations

TYPE_CHECKING = False  # not from `typing`: the zygote loads this module, and its size costs each fork
if TYPE_CHECKING:
    import inspect
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, ClassVar, TypeAlias, TypedDict, Unpack, overload

    #: A user or a group: its id or its name.
    Identity: TypeAlias = int | str
    #: A group or several: the first is the primary group, all are supplementary.
    Groups: TypeAlias = Identity | Sequence[Identity]

    #: The return value of a streaming procedure's function.
    Records: TypeAlias = Iterable[Any] | AsyncIterable[Any] | Awaitable[Iterable[Any] | AsyncIterable[Any]] | "Result"

    class Options(TypedDict, total=False):
        """The options of a procedure, see `Procedure`."""

        timeout: float | None
        uid: Identity | None
        gid: Groups | None
        max_calls_per_process: int
        users: Sequence[str] | None
        no_new_privs: bool
        memory: int | None
        processes: int | None
        files: int | None
        umask: int | None
        cwd: str | None
        environment: Mapping[str, str] | None


__all__ = [
    "Caller",
    "Cancelled",
    "Procedure",
    "Result",
    "StreamingProcedure",
    "TimeLimit",
    "caller",
    "procedure",
    "streaming_procedure",
]


#: The value of `uid` with which each call has a user id of its own.
DYNAMIC_UID = "dynamic"


class TimeLimit(BaseException):
    """Raised in a procedure that has reached its `timeout`, so that it can clean up. Its process is killed soon after.

    It derives from BaseException, so that ``except Exception`` does not catch it.
    """


class Cancelled(BaseException):
    """Raised in a procedure when its call is cancelled, so that it can clean up. Its process is killed soon after."""


class Result:
    """The end result of a streaming procedure, which yields it last or returns it: any value for JSON."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Result({self.value!r})"


class Caller:
    """For whom a call runs. It cannot be changed.

    Attributes:
        principal: the client of the dispatcher, as the dispatcher has proven it: ``token:shop``, ``uid:www-data``;
            None: unknown.
        job: the id of the job; None: unknown.
        address: the address of the client; None: unknown.
        user: the user of harpd that has sent the call, who vouches for the other attributes.
    """

    __slots__ = ("address", "job", "principal", "user")

    principal: str | None
    job: str | None
    address: str | None
    user: str

    def __init__(
        self, principal: str | None = None, job: str | None = None, address: str | None = None, user: str = ""
    ) -> None:
        for name, value in (("principal", principal), ("job", job), ("address", address), ("user", user)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"cannot change {name}: a caller is frozen")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"cannot delete {name}: a caller is frozen")

    def _values(self) -> tuple[str | None, ...]:
        return self.principal, self.job, self.address, self.user

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Caller) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return "Caller(principal={!r}, job={!r}, address={!r}, user={!r})".format(*self._values())

    def __reduce__(self) -> tuple[type[Caller], tuple[str | None, ...]]:
        return Caller, self._values()


#: The caller of the present call as JSON text, for a worker's process and its forks; ``-``: it is unknown.
_caller_text = b"-"


def _set_caller(text: bytes) -> None:
    """Set the caller of the call that this process runs; harpd's workers call it."""
    global _caller_text
    _caller_text = text


def caller() -> Caller | None:
    """Return for whom the present call runs.

    None: its client or dispatcher has not said that, as direct clients and legacy dispatchers; or no call runs here.
    """
    if _caller_text == b"-":
        return None
    from json import loads

    return Caller(**loads(_caller_text))


class Procedure:
    """A function that clients can call. Each instance at module level is exposed under its variable's name.

    It may be subclassed: a call runs ``instance(*arguments)``.

    Args:
        function: the function that a call runs.
        timeout: the time limit of a call in seconds; None: no limit.
        uid: the user of a call, id or name; None: the default of harpd; ``dynamic``: each call has its own user id.
        gid: the group, id or name, or a list of groups (first: primary, all: supplementary). None: for a user in the
            user database, its primary group; for another user, group 65534; without `uid`, the default of harpd.
        max_calls_per_process: how many calls a process serves, one after the other. 1: each call has its own.
        users: the names of the users who may call it, of those whose rights in the configuration allow it; None: all
            of these.
        no_new_privs: programs that a call executes gain no privileges, as setuid programs do.
        memory: the most bytes of memory of each process of a call.
        processes: the most processes and threads of the user of a call.
        files: the most open files of each process of a call.
        umask: the file mode creation mask of a call; None: 0o022.
        cwd: the working directory of a call, an absolute path; None: ``/``.
        environment: more variables of the environment of a call.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a wrong value; the message names it.

    Spec: docs/procedures.md, Classes.
    """

    #: Whether a call yields records before its end result.
    streaming: ClassVar[bool] = False

    # Defaults for a subclass whose `__init__` does not set them.
    timeout: float | None = None
    uid: Identity | None = None
    gid: tuple[Identity, ...] | None = None
    max_calls_per_process: int = 1
    users: tuple[str, ...] | None = None
    no_new_privs: bool = False
    memory: int | None = None
    processes: int | None = None
    files: int | None = None
    umask: int | None = None
    cwd: str | None = None
    environment: Mapping[str, str] | None = None

    def __init__(
        self,
        function: Callable[..., Any],
        timeout: float | None = None,
        uid: Identity | None = None,
        gid: Groups | None = None,
        max_calls_per_process: int = 1,
        *,
        users: Sequence[str] | None = None,
        no_new_privs: bool = False,
        memory: int | None = None,
        processes: int | None = None,
        files: int | None = None,
        umask: int | None = None,
        cwd: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError(f"expected a function, got {function!r}")
        self.function = function
        self.timeout, self.uid, self.max_calls_per_process = timeout, uid, max_calls_per_process
        self.no_new_privs, self.memory, self.processes, self.files = no_new_privs, memory, processes, files
        self.umask, self.cwd, self.environment = umask, cwd, environment
        # Until they are checked:
        self.gid = gid  # type: ignore[assignment]
        self.users = users  # type: ignore[assignment]
        check_options(self)
        self.__doc__ = function.__doc__
        self.__name__ = getattr(function, "__name__", type(self).__name__)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the function in this process, as a plain call does: for ``async def``, it returns a coroutine."""
        return self.function(*args, **kwargs)

    def signature(self) -> inspect.Signature:
        """Return the signature for a call's arguments: that of the function, or of a subclass's own ``__call__``.

        So an own ``__call__(self, *args, **kwargs)`` accepts all arguments: it may add some to those of the call.
        Raises ValueError if it has no signature, as some functions in C; then the arguments of a call are not checked.
        """
        import inspect  # large, and most calls do not need it; see `harpd.worker.child.ArgumentCheck`

        inherited = type(self).__call__ in (Procedure.__call__, StreamingProcedure.__call__)
        return inspect.signature(self.function if inherited else self.__call__)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {getattr(self, '__name__', 'without a name')}>"


class StreamingProcedure(Procedure):
    """A function whose call yields records; the arguments are those of `Procedure`.

    The function returns an iterable, usually as a generator, or an asynchronous one. The call ends with a `Result` in
    it. Calling the instance returns the records without that; when they were iterated, `result` returns its value.

    A subclass may override ``__call__``, to change records, and `result`, to change the end result.
    """

    streaming = True

    _result: Any = None

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the function; return an iterator of its records, an asynchronous one if those of the function are."""
        self._result = None
        records = self.function(*args, **kwargs)
        if hasattr(type(records), "__await__"):  # a coroutine, which returns the records
            return records
        if hasattr(type(records), "__aiter__"):
            return self._forward_async(records)
        return self._forward([records] if isinstance(records, Result) else iter(records))

    def result(self) -> Any:
        """Return the end result of the last call, once its records were iterated; None: it had no result."""
        return self._result

    def _forward(self, records: Iterable[Any]) -> Iterator[Any]:
        iterator = iter(records)
        try:
            while True:
                try:
                    record = next(iterator)
                except StopIteration as stop:
                    record = stop.value
                    if not isinstance(record, Result):
                        return
                if isinstance(record, Result):
                    self._result = record.value
                    return
                try:
                    yield record
                except (TimeLimit, Cancelled) as interruption:
                    if hasattr(
                        iterator, "throw"
                    ):  # the function's generator cleans up, as after an exception at its `yield`
                        iterator.throw(interruption)
                    raise
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    async def _forward_async(self, records: AsyncIterable[Any]) -> AsyncIterator[Any]:
        iterator = aiter(records)
        try:
            async for record in iterator:
                if isinstance(record, Result):
                    self._result = record.value
                    return
                yield record
        finally:
            if hasattr(iterator, "aclose"):
                await iterator.aclose()


#: Flags of a code object: a generator, an asynchronous generator; a coroutine, an asynchronous generator.
_GENERATORS, _ASYNCHRONOUS = 0x20 | 0x200, 0x80 | 0x200


def _code_flags(procedure: Procedure) -> int:
    """Return the flags of the code that a call runs first: of an own ``__call__``, else of the function; 0: none."""
    function: Any = type(procedure).__call__
    if function in (Procedure.__call__, StreamingProcedure.__call__):
        function = getattr(procedure, "function", None)
        while type(function).__module__ == "functools" and hasattr(function, "func"):  # partial
            function = function.func
        if not hasattr(function, "__code__"):  # an object with __call__
            function = getattr(type(function), "__call__", None)  # noqa: B004
    return int(getattr(getattr(function, "__code__", None), "co_flags", 0))


def is_asynchronous(procedure: Procedure) -> bool:
    """Return whether a call needs an event loop, as far as this can be determined before it runs."""
    return bool(_code_flags(procedure) & _ASYNCHRONOUS)


def check_function(procedure: Procedure) -> None:
    """Raise TypeError if a procedure without records is a generator: its value has no form in JSON."""
    has_records = isinstance(getattr(procedure, "function", None), StreamingProcedure)  # it has both decorators
    if not procedure.streaming and (has_records or _code_flags(procedure) & _GENERATORS):
        raise TypeError("the function is a generator; expose it with @streaming_procedure, or return a list")


def check_options(procedure: Procedure) -> None:
    """Check the options, which a subclass may have set; convert lists to tuples. Raises TypeError or ValueError."""
    timeout, calls = procedure.timeout, procedure.max_calls_per_process
    gid: Any = procedure.gid
    if timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise TypeError(f"timeout: expected seconds, got {timeout!r}")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout: expected a positive number of seconds, got {timeout!r}")
    if procedure.uid is not None:
        _check_identity("uid", procedure.uid)
    if procedure.uid == DYNAMIC_UID and calls != 1:
        raise ValueError(f"max_calls_per_process: expected 1, because uid is {DYNAMIC_UID!r}, got {calls!r}")
    if gid is not None:
        if not isinstance(gid, (int, str, list, tuple)):
            raise TypeError(f"gid: expected an id, a name or a list of them, got {gid!r}")
        procedure.gid = (gid,) if isinstance(gid, (int, str)) else tuple(gid)
        if not procedure.gid:
            raise ValueError("gid: expected at least one group")
        for group in procedure.gid:
            _check_identity("gid", group)
    if isinstance(calls, bool) or not isinstance(calls, int):
        raise TypeError(f"max_calls_per_process: expected a number of calls, got {calls!r}")
    if procedure.users is not None:
        procedure.users = _check_users(procedure.users)
    if calls < 1:
        raise ValueError(f"max_calls_per_process: expected a number of calls, at least 1, got {calls!r}")
    for key, (least, most) in _RANGES.items():
        _check_number(key, getattr(procedure, key), least, most)
    if not isinstance(procedure.no_new_privs, bool):
        raise TypeError(f"no_new_privs: expected True or False, got {procedure.no_new_privs!r}")
    if procedure.cwd is not None and not (isinstance(procedure.cwd, str) and procedure.cwd.startswith("/")):
        raise ValueError(f"cwd: expected an absolute path, got {procedure.cwd!r}")
    if procedure.environment is not None:
        _check_environment(procedure.environment)


#: The least and the most of options that are numbers. A worker itself needs some memory and files.
_RANGES = {"memory": (64 << 20, 1 << 62), "processes": (1, 1 << 22), "files": (16, 1 << 20), "umask": (0, 0o777)}


def _check_number(key: str, number: Any, least: int, most: int) -> None:
    if number is None:
        return
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{key}: expected a number, got {number!r}")
    if not least <= number <= most:
        raise ValueError(f"{key}: expected a number from {least} to {most}, got {number!r}")


def _check_environment(environment: Any) -> None:
    if not isinstance(environment, dict):
        raise TypeError(f"environment: expected a dict, got {environment!r}")
    for name, value in environment.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise TypeError(f"environment: expected texts, got {name!r}: {value!r}")
        if not name or "=" in name or "\0" in name + value or name.startswith("HARPD_"):
            raise ValueError(f"environment: expected the name of a variable, none of HARPD_..., got {name!r}")


def _check_users(users: Any) -> tuple[str, ...]:
    if not isinstance(users, (list, tuple)) or not all(isinstance(user, str) for user in users):
        raise TypeError(f"users: expected a list of names of users, got {users!r}")
    if not users:
        raise ValueError("users: expected at least one user")
    return tuple(users)


def _check_identity(key: str, identity: Identity) -> None:
    if isinstance(identity, bool) or not isinstance(identity, (int, str)):
        raise TypeError(f"{key}: expected an id or a name, got {identity!r}")
    if isinstance(identity, int) and identity < 0:
        raise ValueError(f"{key}: expected an id of at least 0, got {identity!r}")


if TYPE_CHECKING:

    @overload
    def procedure(function: Callable[..., Any], /) -> Procedure: ...
    @overload
    def procedure(**options: Unpack[Options]) -> Callable[[Callable[..., Any]], Procedure]: ...


def procedure(function: Callable[..., Any] | None = None, /, **options: Unpack[Options]) -> Any:
    """Expose a function: ``@procedure`` or ``@procedure(timeout=SECONDS, uid=..., gid=..., ...)``.

    Return a `Procedure`, which documents the options and errors. Spec: docs/procedures.md.
    """
    return _decorate(Procedure, function, options)


if TYPE_CHECKING:

    @overload
    def streaming_procedure(function: Callable[..., Records], /) -> StreamingProcedure: ...
    @overload
    def streaming_procedure(
        **options: Unpack[Options],
    ) -> Callable[[Callable[..., Records]], StreamingProcedure]: ...


def streaming_procedure(function: Callable[..., Records] | None = None, /, **options: Unpack[Options]) -> Any:
    """Expose a function that yields records; otherwise like `procedure`. Spec: docs/procedures.md."""
    return _decorate(StreamingProcedure, function, options)


def _decorate(kind: type[Procedure], function: Callable[..., Any] | None, options: Options) -> Any:
    if function is not None:
        return kind(function, **options)
    return lambda decorated: kind(decorated, **options)
