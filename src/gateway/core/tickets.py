"""A request that waits for a backend, and the two ways to be refused."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import msgspec

from .prefix import NO_BLOCKS, Blocks

PRIORITIES: Final = ("interactive", "default", "batch")


class Ticket(msgspec.Struct, eq=False):
    """One attempt to serve one request. Times are seconds on the monotonic clock; a retry is a new ticket.

    The caller gives what stands before `backend`: ``weight``, its tenant's share; ``deadline``, when the first token must be
    there, and ``expires``, when a backend must have been found; ``size``, the bytes held while it waits; ``prompt_tokens``,
    an estimate (0: none); ``streams``, that `Scheduler.first_token` will be told; ``tried``, backends not to use.
    """

    model: str
    arrived: float
    tenant: str = ""
    weight: float = 1.0
    priority: int = 1
    deadline: float = math.inf
    expires: float = math.inf
    size: int = 0
    prompt_tokens: int = 0
    max_tokens: int | None = None
    prompt: Blocks = NO_BLOCKS
    session: str | None = None
    streams: bool = True
    tried: frozenset[str] = frozenset()
    # What the scheduler says once it is bound:
    backend: str | None = None
    decision: str = ""
    granted_at: float = 0.0
    cached_tokens: int = 0  # of its prompt, thought to be in the backend's cache
    # What the scheduler keeps:
    lane: int = -1
    waiting: bool = False
    serial: int = 0
    key: float = 0.0  # its place among its tenant's
    matches: list[tuple[int, int]] = []
    version: int = -1  # of the prefix index that gave the matches
    home: int = -1  # the place that every process would choose, were there nothing to tell the backends apart
    known: int = 0  # blocks of the prompt that the backend held before
    seconds: float = 0.0  # of prompt work, predicted: on its backend, or while it waits on the best one
    spare: float = 0.0  # seconds before its deadline at which it is too late to begin
    tokens: float = 0.0  # prompt and expected output
    charged: float = 0.0  # token work on its tenant's account
    first_token_at: float | None = None
    told: bool = False  # the first token was told, not guessed
    started: float = 0.0  # when its backend began with it, as far as can be seen
    overlapped: float = 0.0  # seconds it was there behind another prompt


class Bounds(NamedTuple):
    """How much may wait, and the seconds after which a ticket of priority ``default`` counts as interactive, one of ``batch``
    after twice as many."""

    requests: int = 1024
    bytes: int = 64 * 1024 * 1024
    aging: float = 30.0


BOUNDS: Final = Bounds()


class Refused(Exception):
    """A ticket that the scheduler does not take. ``retry_after`` seconds from now it might."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"retry after {retry_after:.1f} s")
        self.retry_after = retry_after


class QueueFull(Refused):
    """As many requests or bytes wait as may, and none of a lower priority."""


class Hopeless(Refused):
    """The ticket is predicted to miss its deadline however it is served."""
