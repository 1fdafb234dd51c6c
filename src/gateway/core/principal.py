"""Who sends a request, and what they may: made from an API key or a JWT, read by whatever divides capacity."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Final, Literal

import msgspec

from .tickets import PRIORITIES

MAX_NAME: Final = 256
"""Characters of a model's name; what was found of a longer one is not kept."""


class Budget(msgspec.Struct, frozen=True):
    """At most ``amount`` per calendar ``period`` (UTC), in ``unit``: tokens, or money as the price table counts it."""

    amount: float
    unit: Literal["tokens", "money"] = "tokens"
    period: Literal["day", "month"] = "month"


class Limits(msgspec.Struct, frozen=True):
    """What one key may use. None is no limit; a minute's worth may be used at once (it is the bucket's size)."""

    requests: int | None = None
    """Per minute."""
    tokens: int | None = None
    """Per minute, prompt and answer."""
    concurrency: int | None = None
    """Requests at the same time."""
    budget: Budget | None = None


NO_LIMITS = Limits()


class Principal(msgspec.Struct, frozen=True):
    """Whoever sends a request. ``key`` is what limits are counted by, and ``id`` names the key or token itself; neither is a
    secret, and they differ once a key has been rotated, since its limits go on. ``tenant`` is whom fairness goes by, with
    ``weight`` as its share. ``models`` are globs, None any; ``priority`` the most urgent place in `PRIORITIES`; ``expires``,
    in Unix seconds, when all of this ends."""

    key: str = ""
    id: str = ""
    tenant: str = ""
    models: tuple[str, ...] | None = None
    priority: int = PRIORITIES.index("interactive")
    weight: float = 1.0
    limits: Limits = NO_LIMITS
    admin: bool = False
    expires: float = math.inf

    def may_use(self, model: str) -> bool:
        """Whether it may ask for this model; globs know case."""
        if self.models is None:
            return True
        return (_fits if len(model) <= MAX_NAME else _fits.__wrapped__)(model, self.models)


@lru_cache(maxsize=4096)
def _fits(model: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(model, glob) for glob in globs)


ANYBODY = Principal()
"""Everyone, where no keys are configured."""
