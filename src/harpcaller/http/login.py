"""The operations on logins: sessions of browsers, and who the client is.

A login proves a name by a one-time link, a token or a password, and begins a session. The browser gets the session's
cookie only: scripts cannot read it, and no other page's request has it.

Spec: docs/http-api.md, Login.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from harp import __version__
from harp.protocol import schema
from harp.protocol.schema import check, reject_unknown_keys, required_string
from harp_daemon.sliced_json import decode_slices
from harp_daemon.sockets import Listener
from harpcaller.access import AuthError
from harpcaller.access.attempts import peer_of
from harpcaller.access.client import Client
from harpcaller.access.policy import Action, Target
from harpcaller.access.rules import TOKEN
from harpcaller.access.users import User
from harpcaller.http.authentication import cookie_name, cookie_of, is_secure
from harpcaller.http.jobs import decode_body
from harpcaller.http.operations import Answer, APIRequest, Body, Operation, json_response
from harpcaller.http.problems import Problem
from harpcaller.http.proofs import Proof
from harpcaller.http.sessions import LOGIN, Session
from harpcaller.model.ids import is_job_id
from harpcaller.store import UnknownJob

_MAX_LOGIN = 4096  #: Maximum bytes of the body of a login.


async def begin_session(request: APIRequest) -> Response:
    """Answer a login with the cookie of a session."""
    sessions, http = request.service.sessions, request.http
    members = schema.decode_object(request.body, decode_slices)
    reject_unknown_keys(members, ("link", "token", "user", "password"))
    is_password = members.keys() == {"user", "password"}
    check(
        is_password or members.keys() in ({"link"}, {"token"}), 'expected "link", or "token", or "user" and "password"'
    )
    given: dict[str, Any] = {"agent": http.headers.get("user-agent", ""), "address": request.client.peer}
    if "token" in members:
        _, token = request.service.identities().of_token(request.client, required_string(members, "token"))
        principal, roles = TOKEN + token.name, token.roles
        secret, session = await sessions.begin(principal, token=token, **given)
    elif is_password:
        name, password = required_string(members, "user"), required_string(members, "password")
        user = await _check_password(request, name, password)
        principal, roles = LOGIN + name, user.roles
        secret, session = await sessions.begin(principal, roles, user=user, **given)
    else:
        link = sessions.take_link(required_string(members, "link"))
        principal, roles = LOGIN + link.name, link.roles
        secret, session = await sessions.begin(principal, roles, seconds=link.seconds, **given)
    replaced = cookie_of(http, request.service)
    if replaced is not None and (before := sessions.find(replaced)) is not None:
        await sessions.end(before.id)  # the browser has one cookie only
    client = Client((principal, *request.client.principals), request.client.listener, request.client.peer, True, roles)
    await request.service.acting_as(client).record_session("login", session.id)
    response = json_response({"principal": principal, "expires": session.expires}, 201)
    _set_cookie(request, response, secret)
    return response


async def _check_password(request: APIRequest, name: str, password: str) -> User:
    users = request.service.users
    if users is None:
        raise AuthError("the name or the password is wrong", "a password, and http.users_file is not set")
    return await users.check(peer_of(request.client), name, password)


async def end_session(request: APIRequest) -> Response:
    """End the session of the request."""
    session = proof_of(request).session
    if session is None:
        raise Problem("not_found", "the request has no session: a token is revoked with harpcallerd token revoke")
    await _end(request, session)
    response = Response(status_code=204)
    _set_cookie(request, response, "", max_age=0)
    return response


def _set_cookie(request: APIRequest, response: Response, secret: str, max_age: int | None = None) -> None:
    response.set_cookie(
        cookie_name(request.http, request.service),
        secret,
        max_age=max_age,
        path="/",
        secure=is_secure(request.http, request.service),
        httponly=True,
        samesite="strict",
    )


async def list_sessions(request: APIRequest) -> Response:
    """Answer with the client's own sessions; an administrator sees all."""
    own = proof_of(request).session
    shown = [
        {
            "id": session.id,
            "principal": session.principal,
            "roles": list(session.roles),
            "created": session.created,
            "seen": session.seen,
            "expires": session.expires,
            "agent": session.agent,
            "address": session.address,
            "current": own is not None and own.id == session.id,
        }
        for session in request.service.sessions.list()
        if _may_see(request, session)
    ]
    return json_response({"sessions": shown})


