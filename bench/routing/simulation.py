"""The gateway's side of the simulation: requests come, a rule sends them to engines, and what happened is counted."""

from __future__ import annotations

import heapq
import random
from typing import NamedTuple, Protocol

from .caches import Cache, Infinite, Paged, Pooled, Slots
from .engine import PROFILES, Engine, Job, Profile, Request, prefill_seconds


class View:
    """What a gateway knows of an engine; ``engine`` is for the bounds alone."""

    def __init__(self, place: int, engine: Engine) -> None:
        self.place = place
        self.engine = engine
        self.inflight = 0
        self.kv = engine.profile.kv + engine.profile.offload
        self._seen = engine.load()
        self._seen_at = 0.0

    def load(self, now: float) -> tuple[int, int, float]:
        """Waiting, running, KV use, as scraped every 50 ms."""
        if now - self._seen_at >= 0.05:
            self._seen, self._seen_at = self.engine.load(), now
        return self._seen


class Rule(Protocol):
    """Where requests go. ``choose`` gives an engine, or None: then `release` gives the request later."""

    name: str

    def setup(self, views: list[View], rng: random.Random, profile: Profile) -> None: ...
    def choose(self, request: Request, now: float) -> int | None: ...
    def release(self, now: float) -> list[tuple[Request, int]]: ...
    def wake(self, now: float) -> float | None: ...
    def first_token(self, request: Request, place: int, now: float) -> None: ...
    def complete(self, request: Request, place: int, now: float, cached: int) -> None: ...


class Figures(NamedTuple):
    """Of the measured requests: seconds to first token; the part that kept its service level; the part of the prompt tokens
    that was cached; most requests in flight on an engine over the mean, as arrivals find it; requests for each second."""

    mean: float
    p90: float
    p99: float
    slo: float
    hit: float
    imbalance: float
    rate: float


class Simulation:
    """Requests in order of arrival, engines of one profile and different speeds, one rule. The same seed, the same result."""

    def __init__(
        self,
        requests: list[Request],
        profile: str,
        n: int,
        rule: Rule,
        *,
        seed: int = 1,
        speeds: list[float] | None = None,
        shared: str = "",
        closed: bool = False,
    ) -> None:
        self.profile = PROFILES[profile]
        self.now = 0.0
        self.served: list[tuple[Request, Job, float]] = []
        self._requests = requests
        self._rule = rule
        caches = _caches(self.profile, n, shared)
        engines = [Engine(self.profile, cache, speed) for cache, speed in zip(caches, speeds or [1.0] * n, strict=True)]
        self.views = [View(i, engine) for i, engine in enumerate(engines)]
        self._events: list[tuple[float, int, int, int | Request]] = []  # when, serial, version of the step, engine or request
        self._serial = 0
        self._imbalance: list[float] = []
        self._wake = float("inf")
        self._children: dict[int, list[Request]] = {}
        for request in requests:
            request.arrival = request.due
            if closed and request.parent is not None:
                self._children.setdefault(request.parent, []).append(request)
        rule.setup(self.views, random.Random(seed + 7919), self.profile)

    def run(self) -> Figures:
        """All requests to their ends."""
        followers = {request.rid for children in self._children.values() for request in children}
        for request in self._requests:
            if request.rid not in followers:
                self._push(request.arrival, 0, request)
        while self._events or self._wake < float("inf"):
            if not self._events or self._wake < self._events[0][0]:
                self.now, self._wake = self._wake, float("inf")
                self._release()
                continue
            self.now, _, version, what = heapq.heappop(self._events)
            if isinstance(what, Request):
                self._arrive(what)
            elif version == self.views[what].engine.version:
                self._finish(what)
        if len(self.served) != len(self._requests):
            raise RuntimeError(f"{len(self.served)} of {len(self._requests)} requests were served")
        return self._figures()

    def _push(self, when: float, version: int, what: int | Request) -> None:
        self._serial += 1
        heapq.heappush(self._events, (when, self._serial, version, what))

    def _arrive(self, request: Request) -> None:
        inflight = [view.inflight for view in self.views]
        if any(inflight):
            self._imbalance.append(max(inflight) * len(inflight) / sum(inflight))
        place = self._rule.choose(request, self.now)
        if place is None:
            self._release()
        else:
            self._send(request, place)

    def _release(self) -> None:
        for request, place in self._rule.release(self.now):
            self._send(request, place)
        self._wake = self._rule.wake(self.now) or float("inf")

    def _send(self, request: Request, place: int) -> None:
        view = self.views[place]
        view.inflight += 1
        ends = view.engine.add(Job(request, self.now), self.now)
        if ends is not None:
            self._push(ends, view.engine.version, place)

    def _finish(self, place: int) -> None:
        view = self.views[place]
        firsts, done = view.engine.finish(self.now)
        for job in firsts:
            self._rule.first_token(job.request, place, self.now)
        for job in done:
            view.inflight -= 1
            self.served.append((job.request, job, self.now))
            self._rule.complete(job.request, place, self.now, job.cached)
            for child in self._children.get(job.request.rid, ()):
                child.arrival = max(child.due, self.now + 0.5)
                self._push(child.arrival, 0, child)
        ends = view.engine.start(self.now)
        if ends is not None:
            self._push(ends, view.engine.version, place)
        if firsts or done:
            self._release()

    def _figures(self) -> Figures:
        served = sorted(self.served, key=lambda row: (row[0].arrival, row[0].rid))
        measured = served[len(served) // 10 :]
        waits = sorted(job.first - request.arrival for request, job, _ in measured)
        count = len(measured)
        return Figures(
            sum(waits) / count,
            waits[int(0.9 * count)],
            waits[int(0.99 * count)],
            sum(self._kept(*row) for row in measured) / count,
            sum(job.cached for _, job, _ in measured) / sum(request.tokens for request, _, _ in measured),
            sum(self._imbalance) / max(len(self._imbalance), 1),
            len(served) / max(served[-1][0].arrival - served[0][0].arrival, 1e-9),
        )

    def _kept(self, request: Request, job: Job, ended: float) -> bool:
        """The first token within the base and half as long again as an idle, empty engine takes; the others in step."""
        profile = self.profile
        most = profile.slo_base + 1.5 * prefill_seconds(profile, request.tokens)
        each = (ended - job.first) / max(request.output - 1, 1)
        return job.first - request.arrival <= most and each <= profile.slo_tpot


def _caches(profile: Profile, n: int, shared: str) -> list[Cache]:
    if shared == "infinite":
        computed: set[int] = set()
        return [Infinite(profile.kv, computed) for _ in range(n)]
    if shared == "pooled":
        pool = Paged(n * profile.kv, n * profile.offload)
        return [Pooled(profile.kv, pool) for _ in range(n)]
    if profile.slotted:
        return [Slots(profile.kv, profile.seats) for _ in range(n)]
    return [Paged(profile.kv, profile.offload) for _ in range(n)]
