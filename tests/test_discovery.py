"""What sources find, and what becomes of it, on a stopped clock."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from twisted.internet.defer import Deferred, TimeoutError, fail, succeed
from twisted.internet.task import Clock
from twisted.names import dns, error

from gateway.core.backend_settings import MAX_BACKENDS
from gateway.core.errors import GatewayError
from gateway.core.readers import SettingsError
from gateway.core.settings import Settings
from gateway.core.sources import Endpoint, read_url
from gateway.discovery import PATIENCE
from gateway.dns_source import DNSSource
from gateway.parts import sources_of

from .conftest import Logged
from .test_members import House, own, refusal

DNS = "dns+http://models.example:8000"


def at(*addresses: str) -> list[Endpoint]:
    return [Endpoint(address, 8000) for address in addresses]


def source(name: str = "s", **more: Any) -> Any:
    return replace(own(name, **more), url=DNS)


# --- what becomes of it


def test_what_is_found_comes_and_goes_by_itself() -> None:
    house = House(own("a"), source())
    assert house.sources[DNS].runs
    house.sources[DNS].found(at("10.0.0.2", "10.0.0.1"))
    assert list(house.backends) == ["a", "s@10.0.0.1:8000", "s@10.0.0.2:8000"]
    assert house.places["s@10.0.0.1:8000"] == ("10.0.0.1", 8000, "http://models.example:8000")
    house.sources[DNS].found(at("10.0.0.2", "10.0.0.3"))
    assert list(house.backends) == ["a", "s@10.0.0.2:8000", "s@10.0.0.3:8000"]
    house.members.use([own("a")])
    assert (list(house.backends), house.sources[DNS].runs) == (["a"], False)
    house.stop()


def test_a_source_that_fails_keeps_what_it_had_and_says_so_once(logged: Logged) -> None:
    house = House(source())
    house.sources[DNS].found(at("10.0.0.1"))
    for _ in range(3):
        house.sources[DNS].failed("no name server answers")
    assert list(house.backends) == ["s@10.0.0.1:8000"]
    house.sources[DNS].found(at("10.0.0.1"))
    registry = CollectorRegistry()
    registry.register(house.discovery)
    page = generate_latest(registry).decode()
    assert 'gateway_discovery_failures_total{source="s"} 3.0' in page
    assert 'gateway_discovery_backends{source="s"} 1.0' in page
    house.stop()


def test_a_source_whose_other_settings_change_keeps_what_it_has_found() -> None:
    house = House(source())
    house.sources[DNS].found(at("10.0.0.1"))
    house.up("s@10.0.0.1:8000")
    house.members.use([source(weight=2.0)])
    assert house.states() == {"s@10.0.0.1:8000": ("healthy", 0)}
    assert (house.sources[DNS].runs, house.scheduler.backends.weight[0]) == (True, 2.0)
    house.stop()


def test_until_a_source_has_answered_requests_wait_and_the_gateway_is_not_ready() -> None:
    house = House(source())
    waits = house.lease()
    granted = waits.granted()
    assert (waits.backend, house.discovery.unanswered()) == (None, ("s",))
    house.sources[DNS].found(at("10.0.0.1"))
    assert house.discovery.unanswered() == ()
    house.up("s@10.0.0.1:8000")
    assert granted.called
    waits.end()
    house.stop()


def test_a_source_that_never_answers_holds_up_nobody_for_long() -> None:
    house = House(source())
    waits = house.lease()
    house.sources[DNS].failed("no name server answers")
    assert refusal(waits) == "no_backend"
    with pytest.raises(GatewayError, match="No backend is there") as caught:
        house.lease()
    assert caught.value.code == "no_backend"
    assert house.discovery.unanswered() == ("s",)
    house.clock.advance(PATIENCE)
    assert house.discovery.unanswered() == ()
    house.stop()


def test_a_model_that_no_source_can_have_is_not_found() -> None:
    house = House(own("a"), source(models=("n",)))
    house.up("a")
    house.sources[DNS].found([])
    for model, code in (("n", "no_backend"), ("x", "model_not_found")):
        with pytest.raises(GatewayError) as caught:
            house.lease(model)
        assert caught.value.code == code
    house.stop()


def test_the_echo_does_not_stand_in_for_a_source() -> None:
    house = House(source())
    house.sources[DNS].found([])
    assert house.states() == {}
    house.clock.advance(60.0)
    house.stop()


def test_more_than_there_may_be_are_left_out(logged: Logged) -> None:
    house = House(source())
    house.sources[DNS].found(at(*[f"10.0.{number // 250}.{number % 250}" for number in range(MAX_BACKENDS + 5)]))
    assert len(house.backends) == MAX_BACKENDS
    house.stop()


# --- the DNS


class Names:
    """A resolver that answers what a test says; a name that it does not know does not exist."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, int], list[Any] | BaseException] = {}
        self.asked: list[str] = []
        self.ttl = 10

    def has(self, name: str, *records: Any) -> None:
        for kind in (dns.A, dns.AAAA, dns.SRV):
            self.records[name, kind] = [one for one in records if kind == one.TYPE]

    def fails(self, name: str, problem: BaseException) -> None:
        for kind in (dns.A, dns.AAAA, dns.SRV):
            self.records[name, kind] = problem

    def _look(self, name: str, kind: int) -> Deferred[Any]:
        self.asked.append(name)
        found = self.records.get((name, kind), error.DNSNameError())
        if isinstance(found, BaseException):
            return fail(found)
        return succeed(([dns.RRHeader(name, kind, ttl=self.ttl, payload=one) for one in found], [], []))

    def lookupAddress(self, name: str, timeout: Any) -> Deferred[Any]:
        return self._look(name, dns.A)

    def lookupIPV6Address(self, name: str, timeout: Any) -> Deferred[Any]:
        return self._look(name, dns.AAAA)

    def lookupService(self, name: str, timeout: Any) -> Deferred[Any]:
        return self._look(name, dns.SRV)


