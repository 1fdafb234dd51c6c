"""HTTP/1.1 as far as a benchmark needs it: requests to send, and a reader that keeps heads and skips bodies."""

from __future__ import annotations

import asyncio
import importlib
import json
import resource
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

PATH = "/v1/chat/completions"
SPARE_FILES = 200
"""Files of a process that are not connections."""

KEY = "sk-1234"
"""What a client of the benchmark calls itself."""


def chat_request(prompt: int, stream: bool, headers: str = "") -> bytes:
    """A whole request with a prompt of so many bytes. ``headers``: more of them, each with its line end."""
    words = ("word " * (prompt // 5 + 1))[:prompt]
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": words}], "max_tokens": 128, "stream": stream})
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    )
    return (head + body).encode()


def status_of(head: bytes) -> int:
    """The status in the head of an answer; 0 if there is none."""
    words = head.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


class Reader:
    """Cuts what a peer sends into messages, and calls with each one's head when its last byte has come.

    Bodies of several MiB are the reason for it: they are counted, never gathered.
    """

    def __init__(self, on_message: Callable[[bytes], None]) -> None:
        self._on_message = on_message
        self._buffer = b""
        self._head: bytes | None = None
        self._chunked = False
        self._skip = 0

    def feed(self, data: bytes) -> None:
        """Take what came; ValueError if it is not HTTP/1.1."""
        self._buffer = self._buffer + data if self._buffer else data
        while self._buffer and self._step():
            pass

    def _step(self) -> bool:
        """One part of a message; False if it has not come whole."""
        if self._skip:
            taken = min(self._skip, len(self._buffer))
            self._buffer = self._buffer[taken:]
            self._skip -= taken
            if not self._skip and not self._chunked:
                self._done()
            return True
        return self._start() if self._head is None else self._chunk()

    def _start(self) -> bool:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return False
        self._buffer = rest
        self._head = head
        lower = head.lower()
        self._chunked = b"\r\ntransfer-encoding: chunked" in lower
        if not self._chunked:
            _, _, length = lower.partition(b"\r\ncontent-length:")
            self._skip = int(length.split(b"\r\n", 1)[0] or 0)
            if not self._skip:
                self._done()
        return True

    def _chunk(self) -> bool:
        size, found, rest = self._buffer.partition(b"\r\n")
        if not found:
            return False
        length = int(size.split(b";", 1)[0], 16)
        if length:
            self._skip = length + 2
        elif len(rest) < 2:
            return False
        else:  # nobody here sends trailers: the empty line follows
            rest = rest[2:]
        self._buffer = rest
        if not length:
            self._done()
        return True

    def _done(self) -> None:
        head, self._head, self._chunked = self._head or b"", None, False
        self._on_message(head)


def allow_files() -> int:
    """As many open files as the system lets this process have; how many connections that makes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10**6 if soft == resource.RLIM_INFINITY else soft - SPARE_FILES


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop if there is one: the less load and backend take, the more is left to the proxy."""
    try:
        factory = importlib.import_module("uvloop").new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)
