"""The Lua scripts in a real Redis, against the pure limiter: the same arithmetic, by Redis' clock."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from gateway.core.principal import Budget, Limits
from gateway.core.ratelimit import PARTS, Limited, Limiter, Reservation

from .redis_process import Client, Redis

KEEP, LEASE = 600_000, 60_000


class Scripts:
    """The scripts as one gateway calls them."""

    def __init__(self, client: Client, key: str = "k", limits: Limits | None = None) -> None:
        self.client = client
        self.limits = limits or Limits()
        self.keys = [f"{{{key}}}", f"{{{key}}}:leases"]

    def _run(self, name: str, *arguments: object) -> Any:
        from gateway.redis_link import Script

        return self.client("EVAL", Script(name).source, 2, *self.keys, *arguments)

    def _bounds(self) -> tuple[int, int]:
        limits = self.limits
        return (-1 if limits.requests is None else limits.requests, -1 if limits.tokens is None else limits.tokens)

    def reserve(self, id: str, tokens: int, known: tuple[int, int] = (0, 0), lease: int = LEASE) -> tuple[bool, int, list[int]]:
        """Whether it was let in, Redis' clock, and the counts."""
        limits, day = self.limits, int(time.time()) // 86_400 * 86_400
        most = -1 if limits.concurrency is None else limits.concurrency
        amount = -1 if limits.budget is None else int(limits.budget.amount)
        ends = (day, day + 86_400, day + 172_800) if limits.budget else (0, 0, 0)
        admitted, now, *counts = self._run(
            "reserve", id, *self._bounds(), most, amount, tokens, tokens, *ends, lease, KEEP, *known
        )
        return bool(admitted), now, counts

    def settle(self, id: str, reserved: int, used: int, ends: int, *, late: bool = False) -> bool:
        more = used - reserved
        tokens = more * PARTS if self.limits.tokens is not None else 0
        cost = more if self.limits.budget else 0
        return bool(self._run("settle", id, int(late), *self._bounds(), 0, tokens, cost, ends, KEEP))

    def renew(self, *ids: str) -> None:
        self._run("renew", LEASE, KEEP, *ids)


def some_limits(dice: random.Random) -> Limits:
    return Limits(
        dice.choice([None, 60, 3000, 60_000]),
        dice.choice([None, 1000, 60_000, 600_000]),
        dice.choice([None, 2, 5]),
        dice.choice([None, Budget(3000, period="day")]),
    )


@pytest.mark.parametrize("seed", range(12))
def test_redis_admits_exactly_what_the_pure_limiter_admits(redis: Redis, seed: int) -> None:
    dice = random.Random(seed)
    limits = some_limits(dice)
    running: list[tuple[str, int, int, Reservation]] = []
    limiter, decided = Limiter(), [0, 0]
    with Client(redis) as client:
        scripts = Scripts(client, f"k{seed}", limits)
        for number in range(400):
            if running and dice.random() < 0.5:
                id, asked, ends, reservation = running.pop(dice.randrange(len(running)))
                used = dice.choice([0, asked, dice.randrange(2000)])
                before = client("TIME")
                if dice.random() < 0.8:
                    assert scripts.settle(id, asked, used, ends)
                    assert not scripts.settle(id, asked, used, ends), "told twice, it counts once"
                else:
                    used = asked
                    assert scripts.settle(id, asked, asked, ends)
                assert int(before[0]) > 0
                # Redis' own clock at the settlement is on its account.
                at = int(client("HGET", scripts.keys[0], "at"))
                reservation.settle(used, 0, at / 1000)
                reservation.end()
            else:
                asked = dice.choice([0, 5, 300, 1500])
                admitted, now, counts = scripts.reserve(str(number), asked)
                decided[admitted] += 1
                try:
                    reservation = limiter.reserve("k", limits, asked, 0, (now + 0.5) / 1000, now / 1000)
                    assert admitted, (number, counts)
                    running.append((str(number), asked, counts[4], reservation))
                    assert counts[:4] == list(reservation.counts[:4])
                except Limited as refused:
                    assert not admitted, (number, counts, refused.message)
                    assert counts[:4] == list(refused.counts[:4])
            if dice.random() < 0.1:
                time.sleep(dice.random() * 0.02)
    assert decided[1], decided


