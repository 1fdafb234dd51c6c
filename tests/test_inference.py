"""Models with settings, and messages, on a stopped clock before a fake agent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.core.messages import COUNT_TOKENS, MESSAGES
from gateway.core.model_settings import read_tables
from gateway.core.readers import SettingsError

from .fakes import ANSWER, HELLO, FakeResponse, Gateway, body_of, error_of

MODELS = read_tables(
    "f", {"fast": {"backend_model": "small", "fallbacks": ["big"]}, "big": {"defaults": {"top_k": 7}}, "small": {}}
)
FAST = b'{"model":"fast",' + HELLO[1:]
MESSAGE = b'{"max_tokens":5,"model":"fast",' + HELLO[1:]
WHOLE = b'{"choices":[{"message":{"content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":5}}'


def told(gateway: Gateway, response: Any) -> dict[str, Any]:
    """The error of an answer of Anthropic's API."""
    body = json.loads(body_of(gateway, response))
    assert (body["type"], body["request_id"]) == ("error", response.headers.getRawHeaders("request-id")[0])
    error: dict[str, Any] = body["error"]
    return error


def test_the_next_model_is_waited_for_as_long_as_the_first_was() -> None:
    gateway = Gateway(slots=1, models=MODELS)
    held = gateway.post()
    response = gateway.post(FAST)
    gateway.clock.advance(30.0)
    gateway.clock.advance(29.0)
    gateway.agent.answer(FakeResponse(), ANSWER)
    assert gateway.done(held).code == 200
    sent = gateway.agent.sent()
    assert (sent["model"], sent["top_k"]) == ("big", 7)
    gateway.agent.answer(FakeResponse(), ANSWER)
    answer = gateway.done(response)
    assert answer.headers.getRawHeaders("x-gateway-model") == ["big"]
    record = gateway.records[-1]
    assert (record.model, record.served_model, record.retries, record.queued) == ("fast", "big", ["queue_timeout"], 59.0)


def test_a_client_that_leaves_while_the_second_model_is_asked_ends_it_all() -> None:
    gateway = Gateway(models=MODELS)
    response = gateway.post(FAST)
    gateway.agent.answer(FakeResponse(500), b"{}")
    gateway.client.flush()
    assert gateway.agent.sent()["model"] == "big"
    response.addErrback(lambda _: None)
    response.cancel()
    gateway.client.flush()
    assert gateway.agent.cancelled == 1
    assert gateway.records[-1].code == "client_cancelled"


def test_what_is_explained_is_what_would_be_asked() -> None:
    gateway = Gateway(models=MODELS)
    response = gateway.post(FAST, "/admin/explain")
    assert gateway.done(response).code == 200
    assert gateway.records[-1].served_model == "small"


def test_a_message_goes_out_as_a_chat_completion_and_comes_back_as_a_message() -> None:
    gateway = Gateway(models=MODELS)
    response = gateway.post(MESSAGE, MESSAGES)
    assert gateway.agent.requests[0][1].endswith(b"/v1/chat/completions")
    assert gateway.agent.sent() == {"model": "small", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}
    gateway.agent.answer(FakeResponse(), WHOLE)
    message = json.loads(body_of(gateway, gateway.done(response)))
    assert message["content"] == [{"type": "text", "text": "hi"}]
    record = gateway.records[-1]
    assert (record.route, record.model, record.usage.completion_tokens) == (MESSAGES, "fast", 5)


@pytest.mark.parametrize(
    ("status", "body", "code", "kind"),
    [
        (400, b'{"error":{"message":"too long"}}', 400, "invalid_request_error"),
        (429, b"{}", 429, "rate_limit_error"),
        (500, b"{}", 502, "api_error"),
        (200, b'{"choices":[]}', 502, "api_error"),
    ],
)
def test_what_a_backend_does_wrong_or_refuses(status: int, body: bytes, code: int, kind: str) -> None:
    gateway = Gateway()
    response = gateway.post(MESSAGE, MESSAGES)
    gateway.agent.answer(FakeResponse(status), body)
    answer = gateway.done(response)
    assert (answer.code, told(gateway, answer)["type"]) == (code, kind)


def test_a_gateway_that_stops_says_so_in_the_same_form() -> None:
    gateway = Gateway()
    gateway.app.draining = True
    answer = gateway.done(gateway.post(MESSAGE, MESSAGES))
    assert (answer.code, told(gateway, answer)["type"]) == (503, "overloaded_error")
    assert answer.headers.getRawHeaders("retry-after") == ["1"]


def test_a_chat_completion_is_still_told_in_openais_form() -> None:
    gateway = Gateway()
    answer = gateway.done(gateway.post(b"{}"))
    assert error_of(gateway, answer)["code"] == "missing_required_parameter"
    assert answer.headers.getRawHeaders("request-id") is None


