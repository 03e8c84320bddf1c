"""Strict JSON for the wire, and JSON text that is passed on without decoding.

The module `json` is more lenient in four ways: deep nesting raises RecursionError, ``NaN`` passes in both directions,
bytes may be decoded as UTF-16, and repeated keys are ignored. Decoding returns a value or raises `InvalidJSON`;
encoding returns one line of ASCII or raises `NotJSON`, which has the position of the invalid part.

`Raw` is JSON text that was checked and is not decoded again: the dispatcher stores and sends payloads in this form, so
that key order, big integers and the digits of floats are unchanged. There are two decoders of a message:
`decode_values` (for clients) gives payloads as values, `harp_daemon.sliced_json.decode_slices` (for the daemons) as
`Raw`.

Each worker is forked from the zygote, which loads this module, and each page of memory that a worker touches is copied.
So the C part of `json` is used without the modules `json` and `re`. It is created once, because creating it costs as
much as encoding a small value.
"""

from __future__ import annotations

from itertools import accumulate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, ClassVar, NoReturn, TypeAlias

    JSON: TypeAlias = Any  # dict[str, JSON] | list[JSON] | str | int | float | bool | None

#: Maximum nesting of arrays and objects in a payload, and in a line: the envelope around a payload does not count. An
#: interpreter with a lower recursion limit may reject values that are less deep; both daemons raise theirs, so that
#: this limit applies.
MAX_DEPTH, MAX_LINE_DEPTH = 1000, 1016
#: Brackets and quotes that are counted in one step, and bytes in which they are looked for in one step. Other threads
#: may run between two steps.
_PIECE, _WINDOW = 1000, 64 * 1024
#: Maximum number of members of which each is looked for in the whole text.
_MAX_COUNTED = 50
_NOT_BRACKETS = bytes(set(range(256)) - set(b'[]{}"'))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_SPACE = " \t\r\n"


class InvalidJSON(ValueError):
    """Text that is not JSON, or JSON that HARP does not accept. The message has reason and position."""


class NotJSON(ValueError):
    """A value that has no form in JSON; `path` is the position of the invalid part: ``"['hosts'][3]"``, or empty."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"at {path}: {reason}" if path else reason)
        self.path = path
        self.reason = reason


class Raw(bytes):
    """Checked JSON text in UTF-8 without a line feed; it is sent and stored unchanged."""

    __slots__ = ()


class Envelope(dict[str, "Any"]):
    """An object of the protocol, whose members may be `Raw`."""

    __slots__ = ()


def reject_constant(name: str) -> NoReturn:
    """Raise `InvalidJSON` for ``NaN`` and ``Infinity``; for decoders."""
    raise InvalidJSON(f"{name} is not JSON")


def _reject_value(value: object) -> NoReturn:
    raise TypeError(type(value).__name__)


class _ScannerOptions:
    """The options of the C scanner; it prescribes their names."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(reject_constant)


# `_scan_value` returns the value at an index of a text and its end; `_encode_pieces` yields the text of a value. The
# encoder has no check for circular values, a sixth of the time of a small value: they exceed the recursion limit.
try:
    from _json import encode_basestring_ascii, make_encoder, make_scanner

    _scan_value: Callable[[str, int], tuple[JSON, int]] = make_scanner(_ScannerOptions())  # type: ignore[arg-type]
    _encode_pieces: Callable[[JSON, bool], Iterable[str]] = make_encoder(
        None, _reject_value, encode_basestring_ascii, None, ":", ",", False, False, False
    )
    _encode_sorted: Callable[[JSON, bool], Iterable[str]] = make_encoder(
        None, _reject_value, encode_basestring_ascii, None, ":", ",", True, False, False
    )
except ImportError:  # not CPython
    from json.decoder import JSONDecoder
    from json.encoder import JSONEncoder, encode_basestring_ascii

    _scan_value = JSONDecoder(parse_constant=reject_constant).scan_once  # type: ignore[attr-defined]
    _encode_pieces = JSONEncoder(
        allow_nan=False, check_circular=False, separators=(",", ":"), default=_reject_value
    ).iterencode
    _encode_sorted = JSONEncoder(sort_keys=True, check_circular=False, default=_reject_value).iterencode


