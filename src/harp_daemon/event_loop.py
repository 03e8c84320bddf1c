"""How a daemon runs its event loop: asyncio's own, with settings that suit many connections and long lines.

A thread that decodes a long line delays each event of the loop by up to `_SWITCH_INTERVAL`, and by the longest step of
the decoder: about 1 ms. Several threads would multiply that, so one of them runs at a time. They take turns after each
step, so that a line waits for one step of each other line, and not for all of a line that is long or expensive.

Each system call of the loop lets other threads run, too. A turn with ten of them would wait ten times for a step of the
decoder. So the decoder works while the loop waits for events: see `UrgentWork`.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import logging
import selectors
import ssl
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, ClassVar, TypeVar, overload
from weakref import WeakKeyDictionary

from harp.protocol.json_text import InvalidJSON
from harp.protocol.lines import LongLine
from harp.protocol.schema import ProtocolError
from harp_daemon import json_pieces, logs
from harp_daemon.process import tune_memory
from harp_daemon.time_slices import take_short_slices

A = TypeVar("A")
T = TypeVar("T")

log = logging.getLogger(__name__)

#: Bytes from which a line is long: it is decoded in a thread, because the loop must not wait for it.
LONG_LINE = 64 * 1024
#: Threads, of which at most half are for long lines; a line that has none waits for the end of another one.
_MAX_THREADS, _MAX_THREADS_OF_PEER = 64, 8
_RETAINED_BYTES, _MAPPED_BYTES = 64 * 1024 * 1024, 16 * 1024 * 1024
#: Receive buffer of each TLS connection, in bytes. asyncio allocates 256 KiB, even for an idle connection. This many
#: bytes of messages without data take about 20 ms.
_TLS_RECEIVE_BYTES = 16 * 1024
#: Maximum bytes of messages without data: of a handshake, or with a record until it is complete.
_MAX_WITHOUT_DATA = 64 * 1024
#: Seconds after which a thread that is busy lets the event loop run. With Python's 5 ms, each event waits so long.
_SWITCH_INTERVAL = 0.0005
#: Seconds in which a thread with a long line lets other threads begin, after each step, and for which it waits at most
#: until they have ended: a loop that is always busy must not stop it.
_PAUSE, _MAX_WAIT = 0.00005, 0.005
#: Seconds after urgent work in which the pauses are longer: as long as so many steps of at most so many seconds.
_SHARED_FOR, _PAUSES, _MAX_STEP = 0.1, 2.0, 0.001


class Turns:
    """A lock that waiting threads get in the order in which they have asked for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the attributes
        self._owner: int | None = None
        self._waiting: deque[tuple[int, threading.Event]] = deque()

    def __enter__(self) -> None:
        is_next = threading.Event()
        with self._lock:
            if self._owner is None:
                self._owner = threading.get_ident()
                return
            self._waiting.append((threading.get_ident(), is_next))
        is_next.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._owner, is_next = self._waiting.popleft() if self._waiting else (None, None)
        if is_next is not None:
            is_next.set()

    @property
    def waiting(self) -> int:
        """The number of threads that wait."""
        return len(self._waiting)

    def pass_on(self) -> bool:
        """Let all threads that wait have a turn; return whether this thread has the lock, otherwise do nothing."""
        if self._owner != threading.get_ident():
            return False
        if self._waiting:
            self.__exit__()
            self.__enter__()
        return True


class UrgentWork:
    """Work for which a thread with long work waits: turns of the event loop, transactions of the store.

    Any number of threads may have urgent work, each with its own object.
    """

    _present: ClassVar[set[UrgentWork]] = set()
    _ended = threading.Event()  # set when there is none, for the thread that waits
    _resumed_at = _seen_at = 0.0  # monotonic times at which that thread continued, and last saw urgent work

    def begin(self) -> None:
        """Begin urgent work."""
        self._present.add(self)

    def end(self) -> None:
        """End it; no effect if it has not begun."""
        self._present.discard(self)
        if not (self._present or self._ended.is_set()):
            self._ended.set()

    @classmethod
    def let_pass(cls) -> None:
        """Let other threads begin urgent work, and wait until it has ended, for at most `_MAX_WAIT` seconds."""
        now = time.monotonic()
        is_shared = now - cls._seen_at < _SHARED_FOR
        time.sleep(max(_PAUSE, _PAUSES * min(now - cls._resumed_at, _MAX_STEP)) if is_shared else _PAUSE)
        if cls._present:
            cls._seen_at = now
            cls._ended.clear()
            if cls._present:
                cls._ended.wait(_MAX_WAIT)
            cls._ended.set()
        cls._resumed_at = time.monotonic()


