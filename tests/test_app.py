from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from twisted.internet.task import Clock

from gateway.backend import Answer, Stream
from gateway.core import sse, wire
from gateway.core.endpoints import CHAT
from gateway.core.errors import BackendFailed
from gateway.core.record import Record
from gateway.core.reports import Report
from gateway.core.usage import Usage
from gateway.echo import EchoBackend

from .conftest import Logged
from .fakes import HELLO, STREAM, FakeResponse, Gateway, body_of, error_of, now_of


@pytest.fixture
def echo() -> Gateway:
    clock = Clock()
    gateway = Gateway(EchoBackend(clock, lambda: 1_700_000_000.5))
    gateway.clock = clock
    return gateway


def test_the_last_user_message_is_echoed(echo: Gateway) -> None:
    response = now_of(echo.post(HELLO, x_request_id="demo-1"))
    assert response.code == 200
    assert response.headers.getRawHeaders("content-type") == ["application/json"]
    assert response.headers.getRawHeaders("x-request-id") == ["demo-1"]
    assert json.loads(body_of(echo, response)) == {
        "id": "demo-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "echo",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Echo: hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }


@pytest.mark.parametrize(
    ("messages", "content", "prompt_tokens"),
    [
        ([{"role": "system", "content": "be brief"}, {"role": "user", "content": "a b"}], "Echo: a b", 4),
        ([{"role": "user", "content": "first"}, {"role": "assistant"}, {"role": "user", "content": "last"}], "Echo: last", 2),
        ([{"role": "user", "content": [{"type": "text", "text": "in parts"}]}], "Echo: in parts", 2),
        ([{"role": "system", "content": "nobody asks"}], "Echo: ", 2),
        ([{"role": "user", "content": "  spaced \n out  "}], "Echo:   spaced \n out  ", 2),
        ([{"role": "user", "content": "h\u00e9 \U0001f600"}], "Echo: h\u00e9 \U0001f600", 2),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_is_the_same_streamed_or_not(
    echo: Gateway, messages: list[Any], content: str, prompt_tokens: int, stream: bool
) -> None:
    request = {"messages": messages, "stream": stream, **({"stream_options": {"include_usage": True}} if stream else {})}
    response = echo.post(json.dumps(request).encode())
    echo.clock.pump([0.1] * 20)
    echo.client.flush()
    body = body_of(echo, now_of(response))
    if stream:
        *chunks, done = [event.data for event in sse.Decoder().feed(body)]
        assert done == sse.DONE
        decoded = [json.loads(chunk or b"") for chunk in chunks]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in decoded[:-1]) == content
        usage = decoded[-1]["usage"]
    else:
        answer = json.loads(body)
        assert answer["choices"][0]["message"]["content"] == content
        usage = answer["usage"]
    assert usage["prompt_tokens"] == prompt_tokens
    assert usage["completion_tokens"] == len(content.split())


def test_usage_of_a_streamed_echo_is_counted_but_shown_only_if_asked_for(echo: Gateway) -> None:
    response = echo.post(STREAM)
    echo.clock.pump([0.1] * 20)
    assert b"usage" not in body_of(echo, echo.done(response))
    assert echo.records[0].usage == Usage(1, 2)


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", "caf\u00e9"])
def test_a_missing_or_bad_request_id_is_replaced_by_a_uuid(echo: Gateway, given: str | None) -> None:
    response = now_of(echo.post(HELLO, **({} if given is None else {"x_request_id": given})))
    (request_id,) = response.headers.getRawHeaders("x-request-id")
    assert uuid.UUID(request_id).version == 4
    assert json.loads(body_of(echo, response))["id"] == request_id


def test_a_bad_request_is_answered_with_its_field(echo: Gateway) -> None:
    response = now_of(echo.post(b'{"messages": [{"role": "user", "content": 5}]}'))
    assert response.code == 400
    error = error_of(echo, response)
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_type", "messages[0].content")


def test_a_compressed_body_is_refused(echo: Gateway) -> None:
    response = now_of(echo.post(b"\x1f\x8b", content_encoding="gzip"))
    assert (response.code, error_of(echo, response)["code"]) == (415, "unsupported_media_type")


def test_unknown_urls_and_methods_get_openai_errors(echo: Gateway) -> None:
    for path in ("/", "/v1", "/v1/model", "/v1/../healthz", "/HEALTHZ"):
        assert now_of(echo.get(path)).code == 404, path
    response = now_of(echo.get("/v1/nope"))
    assert (response.code, error_of(echo, response)["code"]) == (404, "unknown_url")
    response = now_of(echo.get(CHAT.path))
    assert (response.code, error_of(echo, response)["code"]) == (405, "method_not_allowed")
    assert response.headers.getRawHeaders("allow") == ["POST"]
    assert response.headers.getRawHeaders("x-request-id")


def test_healthz_is_always_ok(echo: Gateway) -> None:
    response = now_of(echo.get("/healthz"))
    assert json.loads(body_of(echo, response)) == {"status": "ok"}
    echo.app.draining = True
    assert now_of(echo.get("/healthz")).code == 200


def test_readyz_follows_the_backend_and_the_drain() -> None:
    gateway = Gateway(looked_at=False)
    response = now_of(gateway.get("/readyz"))
    assert (response.code, error_of(gateway, response)["code"]) == (503, "no_backend")
    healthy(gateway)
    assert now_of(gateway.get("/readyz")).code == 200
    gateway.app.draining = True
    response = now_of(gateway.get("/readyz"))
    assert (response.code, error_of(gateway, response)["code"]) == (503, "draining")


def healthy(gateway: Gateway) -> None:
    """Let a probe succeed."""
    gateway.pool.startService()
    gateway.agent.answer(FakeResponse(), b'{"data":[{"id":"m"},{"id":"org/m"}]}')
    gateway.pool.stopService()


def test_while_draining_new_work_is_refused_with_a_time_to_come_back(echo: Gateway) -> None:
    echo.app.draining = True
    response = now_of(echo.post())
    assert (response.code, error_of(echo, response)["code"]) == (503, "draining")
    assert response.headers.getRawHeaders("retry-after") == ["1"]


def test_models_of_the_echo(echo: Gateway) -> None:
    listing = json.loads(body_of(echo, now_of(echo.get("/v1/models"))))
    assert listing["object"] == "list"
    assert [(model["id"], model["object"]) for model in listing["data"]] == [("echo", "model")]
    assert json.loads(body_of(echo, now_of(echo.get("/v1/models/echo"))))["id"] == "echo"
    response = now_of(echo.get("/v1/models/gpt-4"))
    assert (response.code, error_of(echo, response)["code"]) == (404, "model_not_found")


def test_metrics_count_inference_and_nothing_else(echo: Gateway) -> None:
    echo.post()
    echo.post(b"{")
    echo.get("/healthz")
    echo.get("/nope")
    metrics = json.loads(body_of(echo, now_of(echo.get("/metrics"))))
    assert metrics["request_count"] == 2
    assert metrics["error_count"] == 1
    assert metrics["errors"] == {"invalid_json": 1}
    assert (metrics["prompt_tokens"], metrics["completion_tokens"], metrics["total_tokens"]) == (1, 2, 3)
    assert metrics["total_latency_ms"] >= 0
    assert metrics["in_flight"] == 0


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "application/json"),
        ("application/json, text/plain, */*", "application/json"),
        ("text/plain", "text/plain; version=1.0.0; charset=utf-8"),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "text/plain; version=1.0.0; charset=utf-8"),
        (
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
        ("image/png", "application/json"),
        ("\x7f;;q=,", "application/json"),
    ],
)
def test_prometheus_gets_its_format_and_people_get_json(echo: Gateway, accept: str, content_type: str) -> None:
    echo.post()
    response = now_of(echo.get("/metrics", **({"accept": accept} if accept else {})))
    assert response.headers.getRawHeaders("content-type") == [content_type]
    body = body_of(echo, response).decode()
    if "json" in content_type:
        assert json.loads(body)["request_count"] == 1
        return
    parse = parse_openmetrics if "openmetrics" in content_type else text_string_to_metric_families
    samples = {sample.name: sample for family in parse(body) for sample in family.samples}
    assert samples["gateway_requests_total"].value >= 1
    assert "gateway_inflight" in samples


