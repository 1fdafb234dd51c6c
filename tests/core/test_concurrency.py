"""The limit against simulated servers: ``slots`` requests at a time, the rest in the server's own queue."""

from __future__ import annotations

import heapq
import random

import pytest

from gateway.core.concurrency import HIGHEST, LOWEST, START, WINDOW, ConcurrencyLimit


class Server:
    """First come, first served, with ``slots`` at a time; each request takes about ``seconds`` (its first token, in the
    first tenth of that)."""

    def __init__(self, slots: int, seconds: float, seed: int = 1) -> None:
        self.slots = slots
        self.seconds = seconds
        self._random = random.Random(seed)
        self._free: list[float] = []

    def run(self, limit: ConcurrencyLimit, requests: int, clients: int = 4096) -> list[int]:
        """Clients who always want more; returns the limit after each request."""
        running: list[tuple[float, float, float]] = []
        now, seen = 0.0, []
        slots = [0.0] * self.slots
        for _ in range(requests):
            while len(running) < min(limit.value, clients):
                start = max(heapq.heappop(slots), now)
                work = self.seconds * self._random.uniform(0.8, 1.2)
                heapq.heappush(slots, start + work)
                heapq.heappush(running, (start + work, start + 0.1 * work - now, work))
            held = len(running)
            now, first_token, work = heapq.heappop(running)
            limit.observe(first_token, first_token / (0.1 * work), held)
            seen.append(limit.value)
        return seen


@pytest.mark.parametrize("slots", [1, 2, 4, 8, 16, 48, 128, 400])
@pytest.mark.parametrize("seconds", [2.0, 30.0])
def test_it_finds_the_slots_of_a_busy_server_within_a_factor_of_two(slots: int, seconds: float) -> None:
    limit = ConcurrencyLimit()
    seen = Server(slots, seconds).run(limit, 20_000)
    late = seen[len(seen) // 2 :]
    assert slots / 2 <= sorted(late)[len(late) // 2] <= 2 * slots
    assert sum(slots / 2 <= value <= 2.5 * slots + 1 for value in late) >= 0.9 * len(late)


def test_it_never_throttles_a_server_that_is_quick() -> None:
    limit = ConcurrencyLimit()
    seen = Server(4, 0.001).run(limit, 5_000, clients=200)
    assert min(seen) >= START
    assert limit.value >= 200


def test_with_few_requests_it_stays_and_with_no_queue_it_grows() -> None:
    limit = ConcurrencyLimit()
    Server(1000, 5.0).run(limit, 2_000, clients=4)
    assert limit.value == START
    Server(4000, 5.0).run(limit, 40_000)
    assert limit.value == HIGHEST


def test_it_follows_a_server_that_has_lost_or_won_slots() -> None:
    limit = ConcurrencyLimit()
    for slots in (32, 8, 64):
        Server(slots, 5.0).run(limit, 30_000)
        assert slots / 2 <= limit.value <= 2.5 * slots


def test_a_server_that_has_become_slower_but_has_no_queue_is_not_throttled_for_long() -> None:
    limit = ConcurrencyLimit()
    for _ in range(40 * WINDOW):
        limit.observe(1.0, 1.0, limit.value)
    grown = limit.value
    for _ in range(200 * WINDOW):
        limit.observe(4.0, 4.0, limit.value)
    assert limit.value >= grown / 2


@pytest.mark.parametrize("ratio", [1e-9, 1e9])
def test_it_stays_within_its_bounds(ratio: float) -> None:
    limit = ConcurrencyLimit()
    for number in range(500 * WINDOW):
        limit.observe(ratio, ratio * (number % 7 + 1), limit.value)
        assert LOWEST <= limit.value <= HIGHEST
