"""The reactor that the gateway runs on: Twisted's epoll reactor, with what a relay pays for at every event taken out.

- What is written in a turn goes to the sockets at its end. What the events of a turn have in common (our code, then the
  kernel's) stays in the processor's caches, other processes are woken once for all of it, and pieces go together. Only what
  the kernel does not take waits for epoll. (Twisted's own transports all do, at the price of two calls of epoll_ctl each.)
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
from twisted.logger import Logger
from twisted.python import log

from .shares import LEAVE_SECONDS, Shares

READ_SIZE: Final = 64 * 1024

AT_A_TIME: Final = 128
"""Events of a turn at most; what they make us write goes out after them."""

AT_ONCE: Final = 4
"""Connections that one of several workers takes before it looks whether it has more than others."""

_log: Final = Logger("gateway.net")


class _Gathering(tcp.Connection):
    """A transport of `Reactor`, which writes at the end of its turn."""

    reactor: Any
    _waits = False  # what there is to write, for the end of the turn

    def write(self, data: bytes) -> None:
        if self._waits and len(data) > self.bufferSize:
            self.send_waiting()  # to join much to what is before it would be to copy it
        if not self._waits:
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
            self._waits = True
            self.reactor.waiting.append(self)
        self._tempDataBuffer.append(data)
        self._tempDataLen += len(data)
        if self._tempDataLen > self.bufferSize:
            self.send_waiting()

    def send_waiting(self) -> None:
        """To the socket with it. What that does not take, doWrite writes once it does."""
        if not self._waits:
            return
        self._waits = False
        if self.dataBuffer:  # doWrite was called meanwhile, and is not done: this comes after that
            self._maybePauseProducer()
            self.startWriting()
            return
        waiting = self._tempDataBuffer
        data = waiting[0] if len(waiting) == 1 else b"".join(waiting)
        waiting.clear()
        self._tempDataLen = 0
        try:
            sent = self.socket.send(data)
        except OSError:
            sent = 0  # full, or lost: doWrite will see it again, and knows what to do
        if sent < len(data):
            super().write(data[sent:] if sent else data)
        elif self.producer is not None and not self.streamingProducer:
            self.startWriting()  # it was registered meanwhile

    def startTLS(self, *args: Any) -> None:
        self.send_waiting()
        super().startTLS(*args)

    def connectionLost(self, reason: Any) -> None:
        try:
            self.send_waiting()
        finally:
            super().connectionLost(reason)

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


class _Server(_Gathering, tcp.Server):
    """A client's connection."""


class _Client(_Gathering, tcp.Client):
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


class _UnixServer(_Gathering, unix.Server):
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

    def __init__(self) -> None:
        self.waiting: list[_Gathering] = []
        """Have something to write at the end of this turn."""
        super().__init__()

    def runUntilCurrent(self) -> None:
        super().runUntilCurrent()
        if not self.waiting:
            return
        for one in self.waiting:  # a producer that is to pause may make others write
            try:
                one.send_waiting()
            except BaseException as problem:
                _log.failure("what was written last is not sent")
                log.callWithLogger(one, self._disconnectSelectable, one, problem, False)
        self.waiting.clear()

    def doPoll(self, timeout: float | None) -> None:
        selectables = self._selectables
        events = self._poller.poll(-1 if timeout is None else timeout, AT_A_TIME)
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
                _log.failure("what came in has not been dealt with")
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
        if not isinstance(reactor, Reactor):
            made.transport = unix.Server
        made.startListening()
    if isinstance(made, _Sharing):
        made.shares = shares
    return made


def install() -> None:
    """Make this the process's reactor, unless there is one already."""
    if "twisted.internet.reactor" not in sys.modules:
        installReactor(Reactor())
