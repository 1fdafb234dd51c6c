"""Listens for clients: makes their channels, knows how many there are, and drains them."""

from __future__ import annotations

from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.logger import Logger
from twisted.web.resource import IResource
from twisted.web.server import Site

from .channel import Channel, Limits, OnRefused, Request

_log: Final = Logger("gateway.net")


class Server(Site):
    """Listens for clients: makes their channels, knows how many there are, and drains them."""

    noisy = False

    def __init__(self, resource: IResource, limits: Limits, clock: IReactorTime, on_refused: OnRefused) -> None:
        super().__init__(
            resource,
            requestFactory=Request,
            timeout=limits.client_timeout,
            reactor=clock,
            parsePOSTFormSubmission=False,
        )
        self.limits = limits
        self.clock = clock
        self.on_refused = on_refused
        self.draining = False
        self.refused_connections = 0
        self._full = False
        self._channels: set[Channel] = set()
        self._empty: Deferred[None] | None = None

    @property
    def connections(self) -> int:
        return len(self._channels)

    def buildProtocol(self, addr: IAddress | None) -> Channel | None:  # type: ignore[override]
        """A channel for this client, or None, which closes the connection at once, if there are too many."""
        if len(self._channels) >= self.limits.max_connections:
            self._refuse_connection()
            return None
        self._full = False
        channel = Channel()
        channel.factory = channel.site = self
        channel.requestFactory = self.requestFactory
        channel.timeOut = self.limits.client_timeout  # type: ignore[assignment]  # any number of seconds will do
        channel.callLater = self.clock.callLater
        self._channels.add(channel)
        return channel

    def _refuse_connection(self) -> None:
        self.refused_connections += 1
        if not self._full:  # said once each time that it comes to this
            _log.warn("{most} connections are open, the most there may be: more are closed at once", most=len(self._channels))
        self._full = True

    def closed(self, channel: Channel) -> None:
        """A channel's connection is gone."""
        self._channels.discard(channel)
        if not self._channels and self._empty is not None:
            empty, self._empty = self._empty, None
            empty.callback(None)

    def drain(self) -> Deferred[None]:
        """Close idle connections, and every other one after its answer; fires when none is left."""
        self.draining = True
        for channel in list(self._channels):
            channel.drain()
        if not self._channels:
            return succeed(None)
        if self._empty is None:
            self._empty = Deferred()
        return self._empty

    def abort(self) -> None:
        """Cut the connections that are left."""
        for channel in list(self._channels):
            channel.transport.abortConnection()

    # The stock access log costs a formatted date per request; ours is one structured line elsewhere.

    def log(self, request: Any) -> None:
        pass

    def startFactory(self) -> None:
        pass

    def stopFactory(self) -> None:
        pass
