"""The openai SDK, as its users use it, against the echo and against a real llama-server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from .backends import Connection, backend, completion, event
from .processes import PATIENCE, Running, free_port, wait_for

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
Request = tuple[bytes, dict[bytes, bytes], bytes]


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("echo")) as running:
        yield running


@pytest.fixture(scope="module")
def real(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("real"), BACKEND_URL=llama) as running:
        yield running


def sdk(gateway: Running, retries: int = 0, timeout: float = PATIENCE) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key="sk-test", max_retries=retries, timeout=timeout)


def test_a_plain_answer(echo: Running) -> None:
    with sdk(echo) as client:
        answer = client.chat.completions.create(model="echo", messages=MESSAGES)
    assert answer.choices[0].message.content == "Echo: hello"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 3


def test_a_stream(echo: Running) -> None:
    with sdk(echo) as client:
        stream = client.chat.completions.create(
            model="echo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        with stream:
            chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Echo: hello"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 3


def test_raw_headers(echo: Running) -> None:
    with sdk(echo) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="echo", messages=MESSAGES, extra_headers={"X-Request-ID": "sdk-1"}
        )
    assert raw.headers["x-request-id"] == "sdk-1"
    assert raw.request_id == "sdk-1"
    assert raw.parse().id == "sdk-1"


def test_models(echo: Running) -> None:
    with sdk(echo) as client:
        assert [model.id for model in client.models.list()] == ["echo"]
        assert client.models.retrieve("echo").id == "echo"
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("org/none")
    assert caught.value.code == "model_not_found"


def test_a_bad_request_is_the_sdks_bad_request(echo: Running) -> None:
    with sdk(echo) as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="echo", messages=[])
    error = caught.value
    assert (error.status_code, error.code, error.param, error.type) == (
        400,
        "invalid_value",
        "messages",
        "invalid_request_error",
    )
    assert error.request_id


def test_an_unknown_route_is_the_sdks_not_found(echo: Running) -> None:
    with sdk(echo) as client, pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="x")
    assert caught.value.code == "unknown_url"


def test_a_dead_backend_is_the_sdks_server_error(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with (
        Running(tmp_path, BACKEND_URL=url) as gateway,
        sdk(gateway) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.chat.completions.create(model="m", messages=MESSAGES)
    assert (caught.value.status_code, caught.value.code) == (502, "backend_unreachable")


def test_the_sdk_retries_what_the_backend_failed(tmp_path: Path) -> None:
    posts = 0

    def script(connection: Connection, _: Request) -> None:
        nonlocal posts
        posts += 1
        if posts < 3:
            connection.answer(b'{"error":{"message":"busy"}}', b"503 Busy")
        else:
            connection.answer(completion("third time"))

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway, sdk(gateway, retries=2) as client:
        answer = client.chat.completions.create(model="m", messages=MESSAGES)
    assert answer.choices[0].message.content == "third time"
    assert posts == 3


def test_a_stream_that_breaks_is_an_error_and_not_a_short_answer(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.start_stream()
        connection.chunk(event("a") + b'data: {"id": "c", "cho')
        connection.close()

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway, sdk(gateway) as client:
        stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        seen = []
        with stream, pytest.raises(openai.APIError) as caught:
            for chunk in stream:
                seen.append(chunk.choices[0].delta.content)
    assert seen == ["a"]
    assert caught.value.code == "backend_protocol_error"


def test_the_sdks_own_timeout_ends_the_backends_work(tmp_path: Path) -> None:
    gone = threading.Event()

    def script(connection: Connection, _: Request) -> None:
        if connection.gone():
            gone.set()

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway:
        with sdk(gateway, timeout=0.5) as client, pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="m", messages=MESSAGES)
        assert gone.wait(10)


def test_a_real_model_plain_and_streamed(real: Running) -> None:
    with sdk(real) as client:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, temperature=0)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        assert answer.choices[0].finish_reason == "length"
        stream = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, temperature=0, stream=True)
        with stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == answer.choices[0].message.content


def test_leaving_a_stream_early_is_noticed(real: Running) -> None:
    before = real.get("/metrics")[1]["client_cancelled_count"]
    with sdk(real) as client:
        stream = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=100_000_000, stream=True)
        with stream:
            next(iter(stream))
    wait_for(lambda: real.get("/metrics")[1]["client_cancelled_count"] == before + 1)
    assert real.get("/metrics")[1]["in_flight"] == 0


def test_many_at_once(real: Running) -> None:
    async def ask(client: AsyncOpenAI, number: int) -> str:
        if number % 2:
            stream = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=5, temperature=0, stream=True
            )
            async with stream:
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, temperature=0)
        return answer.choices[0].message.content or ""

    async def ask_all() -> set[str]:
        async with AsyncOpenAI(base_url=f"{real.url}/v1", api_key="x", max_retries=0, timeout=PATIENCE) as client:
            return set(await asyncio.gather(*(ask(client, number) for number in range(16))))

    assert len(asyncio.run(ask_all())) == 1


def test_a_body_that_httpx_sends_in_chunks_is_read(echo: Running) -> None:
    import httpx2

    def parts() -> Iterator[bytes]:
        yield b'{"messages": '
        yield json.dumps(MESSAGES).encode() + b"}"

    with httpx2.Client() as client:
        response = client.post(f"{echo.url}/v1/chat/completions", content=parts())
    assert response.json()["choices"][0]["message"]["content"] == "Echo: hello"
