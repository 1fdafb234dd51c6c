"""What OpenTelemetry's SDK is given, against what it makes itself; and what it says."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest

from gateway.core.otel_metrics import Point, Seen
from gateway.core.otel_settings import read
from gateway.core.settings import Source, resolve
from gateway.core.spans import CLIENT, SERVER, Event, Place, Span
from gateway.core.trace_context import Tracing
from gateway.otel_export import TOGETHER, MetricSender, OurResource, SaidBySdk, SpanSender, resource

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C


@pytest.fixture
def of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(name, raising=False)


class Kept:
    """An exporter that keeps what it gets."""

    def __init__(self) -> None:
        self.got: Any = None

    def export(self, got: Any) -> object:
        self.got = got
        return None


@pytest.mark.parametrize("remote", [True, False])
def test_a_span_is_what_the_sdks_tracer_would_have_made(of_nobody: None, remote: bool) -> None:
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.id_generator import IdGenerator
    from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, TraceState, set_span_in_context
    from opentelemetry.trace.status import Status, StatusCode

    attributes: dict[str, Any] = {"a": "ä\n", "b": 1, "c": 0.5, "d": True, "e": ("x", "y")}
    span = Span(
        CLIENT, "chat m", TRACE_ID, 7, 5, 100, 900, attributes, True, (Event("e", 500, {"f": 0.25}),), remote, "v=1,w=2"
    )
    sender, kept, ours = SpanSender("http/protobuf", resource(), bool), Kept(), resource()
    sender._exporter = kept  # type: ignore[assignment]
    sender.send([span])

    class Ids(IdGenerator):
        def generate_span_id(self) -> int:
            return 7

        def generate_trace_id(self) -> int:
            return TRACE_ID

    provider = TracerProvider(resource=ours, id_generator=Ids(), shutdown_on_exit=False)
    state = TraceState([("v", "1"), ("w", "2")])
    parent = NonRecordingSpan(SpanContext(TRACE_ID, 5, remote, TraceFlags(1), state))
    tracer = provider.get_tracer("inference-gateway", sender._readable(span).instrumentation_scope.version)  # type: ignore[union-attr]
    wanted: Any = tracer.start_span("chat m", set_span_in_context(parent), SpanKind.CLIENT, attributes, start_time=100)
    wanted.add_event("e", {"f": 0.25}, 500)
    wanted.set_status(Status(StatusCode.ERROR))
    wanted.end(900)
    assert encode_spans(kept.got) == encode_spans([wanted])


def test_encoding_rests_now_and_then(of_nobody: None) -> None:
    rests: list[int] = []
    encoded: list[str] = []
    sender = SpanSender("http/protobuf", resource(), lambda: rests.append(len(encoded)))

    class Reading(Kept):
        def export(self, got: Any) -> object:
            for span in got:
                encoded.append(span.name)
            return None

    sender._exporter = Reading()  # type: ignore[assignment]
    sender.send([Span(SERVER, str(number), TRACE_ID, 7, 0, 1, 2, {}) for number in range(20)])
    assert rests == [0, TOGETHER, 2 * TOGETHER]


def test_a_root_has_no_parent(of_nobody: None) -> None:
    sender = SpanSender("http/protobuf", resource(), bool)
    made = sender._readable(Span(SERVER, "GET", TRACE_ID, 7, 0, 1, 2, {}))
    assert (made.parent, made.kind.name, made.status.status_code.name) == (None, "SERVER", "UNSET")


def test_a_histogram_is_what_the_sdks_instrument_would_have_made(of_nobody: None) -> None:
    from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    sender, kept = MetricSender("http/protobuf", resource(), 100), Kept()
    sender._exporter = kept  # type: ignore[assignment]
    sender.send([Seen("h", "text", "s", [Point({"a": "b"}, (1, 0, 2), 12.0, (0.5, 2.0))])], 900)

    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], resource(), shutdown_on_exit=False)
    version = kept.got.resource_metrics[0].scope_metrics[0].scope.version
    meter = provider.get_meter("inference-gateway", version)
    histogram = meter.create_histogram("h", "s", "text", explicit_bucket_boundaries_advisory=[0.5, 2.0])
    for value in (0.5, 5.5, 6.0):
        histogram.record(value, {"a": "b"})
    wanted = encode_metrics(reader.get_metrics_data())  # type: ignore[arg-type]
    for point in wanted.resource_metrics[0].scope_metrics[0].metrics[0].histogram.data_points:
        point.start_time_unix_nano, point.time_unix_nano = 100, 900
        point.ClearField("min")  # optional in the protocol, and not kept
        point.ClearField("max")
    assert encode_metrics(kept.got) == wanted


def test_who_sends(monkeypatch: pytest.MonkeyPatch, of_nobody: None) -> None:
    found = resource()
    assert found.attributes["service.name"] == "inference-gateway"
    assert found.attributes["service.version"]
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=a,service.version=9,deployment.environment.name=lab%2C1")
    found = resource()
    assert [found.attributes[f"service.{name}"] for name in ("name", "version")] == ["a", "9"]
    assert found.attributes["deployment.environment.name"] == "lab,1"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "b")
    assert resource().attributes["service.name"] == "b"
    assert len({resource(), resource()}) == 1
    assert resource() == resource() != OurResource(resource().get_empty())


def test_what_the_sdk_says_has_no_secrets() -> None:
    told: list[str] = []
    said = SaidBySdk(told.append)
    said.emit(logging.LogRecord("opentelemetry.util.re", 30, "", 1, "Header invalid: %s", ("key=secret",), None))
    assert told == ["Header invalid: ..."]
    failed = logging.LogRecord("opentelemetry.exporter.x", 40, "", 1, "no %s", ("http://c/v1?key=secret (refused)",), None)
    for _ in range(5):
        said.emit(failed)
    assert (said.why(), said.why(), len(told)) == (" ".join(["no http://c/v1?... (refused)"] * 2), "", 1)


@pytest.mark.parametrize("name", ["always_on", "always_off", "traceidratio"])
@pytest.mark.parametrize("by_parent", ["", "parentbased_"])
@pytest.mark.parametrize("parent", [None, True, False])
def test_what_is_sampled_is_what_the_sdks_sampler_would_sample(
    monkeypatch: pytest.MonkeyPatch, name: str, by_parent: str, parent: bool | None
) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    variables = {"OTEL_TRACES_SAMPLER": by_parent + name, "OTEL_TRACES_SAMPLER_ARG": "0.3"}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    sampler = TracerProvider(shutdown_on_exit=False).sampler
    found = read(variables)
    for low in [*range(0, 2**64, 2**64 // 40), int(0.3 * 2**64) - 2**10, round(0.3 * 2**64), 2**64 - 1]:
        id = 1 << 100 | low
        tracing = Tracing(found.ratio, {128: id, 63: 5}.__getitem__, by_parent=found.by_parent)
        flags = TraceFlags(bool(parent))
        context = set_span_in_context(NonRecordingSpan(SpanContext(id, 7, True, flags))) if parent is not None else None
        headers = [(b"traceparent", b"00-%032x-%016x-%02x" % (id, 7, flags))] if parent is not None else []
        trace = tracing.begin(headers)
        assert (trace is not None and trace.sampled) == sampler.should_sample(context, id, "x").decision.is_sampled()


@pytest.mark.parametrize(
    ("missing", "variables", "remedy"),
    [
        ("gateway.telemetry", {}, "inference-gateway[otel]"),
        ("opentelemetry.exporter.otlp.proto.grpc", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "otlp-proto-grpc"),
    ],
)
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: str, variables: dict[str, str], remedy: str
) -> None:
    from gateway import parts
    from gateway.process import StartError

    monkeypatch.setitem(sys.modules, missing, None)
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", **variables}
    settings = resolve([Source("test", "file", {})])
    with pytest.raises(StartError, match="pip install") as problem:
        parts.telemetry_of(settings, environ, None, Place("g", 80), {}, lambda: None, str)  # type: ignore[arg-type,return-value]
    assert remedy in str(problem.value)
    assert "\n" not in str(problem.value)
