"""Cursors: the place at which a list continues, in a form that its clients cannot read or change.

This place is a sequence number, which tells how many jobs there are, also to a client that may list a few of
them. So a cursor is encrypted, and belongs to one list: its filter and its order.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from hashlib import blake2b
from os import urandom

_VERSION = b"\x01"
_NONCE_BYTES = _SEQ_BYTES = _TAG_BYTES = 8


class InvalidCursor(ValueError):
    """A text that is no cursor of this list."""


class Cursors:
    """The cursors of one dispatcher; `key` is a secret that never changes."""

    def __init__(self, key: bytes) -> None:
        self._key = hmac.digest(key, b"cursors of lists", "sha256")

    def encode(self, seq: int, list_form: str) -> str:
        """Return the cursor of a place in the list of this form."""
        nonce = urandom(_NONCE_BYTES)
        pad, tag = self._derive(nonce, list_form)
        hidden = (seq ^ int.from_bytes(pad)).to_bytes(_SEQ_BYTES)
        return base64.urlsafe_b64encode(_VERSION + nonce + hidden + self._sign(tag, hidden)).decode().rstrip("=")

    def decode(self, cursor: str, list_form: str) -> int:
        """Return the place of a cursor. Raises `InvalidCursor` if it is not one of this list."""
        try:
            text = base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4))
        except (UnicodeEncodeError, binascii.Error) as error:
            raise InvalidCursor("expected a cursor") from error
        nonce, hidden, signature = text[1:9], text[9:17], text[17:]
        pad, tag = self._derive(nonce, list_form)
        if text[:1] != _VERSION or not hmac.compare_digest(signature, self._sign(tag, hidden)):
            raise InvalidCursor("expected a cursor of this filter and order")
        return int.from_bytes(hidden) ^ int.from_bytes(pad)

    def _derive(self, nonce: bytes, list_form: str) -> tuple[bytes, bytes]:
        # Not `hmac`, which releases Python's lock: on a busy dispatcher, that would cost more than the digest.
        digest = blake2b(nonce + list_form.encode("utf-8", "surrogatepass"), key=self._key, digest_size=32).digest()
        return digest[:_SEQ_BYTES], digest[_SEQ_BYTES:]

    def _sign(self, tag: bytes, hidden: bytes) -> bytes:
        return blake2b(hidden, key=tag, digest_size=_TAG_BYTES).digest()
