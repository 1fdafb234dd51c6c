"""What the scheduler shows of itself."""

from __future__ import annotations

from typing import NamedTuple


class Candidate(NamedTuple):
    """What speaks for and against a backend: its cost (lower is better), the prompt's tokens in its cache, the seconds until
    its prompts are read, and why it cannot have the ticket now (empty: it can)."""

    name: str
    cost: float
    cached_tokens: int
    wait: float
    why_not: str


class Snapshot(NamedTuple):
    """Numbers to show: waiting tickets by priority and their bytes; by backend, requests in flight and tokens that its cache
    is thought to hold; prompt tokens thought to be cached and said to have been; by tenant, token work done and waiting
    tickets."""

    depth: dict[str, int]
    bytes: int
    inflight: dict[str, int]
    index_tokens: dict[str, int]
    predicted_cached_tokens: int
    actual_cached_tokens: int
    served: dict[str, float]
    waiting: dict[str, int]
