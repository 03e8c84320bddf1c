"""Checks passwords against hashes of crypt(3), in all formats of the system's libcrypt: $5$, $6$, $y$, $2b$ and others.

Python 3.13 has no module `crypt`, so this module calls the library.
"""

from __future__ import annotations

import ctypes
import hmac
from functools import cache
from typing import Any

#: Libraries that may have `crypt_r`: libxcrypt or old glibc; libxcrypt without its old interface; None: the C library,
#: as in musl.
_LIBRARIES = ("libcrypt.so.1", "libcrypt.so.2", None)

#: `struct crypt_data` has 32 KiB in libxcrypt and 128 KiB in old glibc. It must be zeroed.
_CRYPT_DATA_BYTES = 256 * 1024


def matches(password: str, hashed: str) -> bool:
    """Return whether `hashed` is a hash of `password`. It blocks for the time that the hash function takes.

    A hash in an unknown format, a locked one (``!...``, ``*``) and an empty one match no password.

    Args:
        password: the password in clear.
        hashed: the hash of the correct password, by crypt(3).

    Raises:
        OSError: this system has no `crypt_r`.
    """
    try:
        secret, setting = password.encode("utf-8"), hashed.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which no password file can hold
        return False
    # A C string ends at NUL: "secret\0anything" would match "secret".
    if not setting or setting[:1] in b"!*" or b"\0" in secret or b"\0" in setting:
        return False
    result = _crypt_r()(secret, setting, ctypes.create_string_buffer(_CRYPT_DATA_BYTES))
    # crypt(3) reports an error by NULL or by a string that starts with "*" and is no hash.
    if result is None or result.startswith(b"*"):
        return False
    return hmac.compare_digest(result, setting)


@cache
def _crypt_r() -> Any:
    for library in _LIBRARIES:
        try:
            function = ctypes.CDLL(library, use_errno=True).crypt_r
        except (OSError, AttributeError):  # no such library; a library without it
            continue
        function.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p)
        function.restype = ctypes.c_char_p
        return function
    raise OSError("crypt_r not found in libcrypt.so.1, libcrypt.so.2 and the C library")
