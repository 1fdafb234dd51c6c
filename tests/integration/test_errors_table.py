"""docs/errors.md, case by case: each code that the process can give is provoked here, through the whole of it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gateway.core.errors import CODES

from .asking import STREAM, answers, ask, fails, metric, table
from .backends import Connection, backend
from .processes import PATIENCE, Running, clean_environment, free_port, wait_for

POST = "POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\n"
HELLO = b'{"messages":[{"role":"user","content":"x"}]}'


class Told(NamedTuple):
    """What a client was told."""

    status: int
    code: str
    type: str


def raw(gateway: Running, request: bytes) -> Told:
    """The answer to these bytes."""
    with gateway.connect() as client:
        client.sendall(request)
        response = b""
        while b"\r\n\r\n" not in response or not response.endswith(b"}"):
            data = client.recv(65536)
            assert data, response
            response += data
    head, _, body = response.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    return Told(int(head.split()[1]), error["code"], error["type"])


def post(gateway: Running, body: Any, **headers: str) -> Told:
    reply = ask(gateway, body, **headers)
    error = json.loads(reply.body)["error"]
    return Told(reply.status, error["code"], error["type"])


def sized(body: bytes, more: str = "") -> bytes:
    return f"{POST}{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


def to_echo(tmp_path: Path, request: bytes, *options: str) -> Told:
    with Running(tmp_path, *options) as gateway:
        return raw(gateway, request)


def to_script(tmp_path: Path, script: Callable[[Connection, Any], None], *options: str, body: Any = None) -> Told:
    with (
        backend(script) as server,
        Running(tmp_path, *options, BACKEND_URL=server.url, GATEWAY_BACKEND_KIND="openai") as gateway,
    ):
        return post(gateway, body or {"messages": [{"role": "user", "content": "x"}]})


def silent(connection: Connection, _: object) -> None:
    connection.gone()


def half(connection: Connection, _: object) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{")
    connection.gone()


def no_http(connection: Connection, _: object) -> None:
    connection.send(b"gibberish\r\n\r\n")
    connection.close()


def crowded(tmp_path: Path, *options: str) -> Told:
    """What a second request is told while one holds the only slot."""
    with backend(silent) as server:
        (tmp_path / "g.toml").write_text(table("one", server.url, slots=1))
        with Running(tmp_path, "--config", "g.toml", *options) as gateway:
            wait_for(lambda: gateway.get("/readyz")[0] == 200)
            with gateway.connect() as first:
                first.sendall(sized(HELLO))
                wait_for(lambda: server.posts)
                return post(gateway, STREAM)


def draining(tmp_path: Path) -> Told:
    import signal

    with backend(silent) as server, Running(tmp_path, BACKEND_URL=server.url, GATEWAY_BACKEND_KIND="openai") as gateway:
        with gateway.connect() as client:
            client.sendall(sized(HELLO))
            wait_for(lambda: server.posts)
            with gateway.connect() as second:
                second.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: %d\r\n\r\n{" % len(HELLO))
                wait_for(lambda: metric(gateway, "gateway_connections") >= 2)
                gateway.process.send_signal(signal.SIGTERM)
                wait_for(lambda: "stopping" in gateway.lines())
                second.sendall(HELLO[1:])
                response = second.recv(65536)
            gateway.process.send_signal(signal.SIGTERM)
    error = json.loads(response.partition(b"\r\n\r\n")[2])["error"]
    return Told(int(response.split()[1]), error["code"], error["type"])


def no_backend(tmp_path: Path) -> Told:
    with backend(answers) as server:
        (tmp_path / "g.toml").write_text(table("one", server.url))
        with Running(tmp_path, "--config", "g.toml") as gateway:
            wait_for(lambda: gateway.get("/readyz")[0] == 200)
            assert ask(gateway, {"draining": True}, "/admin/backends/one").status == 200
            return post(gateway, {"messages": [{"role": "user", "content": "x"}], "model": "m"})


def unknown_model(tmp_path: Path) -> Told:
    with backend(answers) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway:
        wait_for(lambda: gateway.get("/readyz")[0] == 200)
        return post(gateway, {"messages": [{"role": "user", "content": "x"}], "model": "none"})


def connect_timeout(tmp_path: Path) -> Told:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(8)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        url = f"http://127.0.0.1:{port}"
        try:
            with Running(tmp_path, "--connect-timeout", "300ms", BACKEND_URL=url, GATEWAY_BACKEND_KIND="openai") as gateway:
                return post(gateway, {"messages": [{"role": "user", "content": "x"}]})
        finally:
            for one in waiting:
                one.close()


def unreachable(tmp_path: Path) -> Told:
    with Running(tmp_path, BACKEND_URL=f"http://127.0.0.1:{free_port()}", GATEWAY_BACKEND_KIND="openai") as gateway:
        return post(gateway, {"messages": [{"role": "user", "content": "x"}]})


def too_long(tmp_path: Path) -> Told:
    with (
        backend(answers, models=("m",), window=1000) as server,
        Running(tmp_path, "--count-tokens", "true", BACKEND_URL=server.url, GATEWAY_BACKEND_KIND="vllm") as gateway,
    ):
        wait_for(lambda: gateway.get("/readyz")[0] == 200)
        told = post(gateway, {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1000})
        assert not server.posts
    return told


def add_key(tmp_path: Path, *options: str) -> str:
    """A new key of a keys file, made by the command."""
    command = [sys.executable, "-m", "gateway.cli", "keys", "add", "--keys", "keys.toml", "--tenant", "t", *options]
    made = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=True)
    return made.stdout.strip()


def keyed(tmp_path: Path, *options: str, **headers: str) -> Told:
    """What a request is told that comes with a key, or with none."""
    key = add_key(tmp_path, *options)
    with Running(tmp_path, "--keys", "keys.toml") as gateway:
        headers = headers or ({"authorization": f"Bearer {key}"} if options else {})
        return post(gateway, {"messages": [{"role": "user", "content": "x"}], "model": "echo"}, **headers)


def admin_required(tmp_path: Path) -> Told:
    key = add_key(tmp_path)
    with Running(tmp_path, "--keys", "keys.toml") as gateway:
        reply = ask(gateway, {"draining": True}, "/admin/backends/echo", authorization=f"Bearer {key}")
        error = json.loads(reply.body)["error"]
        return Told(reply.status, error["code"], error["type"])


def rate_limited(tmp_path: Path) -> Told:
    """What the second request of a key is told that may send one a minute."""
    key = add_key(tmp_path, "--rpm", "1")
    with Running(tmp_path, "--keys", "keys.toml") as gateway:
        asked = {"messages": [{"role": "user", "content": "x"}]}
        assert ask(gateway, asked, authorization=f"Bearer {key}").status == 200
        return post(gateway, asked, authorization=f"Bearer {key}")


def limits_unavailable(tmp_path: Path) -> Told:
    away = f"redis://127.0.0.1:{free_port()}"
    with Running(tmp_path, "--limit-requests", "5", "--limits-fail", "closed", GATEWAY_REDIS_URL=away) as gateway:
        return post(gateway, {"messages": [{"role": "user", "content": "x"}]})


CASES: dict[str, Callable[[Path], Told]] = {
    "invalid_json": lambda path: to_echo(path, sized(b"{")),
    "missing_required_parameter": lambda path: to_echo(path, sized(b"{}")),
    "invalid_type": lambda path: to_echo(path, sized(b'{"messages":5}')),
    "invalid_value": lambda path: to_echo(path, sized(b'{"messages":[]}')),
    "context_length_exceeded": too_long,
    "unknown_parameter": lambda path: to_echo(path, sized(HELLO[:-1] + b',"top_k":5}'), "--validation", "strict"),
    "missing_api_key": keyed,
    "invalid_api_key": lambda path: keyed(path, authorization="Bearer gw-nobody"),
    "model_not_allowed": lambda path: keyed(path, "--models", "other"),
    "admin_required": admin_required,
    "rate_limit_exceeded": rate_limited,
    "insufficient_quota": lambda path: keyed(path, "--budget", "10 tokens/month"),
    "limits_unavailable": limits_unavailable,
    "bad_http": lambda path: to_echo(path, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    "model_not_found": unknown_model,
    "unknown_url": lambda path: to_echo(path, b"GET /nope HTTP/1.1\r\nHost: g\r\n\r\n"),
    "method_not_allowed": lambda path: to_echo(path, b"GET /v1/embeddings HTTP/1.1\r\nHost: g\r\n\r\n"),
    "request_timeout": lambda path: to_echo(path, sized(HELLO)[:-5], "--client-timeout", "300ms"),
    "request_too_large": lambda path: to_echo(path, f"{POST}Content-Length: 2000\r\n\r\n".encode(), "--max-body", "1024"),
    "unsupported_media_type": lambda path: to_echo(path, sized(HELLO, "Content-Encoding: gzip\r\n")),
    "headers_too_large": lambda path: to_echo(path, f"GET / HTTP/1.1\r\nHost: g\r\nX: {'x' * 200_000}\r\n\r\n".encode()),
    "queue_full": lambda path: crowded(path, "--queue-requests", "0"),
    "queue_timeout": lambda path: crowded(path, "--queue-timeout", "300ms"),
    "draining": draining,
    "no_backend": no_backend,
    "backend_unreachable": unreachable,
    "backend_error": lambda path: to_script(path, fails),
    "backend_protocol_error": lambda path: to_script(path, no_http),
    "connect_timeout": connect_timeout,
    "first_byte_timeout": lambda path: to_script(path, silent, "--first-byte-timeout", "300ms"),
    "idle_timeout": lambda path: to_script(path, half, "--idle-timeout", "300ms"),
    "total_timeout": lambda path: to_script(path, silent, "--total-timeout", "300ms"),
}

ELSEWHERE = {
    "too_many_viewers": "more watch the dashboard than may: test_dashboard.py has them",
    "no_signing_keys": "an issuer that never answers: test_auth.py has one",
    "internal_error": "a bug, which a running gateway cannot be asked for: test_app.py makes one",
    "rejected_by_backend": "nobody is told it: test_the_log_has_what_no_client_is_told",
    "client_cancelled": "nobody is told it: test_the_log_has_what_no_client_is_told",
}
"""Codes without a case of their own here, and why."""


def test_every_code_has_a_case() -> None:
    assert set(CASES) | set(ELSEWHERE) == set(CODES)
    assert not set(CASES) & set(ELSEWHERE)


def test_every_code_has_a_row_in_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs/errors.md").read_text()
    assert set(re.findall(r"^\| \d+ \| \w+ \| (\w+) \|", text, re.M)) == set(CODES)


@pytest.mark.parametrize("code", CASES)
def test_what_the_table_says_happens(code: str, tmp_path: Path) -> None:
    assert CASES[code](tmp_path) == Told(CODES[code].status, code, CODES[code].type)


def test_the_log_has_what_no_client_is_told(tmp_path: Path) -> None:
    def script(connection: Connection, request: tuple[bytes, dict[bytes, bytes], bytes]) -> None:
        if b"refuse" in request[2]:
            connection.answer(b'{"error":{"message":"no"}}', b"422 No")
        else:
            connection.gone()

    with (
        backend(script) as server,
        Running(tmp_path, "--log-format", "json", BACKEND_URL=server.url, GATEWAY_BACKEND_KIND="openai") as gateway,
    ):
        refused = {"messages": [{"role": "user", "content": "refuse"}]}
        assert ask(gateway, refused, x_request_id="refused").status == 422
        assert gateway.access("refused")["code"] == "rejected_by_backend"
        with gateway.connect() as client:
            client.settimeout(PATIENCE)
            client.sendall(sized(HELLO, "X-Request-ID: gone\r\n"))
            wait_for(lambda: len(server.posts) == 2)
        assert gateway.access("gone")["code"] == "client_cancelled"
