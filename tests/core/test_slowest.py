from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.slowest import CLASSES, ENOUGH, WINDOW, Slowest


def test_few_say_nothing() -> None:
    slowest = Slowest()
    for _ in range(ENOUGH - 1):
        slowest.observe("a", 1.0)
    assert slowest.p95("a") is None
    slowest.observe("a", 1.0)
    assert slowest.p95("a") == 1.0
    assert slowest.p95("b") is None


@given(st.lists(st.floats(0.0, 100.0), min_size=ENOUGH, max_size=2 * WINDOW))
def test_19_of_20_do_not_exceed_it_and_it_is_one_of_the_last(seconds: list[float]) -> None:
    slowest = Slowest()
    for one in seconds:
        slowest.observe("a", one)
    last = seconds[-WINDOW:]
    p95 = slowest.p95("a")
    assert p95 in last
    assert sum(one <= p95 for one in last) >= 0.95 * len(last)
    assert sum(one < p95 for one in last) <= 0.95 * len(last)


def test_what_was_long_ago_is_forgotten() -> None:
    slowest = Slowest()
    for seconds in [60.0] * WINDOW + [1.0] * WINDOW:
        slowest.observe("a", seconds)
    assert slowest.p95("a") == 1.0


def test_so_many_classes_and_no_more() -> None:
    slowest = Slowest()
    for kind in range(CLASSES + 1):
        for _ in range(ENOUGH):
            slowest.observe(kind, 1.0)
    assert slowest.p95(0) is None
    assert slowest.p95(1) == slowest.p95(CLASSES) == 1.0
