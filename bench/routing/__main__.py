"""`python -m bench.routing`: our scheduler and others in the simulator, as tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import quantiles
from typing import Any, Final

from .baselines import BoundedLoads, LeastRequests, Oracle, PowerOfTwo, RoundRobin, SessionHash
from .engine import Request
from .ours import Ours
from .published import CacheAware, Conductor, Dynamo, DynamoQueue, LMetric, Scores, SMetric
from .replicas import Replicas
from .simulation import Figures, Rule, Simulation
from .workloads import LOADS, make

PUBLISHED: Final[list[Callable[[], Rule]]] = [
    RoundRobin,
    LeastRequests,
    PowerOfTwo,
    SessionHash,
    BoundedLoads,
    CacheAware,
    Scores,
    Dynamo,
    DynamoQueue,
    LMetric,
    SMetric,
    Conductor,
]
FEW: Final[list[Callable[[], Rule]]] = [RoundRobin, LeastRequests, CacheAware, LMetric, SMetric]
BOUNDS: Final = {"infinite": "(bound) one infinite cache", "pooled": "(bound) all caches pooled"}
HALF: Final = [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
ROBUST: Final[list[tuple[str, str, str, float, float, dict[str, Any]]]] = [
    ("8B on H100", "conversation", "8b", 0.65, 900, {}),
    ("8B on H100", "tools", "8b", 0.7, 450, {}),
    ("70B, ten times the cache in host memory", "conversation", "70b-offload", 0.9, 3600, {}),
    ("llama.cpp, 8 slots", "tools", "llamacpp", 0.4, 1800, {}),
    ("half of the backends at half speed", "conversation", "70b", 0.45, 3600, {"speeds": HALF}),
    ("half of the backends at half speed", "tools", "70b", 0.5, 1800, {"speeds": HALF}),
    ("a turn waits for the one before", "conversation", "70b", 0.8, 3600, {"closed": True}),
]


def run(requests: list[Request], profile: str, n: int, rule: Rule, seed: int, **more: Any) -> Figures:
    """One rule on these requests; a line of a table."""
    figures = Simulation(requests, profile, n, rule, seed=seed, **more).run()
    cells = f"{figures.mean:.2f} | {figures.p90:.2f} | {figures.p99:.1f} | {figures.slo:.3f} | {figures.hit:.3f}"
    print(f"| {rule.name} | {cells} | {figures.imbalance:.2f} |", flush=True)
    return figures


def head(title: str, requests: list[Request]) -> None:
    """The top of a table."""
    rate = len(requests) / max(requests[-1].arrival - requests[0].arrival, 1e-9)
    print(f"\n**{title}** ({rate:.2f} requests/s, {len(requests)} requests)\n")
    print("| rule | TTFT mean s | p90 | p99 | SLO | hit | imbalance |\n|---|---|---|---|---|---|---|")


def verdict(ours: Figures, others: list[tuple[str, Figures]]) -> None:
    """Ours beside the best of the others."""
    name, best = min(others, key=lambda row: row[1].mean)
    print(f"\nOurs / best published ({name}): {ours.mean / best.mean:.3f}")


def cell(workload: str, n: int, load: float, seed: int, seconds: float, rules: list[Callable[[], Rule]]) -> None:
    """One table of the matrix."""
    requests = make(workload, "70b", n, load, seed, seconds)
    head(f"{workload}, {n} backends, load {load}", requests)
    for shared, name in BOUNDS.items():
        run(requests, "70b", n, Oracle(name), seed, shared=shared)
    others = [(rule.name, run(requests, "70b", n, rule, seed)) for rule in [make_rule() for make_rule in rules]]
    verdict(run(requests, "70b", n, Ours(), seed), others)


def robust(seed: int) -> None:
    """Other engines, unequal backends, turns that wait, and facts that nobody tells."""
    for title, workload, profile, load, seconds, more in ROBUST:
        requests = make(workload, profile, 8, load, seed, seconds)
        head(f"{title}: {workload}, 8 backends, load {load}", requests)
        rules: list[Rule] = [rule() for rule in (LeastRequests, CacheAware, Dynamo, LMetric, SMetric, Conductor)]
        others = [(rule.name, run(requests, profile, 8, rule, seed, **more)) for rule in rules]
        ours = run(requests, profile, 8, Ours(), seed, **more)
        blind = Ours(known=False)
        blind.name += ", slots and cache size unknown"
        run(requests, profile, 8, blind, seed, **more)
        verdict(ours, others)


ROWS: Final = ((1, True), (2, False), (2, True), (3, False), (3, True))
"""How many gateways there are, and whether prompts have homes: one gateway alone gives them none."""


def replicas(seed: int) -> None:
    """One gateway and several that share no memory, with and without homes for prompts."""
    for workload, load in (("tenants", 0.7), ("tools", 0.7), ("conversation", 0.65)):
        head(f"{workload}, 8 backends, load {load}", make(workload, "70b", 8, load, seed))
        for rule in [Replicas(count, agree=agree) for count, agree in ROWS]:
            run(make(workload, "70b", 8, load, seed), "70b", 8, rule, seed)
        if workload != "tenants":
            run(make(workload, "70b", 8, load, seed), "70b", 8, Replicas(3, sessions=True), seed)


def retry_after(seed: int) -> None:
    """How far Retry-After is from the true wait, at the highest load of the conversations, where a queue forms."""
    print("\n| backends | estimates | true wait p50 / p90 s | error p50 / p90 s | within a factor of 2, or 2 s |")
    print("|---|--:|--:|--:|--:|")
    for n in (4, 8):
        ours = Ours()
        requests = make("conversation", "70b", n, LOADS["conversation"][-1], seed, float("inf"))
        Simulation(requests, "70b", n, ours, seed=seed).run()
        rows = ours.retry_after
        waits = quantiles([true for _, true in rows], n=10)
        errors = quantiles([abs(told - true) for told, true in rows], n=10)
        near = sum(abs(told - true) <= 2.0 or 0.5 <= told / max(true, 1e-9) <= 2.0 for told, true in rows) / len(rows)
        cells = f"{waits[4]:.1f} / {waits[8]:.1f} | {errors[4]:.1f} / {errors[8]:.1f} | {near:.0%}"
        print(f"| {n} | {len(rows)} | {cells} |", flush=True)


def main() -> None:
    """The tables that the arguments ask for."""
    parser = argparse.ArgumentParser(prog="bench.routing", description=__doc__)
    parser.add_argument("--seed", type=int, default=5, help="5 and 6 are for tuning")
    parser.add_argument("--backends", type=int, nargs="*", default=[4, 8, 16])
    parser.add_argument("--workload", choices=sorted(LOADS), nargs="*", default=list(LOADS))
    parser.add_argument("--quick", action="store_true", help="four backends, a few minutes of each trace, five rules")
    parser.add_argument("--robust", action="store_true", help="other engines and circumstances instead")
    parser.add_argument("--replicas", action="store_true", help="several gateways that share no memory instead")
    parser.add_argument("--retry-after", action="store_true", help="how good Retry-After is instead")
    args = parser.parse_args()
    if args.robust:
        robust(args.seed)
        return
    if args.replicas:
        replicas(args.seed)
        return
    if args.retry_after:
        retry_after(args.seed)
        return
    for workload in args.workload:
        for n in [4] if args.quick else args.backends:
            for load in LOADS[workload][-1:] if args.quick else LOADS[workload]:
                seconds, rules = (1200.0, FEW) if args.quick else (float("inf"), PUBLISHED)
                cell(workload, n, load, args.seed, seconds, rules)


if __name__ == "__main__":
    main()
