"""Spans and metrics to an OpenTelemetry collector, made of records when requests have ended.

Spans (`core.spans`) are encoded for some records together and wait in a bounded queue; they leave in batches, through the
client that backends are called with: nothing here blocks the reactor, and nothing needs a thread or a lock.
What has no room or does not arrive is counted, and said in the log at most once a minute.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from treq.client import HTTPClient
from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from . import __version__
from .core import otel_names as names
from .core import otlp
from .core.errors import BackendFailed
from .core.otel_metrics import GenAIMetrics
from .core.otel_settings import OtelSettings, Target
from .core.record import Record
from .core.spans import Place, Spans
from .core.status import Status
from .core.trace_context import Trace
from .exchange import Exchange, Timeouts, Timers
from .net.headers import RawHeaders
from .probe import retry_after

ENCODED_TOGETHER: Final = 32
"""Requests that have ended: it is a third of a millisecond's work."""

MAX_RESPONSE: Final = 64 * 1024
FIRST_WAIT: Final = 1.0
"""Seconds until a batch is tried again; each further wait is twice as long."""

TELL_SECONDS: Final = 60.0
"""Between two lines that spans are lost."""

KINDS_SECONDS: Final = 10.0
"""How long it is remembered what kind of server each backend is."""

_TRY_AGAIN: Final = frozenset([429, 502, 503, 504])
"""What the OTLP specification says may pass."""

_log: Final = Logger("gateway.telemetry")


class _Outcome(NamedTuple):
    """Of one request to the collector. ``again``: it may go better later, at the soonest after ``wait`` seconds."""

    problem: str = ""
    again: bool = False
    wait: float = 0.0
    rejected: int = 0


