"""Keys, prompts and query strings are planted, and looked for wherever the gateway says something."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .asking import DONE, Request, ask, table, until
from .backends import Connection, backend, completion, event
from .collector import Collector, collector
from .processes import PATIENCE, Running, wait_for

BACKEND_KEY = "sk-planted-backend-key"
CLIENT_KEY = "sk-planted-client-key"
OTHER_KEY = "planted-x-api-key"
COLLECTOR_KEY = "planted-collector-key"
COOKIE = "planted-cookie"
QUERY = "planted-query"
PROMPT = "planted prompt text"
ANSWER = "planted answer text"
SESSION = "planted-session"
KEYS = [BACKEND_KEY, CLIENT_KEY, OTHER_KEY, COLLECTOR_KEY, COOKIE]
EVERYTHING = [*KEYS, QUERY, PROMPT, ANSWER, SESSION]
HEADERS = {
    "Authorization": f"Bearer {CLIENT_KEY}",
    "x-api-key": OTHER_KEY,
    "cookie": f"session={COOKIE}",
    "x-session-id": SESSION,
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}
MESSAGES = [{"role": "user", "content": PROMPT}]
ASKED: list[Any] = [
    {"model": "m", "messages": MESSAGES},
    {"model": "m", "messages": MESSAGES, "stream": True, "user": SESSION},
    {"model": "m", "messages": MESSAGES, "stream": True, "temperature": 1},
    {"model": "m", "messages": [{"role": "user", "content": PROMPT, "name": "quoted"}]},
    {"model": "m", "messages": [{"role": "user", "content": PROMPT, "name": "refused"}]},
    {"model": "m", "messages": [{"role": "user", "content": PROMPT, "name": "nonsense"}]},
    {"model": "unknown", "messages": MESSAGES},
    {"model": 7, "messages": MESSAGES},
    {"model": "m", "messages": PROMPT},
    {"model": "m", "messages": [{"role": PROMPT, "content": {"text": PROMPT}}]},
    PROMPT,
]


def script(connection: Connection, request: Request) -> None:
    """Answers, breaks, and quotes what it was sent in its errors."""
    asked = json.loads(request[2])
    name = asked["messages"][0].get("name")
    quoted = json.dumps({"error": {"message": f"cannot do {PROMPT} with {request[1].get(b'authorization')!r}"}}).encode()
    if name == "quoted":
        connection.answer(quoted, b"500 " + PROMPT.encode())
    elif name == "refused":
        connection.answer(quoted, b"400 Bad")
    elif name == "nonsense":
        connection.send(b"HTTP/9 " + PROMPT.encode() + b"\r\nAuthorization: " + BACKEND_KEY.encode() + b"\r\n\r\n")
        connection.close()
    elif asked.get("stream"):
        connection.start_stream()
        connection.chunk(event(ANSWER))
        if "temperature" in asked:
            connection.reset()
        else:
            connection.chunk(event("", "stop") + DONE)
            connection.chunk(b"")
    else:
        connection.answer(completion(ANSWER))


@contextmanager
def planted(directory: Path, style: str) -> Iterator[tuple[Running, Collector]]:
    (directory / ".env").write_text(f"GATEWAY_BACKEND_API_KEY={BACKEND_KEY}\n")
    more = {"OTEL_EXPORTER_OTLP_HEADERS": f"x-key={COLLECTOR_KEY}", "GATEWAY_BREAKER_FAILURES": "1000"}
    with collector() as receiver, backend(script) as server:
        (directory / "gateway.toml").write_text(table("a", server.url))
        options = ["--config", "gateway.toml", "--log-format", style]
        with Running(directory, *options, **receiver.environment(**more)) as running:
            until(running, "healthy", "a")
            yield running, receiver
        assert server.posts[0][1][b"authorization"].decode() == f"Bearer {BACKEND_KEY}"  # it is in use
    assert receiver.requests[0][1]["x-key"] == COLLECTOR_KEY


def absent(secrets: list[str], text: str | bytes, where: str) -> None:
    for secret in secrets:
        assert secret.encode() not in (text.encode() if isinstance(text, str) else text), f"{secret} in {where}"


def get(running: Running, path: str, **headers: str) -> bytes:
    client = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
    client.request("GET", path, headers={**HEADERS, **headers})
    body = client.getresponse().read()
    client.close()
    return body


@pytest.mark.parametrize("style", ["text", "json"])
def test_nothing_planted_comes_out_anywhere(tmp_path: Path, style: str) -> None:
    with planted(tmp_path, style) as (running, receiver):
        for body in ASKED:
            for path in (
                "/v1/chat/completions",
                f"/v1/chat/completions?key={QUERY}",
                f"/nowhere?key={QUERY}",
                "/admin/explain",
            ):
                reply = ask(running, body, path, **HEADERS)
                absent([*KEYS, QUERY, SESSION], reply.body, f"an answer of {path}")
                absent(EVERYTHING, json.dumps(reply.headers), "an answer's headers")
        for path in (f"/v1/models?key={QUERY}", f"/nowhere?key={QUERY}", "/healthz", "/readyz", f"/v1/models/x?{QUERY}"):
            absent(EVERYTHING, get(running, path), path)
        raw = running.connect()
        raw.sendall(f"POST /v1/chat/completions?{QUERY} HTTP/1.1\r\nAuthorization: {CLIENT_KEY}\r\nBad Header\r\n\r\n".encode())
        absent(EVERYTHING, raw.recv(65536), "a refusal")
        raw.close()
        for accept in ("application/json", "text/plain", "application/openmetrics-text"):
            absent(EVERYTHING, get(running, "/metrics", Accept=accept), f"metrics as {accept}")
        wait_for(lambda: len(receiver.spans) > 3 * len(ASKED))
    assert running.lines().count("route") > 4 * len(ASKED)
    absent(EVERYTHING, running.lines(), f"the log as {style}")
    assert len(receiver.raw) > 1
    for body in receiver.raw:
        absent(EVERYTHING, body, "what the collector got")


def test_a_bad_setting_is_named_without_its_value(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as problem:
        with Running(tmp_path, GATEWAY_BACKEND_API_KEY=f"{BACKEND_KEY} with a space"):
            pass
    assert "GATEWAY_BACKEND_API_KEY" in str(problem.value)
    absent([BACKEND_KEY], str(problem.value), "the line that ends the start")