def test_three_gateways_on_one_redis_never_admit_more_than_the_limit(redis: Redis) -> None:
    limits = Limits(requests=600, tokens=6000)
    admitted: list[tuple[int, int]] = []
    dice = random.Random(1)
    with Client(redis) as one, Client(redis) as two, Client(redis) as three:
        gateways = [Scripts(client, limits=limits) for client in (one, two, three)]
        for number in range(1500):
            asked = dice.randrange(1, 40)
            ok, now, _ = dice.choice(gateways).reserve(str(number), asked)
            if ok:
                admitted.append((now, asked))
    for first, (begin, _) in enumerate(admitted):
        tokens = 0
        for count, (end, asked) in enumerate(admitted[first:], 1):
            tokens += asked
            assert count <= 600 + (end - begin) * 600 / 60_000
            assert tokens <= 6000 + (end - begin) * 6000 / 60_000
    assert len(admitted) < 1500


def test_a_lease_that_nobody_renews_ends_and_one_that_is_renewed_does_not(redis: Redis) -> None:
    with Client(redis) as client:
        scripts = Scripts(client, limits=Limits(concurrency=2))
        assert scripts.reserve("a", 0, lease=30)[0]
        assert scripts.reserve("b", 0, lease=30)[0]
        assert not scripts.reserve("c", 0)[0]
        scripts.renew("b")
        time.sleep(0.05)
        assert scripts.reserve("d", 0)[0], "the slot of a is free again"
        assert not scripts.reserve("e", 0)[0]
        assert scripts.settle("b", 0, 0, 0)
        scripts.renew("b")  # a word that comes too late
        assert scripts.reserve("f", 0)[0]


def test_a_withdrawal_that_arrives_before_its_request_keeps_it_out(redis: Redis) -> None:
    with Client(redis) as client:
        scripts = Scripts(client, limits=Limits(tokens=1000))
        assert not scripts.settle("a", 100, 0, 0)
        assert not scripts.reserve("a", 100)[0]
        assert scripts.reserve("b", 1000)[0]


def test_what_was_used_without_redis_counts_once(redis: Redis) -> None:
    with Client(redis) as client:
        scripts = Scripts(client, limits=Limits(budget=Budget(100, period="day")))
        _, _, counts = scripts.reserve("a", 10)
        assert scripts.settle("x", 0, 80, counts[4], late=True)
        assert not scripts.settle("x", 0, 80, counts[4], late=True)
        assert scripts.reserve("b", 10)[2][3] == 100
        assert not scripts.reserve("c", 1)[0]


def test_everything_in_redis_expires(redis: Redis) -> None:
    with Client(redis) as client:
        scripts = Scripts(client, limits=Limits(requests=60_000, tokens=600_000))
        _, _, counts = scripts.reserve("a", 100)
        scripts.settle("a", 100, 50, counts[4])
        assert 0 < client("PTTL", scripts.keys[0]) <= 3000
        assert 0 < client("PTTL", scripts.keys[1]) <= KEEP + LEASE
        kept = Scripts(client, "b", Limits(budget=Budget(1000, period="day")))
        kept.reserve("a", 100)
        left = (int(time.time()) // 86_400 + 1) * 86_400 - time.time()
        assert abs(client("PTTL", kept.keys[0]) / 1000 - left) < 10


def test_redis_is_told_what_a_gateway_knows_after_it_forgot_everything(redis: Redis) -> None:
    with Client(redis) as client:
        scripts = Scripts(client, limits=Limits(tokens=1000))
        client("FLUSHALL")
        assert not scripts.reserve("a", 200, known=(0, 900 * PARTS))[0]
        assert not scripts.reserve("of a gateway that knows nothing", 200)[0]
        assert scripts.reserve("b", 100, known=(0, 900 * PARTS))[0]
