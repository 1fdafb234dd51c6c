"""Listens for clients: makes their channels, knows how many there are, and drains them."""

from __future__ import annotations

import time
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.logger import Logger
from twisted.web.http import datetimeToString
from twisted.web.resource import IResource
from twisted.web.server import Site

from .channel import Channel, Limits, OnRefused
from .deadlines import Deadlines
from .reader import Known
from .shares import Shares

_log: Final = Logger("gateway.net")


class Server(Site):
    """Listens for clients: makes their channels, knows how many there are, and drains them.

    ``known`` answers requests of which method and path are among its keys; all others go to ``resource``. ``admin``: it is not
    for those who want answers of models, but for who operates the gateway.
    """

    noisy = False

    def __init__(
        self,
        resource: IResource,
        limits: Limits,
        clock: IReactorTime,
        on_refused: OnRefused,
        known: Known | None = None,
        *,
        admin: bool = False,
    ) -> None:
        super().__init__(resource, reactor=clock)
        self.limits = limits
        self.known = known or {}
        self.admin = admin
        self.idle: Deadlines[Channel] = Deadlines(clock, limits.client_timeout, Channel.timeoutConnection)
        self.clock = clock
        self.on_refused = on_refused
        self.draining = False
        self.shares: Shares | None = None
        """Is told how many connections there are."""
        self.refused_connections = 0
        self._full = False
        self._date = (0, b"")
        self._channels: set[Channel] = set()
        self._empty: Deferred[None] | None = None

    @property
    def connections(self) -> int:
        return len(self._channels)

    @property
    def date_line(self) -> bytes:
        """The Date header with its line's end, made once a second."""
        second = int(time.time())
        if second != self._date[0]:
            self._date = (second, b"Date: %b\r\n" % datetimeToString(second))
        return self._date[1]

    def buildProtocol(self, addr: IAddress | None) -> Channel | None:  # type: ignore[override]
        """A channel for this client, or None, which closes the connection at once, if there are too many."""
        if len(self._channels) >= self.limits.max_connections:
            self._refuse_connection()
            return None
        self._full = False
        channel = Channel(self, addr)
        self._channels.add(channel)
        if self.shares is not None:
            self.shares.tell(len(self._channels))
        return channel

    def _refuse_connection(self) -> None:
        self.refused_connections += 1
        if not self._full:  # said once each time that it comes to this
            _log.warn("{most} connections are open, the most there may be: more are closed at once", most=len(self._channels))
        self._full = True

    def closed(self, channel: Channel) -> None:
        """A channel's connection is gone."""
        self._channels.discard(channel)
        if self.shares is not None:
            self.shares.tell(len(self._channels))
        if not self._channels and self._empty is not None:
            empty, self._empty = self._empty, None
            empty.callback(None)

    def settle(self) -> Deferred[None]:
        """Close each connection after its next answer; fires when none is left."""
        self.draining = True
        return self._emptied()

    def drain(self) -> Deferred[None]:
        """Close idle connections, and every other one after its answer; fires when none is left."""
        self.draining = True
        for channel in list(self._channels):
            channel.drain()
        return self._emptied()

    def _emptied(self) -> Deferred[None]:
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
