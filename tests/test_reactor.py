"""The reactor's transports, over real sockets; each turn is a call."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.wire import Echo
from twisted.python.failure import Failure

from gateway.net.reactor import Reactor, adopt

from .conftest import Logged

BIG = bytes(range(256)) * 40_000
"""More than any socket takes at once."""

MOST_TURNS = 2000

PATIENCE = 60
"""Seconds for what comes at once, on any machine."""


class Server(Protocol):
    """Does with each piece of data what a test says."""

    def __init__(self, told: Connected) -> None:
        self._told = told
        self.lost = False

    def dataReceived(self, data: bytes) -> None:
        self._told.does(self.transport)

    def connectionLost(self, reason: Any = None) -> None:
        self.lost = True


class Connected:
    """A client's socket, and the server's protocol on a reactor of its own."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.does: Callable[[Any], None] = lambda transport: None
        self.servers: list[Server] = []
        self._turns = 0
        factory = Factory.forProtocol(self._made)
        self._port = self.reactor.listenTCP(0, factory, interface="127.0.0.1")
        self.client = self.connect()

    def _made(self) -> Server:
        self.servers.append(Server(self))
        return self.servers[-1]

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self._port.getHost().port))
        client.settimeout(0)
        known = len(self.servers)
        while len(self.servers) == known:
            self.turn()
        return client

    def close(self) -> None:
        self.client.close()
        reactor: Any = self.reactor
        for one in reactor.removeAll():
            one.socket.close()
        for one in reactor._internalReaders:
            one.connectionLost(None)
        reactor._poller.close()

    @property
    def transports(self) -> list[Any]:
        """The server's, in the order in which their clients came."""
        return [server.transport for server in self.servers]

    def turn(self) -> None:
        """Of the reactor: what is to be done, what goes out, what has come in."""
        self._turns += 1
        assert self._turns < MOST_TURNS, "it waits for something that does not come"
        self.reactor.runUntilCurrent()
        self.reactor.doPoll(0.01)

    def ask(self, does: Callable[[Any], None]) -> None:
        """One turn, in which the server does that."""
        done: list[bool] = []

        def noting(transport: Any) -> None:
            does(transport)
            done.append(True)

        self.does = noting
        self.client.sendall(b"?")
        while not done:
            self.turn()

    def read(self, size: int) -> bytes:
        """So much of what the client gets, in as many turns as that takes; less at the end."""
        found = b""
        while len(found) < size:
            try:
                data = self.client.recv(size - len(found))
            except BlockingIOError:
                self.turn()
                continue
            if not data:
                break
            found += data
        return found


@pytest.fixture
def connected() -> Iterator[Connected]:
    both = Connected()
    yield both
    both.close()


def test_what_a_turn_writes_goes_out_at_its_end_and_in_one_piece(connected: Connected) -> None:
    def two(transport: Any) -> None:
        transport.write(b"one ")
        transport.write(b"two")

    connected.ask(two)
    with pytest.raises(BlockingIOError):
        connected.client.recv(100)
    connected.turn()
    assert select.select([connected.client], [], [], PATIENCE)[0]
    assert connected.client.recv(100) == b"one two"
    assert not connected.reactor.getWriters()


def test_what_is_more_than_a_socket_takes_comes_in_order(connected: Connected) -> None:
    def much(transport: Any) -> None:
        transport.write(b"begin")
        transport.write(BIG)
        transport.write(b"middle")
        transport.writeSequence([b"more", BIG])
        transport.write(b"end")

    connected.ask(much)
    whole = b"begin" + BIG + b"middle" + b"more" + BIG + b"end"
    assert connected.read(len(whole)) == whole


def test_what_comes_after_a_part_that_the_socket_did_not_take_stays_behind_it(connected: Connected) -> None:
    """A connection that is both readable and writable is read first, and then written to by the reactor itself."""

    def both(transport: Any) -> None:
        transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        transport.bufferSize = len(much)
        transport.write(much)
        transport.doWrite()
        transport.write(b"end")

    much = BIG[:500_000]
    connected.ask(both)
    assert connected.read(len(much) + 3) == much + b"end"


def test_a_turn_that_writes_much_does_not_keep_it_to_its_end(connected: Connected) -> None:
    connected.ask(lambda transport: transport.write(BIG))
    assert select.select([connected.client], [], [], PATIENCE)[0]


