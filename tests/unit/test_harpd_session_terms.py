"""`harpd.supervisor.sessions.SessionTerms`: the part of a state file that describes a resumable call."""

from __future__ import annotations

import pytest

from harp.protocol.json_text import loads
from harp.protocol.schema import ProtocolError
from harpd.supervisor.sessions import SessionTerms

TERMS = SessionTerms("owner", "digest", 240.0, 300.0, 600.0, 86400.0, True, "user")


def test_session_terms_stored_are_decoded_unchanged() -> None:
    assert SessionTerms.decode(loads(TERMS.encode())) == TERMS


@pytest.mark.parametrize(
    "damage",
    [
        {"timeout": "soon"},
        {"timeout": None},
        {"result_ttl": []},
        {"disconnect_timeout": {}},
        {"max_exec_time": "1h"},
        *({"timeout": seconds} for seconds in (0, -1.0, True, "5")),
        {"owner": 5},
        {"secret": None},
        {"user": None},
    ],
    ids=str,
)
def test_session_terms_of_wrong_type_are_rejected(damage: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        SessionTerms.decode(loads(TERMS.encode()) | damage)


@pytest.mark.parametrize("key", list(SessionTerms.__slots__))
def test_session_terms_without_a_key_are_rejected(key: str) -> None:
    stored = loads(TERMS.encode())
    del stored[key]
    with pytest.raises(KeyError):
        SessionTerms.decode(stored)


def test_session_terms_seconds_are_lowered() -> None:
    stored = {**loads(TERMS.encode()), "timeout": 10**400, "result_ttl": 500}
    terms = SessionTerms.decode(stored, {"result_ttl": 100.0})
    assert (terms.timeout, terms.result_ttl, terms.disconnect_timeout) == (1e9, 100.0, 240.0)
