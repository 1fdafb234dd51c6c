from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.breaker import LONGEST_OPEN, Breaker


def failed(breaker: Breaker, times: int, now: float = 0.0) -> None:
    for _ in range(times):
        breaker.failed(breaker.sent(now), now)


def test_failures_in_a_row_open_it_and_a_success_between_does_not_let_them_add_up() -> None:
    breaker = Breaker(3, 10.0)
    failed(breaker, 2)
    breaker.succeeded(breaker.sent(0.0))
    failed(breaker, 2)
    assert breaker.state(0.0) == "closed"
    failed(breaker, 1)
    assert (breaker.state(0.0), breaker.allows(0.0), breaker.reopens_at()) == ("open", False, 10.0)


def test_half_open_it_takes_one_request_at_a_time_and_closes_when_that_succeeds() -> None:
    breaker = Breaker(1, 10.0)
    failed(breaker, 1)
    assert (breaker.state(10.0), breaker.allows(10.0)) == ("half_open", True)
    trial = breaker.sent(10.0)
    assert not breaker.allows(11.0)
    breaker.succeeded(trial)
    assert (breaker.state(11.0), breaker.allows(11.0)) == ("closed", True)


def entered(breaker: Breaker) -> tuple[int, int, int]:
    return breaker.opened, breaker.half_opened, breaker.closed


def test_each_state_that_it_comes_into_is_counted() -> None:
    breaker = Breaker(1, 10.0)
    breaker.reset()  # it was closed
    failed(breaker, 1)
    assert entered(breaker) == (1, 0, 0)
    breaker.cancelled(breaker.sent(10.0))
    breaker.sent(11.0)  # another trial of the same state
    assert entered(breaker) == (1, 1, 0)
    breaker.failed(breaker.era, 12.0)
    assert entered(breaker) == (2, 1, 0)
    breaker.succeeded(breaker.sent(breaker.reopens_at()))
    assert entered(breaker) == (2, 2, 1)


def test_each_failed_trial_doubles_the_time_up_to_a_bound_and_a_success_forgets_that() -> None:
    breaker, now, waits = Breaker(1, 10.0), 0.0, []
    for _ in range(6):
        failed(breaker, 1, now)
        waits.append(breaker.reopens_at() - now)
        now = breaker.reopens_at()
    assert waits == [10.0, 20.0, 40.0, 80.0, LONGEST_OPEN, LONGEST_OPEN]
    breaker.succeeded(breaker.sent(now))
    failed(breaker, 1, now)
    assert breaker.reopens_at() == now + 10.0


def test_requests_sent_before_it_opened_neither_close_it_nor_open_it_again() -> None:
    breaker = Breaker(1, 10.0)
    old = [breaker.sent(0.0) for _ in range(3)]
    failed(breaker, 1)
    breaker.succeeded(old[0])
    assert breaker.state(1.0) == "open"
    trial = breaker.sent(10.0)
    breaker.failed(old[1], 10.0)
    breaker.cancelled(old[2])
    assert (breaker.state(10.0), breaker.allows(10.0)) == ("half_open", False)
    breaker.succeeded(trial)
    assert breaker.state(10.0) == "closed"


def test_a_trial_that_is_cancelled_is_free_for_another_request() -> None:
    breaker = Breaker(1, 10.0)
    failed(breaker, 1)
    breaker.cancelled(breaker.sent(10.0))
    assert (breaker.state(10.0), breaker.allows(10.0)) == ("half_open", True)


def test_a_cancelled_request_says_nothing_of_a_closed_one() -> None:
    breaker = Breaker(2, 10.0)
    failed(breaker, 1)
    breaker.cancelled(breaker.sent(0.0))
    failed(breaker, 1)
    assert breaker.state(0.0) == "open"


ENDS = st.sampled_from(["succeeded", "failed", "cancelled"])


@given(st.lists(st.tuples(st.sampled_from(["send", "end", "wait"]), ENDS, st.integers(0, 30)), max_size=200))
def test_whatever_happens_half_open_has_at_most_one_trial_and_it_never_stays_shut(steps: list[tuple[str, str, int]]) -> None:
    breaker, now = Breaker(2, 5.0), 0.0
    flying: list[int] = []
    trials: set[int] = set()
    for what, end, number in steps:
        if what == "wait":
            now += number
        elif what == "send" and breaker.allows(now):
            half_open = breaker.state(now) == "half_open"
            era = breaker.sent(now)
            flying.append(era)
            if half_open:
                assert not breaker.allows(now)
                trials.add(era)
        elif what == "end" and flying:
            era = flying.pop(number % len(flying))
            trials.discard(era)
            breaker.failed(era, now) if end == "failed" else getattr(breaker, end)(era)
        assert len(trials) <= 1
    if not flying:
        assert breaker.allows(now + LONGEST_OPEN)
