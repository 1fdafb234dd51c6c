"""The server's channel on a stopped clock."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.web.resource import Resource

from gateway.net import channel as channel_module
from gateway.net.channel import Channel, Limits
from gateway.net.reader import Message, Reader
from gateway.net.server import Server

IDLE = 60.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def channel(clock: Clock) -> Iterator[Channel]:
    limits = Limits(max_body=1000, max_connections=10, client_timeout=60.0, idle_timeout=IDLE)
    server = Server(Resource(), limits, clock, lambda refusal: "id")
    made: Any = server.buildProtocol(None)
    made.makeConnection(StringTransport())
    made.setTimeout(None)
    yield made
    made.connectionLost()
    assert not clock.getDelayedCalls()


def acknowledging(monkeypatch: pytest.MonkeyPatch, *counts: int) -> None:
    """Let the client's machine have taken so many bytes at each look."""
    told = iter(counts)
    monkeypatch.setattr(channel_module, "_acknowledged", lambda transport: next(told))


def test_a_reader_that_is_slow_but_reads_is_waited_for(channel: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    acknowledging(monkeypatch, 10, 20, 20, 30, 30)
    channel.pauseProducing()
    clock.advance(IDLE)
    clock.advance(IDLE)
    assert not channel.transport.disconnected
    channel.resumeProducing()
    clock.advance(10 * IDLE)
    assert not channel.transport.disconnected


def test_a_reader_that_takes_nothing_for_the_idle_timeout_is_let_go(
    channel: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    acknowledging(monkeypatch, 10, 20, 20, 20)
    channel.pauseProducing()
    clock.advance(IDLE)
    clock.advance(IDLE)
    assert channel.transport.disconnected


def test_a_closing_connection_is_watched_too(channel: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """After loseConnection nobody pauses the channel any more, however full its buffer is."""
    acknowledging(monkeypatch, 10, 10)
    channel.loseConnection()
    assert not channel.transport.disconnected
    clock.advance(IDLE)
    assert channel.transport.disconnected


def test_a_body_of_tiny_chunks_takes_little_more_memory_than_its_length() -> None:
    reader = Reader(Limits(max_body=10_000_000, max_connections=10, client_timeout=60.0, idle_timeout=IDLE), {})
    reader.feed(b"POST / HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = b"2\r\nab\r\n" * 1000
    tracemalloc.start()
    for _ in range(100):
        reader.feed(piece)
    reader.feed(b"0\r\n\r\n")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = reader.ready.pop(0)
    assert isinstance(message, Message)
    assert message.body == b"ab" * 100_000
    assert most < 3 * len(message.body)
