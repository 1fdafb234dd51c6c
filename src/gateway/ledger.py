"""The usage ledger: an observer that keeps a row of every inference request that was admitted.

The reactor's thread only makes a line of each and gathers them for a moment; see `gateway.delivery` for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from .core.ledger import UNASKED, encode, row_of
from .core.prices import Prices
from .core.record import Record
from .delivery import Delivery

MOST: Final = 65536
"""Rows in memory; more are lost, and counted. Normally they are there for `flush` seconds."""

GATHERED: Final = 1024
"""Rows that are handed on without waiting any longer."""

SAID_SECONDS: Final = 10.0
"""Time between two log lines on rows that are lost."""

STOP_SECONDS: Final = 10.0
"""How long the database may take for the last rows; what it has not taken then stays in the journal."""

_log: Final = Logger("gateway.ledger")


class Ledger(Service):
    """``flush`` is how many seconds rows are gathered for, 0 for one turn of the reactor; ``routes`` are those that are
    inference; ``unix`` gives Unix seconds. It is a collector of Prometheus, too."""

    name = "ledger"

    def __init__(
        self,
        delivery: Delivery,
        reactor: Any,
        unix: Callable[[], float],
        *,
        flush: float,
        routes: Collection[str],
        prices: Prices,
    ) -> None:
        self.delivery = delivery
        self._reactor = reactor
        self._unix = unix
        self._flush = flush
        self._routes = routes
        self.prices = prices
        self._lines: list[bytes] = []
        self._first = 0.0
        self._seen = 0
        self._lost = 0
        self._say_at = 0.0
        self._offset = unix() - reactor.seconds()
        self._timer: IDelayedCall | None = None

    # --- rows

    def __call__(self, record: Record) -> None:
        """Keep the row of a request that has ended."""
        if record.route not in self._routes or record.code in UNASKED:
            return
        if self._seen - self.delivery.settled >= MOST:
            self._lost += 1
            self._say_lost(record.ended)
            return
        self._seen += 1
        lines = self._lines
        if not lines:
            self._gather(record.ended)
        lines.append(encode(row_of(record, self._offset, self.prices)))
        if len(lines) >= GATHERED:
            self.flush()

    def _gather(self, now: float) -> None:
        """The first row of some."""
        self._first = now
        self._offset = self._unix() - now  # the wall clock may have been set
        if self._timer is None:
            self._timer = self._reactor.callLater(self._flush, self._timed)

    def _timed(self) -> None:
        self._timer = None
        self.flush()

    def flush(self) -> None:
        """Hand on what was gathered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines = self._lines, []
        if lines:
            self.delivery.give(lines, self._first)

    def _say_lost(self, now: float) -> None:
        if now >= self._say_at:
            self._say_at = now + SAID_SECONDS
            _log.error("the usage ledger can be written nowhere: {lost} rows are lost so far", lost=self._lost)

    # --- start and stop

    def startService(self) -> None:
        super().startService()
        self.delivery.start()

    def stopService(self) -> Deferred[None]:
        """Fires when all rows are in the database, or in the journal and the database has had its time."""
        super().stopService()
        self.flush()
        stopped: Deferred[None] = Deferred()

        def ended(problem: str = "") -> None:
            if not stopped.called:
                if problem:
                    _log.warn("{problem}", problem=problem)
                if late.active():
                    late.cancel()
                stopped.callback(None)

        late = self._reactor.callLater(
            STOP_SECONDS, ended, "the usage ledger's database does not answer: its rows wait in the journal"
        )
        self.delivery.stop(lambda: self._reactor.callFromThread(ended))
        return stopped

    # --- what Prometheus sees

    @property
    def buffered(self) -> int:
        """Rows that are in memory alone."""
        return self._seen - self.delivery.settled

    def collect(self) -> Iterator[Metric]:
        seen = self.delivery
        rows = CounterMetricFamily("gateway_ledger_rows", "Rows of the usage ledger, by how far they came.", labels=["outcome"])
        for outcome, number in (
            ("journaled", seen.journaled),
            ("written", seen.written),
            ("lost", self._lost + seen.lost),
        ):
            rows.add_metric([outcome], number)
        yield rows
        yield GaugeMetricFamily("gateway_ledger_buffered", "Rows that are in memory alone.", value=self.buffered)
        yield GaugeMetricFamily("gateway_ledger_journal_bytes", "Rows that wait for the database.", value=seen.waiting)
        oldest = seen.oldest()
        lag = 0.0 if oldest is None else max(self._reactor.seconds() - oldest, 0.0)
        yield GaugeMetricFamily("gateway_ledger_lag_seconds", "Age of the oldest row that the database lacks.", value=lag)
