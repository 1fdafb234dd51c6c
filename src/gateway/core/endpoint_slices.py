"""The EndpointSlices of one Kubernetes service (discovery.k8s.io/v1), kept from lists and watch events, and what they say.

An endpoint is ready unless it says that it is not. If none is, those that terminate but still serve are used, as kube-proxy
does it. A pod that has both an IPv4 and an IPv6 address is one backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .sources import Endpoint


class Slices:
    """They come as the API has them, in JSON; ``port`` is a name or a number."""

    def __init__(self, port: str) -> None:
        self._port = port
        self._slices: dict[str, Mapping[str, Any]] = {}

    def replace(self, items: Iterable[Mapping[str, Any]]) -> None:
        """These are all. Raises KeyError or TypeError if they are not in the API's form; so do the others."""
        self._slices = {item["metadata"]["name"]: item for item in items}

    def change(self, kind: str, item: Mapping[str, Any]) -> None:
        """A watch event: ADDED, MODIFIED or DELETED."""
        name = item["metadata"]["name"]
        if kind == "DELETED":
            self._slices.pop(name, None)
        else:
            self._slices[name] = item

    def endpoints(self) -> list[Endpoint]:
        """Those that may get requests."""
        ready: dict[str, Endpoint] = {}
        serving: dict[str, Endpoint] = {}
        for who, endpoint, conditions in self._all():
            if conditions.get("ready") is not False:
                ready.setdefault(who, endpoint)
            elif conditions.get("serving") and conditions.get("terminating"):
                serving.setdefault(who, endpoint)
        return sorted((ready or serving).values())

    def _all(self) -> Iterator[tuple[str, Endpoint, Mapping[str, Any]]]:
        """Who each is, where, and its conditions; IPv4 comes first."""
        for family in ("IPv4", "IPv6"):
            for one in [one for one in self._slices.values() if one.get("addressType") == family]:
                port = self._port_of(one)
                for endpoint in one.get("endpoints") or () if port else ():
                    # The addresses of one endpoint are the same pod (API reference of v1: consumers take the first).
                    found = Endpoint(endpoint["addresses"][0], port or 0)
                    yield (endpoint.get("targetRef") or {}).get("uid") or str(found), found, endpoint.get("conditions") or {}

    def _port_of(self, one: Mapping[str, Any]) -> int | None:
        for port in one.get("ports") or ():
            if self._port in (port.get("name"), str(port.get("port"))) and port.get("protocol", "TCP") == "TCP":
                found: int | None = port.get("port")
                return found
        return None
