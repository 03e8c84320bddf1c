"""Secret values in the arguments of calls, sent by the client. Each test uses both shells, unless it says otherwise."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import harp
from harp.protocol.dispatcher import MAX_SECRETS
from harpcaller.secret_arguments import add_key
from support.certificates import server_files
from support.harpcallerd import Harpcallerd
from support.peers import Peer, PeerConnection, answering, server_context
from support.scripted import scripted_harpd
from support.shells import Shell

JOB = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
PLAIN = 'hün"ter2 horse'
SUBMITTED = {"harpcaller": 1, "job_id": JOB}
QUESTION = {"harpcaller": 1, "submit_many": [], "secrets": True}
YES = {"harpcaller": 1, "job_ids": []}


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpcallerd]:
    directory = tmp_path_factory.mktemp("d")
    add_key(directory / "keys")
    settings = {"secrets_key_file": str(directory / "keys")}
    with scripted_harpd(directory) as peer, Harpcallerd(directory, {"web01": peer.port}, settings=settings) as found:
        yield found


@pytest.mark.parametrize("keep_alive", [None, True, False])
def test_secret_reaches_the_procedure_and_is_not_shown(
    shell: Shell, dispatcher: Harpcallerd, keep_alive: bool | None
) -> None:
    rpc = shell.caller_at(dispatcher.host, dispatcher.port, keep_alive=keep_alive)
    job = rpc.web01.echo({"user": "alice", "new": [harp.Secret(PLAIN), {"pin": harp.Secret([1234, None])}]})
    expected = {"user": "alice", "new": ["***", {"pin": "***"}]}
    assert job.args() == [expected]
    assert PLAIN not in str(job.get())  # masked
    calls = [harp.Call("web01", "count", {"password": harp.Secret(PLAIN)}), harp.Call("web01", "echo", [1])]
    assert len(rpc.submit_many(calls)) == 2


def test_secret_value_is_what_the_host_receives(shell: Shell, tmp_path: Path) -> None:
    """In the dispatcher's call, and in a direct one."""
    add_key(tmp_path / "keys")
    arguments = {"a/b": {"c~d": [0, harp.Secret(PLAIN)]}, "5": harp.Secret({"x": [PLAIN]})}
    plain = {"a/b": {"c~d": [0, PLAIN]}, "5": {"x": [PLAIN]}}
    settings = {"secrets_key_file": str(tmp_path / "keys")}
    with scripted_harpd(tmp_path) as peer, Harpcallerd(tmp_path, {"web01": peer.port}, settings=settings) as found:
        rpc = shell.caller_at(found.host, found.port)
        (job_id,) = [job.id() for job in rpc.submit_many([harp.Call("web01", "echo", arguments)])]
        rpc.job(job_id).result(wait=True)
        assert rpc.job(job_id).args() == {"a/b": {"c~d": [0, "***"]}, "5": "***"}
        [request] = [each for each in peer.requests if each.get("procedure") == "echo"]
        assert request["arguments"] == plain
    with scripted_harpd(tmp_path) as peer:
        assert shell.server(peer).echo(**arguments) == plain


@pytest.mark.parametrize("keep_alive", [True, False])
def test_secret_is_sent_only_after_the_question(shell: Shell, keep_alive: bool) -> None:
    expected = {"harpcaller": 1, "host": "web01", "procedure": "p", "arguments": [PLAIN], "secrets": ["/0"]}

    def serve(conn: PeerConnection) -> None:
        conn.expect({**QUESTION, "keep_alive": True})
        conn.reply({**YES, "keep_alive": 60})
        conn.expect({**expected, "keep_alive": True})
        conn.reply(SUBMITTED)

    scripts = [serve] if keep_alive else [answering(YES, request=QUESTION), answering(SUBMITTED, request=expected)]
    with Peer(*scripts) as peer:
        assert shell.caller(peer, keep_alive=keep_alive).web01.p(harp.Secret(PLAIN)).id() == JOB


UNKNOWN_KEY = {"error": {"type": "invalid_request", "message": "unknown key secrets"}}
INTERNAL = {"error": {"type": "internal_error", "message": "m"}}
REFUSED: list[tuple[list[object], str, type[harp.HarpException]]] = [
    ([UNKNOWN_KEY], "unknown key secrets; no secret value was sent$", harp.RequestRefused),
    ([INTERNAL], "internal_error: m; no secret value was sent$", harp.RequestRefused),
    ([], "the dispatcher may be too old for secret values, so none was sent$", harp.CommunicationError),
    ([SUBMITTED], "does not answer this request", harp.CommunicationError),
]
SUBMISSIONS: list[Callable[[Any, Any], Any]] = [
    lambda rpc, secret: rpc.web01.p(secret),
    lambda rpc, secret: rpc.web01(request_id="r").p(password=secret),
    lambda rpc, secret: rpc.submit_many([harp.Call("web01", "p", [[secret]]), harp.Call("web01", "p")]),
]


@pytest.mark.parametrize("keep_alive", [None, True, False])
@pytest.mark.parametrize("submit", SUBMISSIONS)
@pytest.mark.parametrize(("replies", "message", "kind"), REFUSED)
def test_secret_is_not_sent_to_dispatcher_without_encryption(
    shell: Shell,
    submit: Callable[[Any, Any], Any],
    replies: list[object],
    message: str,
    kind: type[harp.HarpException],
    keep_alive: bool | None,
) -> None:
    with Peer(answering(*replies)) as peer:
        with pytest.raises(kind, match=message) as caught:
            submit(shell.caller(peer, keep_alive=keep_alive), harp.Secret(PLAIN))
        assert PLAIN not in f"{caught.value!r}"
        [request] = peer.requests
        assert {key: request[key] for key in request.keys() - {"keep_alive"}} == QUESTION


