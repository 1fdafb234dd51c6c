"""Timers that all last equally long, for many at a time.

A request starts and stops several timers, and nearly none of them ever expires. So those of one
length share a table of due times, and one timer of the reactor for whoever is due first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

Who = TypeVar("Who")

_log: Final = Logger("gateway.net")

STEPS: Final = 1000
"""A look at the table is a pass over all of it; there are at most so many of them within one timer's length."""


class Deadlines(Generic[Who]):
    """Calls ``expired(who)`` once ``seconds`` have passed since ``who`` was last started (0.1 % late at most)."""

    def __init__(self, clock: IReactorTime, seconds: float, expired: Callable[[Who], object]) -> None:
        self.seconds = seconds
        self._clock = clock
        self._now = clock.seconds
        self._expired = expired
        self._due: dict[Who, float] = {}
        self._call: IDelayedCall | None = None

    def __len__(self) -> int:
        return len(self._due)

    def start(self, who: Who) -> None:
        """Begin to wait, or begin anew."""
        self._due[who] = self._now() + self.seconds
        if self._call is None:
            self._call = self._clock.callLater(self.seconds, self._look)

    def stop(self, who: Who) -> None:
        """Wait no longer."""
        self._due.pop(who, None)
        if not self._due and self._call is not None:
            self._call.cancel()
            self._call = None

    def _look(self) -> None:
        self._call = None
        now = self._now()
        later = [due for due in self._due.values() if due > now]
        if later:
            self._call = self._clock.callLater(max(min(later) - now, self.seconds / STEPS), self._look)
        for who in [who for who, due in self._due.items() if due <= now]:
            if self._due.get(who, math.inf) <= now:  # who expired before may have stopped or started this one
                self.stop(who)
                try:
                    self._expired(who)
                except Exception:
                    _log.failure("a timer of {seconds:g} s", seconds=self.seconds)
