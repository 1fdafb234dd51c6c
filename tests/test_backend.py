"""What a backend can do wrong, and what the client then sees: one status and one code each."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from twisted.internet import error
from twisted.python.failure import Failure
from twisted.web._newclient import ParseError, RequestTransmissionFailed
from twisted.web.client import ResponseFailed, ResponseNeverReceived
from twisted.web.http import PotentialDataLoss

from gateway.core import sse
from gateway.core.backend_settings import Kind
from gateway.core.usage import UsageMeter

from .conftest import Logged
from .fakes import ANSWER, HELLO, STREAM, FakeAgent, FakeResponse, Gateway, body_of, error_of

SSE = "text/event-stream"


def chunk(text: str, finish_reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    return sse.encode(json.dumps({"choices": [choice], **more}).encode())


DONE = sse.encode(sse.DONE)


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


# --- whole answers


def test_an_answer_comes_back_as_it_is(gateway: Gateway) -> None:
    response = gateway.post(HELLO, x_request_id="r1", authorization="Bearer mine", traceparent="00-1")
    method, url, headers, body = gateway.agent.requests[0]
    assert (method, url, body) == (b"POST", b"http://b:1/v1/chat/completions", HELLO)
    assert headers.getRawHeaders("x-request-id") == ["r1"]
    assert headers.getRawHeaders("traceparent") == ["00-1"]
    assert headers.getRawHeaders("accept-encoding") == ["identity"]
    assert headers.getRawHeaders("authorization") is None
    gateway.agent.answer(FakeResponse(content_type="application/json; charset=x", set_cookie="sid=1", retry_after="2"), ANSWER)
    answer = gateway.done(response)
    assert answer.code == 200
    assert answer.headers.getRawHeaders("content-type") == ["application/json; charset=x"]
    assert answer.headers.getRawHeaders("set-cookie") is None
    assert answer.headers.getRawHeaders("retry-after") == ["2"]
    assert answer.headers.getRawHeaders("x-gateway-backend") == ["b"]
    assert body_of(gateway, answer) == ANSWER
    (record,) = gateway.records
    assert (record.usage.prompt_tokens, record.usage.completion_tokens, record.finish_reason) == (3, 5, "stop")


def test_an_answer_in_tiny_pieces_takes_little_more_memory_than_its_length(gateway: Gateway) -> None:
    response = gateway.post()
    backend = gateway.agent.answer(FakeResponse(content_type="text/plain"))
    tracemalloc.start()
    for at in range(30_000):
        backend.data(b"%02d" % (at % 100))
    backend.end()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5 * 60_000
    assert body_of(gateway, gateway.done(response)) == b"".join(b"%02d" % (at % 100) for at in range(30_000))


def test_the_backends_own_key_is_added() -> None:
    gateway = Gateway(api_key="sk-backend")
    gateway.post(HELLO, authorization="Bearer mine")
    assert gateway.agent.requests[0][2].getRawHeaders("authorization") == ["Bearer sk-backend"]


@pytest.mark.parametrize("status", [400, 404, 422, 429])
def test_a_4xx_passes_through(gateway: Gateway, status: int) -> None:
    response = gateway.post()
    gateway.agent.answer(FakeResponse(status, retry_after="7"), b'{"error":"mine"}')
    answer = gateway.done(response)
    assert answer.code == status
    assert answer.headers.getRawHeaders("retry-after") == ["7"]
    assert body_of(gateway, answer) == b'{"error":"mine"}'
    (record,) = gateway.records
    assert (record.status, record.code, record.fault) == (status, "rejected_by_backend", "caller")


def test_a_4xx_to_a_stream_is_a_plain_answer(gateway: Gateway) -> None:
    response = gateway.post(STREAM)
    gateway.agent.answer(FakeResponse(400), b'{"error":{"message":"too long"}}')
    answer = gateway.done(response)
    assert (answer.code, body_of(gateway, answer)) == (400, b'{"error":{"message":"too long"}}')


@pytest.mark.parametrize("status", [500, 501, 503, 599])
def test_a_5xx_is_a_502_that_quotes_the_backends_message(gateway: Gateway, status: int) -> None:
    response = gateway.post()
    gateway.agent.answer(FakeResponse(status, retry_after="3"), b'{"error":{"message":"Loading model"}}')
    answer = gateway.done(response)
    assert answer.code == 502
    assert answer.headers.getRawHeaders("retry-after") == ["3"]
    found = error_of(gateway, answer)
    assert found["code"] == "backend_error"
    assert f"status {status}" in found["message"]
    assert "Loading model" in found["message"]


@pytest.mark.parametrize("body", [b"<html>stack trace</html>", b'{"error":"text"}', b'{"error":{"message":5}}', b"[]", b"\xff"])
def test_of_other_5xx_bodies_nothing_is_shown(gateway: Gateway, body: bytes) -> None:
    response = gateway.post()
    gateway.agent.answer(FakeResponse(500), body)
    assert error_of(gateway, gateway.done(response))["message"] == "The backend failed with status 500."


@pytest.mark.parametrize("status", [302, 500, 503])
@pytest.mark.parametrize("kind", ["openai", "llamacpp"])
@pytest.mark.parametrize("body", [HELLO, STREAM])
def test_a_failure_is_one_also_when_it_comes_as_a_stream(kind: Kind, status: int, body: bytes) -> None:
    gateway = Gateway(kind=kind)
    response = gateway.post(body)
    gateway.agent.answer(FakeResponse(status, SSE), chunk("a") + DONE)
    assert gateway.done(response).code == 502
    assert gateway.records[0].fault == "backend"


def test_the_backends_own_words_reach_the_client_and_no_log(gateway: Gateway) -> None:
    response = gateway.post()
    gateway.agent.answer(FakeResponse(500), b'{"error":{"message":"cannot parse planted-prompt"}}')
    assert "planted-prompt" in error_of(gateway, gateway.done(response))["message"]
    assert "planted" not in gateway.records[0].message


@pytest.mark.parametrize("count", [-1, 1 << 62, None])
def test_counts_that_cannot_be_do_not_break_the_metrics(gateway: Gateway, count: int | None) -> None:
    for _ in range(3):
        response = gateway.post()
        usage = {"prompt_tokens": count, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": count}}
        gateway.agent.answer(FakeResponse(), json.dumps({"usage": usage}).encode())
        assert gateway.done(response).code == 200
    assert json.loads(body_of(gateway, gateway.done(gateway.get("/metrics"))))["request_count"] == 3


@pytest.mark.parametrize("status", [101, 301, 308, 600, 99999])
def test_a_status_that_is_no_answer_is_a_protocol_error(gateway: Gateway, status: int) -> None:
    response = gateway.post()
    gateway.agent.answer(FakeResponse(status), b"{}")
    answer = gateway.done(response)
    assert (answer.code, error_of(gateway, answer)["code"]) == (502, "backend_protocol_error")


def test_compression_that_was_not_asked_for_is_a_protocol_error(gateway: Gateway) -> None:
    response = gateway.post()
    reply = gateway.agent.answer(FakeResponse(content_encoding="gzip"))
    assert error_of(gateway, gateway.done(response))["code"] == "backend_protocol_error"
    assert reply.transport.closed


NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("body", [b"", b'{"choices": [', b"oops", b"{} {}", b'{"choices":[{"finish_reason":"\xff"}]}', NESTED])
def test_a_body_that_is_not_the_json_it_says_is_a_protocol_error(gateway: Gateway, body: bytes) -> None:
    response = gateway.post()
    gateway.agent.answer(FakeResponse(), body)
    answer = gateway.done(response)
    assert (answer.code, error_of(gateway, answer)["code"]) == (502, "backend_protocol_error")


def test_a_body_of_another_type_passes_as_it_is(gateway: Gateway) -> None:
    response = gateway.post()
    gateway.agent.answer(FakeResponse(content_type="text/plain"), b"oops")
    assert body_of(gateway, gateway.done(response)) == b"oops"


def test_an_answer_beyond_the_limit_is_stopped() -> None:
    gateway = Gateway(max_answer=100)
    response = gateway.post()
    reply = gateway.agent.answer(FakeResponse())
    reply.data(b"[" + b" " * 60)
    reply.data(b" " * 60)
    answer = gateway.done(response)
    assert (answer.code, error_of(gateway, answer)["code"]) == (502, "backend_protocol_error")
    assert reply.transport.closed


def test_an_answer_beyond_the_limit_that_came_in_one_piece_is_refused_too() -> None:
    gateway = Gateway(max_answer=100)
    response = gateway.post()
    gateway.agent.answer(FakeResponse(), b"[" + b" " * 120 + b"]")
    assert error_of(gateway, gateway.done(response))["code"] == "backend_protocol_error"


# --- no answer


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        (error.ConnectionRefusedError(), 502, "backend_unreachable"),
        (error.NoRouteError(), 502, "backend_unreachable"),
        (error.DNSLookupError("no such host"), 502, "backend_unreachable"),
        (error.TimeoutError(), 504, "connect_timeout"),
        (ResponseNeverReceived([Failure(error.ConnectionDone())]), 502, "backend_unreachable"),
        (ResponseNeverReceived([Failure(error.ConnectionLost())]), 502, "backend_unreachable"),
        (RequestTransmissionFailed([Failure(error.ConnectionLost())]), 502, "backend_unreachable"),
        (ResponseFailed([Failure(ParseError("bad", b""))]), 502, "backend_protocol_error"),
        (ResponseFailed([Failure(ValueError("bad length"))]), 502, "backend_protocol_error"),
    ],
)
@pytest.mark.parametrize("body", [HELLO, STREAM])
def test_no_answer_has_a_status_and_a_code(gateway: Gateway, reason: Exception, status: int, code: str, body: bytes) -> None:
    response = gateway.post(body)
    gateway.agent.fail(reason)
    answer = gateway.done(response)
    assert answer.code == status
    assert answer.headers.getRawHeaders("content-type") == ["application/json"]
    assert error_of(gateway, answer)["code"] == code
    (record,) = gateway.records
    assert (record.status, record.code, record.fault) == (status, code, "backend")
    assert gateway.status().scheduling.inflight == {"b": 0}


def truncated() -> Exception:
    return ResponseFailed([Failure(error.ConnectionDone())])


def test_a_truncated_answer_is_a_502(gateway: Gateway) -> None:
    response = gateway.post()
    reply = gateway.agent.answer(FakeResponse())
    reply.data(b'{"choices":')
    reply.end(truncated())
    answer = gateway.done(response)
    assert (answer.code, error_of(gateway, answer)["code"]) == (502, "backend_protocol_error")


@pytest.mark.parametrize(
    ("data", "end"), [(b"", truncated()), (b"", None), (b'data: {"half', truncated()), (b"data: " + b"x" * 9_000_000, None)]
)
def test_a_stream_that_breaks_before_its_first_event_is_a_502(gateway: Gateway, data: bytes, end: Exception | None) -> None:
    response = gateway.post(STREAM)
    reply = gateway.agent.answer(FakeResponse(content_type=SSE))
    if data:
        reply.data(data)
    reply.end(end)
    answer = gateway.done(response)
    assert (answer.code, error_of(gateway, answer)["code"]) == (502, "backend_protocol_error")


# --- time


def no_headers(agent: FakeAgent) -> None:
    pass


def no_body(agent: FakeAgent) -> None:
    agent.answer(FakeResponse(content_type=SSE))


@pytest.mark.parametrize("so_far", [no_headers, no_body])
@pytest.mark.parametrize("body", [HELLO, STREAM])
def test_no_first_byte_in_time_is_a_504(gateway: Gateway, so_far: Callable[[FakeAgent], None], body: bytes) -> None:
    response = gateway.post(body)
    so_far(gateway.agent)
    gateway.clock.advance(59.9)
    gateway.client.flush()
    assert not gateway.records
    gateway.clock.advance(0.2)
    answer = gateway.done(response)
    assert (answer.code, error_of(gateway, answer)["code"]) == (504, "first_byte_timeout")
    assert not gateway.clock.getDelayedCalls()


def test_a_silence_within_an_answer_is_a_504(gateway: Gateway) -> None:
    response = gateway.post()
    reply = gateway.agent.answer(FakeResponse())
    reply.data(b"[")
    gateway.clock.advance(29.9)
    reply.data(b" ")
    gateway.clock.advance(29.9)
    assert not gateway.records
    gateway.clock.advance(0.2)
    answer = gateway.done(response)
    assert (answer.code, error_of(gateway, answer)["code"]) == (504, "idle_timeout")
    assert reply.transport.closed


def test_an_answer_that_takes_too_long_in_total_is_a_504(gateway: Gateway) -> None:
    response = gateway.post()
    reply = gateway.agent.answer(FakeResponse())
    for _ in range(30):
        reply.data(b" ")
        gateway.clock.advance(10.0)
    answer = gateway.done(response)
    assert (answer.code, error_of(gateway, answer)["code"]) == (504, "total_timeout")
    assert not gateway.clock.getDelayedCalls()


def test_a_cancelled_request_ends_in_the_same_turn(gateway: Gateway) -> None:
    gateway.post()
    assert gateway.app.answering.cut() == 1
    assert gateway.agent.cancelled == 1
    assert gateway.status().scheduling.inflight == {"b": 0}
    assert not gateway.clock.getDelayedCalls()


def test_a_request_that_the_gateway_ends_is_told_so_and_not_that_its_backend_failed(gateway: Gateway) -> None:
    response = gateway.post()
    gateway.app.answering.cut()
    answer = gateway.done(response)
    assert (answer.code, error_of(gateway, answer)["code"]) == (503, "draining")


# --- streams


def test_events_pass_one_by_one_in_the_backends_own_bytes(gateway: Gateway) -> None:
    response = gateway.post(STREAM)
    reply = gateway.agent.answer(FakeResponse(content_type=SSE))
    reply.data(b": hi\r\n\r\n")
    answer = gateway.done(response)
    assert answer.headers.getRawHeaders("content-type") == [SSE]
    assert answer.headers.getRawHeaders("cache-control") == ["no-cache"]
    assert answer.headers.getRawHeaders("x-accel-buffering") == ["no"]
    seen: list[bytes] = []
    answer.collect(seen.append)
    gateway.client.flush()
    assert b"".join(seen) == b": hi\r\n\r\n"
    first = chunk("a")
    reply.data(first[:10])
    gateway.client.flush()
    assert b"".join(seen) == b": hi\r\n\r\n"
    reply.data(first[10:] + chunk("b")[:5])
    gateway.client.flush()
    assert b"".join(seen) == b": hi\r\n\r\n" + first
    reply.data(chunk("b")[5:] + DONE)
    reply.end()
    gateway.client.flush()
    assert b"".join(seen) == b": hi\r\n\r\n" + first + chunk("b") + DONE
    (record,) = gateway.records
    assert (record.status, record.code, record.stream) == (200, "", True)
    assert not gateway.clock.getDelayedCalls()


def streamed(gateway: Gateway, body: bytes, *parts: bytes, end: Exception | None = None) -> bytes:
    response = gateway.post(body)
    reply = gateway.agent.answer(FakeResponse(content_type=SSE))
    for part in parts:
        reply.data(part)
    reply.end(end)
    return body_of(gateway, gateway.done(response))


def ends_with_error(raw: bytes, code: str) -> None:
    """One error event stands at the end, and no [DONE] anywhere."""
    events = [event.data for event in sse.Decoder().feed(raw)]
    assert json.loads(events[-1] or b"")["error"]["code"] == code
    assert DONE not in raw
    assert raw.count(b'"error"') == 1


@pytest.mark.parametrize(
    ("parts", "end"),
    [
        ((chunk("a"),), truncated()),
        ((chunk("a"), chunk("b")[:20]), truncated()),
        ((chunk("a"), chunk("b")[:-1]), truncated()),
        ((chunk("a"),), None),
        ((chunk("a"), chunk("", "stop"), b"data: {"), None),
        ((chunk("a"), chunk("", "stop")), PotentialDataLoss()),
    ],
)
def test_a_stream_that_breaks_ends_with_one_error_and_no_done(
    gateway: Gateway, parts: tuple[bytes, ...], end: Exception | None
) -> None:
    raw = streamed(gateway, STREAM, *parts, end=end)
    ends_with_error(raw, "backend_protocol_error")
    whole = b"".join(part for part in parts if part.endswith(b"\n\n"))
    assert raw.startswith(whole)
    (record,) = gateway.records
    assert ("ConnectionDone" in record.detail) == isinstance(end, ResponseFailed)
    assert (record.status, record.code, record.fault) == (200, "backend_protocol_error", "backend")


@pytest.mark.parametrize(
    ("parts", "end"),
    [
        ((chunk("a"), DONE), None),
        ((chunk("a"), DONE), PotentialDataLoss()),
        ((chunk("a"), chunk("", "stop")), None),
        ((chunk("a", "stop"), DONE, b": bye"), None),
        ((chunk("a", "stop"), DONE), truncated()),
        ((b'data: {"choices":[{"delta":{"content":"\xe2\x82"}}]}\n\n', DONE), None),
        ((sse.encode(NESTED), DONE), None),
    ],
)
def test_a_stream_that_is_whole_is_left_alone(gateway: Gateway, parts: tuple[bytes, ...], end: Exception | None) -> None:
    assert streamed(gateway, STREAM, *parts, end=end) == b"".join(part for part in parts if part.endswith(b"\n\n"))
    assert gateway.records[0].code == ""


@pytest.mark.parametrize("end", ["DONE and nothing more", "DONE before the silence"])
def test_after_done_the_backends_end_is_not_waited_for(gateway: Gateway, end: str) -> None:
    response = gateway.post(STREAM)
    reply = gateway.agent.answer(FakeResponse(content_type=SSE))
    reply.data(chunk("a", "stop") + (DONE if end.endswith("more") else b""))
    if end.endswith("silence"):
        gateway.clock.advance(10.0)
        reply.data(DONE)
    gateway.clock.advance(0.9)
    assert not gateway.records
    gateway.clock.advance(0.2)
    assert body_of(gateway, gateway.done(response)) == chunk("a", "stop") + DONE
    assert gateway.records[0].code == ""
    assert reply.transport.closed
    assert not gateway.clock.getDelayedCalls()


@pytest.mark.parametrize("end", [None, PotentialDataLoss()])
def test_an_error_that_the_backend_tells_in_its_stream_passes_and_is_recorded(gateway: Gateway, end: Exception | None) -> None:
    said = sse.encode(b'{"error":{"message":"out of memory"}}')
    assert streamed(gateway, STREAM, chunk("a"), said, end=end) == chunk("a") + said
    assert gateway.records[0].code == "backend_error"


def test_a_silence_within_a_stream_ends_it_with_an_error(gateway: Gateway) -> None:
    response = gateway.post(STREAM)
    reply = gateway.agent.answer(FakeResponse(content_type=SSE))
    reply.data(chunk("a"))
    gateway.clock.advance(29.9)
    reply.data(chunk("b"))
    gateway.clock.advance(30.1)
    ends_with_error(body_of(gateway, gateway.done(response)), "idle_timeout")
    assert reply.transport.closed
    assert not gateway.clock.getDelayedCalls()


def test_a_bug_in_mid_stream_is_told_too(gateway: Gateway, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    response = gateway.post(STREAM)
    reply = gateway.agent.answer(FakeResponse(content_type=SSE))
    reply.data(chunk("a"))
    monkeypatch.setattr(UsageMeter, "see", lambda *_: 1 / 0)
    reply.data(chunk("b"))
    ends_with_error(body_of(gateway, gateway.done(response)), "internal_error")
    assert reply.transport.closed
    assert [type(failure) for failure in logged.flush()] == [ZeroDivisionError]


def test_an_event_without_end_is_stopped(gateway: Gateway) -> None:
    response = gateway.post(STREAM)
    reply = gateway.agent.answer(FakeResponse(content_type=SSE))
    reply.data(chunk("a"))
    for _ in range(9):
        reply.data(b"x" * 1024 * 1024)
    ends_with_error(body_of(gateway, gateway.done(response)), "backend_protocol_error")
    assert reply.transport.closed


def test_when_the_gateway_stops_a_stream_is_told(gateway: Gateway) -> None:
    response = gateway.post(STREAM)
    reply = gateway.agent.answer(FakeResponse(content_type=SSE))
    reply.data(chunk("a"))
    gateway.app.answering.cut()
    ends_with_error(body_of(gateway, gateway.done(response)), "draining")
    assert reply.transport.closed


def test_the_clients_pace_is_the_backends(gateway: Gateway) -> None:
    response = gateway.post(STREAM)
    reply = gateway.agent.answer(FakeResponse(content_type=SSE))

    def paused() -> bool:
        return reply.transport.paused

    assert not paused()
    reply.data(chunk("a"))
    assert not paused()
    exchange = reply.protocol
    exchange.pauseProducing()
    assert paused()
    gateway.clock.advance(299.0)  # the silence is the client's: only the total timeout counts
    assert not gateway.records
    exchange.resumeProducing()
    assert not paused()
    reply.data(chunk("b") + DONE)
    reply.end()
    assert body_of(gateway, gateway.done(response)) == chunk("a") + chunk("b") + DONE


# --- usage in streams

COUNTS = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
USAGE = sse.encode(json.dumps({"choices": [], "usage": COUNTS}).encode())


def test_usage_is_asked_for_and_hidden_from_a_client_that_did_not_ask(gateway: Gateway) -> None:
    raw = streamed(gateway, STREAM, chunk("a", usage=None), chunk("b", "stop", usage=None), USAGE, DONE)
    assert gateway.agent.sent()["stream_options"] == {"include_usage": True}
    assert USAGE not in raw
    assert raw.endswith(DONE)
    assert gateway.records[0].usage.prompt_tokens == 9
    assert not gateway.records[0].usage.estimated


def test_a_client_that_asked_sees_it_and_its_request_is_not_touched(gateway: Gateway) -> None:
    body = json.dumps({**json.loads(STREAM), "stream_options": {"include_usage": True}}).encode()
    assert USAGE in streamed(gateway, body, chunk("a"), USAGE, DONE)
    assert gateway.agent.requests[0][3] == body


def test_asking_can_be_switched_off() -> None:
    gateway = Gateway(stream_usage=False)
    assert streamed(gateway, STREAM, chunk("a"), chunk("b"), DONE) == chunk("a") + chunk("b") + DONE
    assert gateway.agent.requests[0][3] == STREAM
    assert gateway.records[0].usage.estimated
    assert gateway.records[0].usage.completion_tokens == 2


# --- llama-server


def test_a_plain_request_to_llama_server_goes_as_a_stream_and_comes_back_whole() -> None:
    gateway = Gateway(kind="llamacpp")
    response = gateway.post()
    assert gateway.agent.sent()["stream"] is True
    reply = gateway.agent.answer(FakeResponse(content_type=SSE))
    for part in (chunk("he"), chunk("llo"), chunk("", "stop"), USAGE, DONE):
        reply.data(part)
    reply.end()
    answer = gateway.done(response)
    assert answer.headers.getRawHeaders("content-type") == ["application/json; charset=utf-8"]
    body = json.loads(body_of(gateway, answer))
    assert body["choices"][0]["message"]["content"] == "hello"
    assert body["usage"] == COUNTS
    assert gateway.records[0].usage.prompt_tokens == 9


@pytest.mark.parametrize(
    ("last", "status", "code"),
    [
        (b"", 502, "backend_protocol_error"),
        (sse.encode(b"{"), 502, "backend_protocol_error"),
        (sse.encode(b'{"error":{"code":500,"message":"slot died"}}'), 502, "backend_error"),
    ],
)
def test_a_broken_stream_behind_a_plain_request_is_an_honest_status(last: bytes, status: int, code: str) -> None:
    gateway = Gateway(kind="llamacpp")
    response = gateway.post()
    reply = gateway.agent.answer(FakeResponse(content_type=SSE))
    reply.data(chunk("he") + last)
    reply.end()
    answer = gateway.done(response)
    assert (answer.code, error_of(gateway, answer)["code"]) == (status, code)


def test_a_refusal_in_the_stream_behind_a_plain_request_passes_as_the_4xx_it_is() -> None:
    gateway = Gateway(kind="llamacpp")
    response = gateway.post()
    reply = gateway.agent.answer(FakeResponse(content_type=SSE))
    reply.data(sse.encode(b'{"error":{"code":400,"message":"no"}}'))
    reply.end()
    answer = gateway.done(response)
    assert (answer.code, body_of(gateway, answer)) == (400, b'{"error":{"code":400,"message":"no"}}')


def test_streams_of_llama_server_are_not_touched() -> None:
    gateway = Gateway(kind="llamacpp")
    last = chunk("", "stop", timings={"cache_n": 4, "prompt_n": 5, "predicted_n": 1})
    assert streamed(gateway, STREAM, chunk("a"), last, DONE) == chunk("a") + last + DONE
    assert gateway.agent.requests[0][3] == STREAM
    assert (gateway.records[0].usage.prompt_tokens, gateway.records[0].usage.cached_tokens) == (9, 4)


# --- what it is


def listing(owned_by: str) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": "m", "owned_by": owned_by}]}).encode()


@pytest.mark.parametrize(
    ("owned_by", "server", "streamed"),
    [("llamacpp", "x", True), ("me", "llama.cpp", True), ("vllm", "uvicorn", False)],
)
def test_what_the_backend_is_is_asked_once_before_the_first_request(owned_by: str, server: str, streamed: bool) -> None:
    gateway = Gateway(kind=None)
    gateway.post()
    assert gateway.agent.requests[0][:2] == (b"GET", b"http://b:1/v1/models")
    gateway.agent.answer(FakeResponse(server=server), listing(owned_by))
    assert gateway.agent.requests[1][0] == b"POST"
    assert gateway.agent.sent().get("stream", False) == streamed
    gateway.post()
    assert [method for method, *_ in gateway.agent.requests] == [b"GET", b"POST", b"POST"]


@pytest.mark.parametrize(("status", "body"), [(404, b"{}"), (401, b"no"), (501, b""), (500, b""), (200, b"[]"), (200, b"oops")])
def test_a_backend_that_will_not_tell_is_a_plain_openai_server(status: int, body: bytes) -> None:
    gateway = Gateway(kind=None)
    response = gateway.post()
    gateway.agent.answer(FakeResponse(status), body)
    assert gateway.agent.requests[1][3] == HELLO
    gateway.agent.answer(FakeResponse(), ANSWER)
    assert gateway.done(response).code == 200


def test_a_backend_that_is_not_there_is_not_asked_twice() -> None:
    gateway = Gateway(kind=None)
    response = gateway.post()
    gateway.agent.fail(error.ConnectionRefusedError())
    assert error_of(gateway, gateway.done(response))["code"] == "backend_unreachable"
    assert len(gateway.agent.requests) == 1


def test_models_are_the_backends(gateway: Gateway) -> None:
    response = gateway.get("/v1/models")
    gateway.agent.answer(FakeResponse(), listing("me"))
    assert body_of(gateway, gateway.done(response)) == listing("me")
    response = gateway.get("/v1/models/m")
    gateway.agent.answer(FakeResponse(), listing("me"))
    assert json.loads(body_of(gateway, gateway.done(response))) == {"id": "m", "owned_by": "me"}
    for id in ("org/name", "/models/name.gguf", "name with space"):
        response = gateway.get("/v1/models/" + quote(id, safe=""))
        gateway.agent.answer(FakeResponse(), json.dumps({"data": [{"id": id}]}).encode())
        assert json.loads(body_of(gateway, gateway.done(response))) == {"id": id}
    assert "gateway_time_to_first_token_seconds_count" not in gateway.metrics.page("text/plain")[1].decode()
    response = gateway.get("/v1/models")
    gateway.agent.fail(error.ConnectionRefusedError())
    assert gateway.done(response).code == 502
    for path in ("/v1/models", "/v1/models/m"):
        response = gateway.get(path)
        gateway.agent.answer(FakeResponse(401), b'{"error":"no key"}')
        answer = gateway.done(response)
        assert (answer.code, body_of(gateway, answer)) == (401, b'{"error":"no key"}')
