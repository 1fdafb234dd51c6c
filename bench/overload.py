"""More requests than the backends can answer: `python -m bench.overload`, in about a minute.

First what the backends can do is measured in a closed loop; then requests come at random moments at 1, 1.5, 2 and 3 times
that rate, a fifth of them interactive, half default, the rest batch, each with the deadline that its client tells. Goodput is
what is answered within it. Ends with status 1 if the goodput at the highest load is less than 95 % of the peak, or if more
waits than may.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.client import Connection, Tally
from bench.load import Load, Spec, quantiles
from bench.processes import BenchFailed, free_port, running, wait_until_ready
from bench.wire import allow_files, chat_request

PRIORITIES = ("interactive", "default", "batch")
SHARES = (0.2, 0.5, 0.3)
DEADLINES = (1.0, 10.0, 30.0)
"""Seconds, by priority, from when a request is sent to the end of its answer."""
BACKENDS = 2
LEAST = 0.95
"""Of the peak, what is answered in time at any load beyond capacity."""
SETTINGS = "port = {port}\nqueue_requests = {queue}\n"
BACKEND = '[[backends]]\nname = "b{number}"\nurl = "http://127.0.0.1:{port}"\nkind = "openai"\nslots = {slots}\n'
LOOKS = 0.2
"""Seconds between two looks at the queue."""
CLEAR = 20.0
"""Seconds for what is still waiting when a load ends."""


@dataclass(frozen=True)
class Plan:
    """How much of what."""

    loads: Sequence[float] = (1.0, 1.5, 2.0, 3.0)
    slots: int = 16
    service: float = 0.2
    """Seconds that each request takes a backend."""
    queue: int = 100
    warm_up: float = 2.0
    seconds: float = 8.0


@dataclass
class Measured:
    """What became of the requests at one load; lists are by priority."""

    load: float
    sent: float
    """A second."""
    seconds: float
    tallies: list[Tally]
    deepest: int

    def good(self, priority: int) -> float:
        """Answered in time, a second."""
        in_time = sum(took <= DEADLINES[priority] for took in self.tallies[priority].latencies)
        return in_time / self.seconds

    @property
    def goodput(self) -> float:
        """Of all priorities."""
        return sum(self.good(priority) for priority in range(len(PRIORITIES)))

    @property
    def late(self) -> int:
        """Answers that came too late."""
        return sum(tally.units for tally in self.tallies) - round(self.goodput * self.seconds)

    def refused(self, priority: int) -> str:
        """By status: 429 is queue_full, 503 queue_timeout."""
        return ", ".join(f"{count} {what}" for what, count in sorted(self.tallies[priority].errors.items())) or "0"


class Gateway:
    """What is looked at."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.deepest = 0

    def depth(self) -> int:
        """Requests that wait, of all priorities."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        asking = urllib.request.Request(url, headers={"Accept": "text/plain"})
        with urllib.request.urlopen(asking, timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith("gateway_queue_depth"))

    async def watch(self) -> None:
        """Keep the deepest that the queue is seen."""
        while True:
            self.deepest = max(self.deepest, await asyncio.to_thread(self.depth))
            await asyncio.sleep(LOOKS)


@contextmanager
def gateway(plan: Plan, run: Path) -> Iterator[Gateway]:
    """One in front of backends whose answers take a fixed time."""
    port, ports = free_port(), [free_port() for _ in range(BACKENDS)]
    backends = [BACKEND.format(number=number, port=one, slots=plan.slots) for number, one in enumerate(ports)]
    (run / "gateway.toml").write_text(SETTINGS.format(port=port, queue=plan.queue) + "".join(backends))
    here, cores = Path(__file__).parents[1], os.sched_getaffinity(0)
    program = [sys.executable, str(Path(sys.executable).with_name("twistd")), "-n", "--pidfile=", "--logfile=gateway.log"]
    with ExitStack() as stack:
        for number, one in enumerate(ports):
            command = [sys.executable, "-m", "bench.backend", str(one), "slow", str(plan.service)]
            stack.enter_context(running(command, cores, run / f"backend{number}.log", here))
        whole = [*program, "inference-gateway", "--config", "gateway.toml"]
        process = stack.enter_context(running(whole, cores, run / "output.log", run))
        wait_until_ready("gateway", process, port, chat_request(64, stream=False), run, 60.0)
        yield Gateway(port)


async def end(loads: Sequence[Load]) -> None:
    """Nobody asks any more; what waits is answered."""
    for load in loads:
        load.running = False
    with suppress(TimeoutError):
        async with asyncio.timeout(CLEAR):
            while any(connection.busy for load in loads for connection in load.open):
                await asyncio.sleep(0.02)
    for connection in [connection for load in loads for connection in load.open]:
        connection.transport.abort()
    await asyncio.gather(*(task for load in loads for task in load.tasks), return_exceptions=True)


async def capacity(port: int, plan: Plan) -> float:
    """Answers a second when somebody always waits, but never many."""
    load = Load(Spec(port, "closed", connections=BACKENDS * plan.slots + min(plan.queue, plan.slots)))
    await load.all_stay(Connection)
    await asyncio.sleep(plan.warm_up)
    load.tally.take()
    await asyncio.sleep(plan.seconds / 2)
    taken = load.tally.take()
    await end([load])
    if taken.errors or not taken.units:
        raise BenchFailed(f"the closed loop saw {dict(taken.errors)} beside {taken.units} answers")
    return taken.units / (plan.seconds / 2)


def _load_of(port: int, priority: int, rate: float) -> Load:
    headers = f"X-Gateway-Priority: {PRIORITIES[priority]}\r\nX-Stainless-Read-Timeout: {DEADLINES[priority]:g}\r\n"
    return Load(Spec(port, "open", rate=rate, seed=priority + 1, headers=headers))


async def at(there: Gateway, load: float, rate: float, plan: Plan) -> Measured:
    """Requests come at this rate, for a while."""
    loads = [_load_of(there.port, priority, rate * share) for priority, share in enumerate(SHARES)]
    for one in loads:
        one.start(asyncio.create_task(one.at_a_rate()))
    await asyncio.sleep(plan.warm_up)
    for one in loads:
        one.tally.take()
    there.deepest = 0
    loop = asyncio.get_running_loop()
    began = loop.time()
    watching = asyncio.create_task(there.watch())
    await asyncio.sleep(plan.seconds)
    tallies, seconds = [one.tally.take() for one in loads], loop.time() - began
    watching.cancel()
    await end(loads)
    return Measured(load, rate, seconds, tallies, there.deepest)


async def measure(there: Gateway, plan: Plan) -> tuple[float, list[Measured]]:
    """(answers a second that the backends can give, what came at each load)."""
    most = await capacity(there.port, plan)
    return most, [await at(there, load, load * most, plan) for load in plan.loads]


def wrong(found: Sequence[Measured], plan: Plan) -> Iterator[str]:
    """What is not as promised."""
    peak = max(one.goodput for one in found)
    if found[-1].goodput < LEAST * peak:
        yield f"at load {found[-1].load:g} the goodput is {found[-1].goodput:.0f}/s, the peak is {peak:.0f}/s"
    for one in found:
        if one.deepest > plan.queue:
            yield f"at load {one.load:g} {one.deepest} requests waited, {plan.queue} may"


def table(found: Sequence[Measured], plan: Plan) -> Iterator[str]:
    """Lines of Markdown."""
    peak = max(one.goodput for one in found) or 1.0
    in_time = " | ".join(f"{name}/s" for name in PRIORITIES)
    refused = " | ".join(f"{name} refused" for name in PRIORITIES)
    yield f"| load | sent/s | {in_time} | goodput/s | of the peak | late | interactive p50 ms | p99 ms | {refused} | deepest |"
    yield "|--:" * 14 + "|"
    for one in found:
        times = quantiles(one.tallies[0].latencies)
        cells = [f"{one.load:g}", f"{one.sent:.0f}", *(f"{one.good(priority):.1f}" for priority in range(3))]
        cells += [f"{one.goodput:.1f}", f"{one.goodput / peak:.1%}", str(one.late)]
        cells += [f"{times.get(name, 0.0):.0f}" for name in ("p50", "p99")]
        cells += [*(one.refused(priority) for priority in range(3)), f"{one.deepest} of {plan.queue}"]
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, and say what came of it."""
    usual = Plan()
    parser = argparse.ArgumentParser(
        prog="bench.overload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=usual.slots, help="of each of the two backends")
    parser.add_argument("--service", type=float, default=usual.service, help="seconds that a request takes")
    parser.add_argument("--queue", type=int, default=usual.queue, help="requests that may wait")
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="at each load")
    options = parser.parse_args()
    plan = Plan(slots=options.slots, service=options.service, queue=options.queue, seconds=options.seconds)
    allow_files()
    with TemporaryDirectory(prefix="overload-") as name:
        try:
            with gateway(plan, Path(name)) as there:
                most, found = asyncio.run(measure(there, plan))
        except BenchFailed as problem:
            sys.exit(f"overload: {problem}")
    print(f"capacity: {most:.1f}/s of {BACKENDS * plan.slots / plan.service:.1f}/s")
    print("\n".join(table(found, plan)))
    if problems := list(wrong(found, plan)):
        sys.exit("\n".join(f"WRONG: {one}" for one in problems))


if __name__ == "__main__":
    main()
