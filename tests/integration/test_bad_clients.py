"""Clients with faults and bad intentions: what each gets, that a good one is served meanwhile, and that nothing stays behind.

``CLIENTS`` is also the table in docs/faults.md.
"""

from __future__ import annotations

import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from typing import NamedTuple

import pytest

from .asking import HELLO, STREAM, Request, ask, metric, rest, until
from .backends import Connection, ScriptedBackend, event
from .counting import everything_is_given_back, grown, open_descriptors, resident, rows_of
from .faulty import answers_well
from .processes import PATIENCE, Running, wait_for
from .test_faults import raw_post

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\n"
POST = raw_post(HELLO)
GET = b"GET /healthz HTTP/1.1\r\nHost: g\r\n\r\n"
LONG = {**STREAM, "model": "long"}
MANY = 10_000


def script(connection: Connection, request: Request) -> None:
    """A stream without end for who asks for the long one."""
    if json.loads(request[2])["model"] != "long":
        answers_well(connection, request)
        return
    connection.start_stream()
    while True:
        connection.chunk(event("x" * 65536))


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    client.close()


def status(answer: bytes) -> str:
    """Of a raw answer; of none at all, that it was cut off."""
    return answer.split(b" ", 2)[1].decode() if answer else "cut off"


def trickle(gateway: Running, begin: bytes) -> str:
    """Goes on with a byte now and then for as long as it is let."""
    with gateway.connect() as client:
        client.sendall(begin)
        client.settimeout(0.1)
        answer = b""
        end = time.monotonic() + PATIENCE
        while not answer and time.monotonic() < end:
            with suppress(TimeoutError):
                answer = client.recv(65536)
            with suppress(OSError):
                client.send(b"x")
    return status(answer)


def once(gateway: Running, *parts: bytes) -> str:
    """The status of the answer to this, the last if there are several."""
    with gateway.connect() as client:
        with suppress(ConnectionError):
            for part in parts:
                client.sendall(part)
        answer = rest(client)
    return status(answer[answer.rfind(b"HTTP/1.1 ") :] if b"HTTP/1.1 " in answer else answer)


def slow_head(gateway: Running) -> str:
    return trickle(gateway, b"GET /healthz HTTP/1.1\r\nX: ")


def slow_body(gateway: Running) -> str:
    return trickle(gateway, HEAD + b"Content-Length: 100000\r\n\r\n{")


def never_reads(gateway: Running) -> str:
    with gateway.connect(4096) as client:
        client.sendall(raw_post(LONG))
        wait_for(lambda: metric(gateway, r"gateway_inflight\{") > 0)
        wait_for(lambda: metric(gateway, r'gateway_requests_total\{.*code="client_cancelled"') > 0)
    return "cut off"


def resets_in_the_request(gateway: Running) -> str:
    for at in range(0, len(POST), 7):
        client = gateway.connect()
        client.sendall(POST[:at])
        reset(client)
    return "nothing"


def resets_in_the_answer(gateway: Running) -> str:
    for at in range(1, 1500, 50):
        client = gateway.connect()
        client.sendall(raw_post(LONG))
        left = at
        while left > 0:
            left -= len(client.recv(left))
        reset(client)
    return "nothing"


def half_closes(gateway: Running) -> str:
    with gateway.connect() as client:
        client.sendall(POST)
        client.shutdown(socket.SHUT_WR)
        return status(rest(client))


def floods_with_requests(gateway: Running) -> str:
    """Requests without end on one connection, while the first is being answered."""
    with gateway.connect() as client:
        client.sendall(raw_post(LONG))
        with suppress(ConnectionError):
            for _ in range(10_000):
                client.sendall(POST)
        assert b"HTTP/1.1 200" not in rest(client)[1:]
    return "cut off"


def sends_many_headers(gateway: Running) -> str:
    return once(gateway, b"GET /healthz HTTP/1.1\r\nHost: g\r\n", b"X: y\r\n" * 5000, b"\r\n")


def sends_an_endless_header(gateway: Running) -> str:
    return once(gateway, b"GET /healthz HTTP/1.1\r\nHost: g\r\nX: ", *[b"x" * 65536] * 100)


def opens_and_closes(gateway: Running) -> str:
    for number in range(500):
        client = gateway.connect()
        (reset if number % 2 else socket.socket.close)(client)
    return "nothing"


