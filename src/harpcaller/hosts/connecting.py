"""Opens TLS connections to hosts, and maps their errors to ends of jobs. Spec: docs/protocol.md, Error types."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import sys
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest

from harp.protocol.ends import Failed
from harp.protocol.json_text import dumps
from harp.protocol.lines import LineTooLong
from harp.protocol.schema import ProtocolError
from harp_daemon.settings import OLD_TLS_REASONS
from harp_daemon.sockets import configure_socket
from harp_daemon.timer_wheel import TimerWheel
from harpcaller.config import Config
from harpcaller.hosts.connection import HarpdConnection
from harpcaller.hosts.registry import Host
from harpcaller.hosts.resolving import AddressInfo, Resolver
from harpcaller.hosts.tls import CertificateRefused, HostTLS, parse_ip, server_name

#: Errors of this machine; all other errors are errors of the network.
_LOCAL_ERRORS = ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EACCES", "EPERM", "EADDRNOTAVAIL")
#: OpenSSL's reasons if the peer's first bytes are not TLS.
_NOT_TLS_REASONS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "RECORD_LAYER_FAILURE")
#: Error numbers for errors that the event loop raises without a number.
_ERRNO_BY_CLASS = {
    type(OSError(number, "")): number for number in (errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE)
}
_RESOLVER_ERRORS = {getattr(socket, name): name for name in dir(socket) if name.startswith("EAI_")}

_ATTEMPT_DELAY = 0.25  #: Seconds after which the next address of a host is also tried.


class HostUnreachable(Exception):
    """A host that has refused to list its calls. `error` is the reason, as a job's end."""

    def __init__(self, error: Failed) -> None:
        super().__init__(error.message)
        self.error = error


#: Errors of opening a connection and of the exchange on it. UnicodeError: the address is not a valid name.
CONNECTION_ERRORS = (OSError, CertificateRefused, UnicodeError, ProtocolError, LineTooLong, HostUnreachable)


async def open_connection(
    host: Host, tls: HostTLS, config: Config, timers: TimerWheel, resolver: Resolver, max_line: int = sys.maxsize
) -> HarpdConnection:
    """Connect to a host and check its certificate. Raises OSError, `CertificateRefused` or UnicodeError."""
    try:
        return await _open_connection(host, tls, config, timers, resolver, max_line)
    except CONNECTION_ERRORS as error:
        if tls.connects is not None:
            tls.connects.record_failure(to_failed(error, host, "connecting").type)
        raise


async def _open_connection(
    host: Host, tls: HostTLS, config: Config, timers: TimerWheel, resolver: Resolver, max_line: int
) -> HarpdConnection:
    chain_error: str | None = None
    seconds = config.connect_timeout
    version = tls.version
    for context in tls.list_contexts(host):
        end = asyncio.get_running_loop().time() + seconds
        addresses = await _resolve(host, resolver, seconds)
        async with asyncio.timeout_at(end):
            connection = await connect_first(addresses)
        try:
            # From here the transport owns the socket and closes it, also after a cancellation. After a second close
            # here, the loop could still watch the descriptor, which may belong to the next connection.
            async with asyncio.timeout(seconds):
                transport, conn = await asyncio.get_running_loop().create_connection(
                    partial(HarpdConnection, timers, min(max_line, config.record_line)),
                    sock=connection,
                    ssl=context,
                    server_hostname=server_name(host.address),
                    ssl_handshake_timeout=2 * seconds,  # the timeout above expires first
                )
        except ssl.SSLCertVerificationError as error:
            chain_error = error.verify_message
            continue
        except UnicodeDecodeError as error:  # Python decodes all names
            raise CertificateRefused("it has a name that is not valid text; issue another one") from error
        try:
            tls.check_certificate(transport.get_extra_info("ssl_object"), host, chain_error)
        except BaseException:
            transport.abort()
            raise
        conn.tls_version = version
        if tls.connects is not None:
            certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True) or b""
            tls.connects.record_open(host.hostname, certificate)
            conn.on_round_trip = partial(tls.connects.record_round_trip, host.hostname)
        return conn
    assert chain_error is not None  # otherwise a context was accepted or another error was raised
    raise tls.chain_refused(chain_error)


