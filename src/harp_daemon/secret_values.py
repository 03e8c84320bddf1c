"""The secret values of a call's arguments: where they are, and how their texts are masked.

JSON pointers (RFC 6901) name the values. `mask_texts` masks the strings in them wherever they appear: in results,
exceptions, records, printed lines and tracebacks. Numbers and short texts are not masked, because they also appear
where they are no secret.

Spec: docs/access.md, Secret arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from harp.protocol.json_text import InvalidJSON, Raw, dumps, loads
from harp.protocol.schema import ProtocolError
from harp_daemon import json_pieces
from harp_daemon.sliced_json import LONG, decode_slices, slice_elements

MASK = Raw(b'"***"')  #: The text in place of a secret value.
#: A text of fewer characters is not masked.
MIN_MASKED = 4
#: Maximum bytes of arguments with secret values, and maximum number of texts in these. They limit the time of a peer.
MAX_ARGUMENTS, MAX_TEXTS = 64 * 1024, 100
#: For the same reason: maximum number of secret values, of steps of a pointer, of elements of each array on its way.
MAX_SECRETS, _MAX_STEPS, _MAX_ELEMENTS = 20, 8, 100
_MIN_MASKED_LINE = 8  # the same for a line of a text with several, such as a private key
#: A string of a JSON text, and the colon behind it if it is the name of a member.
_STRING = re.compile(rb'"((?:[^"\\\n]++|\\.)*+)"([ \t\r]*+:)?')
_STRINGS_AT_ONCE = 1000


def replace_value(text: Raw, pointer: str, value: Raw) -> tuple[Raw, Raw]:
    """Return a JSON text with another value at a pointer, and the value that was there.

    Only the objects and arrays on the way are written anew; the text of all other values stays as it is. Raises
    `ProtocolError` if there is no value, or the way to it is too long.
    """
    if not pointer.startswith("/"):
        raise ProtocolError(f"secrets: expected a JSON pointer such as /password, got {_shorten(pointer)}")
    if pointer.count("/") > _MAX_STEPS:
        raise ProtocolError(f"secrets: expected a JSON pointer of at most {_MAX_STEPS} steps, got {_shorten(pointer)}")
    steps = [step.replace("~1", "/").replace("~0", "~") for step in pointer[1:].split("/")]
    try:
        return _replace_at(text, steps, value)
    except InvalidJSON as error:
        raise ProtocolError(f"secrets: cannot follow {_shorten(pointer)}: {error}") from error
    except KeyError as error:
        raise ProtocolError(f"secrets: the arguments have no value at {_shorten(pointer)}") from error


def _replace_at(text: bytes, steps: Sequence[str], value: Raw) -> tuple[Raw, Raw]:
    if not steps:
        return value, Raw(text)
    step, *further = steps
    if text.startswith(b"{"):
        members = {name: bytes(member) for name, member in decode_slices(text).items()}
        members[step], found = _replace_at(members[step], further, value)
        return Raw(b"{%b}" % b",".join([b"%b:%b" % (dumps(name), member) for name, member in members.items()])), found
    elements = list(islice(slice_elements(text), _MAX_ELEMENTS + 1)) if text.startswith(b"[") else []
    if len(elements) > _MAX_ELEMENTS:
        raise InvalidJSON(f"more than {_MAX_ELEMENTS} elements")
    index = {str(number): number for number in range(len(elements))}[step]
    elements[index], found = _replace_at(elements[index], further, value)
    return Raw(b"[%b]" % b",".join(elements)), found


def texts_at(arguments: Raw, pointers: Sequence[str]) -> tuple[bytes, ...]:
    """Return the texts to mask for the values at these pointers, for logs.

    A pointer that leads to no value is ignored, and so are pointers, texts and arguments above the limits.
    """
    if len(arguments) > MAX_ARGUMENTS:
        return ()
    values = []
    for pointer in pointers[:MAX_SECRETS]:
        with suppress(ProtocolError):
            values.append(replace_value(arguments, pointer, MASK)[1])
    return forms_of(find_texts(values)[:MAX_TEXTS])


def find_texts(values: Sequence[bytes]) -> list[str]:
    """Return the texts to mask for JSON values: their strings, and the lines of these."""
    texts: dict[str, None] = {}
    for value in values:
        for string in _strings_in(loads(value)):
            texts[string] = None
            if "\n" in string:
                lines = (line.rstrip("\r") for line in string.split("\n"))
                texts |= dict.fromkeys(line for line in lines if len(line) >= _MIN_MASKED_LINE)
    return list(texts)


def forms_of(texts: Sequence[str]) -> tuple[bytes, ...]:
    """Return how texts may be written, the longest first: as they are, as `repr` and as JSON, and these in JSON."""
    forms = set[str]()
    for text in texts:
        as_bytes = text.encode("utf-8", "surrogatepass")
        # A text with both kinds of quotes is written differently. This one may be a part of such a text.
        reprs = repr(text)[1:-1], repr(f'{text}"')[1:-2], repr(as_bytes)[2:-1], repr(as_bytes + b'"')[2:-2]
        for written in (text, *reprs, *_as_json(text)):
            forms |= {written, *_as_json(written)}
    return tuple(sorted((form.encode("utf-8", "surrogatepass") for form in forms), key=len, reverse=True))


def _as_json(text: str) -> set[str]:
    return {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}


def _strings_in(value: Any) -> Iterator[str]:
    match value:
        case str() if len(value) >= MIN_MASKED:
            yield value
        case list():
            for element in value:
                yield from _strings_in(element)
        case dict():
            for element in value.values():
                yield from _strings_in(element)


def mask_texts(text: bytes, texts: Sequence[bytes]) -> bytes:
    """Return a text in which each of these texts is masked; a long one in short steps, in turn with other threads."""
    longest = max(map(len, texts), default=1)
    window = max(LONG, 4 * longest)
    if len(text) <= window:
        return _mask(text, texts)
    overlap = longest - 1  # a text that is masked may begin in one window and end in the next
    masked, rest = [], b""
    for at in range(0, len(text), window):
        rest += text[at : at + window]
        end = _end_between(rest, max(0, len(rest) - overlap), texts)
        masked.append(_mask(rest[:end], texts))
        rest = rest[end:]
        json_pieces.between_pieces()
    return b"".join([*masked, _mask(rest, texts)])


def _end_between(text: bytes, end: int, texts: Sequence[bytes]) -> int:
    """Return an index up to `end` that is within none of these texts."""
    before = -1
    while before != end:
        before = end
        for secret in texts:
            at = text.find(secret, max(0, end - len(secret) + 1), end + len(secret) - 1)
            end = end if at < 0 else at
    return end


def mask_json(text: Raw, texts: Sequence[bytes], with_names: bool = True) -> Raw:
    """Return a JSON text in whose strings each of these texts is masked, also in names of members with `with_names`.

    What is not a string stays: a text may look like a number, or like a part of JSON. The text may consist of several
    values with line feeds between them.
    """
    if mask_texts(text, texts) == text:
        return text
    texts = [each for each in texts if b"\n" not in each]  # which no string of JSON contains
    strings = (string for string in _STRING.finditer(text) if with_names or string[2] is None)
    masked, end = list[bytes](), 0
    while batch := list(islice(strings, _STRINGS_AT_ONCE)):
        contents = mask_texts(b"\n".join([string[1] for string in batch]), texts).split(b"\n")
        pieces = []
        for string, content in zip(batch, contents, strict=True):
            pieces += [text[end : string.start(1)], content if content == string[1] else _valid_content(content)]
            end = string.end(1)
        masked.append(b"".join(pieces))
        json_pieces.between_pieces()
    return Raw(b"".join([*masked, text[end:]]))


def _valid_content(content: bytes) -> bytes:
    """Return the masked content of a string; a mask that replaces the end of an escape makes it invalid."""
    try:
        loads(b'"%b"' % content)
    except InvalidJSON:
        return b"***"
    return content


def _mask(text: bytes, texts: Sequence[bytes]) -> bytes:
    for secret in texts:
        text = text.replace(secret, b"***")
    return text


def _shorten(pointer: str) -> str:
    return repr(pointer if len(pointer) <= 100 else f"{pointer[:100]}...")