def loads(text: bytes | str, limit: int = MAX_DEPTH) -> JSON:
    """Decode one JSON value; bytes must be UTF-8. `limit`: of its nesting.

    Raises `InvalidJSON` if it is not JSON, not UTF-8, ``NaN`` or ``Infinity``, nested too deep, or a number that this
    interpreter cannot represent.
    """
    return decode_text(decode_checked(text, limit))


def decode_checked(text: bytes | str, limit: int = MAX_DEPTH) -> str:
    """Return the text. Raises `InvalidJSON` if it is not UTF-8 or is nested deeper than the limit."""
    try:
        decoded = text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"not UTF-8 at byte {error.start}") from error
    if len(text) > MAX_DEPTH:
        encoded = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if exceeds_depth(encoded, limit):
            raise InvalidJSON(f"nested deeper than {limit}")
    return decoded


def decode_text(text: str, scan_value: Callable[[str, int], tuple[JSON, int]] = _scan_value) -> JSON:
    """Decode a value of checked depth. Raises `InvalidJSON`."""
    start = len(text) - len(text.lstrip(_SPACE))
    try:
        value, end = scan_value(text, start)
    except StopIteration as error:
        raise InvalidJSON(f"Expecting value at column {error.value + 1}") from error
    except RecursionError as error:
        raise InvalidJSON("nested too deep for this interpreter") from error
    except SystemError:
        import json.decoder  # noqa: F401 - Python 3.11 needs the class of the exception that it raises now

        return decode_text(text, scan_value)
    except ValueError as error:  # `InvalidJSON` too; or an integer with more digits than the interpreter converts
        at = getattr(error, "pos", None)
        raise InvalidJSON(str(error) if at is None else f"{error.msg} at column {at + 1}") from error  # type: ignore[attr-defined]
    if end != len(text) and (rest := text[end:].lstrip(_SPACE)):
        raise InvalidJSON(f"Extra data at column {len(text) - len(rest) + 1}")
    return value


def decode_enclosed(line: bytes, opening: bytes) -> tuple[JSON] | None:
    """Return the value of a line that consists of `opening`, a value and a brace; None: decode the line as usual."""
    if not line.startswith(opening) or may_exceed_depth(line):
        return None
    try:
        text = line.decode()
        value, end = _scan_value(text, len(opening))
    except (ValueError, RecursionError, StopIteration, SystemError):
        return None
    return (value,) if text[end:] == "}" else None


def may_exceed_depth(text: bytes) -> bool:
    """Return whether there are enough brackets for a nesting deeper than MAX_DEPTH."""
    count = 0
    for at in range(0, len(text) if len(text) > MAX_DEPTH else 0, _WINDOW):
        count += text.count(b"[", at, at + _WINDOW) + text.count(b"{", at, at + _WINDOW)
        if count > MAX_DEPTH:
            return True
    return False


def exceeds_depth(text: bytes, limit: int = MAX_DEPTH) -> bool:
    """Return whether JSON text is nested deeper than a limit of at least MAX_DEPTH. Fast if it has few brackets."""
    if not may_exceed_depth(text):
        return False
    # The count is wrong only after the first error of text that is not JSON; no decoder reads further.
    depth, in_string = 0, False
    for window in _windows(text):
        if b"\\" in window:
            window = window.replace(b"\\\\", b"").replace(b'\\"', b"")
        marks = window.translate(None, _NOT_BRACKETS)
        for at in range(0, len(marks), _PIECE):
            parts = marks[at : at + _PIECE].split(b'"')
            brackets = b"".join(parts[in_string::2])
            in_string ^= not len(parts) % 2
            opened = brackets.count(b"[") + brackets.count(b"{")
            if depth + opened > limit and max(accumulate(map(_STEP.__getitem__, brackets), initial=depth)) > limit:
                return True
            depth += 2 * opened - len(brackets)
    return False


