"""Fairness between tenants by token work: a virtual token counter for each (VTC: Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024), which is start-time fair queueing (Goyal et al., SIGCOMM 1996) with costs settled afterwards.

A tenant's account grows by the token work done for it, over its weight: uncached prompt tokens and output tokens, first
as predicted, then as used. Whoever has the lowest account is served next. A tenant that comes back from idleness is
lifted to the lowest account of those that wait: being idle earns no credit.
"""

from __future__ import annotations

from collections import OrderedDict


class Accounts:
    """Accounts of at most ``most`` tenants; of one forgotten (the longest idle), a new one begins at the floor."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._virtual: OrderedDict[str, float] = OrderedDict()
        self._served: dict[str, float] = {}
        self._floor = 0.0  # the lowest account at the last time somebody was served

    def __len__(self) -> int:
        return len(self._virtual)

    @property
    def served(self) -> dict[str, float]:
        """Token work done for each tenant that is remembered."""
        return self._served

    def of(self, tenant: str) -> float:
        """The tenant's account, in tokens over weight."""
        return self._virtual.get(tenant, self._floor)

    def arrive(self, tenant: str) -> None:
        """The tenant had nothing waiting, and now has."""
        if self.of(tenant) < self._floor:
            self._virtual[tenant] = self._floor

    def charge(self, tenant: str, weight: float, tokens: float) -> None:
        """So much work is done for the tenant (less than nothing: it had been charged too much)."""
        self._virtual[tenant] = self.of(tenant) + tokens / weight
        self._virtual.move_to_end(tenant)
        self._served[tenant] = self._served.get(tenant, 0.0) + tokens
        if len(self._virtual) > self._most:
            gone, _ = self._virtual.popitem(last=False)
            del self._served[gone]

    def advance(self, lowest: float) -> None:
        """Of the tenants that wait, this is the lowest account."""
        self._floor = max(self._floor, lowest)
