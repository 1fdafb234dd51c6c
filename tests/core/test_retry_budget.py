from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.retry_budget import FLOOR, SECONDS, RetryBudget


def taken(budget: RetryBudget, now: float, tries: int = 1000) -> int:
    return sum(budget.take(now) for _ in range(tries))


def test_a_few_retries_are_allowed_without_any_traffic_and_come_back_with_time() -> None:
    budget = RetryBudget(0.1)
    assert taken(budget, 0.0) == FLOOR
    assert taken(budget, 1.0) == 0
    assert taken(budget, 5 * SECONDS) >= FLOOR - 1


def test_retries_are_a_share_of_what_has_come_of_late() -> None:
    budget = RetryBudget(0.1)
    for _ in range(1000):
        budget.requested(0.0)
    assert taken(budget, 0.0) == 100
    assert taken(budget, 0.0) == 0


def test_a_share_of_nothing_allows_not_even_the_few() -> None:
    budget = RetryBudget(0.0)
    budget.requested(0.0)
    assert not budget.take(0.0)


@pytest.mark.parametrize("rate", [10, 100])
def test_over_a_long_time_in_which_every_request_fails_the_share_is_kept(rate: int) -> None:
    budget, retries = RetryBudget(0.1), 0
    for number in range(rate * 60):
        budget.requested(number / rate)
        retries += budget.take(number / rate)
    assert 0.08 * rate * 60 <= retries <= 0.12 * rate * 60 + FLOOR


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 5)), max_size=300), st.floats(0, 1))
def test_in_ten_seconds_there_are_never_more_than_share_and_floor_allow(steps: list[tuple[bool, float]], share: float) -> None:
    budget, now = RetryBudget(share), 0.0
    requests: list[float] = []
    retries: list[float] = []
    for is_request, wait in steps:
        now += wait
        if is_request:
            budget.requested(now)
            requests.append(now)
        elif budget.take(now):
            retries.append(now)
            recent = [at for at in retries if at > now - SECONDS]
            # within one time constant counts fade by at most e
            assert len(recent) <= 2.72 * max(share * len(requests), FLOOR) + 1e-6
