"""Counts and times of every request, for Prometheus, and as one JSON object for people and scripts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.utils import floatToGoString
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from .core.endpoints import ENDPOINTS
from .core.histogram import Histogram
from .core.look import Snapshot
from .core.messages import MESSAGES
from .core.record import CANCELLED, Record, Try
from .core.status import LimitsState, Status

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Buckets for durations; local models are slow, so they reach minutes."""

OVERHEAD_SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)

TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

INFERENCE_ROUTES: Final = frozenset([*ENDPOINTS, MESSAGES])
"""The JSON view counts these alone: probes and scrapes are not the gateway's work."""

_JSON: Final = "application/json"
_OPENMETRICS: Final = "application/openmetrics-text"


LookUp = Callable[[], Status]
"""How things stand, looked up when asked."""

TOKENS: Final = ("prompt", "completion", "cached")

LABELS_SECONDS: Final = 1.0
"""How long it is remembered which models and backends there are."""

KEPT_SECONDS: Final = 300.0
"""A backend that is gone has its counts for so long after they were seen to be without one, so that each scrape gets them."""

MAX_GONE: Final = 256
"""Backends that are gone and still have their counts."""


def buckets(seen: Histogram) -> list[tuple[str, float]]:
    """(upper bound, count so far), as Prometheus has them."""
    names = [*map(floatToGoString, seen.bounds), "+Inf"]
    return list(zip(names, accumulate(map(float, seen.counts)), strict=True))


