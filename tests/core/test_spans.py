"""Which attempt was which, where the record has to be read with care. The plain cases: tests/integration/test_otel.py."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.core.errors import BackendFailed, GatewayError
from gateway.core.record import Record, Try
from gateway.core.spans import Place, Span, Spans, place_of, spans_of
from gateway.core.trace_context import MAX_TEXT, Trace

ROUTE = "/v1/chat/completions"
ID = "0af7651916cd43dd8448eb211c80319c"


def spans(record: Record, maker: Spans | None = None) -> list[Span]:
    maker = maker or Spans(Place("g", 80), {"a": place_of("http://a:1"), "b": place_of("https://b")})
    made = maker.of(record, Trace(ID, "", True, first=1), 1000.0, "vllm")
    assert len(made) == spans_of(record)
    return made


def record(*tries: Try, backend: str = "b", stream: bool = True, **more: Any) -> Record:
    return Record("r", "POST", ROUTE, 1.0, model="m", backend=backend, tries=list(tries), stream=stream, ended=9.0, **more)


def times(span: Span) -> tuple[float, float]:
    return span.start / 1e9 - 1000, span.end / 1e9 - 1000


@pytest.mark.parametrize("loser", [Try("a", 1.0, 1.0, 0.0, 4.0, "cancelled"), Try("a", 1.0, 1.0, 4.0)], ids=["waits", "begun"])
def test_who_lost_a_race_did_not_fail(loser: Try) -> None:
    _, operation, lost, won = spans(record(loser, Try("b", 2.0, 2.0, 3.0), status=200))
    assert (lost.attributes["gateway.hedge.lost"], lost.failed, times(lost)) == (True, False, (1.0, 4.0))
    assert "error.type" not in lost.attributes
    assert (won.failed, times(won)) == (False, (2.0, 9.0))
    assert times(operation) == (1.0, 9.0)


def test_a_stream_that_broke_before_its_first_event_and_was_retried_failed() -> None:
    kept = record(Try("a", 1.0, 1.0, 2.0), backend="a")
    kept.retried(BackendFailed("backend_protocol_error", "It broke."), 3.0)
    kept.backend, kept.status = "b", 200
    kept.tries.append(Try("b", 3.0, 3.0, 4.0))
    _, _, broke, won = spans(kept)
    assert (broke.attributes["error.type"], broke.failed, times(broke)) == ("backend_protocol_error", True, (1.0, 3.0))
    assert not won.failed


def test_who_waits_for_a_first_byte_when_its_client_leaves_says_so() -> None:
    kept = record(Try("b", 1.0, 1.0, 0.0, 5.0, "cancelled"))
    kept.failed(GatewayError("client_cancelled", "The client went away."))
    _, operation, attempt = spans(kept)
    assert attempt.attributes["error.type"] == operation.attributes["error.type"] == "client_cancelled"
    assert times(attempt) == (1.0, 5.0)


def test_a_backend_whose_whole_answer_was_in_did_not_fail_with_its_client() -> None:
    kept = record(Try("b", 1.0, 1.0, 2.0), stream=False, status=200)
    kept.failed(GatewayError("client_cancelled", "The client went away."))
    _, operation, attempt = spans(kept)
    assert (operation.failed, attempt.failed, times(attempt)) == (True, False, (1.0, 2.0))


def test_a_refusal_by_the_backend_is_an_error_of_the_call_and_not_of_the_server() -> None:
    kept = record(Try("b", 1.0, 1.0, 2.0), stream=False, status=400)
    kept.failed(GatewayError("rejected_by_backend", "The backend refused the request."))
    server, _, attempt = spans(kept)
    assert (server.failed, attempt.failed, attempt.attributes["http.response.status_code"]) == (False, True, 400)


def test_hostile_names_are_bounded_and_harmless() -> None:
    kept = record(Try("b", 1.0, 1.0, 2.0), finish_reason="f" * 10_000)
    kept.model = "1\n\x00\ud800\U0001f600" + "x" * 10_000
    _, operation, _ = spans(kept)
    assert operation.name == "chat " + str(operation.attributes["gen_ai.request.model"])
    assert operation.name.encode().startswith(b"chat 1\n\x00?\xf0\x9f\x98\x80xxx")
    assert operation.attributes["gen_ai.response.finish_reasons"] == ("f" * MAX_TEXT,)
    assert len(operation.name) == MAX_TEXT + len("chat ")


def test_an_unknown_method_is_other() -> None:
    (span,) = spans(Record("r", "BREW", "other", 1.0, status=405, ended=2.0))
    assert span.name == "HTTP"
    assert (span.attributes["http.request.method"], span.attributes["http.request.method_original"]) == ("_OTHER", "BREW")


def test_places() -> None:
    assert place_of("https://b/v1") == Place("b", 443, "https://b/v1")
    assert place_of("http://[::1]:9") == Place("::1", 9, "http://[::1]:9")
