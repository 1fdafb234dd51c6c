"""The header in front of a connection in which a proxy says whose it is: HAProxy's PROXY protocol, versions 1 and 2.

Source: proxy-protocol.txt of HAProxy, sections 2.1 and 2.2. What follows the addresses (TLVs) is skipped.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, NamedTuple

MAX_V1: Final = 107
MAX_V2: Final = 16 * 1024
"""The format allows four times as much; some senders put a client's certificate there."""

_V2: Final = b"\r\n\r\n\0\r\nQUIT\n"
_V1: Final = b"PROXY "
_V1_LINE: Final = re.compile(
    rb"PROXY (TCP[46]) ([0-9A-Fa-f:.]{2,45}) ([0-9A-Fa-f:.]{2,45}) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})\r\n"
)
_V1_UNKNOWN: Final = re.compile(rb"PROXY UNKNOWN(?: [^\r\n]*)?\r\n")
_HEAD: Final = 16
_ADDRESSES: Final = {0x10: (12, 4), 0x20: (36, 16), 0x30: (216, 0)}
"""Of AF_INET, AF_INET6 and AF_UNIX: bytes of both addresses and ports, and of one address."""


class Told(NamedTuple):
    """A header of ``length`` bytes; ``host`` is whose the connection is, empty if it is the proxy's own (a health check, say)
    or of a kind that has no address."""

    length: int
    host: str = ""
    port: int = 0


def read(data: bytes) -> Told | None:
    """What the header at the beginning says; None if there has to come more. Raises ValueError if it is none."""
    if data.startswith(_V2):
        return _read_v2(data)
    if data.startswith(_V1):
        return _read_v1(data)
    if not _V2.startswith(data) and not _V1.startswith(data):
        raise ValueError("no PROXY header")
    return None


def _read_v1(data: bytes) -> Told | None:
    end = data.find(b"\n", 0, MAX_V1)
    if end < 0:
        if len(data) >= MAX_V1:
            raise ValueError(f"a line of more than {MAX_V1} bytes")
        return None
    line = data[: end + 1]
    if _V1_UNKNOWN.fullmatch(line):
        return Told(len(line))
    match = _V1_LINE.fullmatch(line)
    if match is None:
        raise ValueError("a line that is no PROXY header of version 1")
    kind = ipaddress.IPv4Address if match[1] == b"TCP4" else ipaddress.IPv6Address
    source, _ = (str(kind(match[part].decode("ascii"))) for part in (2, 3))
    ports = int(match[4]), int(match[5])
    if max(ports) > 65535:
        raise ValueError("a port over 65535")
    return Told(len(line), source, ports[0])


def _read_v2(data: bytes) -> Told | None:
    if len(data) < _HEAD:
        return None
    version, kind, size = data[12], data[13], int.from_bytes(data[14:16], "big")
    if version not in (0x20, 0x21):
        raise ValueError("another version than 2, or an unknown command")
    if size > MAX_V2 - _HEAD:
        raise ValueError(f"a header of more than {MAX_V2} bytes")
    whole = _HEAD + size
    if version == 0x20:  # LOCAL: whatever else it says is to be skipped
        return Told(whole) if len(data) >= whole else None
    family, protocol = kind & 0xF0, kind & 0x0F
    if family > 0x30 or protocol > 2:
        raise ValueError("an unknown address family or protocol")
    least, length = _ADDRESSES.get(family, (0, 0))
    if size < least:
        raise ValueError("a header that is too short for its addresses")
    if len(data) < whole:
        return None
    if not length or protocol != 1:
        return Told(whole)
    source = ipaddress.ip_address(data[_HEAD : _HEAD + length])
    ports = _HEAD + 2 * length
    return Told(whole, str(source), int.from_bytes(data[ports : ports + 2], "big"))
