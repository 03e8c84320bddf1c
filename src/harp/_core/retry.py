"""When a reader that was interrupted tries to reach the dispatcher again, how often, and when it gives up.

Nothing here sleeps or reads a clock: the shells say what time it is (seconds of the monotonic clock), and wait. Only
what reads is repeated, never what submits or cancels.

Whether an error is an interruption is told by its cause, as `harp._net.connection` sets it: the network's errors
(`OSError`)
and the end of the connection (`EOFError`) are. Garbage from the peer (`ValueError`) is none, nor is a connection that
was closed on this side (no cause).
"""

from __future__ import annotations

import math
import random

from harp.errors import CommunicationError, HarpException, RemoteError

__all__ = ["STORAGE_ERROR", "Patience", "closed_silently", "seconds_to_reconnect", "too_old"]

#: The dispatcher's disk or database is in trouble: while it comes back, that is to be expected and passes.
STORAGE_ERROR = "storage_error"

#: Seconds before the first attempt; each further pause is twice as long, up to the longest.
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0

#: Seconds after which a connection over which nothing came was none of an outage.
_STEADY = 15.0

#: So many seconds and more are for ever; not every integer beyond has a float.
_FOR_EVER = 2**53


def seconds_to_reconnect(reconnect: object) -> float:
    """The option `reconnect`, checked; None and False are 0. Raises `HarpException`."""
    if reconnect is None or reconnect is False:
        return 0.0
    if isinstance(reconnect, (int, float)) and reconnect is not True and reconnect >= 0:
        return float(reconnect) if reconnect < _FOR_EVER else math.inf
    raise HarpException(f"reconnect: expected seconds from 0 on, or None, got {reconnect!r}")


def closed_silently(error: HarpException) -> bool:
    """Whether the peer closed the connection after a whole line, or before any."""
    return isinstance(error.__cause__, EOFError)


def too_old(error: CommunicationError, feature: str) -> CommunicationError:
    """The error that tells of a dispatcher that may not know a request: such a one closes without a reply."""
    return CommunicationError(f"{error}; the dispatcher may be too old for {feature}")


class Patience:
    """The attempts of one reader to reach the dispatcher again.

    Args:
        seconds: how long it tries in a row; 0: not at all.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._under_way = False
        self._connected: float | None = None
        self._since: float | None = None
        self._pause = _FIRST_PAUSE
        #: How often it tried in a row.
        self.attempts = 0

    def __bool__(self) -> bool:
        return self._seconds > 0

    def connected(self, now: float) -> None:
        """A connection came to be."""
        self._connected = now
        self._under_way = True

    def succeeded(self) -> None:
        """The dispatcher has said something: what comes next is another outage."""
        self._since = None
        self._pause = _FIRST_PAUSE
        self.attempts = 0

    def retries(self, error: HarpException) -> bool:
        """Whether an error is one that passes: an interruption, or trouble with storage while there is one."""
        if isinstance(error, RemoteError):
            return self._since is not None and error.type == STORAGE_ERROR
        return isinstance(error, CommunicationError) and isinstance(error.__cause__, (OSError, EOFError))

    def pause(self, error: HarpException, now: float) -> float:
        """Seconds to wait until the next attempt.

        Raises:
            HarpException: the error, when it is none that passes, when the first connection could not be made, or
                when the time is over; then it says how long was tried.
        """
        if not (self and self._under_way and self.retries(error)):
            raise error
        if self._connected is not None and now - self._connected >= min(_STEADY, self._seconds):
            self.succeeded()
        self._connected = None
        if self._since is None:
            self._since = now
        left = self._since + self._seconds - now
        if left <= 0:
            if isinstance(error, RemoteError):
                raise error
            tried = f"tried {self.attempts} times in {self._seconds:g} s to reach it again"
            raise CommunicationError(f"{error}; {tried}") from error
        self.attempts += 1
        # Readers that were cut off at the same moment shall not come back at the same moment.
        pause = min(self._pause * random.uniform(0.5, 1.0), left)  # noqa: S311  guards nothing
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        return pause