def _windows(text: bytes) -> Iterator[bytes]:
    """Yield pieces of a text, none of which ends between a backslash and the next character."""
    start = 0
    while start < len(text):
        window = text[start : start + _WINDOW]
        start += len(window)
        if window.endswith(b"\\") and (len(window) - len(window.rstrip(b"\\"))) % 2:
            window += text[start : start + 1]
            start += 1
        yield window


class JSONObject(dict[str, "Any"]):
    """A decoded JSON object: its members by name, read with the methods below.

    The daemons' decoder has a subclass with `Raw` payloads.
    """

    __slots__ = ()

    #: Returns the member's value.
    value: ClassVar[Callable[[Any, str], JSON]] = dict.__getitem__
    #: Returns the member as a payload: its value or its `Raw` text, depending on the decoder.
    payload: ClassVar[Callable[[Any, str], JSON]] = dict.__getitem__

    def is_null(self, key: str) -> bool:
        """Return whether the member is null."""
        return self[key] is None

    def nested_object(self, key: str, values_only: bool = False) -> JSONObject | None:
        """Return the member as an object, None if it is not one; `values_only`: it has no payloads, which is faster."""
        value = self.value(key)
        return JSONObject(value) if isinstance(value, dict) else None

    def nested_objects(self, key: str) -> Iterator[JSONObject | None] | None:
        """Return the elements of the member as objects; None if the member is not an array.

        An element that is not an object is None. Elements are decoded one by one; each may raise `InvalidJSON`.
        """
        value = self[key]
        if not isinstance(value, list):
            return None
        return (JSONObject(element) if isinstance(element, dict) else None for element in value)


def decode_values(line: bytes) -> JSONObject:
    """Decode an object; its payloads are values. Raises `InvalidJSON`."""
    text = decode_checked(line, MAX_LINE_DEPTH)
    members = decode_text(text)
    if type(members) is not dict:
        raise InvalidJSON("expected an object")
    if "\\" in text or len(members) > _MAX_COUNTED:
        _reject_repeated_key(text)
    else:
        for name in members:
            if text.count(f'"{name}"') != 1:  # it is repeated, or a string elsewhere
                _reject_repeated_key(text)
                break
    return JSONObject(members)


def _reject_repeated_key(text: str) -> None:
    """Raise `InvalidJSON` if an object, which was decoded before, repeats a key."""
    found: set[str] = set()
    at = _skip_separators(text, text.index("{") + 1)
    while text[at] != "}":
        key, at = _scan_value(text, at)
        if key in found:
            raise InvalidJSON(f"repeated key {encode_basestring_ascii(key)}")
        found.add(key)
        _, at = _scan_value(text, _skip_separators(text, at))
        at = _skip_separators(text, at)


def _skip_separators(text: str, at: int) -> int:
    while text[at] in " \t\r\n,:":
        at += 1
    return at


def encode_value(value: JSON) -> bytes:
    """Write a value as one line of ASCII JSON, without the line feed.

    As in `json`, tuples become arrays, and keys that are int, float, bool or None become strings. Raises `NotJSON` if
    the value, or a value in it, has no form in JSON, or if two keys of an object become equal; the exception has the
    position.
    """
    try:
        text = "".join(_encode_pieces(value, False))
        encoded = text.encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        path, reason = _find_invalid_part(value) or ("", str(error))
        raise NotJSON(path, reason) from error
    if len(encoded) > MAX_DEPTH and exceeds_depth(encoded):
        raise NotJSON("", f"nested deeper than {MAX_DEPTH}")
    if '":' in text:
        if type(value) is dict and text.find("{", 1) < 0 and _TEXT.issuperset(map(type, value)):
            return encoded  # the usual record: a single object with strings as keys
        if _may_repeat_key(value, text, encoded) and (found := _find_repeated_key(value)):
            raise NotJSON(*found)
    return encoded