class Telemetry(Service):
    """An observer of records.

    ``wall`` gives seconds since 1970; ``model_label`` a record's model as one of a bounded set; ``status`` how things stand.
    """

    name = "telemetry"

    def __init__(
        self,
        settings: OtelSettings,
        client: HTTPClient,
        reactor: Any,
        wall: Callable[[], float],
        here: Place,
        backends: Mapping[str, Place],
        status: Callable[[], Status],
        model_label: Callable[[Record], str],
    ) -> None:
        self._settings = settings
        self._client = client
        self._reactor = reactor
        self._wall = wall
        self._status = status
        self._model_label = model_label
        self._head = otlp.resource(settings.attributes), otlp.scope(names.SCOPE, __version__)
        self._spans = Spans(here, backends)
        self._metrics = GenAIMetrics(wall(), backends)
        self._offset = wall() - reactor.seconds()
        self._kinds: dict[str, str] = {}
        self._kinds_until = 0.0
        self._ended: list[tuple[Record, Trace, str]] = []
        self._waiting: list[bytes] = []
        self._sending: Deferred[None] | None = None
        self._telling: Deferred[None] | None = None
        self._timers: dict[str, IDelayedCall] = {}
        self._pause: Deferred[None] | None = None
        self.exported = self.dropped = self.failed = 0
        self._told = (0, 0, -TELL_SECONDS)
        self._finishing = self._stopped = False

    # --- what a request costs

    def __call__(self, record: Record) -> None:
        now = record.ended
        if now >= self._kinds_until:
            self._look(now)
        provider = self._kinds.get(record.backend, "")
        if self._settings.metrics is not None:
            self._metrics.count(record, self._model_label(record), provider)
        trace = record.trace
        if trace is None or not trace.sampled or self._settings.traces is None:
            return
        self._ended.append((record, trace, provider))
        if len(self._ended) >= ENCODED_TOGETHER:
            self._encode()
        if len(self._waiting) >= self._settings.batch:
            self._send_soon()
        elif "spans" not in self._timers and not self._stopped:
            self._timers["spans"] = self._reactor.callLater(self._settings.delay, self._send_soon)

    def _encode(self) -> None:
        """The spans of those that have ended, as far as there is room: of many at once each costs half."""
        ended, self._ended = self._ended, []
        for record, trace, provider in ended:
            if len(self._waiting) + self._spans.count(record) > self._settings.queue or self._stopped:
                self.dropped += self._spans.count(record)
                self._tell("the gateway stops" if self._stopped else "there are more than can be sent")
            else:
                self._waiting += self._spans.of(record, trace, self._offset, provider)

    def _look(self, now: float) -> None:
        """What changes rarely is looked up now and then: kinds of backends, and the clock on the wall."""
        self._kinds_until = now + KINDS_SECONDS
        self._kinds = {seen.name: seen.kind for seen in self._status().backends}
        self._offset = self._wall() - self._reactor.seconds()

    # --- spans on their way

    def _send_soon(self) -> None:
        """Send what waits, unless that is being done."""
        timer = self._timers.pop("spans", None)
        if timer is not None and timer.active():
            timer.cancel()
        self._encode()
        if self._sending is None and self._waiting:
            self._sending = ensureDeferred(self._send_all(self._settings.traces))
            self._sending.addErrback(_failed)
            self._sending.addBoth(self._sent)

    def _sent(self, _: object) -> None:
        self._sending = None

    async def _send_all(self, target: Target | None) -> None:
        while self._waiting and target is not None:
            batch = self._waiting[: self._settings.batch]
            del self._waiting[: len(batch)]
            try:
                await self._send(target, batch)
            except CancelledError:
                self.dropped += len(batch)
                raise

    async def _send(self, target: Target, batch: Sequence[bytes]) -> None:
        """Send one batch, if need be several times."""
        body = otlp.request(*self._head, batch)
        end = self._reactor.seconds() + self._settings.export_timeout
        wait = FIRST_WAIT
        while True:
            outcome = await self._post(target, body)
            if not outcome.problem:
                rejected = min(outcome.rejected, len(batch))
                self.exported += len(batch) - rejected
                self.failed += rejected
                if rejected:
                    self._tell("the collector did not want them")
                return
            wait = max(wait, outcome.wait)
            if not outcome.again or self._finishing or self._reactor.seconds() + wait > end:
                self.failed += len(batch)
                self._tell(outcome.problem)
                return
            await self._wait(wait)
            wait *= 2

    def _wait(self, seconds: float) -> Deferred[None]:
        self._pause = Deferred()
        self._timers["pause"] = self._reactor.callLater(seconds, self._resume)
        return self._pause

    def _resume(self) -> None:
        timer = self._timers.pop("pause", None)
        if timer is not None and timer.active():
            timer.cancel()
        pause, self._pause = self._pause, None
        if pause is not None:
            pause.callback(None)

    async def _post(self, target: Target, body: bytes) -> _Outcome:
        headers = [(name.encode("ascii"), value.encode("ascii")) for name, value in target.headers]
        headers.append((b"content-type", b"application/x-protobuf"))
        if target.compress:
            body = await deferToThreadPool(self._reactor, self._reactor.getThreadPool(), gzip.compress, body, 1)
            headers.append((b"content-encoding", b"gzip"))
        timers = Timers(self._reactor, Timeouts(target.timeout, target.timeout, target.timeout))
        exchange = Exchange(self._client, timers, MAX_RESPONSE)
        try:
            await exchange.open("POST", target.url.encode("ascii"), RawHeaders(headers), body)
            content = await exchange.content()
        except BackendFailed as failure:
            return _Outcome(failure.detail or failure.code, again=True)
        if 200 <= exchange.status < 300:
            return _Outcome(rejected=otlp.rejected(content))
        again = exchange.status in _TRY_AGAIN
        return _Outcome(f"status {exchange.status}", again, (retry_after(exchange.headers) or 0.0) if again else 0.0)

    # --- metrics on their way

    def _metrics_are_due(self) -> None:
        self._timers["metrics"] = self._reactor.callLater(self._settings.metric_interval, self._metrics_are_due)
        self._send_metrics()

    def _send_metrics(self) -> None:
        """What was counted so far. It is all said again the next time, so that nothing is lost with one request."""
        elements = self._metrics.encoded(self._wall())
        target = self._settings.metrics
        if elements and target is not None and self._telling is None:
            self._telling = ensureDeferred(self._post_metrics(target, otlp.request(*self._head, elements)))
            self._telling.addErrback(_failed)
            self._telling.addBoth(self._told_metrics)

    async def _post_metrics(self, target: Target, body: bytes) -> None:
        outcome = await self._post(target, body)
        if outcome.problem:
            _log.warn("OpenTelemetry: the metrics could not be sent: {why}", why=outcome.problem)

    def _told_metrics(self, _: object) -> None:
        self._telling = None

    # --- what is lost is not lost in silence

    def _tell(self, why: str, *, last: bool = False) -> None:
        """At most one line a minute, and a ``last`` one of what no line has told."""
        failed, dropped, when = self._told
        now = self._reactor.seconds()
        lost = (self.failed - failed, self.dropped - dropped)
        if any(lost) and (last or now - when >= TELL_SECONDS):
            self._told = (self.failed, self.dropped, now)
            text = "OpenTelemetry: {failed} spans could not be sent, {dropped} had no room: {why}"
            _log.warn(text, failed=lost[0], dropped=lost[1], why=why)

    def collect(self) -> Iterator[Metric]:
        """What Prometheus sees of it."""
        spans = CounterMetricFamily("gateway_otel_spans", "Spans by what became of them.", labels=["outcome"])
        for outcome, number in (("exported", self.exported), ("dropped", self.dropped), ("failed", self.failed)):
            spans.add_metric([outcome], number)
        yield spans
        yield GaugeMetricFamily("gateway_otel_queue_spans", "Spans that wait to be sent.", value=len(self._waiting))

    # --- start and stop

    def startService(self) -> None:
        super().startService()
        for warning in self._settings.warnings:
            _log.warn("OpenTelemetry: {warning}", warning=warning)
        if self._settings.metrics is not None:
            self._timers["metrics"] = self._reactor.callLater(self._settings.metric_interval, self._metrics_are_due)

    async def finish(self) -> None:
        """Send what there is; each batch is tried once. `stopService` ends that if it takes too long."""
        self._finishing = True
        self._resume()
        self._send_soon()
        self._send_metrics()
        for sending in (self._sending, self._telling):
            if sending is not None:
                await sending

    def stopService(self) -> None:
        super().stopService()
        self._stopped = True
        for sending in (self._sending, self._telling):
            if sending is not None:
                sending.cancel()
        for timer in self._timers.values():
            if timer.active():
                timer.cancel()
        self._timers.clear()
        self._encode()
        self.dropped += len(self._waiting)
        self._waiting.clear()
        self._tell("the gateway stops", last=True)


def _failed(failure: Failure) -> None:
    if failure.check(CancelledError) is None:
        _log.failure("a bug in telemetry", failure)
