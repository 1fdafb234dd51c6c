from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import top
from gateway.cli import main
from gateway.core.live import Live
from gateway.core.look import Snapshot
from gateway.core.status import BackendState, Status
from gateway.core.view import ErrorView, RequestView, TenantView, View, view
from gateway.remote import NotTold
from gateway.top import fetch, screen, sparkline

EVIL = "\x1b]0;gone\x07\x1b[2J\u202e\r\nname"


def picture(*backends: BackendState) -> View:
    scheduling = Snapshot({"interactive": 0, "default": 2, "batch": 0}, 10, {"a100": 3}, {}, 0, 0, {}, {})
    status = Status(scheduling, 3, 0, False, list(backends) or [BackendState("a100", "vllm", "healthy", "", 0.0, slots=4)])
    return view(Live(0.0), status, 100.0, version="1.2", policy="least-load")


TEXTS = ("id", "route", "tenant", "model", "backend", "decision", "code", "fault")


def request(**more: Any) -> RequestView:
    fields: dict[str, Any] = dict.fromkeys(RequestView.__struct_fields__, 0) | dict.fromkeys(TEXTS, "x")
    return RequestView(**(fields | {"first_token": None, "stream": False} | more))


def test_it_shows_backends_queue_and_requests() -> None:
    seen = picture()
    seen.latest = [
        request(status=502, tenant="acme", model="m", backend="a100", code="backend_error", fault="backend", total=1.25)
    ]
    seen.tenants = [TenantView("acme", 2, 9, 70)]
    seen.errors = [ErrorView("backend", "backend_error", 1)]
    text = "\n".join(screen(seen, 120, colours=False))
    for part in (
        "1.2",
        "least-load",
        "a100",
        "healthy",
        "3/4",
        "default 2",
        "acme 2/9",
        "backend:backend_error 1",
        "502",
        "1.2 s",
    ):
        assert part in text
    assert "\x1b" not in text


def test_with_no_requests_it_says_so() -> None:
    assert "no requests yet" in screen(picture(), 80, colours=False)


@given(st.integers(0, 300), st.text(max_size=200), st.booleans())
def test_no_line_is_wider_than_the_terminal_and_no_name_moves_it(width: int, name: str, colours: bool) -> None:
    seen = picture(*[BackendState(name + EVIL, "vllm", "unhealthy", name + EVIL, 0.0)] * 2)
    seen.latest = [request(tenant=EVIL + name, model=name + EVIL, backend=name, decision=EVIL, code="")] * 3
    seen.tenants = [TenantView(name + EVIL, 1, 2, 3)]
    seen.policy = EVIL
    for line in screen(seen, width, colours=colours):
        bare = line
        if line.startswith("\x1b["):
            start, end = line.index("m") + 1, len(line) - len("\x1b[0m")
            assert line[2 : start - 1].isdigit()
            assert line[end:] == "\x1b[0m"
            bare = line[start:end]
        assert bare.isprintable()
        assert len(bare) <= max(width, top.NARROWEST)


def test_a_sparkline_shows_the_last_numbers_and_gaps() -> None:
    assert sparkline([9, 9, 0.0, None, 0.5, 1.0], 4) == "▁ ▅█"
    assert sparkline([], 5) == ""
    assert sparkline([0.0, 0.0], 5) == "▁▁"


@contextmanager
def serving(status: int, body: bytes) -> Iterator[tuple[str, list[str | None]]]:
    """A gateway that says one thing; its URL, and the keys that it was sent."""
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/dashboard/state"
            keys.append(self.headers["Authorization"])
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", keys
        finally:
            server.shutdown()
            thread.join()


def test_where_nobody_watches_it_prints_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_ADMIN_KEY", "gw-boss")
    monkeypatch.setenv("COLUMNS", "100")
    with serving(200, msgspec.json.encode(picture())) as (url, keys):
        main(["top", "--url", url + "/"])
    out = capsys.readouterr().out
    assert "a100" in out
    assert "\x1b" not in out
    assert keys == ["Bearer gw-boss"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_it_goes_on_until_it_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("time.sleep", wait)
    with serving(200, msgspec.json.encode(picture())) as (url, keys):
        top.run(url, "", once=False)
    shown = terminal.getvalue()
    assert len(keys) == 3
    assert keys[0] is None
    assert shown.count("inference-gateway 1.2") == 3
    assert shown.endswith("\x1b[?7h\x1b[?25h\x1b[?1049l")


def test_a_gateway_that_goes_away_is_said_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures: list[View | NotTold] = [picture(), NotTold("refused"), picture()]
    waits: list[float] = []

    def fetched(url: str, key: str) -> View:
        if not pictures:
            raise KeyboardInterrupt
        found = pictures.pop(0)
        if isinstance(found, NotTold):
            raise found
        return found

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(top, "fetch", fetched)
    top.run("http://g", "", once=False)
    screens = terminal.getvalue().split("\x1b[H\x1b[J")[1:]
    assert ["no longer connected: refused" in one for one in screens] == [False, True, False]
    assert all("a100" in one for one in screens)
    assert len(waits) == 3


@pytest.mark.parametrize(
    ("status", "words"), [(401, "GATEWAY_ADMIN_KEY"), (403, "admin"), (404, "GATEWAY_ADMIN"), (500, "500")]
)
def test_a_refusal_is_one_line(status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(status, b"{}") as (url, _), pytest.raises(SystemExit) as ended:
        main(["top", "--url", url, "--once"])
    assert words in str(ended.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("body", [b"<html>", json.dumps({"version": "1"}).encode(), b"[]", b"\xff"])
def test_what_is_no_picture_is_an_error(body: bytes) -> None:
    with serving(200, body) as (url, _), pytest.raises(NotTold, match=url):
        fetch(url, "")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nothing", "ftp://127.0.0.1/"])
def test_a_gateway_that_is_not_there_is_an_error(url: str) -> None:
    with pytest.raises(NotTold):
        fetch(url, "")
