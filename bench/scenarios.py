"""What is measured: requests, streams, added latency, workers, memory."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from bench.load import Spec
from bench.measure import MOST_EVENTS, STREAM_INTERVAL, LoadProcess, Result, backend, load, median, proxy_before
from bench.processes import BenchFailed, Cores, cpu_seconds, rss_kib
from bench.proxies import GATEWAY, ROUTERS, Proxy, Running

DIRECT = "no proxy"
FAILED = "failed"
"""The case of a proxy that could not be measured."""
TYPICAL = (32, 1)
"""Connections, KiB of prompt: the load by which a router's throughput is judged."""
CONNECTIONS = 64
"""To several workers."""
SETTLE = 2.0
"""Seconds between the last event and a look at memory."""


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    proxies: Sequence[Proxy]
    named: bool
    """The proxies were asked for by name."""
    cores: Cores
    files: int
    connections: Sequence[int]
    prompts: Sequence[int]
    """KiB."""
    streams: Sequence[int]
    seconds: float
    repeat: int
    rates: Sequence[float]
    """Requests a second for latency; none: half of what the slowest router can do, and what the gateway can."""
    held: int
    total: int
    interval: float
    """Seconds between two events of a stream; 0: STREAM_INTERVAL, or longer if that would be more than MOST_EVENTS."""

    def spec(self, kind: str, port: int = 0, **more: float) -> Spec:
        """A load with this plan's times."""
        base = Spec(port, kind, seconds=self.seconds, windows=self.repeat)
        return replace(base, **more)  # type: ignore[arg-type]


