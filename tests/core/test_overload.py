"""More than the backends can do: what can be answered in time still is, and the rest is refused at once.

A clock that is simulated, Poisson arrivals, and two backends of eight slots that take 50 ms: 320 requests a second.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import pytest

from gateway.core.policy import POLICIES
from gateway.core.scheduler import LONGEST, Scheduler
from gateway.core.tickets import Bounds, Refused, Ticket
from gateway.core.usage import Usage

BACKENDS, SLOTS, SERVICE = ("a", "b"), 8, 0.05
CAPACITY = len(BACKENDS) * SLOTS / SERVICE
PATIENCE = (1.0, 10.0, 30.0)
"""Seconds until an interactive, a default and a batch request must be answered."""
MIX = (0.2, 0.5, 0.3)
LOADS = (0.9, 1.0, 1.5, 2.0, 3.0)
SECONDS, WARM_UP = 5.0, 2.0
ALL_INTERACTIVE = (1.0, 0.0, 0.0)
SMALL, LARGE = Bounds(requests=64), Bounds(requests=1024)
TOKENS = 400
"""Of a prompt."""


@dataclass
class Outcome:
    """What became of the requests that came after the warm-up, by priority; `good` are those answered in time."""

    good: Counter[int] = field(default_factory=Counter)
    late: Counter[int] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    dropped: Counter[int] = field(default_factory=Counter)
    displaced: Counter[int] = field(default_factory=Counter)
    """Refused to make room for others."""
    deepest: int = 0
    idle: int = 0
    """Moments at which a slot was free although a ticket waited that could have had it."""
    waited_in_vain: float = 0.0
    """The longest that a dropped ticket had waited."""

    @property
    def goodput(self) -> float:
        """Answers in time, a second, over the time in which requests came."""
        return self.good.total() / (SECONDS - WARM_UP)

    def arrived(self, priority: int) -> int:
        return sum(counts[priority] for counts in (self.good, self.late, self.refused, self.displaced, self.dropped))

    def in_time(self, priority: int) -> float:
        """Of those that were let in."""
        return self.good[priority] / max(1, self.arrived(priority) - self.refused[priority])


class Crowd:
    """Clients and backends around one scheduler, driven by events."""

    def __init__(self, bounds: Bounds, *, streams: bool, noise: float, seed: int) -> None:
        self.scheduler = Scheduler(POLICIES["expected-completion"](), bounds)
        for name in BACKENDS:
            self.scheduler.set_backend(name, 0.0, slots=SLOTS)
        self.outcome = Outcome()
        self._bounds, self._streams, self._noise = bounds, streams, noise
        self._random = random.Random(seed)
        self._running: list[tuple[float, int, Ticket]] = []
        self._sent = 0
        self.now = 0.0

    def run(self, load: float, mix: tuple[float, ...]) -> Outcome:
        """Requests come for `SECONDS`, at ``load`` times what the backends can do."""
        arrival = 0.0
        while arrival < math.inf or self._running:
            ends = self._running[0][0] if self._running else math.inf
            wakes = self.scheduler.next_wake(self.now) or math.inf
            self.now = max(self.now, min(arrival, ends, wakes))
            if ends <= min(arrival, wakes):
                self._answered()
            elif arrival <= wakes:
                self._arrive(self._random.choices(range(3), mix)[0])
                arrival = self.now + self._random.expovariate(load * CAPACITY)
                arrival = arrival if arrival < SECONDS else math.inf
            self._pass()
            self._look()
        return self.outcome

    def _arrive(self, priority: int) -> None:
        due = self.now + PATIENCE[priority]
        ticket = Ticket(
            "m", self.now, priority=priority, deadline=due, expires=self.now + 60.0, prompt_tokens=TOKENS, streams=self._streams
        )
        try:
            if self.scheduler.submit(ticket, self.now):
                self._send(ticket)
        except Refused as refused:
            assert 1.0 <= refused.retry_after <= LONGEST
            self._count(self.outcome.refused, ticket)
        for displaced in self.scheduler.displaced():
            assert displaced.priority > priority
            self._count(self.outcome.displaced, displaced)

    def _send(self, ticket: Ticket) -> None:
        self._sent += 1
        took = SERVICE * self._random.uniform(1.0 - self._noise, 1.0 + self._noise)
        heapq.heappush(self._running, (self.now + took, self._sent, ticket))

    def _answered(self) -> None:
        ticket = heapq.heappop(self._running)[2]
        if ticket.streams:
            self.scheduler.first_token(ticket, self.now)
        self.scheduler.release(ticket, self.now, Usage(TOKENS, 10, 0))
        self._count(self.outcome.good if self.now <= ticket.deadline else self.outcome.late, ticket)

    def _pass(self) -> None:
        for ticket in self.scheduler.expire(self.now):
            self._count(self.outcome.dropped, ticket)
            self.outcome.waited_in_vain = max(self.outcome.waited_in_vain, self.now - ticket.arrived)
        for ticket in self.scheduler.schedule(self.now):
            self._send(ticket)

    def _count(self, counts: Counter[int], ticket: Ticket) -> None:
        if ticket.arrived >= WARM_UP:
            counts[ticket.priority] += 1

    def _look(self) -> None:
        depth = sum(self.scheduler.snapshot().depth.values())
        self.outcome.deepest = max(self.outcome.deepest, depth)
        self.outcome.idle += depth > 0 and len(self._running) < len(BACKENDS) * SLOTS


@cache
def run(
    load: float,
    mix: tuple[float, ...] = MIX,
    bounds: Bounds = SMALL,
    *,
    streams: bool = True,
    noise: float = 0.0,
    seed: int = 1,
) -> Outcome:
    """One run, made once."""
    return Crowd(bounds, streams=streams, noise=noise, seed=seed).run(load, mix)


def test_goodput_at_three_times_the_load_is_that_of_the_peak() -> None:
    outcomes = [run(load) for load in LOADS]
    peak = max(outcome.goodput for outcome in outcomes)
    assert peak == pytest.approx(CAPACITY, rel=0.02)
    assert all(outcome.goodput >= 0.95 * peak for outcome in outcomes[2:])
    assert not any(outcome.late.total() for outcome in outcomes)


def test_the_bound_of_the_queue_holds_and_no_slot_is_idle_while_anything_waits() -> None:
    assert [run(load).deepest for load in LOADS[2:]] == [SMALL.requests] * 3
    assert [run(load).idle for load in LOADS[2:]] == [0] * 3


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("bounds", [SMALL, LARGE], ids=["small", "large"])
def test_interactive_requests_are_answered_in_time_as_long_as_they_alone_are_not_too_many(load: float, bounds: Bounds) -> None:
    outcome = run(load, bounds=bounds)
    assert outcome.in_time(0) >= 0.99
    assert outcome.refused[0] + outcome.displaced[0] + outcome.dropped[0] == 0


def test_what_is_shed_is_batch_and_default_only_once_no_batch_is_left() -> None:
    half_more, thrice = run(1.5), run(3.0)
    assert half_more.good[2] < 0.02 * half_more.arrived(2)
    assert half_more.good[1] > 0.9 * half_more.arrived(1)
    assert thrice.good[2] == 0
    assert thrice.good[1] > 0.95 * (thrice.goodput * (SECONDS - WARM_UP) - thrice.good[0])


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("noise", [0.0, 0.5], ids=["equal", "unequal"])
def test_a_long_queue_of_too_many_interactive_requests_does_not_make_all_of_them_late(streams: bool, noise: float) -> None:
    """Each is given up in time for the next one: else those before the others would all be answered a moment too late."""
    outcome = run(3.0, ALL_INTERACTIVE, LARGE, streams=streams, noise=noise)
    assert outcome.goodput >= 0.95 * run(1.0).goodput
    assert outcome.late[0] <= 0.02 * outcome.good[0]
    assert outcome.waited_in_vain < PATIENCE[0]


def test_a_short_queue_refuses_too_many_interactive_requests_at_once() -> None:
    outcome = run(3.0, ALL_INTERACTIVE)
    assert outcome.goodput >= 0.95 * CAPACITY
    assert (outcome.late.total(), outcome.dropped.total(), outcome.displaced.total()) == (0, 0, 0)
    assert outcome.refused[0] == pytest.approx(2 / 3 * outcome.arrived(0), rel=0.05)
