from __future__ import annotations

from collections import Counter

import pytest

from gateway.core.load import Load
from gateway.core.policy import POLICIES
from gateway.core.prefix import blocks_of
from gateway.core.scheduler import Scheduler
from gateway.core.tickets import Ticket
from gateway.core.usage import Usage

TEXT = "".join(f"{i} bottles of beer, " for i in range(3000))


def scheduler_of(policy: str, *names: str) -> Scheduler:
    scheduler = Scheduler(POLICIES[policy]())
    for name in names:
        scheduler.set_backend(name, 0.0)
    return scheduler


def place(scheduler: Scheduler, now: float = 0.0, *, text: str = "", tokens: int = 100, session: str | None = None) -> Ticket:
    ticket = Ticket("m", now, prompt=blocks_of("m", text), prompt_tokens=tokens, session=session)
    assert scheduler.submit(ticket, now)
    return ticket


def finish(scheduler: Scheduler, ticket: Ticket, now: float, cached: int = 0) -> None:
    scheduler.first_token(ticket, now)
    scheduler.release(ticket, now, Usage(ticket.prompt_tokens, 10, cached))


def test_round_robin_takes_each_in_turn() -> None:
    scheduler = scheduler_of("round-robin", "a", "b", "c")
    assert Counter(place(scheduler).backend for _ in range(9)) == {"a": 3, "b": 3, "c": 3}


def test_round_robin_follows_weights() -> None:
    scheduler = scheduler_of("round-robin", "a")
    scheduler.set_backend("b", 0.0, weight=3.0)
    assert Counter(place(scheduler).backend for _ in range(40)) == {"a": 10, "b": 30}


def test_a_backend_that_comes_back_to_round_robin_catches_nothing_up() -> None:
    scheduler = scheduler_of("round-robin", "a", "b")
    scheduler.set_backend("b", 0.0, accepting=False)
    assert {place(scheduler).backend for _ in range(20)} == {"a"}
    scheduler.set_backend("b", 0.0)
    assert abs(Counter(place(scheduler).backend for _ in range(10))["b"] - 5) <= 1


def test_least_load_counts_tokens_not_requests() -> None:
    scheduler = scheduler_of("least-load", "a", "b")
    big = place(scheduler, tokens=5000)
    assert {place(scheduler, tokens=100).backend for _ in range(5)} == {"a", "b"} - {big.backend}


def test_others_requests_on_a_backend_count_until_the_report_is_old() -> None:
    scheduler = scheduler_of("least-load", "a", "b")
    place(scheduler)
    place(scheduler)
    scheduler.set_backend("a", 1.0, load=Load(running=9, waiting=2, kv_usage=0.1, at=1.0))
    assert {place(scheduler, 2.0).backend for _ in range(3)} == {"b"}
    assert place(scheduler, 60.0).backend == "a"


def test_a_session_stays_where_it_is_and_every_gateway_agrees() -> None:
    one, two = scheduler_of("session", "a", "b", "c"), scheduler_of("session", "c", "a", "b")
    for number in range(20):
        first = place(one, session=f"s{number}")
        finish(one, first, 1.0)
        second = place(two, session=f"s{number}")
        finish(two, second, 1.0)
        assert first.backend == second.backend
        assert first.decision == "session"


def test_a_busy_backend_gives_sessions_away() -> None:
    scheduler = scheduler_of("session", "a", "b", "c", "d")
    tickets = [place(scheduler, session="the same") for _ in range(20)]
    assert max(Counter(ticket.backend for ticket in tickets).values()) <= 7


def test_prefix_goes_where_most_of_the_prompt_is_within_bounded_loads() -> None:
    scheduler = scheduler_of("prefix", "a", "b", "c", "d")
    first = place(scheduler, text=TEXT[:8000], tokens=2000)
    finish(scheduler, first, 1.0)
    again = [place(scheduler, 2.0, text=TEXT[:9000], tokens=2250) for _ in range(12)]
    assert again[0].backend == first.backend
    assert again[0].decision.startswith("prefix ")
    assert Counter(ticket.backend for ticket in again)[first.backend] <= 5


def test_device_takes_the_cheapest_class_that_has_a_slot() -> None:
    scheduler = Scheduler(POLICIES["device"]())
    scheduler.set_backend("cpu", 0.0, slots=2, cost=1.0)
    scheduler.set_backend("gpu 1", 0.0, slots=1, cost=5.0)
    scheduler.set_backend("gpu 2", 0.0, slots=1, cost=5.0)
    names = [place(scheduler).backend for _ in range(4)]
    assert names[:2] == ["cpu", "cpu"]
    assert set(names[2:]) == {"gpu 1", "gpu 2"}


def test_expected_completion_prefers_the_cache_until_the_queue_there_costs_more() -> None:
    scheduler = scheduler_of("expected-completion", "a", "b")
    first = place(scheduler, text=TEXT[:40_000], tokens=10_000)
    finish(scheduler, first, 2.5)
    again = place(scheduler, 10.0, text=TEXT[:44_000], tokens=11_000)
    assert again.backend == first.backend
    assert again.decision == f"prefix {again.cached_tokens}/11000"
    assert 8000 < again.cached_tokens <= 10_000
    crowd = [place(scheduler, 10.0, text=f"{i}" + TEXT[:40_000], tokens=10_000) for i in range(8)]
    assert Counter(ticket.backend for ticket in crowd)[first.backend] <= 4


def test_expected_completion_keeps_a_session_where_it_was_if_all_is_equal() -> None:
    scheduler = scheduler_of("expected-completion", "a", "b", "c", "d")
    homes: dict[int, str | None] = {}
    for turn in range(5):
        for number in range(8):
            ticket = place(scheduler, float(turn), session=f"s{number}")
            finish(scheduler, ticket, turn + 0.01)
            assert homes.setdefault(number, ticket.backend) == ticket.backend


def test_expected_completion_sends_more_to_the_faster_backend() -> None:
    scheduler = scheduler_of("expected-completion", "fast", "slow")
    now, sent = 0.0, Counter[str | None]()
    free = {"fast": 0.0, "slow": 0.0}
    ends: list[tuple[float, Ticket]] = []
    for _ in range(400):
        now += 0.35
        for end in sorted(entry for entry in ends if entry[0] <= now):
            finish(scheduler, end[1], end[0])
            ends.remove(end)
        ticket = Ticket("m", now, prompt_tokens=2000)
        for granted in [ticket] if scheduler.submit(ticket, now) else scheduler.schedule(now):
            assert granted.backend
            free[granted.backend] = max(free[granted.backend], now) + (0.4 if granted.backend == "fast" else 1.6)
            ends.append((free[granted.backend], granted))
            sent[granted.backend] += 1
    assert sent["fast"] > 2 * sent["slow"] > 0


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_equal_backends_all_get_their_share(name: str) -> None:
    scheduler = scheduler_of(name, "a", "b", "c", "d")
    counts = Counter(place(scheduler, tokens=500).backend for _ in range(40))
    assert sorted(counts.values()) == [10, 10, 10, 10]
