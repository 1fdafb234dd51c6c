"""What a client of several backends asks, and sees besides the answer."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from contextlib import closing, suppress
from typing import Any, NamedTuple

from .backends import Connection, Script, completion, event
from .processes import PATIENCE, Running, wait_for

Request = tuple[bytes, dict[bytes, bytes], bytes]
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
STREAM = {**HELLO, "stream": True}
DONE = b"data: [DONE]\n\n"


class Reply(NamedTuple):
    """Headers by lower-case name."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def backend(self) -> str:
        return self.headers["x-gateway-backend"]

    @property
    def code(self) -> str:
        """Of an error."""
        code: str = json.loads(self.body)["error"]["code"]
        return code


def ask(gateway: Running, body: Any = HELLO, path: str = "/v1/chat/completions", **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=PATIENCE)) as client:
        client.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **named})
        with closing(client.getresponse()) as response:
            content = response.read()
    return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, content)


class Asking:
    """A request whose answer is waited for in the background; ``reply`` waits for it."""

    def __init__(self, gateway: Running, body: Any = HELLO, **headers: str) -> None:
        self._replies: list[Reply] = []
        self._thread = threading.Thread(target=lambda: self._replies.append(ask(gateway, body, **headers)))
        self._thread.start()

    def reply(self) -> Reply:
        self._thread.join(PATIENCE)
        return self._replies[0]


def metric(gateway: Running, pattern: str, **headers: str) -> float:
    """The sum of the samples that match."""
    client = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=PATIENCE)
    client.request("GET", "/metrics", headers={"Accept": "text/plain", **headers})
    page = client.getresponse().read().decode()
    client.close()
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if re.match(pattern, line))


def state_of(gateway: Running, name: str) -> dict[str, Any]:
    """A backend as the gateway shows it."""
    found: dict[str, Any] = next(one for one in gateway.get("/metrics")[1]["backends"] if one["name"] == name)
    return found


def until(gateway: Running, state: str, *names: str) -> None:
    """Wait until the backends are in this state."""
    wait_for(lambda: all(state_of(gateway, name)["state"] == state for name in names))


def table(name: str, url: str, **more: Any) -> str:
    """A backend in the TOML file; of kind openai, unless told otherwise."""
    return "[[backends]]\n" + "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in {"name": name, "url": url, "kind": "openai", **more}.items()
    )


def answers(connection: Connection, _: Request) -> None:
    connection.answer(completion())


def fails(connection: Connection, _: Request) -> None:
    connection.answer(b'{"error":{"message":"boom"}}', b"500 Oops")


def streams(*words: str, usage: bytes = b"") -> Script:
    """All at once, with the chunk of usage if there is one."""

    def script(connection: Connection, _: Request) -> None:
        connection.start_stream()
        for word in words:
            connection.chunk(event(word))
        connection.chunk(event("", "stop") + usage + DONE)
        connection.chunk(b"")

    return script


def rest(client: socket.socket) -> bytes:
    """All that comes until the gateway closes; a reset is an end, too."""
    found = b""
    with suppress(ConnectionError):
        while data := client.recv(65536):
            found += data
    return found
