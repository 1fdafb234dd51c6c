"""A second backend for a stream whose first token is late (J. Dean and L. A. Barroso, "The Tail at Scale", CACM 2013)."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.python.failure import Failure

from .backend import Answer, Stream
from .core.slowest import Slowest
from .core.tickets import Ticket
from .dispatch import Lease

Begun = tuple[Lease, Answer | Stream]
"""An attempt whose backend has begun to answer."""

Attempt = Callable[[Ticket], Coroutine[Deferred[Any], Any, Begun]]


class Hedge:
    """Races a second attempt against a first whose token has not come by the 95th percentile of requests like it."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._slowest = Slowest()

    async def race(self, attempt: Attempt, ticket: Ticket, again: Callable[[Ticket], Ticket | None]) -> Begun:
        """The attempt that was quicker; the other is cancelled. ``again`` gives the second ticket, or None if there is to be
        no second attempt. Raises what the last of them failed with."""
        kind = (ticket.model, ticket.prompt_tokens.bit_length())
        delay = self._slowest.p95(kind)
        if delay is None:
            lease, reply = await attempt(ticket)
        else:
            lease, reply = await _Race(self._clock, attempt, ticket, again, delay).won
        self._slowest.observe(kind, lease.first_byte_seconds)
        return lease, reply


class _Race:
    """``won`` fires with the first attempt that begins."""

    def __init__(
        self,
        clock: IReactorTime,
        attempt: Attempt,
        ticket: Ticket,
        again: Callable[[Ticket], Ticket | None],
        delay: float,
    ) -> None:
        self._clock = clock
        self._attempt = attempt
        self._ticket = ticket
        self._again = again
        self._delay = delay
        self._running: list[Deferred[Begun]] = []
        self._over = False
        self.won: Deferred[Begun] = Deferred(lambda _: self._stop())
        self._timer: IDelayedCall | None = clock.callLater(delay, self._late)
        self._run(ticket)

    def _run(self, ticket: Ticket) -> None:
        running = ensureDeferred(self._attempt(ticket))
        self._running.append(running)
        running.addCallbacks(self._begun, self._failed, callbackArgs=(running,), errbackArgs=(running,))

    def _late(self) -> None:
        """Start the second, unless the first has not even been sent for so long."""
        self._timer = None
        ticket = self._ticket
        sent = self._clock.seconds() - ticket.granted_at if ticket.backend is not None else 0.0
        if sent < self._delay:
            self._timer = self._clock.callLater(max(self._delay - sent, 0.001), self._late)
            return
        second = self._again(ticket)
        if second is not None:
            self._run(second)

    def _begun(self, begun: Begun, running: Deferred[Begun]) -> None:
        self._running.remove(running)
        if self._over:
            _discard(begun)
            return
        self._over = True
        self._stop()  # first: who is told goes on at once, and may be done with the request before that returns
        self.won.callback(begun)

    def _failed(self, failure: Failure, running: Deferred[Begun]) -> None:
        self._running.remove(running)
        if not self._running and not self._over:
            self._over = True
            self._stop()
            self.won.errback(failure)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for running in self._running[:]:
            running.cancel()


def _discard(begun: Begun) -> None:
    """Nobody wants it any more."""
    lease, reply = begun
    if not isinstance(reply, Answer):
        reply.stopProducing()
    lease.end(CancelledError())
