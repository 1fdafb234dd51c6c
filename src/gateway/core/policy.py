"""How good each backend is for a ticket: the policies. Each gives every backend a cost; the scheduler takes the cheapest
of those that may have the ticket, and of equals the next in turn.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar, Final, Protocol

from .backends import Backends
from .service_rate import work
from .tickets import Ticket

BOUNDED: Final = 1.25
"""A backend may hold this many times its share of the requests before affinity gives way (consistent hashing with bounded
loads: Mirrokni, Thorup and Zadimoghaddam, SODA 2018)."""

SESSIONS: Final = 65536
"""Sessions whose last backend is remembered."""

ALONE: Final = 0.1
"""Nobody else places prompts, as far as is known, if less than this part of all requests is others', as backends report: a
report that is late by some requests looks like others'."""

ELSEWHERE: Final = 0.1
"""The part of what no cache is known to hold of a prompt that its home is thought to have at least, from requests that other
gateways sent; else half their part of all requests."""

_FAR: Final = 1e15  # more than any load: what costs this much is taken if nothing else is left


class Policy(Protocol):
    """``holds``: a ticket may wait here for a backend that has prompts enough for now. ``hashes``: prompts are matched."""

    name: ClassVar[str]
    holds: ClassVar[bool]
    hashes: ClassVar[bool]

    def costs(self, ticket: Ticket, backends: Backends, waits: Sequence[float]) -> list[float]:
        """A cost for each backend, lower is better. ``waits`` are the seconds until each one's prompts are read."""
        ...

    def bound(self, ticket: Ticket, i: int, backends: Backends) -> str:
        """Backend ``i`` has got the ticket: why, in a few words."""
        ...


class RoundRobin:
    """Each backend in turn, in proportion to their weights; one that comes back catches nothing up (start-time fair
    queueing: Goyal et al., SIGCOMM 1996)."""

    name: ClassVar[str] = "round-robin"
    holds: ClassVar[bool] = False
    hashes: ClassVar[bool] = False

    def __init__(self) -> None:
        self._turn = 0.0  # of whoever was served last
        self._next: dict[int, float] = {}

    def costs(self, ticket: Ticket, backends: Backends, waits: Sequence[float]) -> list[float]:
        """The virtual time of each backend's next turn."""
        return [max(self._next.get(i, 0.0), self._turn) for i in range(len(backends))]

    def bound(self, ticket: Ticket, i: int, backends: Backends) -> str:
        """Its next turn is later the lighter it is."""
        self._turn = max(self._next.get(i, 0.0), self._turn)
        self._next[i] = self._turn + 1.0 / max(backends.weight[i], 1e-9)
        return self.name


class LeastLoad:
    """The fewest tokens of work left, over the backend's weight."""

    name: ClassVar[str] = "least-load"
    holds: ClassVar[bool] = False
    hashes: ClassVar[bool] = False

    def costs(self, ticket: Ticket, backends: Backends, waits: Sequence[float]) -> list[float]:
        """Tokens of prompts and expected outputs."""
        return loads(backends)

    def bound(self, ticket: Ticket, i: int, backends: Backends) -> str:
        """There is one reason only."""
        return self.name


class Session:
    """A session's backend by rendezvous hashing, within bounded loads; every replica of the gateway finds the same one."""

    name: ClassVar[str] = "session"
    holds: ClassVar[bool] = False
    hashes: ClassVar[bool] = False

    def costs(self, ticket: Ticket, backends: Backends, waits: Sequence[float]) -> list[float]:
        """Each backend's place in the session's order; past the bound, the load."""
        if ticket.session is None:
            return loads(backends)
        most = _share(backends)
        rows = zip(backends.busy, backends.weight, strict=True)
        costs = [0.0 if busy < max(most * weight, 1.0) else _FAR + busy / max(weight, 1e-9) for busy, weight in rows]
        for place, i in enumerate(backends.rendezvous.order(ticket.session)):
            costs[i] += place
        return costs

    def bound(self, ticket: Ticket, i: int, backends: Backends) -> str:
        """Sticky or not."""
        return "least-load" if ticket.session is None else self.name


class Prefix:
    """The backend whose cache holds most of the prompt, within bounded loads; of those, the prompt's home."""

    name: ClassVar[str] = "prefix"
    holds: ClassVar[bool] = False
    hashes: ClassVar[bool] = True

    def costs(self, ticket: Ticket, backends: Backends, waits: Sequence[float]) -> list[float]:
        """Work left, if nothing is cached; what is cached counts for more than any load."""
        costs = loads(backends)
        most = _share(backends)
        for i, depth in ticket.matches:
            if backends.busy[i] < max(most * backends.weight[i], 1.0):
                costs[i] -= cached_tokens(ticket, depth) * 1e6
        ticket.home = home = home_of(ticket, max([depth for _, depth in ticket.matches], default=0), backends)
        if home >= 0:
            costs[home] -= 1e6
        return costs

    def bound(self, ticket: Ticket, i: int, backends: Backends) -> str:
        """How much of the prompt is there."""
        return _cache_or(ticket, "home" if ticket.home == i else "least-load")


