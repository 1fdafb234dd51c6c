"""How much a key may still use: requests and tokens per minute, requests at a time, a budget per day or month.

A limit per minute is the generic cell rate algorithm as a continuous-state leaky bucket (ITU-T I.371, Annex A): what was used
leaks away evenly, and what a request needs must fit above it. All is whole numbers, so nothing is rounded: time is whole
milliseconds, and one request or token is `PARTS` parts, of which a limit of n a minute gives back n each millisecond.
Tokens and budget are reserved before the request runs and settled to what it used; no timer is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from datetime import UTC, datetime
from typing import Final, NamedTuple

from .errors import GatewayError
from .principal import Budget, Limits

PARTS: Final = 60_000
"""Milliseconds in a minute, and the parts that one request or token is counted in."""

MOST: Final = 10**10
"""No request counts for more tokens, whatever it asks for and whatever a backend says."""

MONEY: Final = 1_000_000
"""Parts that one unit of money is counted in."""

CONCURRENCY_WAIT: Final = 1.0
"""Seconds after which to try again when too many requests run: nobody knows when one of them ends."""

SWEPT: Final = 2
"""Accounts looked at for each new one, so that those nobody uses are soon forgotten; more of them when there is no room."""
SWEPT_WHEN_FULL: Final = 64


class Counts(NamedTuple):
    """How one key stands: ``requests`` and ``tokens`` in parts used and not yet leaked away, requests that run, what is
    ``spent`` of the budget (tokens, or millionths of money) in the period that ``ends`` then (Unix seconds)."""

    requests: int = 0
    tokens: int = 0
    held: int = 0
    spent: int = 0
    ends: int = 0


class Limited(GatewayError):
    """A request over a limit: ``limit`` is which, ``counts`` how its key stands."""

    def __init__(self, limit: str, message: str, limits: Limits, counts: Counts, wait: float | None = None) -> None:
        code = "insufficient_quota" if limit == "budget" else "rate_limit_exceeded"
        never = wait is None or limit == "budget"
        super().__init__(code, message, retry_after=wait, should_retry=False if never else None)
        self.limit = limit
        self.limits = limits
        self.counts = counts


def milliseconds(now: float) -> int:
    """Whole ones, which are what limits count time in."""
    return int(now * 1000)


def period_end(period: str, unix: float) -> int:
    """When the day or month ends that this moment (Unix seconds) lies in, UTC."""
    if period == "day":
        return (int(unix) // 86_400 + 1) * 86_400
    day = datetime.fromtimestamp(unix, UTC)
    month = datetime(day.year + day.month // 12, day.month % 12 + 1, 1, tzinfo=UTC)
    return int(month.timestamp())


def amount_of(limits: Limits) -> int:
    """The budget in what `Counts.spent` counts."""
    budget = limits.budget
    if budget is None:
        return 0
    return int(budget.amount) if budget.unit == "tokens" else round(budget.amount * MONEY)


def cost_of(limits: Limits, tokens: int, money: int) -> int:
    """What a request takes of the budget."""
    return money if limits.budget is not None and limits.budget.unit == "money" else tokens


def refusal(limits: Limits, counts: Counts, tokens: int, cost: int, unix: float) -> Limited:
    """Why a request for so many tokens (and so much of the budget) may not run now: of the limits that it would break the one
    that it has to wait for longest."""
    found: list[tuple[float, str, str]] = []
    if limits.tokens is not None and tokens > limits.tokens:
        asked = f"The request asks for up to {tokens} tokens, prompt and answer, and this key may use {limits.tokens} a minute"
        remedy = "no waiting helps. Shorten the prompt, or ask for a shorter answer (max_tokens)."
        return Limited("size", f"{asked}: {remedy}", limits, counts)
    if limits.requests is not None and (over := counts.requests + PARTS - limits.requests * PARTS) > 0:
        if not limits.requests:
            return Limited("requests", "This key may send no requests.", limits, counts)
        left = f"{limits.requests} requests a minute, of which none is left"
        found.append((_wait(over, limits.requests), "requests", f"This key may send {left}"))
    if limits.tokens is not None and (over := counts.tokens + (tokens - limits.tokens) * PARTS) > 0:
        left = f"{limits.tokens} tokens a minute, of which {_left(limits.tokens, counts.tokens)} are left"
        asked = f"the request asks for up to {tokens}, prompt and answer (a smaller max_tokens asks for less)"
        found.append((_wait(over, limits.tokens), "tokens", f"This key may use {left}; {asked}"))
    if limits.concurrency is not None and counts.held >= limits.concurrency:
        left = f"{limits.concurrency} requests at the same time, and as many run"
        found.append((CONCURRENCY_WAIT, "concurrency", f"This key may have {left}; one has to end"))
    if limits.budget is not None and counts.spent + cost > amount_of(limits):
        found.append((max(counts.ends - unix, 1.0), "budget", _of_budget(limits, limits.budget, counts, cost)))
    if not found:  # whoever counts has another reason: it knows the request already, as one that was given up
        found.append((CONCURRENCY_WAIT, "concurrency", "The request was given up before it was let in"))
    wait, limit, what = max(found)
    when = "" if limit == "budget" else f". Try again in {wait:.3f} s."
    return Limited(limit, what + when, limits, counts, wait)


def _wait(over: int, limit: int) -> float:
    """Seconds, in whole milliseconds, until so many parts have leaked away."""
    return (-(-over // limit) if limit else PARTS) / 1000


def _left(limit: int, used: int) -> int:
    return max(limit - -(-used // PARTS), 0)


def _of_budget(limits: Limits, budget: Budget, counts: Counts, cost: int) -> str:
    unit, parts = (" tokens", 1) if budget.unit == "tokens" else ("", MONEY)
    left = max(amount_of(limits) - counts.spent, 0)
    ends = datetime.fromtimestamp(counts.ends, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"Of this key's budget of {budget.amount:.10g}{unit} a {budget.period} {left / parts:.10g} are left, the request may"
        f" cost {cost / parts:.10g}. The next {budget.period} begins at {ends}; until then ask for less (max_tokens), or ask"
        " whoever gave you the key for a greater budget."
    )


class Account:
    """One key's counts as of ``at``, in milliseconds."""

    __slots__ = ("at", "ends", "held", "limits", "requests", "spent", "tokens")

    def __init__(self, at: int) -> None:
        self.at = at
        self.requests = self.tokens = self.held = self.spent = self.ends = 0
        self.limits = Limits()

    def leak(self, limits: Limits, at: int) -> None:
        """Let time pass."""
        passed = at - self.at
        self.limits = limits
        if passed <= 0:
            return
        self.at = at
        if self.requests:
            left = 0 if limits.requests is None else self.requests - passed * limits.requests
            self.requests = left if left > 0 else 0
        if self.tokens:
            left = 0 if limits.tokens is None else self.tokens - passed * limits.tokens
            self.tokens = left if left > 0 else 0

    def begin_period(self, limits: Limits, unix: float) -> None:
        """A new day or month has a whole budget."""
        if limits.budget is not None and unix >= self.ends:
            self.ends = period_end(limits.budget.period, unix)
            self.spent = 0

    def counts(self) -> Counts:
        return Counts(self.requests, self.tokens, self.held, self.spent, self.ends)

    def is_idle(self, at: int, unix: float) -> bool:
        """It says nothing that a new one would not."""
        if self.held or (self.spent and unix < self.ends):
            return False
        self.leak(self.limits, at)
        return not self.requests and not self.tokens


