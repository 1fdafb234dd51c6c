from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock

from gateway.net.reactor import AT_ONCE, Reactor, adopt
from gateway.net.shares import LEAVE_SECONDS, MORE, Shares, is_gone, shared_file


@pytest.fixture
def file_of_three() -> Iterator[int]:
    file = shared_file(3)
    yield file
    os.close(file)


@pytest.fixture
def three(file_of_three: int) -> list[Shares]:
    return [Shares(file_of_three, 3, number) for number in range(3)]


def test_who_has_more_than_another_leaves_it_the_next(three: list[Shares]) -> None:
    for one, connections in zip(three, (0, MORE, MORE + 1), strict=True):
        one.tell(connections)
    assert [one.is_ahead() for one in three] == [False, False, True]


def test_among_many_a_few_more_do_not_matter(three: list[Shares]) -> None:
    for one, connections in zip(three, (800, 900, 902), strict=True):
        one.tell(connections)
    assert [one.is_ahead() for one in three] == [False, False, True]


def test_nothing_is_left_to_one_that_is_gone(three: list[Shares], file_of_three: int) -> None:
    first, second, third = three
    first.tell(500)
    assert not first.is_ahead()  # the others have not begun
    second.tell(0)
    third.tell(499)
    assert first.is_ahead()
    is_gone(file_of_three, 1)
    assert not first.is_ahead()


def test_one_that_leaves_leaves_all_to_the_others_as_long_as_there_are_any(three: list[Shares], file_of_three: int) -> None:
    first, second, third = three
    for one in three:
        one.tell(5)
    first.leave()
    first.tell(0)  # its connections end
    assert first.is_ahead()
    assert first.leaves_all()
    assert not second.is_ahead()
    assert not second.leaves_all()
    second.leave()
    assert first.leaves_all()
    is_gone(file_of_three, 2)
    assert not first.is_ahead()
    assert not first.leaves_all()
    third.tell(0)  # its successor
    assert first.leaves_all()


# --- a port


class Still(Clock):
    """A reactor in which a test says what is there to be read, and what time it is."""

    adoptStreamPort = Reactor.adoptStreamPort

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.addReader = self.readers.add
        self.removeReader = self.readers.discard
        self.removeWriter = self.readers.discard


class Listening:
    """A port of the first of two workers, and what has come in by it."""

    def __init__(self, stack: ExitStack) -> None:
        file = shared_file(2)
        stack.callback(os.close, file)
        self.own, self.other = Shares(file, 2, 0), Shares(file, 2, 1)
        self.reactor = Still()
        self.taken = 0
        self._socket = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._socket.setblocking(False)
        self._stack = stack
        self.port: Any = adopt(self.reactor, self._socket, Factory.forProtocol(self._made), self.own)
        stack.callback(self._close)

    def _made(self) -> Protocol:
        self.taken += 1
        return Protocol()

    def _close(self) -> None:
        for one in self.reactor.readers - {self.port}:
            one.socket.close()
        if self.port.connected:
            self.port.connectionLost(None)

    @property
    def reads(self) -> bool:
        return self.port in self.reactor.readers

    def come(self, count: int) -> None:
        """So many connections, and the reactor says so."""
        for _ in range(count):
            self._stack.enter_context(socket.create_connection(self._socket.getsockname()))
        self.again()

    def again(self) -> None:
        """There are still some."""
        assert self.reads
        self.port.doRead()


@pytest.fixture
def listening() -> Iterator[Listening]:
    with ExitStack() as stack:
        yield Listening(stack)


def test_few_are_taken_at_a_time_so_that_others_get_some(listening: Listening) -> None:
    listening.own.tell(0)
    listening.other.tell(0)
    listening.come(2 * AT_ONCE)
    assert listening.taken == AT_ONCE
    assert listening.reads
    listening.again()
    assert listening.taken == 2 * AT_ONCE


def test_who_is_ahead_takes_what_the_other_has_left_for_so_long(listening: Listening) -> None:
    listening.own.tell(10)
    listening.other.tell(0)
    listening.come(1)
    assert not listening.reads
    listening.reactor.advance(0.9 * LEAVE_SECONDS)
    assert listening.taken == 0
    listening.reactor.advance(0.2 * LEAVE_SECONDS)
    assert listening.taken == 1
    assert listening.reads


def test_who_leaves_takes_nothing_until_there_is_nobody_else(listening: Listening) -> None:
    listening.own.leave()
    listening.other.tell(1000)
    listening.come(1)
    for _ in range(5):
        listening.reactor.advance(1.1 * LEAVE_SECONDS)
        assert listening.taken == 0
        listening.again()
    listening.other.leave()
    listening.reactor.advance(1.1 * LEAVE_SECONDS)
    assert listening.taken == 1


def test_a_port_that_is_closing_takes_nothing(listening: Listening) -> None:
    listening.own.tell(10)
    listening.other.tell(0)
    listening.come(1)
    listening.reactor.rightNow += 2 * LEAVE_SECONDS  # a turn that is late: it would take what was left, and only then close
    listening.port.stopListening()
    listening.reactor.advance(0)
    assert listening.taken == 0
    assert not listening.reactor.readers
    assert not listening.reactor.getDelayedCalls()


def test_a_port_that_closes_has_no_timer_left(listening: Listening) -> None:
    listening.own.tell(10)
    listening.other.tell(0)
    listening.come(1)
    listening.port.stopListening()
    listening.reactor.advance(0)
    assert not listening.reactor.getDelayedCalls()
