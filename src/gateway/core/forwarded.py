"""Whose request it is, when it comes through proxies that say so in X-Forwarded-For.

Each proxy writes at the right end whom it got the request from; all to the left of that is hearsay. So the client is the
right-most address that is not of a proxy of ours, and is believed only as far as an unbroken row of those reaches. The
Forwarded header of RFC 7239 is not read: a proxy that writes the one passes the other on as a client has made it up.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from . import readers

MAX_BYTES: Final = 2048
MAX_HOPS: Final = 32
MAX_NETWORKS: Final = 256
REMEMBERED: Final = 1024
"""Addresses of which it is known whether they are a proxy's."""

UNIX: Final = "unix"
"""What a client is called that has come by a UNIX socket."""

_HOP: Final = re.compile(rb"(?:\[([0-9A-Fa-f:.]{2,45})\]|([0-9.]{7,15}))(?::[0-9]{1,5})?|([0-9A-Fa-f:.]{2,45})")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def networks(value: Any) -> tuple[str, ...]:
    """Addresses and networks with commas between them, and perhaps ``unix``."""
    found = [part.strip().lower() for part in readers.text(value).split(",") if part.strip()]
    try:
        made = [UNIX if part == UNIX else str(ipaddress.ip_network(part)) for part in found]
    except ValueError:
        made = []
    if not made or len(made) > MAX_NETWORKS:
        raise ValueError(f"a list of at most {MAX_NETWORKS} networks such as 10.0.0.0/8,192.0.2.7,unix")
    return tuple(dict.fromkeys(made))


class Proxies:
    """Those whose word is taken for who the client is: `networks`, and ``unix`` for whoever reaches the UNIX socket."""

    def __init__(self, trusted: Sequence[str]) -> None:
        self._unix = UNIX in trusted
        self._networks = [ipaddress.ip_network(one) for one in trusted if one != UNIX]
        self.trusts = lru_cache(REMEMBERED)(self._trusts)

    def _trusts(self, host: str) -> bool:
        if host == UNIX:
            return self._unix
        address = address_of(host)
        return address is not None and any(address in network for network in self._networks)

    def client(self, peer: str, forwarded_for: Sequence[bytes]) -> str:
        """The client's address; ``forwarded_for`` are the values of X-Forwarded-For in their order. What is garbage, and all
        to the left of it, counts for nothing, as does a header that is too long."""
        found = peer
        if not forwarded_for or not self.trusts(peer) or sum(map(len, forwarded_for)) > MAX_BYTES:
            return found
        hops = b",".join(forwarded_for).split(b",")
        for hop in reversed(hops[-MAX_HOPS:]):
            address = _hop(hop.strip())
            if address is None:
                break
            found = str(address)
            if not self.trusts(found):
                break
        return found


def _hop(text: bytes) -> Address | None:
    """An address, perhaps with a port."""
    match = _HOP.fullmatch(text)
    return address_of(next(filter(None, match.groups())).decode("ascii")) if match else None


def address_of(text: str) -> Address | None:
    """An address; of one that is IPv4 within IPv6, the IPv4 one."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