def note(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def each(plan: Plan, scenario: str, measure: Callable[[Proxy], Iterator[Result]]) -> Iterator[Result]:
    """All proxies, one after the other. One that fails is named and left out; it does not take the others with it."""
    for proxy in plan.proxies:
        note(f"{scenario}: {proxy.name}")
        try:
            yield from measure(proxy)
        except BenchFailed as problem:
            note(f"{scenario}: {proxy.name} FAILED: {problem}")
            yield Result(scenario, FAILED, proxy.name, {}, {"failed": 1})


def requests(plan: Plan) -> Iterator[Result]:
    """CPU per request, by connections and size of the prompt."""

    def one(proxy: Proxy) -> Iterator[Result]:
        with proxy_before(proxy, "fixed", plan.cores, plan.files) as there:
            for kib in plan.prompts:
                for count in plan.connections:
                    yield _requests(plan, there, count, kib)

    yield from each(plan, "requests", one)


def _requests(plan: Plan, there: Running, count: int, kib: int) -> Result:
    spec = plan.spec("closed", there.port, connections=count, prompt=kib * 1024)
    windows, errors = load(spec, there.pids)
    size = f"{kib} KiB" if kib < 1024 else f"{kib / 1024:g} MiB"
    numbers = {"connections": count, "prompt_kib": kib}
    return Result("requests", f"{count} x {size}", there.name, median(windows), errors, windows, numbers)


def streams(plan: Plan) -> Iterator[Result]:
    """CPU per event, by the number of streams."""

    def one(proxy: Proxy) -> Iterator[Result]:
        for count in plan.streams:
            yield _streams(plan, proxy, count)

    yield from each(plan, "streams", one)


def _streams(plan: Plan, proxy: Proxy, count: int) -> Result:
    interval = plan.interval or max(STREAM_INTERVAL, count / MOST_EVENTS)
    with proxy_before(proxy, "paced", plan.cores, plan.files, interval) as there:
        # Time to open the streams, then one more for those that came first and last to mix.
        spec = plan.spec("streams", there.port, connections=count, warm_up=1 + count / 1000)
        windows, errors = load(spec, there.pids)
    numbers = {"streams": count, "interval": interval, "offered": count / interval}
    return Result("streams", f"{count} x {1 / interval:g}/s", there.name, median(windows), errors, windows, numbers)


def latency(plan: Plan) -> Iterator[Result]:
    """What a proxy adds to each request at a fixed rate."""
    for rate in plan.rates or _half_loads(plan):
        yield from _latency(plan, rate)


def _latency(plan: Plan, rate: float) -> Iterator[Result]:
    def spec(port: int) -> Spec:
        return plan.spec("open", port, rate=rate, prompt=TYPICAL[1] * 1024)

    case = f"{rate:.0f}/s"
    note(f"latency at {case}: {DIRECT}")
    with backend("fixed", plan.cores) as port:
        windows, errors = load(spec(port), [])
    direct = median(windows)
    yield Result("latency", case, DIRECT, direct, errors, windows, {"rate": rate})

    def one(proxy: Proxy) -> Iterator[Result]:
        with proxy_before(proxy, "fixed", plan.cores, plan.files) as there:
            windows, errors = load(spec(there.port), there.pids)
        figures = median(windows)
        for name in ("p50_ms", "p99_ms"):
            if name in figures and name in direct:
                figures[f"added_{name}"] = figures[name] - direct[name]
        yield Result("latency", case, proxy.name, figures, errors, windows, {"rate": rate})

    yield from each(plan, "latency", one)


def _half_loads(plan: Plan) -> list[float]:
    """Half of the slowest router's requests a second in a closed loop; and half of the gateway's, if those are fewer."""
    chosen = [proxy for proxy in plan.proxies if proxy.name in {GATEWAY, *ROUTERS}] or plan.proxies[:1]
    halves = {}
    for proxy in chosen:
        with proxy_before(proxy, "fixed", plan.cores, plan.files) as there:
            spec = plan.spec("closed", there.port, connections=TYPICAL[0], prompt=TYPICAL[1] * 1024)
            halves[proxy.name] = max(1.0, median(load(spec, there.pids)[0])["rate"] / 2)
        note(f"latency: {proxy.name} does {2 * halves[proxy.name]:.0f} requests/s")
    slowest = min((rate for name, rate in halves.items() if name in ROUTERS), default=0.0)
    gateway = halves.get(GATEWAY, min(halves.values()))
    return [gateway, slowest] if gateway < slowest else [slowest or gateway]


def workers(plan: Plan) -> Iterator[Result]:
    """CPU per request of one worker and of several, on all cores that there are, which load and backend use too: what does not
    grow with the workers is what makes them worth a core each."""
    gateway = next((proxy for proxy in plan.proxies if proxy.name == GATEWAY), None)
    if gateway is None:
        return
    everywhere = replace(plan.cores, proxy=plan.cores.proxy | plan.cores.others)
    count = 1
    while count <= max(2, len(everywhere.proxy)):
        note(f"workers: {count}")
        with proxy_before(_with_workers(gateway, count), "fixed", everywhere, plan.files) as there:
            before = _idle(there.pids)
            spec = plan.spec("closed", there.port, connections=CONNECTIONS, prompt=TYPICAL[1] * 1024)
            windows, errors = load(spec, there.pids)
            used = [cpu_seconds([pid]) - first for pid, first in zip(there.pids, before, strict=True)]
        figures = {**median(windows), "busiest": max(used) / sum(used)}
        yield Result("workers", f"{count}", GATEWAY, figures, errors, windows, {"workers": count})
        count *= 2


def _idle(pids: Sequence[int]) -> list[float]:
    """What each has used, once none of them is starting any more: the first that answers would get all connections."""
    used = [cpu_seconds([pid]) for pid in pids]
    while True:
        time.sleep(1.0)
        before, used = used, [cpu_seconds([pid]) for pid in pids]
        if sum(used) - sum(before) < 0.1:
            return used


def _with_workers(gateway: Proxy, count: int) -> Proxy:
    return replace(gateway, command=lambda place: [*gateway.command(place), "--workers", str(count)])


def memory(plan: Plan) -> Iterator[Result]:
    """Resident memory of streams that are held, and after many requests. Of the gateway, unless others are named."""
    mine = plan if plan.named else replace(plan, proxies=[proxy for proxy in plan.proxies if proxy.name == GATEWAY])
    held = min(plan.held, plan.files // 2)
    if held < plan.held:
        note(f"{held} streams are held, not {plan.held}: a proxy may have no more open files (ulimit -Hn)")
    if held:
        yield from each(mine, "held streams", lambda proxy: _held(plan, proxy, held))
    if plan.total:
        yield from each(mine, "many requests", lambda proxy: _many(plan, proxy))


def _held(plan: Plan, proxy: Proxy, count: int) -> Iterator[Result]:
    """Twice: what stays after the streams have gone is a leak only if the second time takes more than the first."""
    errors: Counter[str] = Counter()
    with proxy_before(proxy, "idle", plan.cores, plan.files) as there:
        time.sleep(SETTLE)
        before = rss_kib(there.pids)
        spec = plan.spec("held", there.port, connections=count)
        first, held, seconds = _hold(spec, there.pids, errors)
        after = rss_kib(there.pids)
        second, _, _ = _hold(spec, there.pids, errors)
    figures = {
        "streams": held,
        "seconds": seconds,
        "kib_per_stream": (first - before) / max(1, held),
        "before_mib": before / 1024,
        "rss_mib": first / 1024,
        "after_mib": after / 1024,
        "again_mib": second / 1024,
    }
    yield Result("held streams", f"{count}", proxy.name, figures, errors, [], {"streams": count})


def _hold(spec: Spec, pids: list[int], errors: Counter[str]) -> tuple[float, int, float]:
    """(KiB while streams are held, how many there are, seconds that it took to open them)."""
    with LoadProcess(spec) as process:
        process.line()
        line = process.line()
        time.sleep(SETTLE)
        holding = rss_kib(pids)
        process.finish()
        errors.update(line["errors"])
        errors.update(process.line()["errors"])
    time.sleep(SETTLE)
    return holding, line["units"], line["seconds"]


def _many(plan: Plan, proxy: Proxy) -> Iterator[Result]:
    """How long it takes is not known before: windows are asked for until there are enough requests."""
    windows: list[dict[str, float]] = []
    errors: Counter[str] = Counter()
    with proxy_before(proxy, "fixed", plan.cores, plan.files) as there:
        while sum(window["units"] for window in windows) < plan.total:
            spec = plan.spec("closed", there.port, connections=TYPICAL[0], warm_up=0.2, seconds=5.0, windows=4)
            more, failed = load(spec, there.pids)
            windows += more
            errors.update(failed)
            if not more[-1]["units"]:
                raise BenchFailed("it answers no longer")
    memory = [window["rss_mib"] for window in windows]
    quarters = {f"rss_{part}_mib": memory[(len(memory) - 1) * part // 100] for part in (0, 25, 50, 75, 100)}
    figures = {"requests": sum(window["units"] for window in windows), **quarters, **median(windows)}
    yield Result("many requests", f"{plan.total}", proxy.name, figures, errors, windows, {"requests": plan.total})
