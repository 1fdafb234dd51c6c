"""How long requests of one class take to their first token at worst: the 95th percentile of the last of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Final

WINDOW: Final = 128
ENOUGH: Final = 20
"""Samples that are kept of a class, and those it takes to say anything."""

CLASSES: Final = 1024


class Slowest:
    """Classes are whatever is alike; at most `CLASSES` of them, of which the oldest is forgotten first."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, deque[float]] = {}

    def observe(self, kind: Hashable, seconds: float) -> None:
        """A request of this class had its first token after so long."""
        seen = self._seen.get(kind)
        if seen is None:
            if len(self._seen) >= CLASSES:
                del self._seen[next(iter(self._seen))]
            seen = self._seen[kind] = deque(maxlen=WINDOW)
        seen.append(seconds)

    def p95(self, kind: Hashable) -> float | None:
        """Seconds that 95 % of the class did not exceed; None: too few are known."""
        seen = self._seen.get(kind, ())
        return sorted(seen)[int(0.95 * len(seen))] if len(seen) >= ENOUGH else None
