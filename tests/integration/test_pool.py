"""The pool before real sockets: servers that tell what each kind of model server tells, and a real llama-server."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
import pytest_twisted  # type: ignore[import-untyped]
from twisted.internet.task import deferLater

from gateway.backend import HTTPBackend
from gateway.core.backend_settings import BackendSettings
from gateway.core.settings import Settings
from gateway.core.status import BackendState, Offer
from gateway.exchange import Timeouts
from gateway.net.agent import Agent, BackendClient
from gateway.pool import Pool

from .processes import PATIENCE, Running, free_port, llama_process, wait_for

Pages = dict[str, Any]
Coroutine = TypeVar("Coroutine", bound=Callable[..., Any])
on_the_reactor: Callable[[Coroutine], Coroutine] = pytest_twisted.ensureDeferred


def listing(*ids: str, owned_by: str = "somebody") -> Pages:
    return {"/v1/models": {"object": "list", "data": [{"id": id, "object": "model", "owned_by": owned_by} for id in ids]}}


KINDS: dict[str, Pages] = {
    "llamacpp": listing("m", owned_by="llamacpp")
    | {
        "/health": {"status": "ok"},
        "/props": {"total_slots": 4, "default_generation_settings": {"n_ctx": 1024}},
        "/slots": [{"is_processing": number < 3} for number in range(4)],
    },
    "vllm": listing("m", owned_by="vllm")
    | {
        "/health": b"",
        "/metrics": b'vllm:num_requests_running{a="b"} 3\nvllm:num_requests_waiting{a="b"} 2\n'
        b'vllm:kv_cache_usage_perc{a="b"} 0.5\nvllm:cache_config_info{block_size="16",num_gpu_blocks="256"} 1\n',
    },
    "sglang": listing("m", owned_by="sglang")
    | {
        "/get_server_info": {"max_total_num_tokens": 4096, "internal_states": [{"effective_max_running_requests_per_dp": 4}]},
        "/get_load": [{"dp_rank": 0, "num_reqs": 5, "num_waiting_reqs": 2}],
    },
    "ollama": listing("m", owned_by="library") | {"/api/version": {"version": "0.9.0"}},
    "tgi": {
        "/health": b"",
        "/info": {"model_id": "m", "max_concurrent_requests": 128, "max_batch_total_tokens": 4096},
        "/metrics": b"tgi_batch_current_size 3\ntgi_queue_size 2\n",
    },
    "openai": listing("m"),
}
"""What is told: 4 slots (if slots are), 4096 tokens, 3 running, 2 waiting."""


class Threads(ThreadingHTTPServer):
    """A client that leaves in the middle, as a pool that stops does, is no news."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class ModelServer:
    """Answers GET with its pages, one a connection, in threads; a page that is a number is a status. Counts what else
    comes."""

    def __init__(self, pages: Pages, port: int = 0) -> None:
        self.pages = pages
        self.calls_itself = "test"
        self.asked: list[str] = []
        self.posts = 0
        server = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                page = server.pages.get(self.path, 404)
                body = page if isinstance(page, bytes) else json.dumps(page).encode()
                self.send_response(page if isinstance(page, int) else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                server.posts += 1
                self.send_error(500)

            def version_string(self) -> str:
                return server.calls_itself

            def log_message(self, *_: object) -> None:
                pass

        self._http = Threads(("127.0.0.1", port), Answer)
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=[0.02])
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def serving(pages: Pages, port: int = 0) -> Iterator[ModelServer]:
    server = ModelServer(pages, port)
    try:
        yield server
    finally:
        server.stop()


class Looking:
    """A pool on the real reactor that looks often at one server."""

    def __init__(self, url: str, **more: Any) -> None:
        from twisted.internet import reactor

        self._reactor: Any = reactor
        self._agent = Agent(reactor, 5.0)
        own = BackendSettings(name="b", url=url)
        client = BackendClient(self._agent)
        backend = HTTPBackend("b", url, client, self._reactor, Timeouts(60.0, 60.0, 0.0), **more)
        settings = Settings(backends=(own,), probe_interval=0.05, probe_down=1, breaker_open=0.1)
        self.pool = Pool([backend], settings, self._reactor)
        self.offers: list[Offer] = []
        self.pool.watch(self.offers.append)
        self.pool.startService()

    async def until(self, true: Callable[[BackendState], object]) -> BackendState:
        """The state of the backend, once it is such."""
        for _ in range(int(PATIENCE / 0.02)):
            state = self.pool.snapshot()[0]
            if true(state):
                return state
            await deferLater(self._reactor, 0.02)
        raise AssertionError(f"waited in vain: {state}")

    async def stop(self) -> None:
        self.pool.stopService()
        self._agent.close()
        await deferLater(self._reactor, 0.0)


Test = Callable[[Looking], Any]


async def look_at(url: str, test: Test, **more: Any) -> None:
    looking = Looking(url, **more)
    try:
        await test(looking)
    finally:
        await looking.stop()


