"""Rules that look at load or at a key alone, and the bounds that know everything."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Iterator
from hashlib import blake2b

from .caches import Infinite, Paged, Pooled
from .engine import Engine, Profile, Request, prefill_seconds
from .simulation import View


class AtOnce:
    """What rules share that send each request when it comes."""

    name = ""

    def setup(self, views: list[View], rng: random.Random, profile: Profile) -> None:
        self.views, self.rng, self.profile = views, rng, profile
        self.prepare()

    def prepare(self) -> None:
        """The rule's own state."""

    def release(self, now: float) -> list[tuple[Request, int]]:
        return []

    def wake(self, now: float) -> float | None:
        return None

    def first_token(self, request: Request, place: int, now: float) -> None:
        pass

    def complete(self, request: Request, place: int, now: float, cached: int) -> None:
        pass

    def least(self, costs: list[float]) -> int:
        """The place with the lowest cost, one of them by lot if there are several."""
        low = min(costs)
        return self.rng.choice([i for i, cost in enumerate(costs) if cost == low])


class RoundRobin(AtOnce):
    """Each in turn."""

    name = "round robin"

    def prepare(self) -> None:
        self._last = -1

    def choose(self, request: Request, now: float) -> int:
        self._last = (self._last + 1) % len(self.views)
        return self._last


class LeastRequests(AtOnce):
    """The fewest requests in flight (nginx least_conn)."""

    name = "least requests"

    def choose(self, request: Request, now: float) -> int:
        return self.least([view.inflight for view in self.views])


class PowerOfTwo(AtOnce):
    """The less loaded of two by lot (Mitzenmacher 2001)."""

    name = "power of two"

    def choose(self, request: Request, now: float) -> int:
        return min(self.rng.sample(range(len(self.views)), 2), key=lambda i: self.views[i].inflight)


class SessionHash(AtOnce):
    """Consistent hashing of the session, 150 points for each backend (vLLM production stack, `session`)."""

    name = "session hash"

    def prepare(self) -> None:
        points = [(_hash(f"ring {i} {k}"), i) for i in range(len(self.views)) for k in range(150)]
        points.sort()
        self._points = [point for point, _ in points]
        self._places = [place for _, place in points]

    def walk(self, key: str) -> Iterator[int]:
        """Places in the order of the ring from the key's point."""
        begin = bisect.bisect_right(self._points, _hash(key))
        yield from dict.fromkeys(self._places[begin:] + self._places[:begin])

    def choose(self, request: Request, now: float) -> int:
        return next(self.walk(request.session))


class BoundedLoads(SessionHash):
    """Consistent hashing with bounded loads, 1.25 (Mirrokni, Thorup and Zadimoghaddam 2018)."""

    name = "CHWBL"

    def choose(self, request: Request, now: float) -> int:
        most = math.ceil(1.25 * (sum(view.inflight for view in self.views) + 1) / len(self.views))
        return next(i for i in self.walk(request.session) if self.views[i].inflight < most)


class Oracle(AtOnce):
    """A bound, with a cache that all engines share: the least exact prompt work left."""

    def __init__(self, name: str) -> None:
        self.name = name

    def choose(self, request: Request, now: float) -> int:
        engines = [view.engine for view in self.views]
        return min(range(len(engines)), key=lambda i: (self._left(engines[i]), engines[i].running + len(engines[i].waiting)))

    def _left(self, engine: Engine) -> float:
        cache = engine.cache
        assert isinstance(cache, Infinite | Pooled | Paged)
        left = [(job.request.tokens - job.position, job.position) for job in engine.prefill]
        for job in engine.waiting:
            depth = next((k for k, key in enumerate(job.request.prompt.keys) if key not in cache.computed), None)
            cached = job.request.cached(len(job.request.prompt.keys) if depth is None else depth)
            left.append((job.request.tokens - cached, cached))
        return sum(prefill_seconds(self.profile, tokens, cached, engine.speed) for tokens, cached in left)


def _hash(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest())