class Reservation:
    """What a request was let in with. What is left of it when it ends without `settle` stays used."""

    __slots__ = ("_account", "_cost", "_ended", "_ends", "_limits", "_tokens")

    def __init__(self, account: Account, limits: Limits, tokens: int, cost: int) -> None:
        self._account = account
        self._limits = limits
        self._tokens = tokens
        self._cost = cost
        self._ends = account.ends
        self._ended = False

    @property
    def counts(self) -> Counts:
        """How the key stands."""
        return self._account.counts()

    def settle(self, tokens: int, money: int, now: float) -> None:
        """The request has used so much (money in millionths): what was reserved beyond it comes back, what it used beyond the
        reserve is owed. A budget counts it in the period in which the request began."""
        account, limits = self._account, self._limits
        tokens = tokens if tokens < MOST else MOST
        cost = cost_of(limits, tokens, money)
        if limits.tokens is not None:
            account.leak(limits, int(now * 1000))
            left = account.tokens + (tokens - self._tokens) * PARTS
            account.tokens = left if left > 0 else 0
        if limits.budget is not None and account.ends == self._ends:
            account.spent = max(account.spent + cost - self._cost, 0)
        self._tokens, self._cost = tokens, cost

    def end(self) -> None:
        """The request runs no longer. Told twice, it counts once."""
        if not self._ended:
            self._ended = True
            self._account.held -= 1


