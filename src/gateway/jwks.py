"""The public keys that tokens are signed with, fetched from their issuer (a JWK set, RFC 7517 section 5).

They are fetched at the start, every few minutes, and when a token names a key that is not among them, as issuers change
theirs without notice. What was fetched stays while a fetch fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from treq.client import HTTPClient
from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from .core.errors import BackendFailed
from .exchange import Exchange, Timeouts, Timers
from .net.headers import RawHeaders

EVERY: Final = 300.0
RETRY: Final = 15.0
"""Seconds until the next fetch, after one that went well or failed."""

AT_LEAST: Final = 10.0
"""Seconds between two fetches, however many unknown keys tokens name."""

TIMEOUTS: Final = Timeouts(first_byte=5.0, idle=5.0, total=5.0)
MAX_BYTES: Final = 512 * 1024
_HEADERS: Final = RawHeaders([(b"accept", b"application/json"), (b"accept-encoding", b"identity")])
_log: Final = Logger("gateway.jwks")


class Jwks(Service):
    """Fetches ``url`` and gives what it says to ``use``, which raises ValueError if it is no use.

    ``fetched``: at least one fetch has gone well.
    """

    def __init__(self, url: str, client: HTTPClient, clock: IReactorTime, use: Callable[[bytes], object]) -> None:
        self.fetched = False
        self._url = url
        self._client = client
        self._clock = clock
        self._timers = Timers(clock, TIMEOUTS)
        self._use = use
        self._timer: IDelayedCall | None = None
        self._fetching: Deferred[None] | None = None
        self._waiting: list[Deferred[None]] = []
        self._last: float | None = None
        self._complained = False

    def startService(self) -> None:
        super().startService()
        self._fetch()

    def stopService(self) -> None:
        super().stopService()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._fetching is not None:
            self._fetching.cancel()

    def refreshed(self) -> Deferred[None]:
        """Fires once the keys are as new as they may be: after the fetch that is under way, or one that is due; at once if
        there was one a moment ago. It never fails, and who cancels it does not stop the fetch, which others wait for too."""
        if self._fetching is None:
            if self._last is not None and self._clock.seconds() - self._last < AT_LEAST:
                return succeed(None)
            self._fetch()
        if self._fetching is None:
            return succeed(None)
        waiting: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiting)
        return waiting

    def _fetch(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
        self._last = self._clock.seconds()
        self._fetching = fetching = ensureDeferred(self._fetched())
        fetching.addBoth(self._done)

    async def _fetched(self) -> None:
        exchange = Exchange(self._client, self._timers, MAX_BYTES)
        try:
            await exchange.open("GET", self._url.encode("ascii"), _HEADERS, None)
            body = await exchange.content()
            if exchange.status != 200:
                raise ValueError(f"it answered with status {exchange.status}")
            self._use(body)
        except CancelledError:
            raise
        except BackendFailed as failure:
            self._complain(failure.detail or failure.code)
        except ValueError as problem:
            self._complain(str(problem))
        else:
            if self._complained or not self.fetched:
                _log.info("{url}: signing keys fetched", url=self._url)
            self.fetched, self._complained = True, False

    def _complain(self, problem: str) -> None:
        """Once, until it has gone well again."""
        if not self._complained:
            kept = "the signing keys of before stay" if self.fetched else "no token can be verified yet"
            _log.warn("{url}: {problem}; {kept}", url=self._url, problem=problem, kept=kept)
        self._complained = True

    def _done(self, result: object) -> None:
        if isinstance(result, Failure) and result.check(CancelledError) is None:
            _log.failure("a bug in fetching signing keys", result)
        self._fetching = None
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.callback(None)
        if self.running:
            self._timer = self._clock.callLater(RETRY if self._complained else EVERY, self._fetch)
