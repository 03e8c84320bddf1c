"""What comes as a stream: its items, what is to be asked for them, and how to go on after an interruption.

As in `harp._core.operations`, nothing here touches a socket or reads a clock: a `Reader` is given lines, errors and
the time,
and the shells do what it says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from harp._core.operations import REFUSALS, Answer, Job, Result, error_of, outcome_of
from harp._core.retry import Patience, closed_silently, too_old
from harp.errors import CommunicationError, HarpException
from harp.protocol import harpd as daemon
from harp.protocol.ends import Failed, Raised, Returned
from harp.protocol.replies import Continue, Exchange, Packet
from harp.protocol.requests import FollowStream, ReadStream, encode_request

__all__ = ["DirectReader", "Reader", "StreamReader"]


#: Who does not know a job closes within so many seconds; a connection that stood longer was no refusal.
_REFUSED_WITHIN = 1.0


class Reader(ABC):
    """Takes the lines of a stream and gives its items; says what to ask, and how to go on after an interruption."""

    def request(self) -> bytes | None:
        """The line to send over a new connection before the next line can be read; given once. None: there is none."""
        return None

    def connected(self, now: float) -> None:  # noqa: B027  who has nothing to ask need not know
        """The connection for the request came to be, at this time."""

    @abstractmethod
    def read(self, line: bytes) -> tuple[Any, ...]:
        """The items of a line, none or one. Raises what the line reports, and `ProtocolError`."""

    @abstractmethod
    def read_on(self, lines: Iterable[bytes]) -> list[Any]:
        """The items of the first of these lines, in one step as there may be many; the next line is for `read`.

        They came behind a line with an item, and give one item each.
        """

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether the last line has come."""

    @property
    def keep(self) -> float | None:
        """Seconds for which the connection then waits for another request; None: it is to be closed."""
        return None

    def interrupted(self, error: HarpException, now: float) -> float:
        """The seconds to wait before what `request` then gives is asked. Raises the error when there is no going on."""
        raise error