class Metrics:
    """An observer of records. ``now`` gives seconds on the monotonic clock; ``models`` are names that no backend has."""

    def __init__(self, status: LookUp, now: Callable[[], float], models: Collection[str] = ()) -> None:
        self._status = status
        self._now = now
        self.models = models
        self._started = now()
        self._requests: dict[tuple[str, str, str, int, str, str], int] = {}
        self._duration: dict[str, Histogram] = {}
        self._queued: dict[str, Histogram] = {}
        self._retries: dict[str, int] = {}
        self._first_token: dict[str, Histogram] = {}
        self._overhead: dict[str, Histogram] = {}
        self._per_token: dict[str, Histogram] = {}
        self._cancel = Histogram(OVERHEAD_SECONDS)
        self._tokens: dict[str, list[int]] = {}  # by model; prompt, completion, cached
        self._model_labels: dict[str, str] = {}
        self._labels_until = 0.0
        self._gone: dict[str, float] = {}  # backends that are, by when that was seen
        self._before: dict[tuple[str, str], int] = {}  # requests of those that are forgotten, by route and code
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def __call__(self, record: Record) -> None:
        """Count one request. Names that a caller can invent are never labels: unknown models are ``other``."""
        model = self.model_label(record)
        route = record.route
        ended = (route, model, record.backend, record.status, record.code, record.fault or "")
        self._requests[ended] = self._requests.get(ended, 0) + 1
        _observe(self._duration, route, SECONDS, record.ended - record.started)
        if record.backend:
            _observe(self._queued, route, SECONDS, record.queued)
            tries = record.tries
            if tries and tries[-1].replied:
                overhead = tries[0].asked - record.started
                if not record.stream:  # a stream's tokens come and go at their own pace
                    overhead += record.ended - tries[-1].replied
                seen = self._overhead.get(route) or self._overhead.setdefault(route, Histogram(OVERHEAD_SECONDS))
                seen.observe(overhead)
            for code in record.retries:
                self._retries[code] = self._retries.get(code, 0) + 1
            if record.left and tries and _was_at_it(record, tries[-1]):
                self._cancel.observe(record.ended - record.left)
        used = record.usage
        if used.prompt_tokens or used.completion_tokens:
            tokens = self._tokens.get(model)
            if tokens is None:
                tokens = self._tokens[model] = [0, 0, 0]
            tokens[0] += used.prompt_tokens
            tokens[1] += used.completion_tokens
            tokens[2] += used.cached_tokens
        if record.first_token is not None:
            _observe(self._first_token, route, SECONDS, record.first_token - record.started)
            if record.last_token is not None and used.completion_tokens > 1:
                between = (record.last_token - record.first_token) / (used.completion_tokens - 1)
                _observe(self._per_token, model, TOKEN_SECONDS, between)

    def model_label(self, record: Record) -> str:
        """The record's model, if it is one that a backend has; else "other"."""
        model = record.model
        if not model:
            return ""
        if record.ended >= self._labels_until:
            self._labels_until = record.ended + LABELS_SECONDS
            backends = self._status().backends
            self._model_labels = {name: name for backend in backends for name in backend.models or ()}
            self._model_labels.update((name, name) for name in self.models)
            self._forget({backend.name for backend in backends})
        return self._model_labels.get(model, "other")

    def _forget(self, there: set[str]) -> None:
        """Drop the counts of backends that have been gone for long; the totals keep them."""
        now = self._now()
        counted = {backend for _, _, backend, _, _, _ in self._requests if backend} - there
        self._gone = {name: self._gone.get(name, now) for name in counted}
        if not counted:
            return
        longest_gone = sorted(self._gone, key=self._gone.__getitem__)
        old = {name for name in longest_gone if now - self._gone[name] >= KEPT_SECONDS}
        old.update(longest_gone[: max(len(longest_gone) - MAX_GONE, 0)])
        for ended in [ended for ended in self._requests if ended[2] in old]:
            route, code, count = ended[0], ended[4], self._requests.pop(ended)
            self._before[route, code] = self._before.get((route, code), 0) + count

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
        ended = [(code, count) for (route, _, _, _, code, _), count in self._requests.items() if route in INFERENCE_ROUTES]
        ended += [(code, count) for (route, code), count in self._before.items() if route in INFERENCE_ROUTES]
        failed: dict[str, int] = {}
        for code, count in ended:
            if code:
                failed[code] = failed.get(code, 0) + count
        seconds = sum(seen.total for route, seen in self._duration.items() if route in INFERENCE_ROUTES)
        prompt, completion, cached = (sum(numbers[i] for numbers in self._tokens.values()) for i in range(len(TOKENS)))
        status = self._status()
        scheduling = status.scheduling
        return {
            "request_count": sum(count for _, count in ended),
            "error_count": sum(count for code, count in failed.items() if code != "client_cancelled"),
            "total_latency_ms": round(seconds * 1000, 3),
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "cached_tokens": cached,
            "client_cancelled_count": failed.get("client_cancelled", 0),
            "errors": failed,
            "in_flight": sum(scheduling.inflight.values()),
            "queued": sum(scheduling.depth.values()),
            "retries": sum(self._retries.values()),
            "connections": status.connections,
            "draining": status.draining,
            "uptime_seconds": round(self._now() - self._started, 3),
            "backends": [
                {
                    "name": seen.name,
                    "kind": seen.kind,
                    "state": seen.state,
                    "reason": seen.reason,
                    "breaker": seen.breaker,
                    "slots": seen.slots,
                    "in_flight": scheduling.inflight.get(seen.name, 0),
                }
                for seen in status.backends
            ],
        }

    def collect(self) -> Iterator[Metric]:
        """What Prometheus sees; gauges are looked up at each scrape."""
        labels = ["route", "model", "backend", "status", "code", "fault"]
        requests = CounterMetricFamily("gateway_requests", "Requests that have ended.", labels=labels)
        for ended, count in self._requests.items():
            requests.add_metric([str(value) for value in ended], count)
        yield requests
        yield _family(
            "gateway_request_duration_seconds", "From the whole request in to the answer out.", "route", self._duration
        )
        yield _family("gateway_queue_wait_seconds", "From the whole request in to a backend for it.", "route", self._queued)
        name = "gateway_overhead_seconds"
        yield _family(
            name, "Of the gateway's own: before a backend is asked for, after its answer is in.", "route", self._overhead
        )
        name = "gateway_time_to_first_token_seconds"
        yield _family(name, "From the whole request in to the first token of a stream.", "route", self._first_token)
        name = "gateway_time_per_output_token_seconds"
        yield _family(name, "Mean time between the tokens of one stream.", "model", self._per_token)
        name = "gateway_backend_cancel_seconds"
        cancel = HistogramMetricFamily(name, "From a client's leaving to its backend's connection closed, its slot free.")
        cancel.add_metric([], buckets(self._cancel), self._cancel.total)
        yield cancel
        retries = CounterMetricFamily("gateway_retries", "Attempts that failed and were followed by another.", labels=["code"])
        for code, number in self._retries.items():
            retries.add_metric([code], number)
        yield retries
        tokens = CounterMetricFamily("gateway_tokens", "Tokens of answered requests.", labels=["type", "model"])
        for model, numbers in self._tokens.items():
            for kind, number in zip(TOKENS, numbers, strict=True):
                if number:
                    tokens.add_metric([kind, model], number)
        yield tokens
        yield from _gauges(self._status())


