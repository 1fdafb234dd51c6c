"""What is counted, and that nobody outside can make it grow."""

from __future__ import annotations

import re

import pytest
from twisted.internet.task import Clock

from gateway.core.otel_metrics import MAX_SERIES, GenAIMetrics
from gateway.core.record import Record, Try
from gateway.core.reports import Report
from gateway.core.spans import Place
from gateway.core.status import BackendState, Status
from gateway.core.usage import Usage
from gateway.loop_delay import INTERVAL, LoopDelay
from gateway.metrics import KEPT_SECONDS, MAX_GONE, Metrics, buckets

from .fakes import HELLO, STREAM, FakeResponse, Gateway

ROUTE = "/v1/chat/completions"
HOSTILE = ["m\n", 'm"} 1\n#', "\x00", "\ud800", "", "other", "\u202em", "m" * 100_000, "${jndi:x}", "{{7*7}}"]


def record(model: str, **more: object) -> Record:
    kept = Record("r", "POST", ROUTE, 1.0, model=model, backend="b", status=200, ended=2.0, usage=Usage(3, 5, 1))
    kept.tries = [Try("b", 1.0, 1.0, 1.5)]
    kept.first_token, kept.last_token = 1.2, 1.9
    return kept


def test_a_hundred_thousand_model_names_are_one() -> None:
    gateway = Gateway()
    gateway.pool._reported("b", Report("openai", models=({"id": "m"},)))
    for name in ["m", "unknown", ""]:
        gateway.metrics(record(name))
    before = gateway.metrics.page("text/plain")[1].decode()
    for number in range(100_000):
        gateway.metrics(record(f"model-{number}"))
    for name in HOSTILE:
        gateway.metrics(record(name))
    page = gateway.metrics.page("text/plain")[1].decode()
    assert len(page.split("\n")) == len(before.split("\n"))
    assert set(re.findall(r'model="([^"]*)"', page)) == {"m", "other", ""}
    assert f'gateway_requests_total{{backend="b",code="",fault="",model="other",route="{ROUTE}",status="200"}} 100010.0' in page


def test_opentelemetrys_series_are_bounded_too() -> None:
    metrics = GenAIMetrics({"b": Place("h", 1)})
    for number in range(MAX_SERIES + 5000):
        metrics.count(record(""), f"model-{number}", "vllm")
    assert len(metrics._series) == MAX_SERIES + 1
    assert sum(sum(series.request.counts) for series in metrics._series.values()) == MAX_SERIES + 5000


def test_opentelemetrys_series_of_backends_that_are_gone_are_given_back() -> None:
    places = {"b": Place("h", 1)}
    metrics = GenAIMetrics(places)
    metrics.count(record("m"), "m", "vllm")
    metrics.forget_gone()
    assert len(metrics._series) == 1
    del places["b"]
    metrics.forget_gone()
    assert not metrics._series


def test_counts_of_a_backend_that_is_gone_are_kept_for_a_while_and_their_totals_for_ever() -> None:
    clock, there = Clock(), ["b", "c"]

    def status() -> Status:
        backends = [BackendState(name, "openai", "healthy", "", 0.0, frozenset(["m"])) for name in there]
        return Status(Gateway().dispatcher.scheduler.snapshot(), 0, 0, False, backends)

    def count(backend: str) -> None:
        one = record("m")
        one.backend, one.ended = backend, clock.seconds()
        metrics(one)

    def counted() -> set[str]:
        return set(re.findall(r'gateway_requests_total{backend="([^"]*)"', metrics.page("text/plain")[1].decode()))

    metrics = Metrics(status, clock.seconds)
    count("b")
    count("c")
    there.remove("b")
    clock.advance(2.0)
    count("c")
    clock.advance(KEPT_SECONDS - 1.0)
    count("c")
    assert counted() == {"b", "c"}
    clock.advance(2.0)
    count("c")
    assert counted() == {"c"}
    assert metrics.summary()["request_count"] == 5
    for number in range(3 * MAX_GONE):
        count(f"pod-{number}")
        clock.advance(1.1)
    assert len(counted()) <= MAX_GONE + 2
    assert metrics.summary()["request_count"] == 5 + 3 * MAX_GONE


