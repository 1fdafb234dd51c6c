"""An OpenTelemetry collector that keeps what it gets, decoded by the protocol's own classes."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse

from .processes import wait_for

KINDS = {2: "SERVER", 3: "CLIENT"}


class Collector:
    """Answers with ``status``, or takes everything but ``rejects`` spans of each request."""

    def __init__(self, port: int = 0) -> None:
        self.status = 200
        self.rejects = 0
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self.metrics: dict[str, Any] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.raw: list[bytes] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                answer = outer.take(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                self.send_response(outer.status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True)
        self._thread.start()

    def take(self, path: str, headers: dict[str, str], body: bytes) -> bytes:
        self.requests.append((path, headers))
        self.raw.append(body)
        if self.status != 200:
            return b""
        if path == "/v1/metrics":
            for of_resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for of_scope in of_resource.scope_metrics:
                    self.metrics |= {metric.name: metric for metric in of_scope.metrics}
            return b""
        for found in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(values(found.resource.attributes))
            self.spans += [span for of_scope in found.scope_spans for span in of_scope.spans]
        answer = ExportTraceServiceResponse()
        answer.partial_success.rejected_spans = self.rejects
        encoded: bytes = answer.SerializeToString()
        return encoded

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, **more: str) -> dict[str, str]:
        """Of a gateway that sends here, soon."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "OTEL_BSP_SCHEDULE_DELAY": "50", **more}

    def trace(self, request_id: str) -> list[Any]:
        """The spans of the trace that this request is in, once they are here."""

        def find() -> list[Any]:
            ids = {span.trace_id for span in self.spans if values(span.attributes).get("gateway.request.id") == request_id}
            return [span for span in self.spans if span.trace_id in ids]

        found: list[Any] = wait_for(find)
        return found

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@contextmanager
def collector(port: int = 0) -> Iterator[Collector]:
    """A collector for the length of a block."""
    running = Collector(port)
    try:
        yield running
    finally:
        running.stop()


@contextmanager
def over_grpc(receiver: Collector) -> Iterator[str]:
    """The collector takes spans and metrics over gRPC too, at this address, for the length of a block."""
    import grpc
    from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as traces

    class Spans(traces.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            headers = dict(context.invocation_metadata())
            return ExportTraceServiceResponse.FromString(receiver.take("grpc", headers, request.SerializeToString()))

    class Metrics(metrics.MetricsServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            receiver.take("/v1/metrics", {}, request.SerializeToString())
            return ExportMetricsServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    traces.add_TraceServiceServicer_to_server(Spans(), server)
    metrics.add_MetricsServiceServicer_to_server(Metrics(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait(10)


def values(attributes: Any) -> dict[str, Any]:
    """Attributes as a dictionary."""
    return {one.key: _value(one.value) for one in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def tree(spans: list[Any], names: Mapping[str, str] | None = None) -> str:
    """Spans as text, children under their parents: kind, name, an exclamation mark if it failed; attributes; events.

    ``names``: what stands for a text that another run would not have.
    """
    parents = {span.span_id for span in spans}
    lines: list[str] = []

    def show(span: Any, depth: int) -> None:
        indent = "  " * depth
        lines.append(f"{indent}{KINDS[span.kind]} {span.name}{' !' if span.status.code == 2 else ''}")
        lines.extend(f"{indent}  {name}: {value}" for name, value in sorted(values(span.attributes).items()))
        lines.extend(f"{indent}  * {event.name} {sorted(values(event.attributes))}" for event in span.events)
        for child in sorted(spans, key=lambda one: int(one.span_id.hex(), 16)):
            if child.parent_span_id == span.span_id:
                show(child, depth + 1)

    for span in spans:
        if span.parent_span_id not in parents:
            show(span, 0)
    text = "\n".join(lines)
    for found, name in (names or {}).items():
        text = text.replace(found, name)
    return text
