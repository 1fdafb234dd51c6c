from __future__ import annotations

import pytest

from gateway.core.service_rate import ServiceRates, work


def rates_of(n: int) -> ServiceRates:
    rates = ServiceRates()
    for _ in range(n):
        rates.add(1.0)
    return rates


@pytest.mark.parametrize("speed", [50.0, 4000.0, 200_000.0])
def test_any_speed_is_learned_from_a_few_dozen_prompts(speed: float) -> None:
    rates = rates_of(1)
    for number in range(200):
        tokens = 500 + 37 * (number % 50)
        rates.observe(0, tokens, 0, work(tokens, 0) / speed, 0.0)
    assert rates.seconds[0] == pytest.approx(1 / speed, rel=0.15)


def test_tiny_prompts_teach_the_rate_too() -> None:
    rates = rates_of(1)
    for _ in range(2000):
        rates.observe(0, 20, 0, work(20, 0) / 100.0, 0.0)
    assert rates.seconds[0] == pytest.approx(0.01, rel=0.35)


def test_equals_have_the_same_rate_in_spite_of_noise_and_a_slow_one_is_found() -> None:
    rates = rates_of(3)
    for number in range(120):
        noise = 1.1 if number % 2 else 0.9
        rates.observe(0, 4000, 0, work(4000, 0) / 8000 * noise, 0.0)
        rates.observe(1, 4000, 0, work(4000, 0) / 8000 / noise, 0.0)
        rates.observe(2, 4000, 0, work(4000, 0) / 2000, 0.0)
    assert rates.seconds[2] > 2.0 * rates.seconds[0]
    assert rates.seconds[0] == pytest.approx(rates.seconds[1], rel=0.3)


def test_prompts_that_wait_for_each_other_are_told_from_those_that_do_not() -> None:
    one_after_another, side_by_side = rates_of(1), rates_of(1)
    for number in range(40):
        overlapped = 0.0 if number % 4 == 0 else 0.5
        one_after_another.observe(0, 4000, 0, 0.5, overlapped)
        side_by_side.observe(0, 4000, 0, 0.5 if overlapped == 0.0 else 0.01, overlapped)
    assert one_after_another.serial == [True]
    assert side_by_side.serial == [False]


def test_nothing_is_held_to_be_serial_without_evidence_or_after_a_restart() -> None:
    rates = rates_of(1)
    assert rates.serial == [False]
    for number in range(40):
        rates.observe(0, 4000, 0, 0.5, 0.5 * (number % 2))
    assert rates.serial == [True]
    rates.forget(0, 1.0)
    assert rates.serial == [False]