def test_model_names_that_callers_invent_do_not_become_labels() -> None:
    gateway = Gateway()
    healthy(gateway)
    for model in ("org/m", *(f"invented-{number}" for number in range(20))):
        gateway.post(json.dumps({"messages": [{"role": "user", "content": "x"}], "model": model, "stream": 5}).encode())
        response = gateway.post(json.dumps({"messages": [{"role": "user", "content": "x"}], "model": model}).encode())
        if model == "org/m":
            gateway.agent.fail(OSError("no"))
        assert gateway.done(response).code == (502 if model == "org/m" else 404)
    _, page = gateway.metrics.page("text/plain")
    lines = [line for line in page.decode().splitlines() if line.startswith("gateway_requests_total")]
    assert {part for line in lines for part in line.split(",") if part.startswith("model=")} == {
        'model="org/m"',
        'model="other"',
        'model=""',
    }


class _Buggy:
    name = "buggy"

    async def send(self, call: wire.Call) -> Answer | Stream:
        raise ZeroDivisionError("secret detail")

    async def models(self, headers: list[tuple[bytes, bytes]]) -> Answer:
        raise BackendFailed("backend_error", "no")

    async def probe(self) -> Report:
        raise BackendFailed("backend_error", "no")


def test_a_bug_is_a_500_that_shows_nothing_and_is_logged(logged: Logged) -> None:
    gateway = Gateway(_Buggy())
    response = now_of(gateway.post())
    body = body_of(gateway, response)
    assert response.code == 500
    assert json.loads(body)["error"]["code"] == "internal_error"
    assert b"secret" not in body
    assert [type(failure) for failure in logged.flush()] == [ZeroDivisionError]
    assert gateway.status().scheduling.inflight == {"buggy": 0}


def test_an_observer_with_a_bug_does_not_keep_the_others_from_seeing(echo: Gateway, logged: Logged) -> None:
    def buggy(record: Record) -> None:
        raise ZeroDivisionError

    echo.app.answering._observers = (buggy, *echo.app.answering._observers)
    assert now_of(echo.post()).code == 200
    assert len(echo.records) == 1
    assert [type(failure) for failure in logged.flush()] == [ZeroDivisionError]


def test_every_request_leaves_exactly_one_record(echo: Gateway) -> None:
    echo.post()
    echo.post(b"{")
    echo.get("/v1/models/none")
    echo.get("/nope")
    assert [(record.route, record.status, record.code, record.fault) for record in echo.records] == [
        (CHAT.path, 200, "", None),
        (CHAT.path, 400, "invalid_json", "caller"),
        ("/v1/models/{id}", 404, "model_not_found", "caller"),
        ("other", 404, "unknown_url", "caller"),
    ]
