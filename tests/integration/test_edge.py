"""How clients reach the gateway: TLS, a UNIX socket, the PROXY protocol, proxies, and a port for operators."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import httpx2 as httpx  # the openai SDK's
import pytest
from openai import OpenAI

from .certificates import Authority
from .processes import PATIENCE, TWISTD, Running, clean_environment, wait_for
from .test_channel import HELLO, LONG, Client, post

GET = b"GET /healthz HTTP/1.1\r\nHost: g\r\n%b\r\n"
IDLE = 0.6


class Edge(NamedTuple):
    """A gateway with TLS, a UNIX socket and an admin port."""

    running: Running
    authority: Authority
    context: ssl.SSLContext
    path: Path
    admin: int

    def get(self, path: str, port: int = 0) -> httpx.Response:
        return httpx.get(f"https://127.0.0.1:{port or self.running.port}{path}", verify=self.context)

    def over_tls(self, receive_buffer: int = 0) -> ssl.SSLSocket:
        return self.context.wrap_socket(self.running.connect(receive_buffer), server_hostname="127.0.0.1")

    def over_unix(self, receive_buffer: int = 0) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        client.connect(str(self.path))
        return client

    def metric(self, name: str) -> float:
        page = httpx.get(f"https://127.0.0.1:{self.admin}/metrics", verify=self.context, headers={"Accept": "text/plain"}).text
        found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
        assert found, page
        return float(found[1])

    def summary(self) -> dict[str, int]:
        found: dict[str, int] = self.get("/metrics", self.admin).json()
        return found


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    directory = tmp_path_factory.mktemp("edge")
    authority = Authority(directory)
    certificate, key = authority.write("server")
    path = directory / "gateway.sock"
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(path))
    left_behind.close()
    options = ["--tls-cert", certificate, "--tls-key", key, "--unix-socket", path, "--unix-socket-mode", "0600"]
    options += ["--admin-port", "0", "--trusted-proxies", "127.0.0.2,unix", "--max-body", "64KiB", "--log-format", "json"]
    options += ["--idle-timeout", str(IDLE), "--client-timeout", "3s"]
    with Running(directory, *map(str, options)) as running:
        admin = re.search(r"https://127.0.0.1:(\d+) \(admin\)", running.lines())
        assert admin, running.lines()
        yield Edge(running, authority, ssl.create_default_context(cafile=authority.file), path, int(admin[1]))
    assert not path.exists()


WAYS: list[Callable[[Edge, int], socket.socket]] = [Edge.over_tls, Edge.over_unix]
every_way = pytest.mark.parametrize("connect", WAYS, ids=["tls", "unix"])


class Over(Client):
    """A `Client` on a connection that is there."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._file = sock.makefile("rb")


# --- every way in does what a plain connection does


@every_way
def test_requests_are_answered_one_after_the_other(edge: Edge, connect: Callable[[Edge, int], socket.socket]) -> None:
    with Over(connect(edge, 0)) as client:
        client.send(post() + GET % b"" + post())
        assert [client.read().status for _ in range(3)] == [200, 200, 200]


@every_way
def test_a_refused_client_that_still_sends_reads_the_refusal(edge: Edge, connect: Callable[[Edge, int], socket.socket]) -> None:
    with Over(connect(edge, 0)) as client:
        client.send(post(b" " * 2_000_000))
        reply = client.read()
        assert (reply.status, reply.code) == (413, "request_too_large")
        assert client.closed()


@every_way
def test_a_stream_goes_at_a_slow_readers_pace(edge: Edge, connect: Callable[[Edge, int], socket.socket]) -> None:
    with connect(edge, 65536) as client:
        client.sendall(post(LONG, b"Connection: close"))
        for _ in range(9):  # so slow that what the kernel holds lasts for longer than the idle timeout
            left = 60_000 if connect is Edge.over_tls else 15_000  # less, and TCP would not tell that it was read
            while left > 0:
                data = client.recv(min(left, 16_000))
                assert data
                left -= len(data)
            time.sleep(IDLE / 2)
        tail = b""
        while more := client.recv(65536):
            tail = (tail + more)[-100:]
    assert b"data: [DONE]" in tail


@every_way
def test_who_does_not_read_is_cut_off(edge: Edge, connect: Callable[[Edge, int], socket.socket]) -> None:
    before = edge.summary()["client_cancelled_count"]
    with closing(connect(edge, 4096)) as client:
        client.sendall(post(LONG))
        wait_for(lambda: edge.summary()["client_cancelled_count"] == before + 1)


@every_way
def test_who_leaves_in_the_middle_ends_the_request(edge: Edge, connect: Callable[[Edge, int], socket.socket]) -> None:
    before = edge.summary()["client_cancelled_count"]
    with closing(connect(edge, 4096)) as client:
        client.sendall(post(LONG))
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
    wait_for(lambda: edge.summary()["client_cancelled_count"] == before + 1)
    assert edge.summary()["in_flight"] == 0


