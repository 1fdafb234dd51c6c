"""What a request and an event cost, counted in calls of Python functions: the same on every machine.

The whole gateway with its defaults, from the client's bytes to the backend's and back, between two transports in
memory. A change that goes over a bound is to be paid for on purpose: measure it (`make bench`), then raise the bound.
"""

from __future__ import annotations

import gc
import json
import socket
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from types import FrameType, SimpleNamespace
from typing import Any, cast

import pytest
from twisted.internet.testing import StringTransport

from gateway.core.reports import Report
from gateway.core.settings import Source, resolve
from gateway.inherited import NOTHING
from gateway.lifecycle import Lifecycle
from gateway.logs import LineObserver
from gateway.service import Gateway

REQUEST_CALLS = 212
EVENT_CALLS = 14

BODY = b'{"model":"m","messages":[{"role":"user","content":"hello"}]%b}'
ANSWER = json.dumps(
    {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 21, "completion_tokens": 52, "total_tokens": 73},
    }
).encode()
EVENT = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'


class Call:
    """A timer that nobody waits for."""

    def cancel(self) -> None:
        pass

    def active(self) -> bool:
        return True


class Still:
    """A reactor in which no time passes; it hands out the connections that are asked of it."""

    def __init__(self) -> None:
        self.factories: list[Any] = []

    def seconds(self) -> float:
        return 0.0

    def callLater(self, seconds: float, call: Callable[..., object], *args: object) -> Call:
        return Call()

    def getThreadPool(self) -> None:
        pass

    def connectTCP(self, host: str, port: int, factory: Any, timeout: float = 0, bindAddress: object = None) -> object:
        self.factories.append(factory)
        return Call()


class Both:
    """A gateway, a client's connection to it, and its connection to a backend."""

    def __init__(self, listening: socket.socket) -> None:
        self.reactor = Still()
        settings = resolve([Source("test", "file", {"backend_url": "http://127.0.0.1:9", "backend_kind": "openai"})])
        lifecycle = Lifecycle(self.reactor, {}, [], NOTHING, LineObserver(lambda line: None, "text"))
        told = cast(Any, SimpleNamespace(settings=settings, files=list))
        gateway = Gateway(told, self.reactor, {"http": listening}, lifecycle)
        gateway.pool._reported(next(iter(gateway.backends)), Report("openai"))
        self.channel = cast(Any, gateway.server.buildProtocol(None))
        self.client = StringTransport()
        self.channel.makeConnection(self.client)
        self.backend = StringTransport()
        self.connection: Any = None

    def ask(self, more: bytes = b"") -> None:
        """The client sends a request; it is on the backend's connection when this returns."""
        body = BODY % more
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer sk-1\r\nContent-Length: %d\r\n\r\n"
        self.channel.dataReceived(head % len(body) + body)
        if self.connection is None:
            protocol = self.reactor.factories[0].buildProtocol(None)
            protocol.makeConnection(self.backend)
            self.connection = protocol._wrappedProtocol
        assert self.backend.value().endswith(body)

    def answer(self) -> None:
        """The backend answers."""
        head = b"HTTP/1.1 200 OK\r\nServer: s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self.connection.dataReceived(head % len(ANSWER) + ANSWER)
        assert self.client.value().endswith(ANSWER)

    def stream(self) -> None:
        """The backend begins a stream."""
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.connection.dataReceived(head)

    def event(self) -> None:
        """One event of it."""
        self.connection.dataReceived(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
        assert self.client.value().endswith(EVENT + b"\r\n")


@pytest.fixture
def both() -> Iterator[Both]:
    with socket.socket() as listening:
        yield Both(listening)


def calls(what: Callable[[], object]) -> int:
    """How many Python functions are called, not counting those of this module."""
    count = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        if event == "call" and frame.f_code.co_filename != __file__:
            count += 1

    sys.setprofile(profile)
    try:
        what()
    finally:
        sys.setprofile(None)
    return count


def test_a_request_is_answered_within_its_budget(both: Both) -> None:
    def one() -> None:
        both.ask()
        both.answer()

    for _ in range(3):
        one()
    assert calls(one) <= REQUEST_CALLS


def test_an_event_is_passed_on_within_its_budget(both: Both) -> None:
    both.ask(b',"stream":true,"stream_options":{"include_usage":true}')
    both.stream()
    for _ in range(3):
        both.event()
    assert calls(both.event) <= EVENT_CALLS


def test_the_cost_does_not_grow_with_the_number_of_requests(both: Both) -> None:
    def one() -> None:
        both.ask()
        both.answer()

    for _ in range(3):
        one()
    early = calls(one)
    for _ in range(2000):
        both.client.clear()
        both.backend.clear()
        one()
    assert calls(one) <= early


def test_a_stream_that_has_begun_keeps_nothing_of_its_prompt(both: Both) -> None:
    more = b',"user":"%b","stream":true,"stream_options":{"include_usage":true}'

    def begun(size: int) -> int:
        """Bytes that it takes."""
        before, _ = tracemalloc.get_traced_memory()
        both.ask(more % (b"x" * size))
        both.stream()
        both.event()
        both.backend.clear()
        taken = tracemalloc.get_traced_memory()[0] - before
        both.connection.dataReceived(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        return taken

    begun(1)
    tracemalloc.start()
    try:
        assert begun(1_000_000) < 100_000
    finally:
        tracemalloc.stop()


def test_a_request_leaves_nothing_to_the_garbage_collector(both: Both) -> None:
    def plain() -> None:
        both.ask()
        both.answer()

    def streamed() -> None:
        both.ask(b',"stream":true,"stream_options":{"include_usage":true}')
        both.stream()
        both.event()
        both.connection.dataReceived(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    for what in (plain, streamed):
        what()
        gc.collect()
        gc.disable()
        try:
            what()
            assert gc.collect() == 0, what.__name__
        finally:
            gc.enable()
