"""Retries as a share of the traffic, so that a pool in trouble is not drowned by them.

Retry budget of Finagle (and Envoy): the share is of the requests of about the last ten seconds; a few retries are
always allowed, or a gateway with little traffic would have none. Counts fade exponentially instead of being kept.
"""

from __future__ import annotations

import math
from typing import Final

SECONDS: Final = 10.0
"""The time constant with which counts fade."""

STEP: Final = 0.1
"""Seconds between two looks at how much has faded."""

FLOOR: Final = 3.0
"""Retries in that time that are allowed whatever the traffic."""


class RetryBudget:
    """``share`` of requests may be retries; 0 allows none at all."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._requests = 0.0
        self._retries = 0.0
        self._at = 0.0

    def requested(self, now: float) -> None:
        """A request has come (not a retry)."""
        self._fade(now)
        self._requests += 1.0

    def take(self, now: float) -> bool:
        """Whether there may be one retry more; if so, it counts."""
        self._fade(now)
        allowed = max(self._share * self._requests, FLOOR) if self._share else 0.0
        if self._retries + 1.0 > allowed:
            return False
        self._retries += 1.0
        return True

    def _fade(self, now: float) -> None:
        if now - self._at < STEP:
            return
        left = math.exp(min(self._at - now, 0.0) / SECONDS)
        self._at = now
        self._requests *= left
        self._retries *= left
