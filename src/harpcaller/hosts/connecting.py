"""A connection to a host, and what its faults mean for the job: each is mapped to a job's end here, once.

Spec: docs/protocol.md, Error types.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from harp.protocol.ends import Failed
from harp.protocol.json_text import Raw, dumps
from harp.protocol.lines import LineTooLong
from harp_daemon.sockets import prepare
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.tls import CertificateRefused, HostTLS, parse_ip, server_name

__all__ = [
    "CONNECT_ERRORS",
    "HostUnreachable",
    "connect",
    "describe_host",
    "errno_data",
    "format_address",
    "map_connect_errors",
    "to_failed",
    "to_protocol_error",
]

#: What `connect` and a connection raise, for `failed`. UnicodeError: an address that is no name.
CONNECT_ERRORS = (OSError, CertificateRefused, UnicodeError)

#: Faults of this machine; all others are the network's.
_LOCAL_ERRNOS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EADDRNOTAVAIL}
)

#: What OpenSSL says when the other side's first bytes are no TLS.
_NOT_TLS_REASONS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "RECORD_LAYER_FAILURE"})

#: The loop raises some of these without a number.
_ERRNO_BY_CLASS = {
    TimeoutError: errno.ETIMEDOUT,
    ConnectionResetError: errno.ECONNRESET,
    ConnectionAbortedError: errno.ECONNABORTED,
    BrokenPipeError: errno.EPIPE,
}

_RESOLVER_ERRORS = {getattr(socket, name): name for name in dir(socket) if name.startswith("EAI_")}

#: What the resolver gives for an address.
_AddressInfo: TypeAlias = tuple[int, int, int, str, tuple[Any, ...]]

#: How much the stream buffers before it stops reading is twice this, in bytes.
_STREAM_LIMIT = 64 * 1024


class HostUnreachable(Exception):
    """A host that could not be connected to, or that refused to list its calls.

    Attributes:
        error: the reason, as a job's end.
    """

    def __init__(self, error: Failed) -> None:
        super().__init__(error.message)
        self.error = error


@contextmanager
def map_connect_errors(host: Host) -> Iterator[None]:
    """Raise errors of the host or the network as `HostUnreachable`."""
    try:
        yield
    except LineTooLong as error:
        raise HostUnreachable(to_protocol_error(error, host)) from error
    except CONNECT_ERRORS as error:
        raise HostUnreachable(to_failed(error, host, "connecting")) from error


async def connect(host: Host, tls: HostTLS, seconds: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a host, and accept its certificate.

    Args:
        host: the host.
        tls: judges its certificate.
        seconds: for reaching it, and again for the handshake.

    Raises:
        OSError: it can't be reached, or the handshake failed.
        CertificateRefused: its certificate is not accepted.
        UnicodeError: its address is no name.
    """
    chain_fault: str | None = None
    for context in tls.contexts:
        try:
            reader, writer = await _connect(host, context, seconds)
        except ssl.SSLCertVerificationError as error:
            chain_fault = error.verify_message
            continue
        try:
            tls.check_certificate(writer.get_extra_info("ssl_object"), host, chain_fault)
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer
    assert chain_fault is not None  # else a context was accepted or another error raised
    raise tls.chain_refused(chain_fault)


async def _connect(
    host: Host, context: ssl.SSLContext, seconds: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(seconds):
        connection = await _connect_any_address(host, seconds)
    # From its first step on the socket is the transport's, which closes it also when this is cancelled. Closed here
    # too, its number could be the next connection's while the loop still watches it for this one.
    async with asyncio.timeout(seconds):
        return await asyncio.open_connection(
            sock=connection,
            ssl=context,
            server_hostname=server_name(host.address),
            ssl_handshake_timeout=2 * seconds,  # the one above comes first and says so in its own way
            limit=_STREAM_LIMIT,
        )


async def _connect_any_address(host: Host, seconds: float) -> socket.socket:
    """Connect to the first of the host's addresses that answers; each has its share of the time."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    places = await _resolve(host)
    for left, place in zip(range(len(places), 1, -1), places, strict=False):
        try:
            return await _connect_address(place, (end - loop.time()) / left)
        except OSError:
            continue  # the last one's fault is the one to tell
    return await _connect_address(places[-1], end - loop.time())


async def _connect_address(place: _AddressInfo, seconds: float) -> socket.socket:
    family, kind, protocol, _, address = place
    connection = socket.socket(family, kind, protocol)
    try:
        prepare(connection)
        async with asyncio.timeout(seconds):
            await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection


async def _resolve(host: Host) -> Sequence[_AddressInfo]:
    """The places that an address stands for; at least one."""
    if parse_ip(host.address):  # needs no thread
        return socket.getaddrinfo(host.address, host.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    loop = asyncio.get_running_loop()
    return await loop.getaddrinfo(host.address, host.port, type=socket.SOCK_STREAM)


def to_failed(error: BaseException, host: Host, doing: str) -> Failed:
    """What one of `CONNECT_ERRORS` means for the job.

    Args:
        error: the fault.
        host: the host that it happened with.
        doing: what was being done, for the message: ``"connecting"``.
    """
    if isinstance(error, CertificateRefused):
        return Failed("certificate_error", f"{describe_host(host)}: its certificate is refused: {error}")
    if isinstance(error, ssl.SSLError) and error.reason in _NOT_TLS_REASONS:
        return Failed("protocol_error", f"{describe_host(host)}: {doing}: it does not speak TLS; is this harpd's port?")
    name, text = _describe_error(error)
    kind = (
        "os_error"
        if isinstance(error, OSError) and error.errno in _LOCAL_ERRNOS and _has_system_errno(error)
        else "network_error"
    )
    return Failed(kind, f"{describe_host(host)}: {doing}: {text}", errno_data(name))


def to_protocol_error(error: Exception, host: Host) -> Failed:
    """Return the end of a job whose host broke the protocol."""
    return Failed("protocol_error", f"{describe_host(host)}: what it sent is not of the protocol: {error}")


def describe_host(host: Host) -> str:
    """A host as messages name it."""
    return f"host {host.hostname} ({host.address}, port {host.port})"


def format_address(address: tuple[Any, ...]) -> str:
    """An address of a socket as the log has it."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def errno_data(name: str | None) -> Raw | None:
    """An error's data: the name of its errno, if it has one."""
    return dumps({"errno": name}) if name else None


def _has_system_errno(error: OSError) -> bool:
    """Whether `errno` is the system's: `ssl` and the resolver have numbers of their own."""
    return not isinstance(error, (ssl.SSLError, socket.gaierror))


def _describe_error(error: BaseException) -> tuple[str | None, str]:
    """The name of the errno, if there is one, and a text."""
    if isinstance(error, socket.gaierror):
        return _RESOLVER_ERRORS.get(error.errno), error.strerror or str(error)
    if isinstance(error, ssl.SSLError) or not isinstance(error, OSError):
        return None, f"TLS: {error}" if isinstance(error, ssl.SSLError) else str(error)
    number = error.errno or _ERRNO_BY_CLASS.get(type(error))
    return errno.errorcode.get(number or 0), os.strerror(number) if number else str(error)
