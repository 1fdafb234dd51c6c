"""Schedulers that share no memory, as several gateways or several processes of one do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random

import pytest

from gateway.core.load import Load
from gateway.core.policy import BOUNDED, POLICIES, cached_tokens
from gateway.core.prefix import PrefixIndex, blocks_of
from gateway.core.scheduler import Scheduler
from gateway.core.tickets import Ticket
from gateway.core.usage import Usage

NAMES = "abcd"
BY_PREFIX = pytest.mark.parametrize("policy", ["expected-completion", "prefix"])


def system_prompt(number: int) -> str:
    """6,000 characters."""
    return f"Tenant {number} sells number {number}s. " * 200


class Gateways:
    """``count`` of them, before the same backends, which read 8,000 tokens a second, and have whatever they were sent in their
    caches."""

    def __init__(self, policy: str, names: Iterable[str] = NAMES, count: int = 3, *, shared: bool = True) -> None:
        self.schedulers = [Scheduler(POLICIES[policy](), shared=shared) for _ in range(count)]
        self.running: Counter[str | None] = Counter()
        self.now = 0.0
        self.prompt_tokens = self.cached_tokens = 0
        self._caches = PrefixIndex()
        for name in names:
            self._caches.add(1e12)
            for scheduler in self.schedulers:
                scheduler.set_backend(name, 0.0)

    def send(self, gateway: int, text: str) -> tuple[Ticket, Usage]:
        ticket = Ticket("m", self.now, prompt=blocks_of("m", text))
        assert self.schedulers[gateway].submit(ticket, self.now)
        depth = dict(self._caches.match(ticket.prompt)).get(ticket.lane, 0)
        self._caches.insert(ticket.lane, ticket.prompt, depth)
        usage = Usage(ticket.prompt_tokens, 10, cached_tokens(ticket, depth))
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.now += 0.001 + (usage.prompt_tokens - usage.cached_tokens) / 8000
        self.schedulers[gateway].first_token(ticket, self.now)
        self.running[ticket.backend] += 1
        return ticket, usage

    def serve(self, gateway: int, text: str) -> str | None:
        """The backend that answers, before anything else is asked."""
        ticket, usage = self.send(gateway, text)
        self.running[ticket.backend] -= 1
        self.now += 0.1
        self.schedulers[gateway].release(ticket, self.now, usage)
        return ticket.backend

    def report(self) -> None:
        """The backends say how many requests they have."""
        for scheduler in self.schedulers:
            for name in scheduler.backends.place:
                scheduler.set_backend(name, self.now, load=Load(self.running[name], 0, 0.1, self.now))


def together(homes: dict[int, Counter[str | None]]) -> float:
    """The part of the requests that went where most of their prefix did."""
    return sum(max(counts.values()) for counts in homes.values()) / sum(counts.total() for counts in homes.values())


@BY_PREFIX
def test_three_gateways_place_each_prefix_on_the_same_backend(policy: str) -> None:
    gateways, chance = Gateways(policy), Random(1)
    numbers = [number % 60 for number in range(600)]
    chance.shuffle(numbers)
    homes: dict[int, Counter[str | None]] = {}
    for turn, number in enumerate(numbers):
        backend = gateways.serve(chance.randrange(3), f"{system_prompt(number)} question {turn}")
        homes.setdefault(number, Counter())[backend] += 1
    spread = Counter(counts.most_common(1)[0][0] for counts in homes.values())
    hits = gateways.cached_tokens / gateways.prompt_tokens
    print(f"{policy}: {together(homes):.1%} of 600 with the rest of their prefix, {hits:.1%} cached; homes {dict(spread)}")
    assert together(homes) >= 0.95
    assert max(spread.values()) <= 2 * 60 / len(NAMES)


def test_they_agree_too_where_all_prompts_begin_alike() -> None:
    gateways, chance = Gateways("expected-completion"), Random(4)
    homes: dict[int, Counter[str | None]] = {}
    for turn in range(600):
        number = chance.randrange(60)
        text = "You are a helpful assistant. " * 14 + f"{system_prompt(number)} question {turn}"
        homes.setdefault(number, Counter())[gateways.serve(chance.randrange(3), text)] += 1
    spread = Counter(counts.most_common(1)[0][0] for counts in homes.values())
    print(f"{together(homes):.1%} of 600 requests with the rest of their prefix; homes {dict(spread)}")
    assert together(homes) >= 0.9
    assert max(spread.values()) <= 2 * 60 / len(NAMES)


def test_turns_of_a_conversation_meet_behind_a_system_prompt_that_all_have() -> None:
    gateways, chance = Gateways("expected-completion"), Random(2)
    said = dict.fromkeys(range(60), system_prompt(0))
    for scheduler in range(3):  # all gateways have sent it to all backends
        for name in NAMES:
            for other in NAMES:
                gateways.schedulers[scheduler].set_backend(other, gateways.now, accepting=other == name)
            gateways.serve(scheduler, said[0])
        for name in NAMES:
            gateways.schedulers[scheduler].set_backend(name, gateways.now)
    homes: dict[int, Counter[str | None]] = {}
    for turn in range(300):
        number = turn % 60
        said[number] += f"{number} asks {turn}, and goes on. " * 100
        homes.setdefault(number, Counter())[gateways.serve(chance.randrange(3), said[number])] += 1
    print(f"{together(homes):.1%} of 300 turns with the rest of their conversation")
    assert together(homes) >= 0.9
    assert len({counts.most_common(1)[0][0] for counts in homes.values()}) == len(NAMES)


@BY_PREFIX
def test_a_hot_prefix_does_not_overload_its_home(policy: str) -> None:
    gateways, chance = Gateways(policy), Random(3)
    worst = 0.0
    for turn in range(240):
        gateways.send(chance.randrange(3), f"{system_prompt(7)} question {turn}")
        if turn % 10 == 0:
            gateways.report()
        if turn >= 40:
            worst = max(worst, max(gateways.running.values()) * len(NAMES) / gateways.running.total())
    print(f"{policy}: at most {worst:.2f} times the mean on one backend")
    assert worst <= BOUNDED + 0.25


@BY_PREFIX
def test_a_backend_that_is_added_takes_its_share_of_the_prefixes_and_no_more(policy: str) -> None:
    before = {number: Gateways(policy, "abcd", 1).serve(0, system_prompt(number)) for number in range(200)}
    after = {number: Gateways(policy, "abcde", 1).serve(0, system_prompt(number)) for number in range(200)}
    moved = {number for number in before if before[number] != after[number]}
    print(f"{policy}: {len(moved)} of 200 moved to one of 5")
    assert {after[number] for number in moved} == {"e"}
    assert 15 <= len(moved) <= 65


def test_a_home_that_fails_is_the_next_ones_and_its_own_when_it_is_back() -> None:
    def homes_of(gateways: Gateways) -> dict[int, str | None]:
        return {number: gateways.serve(number % 3, system_prompt(number)) for number in range(60)}

    def without(name: str) -> Gateways:
        gateways = Gateways("expected-completion")
        for scheduler in gateways.schedulers:
            scheduler.set_backend(name, 0.0, accepting=False)
        return gateways

    all_there, one_away = homes_of(Gateways("expected-completion")), homes_of(without("b"))
    assert "b" in all_there.values()
    assert all(all_there[number] == name for number, name in one_away.items() if all_there[number] != "b")


def test_the_decision_says_that_it_was_the_home() -> None:
    ticket, _ = Gateways("expected-completion").send(0, system_prompt(1))
    assert ticket.decision == "home"


def test_a_prompt_shorter_than_a_block_has_no_home() -> None:
    gateways = Gateways("expected-completion")
    assert {gateways.serve(0, "hello") for _ in range(8)} == set(NAMES)


def test_an_old_report_does_not_count_again_what_was_ours_then() -> None:
    gateways = Gateways("expected-completion", count=1)
    (scheduler,) = gateways.schedulers
    sent = [gateways.send(0, "hello") for _ in range(8)]
    gateways.report()
    said = gateways.now
    for ticket, usage in sent:
        scheduler.release(ticket, gateways.now, usage)
    scheduler.set_backend("a", gateways.now + 1, slots=5, load=Load(2, 0, 0.1, said))
    assert scheduler.backends.busy == [0, 0, 0, 0]


def test_prompts_of_others_that_wait_there_are_waited_for_until_they_must_be_read() -> None:
    gateways = Gateways("expected-completion", "ab", 1)
    (scheduler,) = gateways.schedulers
    for number in range(100):
        gateways.serve(0, system_prompt(number))
    now = gateways.now
    scheduler.set_backend("a", now, load=Load(running=1, waiting=4, kv_usage=0.1, at=now))
    there, elsewhere = scheduler.backends.waits(now)
    assert elsewhere == 0.0
    assert there == pytest.approx(4 * 1350 / 8000, rel=0.5)  # of prompts like ours
    assert scheduler.backends.waits(now + there / 2) == pytest.approx([there / 2, 0.0])
    assert scheduler.backends.waits(now + there) == pytest.approx([0.0, 0.0])


def test_a_ticket_that_waits_behind_the_prompts_of_others_is_woken() -> None:
    gateways = Gateways("expected-completion", "a", 1)
    (scheduler,) = gateways.schedulers
    for number in range(50):
        gateways.serve(0, system_prompt(number))
    scheduler.backends.rates.serial[0] = True
    gateways.send(0, "hello")  # ours decodes there
    now = gateways.now
    scheduler.set_backend("a", now, load=Load(running=2, waiting=4, kv_usage=0.1, at=now))
    ticket = Ticket("m", now, prompt_tokens=100)
    assert not scheduler.submit(ticket, now)
    assert scheduler.schedule(now) == []
    wake = scheduler.next_wake(now)
    assert wake is not None
    assert now < wake < now + 10
    assert scheduler.schedule(wake) == [ticket]


@BY_PREFIX
def test_a_gateway_alone_spreads_prompts_more_evenly_than_their_hashes_do(policy: str) -> None:
    for pair in range(20):
        gateway = Gateways(policy, (f"http://{pair}.one:8000", f"http://{pair}.two:8000"), 1, shared=False)
        spread = Counter(gateway.serve(0, system_prompt(number)) for number in range(6))
        assert list(spread.values()) == [3, 3]


def test_prompts_have_homes_once_the_backends_tell_of_others_requests() -> None:
    gateway = Gateways("expected-completion", "ab", 1, shared=False)
    assert gateway.send(0, system_prompt(1))[0].decision == "least-load"
    for _ in range(4):
        gateway.now += 2.0
        gateway.running.update("ab")
        gateway.report()
    assert gateway.send(0, system_prompt(2))[0].decision == "home"
