"""The messages of harpd: one table of lines drives reader and writer."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp.protocol.daemon import (
    NEXT,
    Acknowledgement,
    Exchange,
    Message,
    Phase,
    Record,
    Request,
    decode_message,
    decode_request,
    encode_message,
    encode_request,
)
from harp.protocol.ends import Failed, Raised, Returned
from harp.protocol.fields import ProtocolError
from harp.protocol.jsontext import open_decoded, open_sliced

REQUEST = '{"harp":1,"procedure":"p","arguments":[1],"auth":{"user":"u","password":"s"}}'

MESSAGES: list[tuple[str, Message]] = [
    ('{"harp":1,"stream_result":false}', Acknowledgement(False)),
    ('{"harp":1,"stream_result":true}', Acknowledgement(True)),
    ('{"stream":{"a":1}}', Record({"a": 1})),
    ('{"result":null}', Returned(None)),
    (
        '{"exception":{"type":"E","message":"m","data":{"class":"E","module":"x"}}}',
        Raised("E", "m", {"class": "E", "module": "x"}),
    ),
    ('{"harp":1,"error":{"type":"t","message":"m"}}', Failed("t", "m")),
    ('{"harp":1,"error":{"type":"t","message":"m","data":{"procedure":"p"}}}', Failed("t", "m", {"procedure": "p"})),
]


def test_the_request_is_written_as_the_field_writes_it() -> None:
    request = Request("p", [1], "u", "s")
    assert encode_request(request) == REQUEST.encode() + b"\n"
    assert decode_request(REQUEST.encode()) == request


def test_the_password_is_not_shown() -> None:
    assert "secret" not in repr(Request("p", [], "u", "secret"))


@pytest.mark.parametrize(("line", "message"), MESSAGES)
def test_messages_are_written_and_read(line: str, message: Message) -> None:
    assert encode_message(message) == line.encode() + b"\n"
    assert decode_message(line.encode()) == message
    spaced = json.dumps(dict(reversed(json.loads(line).items())), indent=1).replace("\n", " ")
    assert decode_message(spaced.encode()) == message
    assert encode_message(decode_message(line.encode(), open_sliced)) == line.encode() + b"\n"


BAD_REQUESTS = [
    ("hello", "parse_error", "Expecting value"),
    ('{"procedure":"p","arguments":[],"auth":{}}', "invalid_protocol", "harp: expected 1, got None"),
    ('{"harp":"1"}', "invalid_protocol", "harp: expected 1, got '1'"),
    ('{"harp":true}', "invalid_protocol", "harp: expected 1, got True"),
    ("[]", "invalid_request", "expected an object"),
    ('{"harp":1,"harp":1}', "invalid_request", "repeated key"),
    ('{"harp":1}', "invalid_request", "arguments: missing"),
    ('{"harp":1,"procedure":"p","arguments":[]}', "invalid_request", "auth: expected an object"),
    (REQUEST.replace("[1]", '"x"'), "invalid_request", "arguments: expected an array or an object"),
    (REQUEST.replace('"p"', '""'), "invalid_request", "procedure: expected a name"),
    (REQUEST.replace('"u"', "1"), "invalid_request", "user: expected a string, got a number"),
    (REQUEST.replace('"harp":1', '"harp":1,"new":1'), "invalid_request", "unknown key new"),
]


@pytest.mark.parametrize("opener", [open_decoded, open_sliced])
@pytest.mark.parametrize(("line", "type_", "message"), BAD_REQUESTS)
def test_a_bad_request_has_its_type_and_its_reason(line: str, type_: str, message: str, opener: Any) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        decode_request(line.encode(), opener)
    assert caught.value.type == type_


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(("line", "message"), MESSAGES)
def test_what_may_come_when_is_the_table(phase: Phase, line: str, message: Message) -> None:
    exchange = Exchange()
    exchange.phase = phase
    if type(message) in NEXT[phase]:
        assert exchange.message(line.encode()) == message
        assert exchange.finished == isinstance(message, (Returned, Raised, Failed))
    else:
        with pytest.raises(ProtocolError, match="came while"):
            exchange.message(line.encode())


def test_the_table_knows_every_message() -> None:
    assert set().union(*NEXT.values()) == set(get_args(Message))


def test_records_come_only_after_an_acknowledgement_that_said_so() -> None:
    exchange = Exchange()
    exchange.message(b'{"harp":1,"stream_result":true}')
    assert exchange.phase is Phase.STREAMING
    exchange = Exchange()
    exchange.message(b'{"harp":1,"stream_result":false}')
    assert exchange.phase is Phase.RUNNING


@given(st.binary(), st.sampled_from([open_decoded, open_sliced]))
def test_any_line_is_a_message_or_a_protocol_error(line: bytes, opener: Any) -> None:
    for decode in (decode_request, decode_message):
        with pytest.raises(ProtocolError):
            decode(line, opener)


keys = st.sampled_from(
    "harp stream_result stream result exception error type message data procedure arguments auth".split()
)
objects = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.floats() | st.just("x"),
    lambda inner: st.dictionaries(keys, inner, max_size=5) | st.lists(inner, max_size=2),
)


@given(objects.map(lambda value: json.dumps(value).encode()), st.sampled_from([open_decoded, open_sliced]))
def test_any_object_is_a_message_or_a_protocol_error(line: bytes, opener: Any) -> None:
    for decode in (decode_request, decode_message):
        try:
            decode(line, opener)
        except ProtocolError as error:
            assert error.type in ("parse_error", "invalid_protocol", "invalid_request")
