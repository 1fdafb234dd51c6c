"""A model server: continuous batching step by step, chunked prefill under a token budget, KV memory with a prefix cache."""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from gateway.core.prefix import Blocks

if TYPE_CHECKING:
    from .caches import Cache


class Request:
    """What a gateway sees of a request, and (``output``, ``parent``) what only the simulation knows."""

    __slots__ = ("arrival", "due", "output", "parent", "prompt", "rid", "session", "tokens")

    def __init__(self, rid: int, arrival: float, prompt: Blocks, output: int, session: str, parent: int | None = None) -> None:
        self.rid = rid
        self.arrival = self.due = arrival
        self.prompt = prompt
        self.tokens = prompt.total
        self.output = output
        self.session = session
        self.parent = parent

    def covered(self, depth: int) -> int:
        """Tokens in the first ``depth`` blocks."""
        return self.prompt.ends[depth - 1] if depth else 0

    def cached(self, depth: int) -> int:
        """Tokens that need no work if the first ``depth`` blocks are cached: never all of them."""
        return min(self.covered(depth), self.tokens - 1)


class Profile(NamedTuple):
    """An engine. A step takes ``overhead + max(weights, token * tokens) + attention * new * context + read * context decoded``
    seconds; ``budget`` tokens a step; ``kv`` tokens of memory, ``offload`` more for the prefix cache alone."""

    token: float
    attention: float
    weights: float
    read: float
    overhead: float
    budget: int
    kv: int
    seats: int
    slo_base: float
    slo_tpot: float
    offload: int = 0
    slotted: bool = False


PROFILES: Final = {
    # Llama 70B BF16 on four H100 (half of Splitwise's prompt rate on eight)
    "70b": Profile(1 / 8000, 2.3e-9, 16e-3, 3.8e-8, 4e-3, 2048, 410_000, 256, 2.0, 0.10),
    "70b-offload": Profile(1 / 8000, 2.3e-9, 16e-3, 3.8e-8, 4e-3, 2048, 410_000, 256, 2.0, 0.10, offload=3_690_000),
    # Llama 3.1 8B BF16 on one H100
    "8b": Profile(1 / 25000, 1.3e-9, 6.4e-3, 5.6e-8, 2e-3, 8192, 430_000, 256, 1.0, 0.05),
    # 8B in four bits on an RTX 4090 under llama.cpp: 8 slots, each remembers its last prompt
    "llamacpp": Profile(1 / 5000, 6.5e-9, 6.5e-3, 2.2e-7, 1e-3, 2048, 131_072, 8, 2.0, 0.10, slotted=True),
}


def prefill_seconds(profile: Profile, tokens: int, cached: int = 0, speed: float = 1.0) -> float:
    """Time to read so many tokens on top of the cached ones on an idle engine."""
    seconds, done = 0.0, 0
    while done < max(tokens, 1):
        chunk = min(profile.budget, max(tokens, 1) - done)
        seconds += profile.overhead + max(profile.weights, profile.token * chunk)
        seconds += profile.attention * chunk * (cached + done + chunk * 0.5)
        done += chunk
    return seconds / speed


class Job:
    """A request on an engine."""

    __slots__ = ("cached", "chunk", "first", "matched", "position", "ready", "request", "sent", "slot")

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.sent = now
        self.first = -1.0
        self.matched = 0  # blocks that were cached
        self.cached = 0  # tokens that were
        self.ready = 0  # blocks that are computed
        self.position = 0  # tokens that are
        self.chunk = 0  # tokens in the step that runs
        self.slot = -1