class Producer:
    def __init__(self, transport: Any, *, pull: bool) -> None:
        self.transport = transport
        self.left = 3
        self.paused = 0
        self.resumed = 0
        transport.registerProducer(self, not pull)

    def resumeProducing(self) -> None:
        self.resumed += 1
        if self.left:
            self.left -= 1
            self.transport.write(b"piece")
        else:
            self.transport.unregisterProducer()

    def pauseProducing(self) -> None:
        self.paused += 1

    def stopProducing(self) -> None:
        pass


def test_a_pull_producer_that_comes_after_what_was_written_is_asked_for_more(connected: Connected) -> None:
    def both(transport: Any) -> None:
        transport.write(b"head")
        Producer(transport, pull=True)

    connected.ask(both)
    assert connected.read(19) == b"head" + 3 * b"piece"


def test_a_producer_of_more_than_the_socket_takes_pauses_and_goes_on(connected: Connected) -> None:
    producers: list[Producer] = []

    def much(transport: Any) -> None:
        producers.append(Producer(transport, pull=False))
        transport.write(b"head")
        transport.write(BIG)

    connected.ask(much)
    assert producers[0].paused == 1
    whole = b"head" + BIG + b"piece"
    assert connected.read(len(whole)) == whole
    assert producers[0].resumed == 1


def test_what_was_written_before_the_connection_is_closed_arrives(connected: Connected) -> None:
    def last(transport: Any) -> None:
        transport.write(b"goodbye")
        transport.loseConnection()

    connected.ask(last)
    assert connected.read(100) == b"goodbye"
    connected.turn()
    assert connected.servers[0].lost


def test_what_was_written_before_the_connection_is_cut_has_been_sent(connected: Connected) -> None:
    def last(transport: Any) -> None:
        transport.write(b"goodbye")
        transport.abortConnection()

    connected.ask(last)
    while not connected.servers[0].lost:
        connected.turn()
    assert connected.read(7) == b"goodbye"


def test_a_client_that_has_gone_is_noticed_by_what_is_written_to_it(connected: Connected) -> None:
    def many(transport: Any) -> None:
        transport.stopReading()
        connected.client.close()
        transport.write(b"nobody reads this")

    connected.ask(many)
    (transport,) = connected.transports
    while not connected.servers[0].lost:
        transport.write(b"nor this")
        connected.turn()


def wait_with_too_much(transport: Any) -> None:
    """Its producer will have to pause, but not before the end of the turn."""
    transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    transport.bufferSize = 1_000_000
    transport.write(BIG[:900_000])
    transport.bufferSize = 1000


def test_one_that_cannot_pause_holds_up_no_other(connected: Connected, logged: Logged) -> None:
    class Stubborn(Producer):
        def pauseProducing(self) -> None:
            raise ValueError("never")

    other = connected.connect()
    first, second = connected.transports
    Stubborn(first, pull=False)
    wait_with_too_much(first)
    second.write(b"here")
    connected.turn()
    assert select.select([other], [], [], PATIENCE)[0]
    assert other.recv(100) == b"here"
    other.close()
    assert [type(problem) for problem in logged.flush()] == [ValueError]
    assert [server.lost for server in connected.servers] == [True, False]


def test_what_one_that_pauses_makes_others_do_is_done_in_the_same_turn(connected: Connected) -> None:
    """It is paused out of its own write; what follows from that must not wait for the next thing to happen."""
    timers: list[Any] = []

    class Talker(Producer):
        def pauseProducing(self) -> None:
            super().pauseProducing()
            second.write(b"here")
            timers.append(connected.reactor.callLater(1000, lambda: None))

    other = connected.connect()
    first, second = connected.transports
    talker = Talker(first, pull=False)
    wait_with_too_much(first)
    connected.reactor.runUntilCurrent()
    assert talker.paused == 1
    assert select.select([other], [], [], PATIENCE)[0]
    assert connected.reactor.timeout() is not None
    timers[0].cancel()
    other.close()


def test_a_unix_socket_works_on_any_reactor(tmp_path: Path) -> None:
    """Its port is ours whatever the reactor is."""
    reactor: Any = EPollReactor()
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        listening.setblocking(False)
        factory = Factory.forProtocol(Echo)
        factory.noisy = False
        port = adopt(reactor, listening, factory)
        client.settimeout(0)
        client.connect(str(tmp_path / "socket"))
        client.sendall(b"hello")
        found = b""
        for _ in range(MOST_TURNS):
            reactor.runUntilCurrent()
            reactor.doIteration(0.01)
            with suppress(BlockingIOError):
                found += client.recv(100)
                break
        assert found == b"hello"
        for one in [*reactor.removeAll(), *reactor._internalReaders]:
            one.connectionLost(Failure(ConnectionDone()))
        reactor._poller.close()
        assert not port.connected