def expects_and_never_sends(gateway: Running) -> str:
    with gateway.connect() as client:
        client.sendall(HEAD + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n")
        answer = rest(client)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    return status(answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"))


def sends_byte_by_byte(gateway: Running) -> str:
    request = POST.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    return once(gateway, *[bytes([byte]) for byte in request])


def has_an_absurd_method(gateway: Running) -> str:
    return once(gateway, b"BREW" + GET.removeprefix(b"GET"))


def has_a_long_method(gateway: Running) -> str:
    return once(gateway, b"G" * 1_000)


def speaks_tls(gateway: Running) -> str:
    return once(gateway, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500))


def sends_tiny_chunks(gateway: Running) -> str:
    return once(
        gateway,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        b"2\r\n  \r\n" * 400_000,
        b"0\r\n\r\n" + GET[:-2] + b"Connection: close\r\n\r\n",
    )


def sends_endless_chunk_extensions(gateway: Running) -> str:
    return once(gateway, HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;x=", *[b"x" * 65536] * 100)


class Client(NamedTuple):
    """What it does, and what it gets."""

    does: str
    gets: str
    acts: Callable[[Running], str]


CLIENTS = [
    Client("sends a head a byte now and then (slowloris)", "408", slow_head),
    Client("sends a body a byte now and then", "408", slow_body),
    Client("never reads a long answer", "cut off", never_reads),
    Client("resets the connection within a request, at each 7th byte", "nothing", resets_in_the_request),
    Client("resets it within the answer, at each 50th byte", "nothing", resets_in_the_answer),
    Client("half-closes after a request", "cut off", half_closes),
    Client("sends requests without end while the first is answered", "cut off", floods_with_requests),
    Client("sends 5,000 headers", "431", sends_many_headers),
    Client("sends a header without end", "431", sends_an_endless_header),
    Client("opens 500 connections and closes or resets each at once", "nothing", opens_and_closes),
    Client("expects 100-continue and never sends the body", "408", expects_and_never_sends),
    Client("sends a request a byte at a time", "200", sends_byte_by_byte),
    Client("has a method that nobody knows", "400", has_an_absurd_method),
    Client("has a method of 1,000 letters", "400", has_a_long_method),
    Client("speaks TLS to a port without", "400", speaks_tls),
    Client("sends a body of 400,000 chunks of two bytes", "200", sends_tiny_chunks),
    Client("sends a chunk extension without end", "431", sends_endless_chunk_extensions),
]

SETTINGS = {
    "GATEWAY_CLIENT_TIMEOUT": "2s",
    "GATEWAY_IDLE_TIMEOUT": "2s",
    "GATEWAY_MAX_BODY": "1MiB",
    "GATEWAY_BACKEND_KIND": "openai",
    "GATEWAY_PROBE_INTERVAL": "1h",
}


class Setup(NamedTuple):
    gateway: Running
    descriptors: int


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    with ExitStack() as stack:
        backend = ScriptedBackend(script, models=["m", "long"])
        stack.callback(backend.stop)
        gateway = stack.enter_context(Running(tmp_path_factory.mktemp("clients"), BACKEND_URL=backend.url, **SETTINGS))
        until(gateway, "healthy", backend.url.removeprefix("http://"))
        wait_for(lambda: metric(gateway, "gateway_connections ") == 1)
        yield Setup(gateway, open_descriptors(gateway))


def served(gateway: Running, stop: threading.Event) -> list[int]:
    """The statuses that a good client gets meanwhile."""
    statuses = []
    while not stop.is_set():
        statuses += [ask(gateway).status, ask(gateway, STREAM).status]
    return statuses


def act(gateway: Running, clients: list[Client]) -> dict[str, str]:
    """What they get, all at the same time, beside a good one who is served throughout."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(clients) + 1) as threads:
        good = threads.submit(served, gateway, stop)
        try:
            found = list(threads.map(lambda client: client.acts(gateway), clients))
        finally:
            stop.set()
        statuses = good.result()
    assert len(statuses) > 2 and set(statuses) == {200}
    return {client.does: got for client, got in zip(clients, found, strict=True)}


def test_each_bad_client_gets_what_it_should_and_a_good_one_is_served_meanwhile(setup: Setup) -> None:
    assert act(setup.gateway, CLIENTS) == {client.does: client.gets for client in CLIENTS}
    everything_is_given_back(setup.gateway, setup.descriptors)


def test_bad_clients_leave_no_memory_behind(setup: Setup) -> None:
    quick = [client for client in CLIENTS if client.gets != "408" and client.acts is not never_reads]
    samples = []
    for _ in range(6):
        act(setup.gateway, quick)
        samples.append(resident(setup.gateway))
    assert grown(samples) < 16 << 20, samples
    everything_is_given_back(setup.gateway, setup.descriptors)


def test_as_many_connections_as_there_may_be_and_a_good_client_is_served(tmp_path_factory: pytest.TempPathFactory) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(MANY, hard - 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most + 400), hard))
    try:
        with Running(tmp_path_factory.mktemp("many")) as gateway, ExitStack() as stack:
            before = open_descriptors(gateway)
            clients = [stack.enter_context(closing(gateway.connect())) for _ in range(most)]
            wait_for(lambda: metric(gateway, "gateway_connections ") == most + 1)
            print(f"{most} connections at once, {resident(gateway) >> 20} MiB")
            assert ask(gateway).status == 200
            for client in clients[::100]:
                client.sendall(GET)
                assert client.recv(65536).startswith(b"HTTP/1.1 200")
            for client in clients:
                reset(client)
            everything_is_given_back(gateway, before)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_documentation_has_this_table() -> None:
    documented = rows_of("## Clients")
    assert documented == [("client", "gets"), *[(client.does, client.gets) for client in CLIENTS]]
