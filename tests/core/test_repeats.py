from __future__ import annotations

from gateway.core.repeats import MAX_REPEATS, MAX_TEXTS, SECONDS, Repeats


def test_a_line_is_said_a_few_times_and_then_how_often_it_was_not() -> None:
    repeats = Repeats()
    said = [repeats.may_say("pool", "backend a is unhealthy", 10.0) for _ in range(MAX_REPEATS + 7)]
    assert said == [True] * MAX_REPEATS + [False] * 7
    assert repeats.may_say("pool", "backend b is unhealthy", 11.0)
    assert repeats.over(10.0 + SECONDS - 0.1) == []
    assert repeats.over(10.0 + SECONDS) == [("pool", "7 times more within 60 s: backend a is unhealthy")]
    assert repeats.over(10.0 + SECONDS) == []
    assert repeats.may_say("pool", "backend a is unhealthy", 10.0 + SECONDS)


def test_ever_new_lines_count_as_one_beyond_a_bound() -> None:
    repeats = Repeats()
    said = [repeats.may_say("probe", f"odd answer {number}", 0.0) for number in range(MAX_TEXTS + 1000)]
    assert said.count(True) == MAX_TEXTS + MAX_REPEATS
    assert repeats.over(SECONDS) == [("probe", f"{1000 - MAX_REPEATS} times more within 60 s: different warnings")]
