"""What clients may do on the wire, and what they may not."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from .processes import PATIENCE, Running, wait_for

PATH = b"/v1/chat/completions"
HELLO = b'{"messages":[{"role":"user","content":"hello"}]}'


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("channel")
    with Running(directory, "--max-body", "64KiB", "--client-timeout", "700ms", "--log-format", "json") as running:
        yield running


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        found: str = json.loads(self.body)["error"]["code"]
        return found


class Client:
    """A connection that reads one answer after the other."""

    def __init__(self, gateway: Running) -> None:
        self.sock = gateway.connect()
        self._file = self.sock.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.sock.close()

    def send(self, *data: bytes) -> None:
        for part in data:
            self.sock.sendall(part)

    def read(self, *, head: bool = False) -> Reply:
        status = int(self._file.readline().split()[1])
        headers: dict[str, str] = {}
        while line := self._file.readline().strip().decode():
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        body = bytearray()
        if headers.get("transfer-encoding") == "chunked":
            while size := int(self._file.readline(), 16):
                body += self._file.read(size)
                self._file.readline()
            self._file.readline()
        elif not head:
            body += self._file.read(int(headers.get("content-length", "0")))
        return Reply(status, headers, bytes(body))

    def closed(self) -> bool:
        try:
            return self._file.read(1) == b""
        except ConnectionError:
            return True


def post(body: bytes = HELLO, *lines: bytes) -> bytes:
    return b"\r\n".join([b"POST %b HTTP/1.1" % PATH, b"Host: g", b"Content-Length: %d" % len(body), *lines, b"", body])


def test_one_connection_serves_many_requests(gateway: Running) -> None:
    with Client(gateway) as client:
        for _ in range(3):
            client.send(post())
            assert client.read().status == 200
        client.send(b"GET /nope HTTP/1.1\r\nHost: g\r\n\r\n")
        assert client.read().status == 404
        client.send(post())
        assert client.read().status == 200


def test_pipelined_requests_are_answered_in_order(gateway: Running) -> None:
    with Client(gateway) as client:
        ids = [b"p%d" % number for number in range(5)]
        client.send(b"".join(post(HELLO, b"X-Request-ID: " + one) for one in ids))
        assert [client.read().headers["x-request-id"].encode() for _ in ids] == ids


def test_a_request_may_come_byte_by_byte(gateway: Running) -> None:
    with Client(gateway) as client:
        for byte in post():
            client.send(bytes([byte]))
        assert json.loads(client.read().body)["choices"][0]["message"]["content"] == "Echo: hello"


def test_a_chunked_body_is_read(gateway: Running) -> None:
    with Client(gateway) as client:
        client.send(b"POST %b HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n" % PATH)
        client.send(b"5\r\n" + HELLO[:5] + b"\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(HELLO) - 5, HELLO[5:]))
        assert client.read().status == 200


def test_head_has_the_length_and_no_body(gateway: Running) -> None:
    with Client(gateway) as client:
        client.send(b"HEAD /healthz HTTP/1.1\r\nHost: g\r\n\r\n" * 2)
        assert client.read(head=True).headers["content-length"] == "16"
        assert client.read(head=True).status == 200


def test_http_1_0_is_answered_and_closed(gateway: Running) -> None:
    with Client(gateway) as client:
        client.send(b"POST %b HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (PATH, len(HELLO), HELLO))
        reply = client.read()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert client.closed()


def test_a_stream_to_http_1_0_ends_with_the_connection(gateway: Running) -> None:
    body = HELLO[:-1] + b',"stream":true}'
    with gateway.connect() as sock:
        sock.sendall(b"POST %b HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (PATH, len(body), body))
        data = b""
        while more := sock.recv(65536):
            data += more
    assert b"chunked" not in data
    assert data.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("value", [b"close", b"Close", b"keep-alive, close", b"close, TE"])
def test_connection_close_is_obeyed(gateway: Running, value: bytes) -> None:
    with Client(gateway) as client:
        client.send(post(HELLO, b"Connection: " + value))
        assert client.read().headers["connection"] == "close"
        assert client.closed()


def test_100_continue_is_sent_for_a_body_that_may_come(gateway: Running) -> None:
    with Client(gateway) as client:
        head, body = post(HELLO, b"Expect: 100-continue").split(b"\r\n\r\n")
        client.send(head + b"\r\n\r\n")
        assert client.read().status == 100
        client.send(body)
        assert client.read().status == 200


def test_absolute_form_reaches_the_same_route(gateway: Running) -> None:
    with Client(gateway) as client:
        client.send(b"GET http://elsewhere/healthz HTTP/1.1\r\nHost: elsewhere\r\n\r\n")
        assert client.read().status == 200
        client.send(b"OPTIONS * HTTP/1.1\r\nHost: g\r\n\r\n")
        assert client.read().code == "unknown_url"


def test_the_server_does_not_tell_what_it_is_made_of(gateway: Running) -> None:
    with Client(gateway) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: g\r\n\r\n")
        assert "server" not in client.read().headers


# --- limits


def test_a_body_over_the_cap_is_refused_before_it_is_sent(gateway: Running) -> None:
    for lines in ([], [b"Expect: 100-continue"]):
        with Client(gateway) as client:
            head = b"\r\n".join(
                [b"POST %b HTTP/1.1" % PATH, b"Host: g", b"Content-Length: 65537", *lines, b"X-Request-ID: big"]
            )
            client.send(head + b"\r\n\r\n")
            reply = client.read()
            assert (reply.status, reply.code) == (413, "request_too_large")
            assert reply.headers["x-request-id"] == "big"
            assert reply.headers["connection"] == "close"
            assert client.closed()


def test_a_chunked_body_is_refused_at_the_byte_that_goes_over(gateway: Running) -> None:
    with Client(gateway) as client:
        client.send(b"POST %b HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n" % PATH)
        client.send(b"10000\r\n" + b" " * 65536 + b"\r\n")
        client.send(b"1\r\n \r\n")
        reply = client.read()
        assert (reply.status, reply.code) == (413, "request_too_large")
        assert client.closed()


def test_a_client_that_sends_everything_first_still_reads_the_413(gateway: Running) -> None:
    with Client(gateway) as client:
        client.send(post(b" " * 2_000_000))
        assert client.read().status == 413


def test_a_body_of_exactly_the_cap_is_taken(gateway: Running) -> None:
    with Client(gateway) as client:
        client.send(post(HELLO + b" " * (65536 - len(HELLO))))
        assert client.read().status == 200


@pytest.mark.parametrize(
    "lines",
    [
        b"X-Long: " + b"y" * 40_000,
        b"\r\n".join(b"X-%d: y" % number for number in range(150)),
        b"\r\n".join(b"X-%d: %b" % (number, b"y" * 4000) for number in range(20)),
    ],
)
def test_headers_over_the_cap_are_a_431(gateway: Running, lines: bytes) -> None:
    with Client(gateway) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: g\r\n" + lines + b"\r\n\r\n")
        reply = client.read()
        assert (reply.status, reply.code) == (431, "headers_too_large")
        assert client.closed()


BAD = {
    "not http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\r\n\r\n",
    "no version": b"GET /healthz\r\n\r\n",
    "http 2": b"GET /healthz HTTP/2.0\r\nHost: g\r\n\r\n",
    "preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "space before colon": b"GET /healthz HTTP/1.1\r\nHost : g\r\n\r\n",
    "no colon": b"GET /healthz HTTP/1.1\r\nHost: g\r\noops\r\n\r\n",
    "nul in a value": b"GET /healthz HTTP/1.1\r\nHost: g\r\nX: a\x00b\r\n\r\n",
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "odd host": b"GET /healthz HTTP/1.1\r\nHost: a b/%\r\n\r\n",
    "two lengths": b"POST /healthz HTTP/1.1\r\nHost: g\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "length and chunked": b"POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "negative length": b"POST /healthz HTTP/1.1\r\nHost: g\r\nContent-Length: -1\r\n\r\n",
    "endless length": b"POST /healthz HTTP/1.1\r\nHost: g\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "odd encoding": b"POST /healthz HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity encoding": b"POST /healthz HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: identity\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
    "chunked in 1.0": b"POST /healthz HTTP/1.0\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad chunk": b"POST /healthz HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "raw utf-8 path": "GET /caf\u00e9 HTTP/1.1\r\nHost: g\r\n\r\n".encode(),
    "path that is no utf-8": b"GET /%ff%fe HTTP/1.1\r\nHost: g\r\n\r\n",
    "obs-fold": b"GET /healthz HTTP/1.1\r\nHost: g\r\nX: a\r\n b\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_http_is_refused_in_openais_form_and_closed(gateway: Running, name: str) -> None:
    with Client(gateway) as client:
        client.send(BAD[name])
        reply = client.read()
        assert reply.status in (400, 413), reply
        assert reply.code in ("bad_http", "request_too_large")
        assert reply.headers["x-request-id"]
        assert client.closed()


def test_after_a_refusal_nothing_more_is_taken_for_a_request(gateway: Running) -> None:
    before = gateway.get("/metrics")[1]["request_count"]
    with Client(gateway) as client:
        client.send(b"POST /healthz HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: identity\r\n\r\n" + post() * 3)
        assert client.read().status == 400
        assert client.closed()
    assert gateway.get("/metrics")[1]["request_count"] == before


def test_a_refusal_is_logged_and_counted_like_any_request(gateway: Running) -> None:
    with Client(gateway) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nX-Request-ID: refused-1\r\n\r\n")
        client.read()
    line = gateway.access("refused-1")
    assert (line["status"], line["code"], line["fault"], line["route"]) == (400, "bad_http", "caller", "other")


# --- time


def test_headers_that_trickle_do_not_hold_a_connection_for_ever(gateway: Running) -> None:
    start = time.monotonic()
    with Client(gateway) as client:
        client.send(b"GET /healthz HTTP/1.1\r\n")
        with pytest.raises(OSError):  # reset or broken pipe, as it comes
            while time.monotonic() - start < PATIENCE:
                client.send(b"X: y\r\n")
                time.sleep(0.2)
    assert time.monotonic() - start < PATIENCE


def test_a_body_that_stops_coming_is_a_408(gateway: Running) -> None:
    with Client(gateway) as client:
        client.send(post()[:-10])
        reply = client.read()
        assert (reply.status, reply.code) == (408, "request_timeout")
        assert client.closed()


def test_a_body_that_trickles_is_a_408(gateway: Running) -> None:
    with Client(gateway) as client:
        client.send(post(b" " * 60_000)[:200])
        client.sock.settimeout(0.2)
        for _ in range(100):
            try:
                client.send(b" ")
                if client.sock.recv(12, socket.MSG_PEEK):
                    break
            except TimeoutError:
                continue
        client.sock.settimeout(PATIENCE)
        assert client.read().status == 408


def test_an_idle_connection_is_closed_after_a_while(gateway: Running) -> None:
    with Client(gateway) as client:
        client.send(post())
        assert client.read().status == 200
        assert client.closed()


def test_connections_are_counted_and_bounded(tmp_path: Path) -> None:
    with Running(tmp_path, "--max-connections", "4") as gateway:
        clients = [Client(gateway) for _ in range(4)]
        for client in clients:
            client.send(post())
            assert client.read().status == 200
        with Client(gateway) as fifth:
            assert fifth.closed()
        assert "4 connections are open" in gateway.lines()
        assert _metric(clients[0], "gateway_connections_refused_total") == 1
        clients.pop().__exit__()
        assert wait_for(lambda: _metric(clients[0], "gateway_connections") == 3)
        with Client(gateway) as again:
            again.send(post())
            assert again.read().status == 200
        for client in clients:
            client.__exit__()


def _metric(client: Client, name: str) -> float:
    client.send(b"GET /metrics HTTP/1.1\r\nHost: g\r\nAccept: text/plain\r\n\r\n")
    found = re.search(rf"^{name} (\S+)$", client.read().body.decode(), re.MULTILINE)
    assert found
    return float(found[1])


LONG = json.dumps({"messages": [{"role": "user", "content": "a " * 30_000}], "stream": True}).encode()


def test_a_long_echo_goes_at_its_readers_pace_and_holds_up_nobody(gateway: Running) -> None:
    with Client(gateway) as slow:
        slow.send(post(LONG))
        assert gateway.get("/healthz")[0] == 200
        time.sleep(0.3)
        assert slow.read().body.count(b'"content":" a"') == 30_000


def test_a_client_that_leaves_a_long_echo_ends_it(gateway: Running) -> None:
    before = gateway.get("/metrics")[1]["client_cancelled_count"]
    with Client(gateway) as client:
        client.send(post(LONG))
        assert client.sock.recv(100).startswith(b"HTTP/1.1 200 OK")
    wait_for(lambda: gateway.get("/metrics")[1]["client_cancelled_count"] == before + 1)
    assert gateway.get("/metrics")[1]["in_flight"] == 0
