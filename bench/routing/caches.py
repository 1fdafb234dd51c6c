"""Prefix caches of a simulated engine: pages with a LRU, the slots of llama.cpp, and two that no engine has, as bounds."""

from __future__ import annotations

from collections import OrderedDict
from itertools import takewhile
from typing import Protocol

from .engine import Job


class Cache(Protocol):
    """KV memory of ``capacity`` tokens, ``pinned`` of them by what runs. A job's output is reserved when it is admitted."""

    capacity: int
    pinned: int

    def admit(self, job: Job) -> bool:
        """Pin what the job needs and set ``matched``; False if there is no room now."""
        ...

    def ready(self, job: Job, tokens: int) -> None:
        """The first so many tokens of the job's prompt are computed."""
        ...

    def release(self, job: Job) -> None:
        """The job is done."""
        ...


class Paged:
    """As vLLM and SGLang do it: blocks of running requests are pinned, others stay in a LRU that loses tails first."""

    def __init__(self, capacity: int, offload: int = 0) -> None:
        self.capacity = capacity
        self.pinned = 0
        self.computed: set[int] = set()
        self.idle: OrderedDict[int, int] = OrderedDict()
        self.cached = 0
        self._offload = offload
        self._users: dict[int, int] = {}
        self._spans: dict[int, int] = {}

    def match(self, keys: list[int]) -> int:
        """Blocks from the front that are computed."""
        return sum(1 for _ in takewhile(self.computed.__contains__, keys))

    def admit(self, job: Job) -> bool:
        request, users = job.request, self._users
        keys, ends = request.prompt.keys, request.prompt.ends
        spans = [end - (ends[i - 1] if i else 0) for i, end in enumerate(ends)]
        new = request.output + sum([span for key, span in zip(keys, spans, strict=True) if key not in users])
        if self.pinned + new > self.capacity and self.pinned > 0:
            return False
        job.matched = self.match(keys)
        for key, span in zip(keys, spans, strict=True):
            if key in users:
                users[key] += 1
                continue
            users[key] = 1
            if key in self.idle:
                self.cached -= self.idle.pop(key)
            else:
                self._spans[key] = span
        self.pinned += new
        self._shrink()
        return True

    def _shrink(self) -> None:
        room = self.capacity + self._offload - self.pinned
        while self.cached > room and self.idle:
            key, span = self.idle.popitem(last=False)
            self.cached -= span
            self.computed.discard(key)
            del self._spans[key]

    def ready(self, job: Job, tokens: int) -> None:
        upto = whole_blocks(job, tokens)
        self.computed.update(job.request.prompt.keys[job.ready : upto])
        job.ready = max(job.ready, upto)

    def release(self, job: Job) -> None:
        self.pinned -= job.request.output
        for key in reversed(job.request.prompt.keys):
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                span = self.idle[key] = self._spans[key]
                self.cached += span
                self.pinned -= span
        self._shrink()


class Slots:
    """As llama.cpp does it: a slot remembers its last prompt. A request gets the idle slot with the longest common prefix if
    that is a tenth of the prompt at least, else the one idle for longest."""

    SIMILARITY = 0.10

    def __init__(self, capacity: int, slots: int) -> None:
        self.capacity = capacity
        self.pinned = 0
        self._prompts: list[list[int]] = [[] for _ in range(slots)]
        self._idle = dict.fromkeys(range(slots))  # the one idle for longest first

    def admit(self, job: Job) -> bool:
        request = job.request
        need = request.tokens + request.output
        if not self._idle or (self.pinned + need > self.capacity and self.pinned > 0):
            return False
        keys = request.prompt.keys
        matches = {slot: common(self._prompts[slot], keys) for slot in self._idle}
        slot = max(matches, key=lambda slot: matches[slot])
        if request.covered(matches[slot]) < self.SIMILARITY * request.tokens:
            slot = next(iter(self._idle))
        job.slot, job.matched = slot, matches[slot]
        self._prompts[slot] = keys[: job.matched]
        del self._idle[slot]
        self.pinned += need
        return True

    def ready(self, job: Job, tokens: int) -> None:
        upto = whole_blocks(job, tokens)
        if upto > job.ready:
            self._prompts[job.slot] = job.request.prompt.keys[:upto]
            job.ready = upto

    def release(self, job: Job) -> None:
        self._idle[job.slot] = None
        self.pinned -= job.request.tokens + job.request.output


class Infinite:
    """A bound: one infinite cache for all engines. What runs is still bounded by each engine's memory."""

    def __init__(self, capacity: int, computed: set[int]) -> None:
        self.capacity = capacity
        self.pinned = 0
        self.computed = computed

    def admit(self, job: Job) -> bool:
        need = job.request.tokens + job.request.output
        if self.pinned + need > self.capacity and self.pinned > 0:
            return False
        job.matched = sum(1 for _ in takewhile(self.computed.__contains__, job.request.prompt.keys))
        self.pinned += need
        return True

    def ready(self, job: Job, tokens: int) -> None:
        upto = whole_blocks(job, tokens)
        self.computed.update(job.request.prompt.keys[job.ready : upto])
        job.ready = max(job.ready, upto)

    def release(self, job: Job) -> None:
        self.pinned -= job.request.tokens + job.request.output


class Pooled:
    """A bound: the caches of all engines are one, which each of them can use for nothing (KV transfer without cost)."""

    def __init__(self, capacity: int, pool: Paged) -> None:
        self.capacity = capacity
        self.pinned = 0
        self.pool = pool
        self.computed = pool.computed

    def admit(self, job: Job) -> bool:
        need = job.request.tokens + job.request.output
        if (self.pinned + need > self.capacity and self.pinned > 0) or not self.pool.admit(job):
            return False
        self.pinned += need
        return True

    def ready(self, job: Job, tokens: int) -> None:
        self.pool.ready(job, tokens)

    def release(self, job: Job) -> None:
        self.pool.release(job)
        self.pinned -= job.request.tokens + job.request.output


def whole_blocks(job: Job, tokens: int) -> int:
    """Blocks that the first so many tokens of the job's prompt fill."""
    ends = job.request.prompt.ends
    if tokens >= job.request.tokens:
        return len(ends)
    upto = job.ready
    while ends[upto] <= tokens:
        upto += 1
    return upto


def common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
