"""How things stand right now: what /readyz answers, /metrics shows, and the scheduler goes by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

from .load import Load
from .look import Snapshot

State = Literal["healthy", "warming", "busy", "draining", "unhealthy", "config_error", "rate_limited"]
"""``warming``: not looked at yet, or loading its model. ``busy``: all slots taken, as it says itself. ``draining``: an
operator wants no new requests there. ``config_error``: no waiting helps, a setting must change."""

BreakerState = Literal["closed", "open", "half_open"]

IN_ORDER: Final = frozenset(["healthy", "busy"])


class BackendState(NamedTuple):
    """One backend as it is shown. ``since``: when it came into this state, seconds of the monotonic clock; ``models``
    None: it does not tell, so it may have any; ``slots`` and ``kv_tokens`` None: unknown; ``restarts``: how often it has
    come back as a new process, with empty caches; ``held``: requests of ours that it works on;
    ``opened``, ``half_opened``, ``closed``: how often its breaker came into that state."""

    name: str
    kind: str
    state: State
    reason: str
    since: float
    models: frozenset[str] | None = None
    slots: int | None = None
    kv_tokens: int | None = None
    load: Load | None = None
    breaker: BreakerState = "closed"
    held: int = 0
    restarts: int = 0
    opened: int = 0
    half_opened: int = 0
    closed: int = 0


class Offer(NamedTuple):
    """One backend as the scheduler needs it: what may be sent there now. ``models`` None: any. ``slots`` None: nobody
    knows. ``restarts`` that has grown: its caches are empty."""

    name: str
    accepting: bool
    models: frozenset[str] | None
    slots: int | None
    kv_tokens: int | None
    weight: float
    device: str
    cost_factor: float
    load: Load | None
    restarts: int


class LimitsState(NamedTuple):
    """How limits are counted. ``keys``: accounts in memory; ``limited``: requests refused by each limit; ``redis``: whether it
    can be asked, None without one; ``without_redis``: what was decided while it could not; ``unsettled``: what it has yet to be
    told, and ``lost`` what it never will be."""

    keys: int
    limited: Mapping[str, int]
    redis: bool | None = None
    without_redis: Mapping[str, int] = {}
    unsettled: int = 0
    lost: int = 0


NOTHING_COUNTED: Final = LimitsState(0, {})


class Status(NamedTuple):
    """The whole gateway. ``scheduling``: the queue and what the backends hold; ``refused_connections``: those closed at once
    since the start, as there were too many; ``unanswered``: sources of backends that have told nothing since the start."""

    scheduling: Snapshot
    connections: int
    refused_connections: int
    draining: bool
    backends: list[BackendState]
    limits: LimitsState = NOTHING_COUNTED
    unanswered: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """There is a backend in order, and the sources have told of theirs."""
        return not self.unanswered and any(backend.state in IN_ORDER for backend in self.backends)