@every_way
def test_an_idle_connection_is_closed(edge: Edge, connect: Callable[[Edge, int], socket.socket]) -> None:
    with connect(edge, 0) as client:
        client.sendall(GET % b"")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 OK")
        assert client.recv(65536) == b""


# --- TLS


def test_the_openai_sdk_speaks_tls(edge: Edge) -> None:
    http = httpx.Client(verify=edge.context)
    with OpenAI(base_url=f"https://127.0.0.1:{edge.running.port}/v1", api_key="sk", http_client=http) as client:
        stream = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hello"}], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == "Echo: hello"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_are_spoken_with_http_1_1(edge: Edge, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=edge.authority.file)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    with context.wrap_socket(edge.running.connect(), server_hostname="127.0.0.1") as client:
        assert client.selected_alpn_protocol() == "http/1.1"
        assert client.version() == version.name.replace("_", ".")


def test_older_tls_and_plain_http_are_refused(edge: Edge) -> None:
    context = ssl.create_default_context(cafile=edge.authority.file)
    with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError), closing(edge.running.connect()) as client:
        context.wrap_socket(client, server_hostname="127.0.0.1")
    with closing(edge.running.connect()) as client:
        client.sendall(GET % b"")
        with suppress(ConnectionError):
            assert not client.recv(65536).startswith(b"HTTP")


def test_a_certificate_is_replaced_under_load_without_a_failed_request(edge: Edge) -> None:
    stop, failed, answered = threading.Event(), list[BaseException](), list[int]()

    def ask() -> None:
        while not stop.is_set():
            try:
                with Over(edge.over_tls()) as client:  # a handshake for each
                    client.send(post())
                    answered.append(client.read().status)
            except BaseException as problem:
                failed.append(problem)

    def stay() -> None:
        try:
            with Over(edge.over_tls()) as client:
                while not stop.is_set():
                    client.send(post())
                    answered.append(client.read().status)
        except BaseException as problem:
            failed.append(problem)

    def serial() -> str:
        with edge.over_tls() as client:
            found = client.getpeercert()
            assert found
            return str(found["serialNumber"])

    certificate, key = edge.running.directory / "server.crt", edge.running.directory / "server.key"
    first = serial()
    threads = [threading.Thread(target=target) for target in (ask, ask, stay)]
    for thread in threads:
        thread.start()
    try:
        chain, private = edge.authority.issue("server")
        certificate.write_bytes(chain)  # for a moment the key is another's
        wait_for(lambda: "the key is not that of the certificate; the certificates of before stay" in edge.running.lines())
        assert serial() == first
        key.write_bytes(private)
        wait_for(lambda: serial() != first)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed
    assert set(answered) == {200}
    assert "read again, certificate of CN=server, good until" in edge.running.lines()
    second = serial()
    key.write_bytes(b"garbage")
    wait_for(lambda: "has no private key in PEM" in edge.running.lines())
    assert serial() == second
    for file, pem in zip((certificate, key), edge.authority.issue("expired", begins=-5, ends=-2), strict=True):
        file.write_bytes(pem)
    wait_for(lambda: "the certificate of CN=expired is good from" in edge.running.lines())
    for file, pem in zip((certificate, key), edge.authority.issue("server"), strict=True):
        file.write_bytes(pem)
    wait_for(lambda: edge.running.lines().count("read again, certificate of CN=server") >= 2)
    assert serial() != second
    assert 9 * 86400 < edge.metric("gateway_tls_certificate_not_after_seconds") - time.time() < 11 * 86400


# --- the UNIX socket


def test_curl_and_the_log_know_the_unix_socket(edge: Edge) -> None:
    assert stat.S_IMODE(edge.path.stat().st_mode) == 0o600
    curl = shutil.which("curl")
    assert curl
    command = [curl, "-s", "--unix-socket", str(edge.path), "-H", "x-request-id: by-unix", "http://g/healthz"]
    assert json.loads(subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE).stdout) == {"status": "ok"}
    assert edge.running.access("by-unix")["client"] == "unix"


