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
        self._virtual: dict[str, float] = {}
        self.served: dict[str, float] = {}
        """Token work done for each tenant that is remembered."""
        self._floor = 0.0  # the lowest account of those that waited at the last time that somebody was served

    def __len__(self) -> int:
        return len(self._virtual)

    def of(self, tenant: str) -> float:
        """The tenant's account, in tokens over weight."""
        return self._virtual.get(tenant, self._floor)

    def arrive(self, tenant: str) -> None:
        """The tenant had nothing waiting, and now has."""
        if self.of(tenant) < self._floor:
            self._virtual[tenant] = self._floor

    def charge(self, tenant: str, weight: float, tokens: float) -> None:
        """So much work is done for the tenant (less than nothing: it had been charged too much)."""
        virtual = self._virtual
        virtual[tenant] = virtual.get(tenant, self._floor) + tokens / weight
        self.served[tenant] = self.served.get(tenant, 0.0) + tokens
        if len(virtual) > self._most:
            self._virtual = dict(sorted(virtual.items(), key=lambda item: item[1])[self._most // 2 :])
            self.served = {name: tokens for name, tokens in self.served.items() if name in self._virtual}

    def advance(self, lowest: float) -> None:
        """Of the tenants that wait, this is the lowest account."""
        self._floor = max(self._floor, lowest)
