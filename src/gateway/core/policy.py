"""How good each backend is for a ticket: the policies. Each gives every backend a cost; the scheduler takes the cheapest
of those that may have the ticket, and of equals the next in turn.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import Final, Protocol

from .backends import Backends
from .service_rate import work
from .tickets import Ticket

_BOUNDED: Final = 1.25  # a backend may hold this many times its share before its sessions go elsewhere
_SESSIONS: Final = 65536


class Policy(Protocol):
    """``holds``: a ticket may wait for a backend that is not yet ready for it, rather than go to another or queue there.
    ``hashes``: it looks at the prompt's blocks."""

    name: str
    holds: bool
    hashes: bool

    def costs(self, ticket: Ticket, backends: Backends, waits: list[float]) -> list[float]:
        """A cost for each backend; lower is better. ``waits`` are the seconds until each one's prompt queue is empty."""
        ...

    def why(self, ticket: Ticket, i: int, backends: Backends) -> str:
        """Why backend ``i`` was chosen, in a few words."""
        ...

    def bound(self, ticket: Ticket, i: int) -> None:
        """Backend ``i`` has got the ticket."""
        ...

    def arrived(self, backends: Backends) -> None:
        """A ticket has come; it has not been placed yet."""
        ...


class RoundRobin:
    """Each backend in turn, the heavier ones more often."""

    name = "round-robin"
    holds = False
    hashes = False

    def __init__(self) -> None:
        self._turns: list[float] = []

    def costs(self, ticket: Ticket, backends: Backends, waits: list[float]) -> list[float]:
        low = min(self._turns, default=0.0)
        self._turns += [low] * (len(backends) - len(self._turns))
        return [turn + 1.0 / weight if weight else turn for turn, weight in zip(self._turns, backends.weight, strict=True)]

    def why(self, ticket: Ticket, i: int, backends: Backends) -> str:
        self._turns[i] += 1.0 / (backends.weight[i] or 1.0)
        return self.name

    def bound(self, ticket: Ticket, i: int) -> None:
        pass

    def arrived(self, backends: Backends) -> None:
        pass


class LeastLoad:
    """The fewest tokens of work left, over the backend's weight."""

    name = "least-load"
    holds = False
    hashes = False

    def costs(self, ticket: Ticket, backends: Backends, waits: list[float]) -> list[float]:
        return _loads(backends)

    def why(self, ticket: Ticket, i: int, backends: Backends) -> str:
        return self.name

    def bound(self, ticket: Ticket, i: int) -> None:
        pass

    def arrived(self, backends: Backends) -> None:
        pass


class ExpectedCompletion:
    """The time until the prompt is read there, and what reading it costs others; see docs/routing.md."""

    name = "expected-completion"
    holds = True
    hashes = True

    def __init__(self) -> None:
        self.theta = 0.0
        self.gamma = 0.02
        self.pressure = 0.0
        self.decode = 0.0
        self.residence = 5.0
        self._homes: OrderedDict[str, int] = OrderedDict()

    def arrived(self, backends: Backends) -> None:
        n = len(backends)
        waiting = n - backends.queued.count(0.0)
        self.pressure += 0.02 * (waiting / n - self.pressure)
        u = self.pressure
        self.theta = min(2.0, 0.25 * u / max(1e-3, 1.0 - u))
        self.gamma = max(0.02, 0.06 * u)

    def costs(self, ticket: Ticket, backends: Backends, waits: list[float]) -> list[float]:
        n = len(backends)
        seconds, decoding, busy = backends.rates.seconds, backends.decoding, backends.busy
        decode = 0.06 * self.residence * n * n / ((n + sum(busy)) * sum(seconds))
        prompt = ticket.prompt_tokens
        full = work(prompt, 0.0)
        base = full * (1.0 + self.theta) + decode
        each = full * self.gamma
        costs = [
            wait + s * (base + each * d + decode * b) for wait, s, d, b in zip(waits, seconds, decoding, busy, strict=True)
        ]
        for i, depth in ticket.matches:
            cached = cached_tokens(ticket, depth)
            costs[i] -= seconds[i] * (full - work(prompt - cached, cached)) * (1.0 + self.theta + self.gamma * decoding[i])
        return costs

    def why(self, ticket: Ticket, i: int, backends: Backends) -> str:
        if ticket.cached_tokens:
            return f"prefix {ticket.cached_tokens}/{ticket.prompt_tokens}"
        return "least-load"

    def bound(self, ticket: Ticket, i: int) -> None:
        pass


def cached_tokens(ticket: Ticket, depth: int) -> int:
    """Tokens of the ticket's prompt in its first ``depth`` blocks; the last token is always computed."""
    if not depth:
        return 0
    blocks = ticket.prompt
    return min(int(ticket.prompt_tokens * blocks.ends[depth - 1] / blocks.total), ticket.prompt_tokens - 1)


def _loads(backends: Backends) -> list[float]:
    """Tokens of work left on each backend; a request that is not ours counts as one of ours does on average."""
    ours = sum(backends.inflight)
    mean = sum(backends.tokens) / ours if ours else 1.0
    return [
        (tokens + others * mean) / weight if weight else float("inf")
        for tokens, others, weight in zip(backends.tokens, backends.others, backends.weight, strict=True)
    ]


def score(session: str, name: str) -> int:
    """Rendezvous hashing (Thaler and Ravishankar 1998): a session's backend is the one that scores highest; every replica of
    the gateway says the same."""
    return int.from_bytes(blake2b(f"{session}\0{name}".encode(), digest_size=8).digest())


POLICIES: Final[dict[str, type[Policy]]] = {policy.name: policy for policy in (ExpectedCompletion, RoundRobin, LeastLoad)}
