"""Job ids: their form and their order."""

from __future__ import annotations

import uuid

import pytest

from harpcaller.model.ids import is_job_id, new_job_id, new_job_ids

NOW = 1_763_868_000.25


def test_new_job_id_is_a_lower_case_uuid() -> None:
    made = new_job_id(NOW)
    assert is_job_id(made)
    parsed = uuid.UUID(made)
    assert (str(parsed), parsed.version, parsed.variant) == (made, 7, uuid.RFC_4122)
    assert parsed.int >> 80 == int(NOW * 1000), "milliseconds"


def test_new_job_ids_are_in_order_of_their_times() -> None:
    made = [new_job_id(NOW + step * 1e-6) for step in range(5000)]
    assert made == sorted(made)


def test_new_job_ids_of_the_same_time_differ() -> None:
    assert len({new_job_id(NOW) for _ in range(1000)}) == 1000


def test_new_job_ids_of_one_request_ascend() -> None:
    made = new_job_ids(NOW, 5000)
    assert made == sorted(set(made))
    assert {uuid.UUID(one).version for one in made} == {7}
    assert len({one[19:] for one in made}) == 5000, "random"


@pytest.mark.parametrize("now", [0.0, -5.5, 1e12])
def test_new_job_id_with_a_wrong_clock_is_valid(now: float) -> None:
    made = new_job_id(now)
    assert is_job_id(made)
    assert uuid.UUID(made).version == 7


@pytest.mark.parametrize(
    "id_",
    [
        "3f22e0d4-c8ed-11e5-8d66-001e8c140268",
        "00000000-0000-0000-0000-000000000000",
        "9b2f7c1e-5f0a-4c55-8a31-7d3c0b6a41ff",
    ],
)
def test_is_job_id_accepts_a_uuid_of_any_version(id_: str) -> None:
    assert is_job_id(id_)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "job",
        "3F22E0D4-C8ED-11E5-8D66-001E8C140268",
        "3f22e0d4c8ed11e58d66001e8c140268",
        "3f22e0d4-c8ed-11e5-8d66-001e8c140268\n",
        "3f22e0d4-c8ed-11e5-8d66-001e8c14026\u0668",
    ],
)
def test_is_job_id_rejects_other_texts(text: str) -> None:
    assert not is_job_id(text)
