"""Backends made of raw sockets, which do what a test wants of them, byte for byte."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any


class Connection:
    """One connection from the gateway."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.number = number
        sock.settimeout(30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what a script sends is there at once
        self.received = bytearray()
        """All that the gateway has sent, byte for byte."""
        self._buffer = b""

    def request(self) -> tuple[bytes, dict[bytes, bytes], bytes] | None:
        """The next request: its line, headers by lower-case name, body; None when the gateway has closed."""
        while b"\r\n\r\n" not in self._buffer:
            if not self._more():
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line, *rest = head.split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (one.partition(b":") for one in rest)}
        length = int(headers.get(b"content-length", b"0"))
        while len(self._buffer) < length:
            if not self._more():
                return None
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return line, headers, body

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except OSError:
            return False
        self._buffer += data
        self.received += data
        return bool(data)

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self.sock.sendall(part)

    def answer(self, body: bytes, status: bytes = b"200 OK", content_type: bytes = b"application/json") -> None:
        self.send(b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (status, content_type, len(body)) + body)

    def start_stream(self) -> None:
        self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def gone(self) -> bool:
        """Wait until the gateway has closed this connection."""
        while self._more():
            pass
        return True

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.sock.close()


Script = Callable[[Connection, tuple[bytes, dict[bytes, bytes], bytes]], None]


class ScriptedBackend:
    """Answers GET by itself; every POST goes to the test's script, in a thread of its connection."""

    def __init__(
        self,
        script: Script,
        tls: ssl.SSLContext | None = None,
        models: Sequence[str] = ("m",),
        window: int = 0,
        address: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        length = {"max_model_len": window} if window else {}
        self._models = json.dumps(
            {"object": "list", "data": [{"id": id, "object": "model", "owned_by": "test", **length} for id in models]}
        ).encode()
        self._script = script
        self._tls = tls
        self._listener = socket.create_server(address, backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://{address[0]}:{self.port}"
        self.posts: list[tuple[int, dict[bytes, bytes], bytes]] = []
        self.problems: list[BaseException] = []
        self.connections: list[Connection] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection = Connection(self._listener.accept()[0], len(self.connections))
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        try:
            if self._tls is not None:
                connection.sock = self._tls.wrap_socket(connection.sock, server_side=True)
            while (request := connection.request()) is not None:
                if request[0].startswith(b"GET"):
                    connection.answer(self.page(request[0].split()[1]))
                else:
                    self.posts.append((connection.number, request[1], request[2]))
                    self._script(connection, request)
        except OSError:
            pass  # the gateway has gone, or the script closed the connection
        except BaseException as problem:
            self.problems.append(problem)

    def page(self, path: bytes) -> bytes:
        """What a GET gets."""
        return self._models

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self.connections:
            connection.close()
        assert not self.problems, self.problems


@contextmanager
def backend(
    script: Script, tls: ssl.SSLContext | None = None, models: Sequence[str] = ("m",), window: int = 0
) -> Iterator[ScriptedBackend]:
    """A backend with these models for the length of a block; ``window``: of so many tokens."""
    running = ScriptedBackend(script, tls, models, window)
    try:
        yield running
    finally:
        running.stop()


def completion(content: str = "hi") -> bytes:
    """A plausible answer."""
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    answer: dict[str, Any] = {"id": "chatcmpl-backend", "object": "chat.completion", "created": 1, "model": "m"}
    return json.dumps({**answer, "choices": [choice], "usage": usage}).encode()


def event(content: str, finish_reason: str | None = None) -> bytes:
    """One event of a stream."""
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}
    return b"data: %b\n\n" % json.dumps({"id": "c", "object": "chat.completion.chunk", "choices": [choice]}).encode()
