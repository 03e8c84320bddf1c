"""The messages between harpd and its callers: one table of lines drives decoder and encoder."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp.protocol.ends import Failed, Raised, Returned
from harp.protocol.harpd import (
    MAX_COMMAND_BYTES,
    TRANSITIONS,
    Ack,
    Acknowledgement,
    AnyRequest,
    Attach,
    Caller,
    CallList,
    Command,
    ExitInfo,
    GrantedTerms,
    Heartbeat,
    ListCalls,
    Message,
    Phase,
    Record,
    RecordTime,
    Release,
    ReplyReader,
    Request,
    RequestedTerms,
    StartEncoder,
    StopCall,
    StopReport,
    decode_command,
    decode_message,
    decode_request,
    encode_command,
    encode_exit_info,
    encode_message,
    encode_request,
)
from harp.protocol.json_text import Raw, decode_values
from harp.protocol.schema import ProtocolError
from harp_daemon.sliced_json import decode_slices

REQUEST = '{"harp":1,"procedure":"p","arguments":[1],"auth":{"user":"u","password":"s"}}'

ID = "0e8400e2-9b1d-41d4-a716-446655440000"
AUTH = '"auth":{"user":"u","password":"s"}'
TERMS = RequestedTerms(ID, "o", "hush", "1f", 240, 3600.5, 60, 600)
TERMS_TEXT = (
    f'{{"id":"{ID}","owner":"o","secret":"hush","instance":"1f",'
    '"disconnect_timeout":240,"result_ttl":3600.5,"timeout":60,"max_exec_time":600}'
)
GRANTED = GrantedTerms("1f", 240, 3600.5, 5, 0.25, 3)
GRANTED_TEXT = (
    '{"instance":"1f","disconnect_timeout":240,"result_ttl":3600.5,"kill_grace":5,"elapsed":0.25,"records":3}'
)

REQUESTS: list[tuple[str, AnyRequest]] = [
    (REQUEST, Request("p", [1], "u", "s")),
    (REQUEST[:-1] + f',"call":{TERMS_TEXT}}}', Request("p", [1], "u", "s", TERMS)),
    (
        f'{{"harp":1,"attach":"{ID}","owner":"o","secret":"hush","since":3,{AUTH}}}',
        Attach(ID, "o", "hush", 3, "u", "s"),
    ),
    (f'{{"harp":1,"procedure":"-","arguments":[],"calls":"o",{AUTH}}}', ListCalls("o", "u", "s")),
]

COMMANDS: list[tuple[str, Command]] = [
    ('{"ack":0}', Ack(0)),
    ('{"heartbeat":1.5}', Heartbeat(1.5)),
    ('{"stop":{"why":"cancel"}}', StopCall("cancel")),
    ('{"stop":{"why":"cancel","by":"127.0.0.1:5"}}', StopCall("cancel", "127.0.0.1:5")),
    ('{"release":true}', Release()),
]

MESSAGES: list[tuple[str, Message]] = [
    ('{"harp":1,"stream_result":false}', Acknowledgement(False)),
    ('{"harp":1,"stream_result":true}', Acknowledgement(True)),
    (f'{{"harp":1,"stream_result":false,"call":{GRANTED_TEXT}}}', Acknowledgement(False, GRANTED)),
    (f'{{"harp":1,"stream_result":true,"call":{GRANTED_TEXT}}}', Acknowledgement(True, GRANTED)),
    ('{"stream":{"a":1}}', Record({"a": 1})),
    ('{"at":1700000000.25}', RecordTime(1700000000.25)),
    ('{"heartbeat":1.5}', Heartbeat(1.5)),
    ('{"stop_report":{"survivors":[]}}', StopReport({"survivors": []})),
    ('{"exit_info":{"exit":0}}', ExitInfo({"exit": 0})),
    ('{"harp":1,"calls":[],"instance":"1f"}', CallList([], "1f")),
    (f'{{"harp":1,"calls":["{ID}"],"instance":"1f"}}', CallList([ID], "1f")),
    ('{"harp":1,"calls":[],"instance":"1f","features":["caller"]}', CallList([], "1f", features=["caller"])),
    ('{"result":null}', Returned(None)),
    (
        '{"exception":{"type":"E","message":"m","data":{"class":"E","module":"x"}}}',
        Raised("E", "m", {"class": "E", "module": "x"}),
    ),
    ('{"harp":1,"error":{"type":"t","message":"m"}}', Failed("t", "m")),
    ('{"harp":1,"error":{"type":"t","message":"m","data":{"procedure":"p"}}}', Failed("t", "m", {"procedure": "p"})),
]


def turned(value: Any) -> Any:
    """Return the same value with its keys in the opposite order, at every depth."""
    if isinstance(value, dict):
        return {key: turned(member) for key, member in reversed(value.items())}
    return list(map(turned, value)) if isinstance(value, list) else value


def spaced(line: str) -> bytes:
    """Return the same line with keys in another order and white space between them."""
    return json.dumps(turned(json.loads(line)), indent=1).replace("\n", " ").encode()


@pytest.mark.parametrize(("line", "request_"), REQUESTS)
def test_request_encoded_and_decoded_is_equal(line: str, request_: AnyRequest) -> None:
    assert encode_request(request_) == line.encode() + b"\n"
    assert decode_request(line.encode()) == decode_request(spaced(line)) == request_
    assert encode_request(decode_request(line.encode(), decode_slices)) == line.encode() + b"\n"


def test_request_of_version_1_has_the_legacy_line() -> None:
    assert encode_request(Request("p", [1], "u", "s")) == REQUEST.encode() + b"\n"


@pytest.mark.parametrize("caller", [None, Caller('token:"shop"', ID)])
@pytest.mark.parametrize("keep_alive", [True, False])
def test_start_encoder_encodes_the_request(keep_alive: bool, caller: Caller | None) -> None:
    request = Request('p "ü%b\ud800', Raw(b'{"a": 1.10}'), "%b", 'pass"word', TERMS, keep_alive, caller)
    shared = replace(
        request, procedure="q", call=replace(TERMS, id=ID.replace("0", "1"), secret="no", timeout=1, max_exec_time=2)
    )
    line = StartEncoder(shared).encode(request.procedure, request.arguments, ID, "hush", 60, 600, caller)
    assert line.endswith(b"}\n")
    assert decode_request(line[:-1], decode_slices) == request


def test_request_repr_hides_secrets() -> None:
    terms = RequestedTerms(ID, "whose", "hush", "1f", 1, 1, 1, 1)
    shown = map(repr, (Request("p", [], "u", "hush", terms), Attach(ID, "whose", "hush", 0, "u", "hush")))
    assert not [text for text in (*shown, repr(ListCalls("whose", "u", "hush"))) if "hush" in text or "whose" in text]


@pytest.mark.parametrize(("line", "message"), MESSAGES)
def test_message_encoded_and_decoded_is_equal(line: str, message: Message) -> None:
    assert encode_message(message) == line.encode() + b"\n"
    assert decode_message(line.encode()) == decode_message(spaced(line)) == message
    assert encode_message(decode_message(line.encode(), decode_slices)) == line.encode() + b"\n"


@pytest.mark.parametrize(("line", "command"), COMMANDS)
def test_command_encoded_and_decoded_is_equal(line: str, command: Command) -> None:
    assert encode_command(command) == line.encode() + b"\n"
    assert decode_command(line.encode()) == decode_command(spaced(line)) == command


@given(st.text(min_size=1, max_size=100), st.text(min_size=1, max_size=200))
def test_command_of_any_content_fits_the_limit(why: str, by: str) -> None:
    assert len(encode_command(StopCall(why, by))) <= MAX_COMMAND_BYTES + 1


def test_command_of_maximum_content_fits_the_limit() -> None:
    assert len(encode_command(StopCall("\U0001f600" * 100, "\U0001f600" * 200))) <= MAX_COMMAND_BYTES + 1


BAD_REQUESTS = [
    ("hello", "parse_error", "Expecting value"),
    ('{"procedure":"p","arguments":[],"auth":{}}', "invalid_protocol", "harp: expected 1, got None"),
    ('{"harp":"1"}', "invalid_protocol", "harp: expected 1, got '1'"),
    ('{"harp":true}', "invalid_protocol", "harp: expected 1, got True"),
    ("[]", "invalid_request", "expected an object"),
    ('{"harp":1,"harp":1}', "invalid_request", "repeated key"),
    ('{"harp":1}', "invalid_request", "procedure: missing"),
    ('{"harp":1,"procedure":"p"}', "invalid_request", "arguments: missing"),
    ('{"harp":1,"procedure":"p","arguments":[]}', "invalid_request", "auth: expected an object"),
    (REQUEST.replace("[1]", '"x"'), "invalid_request", "arguments: expected an array or an object"),
    (REQUEST.replace('"p"', '""'), "invalid_request", "procedure: expected a name"),
    (REQUEST.replace('"p"', f'"{"p" * 256}"'), "invalid_request", "procedure: expected a name of 1 to 255 characters"),
    (REQUEST.replace('"u"', "1"), "invalid_request", "user: expected a string, got a number"),
    (REQUEST.replace('"harp":1', '"harp":1,"new":1'), "invalid_request", "unknown key new"),
    (REQUEST[:-1] + ',"call":null}', "invalid_request", "call: expected an object"),
    (REQUEST[:-1] + ',"call":{}}', "invalid_request", "call.id: missing"),
    (f'{{"harp":1,"attach":"{ID}","calls":"o",{AUTH}}}', "invalid_request", "unknown key calls"),
    (f'{{"harp":1,"attach":"{ID}",{AUTH}}}', "invalid_request", "owner: missing"),
    (
        f'{{"harp":1,"attach":"x","owner":"o","secret":"s","since":0,{AUTH}}}',
        "invalid_request",
        "attach: expected a UUID",
    ),
    (f'{{"harp":1,"attach":"{ID}","owner":"o","secret":"s",{AUTH}}}', "invalid_request", "since: missing"),
    (f'{{"harp":1,"attach":"{ID}","owner":"o","secret":"s","since":-1,{AUTH}}}', "invalid_request", "since: expected"),
    (f'{{"harp":1,"calls":"",{AUTH}}}', "invalid_request", "calls: expected a string of 1 to 200 characters"),
    (f'{{"harp":1,"calls":["o"],{AUTH}}}', "invalid_request", "calls: expected a string, got an array"),
    ('{"harp":1,"calls":"o"}', "invalid_request", "auth: expected an object"),
]


def with_terms(**changes: Any) -> str:
    terms = {**json.loads(TERMS_TEXT), **changes}
    return REQUEST[:-1] + f',"call":{json.dumps({key: value for key, value in terms.items() if value != "gone"})}}}'


NO_NAME, NO_TIME = [5, "", "x" * 201, None], [0, -1, True, "1", None, 10**400, 1e10]
BAD_TERMS: list[tuple[str, list[Any], str]] = [
    ("id", [5, "", ID.upper(), ID + "\n", ID[1:]], "expected a UUID in lower case"),
    *((key, NO_NAME, "expected a string of 1 to 200") for key in ("owner", "secret", "instance")),
    *(
        (key, NO_TIME, "expected a positive number")
        for key in ("disconnect_timeout", "result_ttl", "timeout", "max_exec_time")
    ),
    *((key, ["gone"], "missing") for key in json.loads(TERMS_TEXT)),
]
BAD_REQUESTS += [
    (with_terms(**{key: value}), "invalid_request", f"call.{key}: {fault}")
    for key, values, fault in BAD_TERMS
    for value in values
]
BAD_REQUESTS.append((with_terms(more=1), "invalid_request", "unknown key more"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x", "Expecting value"),
        ("{}", "expected exactly one of ack, heartbeat, stop, release"),
        ('{"ack":1,"release":true}', "expected exactly one of"),
        ('{"release":true,"more":1}', "unknown key more"),
        ('{"release":1}', "release: expected true"),
        ('{"heartbeat":true}', "heartbeat: expected a number"),
        ('{"heartbeat":-1}', "heartbeat: expected a number"),
        ('{"ack":-1}', "ack: expected an integer of at least 0, got -1"),
        ('{"ack":true}', "ack: expected an integer of at least 0, got True"),
        ('{"stop":true}', "stop: expected an object"),
        ('{"stop":{}}', "why: missing"),
        ('{"stop":{"why":""}}', "stop.why: expected a string of 1 to 100 characters"),
        ('{"stop":{"why":"w","by":null}}', "by: expected a string, got null"),
        ('{"stop":{"why":"w","x":1}}', "unknown key x"),
    ],
)
def test_command_invalid_raises_reason(line: str, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode_command(line.encode())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"at":"x"}', "at: expected a number"),
        ('{"at":-1}', "at: expected a number"),
        ('{"at":true}', "at: expected a number"),
        ('{"at":1,"stream":1}', "both stream and at"),
        ('{"stop_report":[]}', "stop_report: expected an object"),
        ('{"exit_info":1}', "exit_info: expected an object"),
        ('{"calls":[],"instance":"w"}', "harp: expected 1"),
        ('{"harp":1,"calls":{},"instance":"w"}', "calls: expected an array"),
        ('{"harp":1,"calls":["x"],"instance":"w"}', "calls: expected an array of UUIDs in lower case"),
        (f'{{"harp":1,"calls":["{ID}",1],"instance":"w"}}', "calls: expected an array of UUIDs in lower case"),
        ('{"stop_report":{"survivors":[1]}}', "stop_report.survivors: expected an array of objects with a pid"),
        ('{"harp":1,"calls":[]}', "instance: missing"),
        ('{"harp":1,"stream_result":true,"call":true}', "call: expected an object"),
        ('{"harp":1,"stream_result":true,"call":{"instance":"w"}}', "call.disconnect_timeout: missing"),
    ],
)
def test_message_invalid_raises_reason(line: str, message: str) -> None:
    for decoder in (decode_values, decode_slices):
        with pytest.raises(ProtocolError, match=message):
            decode_message(line.encode(), decoder)


REPEATED = [
    '{"harp":1,"procedure":"p","arguments":[],"auth":{"user":"u","user":"v","password":"s"}}',
    f'{{"harp":1,"procedure":"p","arguments":[],"auth":{{"user":"u","password":"s"}},"call":{{"id":"{ID}","id":"{ID}"}}}}',
]


@pytest.mark.parametrize("line", REPEATED)
def test_request_with_repeated_inner_key_raises(line: str) -> None:
    with pytest.raises(ProtocolError, match="repeated key"):
        decode_request(line.encode(), decode_slices)


@pytest.mark.parametrize("decoder", [decode_values, decode_slices])
@pytest.mark.parametrize(("line", "type_", "message"), BAD_REQUESTS)
def test_request_invalid_raises_type_and_reason(line: str, type_: str, message: str, decoder: Any) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        decode_request(line.encode(), decoder)
    assert caught.value.type == type_


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(("line", "message"), MESSAGES)
def test_reply_reader_allows_only_the_table(phase: Phase, line: str, message: Message) -> None:
    exchange = ReplyReader(phase=phase)
    fits = not isinstance(message, Acknowledgement) or phase is Phase.SENT_RESUMABLE
    if isinstance(message, Acknowledgement) and phase in (Phase.SENT, Phase.SENT_ATTACH):
        fits = (message.call is not None) == (phase is Phase.SENT_ATTACH)
    if type(message) in TRANSITIONS[phase] and fits:
        assert exchange.read_message(line.encode()) == message
    else:
        with pytest.raises(ProtocolError, match="received while"):
            exchange.read_message(line.encode())


def test_transitions_list_every_message() -> None:
    assert set().union(*TRANSITIONS.values()) == set(get_args(Message))


def test_reply_reader_allows_records_only_if_announced() -> None:
    exchange = ReplyReader()
    exchange.read_message(b'{"harp":1,"stream_result":true}')
    assert exchange.phase is Phase.STREAMING
    exchange = ReplyReader()
    exchange.read_message(b'{"harp":1,"stream_result":false}')
    assert exchange.phase is Phase.RUNNING


def test_reply_reader_resumable_call_has_its_phases() -> None:
    lines: dict[type, bytes] = {type(message): line.encode() for line, message in MESSAGES}
    exchange = ReplyReader(phase=Phase.SENT_RESUMABLE)
    sent = [Acknowledgement, RecordTime, Record, Heartbeat, Record, RecordTime, Record, StopReport, ExitInfo, Heartbeat]
    for kind in sent:
        exchange.read_message(lines[kind])
    for kind in (RecordTime, Record, ExitInfo, Acknowledgement):
        with pytest.raises(ProtocolError, match="received while waiting for the result, after its exit info"):
            exchange.read_message(lines[kind])
    exchange.read_message(lines[Failed])
    assert exchange.phase is Phase.RESUMABLE_ENDED
    exchange.read_message(lines[StopReport])
    exchange.read_message(lines[Heartbeat])
    for kind in (Returned, ExitInfo, RecordTime):
        with pytest.raises(ProtocolError, match="received while waiting for the close"):
            exchange.read_message(lines[kind])


PLAIN_ACK, RESUMABLE_ACK = (
    f'{{"harp":1,"stream_result":true{more}}}'.encode() for more in ("", f',"call":{GRANTED_TEXT}')
)


@pytest.mark.parametrize(
    ("first", "line", "phase"),
    [
        (Phase.SENT, PLAIN_ACK, Phase.STREAMING),
        (Phase.SENT, RESUMABLE_ACK, None),
        (Phase.SENT_RESUMABLE, PLAIN_ACK, Phase.STREAMING),  # a legacy harpd
        (Phase.SENT_RESUMABLE, RESUMABLE_ACK, Phase.RESUMABLE_STREAMING),
        (Phase.SENT_ATTACH, PLAIN_ACK, None),
        (Phase.SENT_ATTACH, RESUMABLE_ACK, Phase.RESUMABLE_STREAMING),
        (Phase.SENT_LIST, PLAIN_ACK, None),
        (Phase.SENT_LIST, b'{"harp":1,"calls":[],"instance":"w"}', Phase.CLOSED),
        (Phase.SENT_ATTACH, b'{"harp":1,"calls":[],"instance":"w"}', None),
    ],
)
def test_reply_reader_unrequested_terms_raise(first: Phase, line: bytes, phase: Phase | None) -> None:
    exchange = ReplyReader(phase=first)
    if phase is None:
        with pytest.raises(ProtocolError, match="received while waiting for"):
            exchange.read_message(line)
    else:
        exchange.read_message(line)
        assert exchange.phase is phase


@given(st.binary(), st.sampled_from([decode_values, decode_slices]))
def test_decoders_of_any_line_return_or_raise(line: bytes, decoder: Any) -> None:
    for decode in (decode_request, decode_message):
        with pytest.raises(ProtocolError):
            decode(line, decoder)
    with pytest.raises(ProtocolError):
        decode_command(line)


keys = st.sampled_from(
    "harp stream_result stream result exception error type message data procedure arguments auth user password "
    "call calls attach owner secret since instance at heartbeat stop_report exit_info ack stop why by release".split()
)
objects = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.floats() | st.just("x"),
    lambda inner: st.dictionaries(keys, inner, max_size=5) | st.lists(inner, max_size=2),
)


@given(objects.map(lambda value: json.dumps(value).encode()), st.sampled_from([decode_values, decode_slices]))
def test_decoders_of_any_object_return_or_raise(line: bytes, decoder: Any) -> None:
    for decode in (decode_request, decode_message):
        try:
            decode(line, decoder)
        except ProtocolError as error:
            assert error.type in ("parse_error", "invalid_protocol", "invalid_request")
    with contextlib.suppress(ProtocolError):
        decode_command(line)


@given(st.lists(st.sampled_from([line for line, _ in MESSAGES]), max_size=12), st.sampled_from(Phase))
def test_reply_reader_of_any_sequence_returns_or_raises(lines: list[str], phase: Phase) -> None:
    exchange = ReplyReader(phase=phase)
    with contextlib.suppress(ProtocolError):
        for line in lines:
            exchange.read_message(line.encode())


def test_exit_info_encoded_fast_is_the_message() -> None:
    info = Raw(b'{"by":"itself"}')
    assert encode_exit_info(info) == encode_message(ExitInfo(info))


def test_exit_info_too_long_raises() -> None:
    line = b'{"exit_info":{"x":"%b"}}' % (b"x" * 1024 * 1024)
    with pytest.raises(ProtocolError, match="exit_info: expected an object of at most 1048576 bytes"):
        decode_message(line, decode_slices)


def test_request_with_repeated_key_in_auth_raises() -> None:
    line = REQUEST.replace('"user":"u"', '"user":"u","user":"v"').encode()
    with pytest.raises(ProtocolError, match="auth: repeated key"):
        decode_request(line, decode_slices)


def test_request_with_long_names_raises_without_the_password() -> None:
    for old, new in (('"u"', "u" * 256), ('"s"', "s" * 4097)):
        with pytest.raises(ProtocolError, match=r"auth\.\w+: expected a string of at most") as error:
            decode_request(REQUEST.replace(old, f'"{new}"').encode(), decode_slices)
        assert "sss" not in str(error.value)


@pytest.mark.parametrize(
    ("message", "is_allowed"),
    [
        ('{"stream":%s}', True),
        ('{"result":%s}', True),
        ('{"exception":{"type":"E","message":"m","data":%s}}', True),
        ('{"harp":1,"error":{"type":"e","message":"m","data":%s}}', True),
        ('{"exit_info":{"a":%s}}', True),
        ('{"stop_report":{"survivors":[],"a":%s}}', False),
        ('{"harp":1,"stream_result":true,"a":%s}', False),
        ('{"heartbeat":1,"a":%s}', False),
        ('{"at":1,"a":%s}', False),
    ],
)
def test_long_message_is_record_end_or_exit_info(message: str, is_allowed: bool) -> None:
    line = (message % ('"' + "x" * 70_000 + '"')).encode()
    if is_allowed:
        assert type(decode_message(line, decode_slices)) is type(decode_message(line))
    else:
        with pytest.raises(ProtocolError, match="at most 65536 bytes"):
            decode_message(line, decode_slices)


def test_long_list_of_calls_is_decoded() -> None:
    ids = [ID.replace("0e84", f"{number:04x}") for number in range(5000)]
    line = json.dumps({"harp": 1, "calls": ids, "instance": "i"}).encode()
    assert decode_message(line, decode_slices) == CallList(ids, "i")
    for wrong in (b'["x"]', b"[1]", b'[["%b"]]' % ID.encode(), b'{"a":"%b"}' % ID.encode(), b"[null]"):
        with pytest.raises(ProtocolError, match="calls: expected an array of UUIDs"):
            decode_message(b'{"harp":1,"calls":%b,"instance":"i"}' % wrong, decode_slices)
    assert decode_message(b'{"harp":1,"calls":[],"instance":"i"}', decode_slices) == CallList([], "i")


@pytest.mark.parametrize("character", ["x", "\\u00e9", "\\\\", '\\"', "\\n", "\xe9", "\U0001f600", "\\ud83d\\ude00"])
@pytest.mark.parametrize("shift", range(7))
def test_long_text_of_exception_is_cut(character: str, shift: int) -> None:
    text = "y" * shift + character * (1_100_000 // len(character.encode()))
    line = f'{{"exception":{{"type":"E","message":"{text}","data":[1]}}}}'.encode()
    message = decode_message(line, decode_slices)
    assert isinstance(message, Raised)
    kept, _, mark = message.message.partition("... (cut: it had ")
    assert mark == f"{len(text.encode()) + 2} bytes)"
    assert kept == json.loads(f'"{text}"')[: len(kept)] or character.startswith("\\ud")
    assert len(kept) > 80_000
