"""From plain spans and histograms to OpenTelemetry's SDK: its resource, its classes of what is told, its exporters.

Importing this needs the extra ``otel``. The senders belong to one thread each and may block it as long as the SDK's exporters
do: these keep the connection, send again what may pass, and read OTEL_EXPORTER_OTLP_* themselves. What they say goes to
`SaidBySdk`. The SDK's tracer and instruments are left out: spans are made when all of them is known, and histograms are
counted already.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from threading import current_thread
from typing import Any, Final

import requests
from google.protobuf.message import DecodeError
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

from . import __version__
from .core import otel_names as names
from .core.otel_metrics import Point, Seen
from .core.otel_settings import Protocol
from .core.spans import SERVER, Span

SAID: Final = 300
"""Characters of what the SDK says that the log repeats."""

TOGETHER: Final = 9
"""Spans that are encoded without a rest, in less than a millisecond."""

_SCOPE: Final = InstrumentationScope(names.SCOPE, __version__)
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_UNSET: Final = Status(StatusCode.UNSET)
_ERROR: Final = Status(StatusCode.ERROR)
_UNKNOWN: Final[Any] = None
_ARGUMENT: Final = re.compile(r"%[-0-9.]*[a-z]")
_QUERY: Final = re.compile(r"\?[^\s)'\"]+")


class OurResource(Resource):
    """Who sends. The SDK's exporter asks for its hash once a span, which the SDK works out anew each time."""

    def __init__(self, found: Resource) -> None:
        super().__init__(found.attributes, found.schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)


def resource() -> OurResource:
    """As OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have it."""
    found = Resource({"service.version": __version__}).merge(Resource.create())
    if str(found.attributes["service.name"]).startswith("unknown_service"):
        found = found.merge(Resource({"service.name": "inference-gateway"}))
    return OurResource(found)


def has_grpc() -> bool:
    """Whether there is what exports over gRPC."""
    return find_spec("opentelemetry.exporter.otlp.proto.grpc") is not None


class _Batch(Sequence[ReadableSpan]):
    """Spans as the SDK's encoder asks for them, one by one, with a ``rest`` after each few. Without it the encoder would keep
    the interpreter for milliseconds whenever the reactor's thread lets go of it, which that does with every system call."""

    def __init__(self, spans: Sequence[Span], readable: Callable[[Span], ReadableSpan], rest: Callable[[], object]) -> None:
        self._spans = spans
        self._readable = readable
        self._rest = rest

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, at: Any) -> Any:
        return self._readable(self._spans[at])

    def __iter__(self) -> Iterator[ReadableSpan]:
        for number, span in enumerate(self._spans):
            if number % TOGETHER == 0:
                self._rest()
            yield self._readable(span)


class SpanSender:
    """Sends spans of ``resource``; ``rest`` is called when it is time for others to run."""

    def __init__(self, protocol: Protocol, resource: OurResource, rest: Callable[[], object]) -> None:
        self._resource = resource
        self._rest = rest
        self._refused = 0
        self._exporter = self._over_grpc() if protocol == "grpc" else self._over_http()

    def send(self, spans: Sequence[Span]) -> int:
        """How many were lost."""
        self._refused = 0
        done = self._exporter.export(_Batch(spans, self._readable, self._rest))
        return min(self._refused, len(spans)) if done is SpanExportResult.SUCCESS else len(spans)

    def close(self) -> None:
        self._exporter.shutdown()

    @staticmethod
    def _over_grpc() -> SpanExporter:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Exporter  # noqa: PLC0415

        exporter: SpanExporter = Exporter()
        return exporter

    def _over_http(self) -> SpanExporter:
        session = requests.Session()
        session.hooks["response"].append(self._hear)
        return OTLPSpanExporter(session=session)

    def _hear(self, response: requests.Response, **_: object) -> None:
        """The SDK looks at the status alone, and takes a redirection for success."""
        if response.status_code >= 300:
            self._refused = sys.maxsize
            return
        try:
            self._refused = max(ExportTraceServiceResponse.FromString(response.content).partial_success.rejected_spans, 0)
        except DecodeError:
            self._refused = 0

    def _readable(self, span: Span) -> ReadableSpan:
        state = TraceState.from_header([span.state]) if span.state else None
        return ReadableSpan(
            name=span.name,
            context=SpanContext(span.trace_id, span.span_id, False, _SAMPLED, state),
            parent=SpanContext(span.trace_id, span.parent_id, span.remote, _SAMPLED) if span.parent_id else None,
            resource=self._resource,
            attributes=span.attributes,
            events=[Event(one.name, one.attributes, one.time) for one in span.events],
            kind=SpanKind.SERVER if span.kind == SERVER else SpanKind.CLIENT,
            status=_ERROR if span.failed else _UNSET,
            start_time=span.start,
            end_time=span.end,
            instrumentation_scope=_SCOPE,
        )


class MetricSender:
    """Sends cumulative histograms that count from ``started`` on, in nanoseconds since 1970."""

    def __init__(self, protocol: Protocol, resource: OurResource, started: int) -> None:
        self._resource = resource
        self._started = started
        self._exporter = self._over_grpc() if protocol == "grpc" else OTLPMetricExporter()

    def send(self, seen: Sequence[Seen], now: int) -> bool:
        """Whether this arrived, as it was counted until ``now``, in nanoseconds since 1970."""
        metrics = [
            Metric(one.name, one.description, one.unit, self._histogram([self._point(point, now) for point in one.points]))
            for one in seen
        ]
        of_scope = ScopeMetrics(_SCOPE, metrics, "")
        found = MetricsData([ResourceMetrics(self._resource, [of_scope], self._resource.schema_url)])
        return self._exporter.export(found) is MetricExportResult.SUCCESS

    def close(self) -> None:
        self._exporter.shutdown()

    @staticmethod
    def _over_grpc() -> MetricExporter:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as Exporter  # noqa: PLC0415

        exporter: MetricExporter = Exporter()
        return exporter

    @staticmethod
    def _histogram(points: Sequence[HistogramDataPoint]) -> Histogram:
        return Histogram(points, AggregationTemporality.CUMULATIVE)

    def _point(self, point: Point, now: int) -> HistogramDataPoint:
        return HistogramDataPoint(
            attributes=point.attributes,
            start_time_unix_nano=self._started,
            time_unix_nano=now,
            count=sum(point.counts),
            sum=point.total,
            bucket_counts=point.counts,
            explicit_bounds=point.bounds,
            min=_UNKNOWN,  # optional in the protocol, and not kept
            max=_UNKNOWN,
        )


class SaidBySdk(logging.Handler):
    """Warnings of the SDK. What its exporters say is kept, for each thread the last two, until `why` is asked; the rest goes to
    ``tell``, without what the SDK puts into it: that may be a secret, or a caller's."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell
        self._kept: dict[str, deque[str]] = {}
        self._logger = logging.getLogger("opentelemetry")

    def listen(self) -> None:
        """From now on; nobody else hears it."""
        self._logger.addHandler(self)
        self._logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("opentelemetry.exporter"):
            self._tell(_ARGUMENT.sub("...", str(record.msg))[:SAID])
            return
        kept = self._kept.setdefault(current_thread().name, deque(maxlen=2))
        kept.append(_QUERY.sub("?...", record.getMessage())[:SAID])

    def why(self) -> str:
        """What has been said on this thread."""
        return " ".join(self._kept.pop(current_thread().name, ()))
