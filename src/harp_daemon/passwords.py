"""Compares passwords with stored passwords, and caches those that match: the next check needs no slow hash.

A stored password is `PLAIN` with the password; or, with or without `CRYPT`, a hash of crypt(3), in any format of the
system's libcrypt: $5$, $6$, $y$, $2b$ and others. Python 3.13 has no module `crypt`; so the library is called here.
"""

from __future__ import annotations

import ctypes
import hmac
import re
import secrets
from collections.abc import Mapping
from functools import cache
from typing import Any

PLAIN, CRYPT = "plain:", "crypt:"

#: Libraries that may have `crypt_r`: libxcrypt or old glibc; libxcrypt without its old interface; None: the C library,
#: as in musl.
_LIBRARIES = ("libcrypt.so.1", "libcrypt.so.2", None)
#: `struct crypt_data` has 32 KiB in libxcrypt and 128 KiB in old glibc. It must be zeroed.
_CRYPT_DATA_BYTES = 256 * 1024


def matches(password: str, stored: str) -> bool:
    """Return whether a password is correct. It blocks while the hash function runs.

    A hash in an unknown format, a locked one (``!...``, ``*``) and an empty one match no password. Raises OSError if
    this system has no `crypt_r`.
    """
    if stored.startswith(PLAIN):
        return hmac.compare_digest(_encode(PLAIN + password), _encode(stored))
    secret, setting = _encode(password), _encode(stored.removeprefix(CRYPT))
    # A C string ends at NUL: "secret\0anything" would match "secret".
    if not setting or setting[:1] in b"!*" or b"\0" in secret or b"\0" in setting:
        return False
    result = _crypt_r()(secret, setting, ctypes.create_string_buffer(_CRYPT_DATA_BYTES))
    # crypt(3) reports an error by NULL or by a string that starts with "*" and is no hash.
    if result is None or result.startswith(b"*"):
        return False
    return hmac.compare_digest(result, setting)


def is_supported(stored: str) -> bool:
    """Return whether this system knows the format of a hash. It blocks as `matches`. Raises OSError."""
    result = _crypt_r()(b"", _encode(stored), ctypes.create_string_buffer(_CRYPT_DATA_BYTES))
    return result is not None and not result.startswith(b"*")


class PasswordCache:
    """The last correct password of each user. Thread-safe.

    It stores a keyed digest of password and stored password, with a random key of this process. So an entry is valid
    only while the stored password is unchanged, and it does not reveal the password.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._digests: dict[str, bytes] = {}

    def check(self, user: str, password: str, stored: Mapping[str, str]) -> bool:
        """Return whether the user exists and has this password; cache a correct one. It blocks.

        `stored`: the stored passwords by user.
        """
        # For an unknown user the costliest password is checked, so that the time does not reveal which names exist.
        expected = stored.get(user) or max(stored.values(), key=_estimate_cost, default="")
        if not matches(password, expected) or user not in stored:
            return False
        self._digests[user] = self._digest(password, expected)
        return True

    def contains(self, user: str, password: str, stored: Mapping[str, str]) -> bool:
        """Return whether `check` has accepted this password, and the stored password has not changed."""
        found, expected = self._digests.get(user), stored.get(user)
        return (
            found is not None and expected is not None and hmac.compare_digest(found, self._digest(password, expected))
        )

    def _digest(self, password: str, stored: str) -> bytes:
        # With the length, so that no other pair gives the same text.
        return hmac.digest(self._key, _encode(f"{len(stored)} {stored}{password}"), "sha256")


_BCRYPT = re.compile(r"\$2[abxy]\$(\d\d)\$", re.ASCII)
_SHA = re.compile(r"\$[56]\$(?:rounds=(\d{1,9})\$)?", re.ASCII)
_YESCRYPT = re.compile(r"\$g?y\$.([./0-9A-Za-z])", re.ASCII)
_DIGITS = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def _estimate_cost(stored: str) -> float:
    """Return about how many milliseconds the hash function of a stored password needs."""
    if stored.startswith(PLAIN):
        return 0.0
    setting = stored.removeprefix(CRYPT)
    if found := _BCRYPT.match(setting):
        return 0.05 * 2.0 ** int(found[1])
    if found := _SHA.match(setting):
        return 0.0004 * int(found[1] or 5000)
    if found := _YESCRYPT.match(setting):
        return 30.0 * 2.0 ** (_DIGITS.index(found[1]) - _DIGITS.index("9"))
    return 100.0 if setting.startswith("$7$") else 0.5


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


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