def test_dispatcher_without_keys_refuses_the_question(shell: Shell, tmp_path: Path) -> None:
    with Harpcallerd(tmp_path, {"web01": 1}) as found:
        rpc = shell.caller_at(found.host, found.port)
        with pytest.raises(harp.RequestRefused, match=r"no keys .* secrets_key_file; no secret value was sent"):
            rpc.web01.p(harp.Secret(PLAIN))
        assert found.listed("list", "--all") == []
        assert rpc.web01.p(1).id()


def test_repeated_submission_with_secrets_asks_again(shell: Shell) -> None:
    scripts = [answering(YES, request=QUESTION), answering(), answering(YES, request=QUESTION), answering(SUBMITTED)]
    with Peer(*scripts) as peer:
        job = shell.caller(peer).host("web01", request_id="r").p(harp.Secret(1))
        assert job.id() == JOB
    with Peer(*scripts[:2], answering({"error": {"type": "invalid_request", "message": "no keys"}})) as peer:
        with pytest.raises(harp.RequestRefused, match="no keys; no secret value was sent"):
            shell.caller(peer).host("web01", request_id="r").p(harp.Secret(1))


def test_many_calls_with_secrets_have_the_mark(shell: Shell) -> None:
    with Peer(answering(YES), answering({"harpcaller": 1, "job_ids": [JOB, JOB]})) as peer:
        calls = [harp.Call("h", "p", {"~/": harp.Secret(PLAIN)}), harp.Call("h", "p", [1])]
        rpc = shell.caller(peer)
        assert len(rpc.submit_many(calls)) == 2
        first, second = peer.requests[1]["submit_many"]
        assert (first["arguments"], first["secrets"]) == ({"~/": PLAIN}, ["/~0~1"])
        assert "secrets" not in second
        assert peer.requests[1]["secrets"] is True


# Without a shell.


def test_secret_is_in_no_repr_and_no_pickle() -> None:
    secret = harp.Secret(PLAIN)
    call = harp.Call("web01", "p", [secret, {"a": secret}])
    for text in (repr(secret), str(secret), f"{secret}", repr(call), f"{[secret]}"):
        assert PLAIN not in text
        assert "Secret(***)" in text
    for each in (secret, call):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(each)
    assert copy.copy(secret) is copy.deepcopy(secret) is secret
    assert secret.value == PLAIN
    with pytest.raises(TypeError, match="Secret is not JSON serializable"):
        json.dumps(secret)


RECURSIVE: list[Any] = [harp.Secret(PLAIN)]
RECURSIVE.append(RECURSIVE)


def call(arguments: Any = (), **options: Any) -> harp.Call:
    return harp.Call("h", "p", arguments, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: call([harp.Secret({PLAIN})]), "the secret value at /0 of the arguments has no form"),
        (lambda: call([harp.Secret([harp.Secret(PLAIN)])]), "the secret value at /0 of the arguments"),
        (lambda: call([1, {"k": harp.Secret({1: 1, "1": PLAIN})}]), "the secret value at /1/k of the"),
        (lambda: call([harp.Secret(PLAIN), {1}]), "argument 2 cannot be sent as JSON"),
        (lambda: call({"x": harp.Secret(PLAIN), "y": {1}}), "argument 'y' cannot be sent as JSON"),
        (lambda: call({harp.Secret(PLAIN): 1}), "a key is of type"),
        (lambda: call({1: harp.Secret(PLAIN), "1": 2}), "the keys 1 and '1' are the same"),
        (lambda: call(RECURSIVE), "nested too deep, or contain themselves"),
        (lambda: call([harp.Secret(1)] * (MAX_SECRETS + 1)), f"at most {MAX_SECRETS} secret values"),
        (lambda: call(info=harp.Secret(PLAIN)), "option 'info' cannot be sent as JSON"),
        (lambda: call(queue={"q": harp.Secret(PLAIN)}), "option 'queue' cannot be sent as JSON"),
    ],
)
def test_invalid_secret_is_named_but_not_quoted(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(harp.HarpException, match=message) as caught:
        make()
    assert PLAIN not in str(caught.value)
    assert caught.value.__cause__ is None or PLAIN not in str(caught.value.__cause__)


def test_keys_in_pointers_are_those_of_json(tmp_path: Path) -> None:
    secret = harp.Secret(PLAIN)
    with Peer(
        answering(YES), answering({"harpcaller": 1, "job_id": JOB}), tls=server_context(server_files(tmp_path))
    ) as peer:
        rpc = harp.HarpCaller(peer.host, peer.port, ca_file=tmp_path / "ca.pem", keep_alive=False)
        rpc.web01.p({1: secret, None: {True: secret}, 2.5: secret, "": [secret]})
        request = peer.requests[1]
    for pointer in request["secrets"]:
        value = request["arguments"]
        for token in pointer.split("/")[1:]:
            value = value[int(token) if isinstance(value, list) else token]
        assert value == PLAIN
    assert len(request["secrets"]) == 4
