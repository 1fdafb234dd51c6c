"""A request that waits for a backend, what a backend reports of its load, and the two ways to be refused."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import msgspec

from .prefix import NO_BLOCKS, Blocks

PRIORITIES: Final = ("interactive", "default", "batch")


class Ticket(msgspec.Struct, eq=False):
    """One attempt to serve one request. Times are seconds on the monotonic clock.

    The caller gives what stands before `backend`; a retry is a new ticket that names the backends in ``tried``.
    ``deadline`` is when the first token must be there (infinite: whenever); ``size`` the bytes held while it waits;
    ``prompt_tokens`` an estimate; ``streams`` says that `first_token` will be told; ``weight`` is its tenant's share.
    """

    model: str
    arrived: float
    tenant: str = ""
    weight: float = 1.0
    priority: int = 1
    deadline: float = math.inf
    size: int = 0
    prompt_tokens: int = 0
    max_tokens: int | None = None
    prompt: Blocks = NO_BLOCKS
    session: str | None = None
    streams: bool = True
    tried: frozenset[str] = frozenset()
    # What the scheduler says:
    backend: str | None = None
    decision: str = ""
    granted_at: float = 0.0
    cached_tokens: int = 0
    """Prompt tokens that the backend is expected to have cached."""
    # What the scheduler keeps:
    lane: int = -1
    waiting: bool = False
    serial: int = 0
    known: int = 0  # blocks of the prompt that the backend held before
    matches: list[tuple[int, int]] = []
    seconds: float = 0.0  # of prompt work that this adds to its backend, predicted
    key: float = 0.0  # its place in the queue among its tenant's
    tokens: float = 0.0  # token work that it is expected to be
    charged: float = 0.0  # token work that its tenant's account bears for it
    first_token_at: float | None = None
    started: float = 0.0  # when its backend began with it, as far as can be told
    overlapped: float = 0.0  # seconds it waited there behind another prompt


class Load(NamedTuple):
    """What a backend says of itself: requests running and waiting, the part of its KV memory in use (0 to 1), and when."""

    running: int
    waiting: int
    kv_usage: float
    at: float


class Bounds(NamedTuple):
    """How much may wait."""

    requests: int = 1024
    bytes: int = 64 * 1024 * 1024


class Refused(Exception):
    """A ticket that the scheduler does not take. ``retry_after`` seconds from now it might."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"retry after {retry_after:.1f} s")
        self.retry_after = retry_after


class QueueFull(Refused):
    """As many requests or bytes wait as may."""


class Hopeless(Refused):
    """The ticket is predicted to miss its deadline however it is served."""
