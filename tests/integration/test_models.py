"""Names, defaults and fallbacks of models, through the whole gateway and two backends."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from .asking import DONE, HELLO, Asking, Request, answers, ask, fails, metric, streams, table
from .backends import Connection, backend, completion, event
from .processes import PATIENCE, Running, free_port, wait_for

FAST = {**HELLO, "model": "fast"}
MODELS = """
[models.fast]
backend_model = "small"
fallbacks = ["big"]

[models.fast.defaults]
temperature = 0.5

[models.big.defaults]
top_k = 7
"""


def settings(directory: Path, small: str, big: str, models: str = MODELS, **more: object) -> str:
    path = directory / "gateway.toml"
    path.write_text(table("a", small, models=["small"], **more) + table("b", big, models=["big"]) + models)
    return str(path)


def ready(gateway: Running) -> None:
    wait_for(lambda: gateway.get("/readyz")[0] == 200)


def test_an_alias_with_its_defaults(tmp_path: Path) -> None:
    with backend(answers, models=["small"]) as small, backend(answers, models=["big"]) as big:
        with Running(tmp_path, "--config", settings(tmp_path, small.url, big.url), "--log-format", "json") as gateway:
            ready(gateway)
            reply = ask(gateway, FAST, x_request_id="alias-1")
            plain = ask(gateway, {**HELLO, "model": "small"})
            assert (reply.status, reply.backend, reply.headers["x-gateway-model"]) == (200, "a", "small")
            assert "x-gateway-model" not in plain.headers
            logged = gateway.access("alias-1")
            assert (logged["model"], logged["served_model"]) == ("fast", "small")
            listing = {model["id"]: model for model in gateway.get("/v1/models")[1]["data"]}
            assert (listing["fast"]["root"], listing["fast"]["owned_by"]) == ("small", "gateway")
            assert set(listing) == {"small", "big", "fast"}
            assert gateway.get("/v1/models/fast")[1]["root"] == "small"
            assert metric(gateway, r'gateway_requests_total\{.*model="fast"') == 1
    assert json.loads(small.posts[0][2]) == {**HELLO, "model": "small", "temperature": 0.5}
    assert json.loads(small.posts[1][2]) == {**HELLO, "model": "small"}
    assert not big.posts


@pytest.mark.parametrize("stream", [False, True])
def test_when_every_backend_of_a_model_is_gone_the_next_model_answers(tmp_path: Path, stream: bool) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    with backend(streams("hi") if stream else answers, models=["big"]) as big:
        config = settings(tmp_path, gone, big.url)
        with Running(tmp_path, "--config", config, "--log-format", "json", "--retry-budget", "0") as gateway:
            ready(gateway)
            reply = ask(gateway, {**FAST, "stream": stream}, x_request_id="fallback-1")
            assert (reply.status, reply.backend, reply.headers["x-gateway-model"]) == (200, "b", "big")
            assert reply.body.endswith(DONE) == stream
            logged = gateway.access("fallback-1")
            assert (logged["model"], logged["served_model"]) == ("fast", "big")
            assert logged["retried"] in ("backend_unreachable", "no_backend")
    sent = json.loads(big.posts[0][2])
    assert (sent["model"], sent["top_k"], "temperature" in sent) == ("big", 7, False)


def test_a_backend_that_fails_before_its_first_byte_is_followed_by_the_next_model(tmp_path: Path) -> None:
    with backend(fails, models=["small"]) as small, backend(answers, models=["big"]) as big:
        with Running(tmp_path, "--config", settings(tmp_path, small.url, big.url)) as gateway:
            ready(gateway)
            reply = ask(gateway, FAST)
    assert (reply.status, reply.backend) == (200, "b")
    assert len(small.posts) == 1


def test_a_message_falls_back_too(tmp_path: Path) -> None:
    with backend(fails, models=["small"]) as small, backend(answers, models=["big"]) as big:
        with Running(tmp_path, "--config", settings(tmp_path, small.url, big.url)) as gateway:
            ready(gateway)
            reply = ask(gateway, {**FAST, "max_tokens": 5}, "/v1/messages")
    assert (reply.status, reply.headers["x-gateway-model"]) == (200, "big")
    assert json.loads(reply.body)["content"] == [{"type": "text", "text": "hi"}]


def test_a_full_queue_is_no_reason_to_wait_if_another_model_has_room(tmp_path: Path) -> None:
    busy, free = threading.Event(), threading.Event()

    def script(connection: Connection, _: Request) -> None:
        busy.set()
        free.wait(PATIENCE)
        connection.answer(completion())

    with backend(script, models=["small"]) as small, backend(answers, models=["big"]) as big:
        config = settings(tmp_path, small.url, big.url, slots=1)
        with Running(tmp_path, "--config", config, "--queue-requests", "0") as gateway:
            ready(gateway)
            first = Asking(gateway, {**HELLO, "model": "small"})
            assert busy.wait(PATIENCE)
            assert ask(gateway, FAST).backend == "b"
            free.set()
            assert first.reply().backend == "a"


def test_what_waited_too_long_gets_a_new_wait_with_the_next_model(tmp_path: Path) -> None:
    free = threading.Event()

    def script(connection: Connection, _: Request) -> None:
        free.wait(PATIENCE)
        connection.answer(completion())

    with backend(script, models=["small"]) as small, backend(answers, models=["big"]) as big:
        config = settings(tmp_path, small.url, big.url, slots=1)
        with Running(tmp_path, "--config", config, "--queue-timeout", "200ms") as gateway:
            ready(gateway)
            first = Asking(gateway, {**HELLO, "model": "small"})
            wait_for(lambda: small.posts)
            assert ask(gateway, FAST).backend == "b"
            free.set()
            assert first.reply().status == 200


def test_after_the_first_byte_there_is_no_other_model(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.start_stream()
        connection.chunk(event("a"))
        connection.close()

    with backend(script, models=["small"]) as small, backend(answers, models=["big"]) as big:
        with Running(tmp_path, "--config", settings(tmp_path, small.url, big.url)) as gateway:
            ready(gateway)
            reply = ask(gateway, {**FAST, "stream": True})
    assert b"backend_protocol_error" in reply.body
    assert not big.posts


def test_what_is_the_callers_fault_is_told_and_not_tried_elsewhere(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.answer(b'{"error":{"message":"too long"}}', b"400 Bad")

    with backend(script, models=["small"]) as small, backend(answers, models=["big"]) as big:
        with Running(tmp_path, "--config", settings(tmp_path, small.url, big.url)) as gateway:
            ready(gateway)
            assert ask(gateway, FAST).status == 400
    assert not big.posts


def test_when_no_model_of_the_chain_can_be_had_the_last_failure_is_told(tmp_path: Path) -> None:
    with backend(fails, models=["small"]) as small, backend(fails, models=["big"]) as big:
        with Running(tmp_path, "--config", settings(tmp_path, small.url, big.url)) as gateway:
            ready(gateway)
            reply = ask(gateway, FAST)
    assert (reply.status, reply.code) == (502, "backend_error")
    assert (len(small.posts), len(big.posts)) == (1, 1)