def _was_at_it(record: Record, last: Try) -> bool:
    """The backend worked on the request when its client went away."""
    return last.code in {"", CANCELLED} and (record.stream or not last.replied)


def _observe(series: dict[str, Histogram], label: str, bounds: Sequence[float], value: float) -> None:
    seen = series.get(label)
    if seen is None:
        seen = series[label] = Histogram(bounds)
    seen.observe(value)


def _family(name: str, help: str, label: str, series: dict[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, help, labels=[label])
    for value, seen in series.items():
        family.add_metric([value], buckets(seen), seen.total)
    return family


def _scheduling(seen: Snapshot) -> Iterator[Metric]:
    depth = GaugeMetricFamily("gateway_queue_depth", "Requests that wait for a backend.", labels=["priority"])
    for priority, number in seen.depth.items():
        depth.add_metric([priority], number)
    yield depth
    yield GaugeMetricFamily("gateway_queue_bytes", "Their bodies.", value=seen.bytes)
    index = GaugeMetricFamily("gateway_prefix_index_tokens", "Tokens that a cache is thought to hold.", labels=["backend"])
    for name, tokens in seen.index_tokens.items():
        index.add_metric([name], tokens)
    yield index
    for kind, number in (("predicted", seen.predicted_cached_tokens), ("actual", seen.actual_cached_tokens)):
        name = f"gateway_prefix_cached_tokens_{kind}"
        yield CounterMetricFamily(name, f"Prompt tokens from a backend's cache, as {kind}.", value=number)


def _limits(seen: LimitsState) -> Iterator[Metric]:
    limited = CounterMetricFamily("gateway_limited", "Requests refused by a limit of their key.", labels=["limit"])
    for limit, number in seen.limited.items():
        limited.add_metric([limit], number)
    yield limited
    yield GaugeMetricFamily("gateway_limits_keys", "Keys and addresses that are counted for.", value=seen.keys)
    if seen.redis is None:
        return
    yield GaugeMetricFamily("gateway_limits_redis_up", "1 while Redis counts, 0 while it is away.", value=seen.redis)
    without = CounterMetricFamily("gateway_limits_without_redis", "Requests it was not asked about.", labels=["decision"])
    for decision, number in seen.without_redis.items():
        without.add_metric([decision], number)
    yield without
    yield GaugeMetricFamily("gateway_limits_unsettled", "Ended requests that Redis is yet to be told of.", value=seen.unsettled)
    yield CounterMetricFamily("gateway_limits_settlements_lost", "Those that it never will be told of.", value=seen.lost)


def _gauges(status: Status) -> Iterator[Metric]:
    inflight = GaugeMetricFamily("gateway_inflight", "Requests that a backend holds.", labels=["backend"])
    for name, count in status.scheduling.inflight.items():
        inflight.add_metric([name], count)
    yield inflight
    yield from _scheduling(status.scheduling)
    yield from _limits(status.limits)
    breaker = GaugeMetricFamily("gateway_breaker_state", "1 for the state a breaker is in.", labels=["backend", "state"])
    entered = "Times that a breaker came into a state."
    transitions = CounterMetricFamily("gateway_breaker_transitions", entered, labels=["backend", "state"])
    slots = GaugeMetricFamily("gateway_backend_slots", "Requests that a backend works on at once.", labels=["backend"])
    for backend in status.backends:
        breaker.add_metric([backend.name, backend.breaker], 1)
        transitions.add_metric([backend.name, "open"], backend.opened)
        transitions.add_metric([backend.name, "half_open"], backend.half_opened)
        transitions.add_metric([backend.name, "closed"], backend.closed)
        if backend.slots is not None:
            slots.add_metric([backend.name], backend.slots)
    yield from (breaker, transitions, slots)
    state = GaugeMetricFamily("gateway_backend_state", "1 for the state a backend is in.", labels=["backend", "state"])
    for backend in status.backends:
        state.add_metric([backend.name, backend.state], 1)
    yield state
    yield GaugeMetricFamily("gateway_connections", "Open client connections.", value=status.connections)
    refused = CounterMetricFamily("gateway_connections_refused", "Connections closed at once, as there were too many.")
    refused.add_metric([], status.refused_connections)
    yield refused
    yield GaugeMetricFamily("gateway_draining", "1 while the gateway finishes its last requests.", value=status.draining)
