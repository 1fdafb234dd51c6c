"""How many requests a backend takes that does not tell its slots: found by the time to the first token.

After Netflix' Gradient2 (concurrency-limits) and Envoy's adaptive concurrency filter: the limit grows while the time
to the first token is near that of a backend without a queue, and shrinks by the gradient between the two. What a
backend without a queue takes is measured as Envoy does it, by lowering the limit for a while; growth is slow start
(RFC 5681) until the first congestion. Times are normalised by what the prompt lets expect, so that long prompts do
not look like a queue.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Final

START: Final = 32.0
LOWEST: Final = 1.0
HIGHEST: Final = 1024.0

WINDOW: Final = 32
"""Samples that are judged together, by their median."""

TOLERANCE: Final = 1.5
"""Times up to so many times those of a backend without a queue are no congestion."""

QUICK: Final = 0.1
"""Seconds. A first token within this time is no congestion either, whatever the ratio."""

HELPED: Final = 0.8
"""A lower limit has shortened a queue if times fell to this part or less."""

REMEASURED: Final = 50
"""Windows after which the time without a queue is measured again: a backend may have become slower or faster."""

SHRUNK: Final = 3
"""After so many shrinking steps in a row it is measured at once."""


class ConcurrencyLimit:
    """`value` requests at a time."""

    def __init__(self) -> None:
        self._limit = START
        self.value = int(START)
        self._seconds: list[float] = []
        self._ratios: list[float] = []
        self._most = 0
        self._old = 0  # requests still to come that were sent under another limit: they do not count
        self._without_queue: float | None = None
        self._before: tuple[float, float] | None = None  # while measuring: the limit and the ratio that it lowered
        self._growing_fast = True
        self._windows = 0
        self._shrunk = 0

    def observe(self, seconds: float, ratio: float, held: int) -> None:
        """A first token after ``seconds``, which is ``ratio`` in units of what its prompt lets expect, while the backend
        held so many requests."""
        if self._old > 0:
            self._old -= 1
            return
        self._seconds.append(seconds)
        self._ratios.append(ratio)
        self._most = max(self._most, held)
        if len(self._ratios) >= WINDOW:
            quick, ratio, most = median(self._seconds) <= QUICK, median(self._ratios), self._most
            self._seconds, self._ratios, self._most = [], [], 0
            before = self.value
            self._judge(ratio, quick, full=most >= self._limit / 2)
            self._old = held if self.value != before else 0

    def _judge(self, ratio: float, quick: bool, *, full: bool) -> None:
        self._windows += 1
        if self._before is not None:
            self._measure(ratio, *self._before)
        elif not full:
            # our requests do not fill it: if that is quicker than ever, it is what it takes without a queue
            self._without_queue = min(ratio, self._without_queue or ratio)
        elif quick:
            self._grow()
        elif self._without_queue is None or self._windows >= REMEASURED or self._shrunk >= SHRUNK:
            self._lower(ratio)
        else:
            self._follow(ratio, self._without_queue)

    def _follow(self, ratio: float, without_queue: float) -> None:
        """One step of the gradient."""
        gradient = TOLERANCE * without_queue / ratio
        if gradient >= 1.0:
            self._grow()
        else:
            self._growing_fast = False
            self._shrunk += 1
            self._set(self._limit * max(gradient, 0.5))

    def _grow(self) -> None:
        self._shrunk = 0
        self._set(self._limit * 2 if self._growing_fast else self._limit + math.sqrt(self._limit))

    def _lower(self, ratio: float) -> None:
        """Halve the limit to see whether there is a queue."""
        self._before = (self._limit, ratio)
        self._set(self._limit / 2)

    def _measure(self, ratio: float, limit: float, before: float) -> None:
        """What the lower limit has brought: if shorter times, there was a queue, and there may be one still."""
        if ratio <= HELPED * before and self._limit > LOWEST:
            self._growing_fast = False
            self._lower(ratio)
            return
        found, known = min(ratio, before), self._without_queue
        # a backend that has become slower by itself was taken to have a queue: make good for that
        self._growing_fast |= known is not None and found > TOLERANCE * known
        self._before, self._without_queue = None, found
        self._windows = self._shrunk = 0
        self._set(limit)

    def _set(self, limit: float) -> None:
        self._limit = min(max(limit, LOWEST), HIGHEST)
        self.value = int(self._limit)