class Engine:
    """Every sequence that decodes gets a token each step; the rest of the budget goes to prompts, those begun first, then in
    order of arrival (the first blocks those behind it if memory is short). Steps without prompts are skipped over in
    closed form."""

    def __init__(self, profile: Profile, cache: Cache, speed: float) -> None:
        self.profile = profile
        self.cache = cache
        self.speed = speed
        self.waiting: deque[Job] = deque()
        self.prefill: list[Job] = []
        self.running = 0
        self.version = 0  # of the step's end that was announced; others are void
        self.prompt_tokens = 0  # computed
        self._decoding: list[tuple[int, int, Job]] = []  # (last step, serial, job)
        self._context = 0
        self._step = 0
        self._serial = 0
        self._began = 0.0
        self._steps = 0  # that run now
        self._running_steps = False
        self._decode_only = False
        self._blocked = False

    def load(self) -> tuple[int, int, float]:
        """Requests waiting and running, part of the KV memory in use: what a metrics page says."""
        return len(self.waiting), self.running, min(1.0, self.cache.pinned / self.cache.capacity)

    def add(self, job: Job, now: float) -> float | None:
        """One more request; when the step ends, if that is news."""
        self.waiting.append(job)
        if not self._running_steps:
            return self.start(now)
        if self._decode_only and not self._blocked:
            return self._cut(now - self._began)
        return None

    def _cut(self, passed: float) -> float | None:
        """End the decode steps with the one that runs."""
        low, high = 0, self._steps
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._span(middle) <= passed else (low, middle - 1)
        if low + 1 >= self._steps:
            return None
        self._steps = low + 1
        self.version += 1
        return self._began + self._span(self._steps)

    def _span(self, steps: int) -> float:
        profile, count = self.profile, len(self._decoding)
        base = profile.overhead + max(profile.weights, profile.token * count)
        context = steps * self._context + count * steps * (steps - 1) * 0.5
        return (steps * base + profile.read * context) / self.speed

    def start(self, now: float) -> float | None:
        """Compose the next step; when it ends, or None if there is nothing to do."""
        profile, decoding = self.profile, len(self._decoding)
        budget = profile.budget - decoding
        attention = 0.0
        for job in self.prefill:
            job.chunk = min(job.request.tokens - job.position, max(budget, 0))
            budget -= job.chunk
            attention += self._compute(job)
        self._blocked = False
        while self.waiting and budget > 0 and self.running < profile.seats:
            job = self.waiting[0]
            if not self.cache.admit(job):
                self._blocked = True
                break
            self._admit(job)
            job.chunk = min(job.request.tokens - job.position, budget)
            budget -= job.chunk
            attention += self._compute(job)
        self._blocked = self._blocked or bool(self.waiting and self.running >= profile.seats)
        tokens = profile.budget - budget
        self._decode_only = tokens == decoding
        self._running_steps = tokens > 0
        if not tokens:
            return None
        self.version += 1
        self._began = now
        if self._decode_only:
            self._steps = self._decoding[0][0] - self._step
            return now + self._span(self._steps)
        self._steps = 1
        seconds = profile.overhead + max(profile.weights, profile.token * tokens)
        return now + (seconds + profile.attention * attention + profile.read * self._context) / self.speed

    def _admit(self, job: Job) -> None:
        self.waiting.popleft()
        self.running += 1
        request = job.request
        job.cached = job.position = request.cached(job.matched)
        job.ready = job.matched - (request.covered(job.matched) > job.cached)
        self.prefill.append(job)

    def _compute(self, job: Job) -> float:
        if job.chunk:
            self.cache.ready(job, job.position + job.chunk)
        return job.chunk * (job.position + job.chunk * 0.5)

    def finish(self, now: float) -> tuple[list[Job], list[Job]]:
        """The step ends: the jobs with their first token, and those that are done."""
        self._step += self._steps
        self._context += len(self._decoding) * self._steps
        firsts: list[Job] = []
        done: list[Job] = []
        while self._decoding and self._decoding[0][0] <= self._step:
            job = heapq.heappop(self._decoding)[2]
            self._context -= job.request.tokens + job.request.output
            done.append(job)
        if not self._decode_only:
            for job in self.prefill:
                job.position += job.chunk
                self.prompt_tokens += job.chunk
                job.chunk = 0
            firsts = [job for job in self.prefill if job.position >= job.request.tokens]
            self.prefill = [job for job in self.prefill if job.position < job.request.tokens]
            done += [job for job in firsts if not self._decode(job, now)]
        for job in done:
            self.running -= 1
            self.cache.release(job)
        self._running_steps = False
        return firsts, done

    def _decode(self, job: Job, now: float) -> bool:
        job.first = now
        if job.request.output <= 1:
            return False
        self._serial += 1
        heapq.heappush(self._decoding, (self._step + job.request.output - 1, self._serial, job))
        self._context += job.request.tokens + 1
        return True
