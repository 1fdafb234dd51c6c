from __future__ import annotations

from datetime import UTC, datetime
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import GatewayError
from gateway.core.principal import Budget, Limits
from gateway.core.ratelimit import MONEY, Counts, Limited, Limiter, period_end

NOON = 1_700_049_600.0  # 2023-11-15 12:00 UTC


class Bucket:
    """The textbook: what is there grows by the limit each minute, up to the limit. Exact, in fractions."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.there = Fraction(limit or 0)
        self.at = 0

    def pass_to(self, at: int) -> None:
        grown = self.there + Fraction(self.limit or 0, 60_000) * (at - self.at)
        self.there, self.at = min(grown, Fraction(self.limit or 0)), at

    def has(self, number: int) -> bool:
        return self.limit is None or number <= self.there

    def take(self, number: int) -> None:
        if self.limit is not None:
            self.there = min(self.there - number, Fraction(self.limit))


class Reference:
    """All limits of one key, by the textbook."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests, self.tokens = Bucket(limits.requests), Bucket(limits.tokens)
        self.running = 0
        self.day = -1
        self.spent = 0

    def pass_to(self, at: int, unix: float) -> None:
        self.requests.pass_to(at)
        self.tokens.pass_to(at)
        if unix // 86_400 != self.day:
            self.day, self.spent = int(unix // 86_400), 0

    def reserve(self, tokens: int) -> bool:
        limits = self.limits
        fits = (
            self.requests.has(1)
            and self.tokens.has(tokens)
            and (limits.concurrency is None or self.running < limits.concurrency)
            and (limits.budget is None or self.spent + tokens <= limits.budget.amount)
        )
        if fits:
            self.requests.take(1)
            self.tokens.take(tokens)
            self.running += 1
            self.spent += tokens
        return fits

    def settle(self, reserved: int, used: int, day: int) -> None:
        self.tokens.take(used - reserved)
        if day == self.day:
            self.spent = max(self.spent + used - reserved, 0)


def some(numbers: st.SearchStrategy[int]) -> st.SearchStrategy[int | None]:
    return st.none() | numbers


LIMITS = st.builds(
    Limits,
    requests=some(st.integers(0, 90)),
    tokens=some(st.integers(0, 5000)),
    concurrency=some(st.integers(0, 4)),
    budget=st.none() | st.builds(Budget, st.integers(0, 9000).map(float), period=st.just("day")),
)
STEPS = st.lists(
    st.tuples(st.just("pass"), st.integers(0, 70_000) | st.integers(0, 50))
    | st.tuples(st.just("reserve"), st.integers(0, 3000))
    | st.tuples(st.just("settle"), st.integers(0, 9000))
    | st.tuples(st.just("leave"), st.integers(0, 1)),
    max_size=60,
)


@given(LIMITS, STEPS)
def test_it_admits_exactly_what_the_textbook_admits(limits: Limits, steps: list[tuple[str, int]]) -> None:
    limiter, reference = Limiter(), Reference(limits)
    at, running = 0, []
    for what, number in steps:
        unix = NOON + at
        if what == "pass":
            at += number
            continue
        reference.pass_to(at, unix)
        if what == "reserve":
            try:
                running.append((limiter.reserve("k", limits, number, 0, at / 1000, unix), number, reference.day))
                admitted = True
            except Limited:
                admitted = False
            assert admitted == reference.reserve(number)
        elif running:
            reservation, reserved, day = running.pop(0)
            if what == "settle":
                limiter.standing("k", limits, at / 1000, unix)
                reservation.settle(number, 0, at / 1000)
                reference.settle(reserved, number, day)
            reservation.end()
            reservation.end()
            reference.running -= 1


@given(st.integers(1, 300), st.integers(1, 5000), STEPS)
def test_what_a_refused_request_is_told_is_the_first_moment_at_which_it_is_admitted(
    requests: int, tokens: int, steps: list[tuple[str, int]]
) -> None:
    limits, limiter, at = Limits(requests, tokens), Limiter(), 0
    for what, number in steps:
        if what == "pass":
            at += number
        elif what == "reserve":
            try:
                limiter.reserve("k", limits, number, 0, at / 1000, NOON).settle(number // 2, 0, at / 1000)
            except Limited as refused:
                if refused.limit == "size":
                    assert number > tokens
                    assert dict(refused.headers()) == {"X-Should-Retry": "false"}
                    continue
                wait = int(dict(refused.headers())["Retry-After-Ms"]) if (refused.retry_after or 0) <= 120 else None
                if wait is None:
                    continue
                with pytest.raises(Limited):
                    limiter.reserve("k", limits, number, 0, (at + wait - 1) / 1000, NOON)
                at += wait
                limiter.reserve("k", limits, number, 0, at / 1000, NOON)


@given(st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, 200), st.integers(0, 400)), min_size=2, max_size=50))
def test_no_stretch_of_time_admits_more_than_a_full_bucket_and_what_it_refills(steps: list[tuple[int, int, int]]) -> None:
    limits, limiter, at = Limits(tokens=200), Limiter(), 0
    admitted: list[tuple[int, int]] = []
    for passed, asked, used in steps:
        at += passed
        try:
            limiter.reserve("k", limits, asked, 0, at / 1000, NOON).settle(used, 0, at / 1000)
        except Limited:
            continue
        admitted.append((at, used))
    for first, (begin, _) in enumerate(admitted):
        used = 0
        for end, tokens in admitted[first:]:
            # What one answer used beyond its reserve is owed before the next one is admitted.
            assert used <= 200 + Fraction(200 * (end - begin), 60_000)
            used += tokens


