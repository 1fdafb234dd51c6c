"""The load: `python -m bench.load JSON`, a process of its own that writes a JSON line for each window of time.

The reader of those lines looks at the proxy's CPU time when a line comes, so they are written at once; the latencies
of all windows follow in the last line, for sorting them takes time.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.client import Connection, Stream, Tally
from bench.wire import allow_files, chat_request, run

AT_ONCE = 64
"""Connections that may be opening at a time."""
MOST_IN_FLIGHT = 2000
"""More requests than these in flight, and an open loop stops sending: the proxy is past its limit."""
CONNECT_TIMEOUT = 20.0
FIRST_EVENT_TIMEOUT = 60.0
GOODBYE = 5.0
"""Seconds for requests in flight when the time is over."""


@dataclass(frozen=True)
class Spec:
    """What to load a proxy with."""

    port: int
    kind: str
    """`closed`: each connection asks again as soon as it is answered. `open`: requests come at a rate, answered or not.
    `streams`: each connection has one stream after the other. `held`: each has one, until standard input ends."""
    connections: int = 1
    prompt: int = 1024
    rate: float = 0.0
    seed: int = 1
    """Of the moments of an open loop."""
    headers: str = ""
    warm_up: float = 1.0
    seconds: float = 2.0
    windows: int = 3


class Load:
    """Runs one spec."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.tally = Tally()
        self.running = True
        self.open: set[Connection] = set()
        self.idle: list[Connection] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self._request = chat_request(spec.prompt, stream=spec.kind in {"streams", "held"}, headers=spec.headers)

    async def connect(self, factory: Callable[..., Connection], on_idle: Callable[[Connection], None]) -> Connection | None:
        """One more connection; None, and an error on the tally, if the proxy will not have it."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, connection = await loop.create_connection(
                    lambda: factory(self._request, self.tally, on_idle), "127.0.0.1", self.spec.port
                )
        except (OSError, TimeoutError):
            self.tally.errors["not connected"] += 1
            return None
        self.open.add(connection)
        return connection

    def start(self, task: asyncio.Task[None]) -> None:
        """Keep a task from the garbage collector."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def stay(self, factory: Callable[..., Connection]) -> None:
        """Ask on one connection for as long as the load runs; a new one takes its place if it ends."""
        while self.running:
            connection = await self.connect(factory, self.again)
            if connection is None:
                await asyncio.sleep(0.1)
            else:
                await connection.closed
                self.open.discard(connection)

    def again(self, connection: Connection) -> None:
        """What an idle connection of a closed loop does."""
        if self.running:
            connection.ask()
        else:
            connection.transport.close()

    async def all_stay(self, factory: Callable[..., Connection]) -> None:
        """Open all connections of a closed loop, few at a time."""
        for number in range(self.spec.connections):
            self.start(asyncio.create_task(self.stay(factory)))
            if number % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0.02)

    async def at_a_rate(self) -> None:
        """Send requests at random moments, as many a second as the rate says, whatever becomes of them.

        Each one's latency counts from when it was sent, which no slow answer delays.
        """
        moments = random.Random(self.spec.seed)
        due = time.monotonic()
        while self.running:
            now = time.monotonic()
            while due <= now:
                self.send_one()
                due += moments.expovariate(self.spec.rate)
            await asyncio.sleep(due - now)

    def send_one(self) -> None:
        """On an idle connection if there is one, on a new one if not."""
        while self.idle:
            connection = self.idle.pop()
            if not connection.transport.is_closing():
                connection.ask()
                return
            self.open.discard(connection)
        if len(self.open) + len(self.tasks) < MOST_IN_FLIGHT:
            self.start(asyncio.create_task(self.ask_on_new()))
        else:
            self.tally.errors["too many in flight"] += 1

    async def ask_on_new(self) -> None:
        """A new connection, which asks once and is idle from then on."""
        connection = await self.connect(Connection, lambda _: None)
        if connection is not None:
            connection.on_idle = self.rest
            connection.ask()

    def rest(self, connection: Connection) -> None:
        """What an idle connection of an open loop does."""
        if self.running:
            self.idle.append(connection)
        else:
            connection.transport.close()

    async def windows(self) -> None:
        """Warm up, count, and say what was counted."""
        await asyncio.sleep(self.spec.warm_up)
        say({"begin": True, "errors": self.tally.take().errors})
        taken = []
        for _ in range(self.spec.windows):
            began = time.monotonic()
            await asyncio.sleep(self.spec.seconds)
            one = self.tally.take()
            say({"units": one.units, "seconds": time.monotonic() - began, "errors": one.errors})
            taken.append(one)
        self.running = False
        say({"latencies": [quantiles(one.latencies) for one in taken]})

    async def hold(self) -> None:
        """Open all streams, wait for the first event of each, say so, and hold them."""
        turn = asyncio.Semaphore(AT_ONCE)
        began = time.monotonic()
        say({"begin": True, "errors": {}})
        held = await asyncio.gather(*(self.hold_one(turn) for _ in range(self.spec.connections)))
        taken = self.tally.take()
        say({"units": sum(held), "seconds": time.monotonic() - began, "errors": taken.errors})
        await asyncio.to_thread(sys.stdin.read)
        say({"latencies": [quantiles(taken.latencies)], "errors": self.tally.errors})

    async def hold_one(self, turn: asyncio.Semaphore) -> bool:
        """Open a stream; whether it has begun."""
        async with turn:
            stream = await self.connect(Stream, Connection.ask)
            if not isinstance(stream, Stream):
                return False
            # A stream that is broken off is on the tally already; one that never begins is not.
            await asyncio.wait([stream.first], timeout=FIRST_EVENT_TIMEOUT)
            if not stream.first.done():
                self.tally.errors["no first event"] += 1
            return stream.first.done() and not stream.first.cancelled()

    async def run(self) -> None:
        """From the first connection to the last line."""
        match self.spec.kind:
            case "held":
                await self.hold()
                return
            case "open":
                self.start(asyncio.create_task(self.at_a_rate()))
            case "streams":
                await self.all_stay(Stream)
            case _:
                await self.all_stay(Connection)
        await self.windows()
        for connection in self.open:
            if self.spec.kind == "streams" or not connection.busy:
                connection.transport.abort()
        if self.open:
            await asyncio.wait([connection.closed for connection in self.open], timeout=GOODBYE)


def quantiles(latencies: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(latencies)
    if not ordered:
        return {}
    return {name: 1000 * ordered[int(len(ordered) * part)] for name, part in (("p50", 0.5), ("p99", 0.99))}


def say(line: dict[str, object]) -> None:
    """A line for whoever started us."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    allow_files()
    run(Load(Spec(**json.loads(sys.argv[1]))).run())
