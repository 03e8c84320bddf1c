"""What may come between us and a host before anything is said about a call: one error for all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from harp.protocol.ends import Failed
from harp.protocol.lines import LineTooLong
from harpcaller.hosts.capabilities import Refused
from harpcaller.hosts.connecting import FAULTS, failed, named
from harpcaller.hosts.inventory import Host

__all__ = ["Unreachable", "not_of_the_protocol", "reaching"]


class Unreachable(Exception):
    """A host could not be connected to, or did not say what it is.

    Attributes:
        error: why, as a job's end.
    """

    def __init__(self, error: Failed) -> None:
        super().__init__(error.message)
        self.error = error


@contextmanager
def reaching(host: Host) -> Iterator[None]:
    """A context to connect in; raises `Unreachable` for whatever is the host's or the network's fault."""
    try:
        yield
    except Refused as refused:
        raise Unreachable(refused.error) from refused
    except LineTooLong as error:
        raise Unreachable(not_of_the_protocol(host, error)) from error
    except FAULTS as error:
        raise Unreachable(failed(error, host, "connecting")) from error


def not_of_the_protocol(host: Host, error: Exception) -> Failed:
    """What it means for a job that its host has sent something else than the protocol has."""
    return Failed("protocol_error", f"{named(host)}: what it sent is not of the protocol: {error}")
