"""Connections in front of which a proxy says whose they are (`core.proxy_header`), and nobody else may."""

from __future__ import annotations

from typing import Any, Final

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.internet.protocol import Protocol, ServerFactory, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from ..core import proxy_header
from ..core.forwarded import Proxies

HEADER_SECONDS: Final = 5.0
SAID_EVERY: Final = 10.0
"""Seconds between two lines of the log about refused connections."""

_log: Final = Logger("gateway.net")


class Proxied(ServerFactory):
    """Reads the header of each connection, and then hands the connection over to what another factory makes: nothing is left
    between them. Who is no proxy, or sends no header in time, is cut off."""

    noisy = False

    def __init__(self, inner: Any, proxies: Proxies, clock: IReactorTime, most: int) -> None:
        self.inner = inner
        self.proxies = proxies
        self.clock = clock
        self.most = most
        self.waiting = 0
        self.refused = 0
        self._said = -SAID_EVERY

    def buildProtocol(self, addr: Any) -> Protocol | None:
        if not self.proxies.trusts(addr.host):
            self.refuse(addr.host, "is not one of GATEWAY_TRUSTED_PROXIES")
            return None
        if self.waiting >= self.most:
            self.refuse(addr.host, f"would be one of more than {self.most} that are yet to send a PROXY header")
            return None
        return _Header(self, addr)

    def refuse(self, host: str, why: str) -> None:
        """A connection is closed without an answer."""
        self.refused += 1
        now = self.clock.seconds()
        if now - self._said >= SAID_EVERY:
            self._said = now
            _log.warn("a connection from {host} is closed: it {why} ({count} so far)", host=host, why=why, count=self.refused)

    def doStart(self) -> None:
        self.inner.doStart()

    def doStop(self) -> None:
        self.inner.doStop()


class _Header(Protocol):
    """Reads a header."""

    transport: Any
    _timer: IDelayedCall | None = None

    def __init__(self, site: Proxied, addr: IAddress) -> None:
        self._site = site
        self._addr: Any = addr
        self._read = b""
        site.waiting += 1

    def connectionMade(self) -> None:
        self._timer = self._site.clock.callLater(HEADER_SECONDS, self._refuse, "sent no PROXY header in time")

    def dataReceived(self, data: bytes) -> None:
        if self._timer is None:
            return
        self._read += data
        try:
            told = proxy_header.read(self._read)
        except ValueError as problem:
            self._refuse(f"sent {problem}")
        else:
            if told is not None:
                self._hand_over(told)

    def _hand_over(self, told: proxy_header.Told) -> None:
        self._stop()
        transport = self.transport
        inner = self._site.inner.buildProtocol(_address(told) if told.host else self._addr)
        if inner is None:
            transport.loseConnection()
            return
        transport.protocol = inner
        inner.makeConnection(transport)
        rest = self._read[told.length :]
        if rest:
            inner.dataReceived(rest)

    def _refuse(self, why: str) -> None:
        self._stop()
        self._site.refuse(self._addr.host, why)
        self.transport.abortConnection()

    def _stop(self) -> None:
        """No longer wait."""
        timer, self._timer = self._timer, None
        if timer is not None:
            self._site.waiting -= 1
            if timer.active():
                timer.cancel()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._stop()


def _address(told: proxy_header.Told) -> IAddress:
    made = IPv6Address if ":" in told.host else IPv4Address
    return made("TCP", told.host, told.port)
