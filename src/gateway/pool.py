"""The backends: a look at each at a steady pace, and what is known of them by how requests to them end.

`core.health` judges; this is its clock, its log and its voice. Whoever schedules watches the offers, and tells the
pool of each request when it is sent and how it ended.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from .backend import Backend
from .core.backend_settings import BackendSettings
from .core.errors import BackendFailed
from .core.health import Health, Rules, offers, windows
from .core.ranges import Window
from .core.reports import Report
from .core.settings import Settings
from .core.status import IN_ORDER, BackendState, Offer

JITTER: Final = 0.1
"""Looks come so much sooner or later, so that neither replicas nor backends march in step."""

Watcher = Callable[[Offer], object]

_log: Final = Logger("gateway.pool")


class Pool(Service):
    """All backends. What takes a ``name`` raises KeyError if there is no such backend.

    Of each request: `sent`, perhaps `first_token`, then one of `succeeded`, `failed`, `cancelled`, `rate_limited`.
    """

    name = "pool"

    def __init__(
        self,
        backends: Sequence[Backend],
        settings: Settings,
        clock: IReactorTime,
        random: Callable[[], float] = random.random,
    ) -> None:
        own = {one.name: one for one in settings.backends}
        rules = Rules(*[getattr(settings, name) for name in Rules._fields])
        self._clock = clock
        self._panic = settings.panic
        self.adaptive = settings.adaptive_concurrency
        """`first_token` is of use."""
        self._interval = settings.probe_interval
        self._health = {
            backend.name: Health(own.get(backend.name) or BackendSettings(name=backend.name, url=""), rules, clock.seconds())
            for backend in backends
        }
        self._probes = [
            _Probe(backend, clock, settings.probe_interval, random, self._reported, self._unreachable) for backend in backends
        ]
        self._marks = {name: health.mark() for name, health in self._health.items()}
        self._watchers: list[Watcher] = []
        self.windows: dict[str, Window] = {}
        """What is known of each model's window."""
        self._state_watchers: list[Callable[[], object]] = []
        self._offers = {offer.name: offer for offer in self._all_offers()}
        self._shown = {name: health.state(clock.seconds()) for name, health in self._health.items()}
        self._change: IDelayedCall | None = None

    def startService(self) -> None:
        super().startService()
        for probe in self._probes:
            probe.start()

    def stopService(self) -> None:
        super().stopService()
        for probe in self._probes:
            probe.stop()
        self._cancel_change()

    # --- what is known

    def snapshot(self) -> list[BackendState]:
        """All backends as they are shown."""
        now = self._clock.seconds()
        return [health.state(now) for health in self._health.values()]

    def watch(self, watcher: Watcher) -> None:
        """Calls it with the offer of each backend now, and with one that has changed whenever it has."""
        self._watchers.append(watcher)
        for offer in self._offers.values():
            watcher(offer)

    def watch_states(self, watcher: Callable[[], object]) -> None:
        """Calls it when the state of a backend or of its breaker is another one."""
        self._state_watchers.append(watcher)

    def models(self) -> list[dict[str, Any]]:
        """The entries of ``/v1/models`` of all backends; of one id, that of the first backend that has it."""
        found: dict[str, dict[str, Any]] = {}
        for health in self._health.values():
            for entry in health.entries():
                found.setdefault(entry["id"], entry)
        return list(found.values())

    def known_models(self) -> frozenset[str] | None:
        """The models there are, also while their backends are down. None: some backend has not told, and may have any."""
        known: frozenset[str] = frozenset()
        for health in self._health.values():
            if health.takes is None:
                return None
            known |= health.takes
        return known

    def one_with(self, model: str) -> str | None:
        """A backend that is in order and has the model."""
        for name, health in self._health.items():
            if self._offers[name].accepting and health.takes is not None and model in health.takes:
                return name
        return None

    def is_warming(self, model: str) -> bool:
        """A backend that may have the model is not ready yet, but will be: it loads, or has not been looked at."""
        return any(
            health.warming and (not model or health.takes is None or model in health.takes) for health in self._health.values()
        )

    def soonest(self) -> float:
        """Seconds until things may look better: a breaker half-open, a rate limit over, or else the next look."""
        now = self._clock.seconds()
        when = min([health.changes_at(now) for health in self._health.values()])
        return min(when - now, self._interval) if when < math.inf else self._interval

    # --- what happens to requests

    def sent(self, name: str) -> int:
        """A request goes there. Returns what its end is told with."""
        health = self._health[name]
        era = health.sent(self._clock.seconds())
        if health.breaker.until is not None:  # closed, it lets everything through
            self._check(health)
        return era

    def first_token(self, name: str, seconds: float, expected: float) -> None:
        """Its first token has come after ``seconds``. ``expected``: how long it would take without others, in any unit
        that does not change, such as prompt tokens to be computed plus a constant."""
        health = self._health[name]
        health.first_token(seconds, expected)
        self._check(health)

    def succeeded(self, name: str, era: int, first_byte: float = 0.0) -> None:
        """It was answered, with the first byte after so many seconds. A 4xx, which is the caller's doing, is an answer."""
        health = self._health[name]
        was_closed = health.breaker.until is None
        health.succeeded(era, first_byte, self._clock.seconds())
        if not was_closed or health.breaker.until is not None:
            self._check(health)

    def failed(self, name: str, era: int, failure: BackendFailed) -> None:
        """It failed."""
        health = self._health[name]
        health.failed(era, failure.code, self._clock.seconds())
        self._check(health)

    def cancelled(self, name: str, era: int) -> None:
        """It was given up: its client has left, its deadline has passed, another backend was quicker."""
        health = self._health[name]
        health.cancelled(era)
        self._check(health)

    def rate_limited(self, name: str, era: int, seconds: float) -> None:
        """It was answered with 429, and the backend wants no more for so many seconds."""
        health = self._health[name]
        health.rate_limited(era, seconds, self._clock.seconds())
        self._check(health)

    def _check(self, health: Health) -> None:
        """Say so if this has changed what may be sent."""
        mark = health.mark()
        if mark != self._marks[health.name]:
            self._marks[health.name] = mark
            self._update()

    # --- what an operator wants

    def drain(self, name: str) -> None:
        """No new requests there; those in flight finish."""
        self._health[name].draining = True
        self._update()

    def undrain(self, name: str) -> None:
        """Requests there again."""
        self._health[name].draining = False
        self._update()

    # --- what the probes say

    def _reported(self, name: str, report: Report) -> None:
        self._health[name].reported(report, self._clock.seconds())
        self.windows = windows(list(self._health.values()))
        self._update()

    def _unreachable(self, name: str, failure: BackendFailed) -> None:
        gone = failure.code == "backend_unreachable"
        self._health[name].unreachable(f"{failure.code}: {failure.detail or failure.message}", gone=gone)
        self._update()

    # --- what follows

    def _all_offers(self) -> list[Offer]:
        return offers(list(self._health.values()), self._clock.seconds(), panic=self._panic)

    def _update(self) -> None:
        """Say what has changed, and wait for what changes by itself."""
        changed = False
        for state in self.snapshot():
            before, self._shown[state.name] = self._shown[state.name], state
            changed |= (before.state, before.breaker) != (state.state, state.breaker)
            _tell(before, state)
        if changed:
            for look in self._state_watchers:
                look()
        for offer in self._all_offers():
            if offer != self._offers[offer.name]:
                self._offers[offer.name] = offer
                for watcher in self._watchers:
                    watcher(offer)
        self._wait_for_change()

    def _wait_for_change(self) -> None:
        self._cancel_change()
        now = self._clock.seconds()
        when = min([health.changes_at(now) for health in self._health.values()])
        if when < math.inf and self.running:
            self._change = self._clock.callLater(when - now, self._changed)

    def _changed(self) -> None:
        self._change = None
        self._update()

    def _cancel_change(self) -> None:
        if self._change is not None:
            self._change.cancel()
            self._change = None


def _tell(before: BackendState, state: BackendState) -> None:
    """One line for each change that somebody may have to act on: being busy is none."""
    if state.restarts != before.restarts:
        _log.info("backend {name} has restarted", name=state.name)
    if state.state == before.state or {state.state, before.state} <= IN_ORDER:
        return
    if state.state in IN_ORDER:
        _log.info("backend {name} is healthy ({kind})", name=state.name, kind=state.kind)
    else:
        _log.warn("backend {name} is {state}: {reason}", name=state.name, state=state.state, reason=state.reason)


class _Probe:
    """One backend's looks, each a while after the one before has ended."""

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
            self._unreachable(self._backend.name, failure)
        else:
            self._reported(self._backend.name, report)

    def _failed(self, failure: Failure) -> None:
        if failure.check(CancelledError) is None:
            _log.failure("probe of {name}", failure, name=self._backend.name)

    def _again(self, _: object) -> None:
        self._looking = None
        if not self._stopped:
            wait = self._interval * (1 - JITTER + 2 * JITTER * self._random())
            self._next = self._clock.callLater(wait, self.start)
