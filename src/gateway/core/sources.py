"""Backends that are found instead of named: a URL such as ``dns+http://models.example:8000`` stands for as many as there are.

=====================================  ==================================================================
``dns+http://models.example:8000``     each address of the name
``srv+http://_http._tcp.my.example``   each address of each target of the SRV record (RFC 2782), at its port
``k8s+http://service.namespace:port``  each ready endpoint of the Kubernetes service; the port by name or number
=====================================  ==================================================================

``https`` for ``http`` works alike. Certificates are those of the name in the URL, never of an address: ``models.example``,
``my.example`` and ``service.namespace.svc``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from .backend_settings import BackendSettings

PORTS: Final = {"http": 80, "https": 443}

_EXPECTED: Final = {
    "dns": "a URL such as dns+http://models.example:8000",
    "srv": "a URL such as srv+http://_http._tcp.models.example, whose record has the port",
    "k8s": "a URL such as k8s+http://service.namespace:http, with the port's name or number",
}
_URL: Final = re.compile(r"(dns|srv|k8s)\+(https?)://([^/:?#@]+)(?::([A-Za-z0-9-]{1,63}))?(/[!-~]*)?")
_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})")


class SourceURL(NamedTuple):
    """Such a URL. ``host`` is what is looked up, ``name`` whose certificate a backend has to have."""

    kind: Literal["dns", "srv", "k8s"]
    scheme: str
    host: str
    port: str
    path: str
    name: str


class Endpoint(NamedTuple):
    """One backend that was found: a literal address, a port, and its share of the work beside the others."""

    address: str
    port: int
    weight: float = 1.0

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def is_source(url: str) -> bool:
    """It stands for backends that are to be found."""
    return "+" in url.partition("://")[0]


def read_url(url: str) -> SourceURL:
    """Raises ValueError with what is expected."""
    found = _URL.fullmatch(url)
    kind = url.partition("+")[0]
    if found is None:
        raise ValueError(_EXPECTED.get(kind, "a URL that begins with http, https, dns+http, srv+http or k8s+http"))
    host, port, path = found[3].removesuffix(".").lower(), found[4] or "", found[5] or ""
    labels = host.split(".")
    fine = len(host) <= 253 and all(map(_LABEL.fullmatch, labels)) and not ("?" in path or "#" in path)
    if kind == "dns":
        port = port or str(PORTS[found[2]])
        fine, name = fine and _is_port(port) and not labels[-1].isdigit(), host
    elif kind == "srv":
        name = ".".join(label for label in labels if not label.startswith("_"))
        fine = fine and not port and labels[0].startswith("_") and bool(name)
    else:
        fine, name = fine and len(labels) == 2 and bool(port) and (not port.isdigit() or _is_port(port)), f"{host}.svc"
    if not fine:
        raise ValueError(_EXPECTED[kind])
    path = path.rstrip("/").removesuffix("/v1").rstrip("/")
    return SourceURL(kind, found[2], host, port, path, name)  # type: ignore[arg-type]  # the pattern has the three kinds


def _is_port(port: str) -> bool:
    return port.isdigit() and 0 < int(port) < 65536


def written(url: SourceURL) -> str:
    """As it stands in the settings."""
    port = f":{url.port}" if url.port and not (url.kind == "dns" and url.port == str(PORTS[url.scheme])) else ""
    path = f"{url.path}/v1" if url.path.endswith("/v1") else url.path  # one of them is taken away when it is read again
    return f"{url.kind}+{url.scheme}://{url.host}{port}{path}"


def members(row: BackendSettings, found: Iterable[Endpoint]) -> list[BackendSettings]:
    """The backends that the row's source has found: each is as the row says, with a name, a URL and an address of its own."""
    url = read_url(row.url)
    return [
        dataclasses.replace(
            row,
            name=f"{row.name}@{one}",
            url=f"{url.scheme}://{url.name}:{one.port}{url.path}",
            address=one.address,
            weight=row.weight * one.weight,
        )
        for one in found
    ]
