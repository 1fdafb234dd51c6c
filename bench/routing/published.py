"""Routers that know of caches, re-implemented from their public descriptions, with their published parameters."""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque

from gateway.core.prefix import Blocks, PrefixIndex

from .baselines import AtOnce
from .engine import Profile, Request, prefill_seconds
from .simulation import View


class Mirrored(AtOnce):
    """A rule with a prefix index, bounded by what each cache really holds."""

    def prepare(self) -> None:
        self.index = PrefixIndex()
        for view in self.views:
            self.index.add(view.kv)

    def match(self, prompt: Blocks) -> list[int]:
        """Blocks that each backend is thought to hold."""
        depths = [0] * len(self.views)
        for place, depth in self.index.match(prompt):
            depths[place] = depth
        return depths

    def insert(self, place: int, prompt: Blocks, depths: list[int]) -> None:
        """It is sent there."""
        self.index.insert(place, prompt, depths[place])


class CacheAware(AtOnce):
    """SGLang's router, `cache_aware`, command line defaults: imbalanced (max - min > 64 and max > 1.5 min) or less than 0.3 of
    the prompt known: the fewest requests; else the backend that had the deepest known block first. Trees of 2**26
    characters."""

    name = "SGLang cache_aware"

    def prepare(self) -> None:
        count = len(self.views)
        self._owners: dict[int, dict[int, None]] = {}
        self._lru: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(count)]
        self._size = [0] * count
        self._sent = [0] * count
        self._evict_at = 120.0

    def choose(self, request: Request, now: float) -> int:
        if now >= self._evict_at:
            self._evict()
            self._evict_at = now + 120.0
        loads = [view.inflight for view in self.views]
        place = min(range(len(loads)), key=lambda i: (loads[i], self._sent[i], i))
        if max(loads) - min(loads) <= 64 or max(loads) <= 1.5 * min(loads):
            known = [key for key in request.prompt.keys if self._owners.get(key)]
            depth = next((k for k, key in enumerate(request.prompt.keys) if not self._owners.get(key)), len(known))
            if request.covered(depth) / request.tokens > 0.3:
                place = next(iter(self._owners[request.prompt.keys[depth - 1]]))
        self._insert(request, place)
        self._sent[place] += 1
        return place

    def _insert(self, request: Request, place: int) -> None:
        lru, ends = self._lru[place], request.prompt.ends
        for k in range(len(request.prompt.keys) - 1, -1, -1):
            key = request.prompt.keys[k]
            owners = self._owners.setdefault(key, {})
            if place in owners:
                lru.move_to_end(key)
            else:
                owners[place] = None
                lru[key] = 4 * (ends[k] - (ends[k - 1] if k else 0))
                self._size[place] += lru[key]

    def _evict(self) -> None:
        for place, lru in enumerate(self._lru):
            while self._size[place] > 2**26:
                key, size = lru.popitem(last=False)
                self._size[place] -= size
                del self._owners[key][place]


class Scores(Mirrored):
    """llm-d's endpoint picker, default profile: queue 2, KV use 2, prefix 3, of the first 4,096 tokens; metrics every 50 ms."""

    name = "llm-d default"

    def choose(self, request: Request, now: float) -> int:
        seen = min(request.tokens, 4096)
        depth = bisect.bisect_right(request.prompt.ends, seen)
        prompt = Blocks(request.prompt.keys[:depth], request.prompt.ends, seen)
        depths = self.match(prompt)
        loads = [view.load(now) for view in self.views]
        least, most = min(load[0] for load in loads), max(load[0] for load in loads)
        costs = []
        for (waiting, _, used), held in zip(loads, depths, strict=True):
            queue = 1.0 if most == least else (most - waiting) / (most - least)
            costs.append(-round(2.0 * queue + 2.0 * (1.0 - used) + 3.0 * min(1.0, request.covered(held) / seen), 12))
        place = self.least(costs)
        self.insert(place, prompt, depths)
        return place


class Dynamo(AtOnce):
    """NVIDIA Dynamo's KV router without events: active prefill + prompt - overlap + decode blocks, in blocks; what was
    sent somewhere is there for 120 s."""

    name = "Dynamo"

    def prepare(self) -> None:
        self._until: list[dict[int, float]] = [{} for _ in self.views]
        self._active: list[dict[int, int]] = [{} for _ in self.views]
        self._prefill = [0.0] * len(self.views)
        self._mine: dict[int, float] = {}

    def choose(self, request: Request, now: float) -> int:
        keys = request.prompt.keys
        uncached = [request.tokens - request.covered(self._depth(until, keys, now)) for until in self._until]
        costs = [
            (prefill + new) / 512 + len(active) + sum([key not in active for key in keys])
            for prefill, new, active in zip(self._prefill, uncached, self._active, strict=True)
        ]
        place = self.least(costs)
        self._prefill[place] += uncached[place]
        self._mine[request.rid] = uncached[place]
        for key in keys:
            self._active[place][key] = self._active[place].get(key, 0) + 1
            self._until[place][key] = now + 120.0
        return place

    @staticmethod
    def _depth(until: dict[int, float], keys: list[int], now: float) -> int:
        return next((k for k, key in enumerate(keys) if until.get(key, 0.0) <= now), len(keys))

    def first_token(self, request: Request, place: int, now: float) -> None:
        self._prefill[place] -= self._mine.pop(request.rid)

    def complete(self, request: Request, place: int, now: float, cached: int) -> None:
        active = self._active[place]
        for key in request.prompt.keys:
            active[key] -= 1
            if not active[key]:
                del active[key]


