from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.forwarded import MAX_BYTES, MAX_HOPS, Proxies, networks

TRUSTED = networks("10.0.0.0/8, 2001:db8:1::/48, 192.0.2.7")
PROXIES = Proxies(TRUSTED)


@pytest.mark.parametrize(
    ("peer", "fields", "client"),
    [
        # nobody but a proxy of ours is believed
        ("198.51.100.1", [b"203.0.113.5"], "198.51.100.1"),
        ("198.51.100.1", [b"10.0.0.1"], "198.51.100.1"),
        ("unix", [b"203.0.113.5"], "unix"),
        ("", [b"203.0.113.5"], ""),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [b""], "10.0.0.1"),
        # what the client itself has sent stands to the left of what the proxy adds
        ("10.0.0.1", [b"203.0.113.5"], "203.0.113.5"),
        ("10.0.0.1", [b"1.1.1.1, 203.0.113.5"], "203.0.113.5"),
        ("10.0.0.1", [b"1.1.1.1", b"203.0.113.5"], "203.0.113.5"),
        ("10.0.0.1", [b"10.9.9.9, 203.0.113.5"], "203.0.113.5"),
        # proxies in a row
        ("10.0.0.1", [b"203.0.113.5, 10.0.0.2,192.0.2.7"], "203.0.113.5"),
        ("10.0.0.1", [b"203.0.113.5", b"10.0.0.2"], "203.0.113.5"),
        ("10.0.0.1", [b"10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("192.0.2.8", [b"203.0.113.5"], "192.0.2.8"),
        # other spellings
        ("10.0.0.1", [b"203.0.113.5:4711"], "203.0.113.5"),
        ("10.0.0.1", [b"[2001:db8::5]:4711"], "2001:db8::5"),
        ("10.0.0.1", [b"[2001:db8::5]"], "2001:db8::5"),
        ("10.0.0.1", [b"2001:DB8:0::5"], "2001:db8::5"),
        ("2001:db8:1::1", [b"203.0.113.5"], "203.0.113.5"),
        ("::ffff:10.0.0.1", [b"::ffff:203.0.113.5"], "203.0.113.5"),
        # garbage, and all to the left of it, counts for nothing
        ("10.0.0.1", [b"203.0.113.5, unknown"], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.5, _hidden, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [b"203.0.113.5,"], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.005"], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.5 10.0.0.2"], "10.0.0.1"),
        ("10.0.0.1", [b"fe80::1%eth0"], "10.0.0.1"),
        ("10.0.0.1", [b"\xff\xfe"], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.5\n10.0.0.2"], "10.0.0.1"),
        ("10.0.0.1", [b"unix"], "10.0.0.1"),
        # too long
        ("10.0.0.1", [b"10.0.0.2," * (MAX_BYTES // 9 + 1) + b"203.0.113.5"], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.5" + b",10.0.0.2" * MAX_HOPS], "10.0.0.2"),
    ],
)
def test_the_client_is_the_right_most_address_that_is_no_proxy_of_ours(peer: str, fields: list[bytes], client: str) -> None:
    assert PROXIES.client(peer, fields) == client


def test_who_comes_by_the_unix_socket_is_believed_if_that_is_said() -> None:
    assert Proxies(networks("unix")).client("unix", [b"203.0.113.5"]) == "203.0.113.5"
    assert Proxies(networks("unix")).client("10.0.0.1", [b"203.0.113.5"]) == "10.0.0.1"


@given(st.lists(st.binary(max_size=60), max_size=5))
def test_whatever_stands_in_the_header_an_untrusted_peer_stays_itself(fields: list[bytes]) -> None:
    assert PROXIES.client("198.51.100.1", fields) == "198.51.100.1"


@given(st.lists(st.binary(max_size=60), max_size=5), st.ip_addresses())
def test_what_the_client_sends_does_not_change_what_the_proxy_says(fields: list[bytes], real: object) -> None:
    said = Proxies(["10.0.0.1/32"])
    alone = said.client("10.0.0.1", [str(real).encode()])
    if alone != "10.0.0.1":
        assert said.client("10.0.0.1", [*fields, str(real).encode()][-5:]) == alone


@pytest.mark.parametrize(
    "value", ["", ",", "10.0.0.1/8", "host", "10.0.0.0/33", "unix:", ",".join(f"10.0.{i}.0/24" for i in range(257))]
)
def test_what_is_no_list_of_networks_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="a list of at most 256 networks"):
        networks(value)