def start(directory: Path, *options: str) -> str:
    """What a gateway says that must not start."""
    command = [TWISTD, "-n", "--pidfile=", "inference-gateway", "--port", "0", *options]
    ended = subprocess.run(
        command, check=False, cwd=directory, env=clean_environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.returncode == 1
    return ended.stderr


def test_a_socket_that_is_listened_on_and_a_file_that_is_none_are_left_alone(edge: Edge, tmp_path: Path) -> None:
    assert f"cannot listen on {edge.path} (--unix-socket): Address already in use" in start(
        tmp_path, "--unix-socket", str(edge.path)
    )
    (tmp_path / "notes").write_text("dear diary")
    assert "Address already in use" in start(tmp_path, "--unix-socket", "notes")
    assert (tmp_path / "notes").read_text() == "dear diary"
    with closing(edge.over_unix()) as client:
        client.sendall(GET % b"")
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")


# --- proxies that are believed


def test_a_proxys_word_counts_and_nobody_elses(edge: Edge) -> None:
    def client_of(request_id: str) -> str:
        found: str = edge.running.access(request_id)["client"]
        return found

    def ask(sock: socket.socket, request_id: bytes) -> None:
        with Over(sock) as client:
            client.send(GET % b"X-Forwarded-For: 192.0.2.66, 203.0.113.5\r\nX-Request-ID: %b\r\n" % request_id)
            assert client.read().status == 200

    ask(edge.over_tls(), b"from-anybody")
    ask(edge.over_unix(), b"from-unix")
    near = socket.create_connection(("127.0.0.1", edge.running.port), PATIENCE, source_address=("127.0.0.2", 0))
    ask(edge.context.wrap_socket(near, server_hostname="127.0.0.1"), b"from-proxy")
    assert (client_of("from-anybody"), client_of("from-unix"), client_of("from-proxy")) == (
        "127.0.0.1",
        "203.0.113.5",
        "203.0.113.5",
    )
    with Over(edge.over_unix()) as client:  # a refused request has a client too
        client.send(b"GET /healthz HTTP/1.1\r\nX-Forwarded-For: 203.0.113.6\r\nX-Request-ID: no-host\r\n\r\n")
        assert client.read().status == 400
    assert client_of("no-host") == "203.0.113.6"


# --- the admin port


@pytest.mark.parametrize(
    "path", ["/metrics", "/metrics/", "/%6detrics", "/admin/backends/echo", "/dashboard", "/dashboard/state"]
)
def test_what_operators_see_is_not_on_the_clients_port(edge: Edge, path: str) -> None:
    found = edge.get(path)
    assert (found.status_code, found.json()["error"]["code"]) == (404, "unknown_url")
    if not path.startswith("/admin"):
        assert edge.get(path, edge.admin).status_code == 200


def test_a_change_of_a_backend_is_for_the_admin_port(edge: Edge) -> None:
    for port, status in ((edge.running.port, 404), (edge.admin, 200)):
        url = f"https://127.0.0.1:{port}/admin/backends/echo"
        assert httpx.post(url, json={"draining": False}, verify=edge.context).status_code == status


def test_the_admin_port_has_nothing_for_clients_but_how_it_is(edge: Edge) -> None:
    for path in ("/v1/models", "/v1/models/echo", "/openapi.json", "/v1/chat/completions", "/nothing"):
        found = edge.get(path, edge.admin)
        assert (found.status_code, found.json()["error"]["code"]) == (404, "unknown_url")
    for port in (edge.running.port, edge.admin):
        assert edge.get("/healthz", port).status_code == edge.get("/readyz", port).status_code == 200
    url = f"https://127.0.0.1:{edge.admin}/v1/chat/completions"
    assert httpx.post(url, content=HELLO, verify=edge.context).status_code == 404


# --- the PROXY protocol, and client certificates within it


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("proxied")
    options = ["--proxy-protocol", "--trusted-proxies", "127.0.0.2,203.0.113.9", "--log-format", "json"]
    with Running(directory, *options) as running:
        yield running


def as_proxy(running: Running, source: str = "127.0.0.2") -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), PATIENCE, source_address=(source, 0))


V2 = (
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c"
    + socket.inet_aton("203.0.113.5")
    + socket.inet_aton("127.0.0.1")
    + struct.pack("!2H", 7, 8)
)
LOCAL = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00"


@pytest.mark.parametrize(
    ("name", "header", "forwarded_for", "client"),
    [
        ("v1", b"PROXY TCP4 203.0.113.5 127.0.0.1 7 8\r\n", b"", "203.0.113.5"),
        ("v1-ipv6", b"PROXY TCP6 2001:db8::5 ::1 7 8\r\n", b"", "2001:db8::5"),
        ("v2", V2, b"", "203.0.113.5"),
        ("local", LOCAL, b"", "127.0.0.2"),
        ("unknown", b"PROXY UNKNOWN\r\n", b"", "127.0.0.2"),
        ("made-up", V2, b"X-Forwarded-For: 192.0.2.66\r\n", "203.0.113.5"),
        ("two-proxies", b"PROXY TCP4 203.0.113.9 127.0.0.1 7 8\r\n", b"X-Forwarded-For: 192.0.2.66\r\n", "192.0.2.66"),
    ],
)
@pytest.mark.parametrize("cut", [0, 7])
def test_a_proxy_says_whose_connection_it_is(
    proxied: Running, name: str, header: bytes, forwarded_for: bytes, client: str, cut: int
) -> None:
    request_id = f"{name}-{cut}".encode()
    with Over(as_proxy(proxied)) as connection:
        whole = header + GET % (forwarded_for + b"X-Request-ID: %b\r\n" % request_id)
        connection.send(*([whole[:cut], whole[cut:]] if cut else [whole]))
        assert connection.read().status == 200
        connection.send(GET % b"")  # nothing is asked of the next request
        assert connection.read().status == 200
    assert proxied.access(request_id.decode())["client"] == client


