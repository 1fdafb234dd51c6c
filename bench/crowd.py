"""The clients of a soak: `python -m bench.crowd JSON`, a process of its own that says every few seconds how far it is.

Some do as they should, some leave early, some read slowly, some send what is no request. Many tenants, sessions, models and
beginnings of prompts, so that each table of the gateway meets its bound. Every request has a number as its id; whether a
whole answer with a status has come to it is written to a file, a byte for each, which can be held against the ledger.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from bench.wire import PATH, Reader, allow_files, run, status_of

PREFIXES = 3000
"""Beginnings that prompts share."""
SESSIONS = 100_000
SUBJECTS = 1_000_000
"""Of tokens, each of which is an account of its own."""
LARGE = 256 * 1024
ANSWER_TIMEOUT = 30.0
"""Seconds, far more than any answer may take: one that takes longer is a hang."""
SAY = 2.0
ADMITTED = 1
REFUSED = 2
"""What is written of a request: answered with any status but 401, or with that."""

DOINGS = {
    "plain": 560,
    "stream": 230,
    "leave": 40,
    "leave stream": 40,
    "read slowly": 20,
    "token": 30,
    "bad json": 20,
    "bad type": 15,
    "unknown model": 15,
    "large": 5,
    "half a request": 10,
    "bad key": 8,
    "models": 5,
    "metrics": 1,
    "dashboard": 1,
}
"""Of a thousand requests, how many are of a kind."""


@dataclass(frozen=True)
class Spec:
    """So many clients at once, until ``total`` requests are sent or ``seconds`` have passed."""

    port: int
    clients: int
    total: int
    seconds: float
    keys: int
    secret: str
    answered: str
    """The file."""
    seed: int = 2


def key_of(number: int) -> str:
    """The key of a tenant."""
    return f"sk-soak-{number:06d}"


def token_of(subject: int, secret: str) -> str:
    """A JWT of HS256 for a subject."""

    def part(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    claims = {"sub": f"s{subject}", "tenant": f"j{subject % 1000}", "exp": 4_000_000_000}
    text = part(b'{"alg":"HS256","typ":"JWT"}') + "." + part(json.dumps(claims).encode())
    return f"{text}.{part(hmac.digest(secret.encode(), text.encode(), 'sha256'))}"


class Client(asyncio.Protocol):
    """A connection to the gateway."""

    def __init__(self) -> None:
        self._reader = Reader(self._message)
        self.answer: asyncio.Future[int] | None = None
        self.heard: asyncio.Event = asyncio.Event()
        self.closes = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self.transport = cast("asyncio.Transport", transport)

    def ask(self, request: bytes) -> asyncio.Future[int]:
        """Send a request; the status of its answer, 0 if there will be none."""
        self.heard.clear()
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        """A part of an answer."""
        self.heard.set()
        try:
            self._reader.feed(data)
        except ValueError:
            self.transport.abort()

    def _message(self, head: bytes) -> None:
        self.closes = b"\r\nconnection: close" in head.lower()
        self._end(status_of(head))

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self.closes = True
        self.heard.set()
        self._end(0)

    def _end(self, status: int) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(status)


class Crowd:
    """All clients."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.chance = random.Random(spec.seed)
        self.sent = 0
        self.answered = bytearray(spec.total + spec.clients)
        self.seen: Counter[str] = Counter()
        self.end = time.monotonic() + spec.seconds
        words = [f"{self.chance.getrandbits(64):016x} " * self.chance.randint(8, 160) for _ in range(PREFIXES)]
        self.prefixes = [text[: len(text) - len(text) % 64] for text in words]
        self.doings, weights = list(DOINGS), list(DOINGS.values())
        self.plan = self.chance.choices(self.doings, weights, k=10_007)

    async def live(self) -> None:
        """One client after the other on one connection, for as long as that lasts."""
        client: Client | None = None
        while self.sent < self.spec.total and time.monotonic() < self.end:
            number, doing = self.sent, self.plan[self.sent % len(self.plan)]
            self.sent += 1
            if client is None:
                client = await self.connect()
                if client is None:
                    continue
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    status = await self.do(doing, number, client)
            except TimeoutError:
                self.seen["HANG"] += 1
                status = -1
            self.seen[str(status) if status > 0 else f"{doing}: {status}"] += 1
            if status > 0:
                self.answered[number] = REFUSED if status == 401 else ADMITTED
            if client.closes or status <= 0:
                client.transport.abort()
                client = None
        if client is not None:
            client.transport.abort()

    async def connect(self) -> Client | None:
        """A new connection."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", self.spec.port)
        except (OSError, TimeoutError):
            self.seen["NOT CONNECTED"] += 1
            await asyncio.sleep(0.1)
            return None
        return client

    async def do(self, doing: str, number: int, client: Client) -> int:
        """A request of this kind: the status of its answer, 0 if the connection ended instead, -1 if nobody waited for it."""
        chance = self.chance
        match doing:
            case "models" | "metrics" | "dashboard":
                path = {"models": "/v1/models", "metrics": "/metrics", "dashboard": "/dashboard"}[doing]
                return 0 if await client.ask(self.head("GET", path, number)) == 0 else -2
            case "leave" | "leave stream":
                client.ask(self.request(doing, number))
                await asyncio.sleep(chance.expovariate(200))
                return -1
            case "half a request":
                request = self.request(doing, number)
                client.transport.write(request[: chance.randrange(1, len(request))])
                await asyncio.sleep(chance.expovariate(200))
                return -1
            case "read slowly":
                answer = client.ask(self.request(doing, number))
                await client.heard.wait()
                client.transport.pause_reading()
                await asyncio.sleep(chance.expovariate(5))
                client.transport.resume_reading()
                return await answer
            case _:
                return await client.ask(self.request(doing, number))

    def request(self, doing: str, number: int) -> bytes:
        """Head and body."""
        chance = self.chance
        model = f"no-{chance.randrange(10**6)}" if doing == "unknown model" else "m"
        words = self.prefixes[min(int(chance.expovariate(1 / 700)), PREFIXES - 1)]
        body = f'{{"model":"{model}","messages":[{{"role":"user","content":"{words}{chance.getrandbits(400):x}'
        if doing == "large":
            body += "x" * LARGE
        body += f'"}}],"max_tokens":{chance.choice((16, 128, 1024))},'
        if doing == "bad type":
            body += '"temperature":"hot",'
        streams = doing in {"stream", "read slowly", "leave stream"}
        body += '"stream":true}' if streams else '"stream":false}'
        if doing == "bad json":
            body = body[: chance.randrange(len(body))]
        return self.head("POST", PATH, number, doing, len(body)) + body.encode()

    def head(self, method: str, path: str, number: int, doing: str = "", length: int = 0) -> bytes:
        """Of a request."""
        chance = self.chance
        key = key_of(chance.randrange(self.spec.keys))
        if doing == "bad key":
            key = f"sk-wrong-{number}"
        elif doing == "token":
            key = token_of(chance.randrange(SUBJECTS), self.spec.secret)
        priority = chance.choice(("interactive", "default", "default", "batch"))
        return (
            f"{method} {path} HTTP/1.1\r\nHost: soak\r\nAuthorization: Bearer {key}\r\nX-Request-ID: {number}\r\n"
            f"X-Gateway-Priority: {priority}\r\nX-Session-ID: s{chance.randrange(SESSIONS)}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    async def tell(self) -> None:
        """How far it is, every few seconds."""
        while True:
            await asyncio.sleep(SAY)
            self.say()

    def say(self) -> None:
        """A line for whoever started us."""
        print(json.dumps({"sent": self.sent, "seen": self.seen}), flush=True)

    async def run(self) -> None:
        """From the first request to the last line."""
        telling = asyncio.create_task(self.tell())
        await asyncio.gather(*(self.live() for _ in range(self.spec.clients)))
        telling.cancel()
        Path(self.spec.answered).write_bytes(self.answered)
        self.say()


def command(spec: Spec) -> list[str]:
    """What starts it."""
    return [sys.executable, "-m", "bench.crowd", json.dumps(asdict(spec))]


if __name__ == "__main__":
    allow_files()
    run(Crowd(Spec(**json.loads(sys.argv[1]))).run())
