"""A limited number of values, of which the oldest are forgotten."""

from __future__ import annotations

from harpcaller.model.latest import Latest


def test_latest_values_are_found_and_older_ones_forgotten() -> None:
    latest: Latest[int] = Latest(10)
    for number in range(100):
        latest[str(number)] = number
        assert [latest.get(str(other)) for other in range(max(0, number - 9), number + 1)] == [
            *range(max(0, number - 9), number + 1)
        ]
    assert sum(latest.get(str(number)) is not None for number in range(100)) <= 20
    latest["99"] = 1
    assert latest.get("99") == 1
    latest.clear()
    assert latest.get("99") is None
