"""What differs between two sets of settings, and what of it a gateway can take over without being started again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, Final, NamedTuple

import msgspec

from .settings import TABLE, Settings

_NAMES: Final = """
    backends models prices keys jwt_key jwt_key_file jwt_jwks_url jwt_issuer jwt_audience jwt_leeway jwt_algorithms jwt_claims
    metrics_open limit_requests limit_tokens limit_concurrency backend_url backend_kind backend_api_key stream_usage
    connect_timeout first_byte_timeout total_timeout queue_timeout queue_comments max_attempts retry_budget hedge validation
    count_tokens grace drain_settle
"""
LIVE: Final = frozenset(_NAMES.split())
"""Settings that a reload takes over; the others wait for a restart."""

_TOLD_ELSEWHERE: Final = frozenset(["config", "backend_url", "backend_kind", "backend_api_key", "stream_usage"])
_SECRET: Final = frozenset(row.name for row in TABLE if row.secret)
_MOST_SHOWN: Final = 200

Picture = dict[str, Any]
"""Settings as JSON has them: values by name, and tables by name within ``backends``, ``models`` and ``prices``."""


class Change(NamedTuple):
    """One value, before and after; None: it is not there. ``live``: a reload takes it over."""

    name: str
    before: Any
    after: Any
    live: bool

    def __str__(self) -> str:
        if self.before is None:
            return f"{self.name}: new" if isinstance(self.after, dict) else f"{self.name}: {_shown(self.after)}"
        if self.after is None:
            return f"{self.name}: taken away"
        return f"{self.name}: {_shown(self.before)} -> {_shown(self.after)}"


def picture(settings: Settings, salt: bytes) -> Picture:
    """All of them; of a secret there is a fingerprint, which tells those apart that were made with the same salt."""
    found: Picture = {
        row.name: _value(getattr(settings, row.name), salt if row.name in _SECRET else None)
        for row in TABLE
        if row.name not in _TOLD_ELSEWHERE
    }
    found["backends"] = {one.name: _backend(one, salt) for one in settings.backends}
    found["models"] = {name: _value(one._asdict()) for name, one in settings.models.items()}
    found["prices"] = {name: _value(one) for name, one in settings.prices.items()}
    return found


def _backend(one: Any, salt: bytes) -> Picture:
    fields = dataclasses.asdict(one)
    return {name: _value(value, salt if name == "api_key" else None) for name, value in fields.items()}


def _value(value: Any, salt: bytes | None = None) -> Any:
    if value is None:
        return None
    if salt is not None:
        return "secret " + blake2b(repr(value).encode(), key=salt, digest_size=4).hexdigest()
    return msgspec.json.decode(msgspec.json.encode(value))


def changes(before: Picture, after: Picture) -> list[Change]:
    """By name, of a table with its own: ``backends.a100.slots``."""
    return list(_changes(before, after, "", None))


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], within: str, live: bool | None) -> Iterator[Change]:
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        takes = name in LIVE if live is None else live
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{within}{name}.", takes)
        else:
            yield Change(f"{within}{name}", old, new, takes)


def taken_over(before: Settings, after: Settings) -> Settings:
    """What a reload makes of them: the live ones as they are now, the others as they were."""
    return dataclasses.replace(before, **{name: getattr(after, name) for name in LIVE})


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
