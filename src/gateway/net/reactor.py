"""The reactor that the gateway runs on: Twisted's epoll reactor, with what a relay pays for at every event taken out.

- What is written goes to the socket at once; only what the kernel does not take waits for the next turn.
  (Twisted's own transports write in the next turn, at the price of two calls of epoll_ctl for each.)
- An event goes straight to the transport's ``doRead``, without a logging context around it.
- Time is monotonic: a wall clock that is set back would stop every timer.

Everything works on any other reactor too (``twistd --reactor``), only slower.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from typing import Any, Final

from twisted.internet import tcp, unix
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST, installReactor
from twisted.python import log

from .shares import LEAVE_SECONDS, Shares

READ_SIZE: Final = 64 * 1024

AT_ONCE: Final = 4
"""Connections that one of several workers takes before it looks whether it has more than others."""


class _Eager(tcp.Connection):
    """A TCP transport that writes at once."""

    def write(self, data: bytes) -> None:
        if (
            self.dataBuffer
            or self._tempDataBuffer
            or not self.connected
            or self._writeDisconnected
            or self.TLS
            or (self.producer is not None and not self.streamingProducer)  # a pull producer is asked for more by doWrite
        ):
            super().write(data)
            return
        try:
            sent = self.socket.send(data)
        except OSError:
            sent = 0  # full, or lost: doWrite will see it again, and knows what to do
        if sent < len(data):
            super().write(data[sent:] if sent else data)

    def doRead(self) -> Exception | None:  # type: ignore[override]  # twisted knows two exceptions
        try:
            data = self.socket.recv(READ_SIZE)
        except BlockingIOError:
            return None
        except OSError:
            return CONNECTION_LOST
        if not data:
            return CONNECTION_DONE
        self.protocol.dataReceived(data)
        return None


class _Server(_Eager, tcp.Server):
    """A client's connection."""


class _Client(_Eager, tcp.Client):
    """A connection to a backend."""


class _Sharing(tcp.Port):
    """A port that several workers listen on, if it has ``shares``."""

    shares: Shares | None = None
    reactor: Any
    _left: IDelayedCall | None = None  # there is a connection that another worker is to take

    def doRead(self) -> None:
        if self.shares is None:
            super().doRead()
        elif self.shares.is_ahead():
            self.stopReading()
            self._left = self.reactor.callLater(LEAVE_SECONDS, self._take_left, self.shares)
        else:
            self._take()

    def _take(self) -> None:
        self.numberAccepts = AT_ONCE
        super().doRead()

    def _take_left(self, shares: Shares) -> None:
        """What nobody has taken meanwhile, if anything."""
        self._left = None
        if self.connected and not self.disconnecting:
            if not shares.leaves_all():
                self._take()
            self.startReading()

    def connectionLost(self, reason: Any) -> None:
        if self._left is not None:
            self._left.cancel()
            self._left = None
        tcp.Port.connectionLost(self, reason)  # that of a UNIX port would remove the file


class _Port(_Sharing):
    transport = _Server


class _UnixServer(_Eager, unix.Server):
    """A client's connection over a UNIX socket."""


class _UnixPort(_Sharing, unix.Port):
    """A UNIX socket that was bound elsewhere. (Twisted's own would make it everybody's, and remove its file.)"""

    transport = _UnixServer
    _shouldShutdown = False  # other processes may listen on it too

    factory: Any
    fileno: Any
    _preexistingSocket: Any

    def startListening(self) -> None:
        self.socket, self._preexistingSocket = self._preexistingSocket, None
        self.fileno = self.socket.fileno
        self.factory.doStart()
        self.connected = True
        self.numberAccepts = 100
        self.startReading()


class _Connector(tcp.Connector):
    def _makeTransport(self) -> _Client:
        return _Client(self.host, self.port, self.bindAddress, self, self.reactor)


class Reactor(EPollReactor):
    """See the module."""

    seconds = staticmethod(time.monotonic)

    def doPoll(self, timeout: float | None) -> None:
        selectables = self._selectables
        events = self._poller.poll(-1 if timeout is None else timeout, max(len(selectables), 1))
        for fd, event in events:
            selectable = selectables.get(fd)
            if selectable is None:
                continue
            if event != select.EPOLLIN:
                log.callWithLogger(selectable, self._doReadOrWrite, selectable, fd, event)
                continue
            try:
                why = selectable.doRead()
            except BaseException:
                why = sys.exc_info()[1]
                log.err()
            if why:
                self._disconnectSelectable(selectable, why, True)

    doIteration = doPoll

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> tcp.Port:
        made = _Port(port, factory, backlog, interface, self)
        made.startListening()
        return made

    def adoptStreamPort(self, fileDescriptor: int, addressFamily: int, factory: Any) -> tcp.Port:
        made: tcp.Port = _Port._fromListeningDescriptor(self, fileDescriptor, addressFamily, factory)
        made.startListening()
        return made

    def connectTCP(self, host: str, port: int, factory: Any, timeout: float = 30, bindAddress: Any = None) -> tcp.Connector:
        connector = _Connector(host, port, factory, timeout, bindAddress, self)
        connector.connect()
        return connector


def adopt(reactor: Any, bound: socket.socket, factory: Any, shares: Shares | None = None) -> tcp.Port:
    """Have any reactor take in connections to a socket that listens; the port has a duplicate of it. Those of `Reactor` heed
    the ``shares`` of workers that listen on it too."""
    made: tcp.Port
    if bound.family != socket.AF_UNIX:
        made = reactor.adoptStreamPort(bound.fileno(), bound.family, factory)
    else:
        made = _UnixPort._fromListeningDescriptor(reactor, bound.fileno(), factory)
        made.startListening()
    if isinstance(made, _Sharing):
        made.shares = shares
    return made


def install() -> None:
    """Make this the process's reactor, unless there is one already."""
    if "twisted.internet.reactor" not in sys.modules:
        installReactor(Reactor())
