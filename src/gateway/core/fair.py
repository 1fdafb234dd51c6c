"""Fairness between tenants by token work: a virtual token counter for each (VTC: Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024), which is start-time fair queueing (Goyal et al., SIGCOMM 1996) with costs settled afterwards.

A tenant's account grows by the token work done for it, over its weight: uncached prompt tokens and output tokens, first
as predicted, then as used. Whoever has the lowest account is served next. A tenant that comes back from idleness is
lifted to the lowest account of those that wait: being idle earns no credit.
"""

from __future__ import annotations


class Accounts:
    """Accounts of at most ``most`` tenants. When there are more, the lower half is forgotten: who comes back begins at the
    floor, which is where a tenant that comes back from idleness is lifted to anyway."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._accounts: dict[str, list[float]] = {}  # token work over weight, and token work
        self._floor = 0.0  # the lowest account of those that waited at the last time that somebody was served

    def __len__(self) -> int:
        return len(self._accounts)

    @property
    def served(self) -> dict[str, float]:
        """Token work done for each tenant that is remembered."""
        return {tenant: account[1] for tenant, account in self._accounts.items()}

    def of(self, tenant: str) -> float:
        """The tenant's account, in tokens over weight."""
        account = self._accounts.get(tenant)
        return self._floor if account is None else account[0]

    def arrive(self, tenant: str) -> None:
        """The tenant had nothing waiting, and now has."""
        account = self._accounts.get(tenant)
        if account is not None:
            account[0] = max(account[0], self._floor)

    def charge(self, tenant: str, weight: float, tokens: float) -> None:
        """So much work is done for the tenant (less than nothing: it had been charged too much)."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._open(tenant)
        account[0] += tokens / weight
        account[1] += tokens

    def _open(self, tenant: str) -> list[float]:
        if len(self._accounts) >= self._most:
            self._accounts = dict(sorted(self._accounts.items(), key=lambda item: item[1])[self._most // 2 :])
        self._accounts[tenant] = account = [self._floor, 0.0]
        return account

    def advance(self, lowest: float) -> None:
        """Of the tenants that wait, this is the lowest account."""
        self._floor = max(self._floor, lowest)