async def _resolve(host: Host, resolver: Resolver, seconds: float) -> Sequence[AddressInfo]:
    """Return the results for the host's address, at least one."""
    if parse_ip(host.address):  # needs no thread
        return socket.getaddrinfo(host.address, host.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return await resolver.resolve(host.address, host.port, seconds)


async def connect_first(addresses: Sequence[AddressInfo]) -> socket.socket:
    """Return a socket that is connected to the first address that answers ("Happy Eyeballs", RFC 8305).

    An attempt starts when an earlier attempt has failed, or `_ATTEMPT_DELAY` s after the latest attempt. If all fail,
    the last error is raised, an OSError.
    """
    if len(addresses) == 1:
        return await _connect_address(addresses[0])
    remaining = deque(_interleave(addresses))
    attempts: set[asyncio.Task[socket.socket]] = set()
    error: BaseException | None = None
    try:
        while remaining or attempts:
            if remaining:
                attempts.add(asyncio.create_task(_connect_address(remaining.popleft())))
            delay = _ATTEMPT_DELAY if remaining else None
            done, _ = await asyncio.wait(attempts, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                if (error := attempt.exception()) is None:
                    attempts.remove(attempt)
                    return attempt.result()
            attempts -= done
        assert error is not None
        raise error
    finally:
        for attempt in attempts:
            attempt.cancel()
        for result in await asyncio.gather(*attempts, return_exceptions=True):
            if isinstance(result, socket.socket):  # it was connected at the same time
                result.close()


def _interleave(addresses: Sequence[AddressInfo]) -> list[AddressInfo]:
    """Return the addresses in an order that alternates the families, starting with the first address."""
    first = [info for info in addresses if info[0] == addresses[0][0]]
    others = [info for info in addresses if info[0] != addresses[0][0]]
    return [info for pair in zip_longest(first, others) for info in pair if info is not None]


async def _connect_address(info: AddressInfo) -> socket.socket:
    family, kind, protocol, _, address = info
    connection = socket.socket(family, kind, protocol)
    try:
        configure_socket(connection)
        await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection


def to_failed(error: BaseException, host: Host, doing: str) -> Failed:
    """Return the end of a job after one of `CONNECTION_ERRORS`; `doing` is the step that failed, for the message."""
    if isinstance(error, HostUnreachable):
        return error.error
    where = describe_host(host)
    if isinstance(error, (ProtocolError, LineTooLong)):
        return Failed("protocol_error", f"{where}: the host broke the protocol: {error}")
    if isinstance(error, CertificateRefused):
        return Failed("certificate_error", f"{where}: certificate refused: {error}")
    if isinstance(error, ssl.SSLError) and error.reason in _NOT_TLS_REASONS:
        return Failed("protocol_error", f"{where}: {doing}: it does not speak TLS; is this harpd's port?")
    name, text = _describe_error(error)
    kind = "os_error" if name in _LOCAL_ERRORS else "network_error"
    return Failed(kind, f"{where}: {doing}: {text}", dumps({"errno": name}) if name else None)


def describe_host(host: Host) -> str:
    """Return the host's name, address and port for messages."""
    return f"host {host.hostname} ({host.address}, port {host.port})"


def _describe_error(error: BaseException) -> tuple[str | None, str]:
    """Return the name of the errno, or None, and a text. The errors of `ssl` and the resolver have no errno."""
    if isinstance(error, socket.gaierror):
        return _RESOLVER_ERRORS.get(error.errno), error.strerror or str(error)
    if isinstance(error, ssl.SSLError):
        old = error.reason in OLD_TLS_REASONS
        hint = "; the host has no TLS version of at least tls_minimum in the dispatcher's configuration" if old else ""
        return None, f"TLS: {error}{hint}"
    if not isinstance(error, OSError):
        return None, str(error)
    number = error.errno or _ERRNO_BY_CLASS.get(type(error))
    return errno.errorcode.get(number or 0), os.strerror(number) if number else str(error)
