"""Counts and times of every request, for Prometheus, and as one JSON object for people and scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.process_collector import ProcessCollector
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from .core import wire
from .core.record import Record
from .core.status import Status

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Buckets for durations; local models are slow, so they reach minutes."""

TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

INFERENCE_ROUTES: Final = frozenset([wire.CHAT_COMPLETIONS])
"""The JSON view counts these alone: probes and scrapes are not the gateway's work."""

_JSON: Final = "application/json"
_OPENMETRICS: Final = "application/openmetrics-text"


disable_created_metrics()  # a second series for every counter, which nobody reads


LookUp = Callable[[], Status]
"""How things stand, looked up when asked."""


class Metrics:
    """An observer of records. ``now`` gives seconds on the monotonic clock."""

    def __init__(self, status: LookUp, now: Callable[[], float]) -> None:
        self._status = status
        self._now = now
        self._started = now()
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "gateway_requests",
            "Requests that have ended.",
            ["route", "model", "backend", "status", "code", "fault"],
            registry=self.registry,
        )
        self._duration = self._histogram("gateway_request_duration_seconds", "From the whole request in to the answer out.")
        self._first_token = self._histogram(
            "gateway_time_to_first_token_seconds", "From the whole request in to the first token of a stream."
        )
        self._per_token = Histogram(
            "gateway_time_per_output_token_seconds",
            "Mean time between the tokens of one stream.",
            ["model"],
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter("gateway_tokens", "Tokens of answered requests.", ["type", "model"], registry=self.registry)
        ProcessCollector(registry=self.registry)
        self.registry.register(_StatusCollector(status))

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(name, help, ["route"], buckets=SECONDS, registry=self.registry)

    def __call__(self, record: Record) -> None:
        """Count one request. Names that a caller can invent are never labels: unknown models are ``other``."""
        model = self._model_label(record.model)
        fault = record.fault or ""
        self._requests.labels(record.route, model, record.backend, str(record.status), record.code, fault).inc()
        self._duration.labels(record.route).observe(record.duration)
        if record.first_token is not None:
            self._first_token.labels(record.route).observe(record.first_token - record.started)
        used = record.usage
        for kind, count in (
            ("prompt", used.prompt_tokens),
            ("completion", used.completion_tokens),
            ("cached", used.cached_tokens),
        ):
            if count:
                self._tokens.labels(kind, model).inc(count)
        if record.first_token is not None and record.last_token is not None and used.completion_tokens > 1:
            between = (record.last_token - record.first_token) / (used.completion_tokens - 1)
            self._per_token.labels(model).observe(between)

    def _model_label(self, model: str) -> str:
        if not model or any(model in backend.models for backend in self._status().backends):
            return model
        return "other"

    # --- what it looks like from outside

    def page(self, accept: str) -> tuple[str, bytes]:
        """(content type, body): JSON unless the Accept header likes one of Prometheus' formats better."""
        offers = [_JSON, _OPENMETRICS, "text/plain"]
        # A parameter such as version=0.0.4 says which dialect is liked, not which format.
        liked = [(value.partition(";")[0].strip(), q) for value, q in parse_accept_header(accept, MIMEAccept)]
        best = MIMEAccept(liked).best_match(offers, _JSON)
        if best == _OPENMETRICS:
            return openmetrics.CONTENT_TYPE_LATEST, openmetrics.generate_latest(self.registry)
        if best == "text/plain":
            return CONTENT_TYPE_LATEST, generate_latest(self.registry)
        return _JSON, msgspec.json.encode(self.summary())

    def summary(self) -> dict[str, Any]:
        """The totals of inference requests, and how things stand."""
        ended = [(labels, int(value)) for labels, value in _samples(self._requests, "_total") if _inference(labels)]
        failed: dict[str, int] = {}
        for labels, value in ended:
            if labels["code"]:
                failed[labels["code"]] = failed.get(labels["code"], 0) + value
        seconds = sum(total for labels, total in _samples(self._duration, "_sum") if _inference(labels))
        tokens = {"prompt": 0, "completion": 0, "cached": 0}
        for labels, count in _samples(self._tokens, "_total"):
            tokens[labels["type"]] += int(count)
        status = self._status()
        return {
            "request_count": sum(value for _, value in ended),
            "error_count": sum(count for code, count in failed.items() if code != "client_cancelled"),
            "total_latency_ms": round(seconds * 1000, 3),
            "prompt_tokens": tokens["prompt"],
            "completion_tokens": tokens["completion"],
            "total_tokens": tokens["prompt"] + tokens["completion"],
            "cached_tokens": tokens["cached"],
            "client_cancelled_count": failed.get("client_cancelled", 0),
            "errors": failed,
            "in_flight": sum(status.inflight.values()),
            "connections": status.connections,
            "draining": status.draining,
            "uptime_seconds": round(self._now() - self._started, 3),
            "backends": [
                {"name": seen.name, "kind": seen.kind, "state": seen.state, "in_flight": status.inflight.get(seen.name, 0)}
                for seen in status.backends
            ],
        }


def _samples(metric: Counter | Histogram, suffix: str) -> Iterator[tuple[dict[str, str], float]]:
    for family in metric.collect():
        for sample in family.samples:
            if sample.name.endswith(suffix):
                yield sample.labels, sample.value


def _inference(labels: dict[str, str]) -> bool:
    return labels["route"] in INFERENCE_ROUTES


class _StatusCollector:
    """Gauges that are looked up at each scrape."""

    def __init__(self, status: LookUp) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        inflight = GaugeMetricFamily("gateway_inflight", "Requests that a backend holds.", labels=["backend"])
        for name, count in status.inflight.items():
            inflight.add_metric([name], count)
        yield inflight
        state = GaugeMetricFamily("gateway_backend_state", "1 for the state a backend is in.", labels=["backend", "state"])
        for backend in status.backends:
            state.add_metric([backend.name, backend.state], 1)
        yield state
        yield GaugeMetricFamily("gateway_connections", "Open client connections.", value=status.connections)
        refused = CounterMetricFamily("gateway_connections_refused", "Connections closed at once, as there were too many.")
        refused.add_metric([], status.refused_connections)
        yield refused
        yield GaugeMetricFamily("gateway_draining", "1 while the gateway finishes its last requests.", value=status.draining)
