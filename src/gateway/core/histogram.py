"""Counts of values by bucket."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """One series. Plain additions: there is one thread, and each request pays for them.

    ``counts`` has one place for each of ``bounds``, which are upper and inclusive, and one for what is above them all.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