class Device:
    """The cheapest class of device that has room, and the least load within it."""

    name: ClassVar[str] = "device"
    holds: ClassVar[bool] = False
    hashes: ClassVar[bool] = False

    def costs(self, ticket: Ticket, backends: Backends, waits: Sequence[float]) -> list[float]:
        """The class's cost first; a backend with a second of prompts before it has no room."""
        rows = zip(backends.cost, loads(backends), waits, strict=True)
        return [cost * 1e12 + load if wait <= 1.0 else _FAR + load for cost, load, wait in rows]

    def bound(self, ticket: Ticket, i: int, backends: Backends) -> str:
        """The class is the reason."""
        return f"device {backends.cost[i]:g}"


class ExpectedCompletion:
    """When the prompt will be read there, and what reading it there costs others. docs/routing.md has the formula.

    A session's last backend is preferred where costs are all but equal.
    """

    name: ClassVar[str] = "expected-completion"
    holds: ClassVar[bool] = True
    hashes: ClassVar[bool] = True

    def __init__(self) -> None:
        self._homes: OrderedDict[str, int] = OrderedDict()

    def costs(self, ticket: Ticket, backends: Backends, waits: Sequence[float]) -> list[float]:
        """Seconds, of this prompt and of those that it delays."""
        slopes, stays, decode = backends.slope, backends.stay, backends.decode
        prompt = ticket.prompt_tokens
        full = work(prompt, 0.0)
        costs = [wait + full * slope + decode * stay for wait, slope, stay in zip(waits, slopes, stays, strict=True)]
        deepest = most = 0
        for i, depth in ticket.matches:
            cached = cached_tokens(ticket, depth)
            costs[i] -= slopes[i] * (full - work(prompt - cached, cached))
            if depth > deepest:
                deepest, most = depth, cached
        ticket.home = home = home_of(ticket, deepest, backends)
        if home >= 0:
            costs[home] -= max(ELSEWHERE, 0.5 * backends.foreign) * slopes[home] * work(prompt - most, most)
        for i in backends.packed:  # a slot must come free first
            slots = max(backends.slots[i], 1)
            costs[i] += (backends.busy[i] + 1 - slots) * backends.residence / slots
        if ticket.session is not None and (home := self._homes.get(ticket.session, -1)) >= 0:
            costs[home] = 0.95 * costs[home] - 0.01
        return costs

    def bound(self, ticket: Ticket, i: int, backends: Backends) -> str:
        """What the choice gained."""
        otherwise = "home" if ticket.home == i else "least-load"
        if ticket.session is None:
            return _cache_or(ticket, otherwise)
        stays = self._homes.get(ticket.session) == i
        self._homes[ticket.session] = i
        self._homes.move_to_end(ticket.session)
        if len(self._homes) > SESSIONS:
            self._homes.popitem(last=False)
        return _cache_or(ticket, "session" if stays else otherwise)


def cached_tokens(ticket: Ticket, depth: int) -> int:
    """Tokens of the ticket's prompt in its first ``depth`` blocks; the last token is always computed."""
    if not depth:
        return 0
    blocks = ticket.prompt
    return min(int(ticket.prompt_tokens * blocks.ends[depth - 1] / blocks.total), ticket.prompt_tokens - 1)


def loads(backends: Backends) -> list[float]:
    """Tokens of work left on each backend over its weight; a request that is not ours counts as one of ours does on average."""
    ours = sum(backends.inflight)
    mean = sum(backends.tokens) / ours if ours else 1.0
    rows = zip(backends.tokens, backends.others, backends.weight, strict=True)
    return [(tokens + others * mean) / max(weight, 1e-9) for tokens, others, weight in rows]


def home_of(ticket: Ticket, known: int, backends: Backends) -> int:
    """The backend that every process would choose for a prompt whose first ``known`` blocks are all that it has seen, by what
    comes after them, or else by the session: of those with the model, the first in its order within bounded loads. -1:
    there is none, or nobody else who would choose it: one process alone spreads prompts more evenly than their hashes do."""
    if not backends.shared and backends.foreign < ALONE:
        return -1
    tails, key = ticket.prompt.tails, ticket.session
    if known < len(tails):
        key = tails[known]
    elif key is None:
        return -1
    may, busy = backends.eligible(ticket.model), backends.busy
    for i in backends.rendezvous.order(key):
        if i in may and (not busy[i] or busy[i] < _share(backends) * backends.weight[i]):
            return i
    return -1


def _share(backends: Backends) -> float:
    """The bound on the requests of one backend, for each unit of weight."""
    weights = [weight for weight, accepting in zip(backends.weight, backends.accepting, strict=True) if accepting]
    return math.ceil(BOUNDED * (sum(backends.busy) + 1) / max(len(weights), 1)) * len(weights) / max(sum(weights), 1e-9)


def _cache_or(ticket: Ticket, otherwise: str) -> str:
    return f"prefix {ticket.cached_tokens}/{ticket.prompt_tokens}" if ticket.cached_tokens else otherwise


POLICIES: Final[dict[str, type[Policy]]] = {
    policy.name: policy for policy in (ExpectedCompletion, RoundRobin, LeastLoad, Session, Prefix, Device)
}
