"""The backends: a look at each at a steady pace, and what is known of them by how requests to them end.

`core.health` judges; this is its clock, its log and its voice. Whoever schedules watches the offers, and tells the
pool of each request when it is sent and how it ended.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from .backend import Backend
from .core.backend_settings import BackendSettings
from .core.errors import BackendFailed
from .core.health import Health, Rules, offers, windows
from .core.ranges import Window
from .core.reports import Report
from .core.settings import Settings
from .core.status import IN_ORDER, BackendState, Offer
from .looks import Looks

Watcher = Callable[[Offer], object]

Sent = tuple[Health, int]
"""A request that has been sent, as its end is told with: to whom, and in which era of that one's breaker. A name alone would
not do: it may be another backend's by then."""

_log: Final = Logger("gateway.pool")


def _ignore(_: object) -> None:
    """Somebody who wants to know less."""


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
        self._rules = Rules(*[getattr(settings, name) for name in Rules._fields])
        self._clock = clock
        self._random = random
        self._panic = settings.panic
        self.adaptive = settings.adaptive_concurrency
        """`first_token` is of use."""
        self._interval = settings.probe_interval
        self._health: dict[str, Health] = {}
        self._leaving: list[Health] = []
        self._looks: dict[str, Looks] = {}
        self._marks: dict[str, tuple[object, ...]] = {}
        self._offers: dict[str, Offer] = {}
        self._shown: dict[str, BackendState] = {}
        self._watchers: list[tuple[Watcher, Callable[[str], object], Callable[[], object]]] = []
        self.windows: dict[str, Window] = {}
        """What is known of each model's window."""
        self._state_watchers: list[Callable[[], object]] = []
        self._change: IDelayedCall | None = None
        self.coming: Sequence[BackendSettings] = ()
        """Sources that may be about to find backends: these look like them."""
        self.empty: Sequence[BackendSettings] = ()
        """Sources that have found none, whether they may be about to or not."""
        own = {one.name: one for one in settings.backends}
        self.change([], [(own.get(one.name) or BackendSettings(name=one.name, url=""), one) for one in backends])

    def startService(self) -> None:
        super().startService()
        for looks in list(self._looks.values()):
            looks.start()

    def stopService(self) -> None:
        super().stopService()
        for looks in self._looks.values():
            looks.stop()
        self._cancel_change()

    # --- who belongs to it

    def change(self, gone: Iterable[str], come: Iterable[tuple[BackendSettings, Backend]]) -> None:
        """Some go: they get no new requests, and what they have ends as it would. Others come. One that comes and is there
        already keeps what is known of it, and has other settings from now on."""
        left = list(gone)
        for name in left:
            self._drop(name)
        started = [self._take(own, backend) for own, backend in come]
        for name in left:
            for _, leave, _ in self._watchers:
                leave(name)
        self.windows = windows(list(self._health.values()))
        self._update(anyhow=True)
        if self.running:
            for looks in started:
                looks.start()

    def _take(self, own: BackendSettings, backend: Backend) -> Looks:
        name, now = own.name, self._clock.seconds()
        health = self._health.get(name)
        if health is None:
            health = self._health[name] = Health(own, self._rules, now)
            self._marks[name], self._shown[name] = health.mark(), health.state(now)
        else:
            health.use(own)
            self._looks[name].stop()
        looks = self._looks[name] = Looks(backend, self._clock, self._interval, self._random, self._reported, self._unreachable)
        return looks

    def _drop(self, name: str) -> None:
        health = self._health.pop(name)
        health.leaving = True
        self._leaving.append(health)
        self._looks.pop(name).stop()
        del self._marks[name], self._shown[name], self._offers[name]

    # --- what is known

    def snapshot(self) -> list[BackendState]:
        """All backends as they are shown, and those that have gone as long as they have requests."""
        now = self._clock.seconds()
        self._leaving = [health for health in self._leaving if health.held]
        shown = dict(self._health)
        for health in self._leaving:
            shown.setdefault(health.name, health)
        return [health.state(now) for health in shown.values()]

    def watch(
        self, offered: Watcher, left: Callable[[str], object] = _ignore, settled: Callable[[], object] = lambda: None
    ) -> None:
        """Calls ``offered`` with the offer of each backend now, and with one that has changed whenever it has; ``left`` with
        the name of one that is gone; and ``settled`` when all that has changed at once has been told."""
        self._watchers.append((offered, left, settled))
        for offer in self._offers.values():
            offered(offer)

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
        """A backend that may have the model is not ready yet, but will be: it loads, is not looked at yet, or not found."""
        return _one_may_have(model, self.coming) or any(
            health.warming and (not model or health.takes is None or model in health.takes) for health in self._health.values()
        )

    def may_come(self, model: str) -> bool:
        """A source that has found no backend may find one that has the model."""
        return _one_may_have(model, self.empty)

    def soonest(self) -> float:
        """Seconds until things may look better: a breaker half-open, a rate limit over, or else the next look."""
        now = self._clock.seconds()
        when = self._changes_at(now)
        return min(when - now, self._interval) if when < math.inf else self._interval

    def _changes_at(self, now: float) -> float:
        return min([health.changes_at(now) for health in self._health.values()], default=math.inf)

    # --- what happens to requests

    def sent(self, name: str) -> Sent:
        """A request goes there. Returns what its end is told with."""
        health = self._health[name]
        era = health.sent(self._clock.seconds())
        if health.breaker.until is not None:  # closed, it lets everything through
            self._check(health)
        return health, era

    def first_token(self, sent: Sent, seconds: float, expected: float) -> None:
        """Its first token has come after ``seconds``. ``expected``: how long it would take without others, in any unit
        that does not change, such as prompt tokens to be computed plus a constant."""
        health = sent[0]
        health.first_token(seconds, expected)
        self._check(health)

    def succeeded(self, sent: Sent, first_byte: float = 0.0) -> None:
        """It was answered, with the first byte after so many seconds. A 4xx, which is the caller's doing, is an answer."""
        health, era = sent
        was_closed = health.breaker.until is None
        health.succeeded(era, first_byte, self._clock.seconds())
        if not was_closed or health.breaker.until is not None:
            self._check(health)

    def failed(self, sent: Sent, failure: BackendFailed) -> None:
        """It failed."""
        health, era = sent
        health.failed(era, failure.code, self._clock.seconds())
        self._check(health)

    def cancelled(self, sent: Sent) -> None:
        """It was given up: its client has left, its deadline has passed, another backend was quicker."""
        health, era = sent
        health.cancelled(era)
        self._check(health)

    def rate_limited(self, sent: Sent, seconds: float) -> None:
        """It was answered with 429, and the backend wants no more for so many seconds."""
        health, era = sent
        health.rate_limited(era, seconds, self._clock.seconds())
        self._check(health)

    def _check(self, health: Health) -> None:
        """Say so if this has changed what may be sent."""
        if health.leaving:
            return
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

    def _update(self, *, anyhow: bool = False) -> None:
        """Say what has changed, and wait for what changes by itself. ``anyhow``: something has, whatever it looks like."""
        changed = offered = anyhow
        now = self._clock.seconds()
        for name, health in self._health.items():
            before, state = self._shown[name], health.state(now)
            self._shown[name] = state
            changed |= (before.state, before.breaker) != (state.state, state.breaker)
            _tell(before, state)
        if changed:
            for look in self._state_watchers:
                look()
        for offer in self._all_offers():
            if offer != self._offers.get(offer.name):
                self._offers[offer.name] = offer
                offered = True
                for watcher, _, _ in self._watchers:
                    watcher(offer)
        if offered:
            for _, _, settled in self._watchers:
                settled()
        self._wait_for_change()

    def _wait_for_change(self) -> None:
        self._cancel_change()
        now = self._clock.seconds()
        when = self._changes_at(now)
        if when < math.inf and self.running:
            self._change = self._clock.callLater(when - now, self._changed)

    def _changed(self) -> None:
        self._change = None
        self._update()

    def _cancel_change(self) -> None:
        if self._change is not None:
            self._change.cancel()
            self._change = None


def _one_may_have(model: str, rows: Sequence[BackendSettings]) -> bool:
    return any(not model or not row.models or model in row.models for row in rows)


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
