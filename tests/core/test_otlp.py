"""The encoder against OpenTelemetry's own: what it makes must decode to what the SDK's exporter would have sent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import otlp

INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
VALUES: Any = st.one_of(st.booleans(), TEXT, INT64, st.floats(allow_nan=False), st.lists(TEXT, max_size=4).map(tuple))
ATTRIBUTES = st.dictionaries(st.text("abc._", min_size=1, max_size=200), VALUES, max_size=8)
NANOSECONDS = st.integers(1, 2**63 - 1)


def sdk_encoded(
    ids: tuple[int, int, int],
    name: str,
    times: tuple[int, int],
    values: Any,
    events: Any,
    *,
    state: str,
    remote: bool,
    failed: bool,
) -> Any:
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

    trace_id, span_id, parent_id = ids
    flags = TraceFlags(1)
    states = TraceState([tuple(member.split("=")) for member in state.split(",")]) if state else None  # type: ignore[misc]
    return encode_spans(
        [
            ReadableSpan(
                name,
                SpanContext(trace_id, span_id, False, flags, states),
                SpanContext(trace_id, parent_id, remote, flags) if parent_id else None,
                Resource({"service.name": "g"}),
                values,
                [Event(one, attributes=more, timestamp=when) for one, when, more in events],
                kind=SpanKind.CLIENT,
                instrumentation_scope=InstrumentationScope("scope", "1"),
                status=Status(StatusCode.ERROR if failed else StatusCode.UNSET),
                start_time=times[0],
                end_time=times[1],
            )
        ]
    )


@given(
    ids=st.tuples(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1)),
    name=TEXT,
    times=st.tuples(NANOSECONDS, NANOSECONDS),
    values=ATTRIBUTES,
    events=st.lists(st.tuples(st.text("abc.", min_size=1), NANOSECONDS, ATTRIBUTES), max_size=2),
    state=st.sampled_from(["", "a=1", "a=1,b=2"]),
    remote=st.booleans(),
    failed=st.booleans(),
)
def test_a_span_is_what_the_sdk_would_send(
    ids: tuple[int, int, int],
    name: str,
    times: tuple[int, int],
    values: Any,
    events: Any,
    state: str,
    remote: bool,
    failed: bool,
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    remote = remote and bool(ids[2])
    trace_id, span_id, parent_id = ids
    made = otlp.span(
        (trace_id.to_bytes(16, "big"), span_id.to_bytes(8, "big"), parent_id.to_bytes(8, "big") if parent_id else b""),
        otlp.CLIENT,
        times,
        otlp.span_name(name),
        otlp.span_attributes(values),
        *[otlp.event(*one) for one in events],
        otlp.ERROR if failed else b"",
        state=state,
        remote=remote,
    )
    body = otlp.request(otlp.resource({"service.name": "g"}), otlp.scope("scope", "1"), [made])
    found = ExportTraceServiceRequest.FromString(body)
    expected = sdk_encoded(ids, name, times, values, events, state=state, remote=remote, failed=failed)
    wanted = expected.resource_spans[0].scope_spans[0].spans[0]
    if not failed:
        wanted.ClearField("status")  # an unset one says nothing
    assert found.resource_spans[0].scope_spans[0].spans[0] == wanted
    assert found.resource_spans[0].resource == expected.resource_spans[0].resource
    assert found.resource_spans[0].scope_spans[0].scope == expected.resource_spans[0].scope_spans[0].scope


@given(
    times=st.tuples(NANOSECONDS, NANOSECONDS),
    counts=st.lists(st.integers(0, 2**40), min_size=3, max_size=3),
    total=st.floats(0, 1e12),
    values=ATTRIBUTES,
)
def test_a_histogram_is_what_the_sdk_would_send(times: tuple[int, int], counts: list[int], total: float, values: Any) -> None:
    from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
    from opentelemetry.sdk.metrics import export
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    bounds = (0.5, 2.0)
    point = otlp.point(*times, counts, total, bounds, values)
    body = otlp.request(otlp.resource({}), otlp.scope("s", "1"), [otlp.histogram("name", "text", "s", [point])])
    found = ExportMetricsServiceRequest.FromString(body).resource_metrics[0].scope_metrics[0].metrics[0]

    data = export.HistogramDataPoint(values, *times, sum(counts), total, counts, bounds, 0.0, 0.0)
    metric = export.Metric("name", "text", "s", export.Histogram([data], export.AggregationTemporality.CUMULATIVE))
    of_scope = export.ScopeMetrics(InstrumentationScope("s", "1"), [metric], "")
    sent = encode_metrics(export.MetricsData([export.ResourceMetrics(Resource({}), [of_scope], "")]))
    expected = sent.resource_metrics[0].scope_metrics[0].metrics[0]
    for one in expected.histogram.data_points:  # optional in the protocol, and not kept here
        one.ClearField("min")
        one.ClearField("max")
    assert found == expected


def test_what_a_receiver_rejects_is_read() -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    response = ExportTraceServiceResponse()
    assert otlp.rejected(response.SerializeToString()) == 0
    response.partial_success.rejected_spans = 300
    response.partial_success.error_message = "too old"
    assert otlp.rejected(response.SerializeToString()) == 300


@given(st.binary(max_size=60))
def test_nonsense_rejects_nothing_and_breaks_nothing(response: bytes) -> None:
    assert otlp.rejected(response) >= 0


@pytest.mark.parametrize(("number", "encoded"), [(0, b"\0"), (127, b"\x7f"), (128, b"\x80\x01"), (300, b"\xac\x02")])
def test_varints(number: int, encoded: bytes) -> None:
    assert otlp.varint(number) == encoded


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=400))
def test_the_quick_way_to_a_text_leads_to_the_same(text: str) -> None:
    assert otlp.texts("gateway.request.id")(text) == otlp.span_attributes({"gateway.request.id": text})


@pytest.mark.parametrize("length", [0, 1, 124, 125, 126, 127, 128])
def test_at_every_border(length: int) -> None:
    assert otlp.texts("k")("x" * length) == otlp.span_attributes({"k": "x" * length})