#: The type of keys that cannot become equal.
_TEXT = frozenset({str})
#: All digits as zeros: the search for an end of a key takes longer than this.
_AS_ZEROS = bytes(ord("0") if chr(byte).isdigit() else byte for byte in range(128)) + bytes(128)


def _may_repeat_key(value: JSON, text: str, encoded: bytes) -> bool:
    """Return whether two keys of an object may have become equal; rarely true, and fast."""
    # The ends of the keys that a number, a boolean or None becomes. `in` is fast in a str, and slow in bytes.
    has_number = encoded.translate(_AS_ZEROS).find(b'0":') >= 0
    if not (has_number or 'true":' in text or 'false":' in text or 'null":' in text):
        return False
    try:  # only a string and another type can become equal; these cannot be sorted
        for _ in _encode_sorted(value, False):
            pass
    except TypeError:
        return True
    return False


def _find_repeated_key(value: JSON) -> tuple[str, str] | None:
    """Return position and reason of the first object in which a key that is not a string becomes equal to another."""
    stack: list[tuple[JSON, str]] = [(value, "")]
    while stack:
        item, path = stack.pop()
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str):
                    name = next(iter(loads("".join(_encode_pieces({key: 0}, False)))))
                    if name in item:
                        return path, f"the keys {key!r} and {name!r} are the same in JSON"
            stack += [(child, f"{path}[{key!r}]") for key, child in item.items()]
        elif isinstance(item, (list, tuple)):
            stack += [(child, f"{path}[{index}]") for index, child in enumerate(item)]
    return None


_LARGE = 1 << 63  # An integer with thousands of digits has no form in JSON.
_CONSTANTS: dict[object, Raw] = {None: Raw(b"null"), True: Raw(b"true"), False: Raw(b"false")}


def dumps(value: JSON) -> Raw:
    """Write a value as `encode_value` does. It may be `Raw`, or an `Envelope` with `Raw` members. Raises `NotJSON`."""
    kind = type(value)
    if kind is Raw:
        raw: Raw = value
        return raw
    if kind is str:  # most members of messages
        return Raw(encode_basestring_ascii(value).encode())
    if kind is int and -_LARGE < value < _LARGE:
        return Raw(b"%d" % value)
    if kind is Envelope:
        return Raw(b"{%b}" % b",".join([b"%b:%b" % (dumps(key), dumps(member)) for key, member in value.items()]))
    if value is None or value is True or value is False:
        return _CONSTANTS[value]
    return Raw(encode_value(value))


def _find_invalid_part(value: JSON) -> tuple[str, str] | None:
    """Return position and reason of the first part of `value` that has no form in JSON; iterative for deep nesting."""
    stack: list[tuple[JSON, str, int]] = [(value, "", 0)]
    trail: list[int] = []  # ids of the containers around the item
    while stack:
        item, path, depth = stack.pop()
        del trail[depth:]
        if isinstance(item, (dict, list, tuple)):
            if id(item) in trail:
                return path, "contains itself"
            if depth >= MAX_DEPTH:
                return "", f"nested deeper than {MAX_DEPTH}"
            trail.append(id(item))
            children = item.items() if isinstance(item, dict) else enumerate(item)
            for key, child in reversed(list(children)):
                if isinstance(item, dict) and not isinstance(key, (str, int, float, bool, type(None))):
                    return path, f"a key is of type {_type_name(key)}, expected str"
                stack.append((child, f"{path}[{key!r}]", depth + 1))
        elif (reason := _reason_of_scalar(item)) is not None:
            return path, reason
    return None


def _reason_of_scalar(item: JSON) -> str | None:
    try:
        for _ in _encode_pieces(item, False):
            pass
    except TypeError:
        return f"type {_type_name(item)} has no form in JSON"
    except ValueError as error:  # an integer with more digits than the interpreter converts
        return f"{item!r} is not a number of JSON" if isinstance(item, float) else str(error)
    return None


def _type_name(item: object) -> str:
    kind = type(item)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
