"""Which attempt was which, where the record has to be read with care. The plain cases: tests/integration/test_otel.py."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.core import otlp
from gateway.core.errors import BackendFailed, GatewayError
from gateway.core.record import Record, Try
from gateway.core.spans import MAX_KEPT, Place, Spans, place_of
from gateway.core.trace_context import Trace

ROUTE = "/v1/chat/completions"
ID = "0af7651916cd43dd8448eb211c80319c"


def spans(record: Record, maker: Spans | None = None) -> list[Any]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    maker = maker or Spans(Place("g", 80), {"a": place_of("http://a:1"), "b": place_of("https://b")})
    trace = Trace(ID, "", True, first=1)
    made = maker.of(record, trace, 1000.0, "vllm")
    assert len(made) == maker.count(record)
    found = ExportTraceServiceRequest.FromString(otlp.request(otlp.resource({}), otlp.scope("s", "1"), made))
    return list(found.resource_spans[0].scope_spans[0].spans)


def values(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def record(*tries: Try, backend: str = "b", stream: bool = True, **more: Any) -> Record:
    return Record("r", "POST", ROUTE, 1.0, model="m", backend=backend, tries=list(tries), stream=stream, ended=9.0, **more)


def times(span: Any) -> tuple[float, float]:
    return span.start_time_unix_nano / 1e9 - 1000, span.end_time_unix_nano / 1e9 - 1000


@pytest.mark.parametrize("loser", [Try("a", 1.0, 1.0, 0.0, 4.0, "cancelled"), Try("a", 1.0, 1.0, 4.0)], ids=["waits", "begun"])
def test_who_lost_a_race_did_not_fail(loser: Try) -> None:
    _, operation, lost, won = spans(record(loser, Try("b", 2.0, 2.0, 3.0), status=200))
    assert (values(lost)["gateway.hedge.lost"], lost.status.code, times(lost)) == (True, 0, (1.0, 4.0))
    assert "error.type" not in values(lost)
    assert (won.status.code, times(won)) == (0, (2.0, 9.0))
    assert times(operation) == (1.0, 9.0)


def test_a_stream_that_broke_before_its_first_event_and_was_retried_failed() -> None:
    kept = record(Try("a", 1.0, 1.0, 2.0), backend="a")
    kept.retried(BackendFailed("backend_protocol_error", "It broke."), 3.0)
    kept.backend, kept.status = "b", 200
    kept.tries.append(Try("b", 3.0, 3.0, 4.0))
    _, _, broke, won = spans(kept)
    assert (values(broke)["error.type"], broke.status.code, times(broke)) == ("backend_protocol_error", 2, (1.0, 3.0))
    assert won.status.code == 0


def test_who_waits_for_a_first_byte_when_its_client_leaves_says_so() -> None:
    kept = record(Try("b", 1.0, 1.0, 0.0, 5.0, "cancelled"))
    kept.failed(GatewayError("client_cancelled", "The client went away."))
    _, operation, attempt = spans(kept)
    assert values(attempt)["error.type"] == values(operation)["error.type"] == "client_cancelled"
    assert times(attempt) == (1.0, 5.0)


def test_a_backend_whose_whole_answer_was_in_did_not_fail_with_its_client() -> None:
    kept = record(Try("b", 1.0, 1.0, 2.0), stream=False, status=200)
    kept.failed(GatewayError("client_cancelled", "The client went away."))
    _, operation, attempt = spans(kept)
    assert (operation.status.code, attempt.status.code, times(attempt)) == (2, 0, (1.0, 2.0))


def test_a_refusal_by_the_backend_is_an_error_of_the_call_and_not_of_the_server() -> None:
    kept = record(Try("b", 1.0, 1.0, 2.0), stream=False, status=400)
    kept.failed(GatewayError("rejected_by_backend", "The backend refused the request."))
    server, _, attempt = spans(kept)
    assert (server.status.code, attempt.status.code, values(attempt)["http.response.status_code"]) == (0, 2, 400)


def test_hostile_names_are_bounded_and_harmless() -> None:
    maker = Spans(Place("g", 80), {})
    for number in range(2 * MAX_KEPT):
        kept = record(Try("b", 1.0, 1.0, 2.0), finish_reason="f" * 10_000)
        kept.model = f"{number}\n\x00\ud800\U0001f600" + "x" * 10_000
        assert sum(map(len, maker.of(kept, Trace(ID, "", True, first=1), 0.0, ""))) < 4000
        if number % 500 == 0:
            assert spans(kept, maker)[1].name.startswith(f"chat {number}")
    assert len(maker._kept) <= MAX_KEPT


def test_an_unknown_method_is_other() -> None:
    (span,) = spans(Record("r", "BREW", "other", 1.0, status=405, ended=2.0))
    assert span.name == "HTTP"
    assert (values(span)["http.request.method"], values(span)["http.request.method_original"]) == ("_OTHER", "BREW")


def test_places() -> None:
    assert place_of("https://b/v1") == Place("b", 443, "https://b/v1")
    assert place_of("http://[::1]:9") == Place("::1", 9, "http://[::1]:9")
