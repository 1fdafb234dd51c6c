#!/usr/bin/env python3
"""What the gateway costs: CPU microseconds per request and per streamed event, memory, added latency.

  make bench                              both, against the project's own stand-in for a backend
  make bench ARGS="--seconds 10 --streams 400 --connections 64"

Load, backend and gateway are processes of their own; on a machine with two cores or more the gateway
has the last one for itself. CPU is read from /proc (user + system) and is the figure to compare: it
holds on a busy machine far better than a rate. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PATH = "/v1/chat/completions"
EVENTS = 100
INTERVAL = 0.02
"""Each stream of the stand-in has this many events, one each so many seconds."""

ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 50}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 21, "completion_tokens": 52, "total_tokens": 73},
}
EVENT = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "delta": {"content": " token"}, "finish_reason": None}],
}


# --- the backend


class Backend(asyncio.Protocol):
    """Answers every GET with a model list, every POST with a fixed answer or a paced stream."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A connection from the gateway."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
        if len(rest) < length:
            return
        body, self.buffer = rest[:length], rest[length:]
        if head.startswith(b"GET"):
            self.answer(b'{"object":"list","data":[{"id":"m","object":"model","owned_by":"bench"}]}')
        elif b'"stream":true' in body.replace(b" ", b""):
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            self.event(0)
        else:
            self.answer(json.dumps(ANSWER).encode())

    def answer(self, body: bytes) -> None:
        """A whole answer."""
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )

    def event(self, number: int) -> None:
        """One event, and the next in a while."""
        if self.transport.is_closing():
            return
        data = b"data: " + (json.dumps(EVENT).encode() if number < EVENTS else b"[DONE]") + b"\n\n"
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        if number < EVENTS:
            asyncio.get_running_loop().call_later(INTERVAL, self.event, number + 1)
        else:
            self.transport.write(b"0\r\n\r\n")


def serve(port: int) -> None:
    """The backend's process."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    asyncio.run(run())


# --- the load


class Client(asyncio.Protocol):
    """One connection that asks again and again until the end."""

    def __init__(self, request: bytes, end: float, stream: bool) -> None:
        self.request = request
        self.end = end
        self.stream = stream
        self.units = 0
        self.latencies: list[float] = []
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected to the gateway."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        """Send a request, or go."""
        if time.monotonic() > self.end:
            self.transport.close()
            return
        self.asked = time.monotonic()
        self.tail = b""
        self.expected = -1
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Count what came."""
        if self.stream:
            self.units += data.count(b'"delta"')
            self.tail = (self.tail + data)[-40:]
            if self.tail.endswith(b"0\r\n\r\n") and b"[DONE]" in self.tail:
                self.ask()
            return
        self.tail += data
        if self.expected < 0:
            head, found, _ = self.tail.partition(b"\r\n\r\n")
            if not found:
                return
            assert b" 200 " in head, head
            self.expected = len(head) + 4 + int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        if len(self.tail) >= self.expected:
            self.units += 1
            self.latencies.append(time.monotonic() - self.asked)
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """Done."""
        self.closed.set_result(None)


async def load(port: int, connections: int, seconds: float, stream: bool) -> tuple[int, list[float]]:
    """(units, latencies): requests answered, or events received, by so many connections in so many seconds."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "word " * 30}], "stream": stream}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    end = time.monotonic() + seconds
    clients: list[Client] = []
    for _ in range(connections):
        _, client = await asyncio.get_running_loop().create_connection(
            lambda: Client(head.encode() + body, end, stream), "127.0.0.1", port
        )
        clients.append(client)
    await asyncio.wait([client.closed for client in clients], timeout=seconds + EVENTS * INTERVAL * 5)
    return sum(client.units for client in clients), [one for client in clients for one in client.latencies]


# --- the gateway


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def start(port: int, backend: int, directory: str, core: int) -> subprocess.Popen[bytes]:
    """A gateway before the stand-in, on a core of its own, with everything on that is on by default."""
    environment = {**os.environ, "BACKEND_URL": f"http://127.0.0.1:{backend}", "PORT": str(port)}
    command = [str(Path(sys.executable).with_name("twistd")), "-n", "--pidfile=", "--logfile=gateway.log", "inference-gateway"]
    process = subprocess.Popen(command, cwd=directory, env=environment)
    os.sched_setaffinity(process.pid, {core})
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            if asyncio.run(load(port, 1, 0.01, stream=False))[0]:
                return process
        except OSError:
            time.sleep(0.1)
    process.kill()
    sys.exit("the gateway does not answer; see its log")


def measure(name: str, pid: int, run: Callable[[], tuple[int, list[float]]]) -> None:
    """Run once to warm up, then three times, each a line."""
    run()
    for _ in range(3):
        before = cpu_seconds(pid)
        units, latencies = run()
        used = cpu_seconds(pid) - before
        line = f"{name}: {1e6 * used / max(units, 1):7.1f} us CPU each | {units:7d} | {resident_mib(pid):5.0f} MiB"
        if latencies:
            ordered = statistics.quantiles(latencies, n=100)
            line += f" | p50 {1000 * ordered[49]:.1f} ms, p99 {1000 * ordered[98]:.1f} ms"
        print(line, flush=True)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--streams", type=int, default=100)
    options = parser.parse_args()
    *others, core = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, others or [core])
    ports = (18_123, 18_124)
    backend = multiprocessing.get_context("spawn").Process(target=serve, args=[ports[1]], daemon=True)
    backend.start()
    with tempfile.TemporaryDirectory() as directory:
        gateway = start(*ports, directory, core)
        try:
            for name, count, stream in (("request", options.connections, False), ("event", options.streams, True)):
                measure(name, gateway.pid, lambda n=count, s=stream: asyncio.run(load(ports[0], n, options.seconds, s)))  # type: ignore[misc]
        finally:
            gateway.terminate()
            gateway.wait(60)
            backend.kill()


if __name__ == "__main__":
    main()