def test_tokens_are_counted_by_llama_server_and_estimated_elsewhere() -> None:
    gateway = Gateway(kind="llamacpp", models=MODELS)
    response = gateway.post(b'{"model":"fast",' + HELLO[1:], COUNT_TOKENS)
    assert gateway.agent.requests[0][1].endswith(b"/v1/messages/count_tokens")
    assert gateway.agent.sent()["model"] == "small"
    gateway.agent.answer(FakeResponse(), b'{"input_tokens":25}')
    assert body_of(gateway, gateway.done(response)) == b'{"input_tokens":25}'

    gateway = Gateway()
    body = b'{"model":"m",' + HELLO[1:]
    answer = gateway.done(gateway.post(body, COUNT_TOKENS))
    assert json.loads(body_of(gateway, answer)) == {"input_tokens": len(body) // 4 + 1}
    assert not gateway.agent.requests


def test_a_server_that_cannot_count_is_estimated_too() -> None:
    gateway = Gateway(kind="llamacpp")
    response = gateway.post(MESSAGE, COUNT_TOKENS)
    gateway.agent.answer(FakeResponse(404), b"{}")
    assert gateway.done(response).code == 200


def unavailable(gateway: Gateway, times: int = 1) -> None:
    """The backend fails each attempt."""
    for _ in range(times):
        gateway.agent.answer(FakeResponse(500), b"{}")
        gateway.client.flush()


def test_a_fallback_that_the_request_is_not_for_is_passed_over() -> None:
    tables: dict[str, Any] = {
        "fast": {"backend_model": "small", "fallbacks": ["short", "big"]},
        "short": {"ranges": {"max_tokens": 2}},
        "big": {},
    }
    gateway = Gateway(models=read_tables("f", tables))
    response = gateway.post(b'{"max_tokens":5,' + FAST[1:])
    unavailable(gateway)
    assert gateway.agent.sent()["model"] == "big"
    gateway.agent.answer(FakeResponse(), ANSWER)
    assert gateway.done(response).code == 200
    assert gateway.records[-1].served_model == "big"


def test_when_nothing_fits_the_first_failure_is_what_is_told() -> None:
    tables = {"fast": {"backend_model": "small", "fallbacks": ["short"]}, "short": {"ranges": {"max_tokens": 2}}}
    gateway = Gateway(models=read_tables("f", tables))
    response = gateway.post(b'{"max_tokens":5,' + FAST[1:])
    unavailable(gateway)
    answer = gateway.done(response)
    assert (answer.code, error_of(gateway, answer)["code"]) == (502, "backend_error")
    assert gateway.records[-1].served_model == "small"


def test_a_models_defaults_are_for_what_generates() -> None:
    gateway = Gateway(models=read_tables("f", {"e": {"defaults": {"max_tokens": 7}}}))
    gateway.post(b'{"model":"e","input":"x"}', "/v1/embeddings")
    assert gateway.agent.sent() == {"model": "e", "input": "x"}


@pytest.mark.parametrize(
    "table",
    [{"defaults": {"temperature": "hot"}}, {"defaults": {"max_tokens": 1024}, "ranges": {"max_tokens": 512}}],
)
def test_defaults_that_every_request_would_be_refused_for_are_no_settings(table: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="defaults"):
        read_tables("f", {"m": table})


@pytest.mark.parametrize("asked", [{"max_completion_tokens": 1, "max_tokens": 9}, {"max_tokens": -1}, {"max_tokens": 9}])
def test_no_way_of_asking_passes_a_models_range(asked: dict[str, int]) -> None:
    gateway = Gateway(models=read_tables("f", {"m": {"ranges": {"max_tokens": 8}}}))
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **asked}
    answer = gateway.done(gateway.post(json.dumps(body).encode()))
    assert (answer.code, error_of(gateway, answer)["param"]) == (400, "max_tokens")
    assert not gateway.agent.requests


def test_a_messages_stream_that_is_none_is_the_backends_failure() -> None:
    gateway = Gateway()
    response = gateway.post(b'{"stream":true,' + MESSAGE[1:], MESSAGES)
    reply = gateway.agent.answer(FakeResponse(content_type="text/event-stream"))
    reply.data(b"data: nonsense\n\n")
    reply.end()
    assert b"event: error" in body_of(gateway, gateway.done(response))
    record = gateway.records[-1]
    assert (record.code, record.fault) == ("backend_protocol_error", "backend")


def test_more_stops_than_a_chat_completion_takes_are_refused_by_their_own_name() -> None:
    gateway = Gateway()
    body = b'{"stop_sequences":["1","2","3","4","5"],' + MESSAGE[1:]
    answer = gateway.done(gateway.post(body, MESSAGES))
    assert answer.code == 400
    assert "'stop_sequences'" in told(gateway, answer)["message"]