class _Selector(selectors.DefaultSelector):
    """The selector of the event loop: a turn of the loop is urgent work, until it waits for events."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = UrgentWork()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        self._turn.end()
        try:
            return super().select(timeout)
        finally:
            self._turn.begin()

    def close(self) -> None:
        super().close()
        self._turn.end()


long_lines = Turns()  #: The lock of the thread that decodes a long line.
_ending = threading.Event()  # set when the daemon stops: nobody needs the lines any more
_STOPPING = "the daemon stops"
_thread = threading.local()  # its `outcome` is that of the text which the thread works on


def _between_pieces() -> None:
    """Let other long lines, then urgent work pass, if this thread decodes a long line."""
    if long_lines.pass_on():
        outcome: asyncio.Future[Any] | None = getattr(_thread, "outcome", None)
        if _ending.is_set() or (outcome is not None and outcome.cancelled()):
            raise InvalidJSON(_STOPPING)
        UrgentWork.let_pass()


json_pieces.between_pieces = _between_pieces


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run the coroutine of a daemon to its end and return its result."""
    tune_memory(_RETAINED_BYTES, _MAPPED_BYTES)
    take_short_slices()
    asyncio.sslproto.SSLProtocol = _SSLProtocol  # type: ignore[misc]  # the loop creates one for each connection
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_Selector())) as runner:
            runner.get_loop().set_default_executor(ThreadPoolExecutor(_MAX_THREADS))
            runner.get_loop().set_exception_handler(_log_unexpected)
            logs.write_per_turn(runner.get_loop().call_soon)
            return runner.run(_run_to_end(main))
    finally:
        _ending.clear()
        logs.write_per_turn(None)


async def _run_to_end(main: Coroutine[Any, Any, T]) -> T:
    try:
        return await main
    finally:
        if (long_texts := _long_texts.get(asyncio.get_running_loop())) is not None:
            long_texts.end()


class _SSLProtocol(asyncio.sslproto.SSLProtocol):
    """The TLS of asyncio; it disconnects a peer that sends many messages without data.

    OpenSSL needs 36 us for a message of 27 bytes that changes a key, and accepts any number of them.
    """

    max_size = _TLS_RECEIVE_BYTES
    _without_data = 0  # bytes since the last data

    def buffer_updated(self, nbytes: int) -> None:
        protocol: Any = self  # its attributes are private
        self._without_data += nbytes
        super().buffer_updated(nbytes)
        if protocol._app_reading_paused:
            self._without_data = 0  # data waits in memory
        elif self._without_data > _MAX_WITHOUT_DATA:
            transport = protocol._get_app_transport()
            peer = str(transport.get_extra_info("peername"))
            log.info("TLS peer sends no data", extra={"peer": peer, "bytes": self._without_data})
            transport.abort()

    def _do_read__copied(self) -> None:
        """Pass on the received data, as asyncio does, and note whether there was any."""
        protocol: Any = self
        pieces = []
        is_ended = False
        try:
            while piece := protocol._sslobj.read(self.max_size):
                pieces.append(piece)
            is_ended = True
        except (ssl.SSLWantReadError, ssl.SSLSyscallError):
            pass
        if pieces:
            self._without_data = 0
            protocol._app_protocol.data_received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if is_ended:
            protocol._call_eof_received()
            protocol._start_shutdown()


def _log_unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    log.error("unexpected error", exc_info=context.get("exception"), extra={"where": context.get("message")})


