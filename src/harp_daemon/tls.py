"""The least version of TLS that a daemon speaks."""

from __future__ import annotations

import ssl
import warnings

#: The names that a configuration may give.
TLS_VERSIONS = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}

DEFAULT_MINIMUM = "1.2"


def set_minimum_version(context: ssl.SSLContext, floor: str) -> bool:
    """Set the least version that the context speaks.

    OpenSSL 3 refuses the signatures of TLS 1.0 and 1.1 at its usual security level, so a floor below 1.2
    lowers that level too.

    Args:
        context: the context to change.
        floor: ``1.0``, ``1.1``, ``1.2`` or ``1.3``.

    Returns:
        Whether the floor is below 1.2: worth a warning in the log.
    """
    version = TLS_VERSIONS[floor]
    low = floor in ("1.0", "1.1")
    if low:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        # Python warns of the old versions; the administrator, who asked for one, is warned by the daemon's log.
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = version
    return low