def test_leaving_without_a_settlement_keeps_the_debit() -> None:
    limiter, limits = Limiter(), Limits(tokens=100)
    limiter.reserve("k", limits, 100, 0, 0.0, NOON).end()
    with pytest.raises(Limited):
        limiter.reserve("k", limits, 1, 0, 0.0, NOON)


def test_a_refused_request_takes_nothing() -> None:
    limiter, limits = Limiter(), Limits(requests=5, tokens=100, concurrency=1)
    limiter.reserve("k", limits, 10, 0, 0.0, NOON)
    before = limiter.standing("k", limits, 0.0, NOON)
    with pytest.raises(Limited, match="1 requests at the same time"):
        limiter.reserve("k", limits, 10, 0, 0.0, NOON)
    assert limiter.standing("k", limits, 0.0, NOON) == before


def test_of_several_limits_the_one_to_wait_for_longest_is_told() -> None:
    limiter, limits = Limiter(), Limits(requests=1, tokens=6000)
    limiter.reserve("k", limits, 6000, 0, 0.0, NOON)
    with pytest.raises(Limited) as caught:
        limiter.reserve("k", limits, 100, 0, 0.0, NOON)
    assert (caught.value.limit, caught.value.retry_after) == ("requests", 60.0)


def test_money_is_counted_in_its_own_unit_and_a_new_month_has_a_whole_budget() -> None:
    limiter, limits = Limiter(), Limits(budget=Budget(0.5, "money"))
    limiter.reserve("k", limits, 10**9, 400_000, 0.0, NOON).settle(10**9, 300_000, 0.0)
    limiter.reserve("k", limits, 10**9, 200_000, 0.0, NOON)
    with pytest.raises(Limited) as caught:
        limiter.reserve("k", limits, 1, 1, 0.0, NOON)
    error = caught.value
    assert (error.status, error.code, error.type, error.fault) == (429, "insufficient_quota", "insufficient_quota", "policy")
    assert "budget of 0.5 a month 0 are left" in error.message
    assert "2023-12-01 00:00 UTC" in error.message
    assert {"Retry-After": "120", "X-Should-Retry": "false"}.items() <= dict(error.headers()).items()
    limiter.reserve("k", limits, 1, MONEY // 2, 0.0, float(period_end("month", NOON)))


def test_a_settlement_counts_in_the_period_of_its_request() -> None:
    limiter, limits = Limiter(), Limits(budget=Budget(100, period="day"))
    late = limiter.reserve("k", limits, 90, 0, 0.0, NOON)
    limiter.reserve("k", limits, 60, 0, 1.0, NOON + 86_400)
    late.settle(0, 0, 2.0)
    assert limiter.standing("k", limits, 2.0, NOON + 86_400).spent == 60


@given(st.floats(0, 4e9), st.sampled_from(["day", "month"]))
def test_a_period_ends_where_the_calendar_says(unix: float, period: str) -> None:
    end = period_end(period, unix)
    last, first = datetime.fromtimestamp(end - 1, UTC), datetime.fromtimestamp(end, UTC)
    now = datetime.fromtimestamp(unix, UTC)
    assert unix < end
    assert (last.year, last.month) == (now.year, now.month)
    assert (first.hour, first.minute, first.second) == (0, 0, 0)
    assert last.day == now.day if period == "day" else first.day == 1


def test_keys_that_nobody_uses_are_forgotten_and_those_in_use_never() -> None:
    limiter, limits = Limiter(most_keys=10), Limits(requests=60, concurrency=2)
    held = limiter.reserve("held", limits, 0, 0, 0.0, NOON)
    for number in range(1000):
        limiter.reserve(f"k{number}", limits, 0, 0, number * 1.0, NOON).end()
    assert len(limiter) <= 10
    assert limiter.standing("held", limits, 1000.0, NOON).held == 1
    held.end()
    assert limiter.standing("held", limits, 1000.0, NOON) == Counts()


def test_when_all_keys_are_in_use_a_further_one_is_refused_rather_than_uncounted() -> None:
    limiter, limits = Limiter(most_keys=3), Limits(requests=60, tokens=600)
    for key in "abc":
        limiter.reserve(key, limits, 600, 0, 0.0, NOON).end()
    with pytest.raises(GatewayError) as caught:
        limiter.reserve("d", limits, 1, 0, 59.0, NOON)
    assert caught.value.code == "limits_unavailable"
    for key in "abc":
        with pytest.raises(Limited):
            limiter.reserve(key, limits, 600, 0, 59.0, NOON)
    limiter.reserve("d", limits, 600, 0, 60.0, NOON)


def test_a_lower_limit_holds_at_once_for_what_was_used_before() -> None:
    limiter = Limiter()
    limiter.reserve("k", Limits(tokens=1000), 900, 0, 0.0, NOON)
    with pytest.raises(Limited):
        limiter.reserve("k", Limits(tokens=100), 1, 0, 0.0, NOON)


def test_the_cost_does_not_grow_with_the_number_of_keys() -> None:
    limiter, limits = Limiter(most_keys=20_000), Limits(budget=Budget(1e9))
    for number in range(20_000):
        limiter.reserve(str(number), limits, 1, 0, 0.0, NOON)
    assert len(limiter) == 20_000
    limiter.reserve("7", limits, 1, 0, 0.0, NOON)
