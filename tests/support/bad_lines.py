"""Lines of any length with contents that are expensive for decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping

#: Texts of about `size` bytes, by what they have many of.
BAD_VALUES: Mapping[str, Callable[[int], bytes]] = {
    "empty arrays": lambda size: b"[%b[]]" % (b"[]," * (size // 3)),
    "numbers": lambda size: b"[%b1]" % (b"1," * (size // 2)),
    "empty strings": lambda size: b'[%b""]' % (b'"",' * (size // 3)),
    "keys": lambda size: b"{%b}" % b",".join(b'"%d":1' % number for number in range(size // 10)),
    "repeated keys": lambda size: b'{%b"a":1}' % (b'"a":1,' * (size // 6)),
    "digits": lambda size: b"1" * size,
    "null characters": lambda size: b'"%b"' % (rb"\u0000" * (size // 6)),
    "lone surrogates": lambda size: b'"%b"' % (rb"\ud800" * (size // 6)),
    "backslashes": lambda size: b'"%b"' % (rb"\\" * (size // 2)),
    "quotes": lambda size: b'"%b"' % (rb"\"" * (size // 2)),
    "characters of two bytes": lambda size: b'"%b"' % ("\xe4".encode() * (size // 2)),
    "white space": lambda size: b"[%b]" % (b" " * size),
    "levels": lambda size: b"[%b1]" % ((b"[" * 900 + b"]" * 900 + b",") * (size // 1801)),
    "too many levels": lambda size: b"[" * (size // 2) + b"]" * (size // 2),
    "letters": lambda size: b'"%b"' % (b"x" * size),
}


def bad_lines(name: str, size: int, template: bytes) -> list[bytes]:
    """Return lines of about `size` bytes: a bad value as the member `%b` of the template, and as the only member."""
    value = BAD_VALUES[name](size)
    return [
        template % value + b"\n",
        b'{"harp":%b}\n' % value,
        b'{"%b":1}\n' % value.replace(b'"', b"'"),
        value + b"\n",
    ]
