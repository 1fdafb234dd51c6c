"""Spans and metrics to an OpenTelemetry collector, made of records when requests have ended.

The reactor's thread only puts a sampled record into a bounded queue, and counts. Two threads do the rest, so that a collector
that is slow or away blocks nobody: one makes spans (`core.spans`) of a batch of records and has OpenTelemetry's SDK export them
(`otel_export`), the other does that with what has been counted. What has no room or does not arrive is counted, and said in
the log at most once a minute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from threading import Event, Thread
from time import sleep
from typing import Any, Final, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from .core.otel_metrics import GenAIMetrics, Seen
from .core.otel_settings import OtelSettings, Protocol
from .core.record import Record
from .core.spans import Place, Spans, spans_of
from .core.status import Status
from .core.trace_context import Trace
from .otel_export import MetricSender, SaidBySdk, SpanSender, resource

TELL_SECONDS: Final = 60.0
"""Between two lines that spans are lost."""

KINDS_SECONDS: Final = 10.0
"""How long it is remembered what kind of server each backend is."""

REST: Final = 0.001
"""Seconds that the spans' thread leaves to others after each few spans; a tenth of it when half the queue is full."""

_log: Final = Logger("gateway.telemetry")


class _Ended(NamedTuple):
    """A request whose spans are to be exported; ``provider`` is its backend's kind, ``spans`` how many there will be."""

    record: Record
    trace: Trace
    provider: str
    spans: int


