"""The policy for connecting to the dispatcher again after an interruption: when, how often, and for how long.

The shells pass the time (seconds of the monotonic clock) and wait. Refused requests are interruptions. But if the
client has no permission, or its token is not accepted, they are only with `retry_after`. So are errors of the network
(`OSError`) and the end of the connection (`EOFError`), as the cause of an error. Invalid data from the peer
(`ValueError`) is not, nor is a connection that this side has closed (no cause).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from harp.errors import (
    AccessDenied,
    AuthenticationFailed,
    CommunicationError,
    HarpException,
    NotSupported,
    RequestRefused,
)

#: Seconds before the first attempt; each further pause is twice as long, up to the longest.
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0
#: A connection that stays open for this many seconds ends the outage, unless the reply is late.
_STABLE_SECONDS = 15.0
#: From this many seconds on, there is no limit; not every integer beyond has a float.
_UNLIMITED = 2**53


def parse_reconnect(reconnect: object) -> float:
    """Return the option `reconnect` in seconds; None and False are 0. Raise `HarpException` if it is invalid."""
    if reconnect is None or reconnect is False:
        return 0.0
    if isinstance(reconnect, (int, float)) and reconnect is not True and reconnect >= 0:
        return float(reconnect) if reconnect < _UNLIMITED else math.inf
    raise HarpException(f"reconnect: expected seconds of at least 0, or None, got {reconnect!r}")


def closed_without_reply(error: HarpException) -> bool:
    """Return whether the peer closed the connection where a line was expected."""
    return isinstance(error.__cause__, EOFError)


def _is_late(error: HarpException) -> bool:
    """Return whether the peer has not replied in time; the system's own time-outs have an error number."""
    return isinstance(error.__cause__, TimeoutError) and not error.__cause__.errno


def unsupported_by_peer(error: CommunicationError, feature: str) -> NotSupported:
    """Return the error for a feature that a legacy dispatcher lacks: it closes the connection without a reply."""
    return NotSupported(f"{error}; the dispatcher may be too old for {feature}")


class ReconnectPolicy:
    """The attempts of one reader to reach the dispatcher again, in outages of a number of seconds at most; 0: none.

    `on_outage` is called with the error that begins an outage.
    """

    def __init__(self, seconds: float, on_outage: Callable[[HarpException], None] = lambda error: None) -> None:
        self._seconds = seconds
        self._on_outage = on_outage
        #: None: never connected; infinite: the present outage is already counted.
        self._connected_at: float | None = None
        self._outage_since: float | None = None
        self._pause = _FIRST_PAUSE
        #: Attempts in this outage.
        self.attempts = 0

    def __bool__(self) -> bool:
        return self._seconds > 0

    def connected(self, now: float) -> None:
        """Note that a connection was established."""
        self._connected_at = now

    def end_outage(self) -> None:
        """Note that the dispatcher has answered: the next interruption begins a new outage."""
        self._outage_since = None
        self._pause = _FIRST_PAUSE
        self.attempts = 0

    def is_interruption(self, error: HarpException) -> bool:
        """Return whether an error is an interruption, after a connection was established."""
        if isinstance(error, (AccessDenied, AuthenticationFailed)):
            transient = error.retry_after is not None
        elif isinstance(error, RequestRefused):
            transient = True
        else:
            transient = isinstance(error.__cause__, (OSError, EOFError))
        return transient and self._connected_at is not None

    def next_pause(self, error: HarpException, now: float) -> float:
        """Return the seconds to wait before the next attempt.

        Raise the error if it is not transient, if no connection was established, or if the outage has lasted too
        long; then its message has the time and number of attempts.
        """
        if not self or not self.is_interruption(error):
            raise error
        assert self._connected_at is not None
        if now - self._connected_at >= min(_STABLE_SECONDS, self._seconds) and not _is_late(error):
            self.end_outage()
        self._connected_at = math.inf
        if self._outage_since is None:
            self._outage_since = now
        remaining = self._outage_since + self._seconds - now
        if remaining <= 0:
            tried = f"gave up after {self.attempts} attempts in {self._seconds:g} s"
            if isinstance(error, RequestRefused):
                raised = type(error)(error.type, f"{error.message}; {tried}", error.data)
                raised.retry_after = error.retry_after
                raise raised from error
            raise CommunicationError(f"{error}; {tried}") from error
        if not self.attempts:
            self._on_outage(error)
        self.attempts += 1
        # Random, so that readers that were disconnected together do not return together.
        pause = self._pause * random.uniform(0.5, 1.0)  # noqa: S311  not a secret
        if isinstance(error, RequestRefused) and error.retry_after is not None:
            pause += error.retry_after
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        return min(pause, remaining)