class _LongTexts:
    """The long texts of one event loop that are worked on in threads, or wait for one.

    A peer has few threads, and all peers half of them. Otherwise one that sends many long lines would have all, and
    other lines and other work would wait for their ends.
    """

    def __init__(self) -> None:
        self._running: Counter[Hashable] = Counter()  # by peer
        # By peer, the one that waits for the longest time first: the outcome, and what starts the work.
        self._waiting: dict[Hashable, deque[tuple[asyncio.Future[Any], Callable[[], object]]]] = {}

    def run(self, work: Callable[[], T], peer: Hashable) -> asyncio.Future[T]:
        """Do the work in a thread. Cancelling the future ends it soon, and drops the text: others need the memory."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()

        def start() -> None:
            self._running[peer] += 1
            loop.run_in_executor(None, run_until_cancelled).add_done_callback(on_done)

        def run_until_cancelled() -> T:
            _thread.outcome = outcome
            try:
                return work()
            finally:
                del _thread.outcome

        def on_done(done: asyncio.Future[T]) -> None:
            self._running[peer] -= 1
            if not self._running[peer]:
                del self._running[peer]
            self._start_next()
            # Also if nobody waits: an error that is not asked for is logged as an unexpected one.
            error = ProtocolError(_STOPPING) if done.cancelled() else done.exception()
            if outcome.cancelled():
                return
            if error is None:
                outcome.set_result(done.result())
            else:
                outcome.set_exception(error)

        if self._has_thread(peer):
            start()
        else:
            self._waiting.setdefault(peer, deque()).append((outcome, start))
            outcome.add_done_callback(lambda _: self._forget(peer, outcome))
        return outcome

    def end(self) -> None:
        """Have the threads end soon: decoders raise `InvalidJSON`; what waits for a thread gets `ProtocolError`."""
        _ending.set()
        for outcome, _ in chain.from_iterable(self._waiting.values()):
            if not outcome.done():
                outcome.set_exception(ProtocolError(_STOPPING))
        self._waiting.clear()

    def _forget(self, peer: Hashable, outcome: asyncio.Future[Any]) -> None:
        """Drop a text that was cancelled before it had a thread."""
        if outcome.cancelled() and peer in self._waiting:
            others = deque(entry for entry in self._waiting[peer] if entry[0] is not outcome)
            if others:
                self._waiting[peer] = others
            else:
                del self._waiting[peer]

    def _has_thread(self, peer: Hashable) -> bool:
        is_below = peer is None or self._running[peer] < _MAX_THREADS_OF_PEER
        return is_below and self._running.total() < _MAX_THREADS // 2

    def _start_next(self) -> None:
        """Give the thread that is free again to the next peer in turn."""
        for peer in [peer for peer in self._waiting if self._has_thread(peer)]:
            waiting = self._waiting.pop(peer)
            while waiting:
                outcome, start = waiting.popleft()
                if not outcome.done():
                    start()
                    if waiting:
                        self._waiting[peer] = waiting
                    return


_long_texts: WeakKeyDictionary[asyncio.AbstractEventLoop, _LongTexts] = WeakKeyDictionary()


@overload
def run_in_turn(work: Callable[[bytes], T], text: bytes | LongLine, peer: Hashable = None) -> asyncio.Future[T]: ...


@overload
def run_in_turn(work: Callable[[A], T], text: A, peer: Hashable = None) -> asyncio.Future[T]: ...


def run_in_turn(work: Callable[[Any], T], text: Any, peer: Hashable = None) -> asyncio.Future[T]:
    """Do the work on a long text in a thread, in turn with other long texts; return a future of its result.

    The work gets a `LongLine` joined.
    `peer`: who has sent it; None: a peer whose number of texts is limited elsewhere.
    """

    def run_work() -> T:
        with long_lines:
            return work(text.join() if isinstance(text, LongLine) else text)

    loop = asyncio.get_running_loop()
    if loop not in _long_texts:
        _long_texts[loop] = _LongTexts()
    return _long_texts[loop].run(run_work, peer)
