from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.proxy_header import MAX_V1, MAX_V2, Told, read

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def v2(command: int, kind: int, block: bytes, version: int = 0x20) -> bytes:
    return SIGNATURE + bytes([version | command, kind]) + len(block).to_bytes(2, "big") + block


def addresses(source: str, destination: str = "", ports: tuple[int, int] = (1234, 443)) -> bytes:
    both = [ipaddress.ip_address(one).packed for one in (source, destination or source)]
    return b"".join(both) + b"".join(port.to_bytes(2, "big") for port in ports)


IPV4 = v2(1, 0x11, addresses("203.0.113.5"))

GOOD = [
    (b"PROXY TCP4 203.0.113.5 192.0.2.1 56324 443\r\n", "203.0.113.5", 56324),
    (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", "255.255.255.255", 65535),
    (b"PROXY TCP6 2001:DB8::5 ::1 0 443\r\n", "2001:db8::5", 0),
    (b"PROXY UNKNOWN\r\n", "", 0),
    (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", "", 0),
    (IPV4, "203.0.113.5", 1234),
    (v2(1, 0x21, addresses("2001:db8::5")), "2001:db8::5", 1234),
    (v2(1, 0x11, addresses("203.0.113.5") + b"\x04\x00\x02ab"), "203.0.113.5", 1234),  # with a TLV
    (v2(1, 0x11, addresses("203.0.113.5") + b"\xff" * 1000), "203.0.113.5", 1234),  # with what is none
    (v2(1, 0x00, b""), "", 0),
    (v2(1, 0x00, b"\x03\x00\x04abcd"), "", 0),
    (v2(1, 0x31, b"/a".ljust(108, b"\0") + b"/b".ljust(108, b"\0")), "", 0),
    (v2(1, 0x12, addresses("203.0.113.5")), "", 0),  # datagrams: not how this came
    (v2(0, 0x00, b""), "", 0),
    (v2(0, 0x11, addresses("203.0.113.5")), "", 0),  # LOCAL: the proxy's own, whatever it says
    (v2(0, 0xFF, b"garbage"), "", 0),
]


@pytest.mark.parametrize(("header", "host", "port"), GOOD)
def test_a_header_says_whose_the_connection_is(header: bytes, host: str, port: int) -> None:
    assert read(header) == read(header + b"GET / HTTP/1.1\r\n\r\n") == Told(len(header), host, port)


@pytest.mark.parametrize("header", [header for header, _, _ in GOOD])
def test_a_header_may_come_in_pieces(header: bytes) -> None:
    assert [read(header[:end]) for end in range(len(header))] == [None] * len(header)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"proxy TCP4 203.0.113.5 192.0.2.1 1 2\r\n",
        b"PROXY\r\n",
        b"PROXY  TCP4 203.0.113.5 192.0.2.1 1 2\r\n",
        b"PROXY TCP4 203.0.113.5 192.0.2.1 1 2\n",
        b"PROXY TCP4 203.0.113.5 192.0.2.1 1\r\n",
        b"PROXY TCP4 203.0.113.5 192.0.2.1 1 2 3\r\n",
        b"PROXY TCP4 203.0.113.5 192.0.2.1 01 2\r\n",
        b"PROXY TCP4 203.0.113.5 192.0.2.1 65536 2\r\n",
        b"PROXY TCP4 203.0.113.5 192.0.2.1 1 65536\r\n",
        b"PROXY TCP4 203.0.113.5 192.0.2.1 -1 2\r\n",
        b"PROXY TCP4 203.0.113.256 192.0.2.1 1 2\r\n",
        b"PROXY TCP4 203.0.113.05 192.0.2.1 1 2\r\n",
        b"PROXY TCP4 2001:db8::5 ::1 1 2\r\n",
        b"PROXY TCP6 203.0.113.5 192.0.2.1 1 2\r\n",
        b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n",
        b"PROXY UDP4 203.0.113.5 192.0.2.1 1 2\r\n",
        b"PROXY UNKNOWN" + b" " * MAX_V1,
        b"PROXY TCP4 " + b"1" * MAX_V1,
        SIGNATURE[:11] + b"X",
        v2(1, 0x11, addresses("203.0.113.5"), version=0x10),
        v2(2, 0x11, addresses("203.0.113.5")),
        v2(15, 0x11, addresses("203.0.113.5")),
        v2(1, 0x41, addresses("203.0.113.5")),
        v2(1, 0x13, addresses("203.0.113.5")),
        v2(1, 0x11, addresses("203.0.113.5")[:11]),
        v2(1, 0x21, addresses("203.0.113.5")),
        v2(1, 0x31, b"/a"),
        SIGNATURE + b"\x21\x11" + (MAX_V2 - 15).to_bytes(2, "big"),
    ],
)
def test_what_is_no_header_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read(data)


@given(
    st.binary(max_size=400), st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11", IPV4[:-3]])
)
def test_any_bytes_are_a_header_or_refused_or_too_few(data: bytes, begin: bytes) -> None:
    given = begin + data
    try:
        told = read(given)
    except ValueError:
        return
    if told is None:
        assert len(given) < MAX_V2
    else:
        assert 0 < told.length <= len(given)
        assert told == read(given[: told.length])
        assert not told.host or str(ipaddress.ip_address(told.host)) == told.host


@given(st.ip_addresses(), st.integers(0, 65535), st.binary(max_size=300))
def test_both_versions_say_what_was_put_in(address: ipaddress.IPv4Address, port: int, rest: bytes) -> None:
    kind = 0x11 if address.version == 4 else 0x21
    told = read(v2(1, kind, addresses(str(address), ports=(port, 1))) + rest)
    assert told is not None
    assert (told.host, told.port) == (str(address), port)
    line = f"PROXY TCP{address.version} {address} {address} {port} 1\r\n".encode()
    assert read(line + rest) == Told(len(line), str(address), port)
