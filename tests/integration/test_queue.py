"""The admission queue, as clients see it: who waits, who is refused, who is served first."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from .asking import DONE, HELLO, STREAM, Request, ask, metric
from .backends import Connection, ScriptedBackend, backend, completion, event
from .processes import PATIENCE, Running, wait_for
from .test_many_backends import code_of, in_order

ONE_SLOT = '[[backends]]\nurl = "{}"\nkind = "openai"\nslots = 1\n'


class Slow:
    """A backend that answers when it is told to, one request after the other."""

    def __init__(self) -> None:
        self.may = threading.Semaphore(0)
        self.order: list[str] = []

    def __call__(self, connection: Connection, request: Request) -> None:
        self.order.append(request[1][b"x-request-id"].decode())
        assert self.may.acquire(timeout=PATIENCE)
        if json.loads(request[2]).get("stream"):
            connection.start_stream()
            connection.chunk(event("a") + event("", "stop") + DONE)
            connection.chunk(b"")
        else:
            connection.answer(completion())


class Place:
    """A backend with one slot, a gateway before it, and clients that wait."""

    def __init__(self, slow: Slow, server: ScriptedBackend, gateway: Running) -> None:
        self.slow, self.server, self.gateway = slow, server, gateway
        self.results: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self._threads: list[threading.Thread] = []

    def ask(self, name: str, body: Any = HELLO, **headers: str) -> None:
        """In the background; returns once the gateway has it."""
        before = self.known()

        def run() -> None:
            self.results[name] = ask(self.gateway, body, X_Request_ID=name, **headers)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()
        wait_for(lambda: self.known() > before or name in self.results)

    def known(self) -> float:
        """Requests that wait or are worked on."""
        return metric(self.gateway, "gateway_queue_depth") + metric(self.gateway, "gateway_inflight")

    def finish(self, answers: int) -> None:
        for _ in range(answers):
            self.slow.may.release()
        for thread in self._threads:
            thread.join(PATIENCE)


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    slow = Slow()
    settings = getattr(request, "param", {})
    with backend(slow) as server:
        (tmp_path / "gateway.toml").write_text(ONE_SLOT.format(server.url))
        with Running(tmp_path, "--config", "gateway.toml", **settings) as gateway:
            in_order(gateway, server.url)
            yield Place(slow, server, gateway)


@pytest.mark.parametrize("place", [{"GATEWAY_QUEUE_REQUESTS": "2"}], indirect=True)
def test_so_many_wait_and_one_more_is_refused_with_a_time_to_come_back(place: Place) -> None:
    for name in ("first", "second", "third"):
        place.ask(name)
    status, headers, content = ask(place.gateway, HELLO)
    assert (status, code_of(content)) == (429, "queue_full")
    assert 1 <= int(headers["retry-after"]) <= 120
    place.finish(3)
    assert [place.results[name][0] for name in ("first", "second", "third")] == [200] * 3
    assert place.results["first"][1]["x-gateway-queue-ms"] == "0"
    assert int(place.results["third"][1]["x-gateway-queue-ms"]) > 0
    assert place.slow.order == ["first", "second", "third"]
    assert metric(place.gateway, "gateway_queue_wait_seconds_count") == 3.0


@pytest.mark.parametrize("place", [{"GATEWAY_QUEUE_BYTES": "2000"}], indirect=True)
def test_the_queue_is_bounded_in_bytes_too(place: Place) -> None:
    place.ask("first")
    place.ask("second")
    long = {**HELLO, "messages": [{"role": "user", "content": "x" * 3000}]}
    assert code_of(ask(place.gateway, long)[2]) == "queue_full"
    place.finish(2)


@pytest.mark.parametrize("place", [{"GATEWAY_QUEUE_TIMEOUT": "0.3s"}], indirect=True)
def test_who_waits_too_long_is_told_so(place: Place) -> None:
    place.ask("first")
    status, headers, content = ask(place.gateway, HELLO)
    assert (status, code_of(content)) == (503, "queue_timeout")
    assert 1 <= int(headers["retry-after"]) <= 120
    place.finish(1)
    assert place.results["first"][0] == 200


def test_a_client_that_leaves_the_queue_is_never_sent(place: Place) -> None:
    place.ask("first")
    client = place.gateway.connect()
    body = json.dumps(HELLO).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nX-Request-ID: gone\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    wait_for(lambda: metric(place.gateway, "gateway_queue_depth") == 1.0)
    client.close()
    wait_for(lambda: metric(place.gateway, "gateway_queue_depth") == 0.0)
    place.finish(1)
    assert place.slow.order == ["first"]
    assert metric(place.gateway, "gateway_inflight") == 0.0


def test_interactive_requests_pass_batch_ones(place: Place) -> None:
    place.ask("running")
    place.ask("batch", X_Gateway_Priority="batch")
    place.ask("default", X_Gateway_Priority="no such word")
    place.ask("interactive", X_Gateway_Priority="interactive")
    place.finish(4)
    assert place.slow.order == ["running", "interactive", "default", "batch"]


@pytest.mark.parametrize("place", [{"GATEWAY_QUEUE_REQUESTS": "1"}], indirect=True)
def test_an_interactive_request_takes_the_place_of_a_batch_one_in_a_full_queue(place: Place) -> None:
    place.ask("running")
    place.ask("batch", X_Gateway_Priority="batch")
    interactive = threading.Thread(target=lambda: ask(place.gateway, HELLO, X_Request_ID="i", X_Gateway_Priority="interactive"))
    interactive.start()
    wait_for(lambda: "batch" in place.results)
    status, headers, content = place.results["batch"]
    assert (status, code_of(content)) == (429, "queue_full")
    assert 1 <= int(headers["retry-after"]) <= 120
    place.finish(2)
    interactive.join(PATIENCE)
    assert place.slow.order == ["running", "i"]


@pytest.mark.parametrize("place", [{"GATEWAY_QUEUE_COMMENTS": "0.1s"}], indirect=True)
def test_a_stream_that_waits_says_so(place: Place) -> None:
    place.ask("first")
    client = http.client.HTTPConnection("127.0.0.1", place.gateway.port, timeout=PATIENCE)
    client.request("POST", "/v1/chat/completions", json.dumps(STREAM), {"Content-Type": "application/json"})
    response = client.getresponse()  # the status has come, though the backend has not even been asked
    assert (response.status, response.getheader("content-type")) == (200, "text/event-stream")
    assert response.readline().startswith(b": queued 1")
    place.finish(2)
    rest = response.read()
    client.close()
    assert b": " in rest.split(b"data: ")[0] or rest.startswith(b"\n")
    assert rest.endswith(DONE)
    assert rest.count(b"data: ") == 3


@pytest.mark.parametrize("place", [{"GATEWAY_QUEUE_COMMENTS": "0.1s", "GATEWAY_QUEUE_TIMEOUT": "0.5s"}], indirect=True)
def test_what_fails_after_comments_is_told_in_the_stream(place: Place) -> None:
    place.ask("first")
    status, _, content = ask(place.gateway, STREAM)
    assert status == 200
    assert content.startswith(b": queued 1")
    assert b'"code":"queue_timeout"' in content
    assert DONE not in content
    place.finish(1)


@pytest.mark.parametrize("place", [{"GATEWAY_QUEUE_COMMENTS": "0.05s"}], indirect=True)
def test_the_sdk_reads_over_comments(place: Place) -> None:
    place.ask("first")
    threading.Timer(0.5, place.finish, [2]).start()
    client = OpenAI(base_url=f"{place.gateway.url}/v1", api_key="x", max_retries=0, timeout=PATIENCE)
    with client:
        stream = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], stream=True)
        assert [chunk.choices[0].delta.content for chunk in stream] == ["a", ""]