@pytest.mark.parametrize(
    ("source", "sent"),
    [
        ("127.0.0.1", V2 + GET % b""),
        ("127.0.0.1", GET % b""),
        ("127.0.0.2", GET % b""),
        ("127.0.0.2", b"PROXY TCP4 x y 7 8\r\n" + GET % b""),
        ("127.0.0.2", V2[:12] + b"\x31" + V2[13:] + GET % b""),
    ],
)
def test_without_a_header_of_a_proxy_a_connection_is_closed(proxied: Running, source: str, sent: bytes) -> None:
    with closing(as_proxy(proxied, source)) as client, suppress(ConnectionError):
        client.sendall(sent)
        assert client.recv(100) == b""
    assert len(re.findall("is closed: it ", proxied.lines())) >= 1


def test_a_second_header_is_no_request(proxied: Running) -> None:
    with Over(as_proxy(proxied)) as client:
        client.send(V2 + V2 + GET % b"")
        assert client.read().status == 400


def test_client_certificates_are_asked_for_within_the_proxys_connection(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    certificate, key = authority.write("server")
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    options = ["--tls-cert", str(both), "--tls-client-ca", str(authority.file), "--log-format", "json"]
    options += ["--proxy-protocol", "--trusted-proxies", "127.0.0.0/8"]

    def ask(running: Running, shown: tuple[Path, Path] | None) -> int:
        context = ssl.create_default_context(cafile=authority.file)
        if shown:
            context.load_cert_chain(*shown)
        plain = running.connect()
        plain.sendall(V2)
        with closing(plain), Over(context.wrap_socket(plain, server_hostname="127.0.0.1")) as client:
            client.send(GET % b"X-Request-ID: mutual\r\n")
            return client.read().status

    with Running(tmp_path, *options) as running:
        assert ask(running, authority.write("client")) == 200
        assert running.access("mutual")["client"] == "203.0.113.5"
        for shown in (None, other.write("stranger")):
            with pytest.raises((OSError, IndexError)):
                ask(running, shown)


def test_a_drain_lets_streams_over_tls_finish_and_closes_the_admin_port_last(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.write("server")
    options = ["--tls-cert", str(certificate), "--tls-key", str(key), "--admin-port", "0", "--grace", "5m"]
    with Running(tmp_path, *options) as running:
        found = re.search(r"https://127.0.0.1:(\d+) \(admin\)", running.lines())
        assert found
        context = ssl.create_default_context(cafile=authority.file)
        edge = Edge(running, authority, context, tmp_path, int(found[1]))
        idle, busy, deaf = edge.over_tls(), edge.over_tls(65536), edge.over_tls()
        busy.sendall(post(LONG, b"Connection: close"))
        begun = busy.recv(100)
        running.process.terminate()
        with closing(idle):
            assert idle.recv(100) == b""
        assert edge.get("/readyz", edge.admin).status_code == 503
        assert edge.get("/metrics", edge.admin).json()["draining"]
        data = begun + b"".join(iter(lambda: busy.recv(65536), b""))
        busy.close()
        assert data.rstrip().endswith(b"data: [DONE]\n\n\r\n0") or b"data: [DONE]" in data[-200:]
        assert running.process.wait(PATIENCE) == 0
        deaf.close()  # only now: a client that has not answered the goodbye is not waited for


def test_without_a_port_there_is_the_unix_socket_alone(tmp_path: Path) -> None:
    log, path = tmp_path / "log", tmp_path / "s"
    command = [TWISTD, "-n", "--pidfile=", "inference-gateway", "--port", "off", "--host", "0.0.0.0", "--unix-socket", "s"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), stdout=file, stderr=file)
    try:
        wait_for(lambda: f"listens on unix:{path}, backend" in log.read_text() or process.poll() is not None)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://g/dashboard").status_code == 200
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert not path.exists()


# --- what does not go together


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tls-cert", "none.pem"], "none.pem: cannot be read: No such file or directory"),
        (
            ["--admin-host", "0.0.0.0", "--admin-port", "0"],
            "--admin-host 0.0.0.0 is not loopback, and nobody is asked for a key",
        ),
    ],
)
def test_what_does_not_go_together_is_said_at_the_start(tmp_path: Path, options: list[str], says: str) -> None:
    assert says in start(tmp_path, *options)
