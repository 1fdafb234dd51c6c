"""One backend's looks: one after the other at a steady pace, each a while after the one before has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from .backend import Backend
from .core.errors import BackendFailed
from .core.reports import Report

JITTER: Final = 0.1
"""Looks come so much sooner or later, so that neither replicas nor backends march in step."""

_log: Final = Logger("gateway.pool")


class Looks:
    """``reported`` and ``unreachable`` are told what each look has shown; once stopped, neither is called."""

    def __init__(
        self,
        backend: Backend,
        clock: IReactorTime,
        interval: float,
        random: Callable[[], float],
        reported: Callable[[str, Report], None],
        unreachable: Callable[[str, BackendFailed], None],
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._interval = interval
        self._random = random
        self._reported = reported
        self._unreachable = unreachable
        self._next: IDelayedCall | None = None
        self._looking: Deferred[None] | None = None
        self._stopped = False

    def start(self) -> None:
        self._next = None
        self._stopped = False
        self._looking = ensureDeferred(self._look())
        self._looking.addErrback(self._failed)
        self._looking.addCallback(self._again)

    def stop(self) -> None:
        self._stopped = True
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._looking is not None:
            self._looking.cancel()

    async def _look(self) -> None:
        try:
            report = await self._backend.probe()
        except BackendFailed as failure:
            if not self._stopped:
                self._unreachable(self._backend.name, failure)
        else:
            if not self._stopped:
                self._reported(self._backend.name, report)

    def _failed(self, failure: Failure) -> None:
        if failure.check(CancelledError) is None:
            _log.failure("probe of {name}", failure, name=self._backend.name)

    def _again(self, _: object) -> None:
        self._looking = None
        if not self._stopped:
            wait = self._interval * (1 - JITTER + 2 * JITTER * self._random())
            self._next = self._clock.callLater(wait, self.start)
