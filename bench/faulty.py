"""Model servers that fail at random: `python -m bench.faulty JSON`, a process of its own that stands for several servers.

Every fault is one that real servers have: a process that is gone, an overload, a connection that breaks before or after the
first byte, a step that never ends, a slow one, an answer that is no HTTP. The seed makes the same faults in the same order.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from bench.backend import COMPLETION, EVENT, LAST, PAGES, STREAM, chunk, whole
from bench.wire import Reader, allow_files, run

STREAMED = b'"stream":true'
"""What a body has that asks for a stream; it must stand near its end."""
BURSTS = 3
BURST = chunk(EVENT % 0 * 4)
PAUSE = 0.003
"""Seconds between two bursts of a stream."""
ERROR = b'{"error":{"message":"out of memory","type":"server_error"}}'


def refusal(status: bytes, more: bytes = b"") -> bytes:
    """An answer that is none."""
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n" % (status, more, len(ERROR))
    return head + ERROR


FAULTS = {
    "500": 5,
    "429": 1,
    "reset": 4,
    "half": 4,
    "stall": 2,
    "silence": 2,
    "slow": 10,
    "garbage": 2,
}
"""Of so many faults, how many are of a kind. ``reset``: instead of an answer. ``half``: after its first bytes. ``stall``: no
answer ever. ``silence``: none after the first bytes."""
KINDS, WEIGHTS = list(FAULTS), list(FAULTS.values())


@dataclass(frozen=True)
class Spec:
    """Servers on these ports; of the requests to each a ``share`` fails. ``away``: about so many seconds pass between two
    times that a server, the first excepted, is gone for ``gone`` seconds; 0: it never is. ``slow``: seconds, at most."""

    ports: Sequence[int]
    shares: Sequence[float]
    seed: int = 1
    away: float = 20.0
    gone: float = 1.5
    slow: float = 0.3


class Server:
    """One of them."""

    def __init__(self, port: int, share: float, chance: random.Random, slow: float) -> None:
        self.port = port
        self.share = share
        self.chance = chance
        self.slow = slow
        self.open: set[Connection] = set()

    async def listen(self) -> asyncio.Server:
        """From now on."""
        return await asyncio.get_running_loop().create_server(
            lambda: Connection(self), "127.0.0.1", self.port, backlog=1024, reuse_address=True
        )

    async def live(self, away: float, gone: float) -> None:
        """Listen, and now and then be gone, with all connections."""
        while True:
            listening = await self.listen()
            await asyncio.sleep(self.chance.expovariate(1 / away) if away else 10**6)
            listening.close()
            for connection in list(self.open):
                connection.reset()
            await asyncio.sleep(self.chance.uniform(0.1, gone))

    def fault(self) -> str:
        """What the next answer will be; empty: as it should."""
        if self.chance.random() >= self.share:
            return ""
        return self.chance.choices(KINDS, WEIGHTS)[0]


class Connection(asyncio.Protocol):
    """A connection from the gateway, which sends one request after the other on it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._reader = Reader(self._message)
        self._tail = b""
        self._later: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast("asyncio.Transport", transport)
        self._server.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The gateway has gone, or we have."""
        self._server.open.discard(self)
        if self._later is not None:
            self._later.cancel()

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        self._tail = (self._tail + data)[-512:]
        try:
            self._reader.feed(data)
        except ValueError:
            self.reset()

    def reset(self) -> None:
        """Break it off."""
        self._transport.abort()

    def _message(self, head: bytes) -> None:
        method, path, _ = head.split(b" ", 2)
        if method != b"POST":
            self._transport.write(whole(PAGES.get(path.decode(), b"{}")))
            return
        streams, self._tail = STREAMED in self._tail, b""
        fault = self._server.fault()
        if fault == "slow":
            wait = self._server.chance.uniform(0.0, self._server.slow)
            self._later = asyncio.get_running_loop().call_later(wait, self._answer, "", streams)
        else:
            self._answer(fault, streams)

    def _answer(self, fault: str, streams: bool) -> None:
        match fault:
            case "500":
                self._transport.write(refusal(b"500 Internal Server Error"))
            case "429":
                self._transport.write(refusal(b"429 Too Many Requests", b"Retry-After: 1\r\n"))
            case "reset":
                self.reset()
            case "garbage":
                self._transport.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 what\r\n\r\n")
            case "half" | "silence":
                self._transport.write(STREAM + BURST if streams else COMPLETION[: len(COMPLETION) // 2])
                if fault == "half":
                    self._later = asyncio.get_running_loop().call_later(PAUSE, self.reset)
            case "stall":
                pass
            case _ if streams:
                self._transport.write(STREAM)
                self._burst(BURSTS)
            case _:
                self._transport.write(COMPLETION)

    def _burst(self, left: int) -> None:
        """The rest of a stream."""
        if left:
            self._transport.write(BURST)
            self._later = asyncio.get_running_loop().call_later(PAUSE, self._burst, left - 1)
        else:
            self._transport.write(LAST)


async def serve(spec: Spec) -> None:
    """Until killed."""
    chance = random.Random(spec.seed)
    servers = [Server(port, share, chance, spec.slow) for port, share in zip(spec.ports, spec.shares, strict=True)]
    await asyncio.gather(*(one.live(spec.away if one is not servers[0] else 0.0, spec.gone) for one in servers))


if __name__ == "__main__":
    allow_files()
    run(serve(Spec(**json.loads(sys.argv[1]))))
