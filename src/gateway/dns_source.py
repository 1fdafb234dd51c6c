"""Backends that the DNS has: the addresses of a name, or of the targets of its SRV record.

Names are looked up again when their records say so, within bounds. IPv6 addresses count only of a name that has no IPv4
address, so that a server with both is one backend.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, DeferredList, TimeoutError, ensureDeferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.names import dns
from twisted.names.client import Resolver
from twisted.names.error import DNSNameError, DomainError
from twisted.python.failure import Failure

from .core.backend_settings import MAX_BACKENDS
from .core.sources import Endpoint, SourceURL
from .discovery import LONGEST_WAIT, Failed, Found, wait_after

SHORTEST: Final = 1.0
LONGEST: Final = 300.0
"""Seconds between two looks, whatever the records say."""

FIRST_WAIT: Final = 1.0
"""Seconds until a look that failed is tried again, at first."""

TIMEOUTS: Final = (1, 2, 4)
"""Seconds after which a question is put again; after the last it is given up."""

LEAST: Final = 0.01
"""The weight of a record that says 0, where others say more."""

LOOK_SECONDS: Final = 30
"""A whole look takes no longer."""

_log: Final = Logger("gateway.discovery")


class Nothing(Exception):
    """A name has no address."""


def resolver_of(server: tuple[str, int] | None, reactor: Any) -> Resolver:
    """Asks this server, or those of /etc/resolv.conf, which is read again when it changes."""
    if server is not None:
        return Resolver(servers=[server], timeout=TIMEOUTS, reactor=reactor)
    return Resolver(resolv="/etc/resolv.conf", timeout=TIMEOUTS, reactor=reactor)


class DNSSource:
    """Looks up ``url``, whose kind is dns or srv. What a target of an SRV record had stays while that alone cannot be looked
    up."""

    def __init__(
        self,
        url: SourceURL,
        resolver: Resolver,
        clock: IReactorTime,
        found: Found,
        failed: Failed,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._url = url
        self._resolver = resolver
        self._clock = clock
        self._found = found
        self._failed = failed
        self._random = random
        self._failures = 0
        self._targets: dict[str, list[str]] = {}
        self._next: IDelayedCall | None = None
        self._looking: Deferred[Any] | None = None
        self._stopped = False

    def start(self) -> None:
        self._next = None
        look = self._look_up_service() if self._url.kind == "srv" else self._look_up_name()
        self._looking = looking = ensureDeferred(look).addTimeout(LOOK_SECONDS, self._clock)
        looking.addCallbacks(self._seen, self._missed).addCallback(self._again)

    def stop(self) -> Deferred[None]:
        self._stopped = True
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._looking is not None:
            self._looking.cancel()
        return succeed(None)

    # --- after a look: how many seconds until the next

    def _seen(self, seen: tuple[list[Endpoint], float]) -> float:
        found, holds = seen
        self._failures = 0
        self._found(found)
        return min(max(holds, SHORTEST), LONGEST) * (1.0 + 0.1 * self._random())

    def _missed(self, failure: Failure) -> float:
        if self._stopped:
            return 0.0
        if failure.check(Nothing, DomainError, TimeoutError, OSError) is None:
            _log.failure("a bug in the look-up of {name}", failure, name=self._url.host)
        self._failed(_why(failure.value))
        self._failures += 1
        return wait_after(self._failures - 1, FIRST_WAIT, self._random())

    def _again(self, seconds: float) -> None:
        self._looking = None
        if not self._stopped:
            self._next = self._clock.callLater(seconds, self.start)

    # --- a look: what there is, and how many seconds that holds

    async def _look_up_name(self) -> tuple[list[Endpoint], float]:
        addresses, holds = await self._addresses(self._url.host)
        return [Endpoint(one, int(self._url.port)) for one in addresses], holds

    async def _addresses(self, name: str) -> tuple[list[str], float]:
        for ask, kind in ((self._resolver.lookupAddress, dns.A), (self._resolver.lookupIPV6Address, dns.AAAA)):
            answers, _, _ = await ask(name, TIMEOUTS)
            found = [address for one in answers if one.type == kind and (address := _address(one.payload.address))]
            if found:
                return found, min([one.ttl for one in answers])
        raise Nothing

    async def _look_up_service(self) -> tuple[list[Endpoint], float]:
        """Of the best priority that has any address."""
        answers, _, _ = await self._resolver.lookupService(self._url.host, TIMEOUTS)
        records = [one.payload for one in answers if one.type == dns.SRV and one.payload.target.name not in (b"", b".")]
        self._targets = {name: known for name, known in self._targets.items() if name in set(map(_target, records))}
        holds = min([one.ttl for one in answers], default=LONGEST)
        for priority in sorted({one.priority for one in records}):
            best = [one for one in records if one.priority == priority][:MAX_BACKENDS]
            holds = min(holds, await self._look_up_targets({_target(one) for one in best}))
            found = _weighed([(_target(one), one.port, one.weight) for one in best], self._targets)
            if found:
                return found, holds
        raise Nothing

    async def _look_up_targets(self, names: set[str]) -> float:
        """Brings `_targets` up to date. For how long that holds."""
        asked = sorted(names)
        answers = await DeferredList([ensureDeferred(self._addresses(name)) for name in asked], consumeErrors=True)
        holds = LONGEST
        for name, (answered, answer) in zip(asked, answers, strict=True):
            if answered:
                self._targets[name], seconds = answer
            holds = min(holds, seconds if answered else LONGEST_WAIT)
        return holds


def _weighed(records: Sequence[tuple[str, int, int]], addresses: Mapping[str, Sequence[str]]) -> list[Endpoint]:
    """Of (target, port, weight), the addresses of a target share its weight, and the mean is 1. A weight of 0 is for "very
    little" (RFC 2782), unless all have it."""
    shares = [
        (address, port, weight / len(addresses[target]))
        for target, port, weight in records
        for address in addresses.get(target, ())
    ]
    positive = [share for _, _, share in shares if share]
    mean = sum(positive) / len(positive) if positive else 0.0
    return [Endpoint(address, port, max(share / mean, LEAST) if mean else 1.0) for address, port, share in shares]


def _target(record: Any) -> str:
    return str(record.target.name.decode("ascii", "replace"))


def _address(packed: bytes) -> str:
    """As text; empty if nobody can be there."""
    address = ipaddress.ip_address(packed)
    return "" if address.is_unspecified or address.is_multicast else str(address)


def _why(problem: BaseException | None) -> str:
    """In a few words."""
    if isinstance(problem, Nothing):
        return "it has no address"
    if isinstance(problem, DNSNameError):
        return "there is no such name"
    if isinstance(problem, TimeoutError):
        return "no name server answers"
    if isinstance(problem, DomainError):
        return f"the name server cannot tell ({type(problem).__name__})"
    return str(problem) or type(problem).__name__
