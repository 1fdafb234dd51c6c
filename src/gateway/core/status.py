"""How things stand right now: what /readyz answers and /metrics shows."""

from __future__ import annotations

from typing import Literal, NamedTuple

State = Literal["warming", "healthy", "unhealthy"]


class BackendState(NamedTuple):
    """One backend, as the last probe left it."""

    name: str
    kind: str
    state: State
    models: frozenset[str]
    reason: str


class Status(NamedTuple):
    """The whole gateway. ``inflight``: requests that each backend holds, by its name;
    ``refused_connections``: those closed at once since the start, as there were too many."""

    inflight: dict[str, int]
    connections: int
    refused_connections: int
    draining: bool
    backends: list[BackendState]

    @property
    def ready(self) -> bool:
        """There is a backend that answered its last probe."""
        return any(backend.state == "healthy" for backend in self.backends)