class DynamoQueue(Dynamo):
    """The same with its queue: requests wait while every backend has more than a step's budget of prompts, short ones first."""

    name = "Dynamo, queue"

    def setup(self, views: list[View], rng: object, profile: Profile) -> None:
        super().setup(views, rng, profile)  # type: ignore[arg-type]
        self._queue: list[tuple[int, int, Request]] = []

    def choose(self, request: Request, now: float) -> int | None:  # type: ignore[override]
        if not self._queue and min(self._prefill) <= self.profile.budget:
            return super().choose(request, now)
        bisect.insort(self._queue, (request.tokens, request.rid, request))
        return None

    def release(self, now: float) -> list[tuple[Request, int]]:
        out = []
        while self._queue and min(self._prefill) <= self.profile.budget:
            request = self._queue.pop(0)[2]
            out.append((request, super().choose(request, now)))
        return out


class LMetric(Mirrored):
    """LMetric (arXiv 2603.15202): new prompt tokens, those queued there among them, times requests in flight."""

    name = "LMetric"

    def prepare(self) -> None:
        super().prepare()
        self._queued = [0] * len(self.views)
        self._mine: dict[int, int] = {}

    def choose(self, request: Request, now: float) -> int:
        depths = self.match(request.prompt)
        uncached = [request.tokens - request.covered(depth) for depth in depths]
        rows = zip(uncached, self._queued, self.views, strict=True)
        scores = [((max(1, new) + queued) * (view.inflight + 1), view.inflight) for new, queued, view in rows]
        place = self.rng.choice([i for i, score in enumerate(scores) if score == min(scores)])
        self._queued[place] += uncached[place]
        self._mine[request.rid] = uncached[place]
        self.insert(place, request.prompt, depths)
        return place

    def first_token(self, request: Request, place: int, now: float) -> None:
        self._queued[place] -= self._mine.pop(request.rid)


class SMetric(Mirrored):
    """vllm-project/router, `smetric`: the holder of a session's cache while it is expected to keep the service level; else
    the least queued prompt work times requests in flight. Rates are the 90th percentile of the last 64 (work / time to
    first token)."""

    name = "vLLM smetric"

    def prepare(self) -> None:
        super().prepare()
        count = len(self.views)
        self._turns: dict[str, int] = {}
        self._queued = [0.0] * count
        self._mine: dict[int, tuple[float, float]] = {}
        self._samples: list[deque[float]] = [deque(maxlen=64) for _ in range(count)]
        self._rates = [float("inf")] * count
        self._turn = -1

    def choose(self, request: Request, now: float) -> int:
        depths = self.match(request.prompt)
        profile, count = self.profile, len(self.views)
        hits = [request.covered(depth) for depth in depths]
        fresh = [max(1, request.tokens - hit) for hit in hits]
        slope = profile.attention / profile.token
        work = [new + slope * new * (request.tokens - new / 2) for new in fresh]
        most = profile.slo_base + 1.5 * profile.token * request.tokens
        queued = [before + mine for before, mine in zip(self._queued, work, strict=True)]
        meets = [work / rate <= most for work, rate in zip(queued, self._rates, strict=True)]
        self._turn = (self._turn + 1) % count
        order = [(self._turn + k) % count for k in range(count)]
        place = min(order, key=lambda i: queued[i] * self.views[i].inflight)
        holder = max(order, key=lambda i: hits[i])
        before = self._turns.get(request.session)
        if before is not None and hits[holder] > 0.5 * before and (meets[holder] or not any(meets)):
            place = holder
        self._turns[request.session] = request.tokens
        self._queued[place] += work[place]
        self._mine[request.rid] = work[place], now
        self.insert(place, request.prompt, depths)
        return place

    def first_token(self, request: Request, place: int, now: float) -> None:
        work, sent = self._mine.pop(request.rid)
        self._queued[place] -= work
        samples = self._samples[place]
        samples.append(work / max(1e-9, now - sent))
        if len(samples) >= 8:
            self._rates[place] = sorted(samples)[round((len(samples) - 1) * 0.9)]


class Conductor(Mirrored):
    """Mooncake's conductor (FAST 2025) without transfers: queue time and prefill time, by the engine's own model."""

    name = "Mooncake"

    def prepare(self) -> None:
        super().prepare()
        self._pending: list[dict[int, float]] = [{} for _ in self.views]
        self._free_at = [0.0] * len(self.views)

    def choose(self, request: Request, now: float) -> int:
        depths = self.match(request.prompt)
        cached = [request.cached(depth) for depth in depths]
        own = [prefill_seconds(self.profile, request.tokens - tokens, tokens) for tokens in cached]
        place = self.least([max(0.0, free - now) + mine for free, mine in zip(self._free_at, own, strict=True)])
        self._free_at[place] = max(now, self._free_at[place]) + own[place]
        self._pending[place][request.rid] = own[place]
        self.insert(place, request.prompt, depths)
        return place

    def first_token(self, request: Request, place: int, now: float) -> None:
        self._pending[place].pop(request.rid)
        self._free_at[place] = now + sum(self._pending[place].values())
