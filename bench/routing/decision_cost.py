"""`python -m bench.routing.decision_cost`: what it costs to place a request, hashing included, in microseconds."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from statistics import median

from gateway.core.policy import ExpectedCompletion
from gateway.core.prefix import blocks_of
from gateway.core.scheduler import Scheduler
from gateway.core.tickets import Bounds, Ticket
from gateway.core.usage import Usage

TEXT = "".join(f"{i} bottles of beer on the wall, take one down. " for i in range(3000))


def scheduler_of(n: int) -> Scheduler:
    """A pool with caches that are full after a few hundred prompts."""
    scheduler = Scheduler(ExpectedCompletion(), Bounds(requests=2000))
    for i in range(n):
        scheduler.set_backend(f"backend {i}", 0.0, slots=256, kv_tokens=400_000)
    return scheduler


def placing(n: int, size: int, *, known: bool) -> tuple[float, float]:
    """(a submit that binds, its first token and release) in microseconds each, the median of many. ``known``: a prompt comes
    again; else each is new, and pushes an old one out."""
    scheduler, now = scheduler_of(n), 0.0
    submits, rests = [], []
    for number in range(3000 if size <= 4096 else 1000):
        text = f"{0 if known else number} {TEXT}"[:size]
        now += 0.05
        begun = time.perf_counter()
        prompt = blocks_of("model", text) if scheduler.hashes else None
        ticket = Ticket("model", now, prompt_tokens=size // 4) if prompt is None else Ticket("model", now, prompt=prompt)
        assert scheduler.submit(ticket, now)
        submitted = time.perf_counter()
        scheduler.first_token(ticket, now + 0.01)
        scheduler.release(ticket, now + 0.02, Usage(size // 4, 100, ticket.cached_tokens))
        submits.append(submitted - begun)
        rests.append(time.perf_counter() - submitted)
    return median(submits) * 1e6, median(rests) * 1e6


def overload(n: int, waiting: int) -> float:
    """Microseconds for one event (a first token) with so many tickets waiting that it lets one in."""
    scheduler, now = scheduler_of(n), 0.0
    for i in range(n):
        scheduler.backends.rates.serial[i] = True
    running = []
    for number in range(waiting + 4 * n):
        ticket = Ticket("model", now, prompt=blocks_of("model", f"{number} {TEXT}"[:4096]), prompt_tokens=1000)
        if scheduler.submit(ticket, now):
            running.append(ticket)
    spent = []
    for _ in range(2 * n):
        ticket = running.pop(0)
        now += 0.4
        begun = time.perf_counter()
        scheduler.first_token(ticket, now)
        scheduler.release(ticket, now, None)
        running += scheduler.schedule(now)
        spent.append(time.perf_counter() - begun)
    return median(spent) * 1e6


def index_bytes() -> tuple[int, float]:
    """Entries of a full index of 16 caches with 400,000 tokens each, and bytes for each entry."""
    scheduler, now = scheduler_of(16), 0.0
    tracemalloc.start()
    for number in range(800):
        now += 0.4
        ticket = Ticket("model", now, prompt=blocks_of("model", f"{number} {TEXT}"[:65536]))
        scheduler.submit(ticket, now)
        scheduler.release(ticket, now, Usage(16384, 1, 0))
    entries = len(scheduler.backends.index)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return entries, size / entries


def best(measure: Callable[[], tuple[float, float]]) -> str:
    """The least disturbed of three runs, as cells of a table."""
    submit, rest = min(measure() for _ in range(3))
    return f"{submit:.1f} | {rest:.1f} |"


def main() -> None:
    """The table of docs/routing.md."""
    print("| backends | prompt | submit, bound at once | first token + release |\n|---|---|---|---|")
    for n in (1, 4, 16):
        for size in (4096, 65536):
            print(f"| {n} | {size // 1024} KiB, new | {best(lambda n=n, size=size: placing(n, size, known=False))}")  # type: ignore[misc]
            print(f"| {n} | {size // 1024} KiB, known | {best(lambda n=n, size=size: placing(n, size, known=True))}")  # type: ignore[misc]
    for waiting in (100, 1000):
        print(f"an event that lets a ticket in, 16 backends, {waiting} waiting: {overload(16, waiting):.0f} us")
    entries, each = index_bytes()
    print(f"index: {entries} entries, {each:.0f} bytes each")


if __name__ == "__main__":
    main()
