"""The model server that is none: `python -m bench.backend PORT KIND INTERVAL`, a process of its own.

What a POST gets depends on the kind alone, so that a prompt of a MiB need not be searched for a word:
`fixed` is a chat completion, `slow` the same after INTERVAL, `paced` a stream of EVENTS events, `idle` a stream of one event
and then silence.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import cast

from bench.wire import Reader, allow_files, run

EVENTS = 100
"""Events of a paced stream."""
SLOTS = 10
"""Streams are spread over so many parts of an interval, as they would be if they had begun at random."""

MODEL_INFO = b'{"model_path":"m","is_generation":true}'
SERVER_INFO = b'{"model_path":"m","dp_size":1}'
MODELS = b'{"object":"list","data":[{"id":"m","object":"model","created":1700000000,"owned_by":"bench"}]}'
PAGES = {
    "/health": b"ok",
    "/v1/models": MODELS,
    "/get_model_info": MODEL_INFO,
    "/model_info": MODEL_INFO,
    "/get_server_info": SERVER_INFO,
    "/server_info": SERVER_INFO,
}
"""What routers ask a server before they send it anything."""

WORDS = (
    b"Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore et dolore magna"
    b" aliqua. Ut enim ad minim veniam, quis nostrud exercitation ullamco laboris nisi ut aliquip ex ea commodo consequat."
    b" Duis aute irure dolor in reprehenderit in voluptate velit esse cillum dolore eu fugiat nulla pariatur."
)
ANSWER = (
    b'{"id":"chatcmpl-abc123","object":"chat.completion","created":1700000000,"model":"m","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"%b"},"logprobs":null,"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":21,"completion_tokens":52,"total_tokens":73}}'
) % WORDS
CHUNK = b'data: {"id":"chatcmpl-abc123","object":"chat.completion.chunk","created":1700000000,"model":"m",'
EVENT = CHUNK + b'"ts":%d,"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
END = (
    CHUNK + b'"choices":[],"usage":{"prompt_tokens":21,"completion_tokens":100,"total_tokens":121}}\n\n',
    b"data: [DONE]\n\n",
)
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"


def whole(body: bytes) -> bytes:
    """An answer that is not a stream."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def chunk(data: bytes) -> bytes:
    """A part of a stream."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def stamped() -> bytes:
    """An event that carries the time at which it was sent: the load's clock is the same one."""
    return chunk(EVENT % time.monotonic_ns())


COMPLETION = whole(ANSWER)
LAST = b"".join(map(chunk, END)) + b"0\r\n\r\n"


class Pacer:
    """Sends each stream an event an interval, a slot's streams together."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._tick = interval / SLOTS
        self._slots: list[set[Connection]] = [set() for _ in range(SLOTS)]
        self._started = 0

    def add(self, stream: Connection) -> None:
        """A stream begins; its slot is the next one's turn."""
        stream.slot = self._slots[self._started % SLOTS]
        stream.slot.add(stream)
        self._started += 1

    async def run(self) -> None:
        """Go round the slots for ever."""
        due = time.monotonic()
        turn = 0
        while True:
            # A backend that is late does not catch up: a burst of old events would be a load nobody asked for.
            due = max(due + self._tick, time.monotonic() - self._tick)
            for stream in list(self._slots[turn]):
                stream.event()
            turn = (turn + 1) % SLOTS
            await asyncio.sleep(max(0.0, due - time.monotonic()))


class Connection(asyncio.Protocol):
    """A connection from a proxy."""

    def __init__(self, kind: str, pacer: Pacer) -> None:
        self._kind = kind
        self._pacer = pacer
        self._reader = Reader(self._message)
        self._sent = 0
        self._paused = False
        self.slot: set[Connection] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop has classes of its own

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        try:
            self._reader.feed(data)
        except ValueError:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The proxy has gone."""
        self.slot.discard(self)

    def pause_writing(self) -> None:
        """The proxy does not keep up."""
        self._paused = True

    def resume_writing(self) -> None:
        """It does again."""
        self._paused = False

    def _message(self, head: bytes) -> None:
        method, path, _ = head.split(b" ", 2)
        if method != b"POST":
            self._transport.write(whole(PAGES.get(path.decode(), b"{}")))
        elif self._kind == "fixed":
            self._transport.write(COMPLETION)
        elif self._kind == "slow":
            asyncio.get_running_loop().call_later(self._pacer.interval, self._transport.write, COMPLETION)
        elif self._kind == "idle":
            self._transport.write(STREAM + stamped())
        else:
            self._transport.write(STREAM)
            self._sent = 0
            self._pacer.add(self)

    def event(self) -> None:
        """The next event of a paced stream, or its end. To a proxy that does not keep up nothing is sent."""
        if self._paused:
            return
        if self._sent < EVENTS:
            self._sent += 1
            self._transport.write(stamped())
        else:
            self.slot.discard(self)
            self._transport.write(LAST)


async def serve(port: int, kind: str, interval: float) -> None:
    """Until killed."""
    pacer = Pacer(interval)
    await asyncio.get_running_loop().create_server(lambda: Connection(kind, pacer), "127.0.0.1", port, backlog=4096)
    await pacer.run()


if __name__ == "__main__":
    allow_files()
    run(serve(int(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
