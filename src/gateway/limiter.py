"""The limits of one request: who counts it, what it may use, and what it has used in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.web.server import Request

from .core import standing
from .core.errors import GatewayError
from .core.prices import Prices, of_record
from .core.principal import NO_LIMITS, Limits, Principal
from .core.ratelimit import MOST, Counts, Limited
from .core.ratelimit import Limiter as Accounts
from .core.record import Record
from .core.status import LimitsState
from .core.tickets import Ticket
from .core.usage import CHARACTERS, Usage

ASSUMED: Final = 512
"""Tokens reserved for an answer whose length the request does not bound; fewer where the key's bucket is smaller."""


class Reservation(Protocol):
    """What a request was let in with."""

    @property
    def counts(self) -> Counts: ...

    def settle(self, tokens: int, money: int, now: float) -> None:
        """It has used so much, money in millionths."""

    def end(self) -> None:
        """It runs no longer."""


class Limiter(Protocol):
    """Whoever counts. A Deferred only where somebody else has to be asked."""

    def reserve(self, key: str, limits: Limits, tokens: int, money: int) -> Reservation | Deferred[Any]:
        """Raises `Limited`, or `GatewayError` limits_unavailable."""

    def standing(self, key: str, limits: Limits) -> Counts: ...

    def state(self, limited: Mapping[str, int]) -> LimitsState: ...

    def start(self) -> None: ...

    def settled(self) -> Deferred[None]:
        """Fires when whoever shares the counts has been told of all requests that have ended, as far as it can be told."""

    def stop(self) -> None: ...


class LocalLimiter:
    """Counts in this process. ``now`` gives monotonic seconds, ``unix`` those since 1970."""

    def __init__(self, now: Callable[[], float], unix: Callable[[], float]) -> None:
        self._now = now
        self._unix = unix
        self._accounts = Accounts()

    def reserve(self, key: str, limits: Limits, tokens: int, money: int) -> Reservation:
        return self._accounts.reserve(key, limits, tokens, money, self._now(), self._unix())

    def standing(self, key: str, limits: Limits) -> Counts:
        return self._accounts.standing(key, limits, self._now(), self._unix())

    def state(self, limited: Mapping[str, int]) -> LimitsState:
        return LimitsState(len(self._accounts), limited)

    def start(self) -> None:
        """There is nothing to reach."""

    def settled(self) -> Deferred[None]:
        return succeed(None)

    def stop(self) -> None:
        """Nor to leave."""


class Limiting:
    """Lets requests in. ``default`` are the limits of keys that have none, and of each client address where there are no
    keys; ``prices`` is what budgets in money go by."""

    def __init__(
        self, limiter: Limiter, now: Callable[[], float], default: Limits = NO_LIMITS, prices: Prices | None = None
    ) -> None:
        self._limiter = limiter
        self._now = now
        self._default = default
        self._prices = prices or {}
        self._limited: dict[str, int] = {}

    def use(self, default: Limits, prices: Prices) -> None:
        """These hold for requests that come from now on."""
        self._default = default
        self._prices = prices

    def limits_of(self, principal: Principal) -> Limits:
        """`NO_LIMITS` itself where nothing has to be counted."""
        limits = principal.limits
        return self._default if limits == NO_LIMITS else limits

    def tell(self, request: Request, record: Record) -> None:
        """How the key stands, for an answer to a request that was not counted."""
        limits = self.limits_of(record.principal)
        if limits is not NO_LIMITS:
            _set(request, limits, self._limiter.standing(_key(record), limits))

    async def allow(self, limits: Limits, request: Request, record: Record, ticket: Ticket, choices: int | None) -> Allowance:
        """Let a request in that may ask for several ``choices``. Raises `Limited`, or `GatewayError` limits_unavailable."""
        prompt = ticket.prompt_tokens or ticket.prompt.total // CHARACTERS + 1
        answer = _answer(limits, prompt, ticket.max_tokens, choices)
        money = 0
        if limits.budget is not None and limits.budget.unit == "money":
            money = of_record(self._prices, record).of(Usage(prompt, answer))
        try:
            reserved = self._limiter.reserve(_key(record), limits, prompt + answer, money)
            if isinstance(reserved, Deferred):
                reserved = await reserved
        except Limited as refused:
            self._limited[refused.limit] = self._limited.get(refused.limit, 0) + 1
            _set(request, limits, refused.counts)
            raise
        _set(request, limits, reserved.counts)
        prices = self._prices if limits.budget is not None and limits.budget.unit == "money" else None
        return Allowance(reserved, prompt, prices, self._now)

    def state(self) -> LimitsState:
        """For whoever looks."""
        return self._limiter.state(self._limited)


class Allowance:
    """What one request was let in with, until it ends."""

    __slots__ = ("_now", "_prices", "_prompt", "_reservation")

    def __init__(self, reservation: Reservation, prompt: int, prices: Prices | None, now: Callable[[], float]) -> None:
        self._reservation = reservation
        self._prompt = prompt
        self._prices = prices
        self._now = now

    def end(self, record: Record, problem: BaseException | None = None) -> None:
        """Settle it to what is known; a ``problem`` ended it before its answer began.

        What nobody worked on, and what failed by no fault of the caller before it had an answer, costs nothing. A client that
        leaves while a backend works, and an answer that does not tell, keep the whole reserve.
        """
        usage = record.usage
        told = bool(usage.prompt_tokens or usage.completion_tokens)
        failed = isinstance(problem, GatewayError) or bool(record.code) or not record.attempts
        if usage.estimated and not isinstance(problem, GatewayError):  # a stream was seen, and this much of it
            self._charge(Usage(self._prompt, usage.completion_tokens), record)
        elif told or failed:
            self._charge(usage, record)
        self._reservation.end()

    def _charge(self, usage: Usage, record: Record) -> None:
        money = 0 if self._prices is None else of_record(self._prices, record).of(usage)
        self._reservation.settle(usage.prompt_tokens + usage.completion_tokens, money, self._now())


def _key(record: Record) -> str:
    return record.principal.key or f"address {record.client}"


def _answer(limits: Limits, prompt: int, asked: int | None, choices: int | None) -> int:
    """Tokens to reserve for the answer, however absurd the request."""
    if asked is None:
        asked = ASSUMED if limits.tokens is None else min(ASSUMED, limits.tokens - prompt)
    return min(max(asked, 0) * max(choices or 1, 1), MOST)


def _set(request: Request, limits: Limits, counts: Counts) -> None:
    for name, value in standing.headers(limits, counts):
        request.setHeader(name, value)
