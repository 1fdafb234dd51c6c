"""Stops sending to a backend that fails, and tries it again with one request.

Closed, open, half-open (M. Nygard, Release It!); consecutive failures as Envoy's outlier detection counts them.
The breaker has eras: an outcome counts only in the era in which its request was sent, so that what was still on
its way when the breaker opened neither closes nor opens it again.
"""

from __future__ import annotations

import math
from typing import Final

from .status import BreakerState

LONGEST_OPEN: Final = 120.0
"""Seconds; failed trials double the time up to here."""


class Breaker:
    """``failures`` in a row open it for ``seconds``."""

    def __init__(self, failures: int, seconds: float) -> None:
        self._failures = failures
        self._seconds = seconds
        self._open_for = seconds
        self.until: float | None = None
        """When it lets the next trial through; None: it is closed."""
        self._trial = self._tried = False
        self.era = 0
        """What an outcome has to be of, to count."""
        self.row = 0
        self.opened = self.half_opened = self.closed = 0
        """How often it came into that state; into half-open with the first trial that it lets through."""
        self.changes = 0
        """It grows with everything that may change what is allowed, but for the passing of time."""

    def reset(self) -> None:
        """Close it: the backend is as good as new."""
        self._open_for = self._seconds
        self.closed += self.until is not None
        self.until = None
        self._trial = False
        self.era += 1
        self.row = 0
        self.changes += 1

    def state(self, now: float) -> BreakerState:
        if self.until is None:
            return "closed"
        return "open" if now < self.until else "half_open"

    def allows(self, now: float) -> bool:
        """Whether a request may be sent: half-open takes one at a time."""
        return self.until is None or (now >= self.until and not self._trial)

    def reopens_at(self) -> float:
        """When it becomes half-open; infinity if it is not open."""
        return math.inf if self.until is None else self.until

    def sent(self, now: float) -> int:
        """A request goes to the backend; returns the era, which its outcome is told with."""
        if self.until is not None and now >= self.until and not self._trial:
            self.half_opened += not self._tried
            self._trial = self._tried = True
            self.era += 1
            self.changes += 1
        return self.era

    def succeeded(self, era: int) -> None:
        """The backend has answered."""
        if era == self.era and self.until is None:
            self.row = 0
        elif era == self.era and self._trial:
            self.reset()

    def failed(self, era: int, now: float) -> None:
        """The backend has failed."""
        if era != self.era or not (self.until is None or self._trial):
            return
        self.row += 1
        if self._trial:
            self._open_for = min(self._open_for * 2, LONGEST_OPEN)
            self._open(now)
        elif self.row >= self._failures:
            self._open(now)

    def cancelled(self, era: int) -> None:
        """The request ended without a word about the backend: a trial is free for another."""
        if era == self.era and self._trial:
            self._trial = False
            self.changes += 1

    def _open(self, now: float) -> None:
        self.opened += 1
        self.changes += 1
        self.until = now + self._open_for
        self._trial = self._tried = False
        self.era += 1
