"""Is the backend there, and what is it: a look at a steady pace."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from .backend import Backend
from .core.errors import BackendFailed
from .core.status import BackendState

MAX_MODELS: Final = 1000
"""Models of one backend that are known by name, in metrics for instance."""

_log: Final = Logger("gateway.pool")


class Pool(Service):
    """Probes the backend every ``interval`` seconds, a tenth more or less, so that replicas do not march in step."""

    name = "pool"

    def __init__(
        self, backend: Backend, clock: IReactorTime, interval: float, random: Callable[[], float] = random.random
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._interval = interval
        self._random = random
        self._next: IDelayedCall | None = None
        self._probing: Deferred[None] | None = None
        self._seen = BackendState(backend.name, "", "warming", frozenset(), "not yet probed")

    def snapshot(self) -> list[BackendState]:
        return [self._seen]

    def startService(self) -> None:
        super().startService()
        self._probe()

    def stopService(self) -> None:
        super().stopService()
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._probing is not None:
            self._probing.cancel()

    def _probe(self) -> None:
        self._next = None
        self._probing = ensureDeferred(self._look())
        self._probing.addErrback(self._failed)
        self._probing.addCallback(self._again)

    async def _look(self) -> None:
        try:
            probe = await self._backend.probe()
        except BackendFailed as failure:
            why = f"{failure.code}: {failure.detail or failure.message}"
            self._note(self._seen._replace(state="unhealthy", reason=why))
        else:
            self._note(BackendState(self._backend.name, probe.kind, "healthy", frozenset(probe.models[:MAX_MODELS]), ""))

    def _failed(self, failure: Failure) -> None:
        if failure.check(CancelledError) is None:
            _log.failure("probe of {name}", failure, name=self._backend.name)

    def _again(self, _: object) -> None:
        self._probing = None
        if self.running:
            wait = self._interval * (0.9 + 0.2 * self._random())
            self._next = self._clock.callLater(wait, self._probe)

    def _note(self, seen: BackendState) -> None:
        before, self._seen = self._seen, seen
        if seen.state == before.state:
            return
        if seen.state == "healthy":
            _log.info("backend {name} is healthy ({kind})", name=seen.name, kind=seen.kind)
        else:
            _log.warn("backend {name} is {state}: {reason}", name=seen.name, state=seen.state, reason=seen.reason)