async def end_other_session(request: APIRequest) -> Response:
    """End a session by its id."""
    for session in request.service.sessions.list():
        if session.id == request.path["session"] and _may_see(request, session):
            await _end(request, session)
            return Response(status_code=204)
    raise Problem("not_found", "there is no such session")


def _may_see(request: APIRequest, session: Session) -> bool:
    return session.principal == request.client.owner or request.acting.decide(Action.ADMIN, Target()).allowed


async def _end(request: APIRequest, session: Session) -> None:
    request.http.state.ends_proof = True
    await request.service.sessions.end(session.id)
    await request.acting.record_session("logout", session.id)


def proof_of(request: APIRequest) -> Proof:
    """Return how the client has proven who it is."""
    proof: Proof = request.http.state.proof
    return proof


async def get_me(request: APIRequest) -> Response:
    """Answer with who the client is, and what it may do."""
    session, client = proof_of(request).session, request.client
    return json_response(
        {
            "principal": client.owner,
            "principals": list(client.principals),
            "roles": list(client.roles),
            "session": None if session is None else {"id": session.id, "expires": session.expires},
            "can": [str(action) for action in request.acting.list_actions()],
            "server": {"version": __version__, "now": time.time(), **_describe_calls(request.service.calls)},
        }
    )


def _describe_calls(listeners: Sequence[Listener]) -> dict[str, Any]:
    """Return the port of the client API, and whether it speaks TLS; None without an address that has a port."""
    for listener in listeners:
        if listener.path is None:
            return {"port": listener.fields["port"], "tls": listener.is_tls}
    return {"port": None, "tls": None}


async def ask_me(request: APIRequest) -> Response:
    """Answer whether the client may do something, and which rule decides."""
    members = await decode_body(request, lambda body: schema.decode_object(body, decode_slices))
    reject_unknown_keys(members, ("action", "host", "procedure", "queue", "arguments", "job"))
    name = required_string(members, "action")
    check(name in [*Action], f"action: expected one of {', '.join(Action)}, got {name[:100]!r}")
    action = Action(name)
    if "job" in members:
        check(len(members) == 2, "job: expected no other member than action beside it")
        job_id = required_string(members, "job")
        if not is_job_id(job_id):
            raise UnknownJob(job_id[:100])
        decision = await request.acting.decide_on_job(action, job_id)
    else:
        host, procedure = (required_string(members, key) if key in members else None for key in ("host", "procedure"))
        queue, arguments = (members.payload(key) if key in members else None for key in ("queue", "arguments"))
        check(queue is None or schema.is_object(queue), "queue: expected an object")
        # A question about an action on jobs that names no job is about a job of the client.
        owner = request.client.owner if action in (Action.READ, Action.CANCEL) else None
        decision = request.acting.decide(action, Target(host, procedure, arguments, queue, owner))
    rule = None if decision.rule is None else f"rule {decision.rule} (line {decision.line})"
    return json_response({"allowed": decision.allowed, "rule": rule})


