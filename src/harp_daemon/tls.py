"""The minimum version of TLS of a daemon."""

from __future__ import annotations

import ssl
import warnings

#: The versions by their names in the configuration.
TLS_VERSIONS = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}

DEFAULT_MINIMUM = "1.2"


def set_minimum_version(context: ssl.SSLContext, minimum: str) -> bool:
    """Set the minimum version of TLS; return whether it is below 1.2, which the daemon logs as a warning.

    OpenSSL 3 rejects the signatures of TLS 1.0 and 1.1 at its default security level, so a minimum below 1.2 also
    lowers that level.
    """
    low = minimum in ("1.0", "1.1")
    if low:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        # Python warns of old versions; the administrator configured one and is warned by the daemon's log.
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = TLS_VERSIONS[minimum]
    return low
