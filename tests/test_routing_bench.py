from __future__ import annotations

import random

import pytest

from bench.routing.baselines import LeastRequests, Oracle, RoundRobin
from bench.routing.engine import PROFILES, Profile, Request, prefill_seconds
from bench.routing.ours import Ours
from bench.routing.published import CacheAware, Conductor, Dynamo, DynamoQueue, LMetric, Scores, SMetric
from bench.routing.replicas import Replicas
from bench.routing.simulation import Rule, Simulation, View
from bench.routing.workloads import make
from gateway.core.prefix import Blocks

PROFILE = PROFILES["8b"]


def request(rid: int, at: float, tokens: int, output: int = 1, first: int = 0) -> Request:
    """A prompt of 512-token blocks, numbered from ``first``."""
    count = -(-tokens // 512)
    ends = [min(512 * (k + 1), tokens) for k in range(count)]
    return Request(rid, at, Blocks(list(range(first, first + count)), ends, tokens), output, f"s{rid}")


def served(simulation: Simulation) -> list[tuple[float, float, int]]:
    """(first token, end, cached tokens) by request."""
    simulation.run()
    rows = sorted(simulation.served, key=lambda row: row[0].rid)
    return [(job.first, ended, job.cached) for _, job, ended in rows]


def test_a_request_alone_takes_what_the_formula_says() -> None:
    [(first, ended, _)] = served(Simulation([request(0, 0.0, 5000, 100)], "8b", 1, RoundRobin()))
    assert first == pytest.approx(prefill_seconds(PROFILE, 5000))
    step = PROFILE.overhead + PROFILE.weights
    assert ended - first == pytest.approx(sum(step + PROFILE.read * (5001 + i) for i in range(99)))


def test_a_cached_prefix_is_not_computed_again() -> None:
    rows = served(Simulation([request(0, 0.0, 5120, 5), request(1, 100.0, 5632, 5)], "8b", 1, RoundRobin()))
    assert rows[1][2] == 5120
    assert rows[1][0] - 100.0 == pytest.approx(prefill_seconds(PROFILE, 512, 5120))


def test_prompts_of_one_step_wait_as_lindley_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROFILES, "one prompt a step", PROFILE._replace(budget=2000))
    rng, at, requests = random.Random(1), 0.0, []
    for rid in range(300):
        at += rng.expovariate(8.0)
        requests.append(request(rid, at, 2000, first=10 * rid))
    free = 0.0
    for sent, (first, _, _) in zip(requests, served(Simulation(requests, "one prompt a step", 1, RoundRobin())), strict=True):
        free = max(free, sent.arrival) + prefill_seconds(PROFILE._replace(budget=2000), 2000)
        assert first == pytest.approx(free)


@pytest.mark.parametrize(
    "rule",
    [RoundRobin, CacheAware, Scores, Dynamo, DynamoQueue, LMetric, SMetric, Conductor, Ours],
    ids=lambda rule: rule.__name__,
)
def test_every_rule_serves_all_requests_and_the_same_again(rule: type[Rule]) -> None:
    requests = make("tools", "70b", 3, 0.6, 5, 120.0)
    once, again = (Simulation(requests, "70b", 3, rule(), seed=2) for _ in range(2))
    assert once.run() == again.run()
    assert sorted(row[0].rid for row in once.served) == list(range(len(requests)))


def test_no_rule_beats_a_pooled_cache_at_low_load() -> None:
    requests = make("conversation", "70b", 4, 0.4, 5, 900.0)
    bound = Simulation(requests, "70b", 4, Oracle("bound"), shared="pooled").run()
    assert bound.hit >= Simulation(requests, "70b", 4, Ours()).run().hit


@pytest.mark.parametrize(("profile", "closed"), [("llamacpp", False), ("70b-offload", False), ("70b", True)])
def test_other_engines_and_turns_that_wait_are_served_too(profile: str, closed: bool) -> None:
    requests = make("conversation", profile, 3, 0.5, 5, 300.0)
    simulation = Simulation(requests, profile, 3, LeastRequests(), closed=closed)
    simulation.run()
    ends = {row[0].rid: row[2] for row in simulation.served}
    assert len(ends) == len(requests)
    if closed:
        assert all(row.arrival >= ends[row.parent] for row in requests if row.parent is not None)


@pytest.mark.parametrize(("workload", "load"), [("conversation", 0.75), ("tools", 0.8)])
def test_ours_is_at_least_as_fast_as_cache_aware_and_that_as_round_robin(workload: str, load: float) -> None:
    requests = make(workload, "70b", 4, load, 5, 900.0)
    ours, aware, turns = (Simulation(requests, "70b", 4, rule()).run() for rule in (Ours, CacheAware, RoundRobin))
    assert ours.mean <= aware.mean <= turns.mean
    assert ours.slo >= aware.slo


def test_gateways_that_share_no_memory_find_more_in_the_caches_if_prompts_have_homes() -> None:
    rules = [Replicas(3, agree=agree) for agree in (False, True)]
    apart, agreed = (Simulation(make("tenants", "70b", 8, 0.7, 5, 300.0), "70b", 8, rule).run() for rule in rules)
    assert agreed.hit > apart.hit + 0.05
    assert agreed.mean < 0.85 * apart.mean
    assert agreed.imbalance < 1.1 * apart.imbalance


def test_the_scheduler_is_told_no_more_than_a_gateway_sees() -> None:
    class Blind(Ours):
        def setup(self, views: list[View], rng: random.Random, profile: Profile) -> None:
            super().setup(views, rng, profile)
            for view in views:
                view.engine = None  # type: ignore[assignment]

        def choose(self, request: Request, now: float) -> int | None:
            hidden = Request(request.rid, request.arrival, request.prompt, 0, "")
            place = super().choose(hidden, now)
            self.requests[request.rid] = request
            return place

        def release(self, now: float) -> list[tuple[Request, int]]:
            return [(self.requests[hidden.rid], place) for hidden, place in super().release(now)]

        requests: dict[int, Request]

    requests = make("conversation", "70b", 3, 0.6, 5, 300.0)
    plain = Simulation(requests, "70b", 3, Ours()).run()
    rule = Blind()
    rule.requests = {}
    simulation = Simulation(requests, "70b", 3, RoundRobin())
    views = [View(view.place, view.engine) for view in simulation.views]
    simulation._rule = rule
    rule.setup(views, random.Random(0), simulation.profile)
    assert simulation.run() == plain
