"""Backends found in a DNS server and in a Kubernetes API, both of ours, by the real client libraries."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted  # type: ignore[import-untyped]
from cryptography import x509
from kubernetes import client
from treq import content
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.names import dns

from gateway.core.sources import read_url
from gateway.dns_source import resolver_of
from gateway.kubernetes_source import WATCH_SECONDS, KubernetesSource
from gateway.net.agent import Agent, BackendClient

from ..test_discovery import Look
from .asking import DONE, HELLO, STREAM, Asking, Reply, Request, answers, ask, metric, streams, table
from .backends import Connection, Script, ScriptedBackend, completion
from .kubernetes_api import TOKEN, KubernetesAPI, endpoint, kubernetes_api
from .name_server import name_server
from .processes import PATIENCE, Running, wait_for
from .test_faults import self_signed

Coroutine = Callable[..., Awaitable[None]]
on_the_reactor: Callable[[Coroutine], Coroutine] = pytest_twisted.ensureDeferred

QUICK = ("--probe-interval", "200ms")


@contextmanager
def backends_at(*addresses: tuple[str, int], script: Script = answers, **more: Any) -> Iterator[list[ScriptedBackend]]:
    """Backends at these addresses; port 0 is any."""
    with ExitStack() as stack:
        started = []
        for address in addresses:
            started.append(ScriptedBackend(script, address=address, **more))
            stack.callback(started[-1].stop)
        yield started


def names(gateway: Running) -> list[str]:
    """Of the backends in order."""
    return sorted(one["name"] for one in gateway.get("/metrics")[1]["backends"] if one["state"] == "healthy")


@on_the_reactor
async def test_an_agent_connects_to_its_address_and_once_closed_keeps_no_connection() -> None:
    """One that was kept would leave a timer behind."""
    release, closed = threading.Event(), threading.Event()

    def script(connection: Connection, request: Request) -> None:
        assert release.wait(PATIENCE)
        answers(connection, request)
        connection.gone()
        closed.set()

    with backends_at(("127.0.0.1", 0), script=script) as (only,):
        agent = Agent(reactor, 5.0, "127.0.0.1")
        asked = BackendClient(agent).request("POST", f"http://models.example:{only.port}/x", data=b"{}")
        agent.close()
        release.set()
        response = await asked
        assert (response.code, await content(response)) == (200, completion())
        await deferToThread(closed.wait, PATIENCE)
        assert closed.is_set()


# --- the DNS: the resolver alone


@on_the_reactor
async def test_a_large_answer_comes_by_tcp_and_what_cannot_be_answered_has_a_reason() -> None:
    with name_server() as server:
        server.records["models.example"] = [dns.Record_A(f"10.0.0.{number}") for number in range(1, 101)]
        resolver = resolver_of(("127.0.0.1", server.port), reactor)
        look = Look("dns+http://models.example:8000", resolver, reactor)
        look.source.start()
        await look.told
        assert len(look.found[0]) == 100
        assert {way for _, way in server.asked} == {"udp", "tcp"}
        look.source.stop()
        for code, why in ((dns.ESERVER, "DNSServerError"), (dns.EREFUSED, "DNSQueryRefusedError"), (dns.ENAME, "no such name")):
            server.code = code
            look = Look("dns+http://models.example:8000", resolver, reactor)
            look.source.start()
            await look.told
            assert why in look.failed[0]
            look.source.stop()
        await deferLater(reactor, 0.0)  # the last question's port closes


# --- the DNS: a gateway


def test_backends_follow_the_records_of_a_name_and_outlive_the_name_server(tmp_path: Path) -> None:
    with name_server() as server, backends_at(("127.0.0.1", 0)) as (first,):
        with backends_at(("127.0.0.2", first.port)) as (second,):
            url = f"dns+http://models.example:{first.port}/v1"
            server.records["models.example"] = [dns.Record_A("127.0.0.1")]
            (tmp_path / "g.toml").write_text(table("v", url))
            with Running(tmp_path, "--config", "g.toml", *QUICK, GATEWAY_DNS_SERVER=server.address) as gateway:
                one, other = f"v@127.0.0.1:{first.port}", f"v@127.0.0.2:{second.port}"
                wait_for(lambda: names(gateway) == [one])
                assert gateway.get("/readyz")[0] == 200
                assert ask(gateway).backend == one
                assert first.posts[0][1][b"host"] == f"models.example:{first.port}".encode()
                server.records["models.example"] = [dns.Record_A("127.0.0.1"), dns.Record_A("127.0.0.2")]
                wait_for(lambda: names(gateway) == [one, other])
                server.code = dns.ESERVER
                wait_for(lambda: metric(gateway, r'gateway_discovery_failures_total\{source="v"\}') >= 1)
                assert names(gateway) == [one, other]
                server.code = dns.OK
                server.records["models.example"] = [dns.Record_A("127.0.0.2")]
                wait_for(lambda: names(gateway) == [other])
                assert ask(gateway).backend == other
                assert metric(gateway, r'gateway_discovery_backends\{source="v"\}') == 1
            lines = gateway.lines()
            assert "v has found 1 backends: 127.0.0.1" in lines
            assert lines.count("v could not be looked up") == 1
            assert "v answers again" in lines
            assert "DNSDatagramProtocol" not in lines
            assert "UDP Port" not in lines


def test_a_gateway_is_not_ready_before_the_first_answer_and_asks_for_the_port_in_the_record(tmp_path: Path) -> None:
    with name_server() as server, backends_at(("127.0.0.1", 0), ("127.0.0.1", 0)) as (own, found):
        server.silent = True
        (tmp_path / "g.toml").write_text(table("own", own.url) + table("v", "srv+http://_http._tcp.my.example"))
        with Running(tmp_path, "--config", "g.toml", *QUICK, GATEWAY_DNS_SERVER=server.address) as gateway:
            wait_for(lambda: names(gateway) == ["own"])
            status, body = gateway.get("/readyz")
            assert (status, body["error"]["code"]) == (503, "no_backend")
            assert "not known yet what backends there are of v" in body["error"]["message"]
            assert ask(gateway).backend == "own"
            server.records["_http._tcp.my.example"] = [dns.Record_SRV(0, 1, found.port, "a.my.example")]
            server.records["a.my.example"] = [dns.Record_A("127.0.0.1")]
            server.silent = False
            wait_for(lambda: gateway.get("/readyz")[0] == 200)
            wait_for(lambda: names(gateway) == ["own", f"v@127.0.0.1:{found.port}"])


def test_a_certificate_is_that_of_the_name_and_not_of_the_address(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path, x509.DNSName("models.example"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with name_server() as server, backends_at(("127.0.0.1", 0), tls=context) as (only,):
        server.records["models.example"] = server.records["other.example"] = [dns.Record_A("127.0.0.1")]
        tables = table("right", f"dns+https://models.example:{only.port}") + table(
            "wrong", f"dns+https://other.example:{only.port}"
        )
        (tmp_path / "g.toml").write_text(tables)
        environment = {"SSL_CERT_FILE": str(certificate), "GATEWAY_DNS_SERVER": server.address}
        with Running(tmp_path, "--config", "g.toml", *QUICK, **environment) as gateway:
            wait_for(lambda: names(gateway) == [f"right@127.0.0.1:{only.port}"])
            states = {one["name"]: one for one in gateway.get("/metrics")[1]["backends"]}
            wait_for(lambda: gateway.get("/metrics")[1]["backends"][1]["state"] == "unhealthy")
            assert len(states) == 2
            assert {ask(gateway).backend for _ in range(4)} == {f"right@127.0.0.1:{only.port}"}


# --- Kubernetes


@pytest.fixture
def api() -> Iterator[KubernetesAPI]:
    with kubernetes_api() as running:
        yield running


def cluster(directory: Path, api: KubernetesAPI, *more: str, url: str = "k8s+http://vllm.default:http") -> Running:
    (directory / "g.toml").write_text(table("v", url))
    return Running(directory, "--config", "g.toml", *QUICK, *more, KUBECONFIG=api.kubeconfig(directory))


def test_backends_follow_the_endpoints_of_a_service(tmp_path: Path, api: KubernetesAPI) -> None:
    release = threading.Event()

    def slow(connection: Connection, request: Request) -> None:
        assert release.wait(PATIENCE)
        answers(connection, request)

    with backends_at(("127.0.0.1", 0), script=slow) as (first,), backends_at(("127.0.0.2", 0)) as (second,):
        one, other = f"v@127.0.0.1:{first.port}", f"v@127.0.0.2:{second.port}"
        api.put("a", endpoint("127.0.0.1"), endpoint("127.0.0.9", ready=False), ports={"http": first.port, "metrics": 1})
        with cluster(tmp_path, api) as gateway:
            wait_for(lambda: names(gateway) == [one])
            held = Asking(gateway)
            wait_for(lambda: len(first.posts) == 1)
            api.put("b", endpoint("127.0.0.2"), ports={"http": second.port})
            wait_for(lambda: names(gateway) == [one, other])
            # the pod terminates: what it has goes on, and nothing new comes
            api.put("a", endpoint("127.0.0.1", ready=False, terminating=True), ports={"http": first.port})
            wait_for(lambda: names(gateway) == [other])
            shown = {seen["name"]: seen for seen in gateway.get("/metrics")[1]["backends"]}
            assert (shown[one]["state"], shown[one]["in_flight"]) == ("draining", 1)
            assert {ask(gateway).backend for _ in range(3)} == {other}
            api.delete("a")
            release.set()
            assert (held.reply().status, held.reply().backend) == (200, one)
            wait_for(lambda: one not in {seen["name"] for seen in gateway.get("/metrics")[1]["backends"]})
            assert api.lists == 1


def test_a_watch_goes_on_where_it_was_and_lists_anew_when_that_is_too_long_ago(tmp_path: Path, api: KubernetesAPI) -> None:
    with backends_at(("127.0.0.1", 0), ("127.0.0.1", 0)) as (first, second):
        api.put("a", endpoint("127.0.0.1"), ports={"http": first.port})
        with cluster(tmp_path, api) as gateway:
            wait_for(lambda: len(names(gateway)) == 1 and api.watching)
            api.bookmark()
            api.cut()
            wait_for(lambda: api.watches == 2 and api.watching)
            assert api.lists == 1
            api.put("b", endpoint("127.0.0.1"), ports={"http": second.port})
            wait_for(lambda: len(names(gateway)) == 2)
            api.forget()
            wait_for(lambda: api.lists == 2 and api.watching)
            api.delete("b")
            wait_for(lambda: names(gateway) == [f"v@127.0.0.1:{first.port}"])
            assert metric(gateway, "gateway_discovery_failures_total") == 0
            api.status = 503
            api.cut()
            wait_for(lambda: metric(gateway, "gateway_discovery_failures_total") >= 1)
            assert ask(gateway).status == 200
            api.status = 200
            wait_for(lambda: len(names(gateway)) == 1)
        assert "the API server answered with status 503" in gateway.lines()


@on_the_reactor
async def test_a_watch_is_ended_at_once(api: KubernetesAPI) -> None:
    api.put("a", endpoint("10.0.0.1"), ports={"http": 8000})
    found: Deferred[Any] = Deferred()
    configuration = client.Configuration(host=api.url, api_key={"authorization": f"Bearer {TOKEN}"})
    slices = client.DiscoveryV1Api(client.ApiClient(configuration))
    source = KubernetesSource(read_url("k8s+http://vllm.default:http"), slices, reactor, found.callback, pytest.fail)
    source.start()
    assert [str(one) for one in await found] == ["10.0.0.1:8000"]
    before = time.monotonic()
    await source.stop()
    assert time.monotonic() - before < WATCH_SECONDS / 2


def test_fifty_comings_and_goings_under_load_fail_no_request_and_leave_nothing(tmp_path: Path, api: KubernetesAPI) -> None:
    def script(connection: Connection, request: Request) -> None:
        time.sleep(0.002)
        (streams("a", "b") if b'"stream"' in request[2] else answers)(connection, request)

    with backends_at(*[("127.0.0.1", 0)] * 4, script=script) as there:
        api.put("always", endpoint("127.0.0.1"), ports={"http": there[0].port})
        with cluster(tmp_path, api, "--policy", "round-robin") as gateway:
            wait_for(lambda: len(names(gateway)) == 1)
            opened = open_files(gateway) + 1  # the watch may have begun or not
            with load(gateway, HELLO, STREAM, HELLO, STREAM) as (served, failed):
                for number in range(50):
                    one, piece = there[1 + number % 3], f"s{number % 3}"
                    if number % 6 < 3:
                        api.put(piece, endpoint("127.0.0.1"), ports={"http": one.port})
                        wait_for(partial(has_more_than, one.posts, len(one.posts)))
                    else:
                        api.delete(piece)
                        wait_for(partial(is_gone, gateway, f"v@127.0.0.1:{one.port}"))
            assert failed == []
            assert len(served) > 100
            print(f"{len(served)} requests, 50 changes, {len(failed)} failed")
            for piece in ("s0", "s1", "s2"):
                api.put(piece, ports={"http": 1})
            always = f"v@127.0.0.1:{there[0].port}"
            wait_for(lambda: [one["name"] for one in gateway.get("/metrics")[1]["backends"]] == [always])
            assert metric(gateway, r"gateway_inflight\{") == 0
            cached = r"gateway_prefix_index_tokens\{"
            assert metric(gateway, cached) == metric(gateway, rf'{cached}backend="{always}"')
            wait_for(lambda: open_files(gateway) <= opened)  # kept connections end with their backend, or after 4 s


@contextmanager
def load(gateway: Running, *bodies: dict[str, Any]) -> Iterator[tuple[list[Reply], list[Reply]]]:
    """A client for each of the bodies, who asks again and again; (what was answered well, what was not)."""
    stop, served, failed = threading.Event(), list[Reply](), list[Reply]()

    def go_on_asking(body: dict[str, Any]) -> None:
        while not stop.is_set():
            reply = ask(gateway, body)
            whole = DONE in reply.body if "stream" in body else reply.body.endswith(b"}")
            (served if reply.status == 200 and whole else failed).append(reply)

    clients = [threading.Thread(target=go_on_asking, args=[body]) for body in bodies]
    for one in clients:
        one.start()
    try:
        yield served, failed
    finally:
        stop.set()
        for one in clients:
            one.join(PATIENCE)


def has_more_than(posts: list[Any], before: int) -> bool:
    return len(posts) > before


def is_gone(gateway: Running, name: str) -> bool:
    return name not in names(gateway)


def open_files(gateway: Running) -> int:
    """Sockets and files that the process has open."""
    return len(list(Path(f"/proc/{gateway.process.pid}/fd").iterdir()))
