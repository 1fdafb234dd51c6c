"""How late the reactor is: what one slow piece of work costs everyone else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import HistogramMetricFamily, Metric
from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from .core.histogram import Histogram
from .metrics import buckets

INTERVAL: Final = 0.25
"""Seconds between two looks."""

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class LoopDelay(Service):
    """A timer that measures by how much it is late; Prometheus collects it."""

    name = "loop-delay"

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._seen = Histogram(SECONDS)
        self._timer: IDelayedCall | None = None
        self._due = 0.0

    def startService(self) -> None:
        super().startService()
        self._wait()

    def stopService(self) -> None:
        super().stopService()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        self._due = self._clock.seconds() + INTERVAL
        self._timer = self._clock.callLater(INTERVAL, self._look)

    def _look(self) -> None:
        self._seen.observe(max(self._clock.seconds() - self._due, 0.0))
        self._wait()

    def collect(self) -> Iterator[Metric]:
        """What Prometheus sees of it."""
        text = "How late a timer of the reactor was."
        yield HistogramMetricFamily("gateway_event_loop_delay_seconds", text, buckets(self._seen), self._seen.total)