_SESSION = {
    "type": "object",
    "required": ["id", "principal", "roles", "created", "seen", "expires", "agent", "address", "current"],
    "properties": {
        "id": {"type": "string"},
        "principal": {"type": "string"},
        "roles": {"type": "array", "items": {"type": "string"}},
        "created": {"type": "number"},
        "seen": {"type": "number", "description": "the last use"},
        "expires": {"type": "number"},
        "agent": {"type": "string", "description": "what the browser calls itself"},
        "address": {"type": "string"},
        "current": {"type": "boolean", "description": "whether it is the session of this request"},
    },
}
_LOGIN = {
    "type": "object",
    "required": ["principal", "expires"],
    "properties": {"principal": {"type": "string"}, "expires": {"type": "number"}},
}
_ME = {
    "type": "object",
    "required": ["principal", "principals", "roles", "session", "can", "server"],
    "properties": {
        "principal": {"type": "string", "description": "owner of the jobs that the client submits"},
        "principals": {"type": "array", "items": {"type": "string"}},
        "roles": {"type": "array", "items": {"type": "string"}},
        "session": {"type": ["object", "null"]},
        "can": {"type": "array", "items": {"enum": [*Action]}, "description": "actions that some rule allows"},
        "server": {
            "type": "object",
            "required": ["version", "now", "port", "tls"],
            "properties": {
                "version": {"type": "string"},
                "now": {"type": "number"},
                "port": {"type": ["integer", "null"], "description": "where `harp.HarpCaller` connects"},
                "tls": {"type": ["boolean", "null"], "description": "whether this port speaks TLS"},
            },
        },
    },
}

OPERATIONS = (
    Operation(
        method="POST",
        path="/session",
        operation_id="begin_session",
        summary="Log in by a one-time link, a token or a password",
        handler=begin_session,
        is_public=True,
        body=Body(
            {
                "type": "object",
                "properties": {name: {"type": "string"} for name in ("link", "token", "user", "password")},
                "additionalProperties": False,
                "oneOf": [{"required": ["link"]}, {"required": ["token"]}, {"required": ["user", "password"]}],
            },
            {"link": "2d6cZq0"},
            most=_MAX_LOGIN,
        ),
        problems=("auth_error", "cross_origin", "rate_limited"),
        responses={201: Answer("the session", _LOGIN, headers={"Set-Cookie": "the cookie of the session"})},
    ),
    Operation(
        method="DELETE",
        path="/session",
        operation_id="end_session",
        summary="Log out",
        handler=end_session,
        problems=("not_found",),
        responses={204: Answer("the session has ended")},
    ),
    Operation(
        method="GET",
        path="/sessions",
        operation_id="list_sessions",
        summary="List your sessions; as an administrator, all sessions",
        handler=list_sessions,
        responses={
            200: Answer(
                "the sessions, the oldest first",
                {
                    "type": "object",
                    "required": ["sessions"],
                    "properties": {"sessions": {"type": "array", "items": _SESSION}},
                },
            )
        },
    ),
    Operation(
        method="DELETE",
        path="/sessions/{session}",
        operation_id="end_other_session",
        summary="End one of your sessions; as an administrator, any session",
        handler=end_other_session,
        problems=("not_found",),
        responses={204: Answer("the session has ended")},
    ),
    Operation(
        method="GET",
        path="/me",
        operation_id="get_me",
        summary="Show who you are and what you may do",
        handler=get_me,
        responses={200: Answer("the client", _ME)},
    ),
    Operation(
        method="POST",
        path="/me/can",
        operation_id="ask_me",
        summary="Ask whether you may do something",
        handler=ask_me,
        body=Body(
            {
                "type": "object",
                "required": ["action"],
                "properties": {
                    "action": {"enum": [*Action]},
                    "host": {"type": "string"},
                    "procedure": {"type": "string"},
                    "queue": {"type": "object"},
                    "arguments": {"type": ["array", "object"]},
                    "job": {"type": "string"},
                },
                "additionalProperties": False,
            },
            {"action": "call", "host": "web01", "procedure": "disk_usage"},
        ),
        problems=("invalid_jobid",),
        responses={
            200: Answer(
                "the decision, and the rule that made it",
                {
                    "type": "object",
                    "required": ["allowed", "rule"],
                    "properties": {"allowed": {"type": "boolean"}, "rule": {"type": ["string", "null"]}},
                },
            )
        },
    ),
)
