"""The mapping of foreign errors: each error of socket, ssl, json and the protocol becomes a `CommunicationError`.

Its message contains host, port and cause. Its `__cause__` is the original: an `OSError` if the network or the peer
broke the connection, an `EOFError` if the peer closed it between lines, a `ValueError` if the peer sent invalid data.
"""

from __future__ import annotations

import os
import socket
import ssl

#: Remedies for a certificate that is not accepted, by OpenSSL's error number.
_HINTS = {
    9: "check the clocks of both machines",
    10: "renew the server's certificate",
    62: "call the host by a name that its certificate has, or give it a certificate with this name",
    64: "call the host by a name that its certificate has, or give it a certificate with this address",
}


#: The errors that are mapped.
FOREIGN_ERRORS = (OSError, EOFError, ValueError)


def describe_error(error: Exception) -> str:
    """Return an error's cause in words, with a hint where there is one."""
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = _HINTS.get(error.verify_code, "ca_file must contain the authority that issued it")
        return f"the server's certificate is not accepted: {error.verify_message.rstrip('.')} ({hint})"
    if isinstance(error, ssl.SSLError) and error.reason:
        words = error.reason.lower().replace("_", " ")
        return f"{words} (it does not speak TLS)" if error.reason == "WRONG_VERSION_NUMBER" else words
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)
