"""When certificates end: errors for a check, and warnings in the log of a daemon.

The dates are read from the encoded certificates, because Python's `ssl` shows them only for authorities, and the
daemons do without the library `cryptography`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from harp_daemon.der import certificate_fields, elements
from harp_daemon.regular_files import read_regular

log = logging.getLogger(__name__)

#: Days before its end from which a certificate is reported, and seconds between two reports.
WARNING_DAYS = 30
REPORT_EVERY = 86_400.0

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_UTC_TIME = 0x17
#: Before the validity, a certificate has its serial number, the algorithm of its signature, and its issuer.
_FIELDS_BEFORE_VALIDITY = 3


@dataclass(frozen=True)
class Validity:
    """The validity of a certificate of a file."""

    file: Path
    number: int  #: Its place in the file, from 1.
    begins: datetime
    ends: datetime

    def describe_error(self, now: datetime) -> str | None:
        """Return why it is invalid at this time; None: it is valid."""
        where = f"{self.file}: certificate {self.number}"
        if now > self.ends:
            return f"{where} has expired on {self.ends:%Y-%m-%d}; replace it"
        if now < self.begins:
            return f"{where} is not valid before {self.begins:%Y-%m-%d %H:%M} UTC; check the clock"
        return None

    def describe_warning(self, now: datetime) -> str | None:
        """Return a warning if it ends soon; None otherwise."""
        if self.begins <= now <= self.ends and self.ends - now < timedelta(days=WARNING_DAYS):
            return f"{self.file}: certificate {self.number} expires on {self.ends:%Y-%m-%d}; replace it"
        return None


def read_validities(file: Path, content: bytes | None = None) -> list[Validity]:
    """Return the validity of each certificate of a PEM file; unreadable certificates are omitted. Raises OSError.

    `content`: of the file; None: it is read.
    """
    found = []
    content = read_regular(file) if content is None else content
    for number, text in enumerate(_PEM.findall(content.decode("ascii", "replace")), 1):
        try:
            found.append(Validity(file, number, *_read_dates(ssl.PEM_cert_to_DER_cert(text))))
        except (ValueError, IndexError, StopIteration):
            pass  # OpenSSL reports it when the file is used
    return found


def read_end(der: bytes) -> float | None:
    """Return the Unix time at which an encoded certificate ends; None if it cannot be read."""
    try:
        return _read_dates(der)[1].timestamp()
    except (ValueError, IndexError, StopIteration):
        return None


def _read_dates(der: bytes) -> tuple[datetime, datetime]:
    """Return begin and end of a certificate. Spec: RFC 5280, 4.1."""
    begins, ends = elements(certificate_fields(der)[_FIELDS_BEFORE_VALIDITY][1])
    return _parse_time(*begins), _parse_time(*ends)


def _parse_time(tag: int, text: bytes) -> datetime:
    digits = text.decode("ascii")
    if tag == _UTC_TIME:  # two digits for the year, from 1950
        digits = ("19" if digits[:2] >= "50" else "20") + digits
    return datetime.strptime(digits, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def log_expiry(validities: Iterable[Validity]) -> None:
    """Log a warning for each certificate that is invalid now or ends soon."""
    now = datetime.now(UTC)
    for validity in validities:
        fields = {"file": str(validity.file), "certificate": validity.number}
        if now < validity.begins:
            log.warning("certificate is not valid yet", extra={**fields, "begins": f"{validity.begins:%Y-%m-%d}"})
        elif now > validity.ends:
            log.warning("certificate has expired", extra={**fields, "ended": f"{validity.ends:%Y-%m-%d}"})
        elif validity.describe_warning(now):
            days = (validity.ends - now).days
            log.warning("certificate expires soon", extra={**fields, "ends": f"{validity.ends:%Y-%m-%d}", "days": days})


async def log_expiry_regularly(validities: Callable[[], Iterable[Validity]], every: float = REPORT_EVERY) -> None:
    """Log the warnings now and every `every` seconds, until cancelled. `validities` is called in a thread."""
    while True:
        log_expiry(await asyncio.to_thread(lambda: list(validities())))
        await asyncio.sleep(every)
