"""The messages between client and dispatcher: one table of lines drives decoder and encoder."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harp.protocol.dispatcher import (
    MAY_FOLLOW,
    Call,
    Cancel,
    Continue,
    CountJobs,
    Details,
    FollowStream,
    GetDetails,
    GetResult,
    GetStatus,
    HostsListed,
    JobsCounted,
    JobsListed,
    ListHosts,
    ListJobs,
    ListQueues,
    NoResult,
    Packet,
    Queue,
    QueuesListed,
    ReadStream,
    Refused,
    Reply,
    ReplyReader,
    Request,
    Status,
    SubmitMany,
    Submitted,
    SubmittedMany,
    WasCancelled,
    decode_reply,
    encode_reply,
    encode_request,
)
from harp.protocol.dispatcher import decode_request as decode_request_line
from harp.protocol.ends import Cancelled, Failed, Raised, Returned
from harp.protocol.json_text import Raw, decode_values, loads
from harp.protocol.schema import Decoder, ProtocolError
from harp_daemon.sliced_json import decode_slices

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"

REQUESTS: list[tuple[str, Request]] = [
    ('{"harpcaller":1,"host":"web01","procedure":"p","arguments":[]}', Call("web01", "p", [])),
    (
        '{"harpcaller":1,"host":"h","procedure":"p","arguments":{"a":1},"timeout":5,"max_exec_time":1.5,'
        '"queue":{"name":{},"concurrency":3},"info":[1]}',
        Call("h", "p", {"a": 1}, 5, 1.5, Queue({}, 3), [1]),
    ),
    (
        '{"harpcaller":1,"submit_many":[{"host":"h","procedure":"p","arguments":[]},'
        '{"host":"g","procedure":"q","arguments":{"a":1},"queue":{"name":{},"concurrency":3},"info":[1]}]}',
        SubmitMany([Call("h", "p", []), Call("g", "q", {"a": 1}, queue=Queue({}, 3), info=[1])]),
    ),
    (f'{{"harpcaller":1,"cancel":"{JOB}"}}', Cancel(JOB)),
    (f'{{"harpcaller":1,"get_result":"{JOB}","wait":true}}', GetResult(JOB)),
    (f'{{"harpcaller":1,"get_result":"{JOB}","wait":false}}', GetResult(JOB, wait=False)),
    (f'{{"harpcaller":1,"get_status":"{JOB}"}}', GetStatus(JOB)),
    (f'{{"harpcaller":1,"follow_stream":"{JOB}"}}', FollowStream(JOB)),
    (f'{{"harpcaller":1,"follow_stream":"{JOB}","since":0}}', FollowStream(JOB, since=0)),
    (f'{{"harpcaller":1,"read_stream":"{JOB}","recent":7}}', ReadStream(JOB, recent=7)),
    (f'{{"harpcaller":1,"cancel":"{JOB}","wait":true}}', Cancel(JOB, wait=True)),
    (f'{{"harpcaller":1,"get_details":"{JOB}"}}', GetDetails(JOB)),
    (f'{{"harpcaller":1,"follow_stream":"{JOB}","timed":true}}', FollowStream(JOB, timed=True)),
    (f'{{"harpcaller":1,"read_stream":"{JOB}","since":2,"timed":true}}', ReadStream(JOB, since=2, timed=True)),
    ('{"harpcaller":1,"list_jobs":""}', ListJobs("")),
    (
        '{"harpcaller":1,"list_jobs":"state:bad","oldest_first":true,"limit":500,"cursor":"c"}',
        ListJobs("state:bad", oldest_first=True, limit=500, cursor="c"),
    ),
    (
        '{"harpcaller":1,"count_jobs":"web","by":["state","host"],"most":10}',
        CountJobs("web", ["state", "host"], most=10),
    ),
    ('{"harpcaller":1,"list_hosts":"web","limit":2}', ListHosts("web", limit=2)),
    ('{"harpcaller":1,"list_queues":"","cursor":"c"}', ListQueues("", cursor="c")),
]

CALL = Call("h", "p", [])
MANY = SubmitMany([CALL, CALL])
FOLLOW, READ = FollowStream(JOB), ReadStream(JOB)
TIMED = FollowStream(JOB, timed=True)
STATUS = '{"call":{"host":"h","procedure":"p","arguments":[1]},"time":{"submit":1,"start":null,"end":3},"info":null}'

REPLIES: list[tuple[str, Request, Reply]] = [
    (f'{{"harpcaller":1,"job_id":"{JOB}"}}', CALL, Submitted(JOB)),
    (f'{{"harpcaller":1,"job_ids":["{JOB}","x"]}}', MANY, SubmittedMany([JOB, "x"])),
    ('{"cancelled":true}', Cancel(JOB), WasCancelled(True)),
    ('{"cancelled":false}', Cancel(JOB), WasCancelled(False)),
    ('{"no_result":true}', GetResult(JOB), NoResult()),
    ('{"result":{"a":[1,null]}}', GetResult(JOB), Returned({"a": [1, None]})),
    ('{"result":null}', GetResult(JOB), Returned(None)),
    ('{"exception":{"type":"E","message":"m"}}', GetResult(JOB), Raised("E", "m")),
    ('{"exception":{"type":"E","message":"m","data":{"x":1}}}', GetResult(JOB), Raised("E", "m", {"x": 1})),
    ('{"cancelled":true}', GetResult(JOB), Cancelled()),
    ('{"error":{"type":"e","message":"m","data":[]}}', GetResult(JOB), Failed("e", "m", [])),
    (STATUS, GetStatus(JOB), Status("h", "p", [1], 1, None, 3, None)),
    ('{"packet":0,"data":"x"}', FOLLOW, Packet(0, "x")),
    ('{"continue":true}', READ, Continue()),
    ('{"error":{"type":"invalid_jobid","message":"m"}}', READ, Refused("invalid_jobid", "m")),
    ('{"error":{"type":"invalid_jobid","message":"m","data":null}}', READ, Failed("invalid_jobid", "m")),
    ('{"error":{"type":"e","message":"m"}}', GetStatus(JOB), Refused("e", "m")),
    ('{"cancelled":true}', Cancel(JOB, wait=True), WasCancelled(True)),
    (
        '{"cancelled":true,"stop":{"state":"confirmed","stop_report":{"survivors":[]}}}',
        Cancel(JOB, wait=True),
        WasCancelled(True, {"state": "confirmed", "stop_report": {"survivors": []}}),
    ),
    ('{"details":{"job":"x","why":"it waits"}}', GetDetails(JOB), Details({"job": "x", "why": "it waits"})),
    ('{"packet":0,"time":1700000000.25,"data":"x"}', TIMED, Packet(0, "x", 1700000000.25)),
    (
        '{"jobs":[{"job":"x"}],"next":"c","examined":10000,"searched_to":1700000000.25}',
        ListJobs("web"),
        JobsListed([{"job": "x"}], "c", 10000, 1700000000.25),
    ),
    ('{"jobs":[],"next":null,"examined":0,"searched_to":null}', ListJobs(""), JobsListed([])),
    ('{"counts":{"by":{}}}', CountJobs("", ["state"]), JobsCounted({"by": {}})),
    ('{"hosts":[{"name":"web01"}],"next":null}', ListHosts(""), HostsListed([{"name": "web01"}])),
    ('{"queues":[],"next":"c"}', ListQueues(""), QueuesListed([], "c")),
    ('{"error":{"type":"invalid_filter","message":"m"}}', ListJobs("x:"), Refused("invalid_filter", "m")),
]


def decode_request(line: bytes, decoder: Decoder = decode_values) -> Request:
    """Return the request of a line, without its ``keep_alive``."""
    return decode_request_line(line, decoder)[0]


@pytest.mark.parametrize(("line", "request_"), REQUESTS)
def test_request_encoded_and_decoded_is_equal(line: str, request_: Request) -> None:
    assert encode_request(request_) == line.encode() + b"\n"
    assert decode_request(line.encode()) == request_


@pytest.mark.parametrize(("line", "request_"), REQUESTS)
def test_request_in_any_key_order_and_spacing_is_equal(line: str, request_: Request) -> None:
    members = json.loads(line)
    turned = json.dumps(dict(reversed(members.items())), separators=(" , ", " : "))
    assert decode_request(f"  {turned}\t\r".encode()) == request_


@pytest.mark.parametrize(("line", "request_", "reply"), REPLIES)
def test_reply_encoded_and_decoded_is_equal(line: str, request_: Request, reply: Reply) -> None:
    assert encode_reply(reply) == line.encode() + b"\n"
    assert decode_reply(line.encode(), request_) == reply


def test_reply_with_raw_payloads_is_encoded_unchanged() -> None:
    raw = Raw(b'{"a" : 1.10}')
    assert encode_reply(Returned(raw)) == b'{"result":{"a" : 1.10}}\n'
    assert encode_reply(WasCancelled(True, raw)) == b'{"cancelled":true,"stop":{"a" : 1.10}}\n'
    assert encode_reply(Packet(0, raw, 1.5)) == b'{"packet":0,"time":1.5,"data":{"a" : 1.10}}\n'
    status = STATUS.replace("[1]", raw.decode()).replace('"info":null', f'"info":{raw.decode()}')
    assert encode_reply(Status("h", "p", raw, 1, None, 3, raw)) == status.encode() + b"\n"


@pytest.mark.parametrize(("line", "request_", "reply"), REPLIES)
def test_reply_with_extra_keys_is_accepted(line: str, request_: Request, reply: Reply) -> None:
    assert decode_reply(json.dumps({"new": 1, **json.loads(line)}).encode(), request_) == reply


@pytest.mark.parametrize("request_", [request for _, request in REQUESTS])
def test_reply_to_each_request_is_as_in_the_table(request_: Request) -> None:
    for line, asked, reply in REPLIES:
        may = type(reply) in MAY_FOLLOW[type(request_)] or (isinstance(request_, Cancel) and "cancelled" in line)
        if (
            isinstance(reply, Packet)
            and reply.time is None
            and request_ in (TIMED, ReadStream(JOB, since=2, timed=True))
        ):
            continue  # without its time it is none for this request
        if isinstance(asked, Cancel) and not isinstance(request_, Cancel):
            continue  # the same line means another thing there
        if isinstance(reply, SubmittedMany) and request_ != asked and isinstance(request_, SubmitMany):
            continue  # another number of calls
        if isinstance(reply, (Refused, Failed)):
            may = True  # any request may be refused; the request decides which of the two an error is
        if may:
            decode_reply(line.encode(), request_)
        else:
            with pytest.raises(ProtocolError):
                decode_reply(line.encode(), request_)


def test_table_lists_every_request_and_reply() -> None:
    assert set(MAY_FOLLOW) == set(get_args(Request))
    assert set().union(*MAY_FOLLOW.values()) == set(get_args(Reply))


SECRET = "harp_shop_0123456789abcdef"


def test_request_with_token_is_encoded_and_decoded() -> None:
    line = encode_request(Cancel(JOB), keep_alive=True, token=SECRET)
    assert line == f'{{"harpcaller":1,"cancel":"{JOB}","auth":{{"token":"{SECRET}"}},"keep_alive":true}}\n'.encode()
    for decoder in (decode_values, decode_slices):
        received = decode_request_line(line, decoder)
        assert received == (Cancel(JOB), True, SECRET)
        assert SECRET not in f"{received!r} {received}"
    assert decode_request_line(encode_request(CALL)) == (CALL, False, None)
    assert decode_request_line(f'{{"harpcaller":1,"cancel":"{JOB}","auth":null}}'.encode()).token is None


@pytest.mark.parametrize("decoder", [decode_values, decode_slices])
@pytest.mark.parametrize(
    ("auth", "message"),
    [
        ("1", "auth: expected an object with a token"),
        (f'["{SECRET}"]', "auth: expected an object with a token"),
        ("{}", "auth.token: expected 1 to 200 characters"),
        ('{"token":""}', "auth.token: expected"),
        (f'{{"token":["{SECRET}"]}}', "auth.token: expected"),
        (f'{{"token":"{SECRET * 10}"}}', "auth.token: expected"),
        (f'{{"token":"{SECRET}","user":"u"}}', "unknown key user"),
    ],
)
def test_request_with_invalid_auth_raises_without_the_token(auth: str, message: str, decoder: Any) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        decode_request_line(f'{{"harpcaller":1,"cancel":"{JOB}","auth":{auth}}}'.encode(), decoder)
    assert SECRET not in str(caught.value)


ASKED = [CALL, MANY, Cancel(JOB), GetResult(JOB), GetStatus(JOB), FOLLOW, READ]


@pytest.mark.parametrize("kind", ["auth_error", "access_denied", "rate_limited"])
@pytest.mark.parametrize("request_", ASKED)
def test_access_refusal_is_told_from_an_end_by_its_mark(kind: str, request_: Request) -> None:
    refused = Refused(kind, "m", retry_after=2, refused=True)
    line = encode_reply(refused)
    assert line == b'{"error":{"type":"%b","message":"m","retry_after":2,"refused":true}}\n' % kind.encode()
    assert decode_reply(line, request_) == refused
    if request_ in (GetResult(JOB), FOLLOW, READ):  # as from a legacy dispatcher, and from an older one
        assert encode_reply(Failed(kind, "m")) == b'{"error":{"type":"%b","message":"m"}}\n' % kind.encode()
        assert decode_reply(encode_reply(Failed(kind, "m")), request_) == Failed(kind, "m")


BAD_REQUESTS = [
    ("{}", "harpcaller: expected 1, got None"),
    ('{"harpcaller":true,"cancel":"x"}', "harpcaller: expected 1, got True"),
    ('{"harpcaller":2,"cancel":"x"}', "harpcaller: expected 1, got 2"),
    ('{"harpcaller":1}', "expected exactly one of procedure, submit_many, cancel"),
    ('{"harpcaller":1,"cancel":"x","get_status":"x"}', "expected exactly one of"),
    ('{"harpcaller":1,"cancel":"x","force":true}', "unknown key force"),
    ('{"harpcaller":1,"cancel":"x","wait":1}', "wait: expected true or false"),
    ('{"harpcaller":1,"cancel":"x","cancel":"y"}', 'repeated key "cancel"'),
    ('{"harpcaller":1,"get_details":"x","wait":true}', "unknown key wait"),
    ('{"harpcaller":1,"read_stream":"x","timed":"yes"}', "timed: expected true or false"),
    ('{"harpcaller":1,"get_result":"x","wait":1}', "wait: expected true or false"),
    ('{"harpcaller":1,"follow_stream":"x","since":-1}', "since: expected an integer of at least 0, got -1"),
    ('{"harpcaller":1,"follow_stream":"x","since":true}', "since: expected an integer"),
    ('{"harpcaller":1,"read_stream":"x","since":1,"recent":1}', "exclude each other"),
    ('{"harpcaller":1,"procedure":"p","arguments":[]}', "host: missing"),
    ('{"harpcaller":1,"host":"","procedure":"p","arguments":[]}', "host: expected a name"),
    ('{"harpcaller":1,"host":"%s","procedure":"p","arguments":[]}' % ("h" * 256), "host: expected a name of 1 to 255"),
    ('{"harpcaller":1,"host":"h","procedure":"%s","arguments":[]}' % ("p" * 256), "procedure: expected a name of 1"),
    ('{"harpcaller":1,"host":"h","procedure":null,"arguments":[]}', "procedure: expected a string, got null"),
    ('{"harpcaller":1,"host":"h","procedure":"p"}', "arguments: missing"),
    ('{"harpcaller":1,"host":"h","procedure":"p","arguments":1}', "arguments: expected an array or an object"),
    ('{"harpcaller":1,"host":"h","procedure":"p","arguments":[],"timeout":0}', "timeout: expected a positive"),
    ('{"harpcaller":1,"host":"h","procedure":"p","arguments":[],"timeout":"1"}', "timeout: expected a positive"),
    ('{"harpcaller":1,"host":"h","procedure":"p","arguments":[],"max_exec_time":1e999}', "max_exec_time: expected"),
    ('{"harpcaller":1,"host":"h","procedure":"p","arguments":[],"timeout":-1}', "timeout: expected"),
    ('{"harpcaller":1,"host":"h","procedure":"p","arguments":[],"queue":[]}', "queue: expected an object"),
    ('{"harpcaller":1,"host":"h","procedure":"p","arguments":[],"queue":{}}', "queue: expected an object with a name"),
    ('{"harpcaller":1,"host":"h","procedure":"p","arguments":[],"queue":{"name":1}}', "queue.name: expected"),
    (
        '{"harpcaller":1,"host":"h","procedure":"p","arguments":[],"queue":{"name":{},"concurrency":0}}',
        "queue.concurrency: expected a positive integer",
    ),
    ('{"harpcaller":1,"submit_many":{}}', "submit_many: expected an array"),
    ('{"harpcaller":1,"submit_many":null}', "submit_many: expected an array"),
    ('{"harpcaller":1,"submit_many":[],"host":"h"}', "unknown key host"),
    ('{"harpcaller":1,"submit_many":[1]}', r"submit_many\[0\]: expected an object"),
    (
        '{"harpcaller":1,"submit_many":[{"host":"h","procedure":"p","arguments":[]}, {"host":"h","arguments":[]}]}',
        r"submit_many\[1\]: procedure: missing",
    ),
    (
        '{"harpcaller":1,"submit_many":[{"harpcaller":1,"host":"h","procedure":"p","arguments":[]}]}',
        r"submit_many\[0\]: unknown key harpcaller",
    ),
    ('{"harpcaller":1,"list_jobs":null}', "list_jobs: expected a string, got null"),
    ('{"harpcaller":1,"list_jobs":"%s"}' % ("x" * 4097), "list_jobs: expected a text of at most 4096 characters"),
    ('{"harpcaller":1,"list_jobs":"","limit":0}', "limit: expected an integer from 1 to 500, got 0"),
    ('{"harpcaller":1,"list_jobs":"","limit":501}', "limit: expected an integer from 1 to 500, got 501"),
    ('{"harpcaller":1,"list_jobs":"","limit":true}', "limit: expected an integer from 1 to 500, got True"),
    ('{"harpcaller":1,"list_jobs":"","cursor":"%s"}' % ("c" * 1025), "cursor: expected a text of at most 1024"),
    ('{"harpcaller":1,"list_jobs":"","since":1}', "unknown key since"),
    ('{"harpcaller":1,"count_jobs":""}', "by: missing"),
    ('{"harpcaller":1,"count_jobs":"","by":[]}', "by: expected an array of some of state, host"),
    ('{"harpcaller":1,"count_jobs":"","by":["state","state"]}', "by: expected an array of some of"),
    ('{"harpcaller":1,"count_jobs":"","by":["password"]}', "by: expected an array of some of"),
    ('{"harpcaller":1,"count_jobs":"","by":["state"],"most":10001}', "most: expected an integer from 1 to 10000"),
    ('{"harpcaller":1,"list_hosts":"","oldest_first":true}', "unknown key oldest_first"),
    ("GET / HTTP/1.1", "Expecting value"),
]


@pytest.mark.parametrize("decoder", [decode_values, decode_slices])
@pytest.mark.parametrize(("line", "message"), BAD_REQUESTS)
def test_request_invalid_raises_reason_and_key(line: str, message: str, decoder: Any) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode_request(line.encode(), decoder)


@pytest.mark.parametrize("decoder", [decode_slices])
def test_request_with_repeated_inner_key_raises(decoder: Any) -> None:
    many = b'{"harpcaller":1,"submit_many":[{"host":"h","procedure":"p","arguments":[],"host":"h"}]}'
    with pytest.raises(ProtocolError, match=r"submit_many\[0\]: repeated key"):
        decode_request(many, decoder)
    with pytest.raises(ProtocolError, match="auth: repeated key"):
        decode_request(b'{"harpcaller":1,"cancel":"x","auth":{"token":"t","token":"t"}}', decoder)
    queue = b'{"harpcaller":1,"host":"h","procedure":"p","arguments":[],"queue":{"name":{},"name":{}}}'
    with pytest.raises(ProtocolError, match="queue: repeated key"):
        decode_request(queue, decoder)


def test_request_with_long_queue_name_raises() -> None:
    line = '{"harpcaller":1,"host":"h","procedure":"p","arguments":[],"queue":{"name":{"q":"%s"}}}'
    decode_request((line % ("q" * 4088)).encode(), decode_slices)
    with pytest.raises(ProtocolError, match=r"queue\.name: expected an object of at most 4096 bytes"):
        decode_request((line % ("q" * 4089)).encode(), decode_slices)


@pytest.mark.parametrize("value", ["[%s0]" % ("1," * 100_000), '"%s"' % ("x" * 2_000_000), '"%s"' % ("\\u00e9" * 400)])
def test_request_with_long_job_id_names_no_job(value: str) -> None:
    request = decode_request(f'{{"harpcaller":1,"get_status":{value}}}'.encode(), decode_slices)
    assert isinstance(request, GetStatus)
    assert len(request.job) == 255 or value.startswith('"\\u')


@pytest.mark.parametrize("key", ["timeout", "max_exec_time", "queue", "info"])
def test_request_with_null_is_as_without_the_key(key: str) -> None:
    line = f'{{"harpcaller":1,"host":"h","procedure":"p","arguments":[],"{key}":null}}'
    assert decode_request(line.encode()) == CALL


@pytest.mark.parametrize("off", ["null", "false"])
def test_request_with_false_flag_omits_it(off: str) -> None:
    assert decode_request(f'{{"harpcaller":1,"cancel":"{JOB}","wait":{off}}}'.encode()) == Cancel(JOB)
    assert decode_request(f'{{"harpcaller":1,"follow_stream":"{JOB}","timed":{off}}}'.encode()) == FOLLOW


def test_reply_without_opt_in_has_no_new_key() -> None:
    assert decode_reply(b'{"cancelled":true,"stop":{}}', Cancel(JOB)) == WasCancelled(True)
    assert decode_reply(b'{"packet":3,"data":1,"time":"never"}', FOLLOW).time is None  # type: ignore[union-attr]
    for reply in (WasCancelled(True), Packet(3, [1])):
        assert set(json.loads(encode_reply(reply))) <= {"cancelled", "packet", "data"}


def test_reply_to_cancel_without_processes_has_no_stop() -> None:
    reply = decode_reply(b'{"cancelled":false,"stop":null}', Cancel(JOB, wait=True))
    assert reply == WasCancelled(False)


BAD_REPLIES: list[tuple[str, Request, str]] = [
    ('{"packet":0,"data":1}', TIMED, "time: missing"),
    ('{"packet":0,"data":1,"time":null}', TIMED, "time: expected Unix seconds, got None"),
    ('{"packet":0,"data":1,"time":true}', TIMED, "time: expected Unix seconds, got True"),
    ('{"packet":0,"data":1,"time":"1"}', TIMED, "time: expected Unix seconds"),
    ('{"packet":0,"data":1,"time":1e999}', TIMED, "time: expected Unix seconds, got inf"),
    (f'{{"packet":0,"data":1,"time":{10**400}}}', TIMED, "time: expected Unix seconds"),
    ('{"cancelled":true,"stop":[]}', Cancel(JOB, wait=True), "stop: expected an object"),
    ('{"cancelled":1}', Cancel(JOB, wait=True), "cancelled: expected true or false"),
    ('{"details":"much"}', GetDetails(JOB), "details: expected an object"),
    ('{"details":null}', GetDetails(JOB), "details: expected an object"),
    ('{"jobs":{},"next":null}', ListJobs(""), "jobs: expected an array"),
    ('{"jobs":[],"next":1}', ListJobs(""), "next: expected a string"),
    ('{"jobs":[],"next":null}', ListHosts(""), "a reply with 'jobs' does not answer this request"),
    ('{"counts":[]}', CountJobs("", ["state"]), "counts: expected an object"),
    ('{"details":{}}', GetStatus(JOB), "a reply with 'details' does not answer this request"),
]


@pytest.mark.parametrize(("line", "request_", "message"), BAD_REPLIES)
def test_reply_invalid_raises_reason_and_key(line: str, request_: Request, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode_reply(line.encode(), request_)


def test_request_with_huge_integer_limit_is_accepted() -> None:
    line = f'{{"harpcaller":1,"host":"h","procedure":"p","arguments":[],"timeout":{10**400}}}'
    assert decode_request(line.encode()) == Call("h", "p", [], timeout=10**400)


def test_reply_reader_packet_out_of_order_raises() -> None:
    exchange = ReplyReader(FollowStream(JOB, since=3))
    with pytest.raises(ProtocolError, match="packet 4: expected number 3"):
        exchange.read_reply(b'{"packet":4,"data":1}')
    exchange = ReplyReader(FollowStream(JOB, recent=2))
    assert exchange.read_reply(b'{"packet":4,"data":1}') == Packet(4, 1)
    with pytest.raises(ProtocolError, match="packet 4: expected number 5"):
        exchange.read_reply(b'{"packet":4,"data":1}')


def test_reply_reader_data_after_the_last_reply_raises() -> None:
    exchange = ReplyReader(READ)
    exchange.read_reply(b'{"continue":true}')
    assert exchange.finished
    with pytest.raises(ProtocolError, match="after the last reply"):
        exchange.read_reply(b'{"continue":true}')


messages = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.sampled_from([JOB, "", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "harpcaller job_id cancelled no_result result exception error call time info packet data continue type "
                "message host procedure arguments queue name concurrency timeout max_exec_time cancel get_result wait "
                "get_status get_details details stop timed follow_stream read_stream since recent submit start "
                "end auth token refused retry_after".split()
            ),
            inner,
            max_size=8,
        )
    ),
)


@given(messages.map(lambda m: json.dumps(m).encode()) | st.binary(), st.sampled_from([decode_values, decode_slices]))
def test_decoders_of_any_line_return_or_raise(line: bytes, decoder: Any) -> None:
    try:
        request = decode_request(line, decoder)
    except ProtocolError as error:
        assert error.message
    else:
        assert loads(encode_request(request)[:-1])
    for asked in (CALL, Cancel(JOB, wait=True), GetResult(JOB), GetStatus(JOB), GetDetails(JOB), FOLLOW, READ, TIMED):
        try:
            reply = decode_reply(line, asked)
        except ProtocolError as error:
            assert error.message
        else:
            assert encode_reply(reply).endswith(b"\n")