class StreamReader(Reader):
    """Reads a job's records, each once, over as many connections as it takes; the job keeps the end that closes them.

    Whoever goes on after an interruption must know a number. A `FollowStream` without `since` has none before its
    first record. So `ReadStream`, which answers at once, is asked first: it tells the number, and from there on is
    followed.

    Dispatchers of the field close the connection without a word when they don't know the job. So that this is not
    taken for an outage, `ReadStream` is also what is asked again as long as nothing has been heard at all; its
    silence is then the answer.

    Args:
        job: the job.
        request: what is wanted.
        numbered: whether items are pairs of a record's number and the record; timed ones are number, time and record.
        reconnect: for how many seconds in a row the dispatcher is to be reached again; of use to a `FollowStream` only.
        asked: the request has been sent already.
    """

    def __init__(
        self,
        job: Job,
        request: FollowStream | ReadStream,
        numbered: bool,
        reconnect: float = 0.0,
        asked: bool = False,
    ) -> None:
        self._job = job
        self._wanted = request
        self._numbered = numbered
        self._patience = Patience(reconnect if isinstance(request, FollowStream) else 0.0)
        self._number = request.since
        self._connected = 0.0
        self._heard = False
        self._silences = 0
        self._finished = False
        self._unsent: FollowStream | ReadStream | None
        self._ask(self._onward() if self._patience and request.since is None else request)
        if asked:
            self._unsent = None

    def _ask(self, request: FollowStream | ReadStream) -> None:
        self._asked = request
        self._exchange = Exchange(request)
        self._unsent = request

    def _onward(self) -> FollowStream | ReadStream:
        """What to ask, given what is known."""
        wanted = self._wanted
        if self._number is None:
            # One record more than none: its number is what counts.
            return ReadStream(wanted.job, recent=max(wanted.recent or 0, 1), timed=wanted.timed)
        kind = ReadStream if self._silences and not self._heard else FollowStream
        return kind(wanted.job, since=self._number, timed=wanted.timed)

    @property
    def finished(self) -> bool:
        """Whether the closing line has come."""
        return self._finished

    def request(self) -> bytes | None:
        """The line to send over a new connection before the next line can be read; given once. None: there is none."""
        request, self._unsent = self._unsent, None
        return None if request is None else encode_request(request)

    def connected(self, now: float) -> None:
        """The connection for the request came to be, at this time."""
        self._connected = now
        self._patience.connected(now)

    def read(self, line: bytes) -> tuple[Any, ...]:
        """The record of a line, nothing for a closing line.

        Raises:
            RemoteError: the dispatcher refused the request.
            ProtocolError: the line may not come here.
        """
        reply = self._exchange.reply(line)
        if isinstance(reply, Failed) and reply.type in REFUSALS:
            raise error_of(reply)
        self._heard = True
        self._patience.succeeded()
        if isinstance(reply, Packet):
            known, self._number = self._number is not None, reply.number + 1
            # Of those asked for to learn the number, the first was there before; others came meanwhile.
            unwanted = not known and self._asked is not self._wanted and not self._wanted.recent
            return () if unwanted else (self._item(reply),)
        if isinstance(reply, Continue) and isinstance(self._wanted, FollowStream):
            self._number = self._number or 0
            self._ask(self._onward())
            return ()
        self._finished = True
        self._job.keep(Answer(reply, line))
        return ()

    def read_on(self, lines: Iterable[bytes]) -> list[Any]:
        """See `Reader`."""
        first = self._number
        if first is None or self._wanted.timed:
            return []
        found = self._exchange.packets(lines)
        self._number = first + len(found)
        return list(enumerate(found, first)) if self._numbered else found

    def _item(self, packet: Packet) -> Any:
        if self._wanted.timed:
            return packet.number, packet.time, packet.data
        return (packet.number, packet.data) if self._numbered else packet.data

    def interrupted(self, error: HarpException, now: float) -> float:
        """The seconds to wait before what `request` then gives is asked.

        Raises:
            HarpException: the error, when there is no going on.
        """
        silent = not self._heard and closed_silently(error) and now - self._connected < _REFUSED_WITHIN
        self._silences += silent
        refused = silent and isinstance(self._asked, ReadStream) and self._silences > 1
        if silent and (refused or not self._patience):
            assert isinstance(error, CommunicationError)
            if self._wanted.timed:
                raise too_old(error, "timed=True") from error
            raise error
        pause = self._patience.pause(error, now)
        self._ask(self._onward())
        return pause


class DirectReader(Reader):
    """Reads what harpd says after a request."""

    def __init__(self) -> None:
        self._exchange = daemon.Exchange()

    @property
    def finished(self) -> bool:
        """Whether the closing line has come."""
        return self._exchange.finished

    @property
    def keep(self) -> float | None:
        """Seconds for which harpd then waits for another request; None: it closes, or the closing line has not come."""
        return self._exchange.keep if self._exchange.finished else None

    def streams(self, line: bytes) -> bool:
        """Read the first line: whether the result will be a streamed one.

        Raises:
            RemoteError: harpd refused the call.
            ProtocolError: the line may not come here.
        """
        message = self._exchange.message(line)
        if isinstance(message, Failed):
            raise error_of(message)
        assert isinstance(message, daemon.Acknowledgement)
        return message.stream_result

    def read(self, line: bytes) -> tuple[Any, ...]:
        """The record of a line; the end result as a `Result`.

        Raises:
            RemoteException: the procedure raised.
            RemoteError: the call was cut short.
            ProtocolError: the line may not come here.
        """
        message = self._exchange.message(line)
        if isinstance(message, daemon.Record):
            return (message.data,)
        if isinstance(message, Returned):
            return (Result(message.result),)
        assert isinstance(message, (Raised, Failed))  # the exchange lets nothing else pass
        raise outcome_of(message)

    def read_on(self, lines: Iterable[bytes]) -> list[Any]:
        """See `Reader`."""
        return self._exchange.records(lines)