class Look:
    """A source that looks at such names."""

    def __init__(self, url: str, resolver: Any, clock: Any = None) -> None:
        self.clock = clock or Clock()
        self.found: list[list[str]] = []
        self.ends: list[list[Endpoint]] = []
        self.failed: list[str] = []
        self.told: Deferred[None] = Deferred()
        self.source = DNSSource(read_url(url), resolver, self.clock, self._found, self._failed, random=lambda: 0.0)

    def _found(self, found: Any) -> None:
        self.ends.append(list(found))
        self.found.append(sorted(map(str, found)))
        self._tell()

    def _failed(self, why: str) -> None:
        self.failed.append(why)
        self._tell()

    def _tell(self) -> None:
        told, self.told = self.told, Deferred()
        told.callback(None)


def waits(look: Look) -> float:
    (call,) = look.clock.getDelayedCalls()
    return float(call.getTime() - look.clock.seconds())


def test_each_address_of_a_name_is_a_backend() -> None:
    names = Names()
    names.has(
        "models.example",
        dns.Record_A("10.0.0.2"),
        dns.Record_A("10.0.0.1"),
        dns.Record_AAAA("fd00::1"),
        dns.Record_A("0.0.0.0"),
    )
    look = Look(DNS, names)
    look.source.start()
    assert look.found == [["10.0.0.1:8000", "10.0.0.2:8000"]]
    names.has("models.example", dns.Record_AAAA("fd00::1"))
    look.clock.advance(10.0)
    assert look.found[1:] == [["[fd00::1]:8000"]]
    look.source.stop()
    assert not look.clock.getDelayedCalls()