@pytest.mark.parametrize("kind", KINDS)
@on_the_reactor
async def test_each_kind_is_found_out_and_tells_what_it_has_without_a_generation(kind: str) -> None:
    with serving(KINDS[kind]) as server:

        async def test(looking: Looking) -> None:
            state = await looking.until(lambda state: state.state != "warming" and len(server.asked) > 20)
            told = state.load
            assert (state.kind, state.state, state.models) == (kind, "healthy", frozenset({"m"}))
            assert state.slots == (4 if kind in ("llamacpp", "sglang") else None)
            assert state.kv_tokens == (4096 if kind not in ("ollama", "openai") else None)
            assert (told and told.running) == (3 if kind not in ("ollama", "openai") else None)
            assert (told and told.waiting) == (2 if kind in ("vllm", "sglang", "tgi") else 0 if kind == "llamacpp" else None)

        await look_at(server.url, test)
        assert server.posts == 0
        assert kind != "sglang" or "/health" not in server.asked  # there it is a generation


@on_the_reactor
async def test_a_server_that_refuses_loads_fails_and_comes_back_is_followed() -> None:
    port = free_port()

    async def test(looking: Looking) -> None:
        await looking.until(lambda state: state.state == "unhealthy" and "backend_unreachable" in state.reason)
        with serving({"/v1/models": 503, "/health": 503}, port) as server:
            server.calls_itself = "llama.cpp"
            await looking.until(lambda state: state.state == "warming")
            server.pages = KINDS["llamacpp"]
            state = await looking.until(lambda state: state.state == "healthy")
            assert (state.slots, state.restarts) == (4, 0)
            server.pages = {**server.pages, "/slots": [{"is_processing": True}] * 4}
            assert (await looking.until(lambda state: state.state == "busy")).load.running == 4  # type: ignore[union-attr]
            assert looking.offers[-1].accepting
            server.pages = {"/health": 500}
            state = await looking.until(lambda state: state.state == "unhealthy")
            assert "500" in state.reason
            server.pages = KINDS["llamacpp"]
            assert (await looking.until(lambda state: state.state == "healthy")).restarts == 0
        await looking.until(lambda state: state.state == "unhealthy")
        with serving(listing("other", owned_by="vllm") | {"/health": b""}, port):
            state = await looking.until(lambda state: state.state == "healthy")
            assert (state.kind, state.models, state.restarts) == ("vllm", frozenset({"other"}), 1)

    await look_at(f"http://127.0.0.1:{port}", test)


@on_the_reactor
async def test_a_quick_restart_between_two_looks_shows_in_what_has_changed() -> None:
    with serving(KINDS["vllm"] | {"/metrics": KINDS["vllm"]["/metrics"] + b"process_start_time_seconds 5\n"}) as server:

        async def test(looking: Looking) -> None:
            await looking.until(lambda state: state.state == "healthy")
            server.pages = {**server.pages, "/metrics": KINDS["vllm"]["/metrics"] + b"process_start_time_seconds 6\n"}
            await looking.until(lambda state: state.restarts == 1)
            assert looking.offers[-1].restarts == 1

        await look_at(server.url, test)


@on_the_reactor
async def test_a_real_llama_server_tells_its_slots_and_its_load(llama: str) -> None:
    async def test(looking: Looking) -> None:
        state = await looking.until(lambda state: state.state == "healthy" and state.load is not None)
        assert (state.kind, state.slots, state.kv_tokens, state.models) == ("llamacpp", 2, 8192, frozenset({"tiny"}))
        assert state.load is not None
        assert (state.load.running, state.load.waiting) == (0, 0)

    await look_at(llama, test)


@on_the_reactor
async def test_a_real_llama_server_without_its_key_is_an_error_of_the_settings(tiny_model: Path, tmp_path: Path) -> None:
    port = free_port()

    async def refused(looking: Looking) -> None:
        state = await looking.until(lambda state: state.state == "config_error")
        assert "401" in state.reason
        assert not looking.offers[-1].accepting

    async def right(looking: Looking) -> None:
        state = await looking.until(lambda state: state.load is not None)
        assert (state.state, state.slots) == ("healthy", 2)

    with llama_process(tmp_path, tiny_model, "--api-key", "right", "--metrics", port=port):
        await look_at(f"http://127.0.0.1:{port}", refused)
        await look_at(f"http://127.0.0.1:{port}", refused, api_key="wrong")
        await look_at(f"http://127.0.0.1:{port}", right, api_key="right")


def test_the_daemon_takes_several_backends_and_shows_each(tmp_path: Path) -> None:
    with serving(KINDS["vllm"]) as first, serving(KINDS["tgi"]) as second:
        tables = f'[[backends]]\nurl = "{first.url}"\nname = "first"\n[[backends]]\nurl = "{second.url}"\nname = "second"\n'
        (tmp_path / "gateway.toml").write_text(
            f"{tables}[[backends]]\nurl = 'http://127.0.0.1:{free_port()}'\nname = 'third'\n"
        )
        with Running(tmp_path, "--config", "gateway.toml", "--probe-interval", "100ms") as gateway:
            expected = [("first", "vllm", "healthy"), ("second", "tgi", "healthy"), ("third", "openai", "unhealthy")]

            def shown() -> bool:
                seen = gateway.get("/metrics")[1]["backends"]
                return [(one["name"], one["kind"], one["state"]) for one in seen] == expected

            wait_for(shown)
            assert gateway.get("/readyz")[0] == 200
            log = gateway.lines()
            assert log.count("backend first is healthy (vllm)") == log.count("backend third is unhealthy") == 1
