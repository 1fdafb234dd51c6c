"""The anthropic SDK, as its users use it, against the echo, a scripted backend and a real llama-server."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from anthropic.types import MessageParam, ToolParam

from .asking import fails, table
from .backends import Connection, Script, backend, completion, event
from .processes import PATIENCE, Running, free_port, wait_for

MESSAGES: list[MessageParam] = [{"role": "user", "content": "hello"}]
WEATHER: ToolParam = {"name": "weather", "description": "how it is", "input_schema": {"type": "object"}}
DONE = b"data: [DONE]\n\n"
Request = tuple[bytes, dict[bytes, bytes], bytes]


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("echo")) as running:
        yield running


@pytest.fixture(scope="module")
def real(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("real"), BACKEND_URL=llama) as running:
        wait_for(lambda: running.get("/readyz")[0] == 200)
        yield running


def sdk(gateway: Running, retries: int = 0) -> Anthropic:
    return Anthropic(base_url=gateway.url, api_key="sk-test", max_retries=retries, timeout=PATIENCE)


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return b"data: %b\n\n" % json.dumps({"id": "c", "model": "tiny", "choices": [choice]}).encode()


def call(index: int, **function: str) -> dict[str, Any]:
    id = {"id": f"call_{index}", "type": "function"} if "name" in function else {}
    return {"tool_calls": [{"index": index, **id, "function": function}]}


USAGE = {"prompt_tokens": 9, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 5}}
TOOL_STREAM = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"reasoning_content": "hm"}),
    chunk({"content": "Let me look."}),
    chunk(call(0, name="weather", arguments="")),
    chunk(call(0, arguments='{"city": "Os')),
    chunk(call(0, arguments='lo"}')),
    chunk(call(1, name="weather", arguments='{"city": "Rome"}')),
    chunk({}, "tool_calls"),
    b"data: %b\n\n" % json.dumps({"choices": [], "usage": USAGE}).encode(),
    DONE,
]


EMPTY: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
}


def raw_post(gateway: Running, body: bytes) -> bytes:
    request = urllib.request.Request(f"{gateway.url}/v1/messages", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        content: bytes = response.read()
        return content


def streams(*chunks: bytes) -> Script:
    def script(connection: Connection, _: Request) -> None:
        connection.start_stream()
        for one in chunks:
            connection.chunk(one)
        connection.chunk(b"")

    return script


def test_a_plain_answer(echo: Running) -> None:
    with sdk(echo) as client:
        answer = client.messages.create(model="echo", max_tokens=50, system="be brief", messages=MESSAGES)
    assert [block.model_dump(exclude_none=True) for block in answer.content] == [{"type": "text", "text": "Echo: hello"}]
    assert (answer.stop_reason, answer.role, answer.model) == ("end_turn", "assistant", "echo")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 2)
    assert answer._request_id is not None
    assert answer.id == f"msg_{answer._request_id}"


def test_a_stream(echo: Running) -> None:
    with sdk(echo) as client, client.messages.stream(model="echo", max_tokens=50, messages=MESSAGES) as stream:
        assert "".join(stream.text_stream) == "Echo: hello"
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    assert (final.usage.input_tokens, final.usage.output_tokens) == (1, 2)


def test_tokens_are_counted(echo: Running) -> None:
    with sdk(echo) as client:
        assert client.messages.count_tokens(model="echo", messages=MESSAGES, system="be brief").input_tokens == 3


def test_requests_count_as_inference_and_their_tokens_too(echo: Running) -> None:
    before = echo.get("/metrics")[1]
    with sdk(echo) as client:
        client.messages.create(model="echo", max_tokens=50, messages=MESSAGES)
    wait_for(lambda: echo.get("/metrics")[1]["request_count"] == before["request_count"] + 1)
    assert echo.get("/metrics")[1]["completion_tokens"] == before["completion_tokens"] + 2


@pytest.mark.parametrize("stream", [False, True])
def test_tools_in_parallel_with_thoughts_before(tmp_path: Path, stream: bool) -> None:
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
        for number, city in enumerate(["Oslo", "Rome"])
    ]
    whole = json.loads(completion("Let me look."))
    whole["choices"][0] |= {"finish_reason": "tool_calls"}
    whole["choices"][0]["message"] |= {"tool_calls": calls, "reasoning_content": "hm"}
    whole["usage"] = USAGE

    def script(connection: Connection, request: Request) -> None:
        if json.loads(request[2]).get("stream"):
            streams(*TOOL_STREAM)(connection, request)
        else:
            connection.answer(json.dumps(whole).encode())

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway, sdk(gateway) as client:
        options: Any = {
            "model": "m",
            "max_tokens": 50,
            "messages": MESSAGES,
            "tools": [WEATHER],
            "tool_choice": {"type": "any"},
        }
        if stream:
            with client.messages.stream(**options) as events:
                answer = events.get_final_message()
        else:
            answer = client.messages.create(**options)
    sent = json.loads(server.posts[-1][2])
    assert (sent["tool_choice"], sent["tools"][0]["function"]["name"]) == ("required", "weather")
    found = [(block.type, getattr(block, "input", None)) for block in answer.content]
    assert found == [("thinking", None), ("text", None), ("tool_use", {"city": "Oslo"}), ("tool_use", {"city": "Rome"})]
    assert answer.stop_reason == "tool_use"
    usage = answer.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 5, 7)


def test_the_backend_gets_a_chat_completion_and_never_the_key_of_the_gateway(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.answer(completion())

    with (
        backend(script) as server,
        Running(tmp_path, "--forward-authorization", "true", BACKEND_URL=server.url) as gateway,
        sdk(gateway) as client,
    ):
        client.messages.create(model="m", max_tokens=5, messages=MESSAGES, extra_headers={"x-api-key": "sk-test"})
    _, headers, body = server.posts[0]
    assert json.loads(body) == {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}
    assert b"x-api-key" not in headers


def native_event(type: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (type.encode(), json.dumps({"type": type, **fields}).encode())


NATIVE = [
    native_event(
        "message_start", message={**EMPTY, "usage": {"input_tokens": 4, "cache_read_input_tokens": 5, "output_tokens": 0}}
    ),
    native_event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    native_event("content_block_delta", index=0, delta={"type": "text_delta", "text": "hi"}),
    native_event("content_block_stop", index=0),
    native_event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 7}),
    native_event("message_stop"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_backend_that_knows_messages_gets_them_as_they_came(tmp_path: Path, stream: bool) -> None:
    whole = {
        **EMPTY,
        "content": [{"type": "text", "text": "hi"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 9, "output_tokens": 7},
    }
    lines = []

    def script(connection: Connection, request: Request) -> None:
        lines.append(request[0])
        if stream:
            streams(*NATIVE)(connection, request)
        else:
            connection.answer(json.dumps(whole).encode())

    body = json.dumps({"model": "m", "max_tokens": 5, "stream": stream, "messages": MESSAGES, "extra": 1.50}).encode() + b"\n"
    with backend(script) as server:
        (tmp_path / "g.toml").write_text(table("a", server.url, messages="native"))
        with Running(tmp_path, "--config", "g.toml") as gateway:
            answer = raw_post(gateway, body)
            wait_for(lambda: gateway.get("/metrics")[1]["request_count"] == 1)
            seen = gateway.get("/metrics")[1]
    assert lines == [b"POST /v1/messages HTTP/1.1"]
    assert server.posts[0][2] == body
    assert answer == (b"".join(NATIVE) if stream else json.dumps(whole).encode())
    assert (seen["prompt_tokens"], seen["completion_tokens"], seen["error_count"]) == (9, 7, 0)


def test_a_stream_of_messages_that_stops_early_ends_with_an_error(tmp_path: Path) -> None:
    with backend(streams(*NATIVE[:3])) as server:
        (tmp_path / "g.toml").write_text(table("a", server.url, messages="native"))
        with Running(tmp_path, "--config", "g.toml") as gateway, sdk(gateway) as client:
            with pytest.raises(anthropic.APIStatusError):
                with client.messages.stream(model="m", max_tokens=5, messages=MESSAGES) as stream:
                    stream.get_final_message()


def test_an_older_llama_server_gets_a_chat_completion(tmp_path: Path) -> None:
    lines = []

    def script(connection: Connection, request: Request) -> None:
        lines.append(request[0].split(b" ")[1])
        if lines[-1] == b"/v1/messages":
            connection.answer(b'{"error":{"message":"no such page"}}', b"404 Not Found")
        else:
            streams(event("hi"), event("", "stop"), DONE)(connection, request)

    with backend(script) as server:
        (tmp_path / "g.toml").write_text(table("a", server.url, kind="llamacpp", models=["m"]))
        with Running(tmp_path, "--config", "g.toml") as gateway, sdk(gateway) as client:
            for _ in range(2):
                with client.messages.stream(model="m", max_tokens=5, messages=MESSAGES) as stream:
                    assert "".join(stream.text_stream) == "hi"
    assert lines == [b"/v1/messages", b"/v1/chat/completions", b"/v1/chat/completions"]


@pytest.mark.parametrize("messages", ["translate", "native"])
def test_a_real_server_says_the_same_by_either_way(llama: str, tmp_path: Path, messages: str) -> None:
    (tmp_path / "g.toml").write_text(table("a", llama, kind="llamacpp", messages=messages))
    with Running(tmp_path, "--config", "g.toml") as gateway, sdk(gateway) as client:
        options: Any = {"model": "tiny", "max_tokens": 5, "messages": MESSAGES, "extra_body": {"temperature": 0}}
        answer = client.messages.create(**options)
        with client.messages.stream(**options) as stream:
            final = stream.get_final_message()
    for one in (answer, final):
        assert (one.stop_reason, one.usage.output_tokens) == ("max_tokens", 5)
        assert one.usage.input_tokens + (one.usage.cache_read_input_tokens or 0) == 25
    assert [block.to_dict() for block in answer.content] == [block.to_dict() for block in final.content]


def test_a_bad_request_is_the_sdks_bad_request(echo: Running) -> None:
    with sdk(echo) as client, pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model="echo", max_tokens=0, messages=MESSAGES)
    assert caught.value.body == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "Invalid value for 'max_tokens': expected integer >= 1, got 0."},
        "request_id": caught.value.request_id,
    }


def test_an_unknown_model_is_the_sdks_not_found(real: Running) -> None:
    with sdk(real) as client, pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="none", max_tokens=5, messages=MESSAGES)
    body: Any = caught.value.body
    assert body["error"]["type"] == "not_found_error"


def test_a_wrong_method_is_told_in_the_same_form(echo: Running) -> None:
    status, body = echo.get("/v1/messages")
    assert (status, body["type"], body["error"]["type"]) == (405, "error", "invalid_request_error")


def test_a_dead_backend_is_the_sdks_server_error(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Running(tmp_path, BACKEND_URL=url) as gateway, sdk(gateway) as client:
        with pytest.raises(anthropic.InternalServerError) as caught:
            client.messages.create(model="m", max_tokens=5, messages=MESSAGES)
    body: Any = caught.value.body
    assert (caught.value.status_code, body["error"]["type"]) == (502, "api_error")


def test_a_full_queue_is_the_sdks_rate_limit(tmp_path: Path) -> None:
    busy = threading.Event()

    def script(connection: Connection, _: Request) -> None:
        busy.set()
        connection.gone()

    with backend(script) as server:
        (tmp_path / "g.toml").write_text(table("a", server.url, slots=1))
        with Running(tmp_path, "--config", "g.toml", "--queue-requests", "0") as gateway, gateway.connect() as first:
            wait_for(lambda: gateway.get("/readyz")[0] == 200)
            body = json.dumps({"model": "m", "max_tokens": 5, "messages": MESSAGES}).encode()
            first.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: g\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert busy.wait(PATIENCE)
            with sdk(gateway) as client, pytest.raises(anthropic.RateLimitError) as caught:
                client.messages.create(model="m", max_tokens=5, messages=MESSAGES)
    assert caught.value.response.headers["retry-after"]


def test_another_backend_answers_when_one_fails(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.answer(completion("second"))

    with backend(fails) as bad, backend(script) as good:
        (tmp_path / "g.toml").write_text(table("bad", bad.url, weight=1000) + table("good", good.url, weight=0.001))
        with Running(tmp_path, "--config", "g.toml", "--retry-budget", "1") as gateway, sdk(gateway) as client:
            answers = [client.messages.create(model="m", max_tokens=5, messages=MESSAGES) for _ in range(3)]
    assert [[block.type for block in answer.content] for answer in answers] == [["text"]] * 3
    assert bad.posts


def test_a_stream_that_breaks_is_an_error_and_not_a_short_answer(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.start_stream()
        connection.chunk(event("a") + b'data: {"id": "c", "cho')
        connection.close()

    seen = []
    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway, sdk(gateway) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            with client.messages.stream(model="m", max_tokens=5, messages=MESSAGES) as stream:
                for one in stream:
                    seen.append(one.type)
    body: Any = caught.value.body
    assert body["error"]["type"] == "api_error"
    assert "text" in seen
    assert "message_stop" not in seen


def test_leaving_a_stream_early_ends_the_backends_work(tmp_path: Path) -> None:
    gone = threading.Event()

    def script(connection: Connection, _: Request) -> None:
        connection.start_stream()
        connection.chunk(event("a"))
        if connection.gone():
            gone.set()

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway, sdk(gateway) as client:
        with client.messages.stream(model="m", max_tokens=5, messages=MESSAGES) as stream:
            next(stream.text_stream)
        assert gone.wait(PATIENCE)
        wait_for(lambda: gateway.get("/metrics")[1]["in_flight"] == 0)


def test_a_sign_of_life_does_not_disturb_the_sdk_and_a_late_failure_is_told_in_the_stream(tmp_path: Path) -> None:
    beaten = threading.Event()

    def script(connection: Connection, request: Request) -> None:
        beaten.wait(PATIENCE)
        connection.answer(b'{"error":{"message":"too long"}}', b"400 Bad")

    with backend(script) as server:
        (tmp_path / "g.toml").write_text(table("a", server.url))
        with Running(tmp_path, "--config", "g.toml", "--queue-comments", "50ms") as gateway, sdk(gateway) as client:
            with client.messages.with_streaming_response.create(
                model="m", max_tokens=5, messages=MESSAGES, stream=True
            ) as response:
                lines = response.iter_lines()
                assert next(lines).startswith(":")
                beaten.set()
                rest = [line for line in lines if line and not line.startswith(":")]
    assert rest[0] == "event: error"
    assert json.loads(rest[1].removeprefix("data: "))["error"] == {"type": "invalid_request_error", "message": "too long"}


def test_a_real_model_plain_and_streamed(real: Running) -> None:
    with sdk(real) as client:
        options: Any = {"model": "tiny", "max_tokens": 5, "messages": MESSAGES, "extra_body": {"temperature": 0}}
        answer = client.messages.create(**options)
        with client.messages.stream(**options) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 5)
    assert [block.text for block in answer.content if block.type == "text"] == [text]
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 5)
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) > 0


def test_a_real_tokenizer_counts_what_the_prompt_then_takes(real: Running) -> None:
    with sdk(real) as client:
        counted = client.messages.count_tokens(model="tiny", messages=MESSAGES, system="be brief").input_tokens
        answer = client.messages.create(model="tiny", max_tokens=1, messages=MESSAGES, system="be brief")
    assert counted == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


def test_a_real_slot_is_free_once_its_client_has_left(real: Running) -> None:
    with sdk(real) as client, client.messages.stream(model="tiny", max_tokens=100_000_000, messages=MESSAGES) as stream:
        next(iter(stream))
    wait_for(lambda: real.get("/metrics")[1]["in_flight"] == 0)


def test_what_a_real_server_refuses_is_the_sdks_bad_request(real: Running) -> None:
    long: list[MessageParam] = [{"role": "user", "content": "x" * 10_000}]
    with sdk(real) as client, pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model="tiny", max_tokens=5, messages=long)
    assert "context" in caught.value.message