class Limiter:
    """The accounts of at most ``most_keys`` keys. When each of them is in use, a further key is refused rather than let in
    uncounted (`GatewayError` limits_unavailable): forgetting a key that is in use would give it a full bucket.

    ``now`` is monotonic seconds; ``unix`` Unix seconds, which only budgets go by; ``money`` millionths.
    """

    def __init__(self, most_keys: int = 65_536) -> None:
        self._most = most_keys
        self._accounts: OrderedDict[str, Account] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def reserve(self, key: str, limits: Limits, tokens: int, money: int, now: float, unix: float) -> Reservation:
        """Let a request in that may use so many tokens and so much money. Raises `Limited`, and takes nothing then."""
        account = self._account_of(key, limits, now, unix)
        tokens = min(tokens, MOST)
        cost = cost_of(limits, tokens, money)
        if (
            (limits.requests is not None and account.requests + PARTS > limits.requests * PARTS)
            or (limits.tokens is not None and account.tokens + tokens * PARTS > limits.tokens * PARTS)
            or (limits.concurrency is not None and account.held >= limits.concurrency)
            or (limits.budget is not None and account.spent + cost > amount_of(limits))
        ):
            raise refusal(limits, account.counts(), tokens, cost, unix)
        if limits.requests is not None:
            account.requests += PARTS
        if limits.tokens is not None:
            account.tokens += tokens * PARTS
        account.spent += cost if limits.budget is not None else 0
        account.held += 1
        return Reservation(account, limits, tokens, cost)

    def adopt(self, key: str, limits: Limits, tokens: int, money: int, counts: Counts, now: float, unix: float) -> Reservation:
        """Somebody else, who told these counts, has let the request in. Without room for the key nothing is remembered."""
        try:
            account = self._account_of(key, limits, now, unix)
        except GatewayError:
            account = Account(milliseconds(now))
        account.requests, account.tokens, _, account.spent, account.ends = counts
        account.held += 1
        return Reservation(account, limits, tokens, cost_of(limits, tokens, money))

    def standing(self, key: str, limits: Limits, now: float, unix: float) -> Counts:
        """How a key stands."""
        account = self._accounts.get(key)
        if account is None:
            return Counts()
        account.leak(limits, milliseconds(now))
        account.begin_period(limits, unix)
        return account.counts()

    def _account_of(self, key: str, limits: Limits, now: float, unix: float) -> Account:
        at = milliseconds(now)
        account = self._accounts.get(key)
        if account is None:
            self._sweep(at, unix)
            account = self._accounts[key] = Account(at)
        account.leak(limits, at)
        account.begin_period(limits, unix)
        return account

    def _sweep(self, at: int, unix: float) -> None:
        """Forget some that are idle, in turn; make room for one more."""
        accounts = self._accounts
        full = len(accounts) >= self._most
        for key, account in [
            accounts.popitem(last=False) for _ in range(min(len(accounts), SWEPT_WHEN_FULL if full else SWEPT))
        ]:
            if not account.is_idle(at, unix):
                accounts[key] = account
        if len(accounts) >= self._most:
            message = "The gateway counts for as many keys and addresses as it can, and yours is not among them. Try again."
            raise GatewayError("limits_unavailable", message, retry_after=1.0)
