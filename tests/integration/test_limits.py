"""Limits in a real gateway, as clients see them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from openai import OpenAI, RateLimitError

from .asking import DONE, HELLO, STREAM, ask, metric
from .backends import Connection, backend, completion, event
from .processes import PATIENCE, Running, wait_for

Request = tuple[bytes, dict[bytes, bytes], bytes]
NAMES = [f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")]
SHORT = {**HELLO, "model": "echo", "max_tokens": 10}


def test_every_answer_tells_how_the_key_stands_and_a_429_what_to_do(tmp_path: Path) -> None:
    with Running(tmp_path, GATEWAY_LIMIT_REQUESTS="3", GATEWAY_LIMIT_TOKENS="10000") as gateway:
        first, stream = ask(gateway, SHORT), ask(gateway, {**SHORT, "stream": True})
        malformed = ask(gateway, {"messages": 3})
        third, refused = ask(gateway, SHORT), ask(gateway, SHORT)
        assert [first.status, stream.status, malformed.status, third.status] == [200, 200, 400, 200]
        for reply in (first, stream, malformed, third, refused):
            assert [name for name in NAMES if name not in reply.headers] == []
        left = [int(reply.headers["x-ratelimit-remaining-requests"]) for reply in (first, stream, malformed, third)]
        assert left == [2, 1, 1, 0]
        assert first.headers["x-ratelimit-limit-tokens"] == "10000"
        assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
        wait = int(refused.headers["retry-after-ms"])
        assert 0 < wait <= 20_000
        assert int(refused.headers["retry-after"]) == -(-wait // 1000)
        assert b"3 requests a minute" in refused.body
        assert metric(gateway, r'gateway_limited_total\{limit="requests"\}') == 1
        assert metric(gateway, "gateway_limits_keys") == 1


def test_no_limits_no_headers(tmp_path: Path) -> None:
    with Running(tmp_path) as gateway:
        assert not [name for name in ask(gateway, SHORT).headers if name.startswith("x-ratelimit")]


def test_a_request_that_no_bucket_can_hold_is_told_so(tmp_path: Path) -> None:
    with Running(tmp_path, GATEWAY_LIMIT_TOKENS="100") as gateway:
        refused = ask(gateway, {**SHORT, "max_tokens": 10**9})
        assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
        assert refused.headers["x-should-retry"] == "false"
        assert "retry-after" not in refused.headers
        assert b"max_tokens" in refused.body
        assert ask(gateway, {"messages": HELLO["messages"]}).status == 200


def test_tokens_are_settled_to_what_the_answer_used(tmp_path: Path) -> None:
    with backend(lambda connection, _: connection.answer(completion())) as server:  # it says 1 and 1
        with Running(tmp_path, BACKEND_URL=server.url, GATEWAY_LIMIT_TOKENS="600") as gateway:
            replies = [ask(gateway, {**HELLO, "max_tokens": 500}) for _ in range(5)]
    assert [reply.status for reply in replies] == [200] * 5
    assert int(replies[-1].headers["x-ratelimit-remaining-tokens"]) < 100  # while it ran
    assert len(server.posts) == 5


def test_the_openai_sdk_waits_and_succeeds(tmp_path: Path) -> None:
    with Running(tmp_path, GATEWAY_LIMIT_REQUESTS="60") as gateway:
        with OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=2, timeout=PATIENCE) as client:
            for _ in range(60):
                assert ask(gateway, SHORT).status == 200
            begun = time.monotonic()
            while ask(gateway, SHORT).status == 200:  # what has come back since
                pass
            answer = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hi"}])
            assert answer.choices[0].message.content == "Echo: hi"
            assert time.monotonic() - begun < PATIENCE
            with pytest.raises(RateLimitError):
                client.with_options(max_retries=0).chat.completions.create(
                    model="echo", messages=[{"role": "user", "content": "hi"}]
                )


def test_a_client_that_leaves_in_mid_stream_gives_its_place_back_and_pays_for_what_it_saw(tmp_path: Path) -> None:
    let_go = threading.Event()

    def script(connection: Connection, _: Request) -> None:
        connection.start_stream()
        connection.chunk(event("a") + event("b"))
        if len(server.posts) == 1:
            connection.gone()
            let_go.set()
        else:
            connection.chunk(event("", "stop") + DONE)
            connection.chunk(b"")

    with backend(script) as server:
        options = {"GATEWAY_LIMIT_CONCURRENCY": "1", "GATEWAY_LIMIT_TOKENS": "1000", "BACKEND_URL": server.url}
        with (
            Running(tmp_path, **options) as gateway,
            OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as client,
        ):
            stream = client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hello"}], stream=True, max_tokens=900
            )
            next(iter(stream))
            busy = ask(gateway, {**STREAM, "max_tokens": 1})
            assert (busy.status, busy.code) == (429, "rate_limit_exceeded")
            assert b"1 requests at the same time" in busy.body
            assert metric(gateway, r'gateway_limited_total\{limit="concurrency"\}') == 1
            stream.close()
            assert let_go.wait(PATIENCE)
            left = lambda: int(ask(gateway, {"messages": 3}).headers["x-ratelimit-remaining-tokens"])  # noqa: E731
            wait_for(lambda: left() > 900)
            assert ask(gateway, {**STREAM, "max_tokens": 1}).status == 200


def test_what_no_backend_worked_on_costs_nothing_but_the_request(tmp_path: Path) -> None:
    with Running(
        tmp_path, BACKEND_URL="http://127.0.0.1:9", GATEWAY_LIMIT_TOKENS="1000", GATEWAY_LIMIT_REQUESTS="10"
    ) as gateway:
        assert ask(gateway, {**HELLO, "max_tokens": 900}).status in (502, 503)
        told = ask(gateway, {"messages": 3}).headers
    assert told["x-ratelimit-remaining-tokens"] == "1000"
    assert told["x-ratelimit-remaining-requests"] == "9"


def test_each_address_has_limits_of_its_own(tmp_path: Path) -> None:
    import http.client
    import json

    with Running(tmp_path, GATEWAY_LIMIT_REQUESTS="1") as gateway:

        def status(source: str) -> int:
            client = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=PATIENCE, source_address=(source, 0))
            client.request("POST", "/v1/chat/completions", json.dumps(SHORT), {"Content-Type": "application/json"})
            response = client.getresponse()
            response.read()
            client.close()
            return response.status

        assert [status("127.0.0.1"), status("127.0.0.2"), status("127.0.0.1"), status("127.0.0.2")] == [200, 200, 429, 429]
