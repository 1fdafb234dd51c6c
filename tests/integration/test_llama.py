"""A real llama-server behind the gateway."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .processes import PATIENCE, Running, free_port, llama_process, wait_for
from .test_faults import raw_post

HELLO = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 8, "temperature": 0, "cache_prompt": False}
ENDLESS = {**HELLO, "max_tokens": 100_000_000}


@pytest.fixture(scope="module")
def gateway(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("gateway"), "--log-format", "json", BACKEND_URL=llama) as running:
        yield running


def direct(llama: str, body: Any) -> Any:
    request = urllib.request.Request(f"{llama}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return json.load(response)


def alike(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what differs between any two."""
    kept = {name: value for name, value in answer.items() if name not in ("id", "created", "timings")}
    return {**kept, "timings": sorted(answer["timings"])}


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
TOOLS = [{"type": "function", "function": {"name": "count", "parameters": PARAMETERS}}]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": 1},
        {"n": 2},
        {"tools": TOOLS, "tool_choice": "required", "max_tokens": 100},
        {"stop": ["e"]},
        {"logprobs": True, "top_logprobs": 2},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "max_tokens": 40},
    ],
)
def test_a_plain_answer_is_the_one_llama_server_itself_would_give(gateway: Running, llama: str, more: dict[str, Any]) -> None:
    """It comes as a stream and is put together, but nobody can tell."""
    status, answer = gateway.post({**HELLO, **more})
    assert status == 200
    assert answer["id"].startswith("chatcmpl-")
    assert alike(answer) == alike(direct(llama, {**HELLO, **more}))


def test_a_stream_says_what_the_plain_answer_says(gateway: Running) -> None:
    request = urllib.request.Request(f"{gateway.url}/v1/chat/completions", json.dumps({**HELLO, "stream": True}).encode())
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-2]]
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text == gateway.post(HELLO)[1]["choices"][0]["message"]["content"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_llama_server_refuses_passes_through(gateway: Running, stream: bool) -> None:
    long = {**HELLO, "messages": [{"role": "user", "content": "x" * 10_000}], "stream": stream}
    status, answer = gateway.post(long)
    assert (status, answer["error"]["type"]) == (400, "exceed_context_size_error")


def test_models_are_those_of_the_server(gateway: Running) -> None:
    status, listing = gateway.get("/v1/models")
    assert (status, [model["id"] for model in listing["data"]]) == (200, ["tiny"])
    assert gateway.get("/v1/models/tiny")[1]["owned_by"] == "llamacpp"
    assert gateway.get("/v1/models/other")[0] == 404


def test_usage_is_counted_for_streams_and_plain_answers_alike(gateway: Running) -> None:
    before = gateway.get("/metrics")[1]
    usage = gateway.post(HELLO)[1]["usage"]
    request = urllib.request.Request(f"{gateway.url}/v1/chat/completions", json.dumps({**HELLO, "stream": True}).encode())
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        assert b'"usage"' not in response.read()

    def counted() -> bool:
        after = gateway.get("/metrics")[1]
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        return {name: after[name] - before[name] for name in names} == {name: 2 * usage[name] for name in names}

    wait_for(counted)


def busy_slots(llama: str) -> int:
    with urllib.request.urlopen(f"{llama}/slots", timeout=PATIENCE) as response:
        return sum(slot["is_processing"] for slot in json.load(response))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_leaves_frees_its_slot(gateway: Running, llama: str, stream: bool, how: str) -> None:
    """The generation would go on for ever; asking for the slots all the time, as this does, keeps llama-server
    from noticing by itself that a plain request's client has gone."""
    wait_for(lambda: busy_slots(llama) == 0)
    client = gateway.connect()
    client.sendall(raw_post({**ENDLESS, "stream": stream}))
    wait_for(lambda: busy_slots(llama) == 1)
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    client.close()
    wait_for(lambda: busy_slots(llama) == 0)


def test_connections_that_llama_server_drops_after_each_stream_are_never_seen(gateway: Running) -> None:
    for number in range(100):
        status, _ = gateway.post({**HELLO, "max_tokens": 1})
        assert status == 200, number
        request = {**HELLO, "max_tokens": 1, "stream": True}
        call = urllib.request.Request(f"{gateway.url}/v1/chat/completions", json.dumps(request).encode())
        with urllib.request.urlopen(call, timeout=PATIENCE) as response:
            assert b"data: [DONE]" in response.read()


def test_a_killed_server_is_told_and_a_new_one_is_found(tiny_model: Path, tmp_path: Path) -> None:
    port = free_port()
    with Running(tmp_path, "--probe-interval", "100ms", BACKEND_URL=f"http://127.0.0.1:{port}") as gateway:
        with llama_process(tmp_path, tiny_model, "--context-shift", port=port) as process:
            wait_for(lambda: gateway.get("/readyz")[0] == 200)
            with gateway.connect() as client:
                client.sendall(raw_post({**ENDLESS, "stream": True}))
                data = bytearray(client.recv(65536))
                process.kill()
                while not data.endswith(b"0\r\n\r\n"):
                    data += client.recv(65536)
            assert b'"backend_protocol_error"' in data
            assert b"[DONE]" not in data
        assert gateway.post(HELLO)[1]["error"]["code"] == "backend_unreachable"
        wait_for(lambda: gateway.get("/readyz")[0] == 503)
        with llama_process(tmp_path, tiny_model, port=port):
            wait_for(lambda: gateway.get("/readyz")[0] == 200)
            assert gateway.post(HELLO)[0] == 200


def test_a_prompt_without_room_is_refused_by_the_servers_own_count(llama: str, tmp_path: Path) -> None:
    """Its window has 4096 tokens, and each of these letters is one."""
    with Running(tmp_path, "--count-tokens", "true", BACKEND_URL=llama) as gateway:
        wait_for(lambda: gateway.get("/readyz")[0] == 200)
        for letters, refused in ((4000, False), (4200, True), (5000, True)):
            body = {**HELLO, "model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "xq" * (letters // 2)}]}
            status, answer = gateway.post(body)
            assert (status == 400) == refused, (letters, answer)
            if refused:
                assert answer["error"]["code"] == "context_length_exceeded"
        assert gateway.post({**HELLO, "model": "tiny", "messages": [{"role": "user", "content": "hello " * 1000}]})[0] == 200