@pytest.mark.parametrize(("ttl", "seconds"), [(0, 1.0), (1, 1.0), (17, 17.0), (86400, 300.0)])
def test_a_name_is_looked_up_again_when_its_records_say_so_within_bounds(ttl: int, seconds: float) -> None:
    names = Names()
    names.ttl = ttl
    names.has("models.example", dns.Record_A("10.0.0.1"))
    look = Look(DNS, names)
    look.source.start()
    assert waits(look) == seconds
    look.source.stop()


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        (error.DNSNameError(), "there is no such name"),
        (error.DNSServerError(), "the name server cannot tell (DNSServerError)"),
        (error.DNSQueryRefusedError(), "the name server cannot tell (DNSQueryRefusedError)"),
        (TimeoutError(), "no name server answers"),
        (error.DNSQueryTimeoutError(1), "no name server answers"),
        (OSError("no route"), "no route"),
        (None, "it has no address"),
    ],
)
def test_what_cannot_be_looked_up_is_tried_again_later_and_later(problem: BaseException | None, why: str) -> None:
    names = Names()
    names.fails("models.example", problem) if problem is not None else names.has("models.example")
    look = Look(DNS, names)
    look.source.start()
    waited = []
    for _ in range(8):
        waited.append(waits(look))
        look.clock.advance(waits(look))
    assert (look.found, set(look.failed)) == ([], {why})
    assert waited == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]
    names.has("models.example", dns.Record_A("10.0.0.1"))
    look.clock.advance(waits(look))
    assert (look.found, waits(look)) == ([["10.0.0.1:8000"]], 10.0)
    look.source.stop()


SRV = "srv+http://_http._tcp.my.example"


def test_the_targets_of_the_best_priority_that_has_any_address_count() -> None:
    names = Names()
    records = [
        dns.Record_SRV(1, 0, 8001, "gone.example"),
        dns.Record_SRV(2, 30, 8001, "a.example"),
        dns.Record_SRV(2, 10, 8002, "b.example"),
        dns.Record_SRV(3, 0, 8003, "c.example"),
    ]
    names.has("_http._tcp.my.example", *records)
    names.has("a.example", dns.Record_A("10.0.0.1"), dns.Record_A("10.0.0.2"))
    names.has("b.example", dns.Record_A("10.0.0.3"))
    names.has("c.example", dns.Record_A("10.0.0.4"))
    look = Look(SRV, names)
    look.source.start()
    assert look.found == [["10.0.0.1:8001", "10.0.0.2:8001", "10.0.0.3:8002"]]
    weights = {one.address: round(one.weight, 3) for one in look.ends[0]}
    assert weights == {"10.0.0.1": 1.125, "10.0.0.2": 1.125, "10.0.0.3": 0.75}
    names.fails("b.example", TimeoutError())
    names.has("_http._tcp.my.example", *records[1:])
    look.clock.advance(waits(look))
    assert look.found[1] == look.found[0]
    names.has("_http._tcp.my.example", *records[1:2], dns.Record_SRV(0, 0, 0, b""))
    look.clock.advance(waits(look))
    assert look.found[2] == ["10.0.0.1:8001", "10.0.0.2:8001"]
    assert [one.weight for one in look.ends[2]] == [1.0, 1.0]
    look.source.stop()


def test_a_service_that_is_not_offered_keeps_what_it_had() -> None:
    names = Names()
    names.has("_http._tcp.my.example", dns.Record_SRV(0, 0, 0, b""))
    look = Look(SRV, names)
    look.source.start()
    assert (look.found, look.failed) == ([], ["it has no address"])
    look.source.stop()


# --- Kubernetes


def test_without_its_library_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    monkeypatch.delitem(sys.modules, "gateway.kubernetes_source", raising=False)
    make = sources_of(Settings(), Clock())
    with pytest.raises(SettingsError, match=r"kubernetes is not installed: pip install 'inference-gateway\[kubernetes\]'"):
        make("k8s+http://vllm.default:http", print, print)


def test_without_a_cluster_nothing_is_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kubernetes.config import kube_config

    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    house = House(own("a"))
    house.discovery._make = sources_of(Settings(), Clock())
    with pytest.raises(SettingsError, match="this is no pod with a service account, and there is no kubeconfig"):
        house.members.use([own("b"), replace(own("v"), url="k8s+http://vllm.default:http")])
    assert list(house.backends) == ["a"]
    house.stop()
