"""Backends and clients that fail on real sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from .backends import Connection, backend, completion, event
from .processes import Running, free_port, wait_for

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
STREAM = {**HELLO, "stream": True}
Request = tuple[bytes, dict[bytes, bytes], bytes]


def raw_post(body: object) -> bytes:
    content = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(content) + content


def self_signed(directory: Path, whose: x509.GeneralName | None = None) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, unless it is somebody else's, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    today = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([whose or x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, private = directory / "cert.pem", directory / "key.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, private


def read_all(sock: socket.socket) -> bytes:
    """What comes until the chunked or closed end."""
    data = bytearray()
    while not data.endswith(b"\r\n0\r\n\r\n"):
        more = sock.recv(262144)
        if not more:
            break
        data += more
    return bytes(data)


def test_a_refused_connection_is_a_502_and_quick(tmp_path: Path) -> None:
    with Running(tmp_path, BACKEND_URL=f"http://127.0.0.1:{free_port()}") as gateway:
        status, answer = gateway.post(HELLO)
        assert (status, answer["error"]["code"]) == (502, "backend_unreachable")
        assert gateway.get("/readyz")[0] == 503
        assert gateway.get("/healthz") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("says", "code"),
    [
        (b"", "backend_unreachable"),
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "backend_protocol_error"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{}", "backend_protocol_error"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: many\r\n\r\n{}", "backend_protocol_error"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n[1,2",
            "backend_protocol_error",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            "backend_protocol_error",
        ),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, "backend_protocol_error"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000, "backend_protocol_error"),
    ],
)
@pytest.mark.parametrize("reset", [False, True])
def test_a_backend_that_answers_nonsense_is_a_502(tmp_path: Path, says: bytes, code: str, reset: bool) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.send(says)
        time.sleep(0.05)
        if reset:
            connection.reset()
        else:
            connection.close()

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway:
        status, answer = gateway.post(HELLO)
        assert (status, answer["error"]["code"]) == (502, code)
        assert gateway.get("/metrics")[1]["in_flight"] == 0


@pytest.mark.parametrize("body", [HELLO, STREAM])
def test_a_backend_that_says_nothing_is_a_504_and_its_connection_is_closed(tmp_path: Path, body: object) -> None:
    gone = threading.Event()

    def script(connection: Connection, _: Request) -> None:
        if connection.gone():
            gone.set()

    with backend(script) as server, Running(tmp_path, "--first-byte-timeout", "300ms", BACKEND_URL=server.url) as gateway:
        status, answer = gateway.post(body)
        assert (status, answer["error"]["code"]) == (504, "first_byte_timeout")
        assert gone.wait(10)


def test_a_backend_that_stalls_in_a_stream_ends_it_with_an_error_event(tmp_path: Path) -> None:
    gone = threading.Event()

    def script(connection: Connection, _: Request) -> None:
        connection.start_stream()
        connection.chunk(event("a") + b'data: {"half')
        if connection.gone():
            gone.set()

    with backend(script) as server, Running(tmp_path, "--idle-timeout", "300ms", BACKEND_URL=server.url) as gateway:
        with gateway.connect() as client:
            client.sendall(raw_post(STREAM))
            answer = read_all(client)
        assert event("a") in answer
        assert b"half" not in answer
        assert b'"idle_timeout"' in answer
        assert b"[DONE]" not in answer
        assert gone.wait(10)


def test_each_event_reaches_the_client_before_the_next_is_sent(tmp_path: Path) -> None:
    read = threading.Semaphore(0)

    def script(connection: Connection, _: Request) -> None:
        connection.start_stream()
        for word in ("one", "two", "three"):
            connection.chunk(event(word))
            assert read.acquire(timeout=20), f"the client never saw {word}"
        connection.chunk(b"data: [DONE]\n\n")
        connection.send(b"0\r\n\r\n")

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway, gateway.connect() as client:
        client.sendall(raw_post(STREAM))
        answer = b""
        for word in (b"one", b"two", b"three"):
            while word not in answer:
                answer += client.recv(65536)
            read.release()
        assert b"[DONE]" in read_all(client)


def test_a_kept_alive_connection_that_went_stale_is_never_seen_by_the_client(tmp_path: Path) -> None:
    """The backend drops each connection as soon as a second request comes on it: the worst moment of all."""

    used = set()

    def script(connection: Connection, _: Request) -> None:
        if connection.number in used:
            connection.close()
            return
        used.add(connection.number)
        connection.answer(completion())

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url, GATEWAY_PROBE_INTERVAL="1h") as gateway:
        for _ in range(10):
            status, answer = gateway.post(HELLO)
            assert (status, answer["id"]) == (200, "chatcmpl-backend")
        assert len(server.posts) > 10, "no connection was ever used twice"


def test_a_request_that_its_server_dies_of_is_not_sent_again(tmp_path: Path) -> None:
    """The connection was used before, but the server had the request for a while: it was not stale."""
    answered = set()

    def script(connection: Connection, _: Request) -> None:
        if connection.number in answered:
            time.sleep(1.3)
            connection.reset()
        else:
            answered.add(connection.number)
            connection.answer(completion())

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url, GATEWAY_PROBE_INTERVAL="1h") as gateway:
        wait_for(lambda: gateway.get("/readyz")[0] == 200)  # its first look has left a connection to use again
        assert gateway.post(HELLO)[0] == 200
        assert gateway.post(HELLO)[1]["error"]["code"] == "backend_unreachable"
        assert len(server.posts) == 2


def test_connections_are_kept_alive(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.answer(completion())

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url, GATEWAY_PROBE_INTERVAL="1h") as gateway:
        wait_for(lambda: gateway.get("/readyz")[0] == 200)  # its first look has left a connection to use again
        for _ in range(5):
            assert gateway.post(HELLO)[0] == 200
        assert len({number for number, *_ in server.posts}) == 1


def test_a_fresh_connection_that_breaks_is_not_tried_again(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.close()

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url, GATEWAY_BACKEND_KIND="openai") as gateway:
        wait_for(lambda: gateway.get("/readyz")[0] == 200)
        before = len(server.connections)
        assert gateway.post(HELLO)[0] == 502
        assert len(server.posts) <= 2
        assert len(server.connections) - before <= 2


@pytest.mark.parametrize("body", [HELLO, STREAM])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_a_client_that_leaves_closes_the_backends_connection_at_once(tmp_path: Path, body: object, how: str) -> None:
    got, gone = threading.Event(), threading.Event()

    def script(connection: Connection, _: Request) -> None:
        if body is STREAM:
            connection.start_stream()
            connection.chunk(event("a"))
        got.set()
        if connection.gone():
            gone.set()

    with backend(script) as server, Running(tmp_path, "--log-format", "json", BACKEND_URL=server.url) as gateway:
        client = gateway.connect()
        client.sendall(raw_post(body).replace(b"Host: g\r\n", b"Host: g\r\nX-Request-ID: leaver\r\n"))
        assert got.wait(20)
        if body is STREAM:
            assert b"200 OK" in client.recv(65536)
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        if how == "half-close":
            client.shutdown(socket.SHUT_WR)
        else:
            client.close()
        assert gone.wait(10)
        client.close()
        line = gateway.access("leaver")
        assert (line["code"], line["fault"]) == ("client_cancelled", "caller")
        metrics = gateway.get("/metrics")[1]
        assert (metrics["client_cancelled_count"], metrics["error_count"], metrics["in_flight"]) == (1, 0, 0)


def resident_mib(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 // 2**20


def test_a_client_that_does_not_read_holds_the_backend_back(tmp_path: Path) -> None:
    sent = 0
    total = 200 * 256 * 1024

    def script(connection: Connection, _: Request) -> None:
        nonlocal sent
        connection.start_stream()
        part = event("x" * (256 * 1024))
        for _number in range(200):
            connection.chunk(part)
            sent += len(part)
        connection.chunk(b"data: [DONE]\n\n")
        connection.send(b"0\r\n\r\n")

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway, gateway.connect() as client:
        before = resident_mib(gateway.process.pid)
        client.sendall(raw_post(STREAM))
        wait_for(lambda: sent > 0)
        seen = -1
        while seen != sent:  # until the backend can send no more
            seen = sent
            time.sleep(0.5)
        assert sent < total / 2
        assert resident_mib(gateway.process.pid) - before < 30
        assert len(read_all(client)) > total
        assert sent >= total


def test_a_client_that_never_reads_again_is_let_go(tmp_path: Path) -> None:
    gone = threading.Event()

    def script(connection: Connection, _: Request) -> None:
        try:
            connection.start_stream()
            while True:
                connection.chunk(event("x" * 65536))
        except OSError:
            gone.set()

    with backend(script) as server, Running(tmp_path, "--idle-timeout", "500ms", BACKEND_URL=server.url) as gateway:
        with gateway.connect() as client:
            client.sendall(raw_post(STREAM))
            assert gone.wait(20)
            wait_for(lambda: gateway.get("/metrics")[1]["client_cancelled_count"] == 1)
        assert gateway.get("/metrics")[1]["in_flight"] == 0


def test_a_long_answer_reaches_a_slow_reader_whole(tmp_path: Path) -> None:
    content = "word " * 2_000_000

    def script(connection: Connection, _: Request) -> None:
        connection.answer(completion(content))

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway, gateway.connect(65536) as client:
        client.sendall(raw_post(HELLO).replace(b"Host: g", b"Host: g\r\nConnection: close"))
        data = bytearray()
        while more := client.recv(100_000):
            data += more
            time.sleep(0.01)
        assert json.loads(data.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == content


def test_a_client_that_leaves_in_the_middle_of_a_long_answer_is_recorded(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.answer(completion("x" * 20_000_000))

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway:
        with gateway.connect() as client:
            client.sendall(raw_post(HELLO))
            assert b"200 OK" in client.recv(4096)
        wait_for(lambda: gateway.get("/metrics")[1]["client_cancelled_count"] == 1)
        assert gateway.get("/metrics")[1]["in_flight"] == 0


def test_a_client_that_leaves_is_noticed_even_if_it_had_sent_more_than_a_request(tmp_path: Path) -> None:
    got, gone = threading.Event(), threading.Event()

    def script(connection: Connection, _: Request) -> None:
        got.set()
        if connection.gone():
            gone.set()

    for extra in (60_000, 200_000):
        got.clear()
        gone.clear()
        with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway:
            with gateway.connect() as client:
                client.sendall(raw_post(HELLO))
                assert got.wait(20)
                with contextlib.suppress(OSError):
                    client.sendall(b"x" * extra)
            assert gone.wait(10)


@pytest.mark.parametrize("body", [HELLO, STREAM])
def test_a_client_that_leaves_closes_a_tls_backends_connection_at_once(tmp_path: Path, body: object) -> None:
    """A backend that goes on sending, and reads nothing: it never answers a polite goodbye."""
    gone = threading.Event()

    def script(connection: Connection, _: Request) -> None:
        try:
            connection.start_stream()
            while True:
                connection.chunk(event("a"))
                time.sleep(0.01)
        except OSError:
            gone.set()

    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with backend(script, context) as server:
        settings = {"BACKEND_URL": server.url, "SSL_CERT_FILE": str(certificate), "GATEWAY_BACKEND_KIND": "llamacpp"}
        with Running(tmp_path, **settings) as gateway:
            wait_for(lambda: gateway.get("/readyz")[0] == 200)
            with gateway.connect() as client:
                client.sendall(raw_post(body))
                wait_for(lambda: server.posts)
                if body is STREAM:
                    assert b"200 OK" in client.recv(65536)
            assert gone.wait(10)


def test_a_tls_backend_that_is_not_trusted_is_unreachable(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def script(connection: Connection, _: Request) -> None:
        connection.answer(completion())

    with backend(script, context) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway:
        status, answer = gateway.post(HELLO)
        assert (status, answer["error"]["code"]) == (502, "backend_unreachable")
        assert not server.posts


def test_no_cookie_of_one_tenant_reaches_another(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        body = completion()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nSet-Cookie: sid=1; Path=/\r\nContent-Length: %d\r\n\r\n"
        connection.send(head % len(body) + body)

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway:
        gateway.post(HELLO, Cookie="mine=1")
        gateway.post(HELLO)
        assert all(b"cookie" not in headers for _, headers, _ in server.posts)
        assert all(headers[b"accept-encoding"] == b"identity" for _, headers, _ in server.posts)


def test_nothing_secret_reaches_the_log(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.answer(b'{"error":{"message":"boom"}}', b"500 Oops")

    environment = {"GATEWAY_BACKEND_API_KEY": "sk-planted-backend", "GATEWAY_FORWARD_AUTHORIZATION": "on"}
    body = {"messages": [{"role": "user", "content": "planted-prompt"}], "stream": True, "model": "a\nb \x1b[31m"}
    for style in ("text", "json"):
        with backend(script, models=["a\nb \x1b[31m"]) as server:
            options = ("--log-format", style)
            with Running(tmp_path, *options, BACKEND_URL=server.url, **environment) as gateway:
                assert gateway.post(body, Authorization="Bearer sk-planted-client")[0] == 502
                wait_for(lambda running=gateway: "backend_error" in running.lines())  # type: ignore[misc]
                assert "planted" not in gateway.lines()
                assert "\x1b" not in gateway.lines()
            assert server.posts[0][1][b"authorization"] == b"Bearer sk-planted-backend"


def test_a_backend_that_does_not_accept_is_a_connect_timeout(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        for _ in range(4):  # fill the queue: the kernel drops what comes after
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with Running(tmp_path, "--connect-timeout", "300ms", BACKEND_URL=url) as gateway:
            status, answer = gateway.post(HELLO)
            assert (status, answer["error"]["code"]) == (504, "connect_timeout")
        for filler in fillers:
            filler.close()
