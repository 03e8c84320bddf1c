"""Passwords hashed by crypt(3), in every form that the system's libcrypt knows: $5$, $6$, $y$, $2b$ and others.

Python 3.13 has no module `crypt`; this asks the library itself.
"""

from __future__ import annotations

import ctypes
import hmac
from functools import cache
from typing import Any

__all__ = ["matches"]

#: Where `crypt_r` may be: libxcrypt and old glibc; libxcrypt without the old interface; musl, which has it in libc.
_LIBRARIES = ("libcrypt.so.1", "libcrypt.so.2", None)

#: `struct crypt_data` has 32 KiB in libxcrypt and 128 KiB in old glibc. It must be zeroed.
_CRYPT_DATA_BYTES = 256 * 1024


def matches(password: str, hashed: str) -> bool:
    """Say whether `hashed` is a hash of `password`. Blocks for as long as the hash is meant to cost.

    A hash of an unknown form, a locked one (``!...``, ``*``) and an empty one match no password.

    Args:
        password: the password in clear.
        hashed: what crypt(3) made of the right password.

    Raises:
        OSError: this system has no `crypt_r`.
    """
    try:
        secret, setting = password.encode("utf-8"), hashed.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which no password file can hold
        return False
    # A C string ends at NUL: "secret\0anything" would be taken for "secret".
    if not setting or setting[:1] in b"!*" or b"\0" in secret or b"\0" in setting:
        return False
    made = _crypt_r()(secret, setting, ctypes.create_string_buffer(_CRYPT_DATA_BYTES))
    # crypt(3) says "no" by NULL or, so that careless callers fail too, by a token that is no hash.
    if made is None or made.startswith(b"*"):
        return False
    return hmac.compare_digest(made, setting)


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
    raise OSError("no crypt_r found: neither libcrypt.so.1 nor libcrypt.so.2 nor the C library has it")