def overhead(*records: Record) -> tuple[float, float]:
    """(sum, count)."""
    metrics = Metrics(lambda: Status(Gateway().dispatcher.scheduler.snapshot(), 0, 0, False, []), Clock().seconds)
    for one in records:
        metrics(one)
    found = metrics._overhead.get(ROUTE)
    return (found.total, sum(found.counts)) if found is not None else (0.0, 0.0)


def test_overhead_is_what_the_backend_and_the_queue_are_not_to_blame_for() -> None:
    whole = record("m")
    whole.tries = [Try("a", 1.25, 3.0, 0.0, 4.0, "backend_error"), Try("b", 4.0, 5.0, 6.0)]
    whole.ended = 6.5
    assert overhead(whole) == (0.75, 1)
    stream = record("m")
    stream.stream, stream.tries, stream.ended = True, [Try("b", 1.25, 3.0, 6.0)], 60.0
    assert overhead(stream) == (0.25, 1)
    unanswered = record("m")
    unanswered.tries = [Try("b", 1.0, 1.0, 0.0, 2.0, "backend_error")]
    assert overhead(unanswered) == (0.0, 0)


@pytest.mark.parametrize(
    ("last", "stream", "counted"),
    [
        (Try("b", 1.0, 1.0, 0.0, 1.9, "cancelled"), False, 1),  # it waited for the answer
        (Try("b", 1.0, 1.0, 1.5), True, 1),  # it was within a stream
        (Try("b", 1.0, 1.0, 1.5), False, 0),  # the whole answer was in
        (Try("b", 1.0, 1.0, 0.0, 1.5, "backend_error"), True, 0),  # it waited for another backend
    ],
    ids=str,
)
def test_a_backend_that_is_let_go_of_is_counted_if_it_was_at_it(last: Try, stream: bool, counted: int) -> None:
    metrics = Metrics(lambda: Status(Gateway().dispatcher.scheduler.snapshot(), 0, 0, False, []), Clock().seconds)
    left = record("m")
    left.tries, left.stream, left.left = [last], stream, 1.75
    metrics(record("m"))
    metrics(left)
    assert (sum(metrics._cancel.counts), metrics._cancel.total) == (counted, counted * 0.25)


def test_the_reactors_lateness_is_seen() -> None:
    clock = Clock()
    delay = LoopDelay(clock)
    delay.startService()
    clock.advance(INTERVAL)
    clock.advance(INTERVAL + 0.5)  # something took its time
    (family,) = delay.collect()
    found = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    assert found["gateway_event_loop_delay_seconds_count"] == 2
    assert found["gateway_event_loop_delay_seconds_sum"] == 0.5
    assert (found["0.25"], found["0.5"]) == (1, 2)
    delay.stopService()
    assert clock.getDelayedCalls() == []


def test_buckets_reach_minutes() -> None:
    gateway = Gateway()
    slow = record("m")
    slow.first_token = 400.0
    gateway.metrics(slow)
    found = dict(buckets(gateway.metrics._first_token[ROUTE]))
    assert (found["300.0"], found["600.0"]) == (0, 1)


def test_an_attempt_has_its_times() -> None:
    gateway = Gateway()
    response = gateway.post(HELLO)
    gateway.clock.advance(2.0)
    gateway.agent.answer(FakeResponse(), b'{"choices":[]}')
    gateway.done(response)
    (attempt,) = gateway.records[0].tries
    assert (attempt.backend, attempt.replied - attempt.sent, attempt.code) == ("b", 2.0, "")


def test_an_attempt_that_nobody_waits_for_says_so() -> None:
    gateway = Gateway()
    response = gateway.post(STREAM)
    gateway.clock.advance(2.0)
    gateway.app.answering.cut()
    assert gateway.done(response).code == 503
    (attempt,) = gateway.records[0].tries
    assert (attempt.ended - attempt.sent, attempt.code) == (2.0, "cancelled")