class Telemetry(Service):
    """An observer of records.

    ``wall`` gives seconds since 1970; ``model_label`` a record's model as one of a bounded set; ``status`` how things stand.
    Of what two threads count, each number is written by one of them.
    """

    name = "telemetry"

    def __init__(
        self,
        settings: OtelSettings,
        reactor: Any,
        wall: Callable[[], float],
        here: Place,
        backends: Mapping[str, Place],
        status: Callable[[], Status],
        model_label: Callable[[Record], str],
    ) -> None:
        self._settings = settings
        self._reactor = reactor
        self._wall = wall
        self._status = status
        self._model_label = model_label
        self._spans = Spans(here, backends)
        self._metrics = GenAIMetrics(backends)
        self._said = SaidBySdk(lambda text: reactor.callFromThread(_log.warn, "OpenTelemetry: {text}", text=text))
        self._kinds: dict[str, str] = {}
        self._kinds_until = 0.0
        self._ended: deque[_Ended] = deque()
        self._given = self.dropped = 0  # by the reactor's thread
        self._taken = self.exported = self.failed = 0  # by the spans' thread
        self._wake = Event()
        self._counted: SimpleQueue[list[Seen] | None] = SimpleQueue()
        self._timer: IDelayedCall | None = None
        self._told = (0, 0, -TELL_SECONDS)
        self._threads = 0
        self._over: Deferred[None] = Deferred()
        self._finishing = self._stopped = False

    # --- what a request costs

    def __call__(self, record: Record) -> None:
        now = record.ended
        if now >= self._kinds_until:
            self._kinds_until = now + KINDS_SECONDS
            self._kinds = {seen.name: seen.kind for seen in self._status().backends}
        provider = self._kinds.get(record.backend, "")
        if self._settings.metrics is not None:
            self._metrics.count(record, self._model_label(record), provider)
        trace = record.trace
        if trace is not None and trace.sampled and self._settings.traces is not None:
            self._give(_Ended(record, trace, provider, spans_of(record)))

    def _give(self, ended: _Ended) -> None:
        if self._finishing or self.waiting + ended.spans > self._settings.queue:
            self.dropped += ended.spans
            self._tell("the gateway stops" if self._finishing else "there are more than can be sent")
            return
        self._given += ended.spans
        self._ended.append(ended)
        if self.waiting >= self._settings.batch and not self._wake.is_set():
            self._wake.set()

    @property
    def waiting(self) -> int:
        """Spans in the queue."""
        return self._given - self._taken

    def backends_changed(self) -> None:
        """Some have come or gone."""
        self._metrics.forget_gone()

    # --- the spans' thread

    def _export_spans(self, protocol: Protocol) -> None:
        sender = SpanSender(protocol, resource(), self._rest)
        batch = self._settings.batch
        over = False
        while not over:
            full = self._wake.wait(self._settings.delay)
            self._wake.clear()
            over = self._finishing  # then all that there will be is in the queue
            least = batch if full and not over else 1
            while self._ended and self.waiting >= least and not self._stopped:
                self._export(sender)
                least = 1 if self._finishing else batch
        sender.close()

    def _export(self, sender: SpanSender) -> None:
        """One batch; a request's spans stay together."""
        ended = [self._ended.popleft()]
        number = ended[0].spans
        while self._ended and number + self._ended[0].spans <= self._settings.batch:
            number += self._ended[0].spans
            ended.append(self._ended.popleft())
        self._taken += number
        offset = self._wall() - self._reactor.seconds()
        try:
            lost = sender.send([span for one in ended for span in self._spans.of(one.record, one.trace, offset, one.provider)])
        except Exception:  # a bug must not end the thread
            self._reactor.callFromThread(_log.failure, "a bug in telemetry", Failure())
            lost = number
        self.exported += number - lost
        self.failed += lost
        why = self._said.why()
        if lost:
            self._reactor.callFromThread(self._tell, why or "the collector did not want them")

    def _rest(self) -> None:
        if not self._finishing:
            sleep(REST if self.waiting < self._settings.queue / 2 else REST / 10)

    # --- metrics on their way

    def _metrics_are_due(self) -> None:
        self._timer = self._reactor.callLater(self._settings.metric_interval, self._metrics_are_due)
        if self._counted.empty():
            self._counted.put(self._metrics.seen())

    def _export_metrics(self, protocol: Protocol, started: int) -> None:
        """All that was counted is said again the next time, so that nothing is lost with one request."""
        sender = MetricSender(protocol, resource(), started)
        while (seen := self._counted.get()) is not None:
            if not seen or self._stopped or sender.send(seen, int(self._wall() * 1e9)):
                continue
            text = "OpenTelemetry: the metrics could not be sent: {why}"
            self._reactor.callFromThread(_log.warn, text, why=self._said.why())
        sender.close()

    # --- what is lost is not lost in silence

    def _tell(self, why: str, *, last: bool = False) -> None:
        """At most one line a minute, and a ``last`` one of what no line has told."""
        failed, dropped, when = self._told
        now = self._reactor.seconds()
        lost = (self.failed - failed, self.dropped - dropped)
        if any(lost) and (last or now - when >= TELL_SECONDS):
            self._told = (failed + lost[0], dropped + lost[1], now)
            text = "OpenTelemetry: {failed} spans could not be sent, {dropped} had no room: {why}"
            _log.warn(text, failed=lost[0], dropped=lost[1], why=why)

    def collect(self) -> Iterator[Metric]:
        """What Prometheus sees of it."""
        spans = CounterMetricFamily("gateway_otel_spans", "Spans by what became of them.", labels=["outcome"])
        for outcome, number in (("exported", self.exported), ("dropped", self.dropped), ("failed", self.failed)):
            spans.add_metric([outcome], number)
        yield spans
        yield GaugeMetricFamily("gateway_otel_queue_spans", "Spans that wait to be sent.", value=self.waiting)

    # --- start and stop

    def startService(self) -> None:
        """Only now: threads do not survive the fork that makes a daemon."""
        super().startService()
        for warning in self._settings.warnings:
            _log.warn("OpenTelemetry: {warning}", warning=warning)
        self._said.listen()
        if self._settings.traces is not None:
            self._start("spans", self._export_spans, self._settings.traces)
        if self._settings.metrics is not None:
            self._start("metrics", self._export_metrics, self._settings.metrics, int(self._wall() * 1e9))
            self._timer = self._reactor.callLater(self._settings.metric_interval, self._metrics_are_due)

    def _start(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                work(*arguments)
            except Exception:
                self._reactor.callFromThread(_log.failure, "a bug in telemetry", Failure())
            self._reactor.callFromThread(self._has_ended)

        self._threads += 1
        Thread(target=run, name=f"otel-{name}", daemon=True).start()  # a collector that hangs does not keep us here

    def _has_ended(self) -> None:
        self._threads -= 1
        if self._finishing and not self._threads:
            self._over.callback(None)

    def finish(self) -> Deferred[None]:
        """Have what there is sent. Fires when that is done; `stopService` ends it if it takes too long."""
        self._finishing = True
        self._wake.set()
        self._counted.put(self._metrics.seen())
        self._counted.put(None)
        if not self._threads:
            self._over.callback(None)
        return self._over

    def stopService(self) -> None:
        super().stopService()
        self._finishing = self._stopped = True
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self.dropped += self._given - self.exported - self.failed
        self._tell("the gateway stops", last=True)
