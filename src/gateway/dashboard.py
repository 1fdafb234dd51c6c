"""The dashboard: one page, the picture that it shows, and a stream of such pictures.

A picture is made and encoded once for all that watch, a second after the one before, and at once when a backend's state has
changed. Nothing is made while nobody watches.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.web.server import Request
from zope.interface import implementer

from . import __version__
from .core import sse
from .core.errors import GatewayError
from .core.live import Live
from .core.status import Status
from .core.view import view
from .relay import connected, unbuffered

INTERVAL: Final = 1.0
SOON: Final = 0.1
"""Seconds between two pictures, and at least between them when backends change state all the time."""

VIEWERS: Final = 32

PAGE: Final = Path(__file__).with_name("dashboard.html").read_bytes()


def _hash_of(element: bytes) -> bytes:
    """The source of the page's one element of this name, as a content security policy has it (CSP level 3, section 2.3.1)."""
    found = re.findall(b"<%b>(.*?)</%b>" % (element, element), PAGE, re.DOTALL)
    (source,) = found
    return b"'sha256-%b'" % b64encode(sha256(source).digest())


HEADERS: Final = {
    b"content-security-policy": b"; ".join(
        [
            b"default-src 'none'",
            b"script-src " + _hash_of(b"script"),
            b"style-src " + _hash_of(b"style"),
            b"connect-src 'self'",
            b"img-src data:",  # the icon
            b"base-uri 'none'",
            b"form-action 'none'",
            b"frame-ancestors 'none'",
            b"require-trusted-types-for 'script'",
            b"trusted-types 'none'",
        ]
    ),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-cache",
}


@implementer(IPushProducer)
class _Viewer:
    """One who watches. While its connection is full it gets no pictures; the next one after that is a new one."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.ended: Deferred[None] = Deferred()
        self.paused = False

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False

    def stopProducing(self) -> None:
        self.paused = True


class Dashboard:
    """``status`` looks up how things stand; ``policy`` names how backends are chosen."""

    def __init__(self, live: Live, status: Callable[[], Status], policy: str, clock: IReactorTime) -> None:
        self._live = live
        self._status = status
        self._policy = policy
        self._clock = clock
        self._viewers: list[_Viewer] = []
        self._timer: IDelayedCall | None = None
        self._stopped = False
        self._encoded = b""
        self._encoded_at: float | None = None

    def state(self) -> bytes:
        """The picture, as JSON; one that is younger than `SOON` is good enough."""
        if self._encoded_at is None or self._clock.seconds() - self._encoded_at >= SOON:
            return self._picture()
        return self._encoded

    def _picture(self) -> bytes:
        now = self._clock.seconds()
        seen = view(self._live, self._status(), now, version=__version__, policy=self._policy)
        self._encoded, self._encoded_at = msgspec.json.encode(seen), now
        return self._encoded

    async def watch(self, request: Request) -> None:
        """Send pictures until the client goes or the gateway stops. Raises `GatewayError` too_many_viewers, draining."""
        if self._stopped:
            raise GatewayError("draining", "The gateway is shutting down.", retry_after=1.0)
        if len(self._viewers) >= VIEWERS:
            raise GatewayError("too_many_viewers", f"{VIEWERS} watch the dashboard already.", retry_after=10.0)
        viewer = _Viewer(request)
        request.setHeader(b"content-type", b"text/event-stream")
        unbuffered(request)
        request.registerProducer(viewer, True)
        request.write(sse.encode(self.state()))
        self._viewers.append(viewer)
        if self._timer is None:
            self._timer = self._clock.callLater(INTERVAL, self._tick)
        try:
            await viewer.ended
        except CancelledError:
            pass  # it has gone, which is how watching ends, or is to go
        finally:
            self._left(viewer)
        if connected(request):
            request.unregisterProducer()
            request.finish()

    def _left(self, viewer: _Viewer) -> None:
        self._viewers.remove(viewer)
        if not self._viewers and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = self._clock.callLater(INTERVAL, self._tick)
        self._send()

    def _send(self) -> None:
        event = sse.encode(self._picture())
        for viewer in tuple(self._viewers):
            if not viewer.paused:
                viewer.request.write(event)

    def changed(self) -> None:
        """The state of a backend has changed: the next picture comes at once, or soon after the one before."""
        if self._timer is not None and self._encoded_at is not None:
            wait = max(self._encoded_at + SOON - self._clock.seconds(), 0.0)
            self._timer.cancel()
            self._timer = self._clock.callLater(wait, self._tick)

    def stop(self) -> None:
        """The gateway stops: say so, and let everybody go."""
        self._stopped = True
        if self._viewers:
            self._send()
        for viewer in tuple(self._viewers):
            viewer.ended.callback(None)
