"""URLs that stand for backends to be found, and what is made of what is found."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.core.backend_settings import BackendSettings
from gateway.core.endpoint_slices import Slices
from gateway.core.readers import backend_url, dns_server
from gateway.core.sources import Endpoint, members, read_url


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("dns+http://Models.Example:8000/v1", ("dns", "http", "models.example", "8000", "", "models.example")),
        ("dns+https://models.example.", ("dns", "https", "models.example", "443", "", "models.example")),
        ("srv+http://_http._tcp.my.example/a/v1/", ("srv", "http", "_http._tcp.my.example", "", "/a", "my.example")),
        ("dns+http://a:8000/v1/v1", ("dns", "http", "a", "8000", "/v1", "a")),
        ("k8s+http://vllm.default:http", ("k8s", "http", "vllm.default", "http", "", "vllm.default.svc")),
        ("k8s+https://vllm.default:8443", ("k8s", "https", "vllm.default", "8443", "", "vllm.default.svc")),
    ],
)
def test_a_source_is_read(url: str, read: tuple[str, ...]) -> None:
    assert read_url(url) == read
    assert read_url(backend_url(url)) == read


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("dns+http://", "dns+http://models.example:8000"),
        ("dns+http://10.0.0.1:80", "dns+http://models.example:8000"),
        ("dns+http://a:0", "dns+http://models.example:8000"),
        ("dns+http://a:name", "dns+http://models.example:8000"),
        ("dns+http://user@a", "dns+http://models.example:8000"),
        ("dns+http://a/?x=1", "dns+http://models.example:8000"),
        ("dns+http://a..b", "dns+http://models.example:8000"),
        ("dns+ftp://a", "dns+http://models.example:8000"),
        ("srv+http://models.example", "whose record has the port"),
        ("srv+http://_http._tcp.models.example:80", "whose record has the port"),
        ("srv+http://_http._tcp", "whose record has the port"),
        ("k8s+http://vllm:http", "service.namespace:http"),
        ("k8s+http://vllm.default", "service.namespace:http"),
        ("k8s+http://vllm.default.svc:80", "service.namespace:http"),
        ("consul+http://a", "begins with http, https, dns+http"),
    ],
)
def test_what_is_no_source_is_refused_with_an_example(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        backend_url(url)
    assert said in str(caught.value)


def test_each_that_is_found_is_as_the_row_says_with_a_name_and_an_address_of_its_own() -> None:
    row = BackendSettings(name="v", url="dns+https://models.example:8443/x", slots=3, weight=2.0, api_key="k")
    found = members(row, [Endpoint("10.0.0.1", 8443), Endpoint("fd00::1", 8443, 0.5)])
    assert [(one.name, one.url, one.address, one.weight) for one in found] == [
        ("v@10.0.0.1:8443", "https://models.example:8443/x", "10.0.0.1", 2.0),
        ("v@[fd00::1]:8443", "https://models.example:8443/x", "fd00::1", 1.0),
    ]
    assert {(one.slots, one.api_key) for one in found} == {(3, "k")}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("10.0.0.10", ("10.0.0.10", 53)),
        ("10.0.0.10:5353", ("10.0.0.10", 5353)),
        ("[::1]:53", ("::1", 53)),
        ("[::1]", ("::1", 53)),
    ],
)
def test_a_name_server_is_an_address(written: str, read: tuple[str, int]) -> None:
    assert dns_server(written) == read


@pytest.mark.parametrize("written", ["ns.example", "10.0.0.10:0", "10.0.0.10:99999", "::1", "10.0.0"])
def test_a_name_server_is_nothing_else(written: str) -> None:
    with pytest.raises(ValueError, match="the address of a name server"):
        dns_server(written)


# --- endpoint slices


def endpoint(address: str, uid: str = "", **conditions: bool) -> dict[str, Any]:
    return {"addresses": [address], "conditions": conditions} | ({"targetRef": {"kind": "Pod", "uid": uid}} if uid else {})


def piece(name: str, *endpoints: dict[str, Any], family: str = "IPv4", port: int = 8000) -> dict[str, Any]:
    return {
        "metadata": {"name": name},
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [{"name": "metrics", "port": 9, "protocol": "TCP"}, {"name": "http", "port": port, "protocol": "TCP"}],
    }


def addresses(slices: Slices) -> list[str]:
    return [str(one) for one in slices.endpoints()]


def test_the_slices_of_a_service_are_one_set() -> None:
    slices = Slices("http")
    slices.replace([piece("a", endpoint("10.0.0.1")), piece("b", endpoint("10.0.0.2"))])
    assert addresses(slices) == ["10.0.0.1:8000", "10.0.0.2:8000"]
    slices.change("ADDED", piece("c", endpoint("10.0.0.3", ready=True), port=8001))
    slices.change("MODIFIED", piece("a", endpoint("10.0.0.4"), endpoint("10.0.0.2")))
    assert addresses(slices) == ["10.0.0.2:8000", "10.0.0.3:8001", "10.0.0.4:8000"]
    slices.change("DELETED", piece("b"))
    assert addresses(slices) == ["10.0.0.2:8000", "10.0.0.3:8001", "10.0.0.4:8000"]
    slices.replace([piece("d")])
    assert addresses(slices) == []


def test_a_port_is_found_by_name_or_number() -> None:
    for port, found in (("http", ["10.0.0.1:8000"]), ("8000", ["10.0.0.1:8000"]), ("9", ["10.0.0.1:9"]), ("grpc", [])):
        slices = Slices(port)
        slices.replace([piece("a", endpoint("10.0.0.1"))])
        assert addresses(slices) == found


def test_what_is_not_ready_gets_no_requests_and_what_ends_only_if_nobody_else_is_there() -> None:
    slices = Slices("http")
    ending = endpoint("10.0.0.1", ready=False, serving=True, terminating=True)
    starting = endpoint("10.0.0.2", ready=False, serving=False, terminating=False)
    slices.replace([piece("a", ending, starting, endpoint("10.0.0.3", ready=True))])
    assert addresses(slices) == ["10.0.0.3:8000"]
    slices.replace([piece("a", ending, starting)])
    assert addresses(slices) == ["10.0.0.1:8000"]
    slices.replace([piece("a", starting)])
    assert addresses(slices) == []


def test_a_pod_with_two_addresses_is_one_backend() -> None:
    slices = Slices("http")
    slices.replace(
        [
            piece("six", endpoint("fd00::1", "p1"), endpoint("fd00::2", "p2"), family="IPv6"),
            piece("four", endpoint("10.0.0.1", "p1")),
            piece("names", endpoint("pod.example", "p3"), family="FQDN"),
        ]
    )
    assert addresses(slices) == ["10.0.0.1:8000", "[fd00::2]:8000"]
