"""The GenAI conventions' histograms, counted from records and encoded for OTLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from . import otel_names as names
from . import otlp
from .histogram import Histogram
from .otlp import Value
from .record import Record
from .spans import Place

MAX_SERIES: Final = 2000
"""Sets of attributes that are counted by themselves; those beyond are counted as one."""

SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68)
FIRST_TOKEN_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0, 120.0, 300.0),
)
PER_TOKEN_SECONDS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS: Final = tuple(4**power for power in range(14))
"""The conventions' buckets; those of seconds reach further, as local models are slow."""


class Attributes(NamedTuple):
    """What the series of a histogram are told apart by; each comes from a bounded set."""

    operation: str
    model: str
    provider: str
    backend: str
    code: str


OVERFLOW: Final = Attributes("other", "other", "", "", "")


class _Series:
    """Everything that is counted of requests with the same attributes."""

    def __init__(self) -> None:
        self.tokens = (Histogram(TOKENS), Histogram(TOKENS))
        self.operation = Histogram(SECONDS)
        self.request = Histogram(SECONDS)
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.per_token = Histogram(PER_TOKEN_SECONDS)


class GenAIMetrics:
    """Counts from ``started`` on, in seconds since 1970. ``backends``: where each is."""

    def __init__(self, started: float, backends: Mapping[str, Place]) -> None:
        self._started = int(started * 1e9)
        self._backends = backends
        self._series: dict[Attributes, _Series] = {}

    def count(self, record: Record, model: str, provider: str) -> None:
        """One request that has ended; ``model`` is a name out of a bounded set."""
        operation = names.OPERATIONS.get(record.route)
        if operation is None:
            return
        series = self._of(Attributes(operation, model, provider, record.backend, record.code))
        series.request.observe(record.ended - record.started)
        if not record.tries:
            return
        series.operation.observe(record.ended - record.tries[0].asked)
        used = record.usage
        if used.prompt_tokens:
            series.tokens[0].observe(used.prompt_tokens)
        if used.completion_tokens:
            series.tokens[1].observe(used.completion_tokens)
        if record.first_token is not None:
            series.first_token.observe(record.first_token - record.started)
            if record.last_token is not None and used.completion_tokens > 1:
                series.per_token.observe((record.last_token - record.first_token) / (used.completion_tokens - 1))

    def _of(self, attributes: Attributes) -> _Series:
        found = self._series.get(attributes)
        if found is None:
            if len(self._series) >= MAX_SERIES:
                attributes = OVERFLOW
            found = self._series.setdefault(attributes, _Series())
        return found

    def encoded(self, now: float) -> list[bytes]:
        """The elements of a metrics request, at a time in seconds since 1970."""
        end = int(now * 1e9)
        found: dict[str, list[bytes]] = {name: [] for name in _TEXTS}
        for attributes, series in self._series.items():
            values = self._values(attributes)
            for name, seen, more in _seen(series):
                if any(seen.counts):
                    point = otlp.point(self._started, end, seen.counts, seen.total, seen.bounds, {**values, **more})
                    found[name].append(point)
        return [otlp.histogram(name, *_TEXTS[name], points) for name, points in found.items() if points]

    def _values(self, attributes: Attributes) -> dict[str, Value | None]:
        place = self._backends.get(attributes.backend)
        return {
            names.OPERATION: attributes.operation,
            names.PROVIDER: attributes.provider or None,
            names.REQUEST_MODEL: attributes.model or None,
            names.SERVER_ADDRESS: place.host if place else None,
            names.SERVER_PORT: place.port if place else None,
            names.BACKEND: attributes.backend or None,
            names.ERROR_TYPE: attributes.code or None,
        }


_TEXTS: Final = {
    names.TOKEN_USAGE: ("Tokens of a request.", "{token}"),
    names.OPERATION_DURATION: ("From a backend being asked for to the end of its answer.", "s"),
    names.REQUEST_DURATION: ("From the whole request in to its answer out.", "s"),
    names.FIRST_TOKEN: ("From the whole request in to the first token of a stream.", "s"),
    names.PER_TOKEN: ("Mean time between the tokens of one stream.", "s"),
}


def _seen(series: _Series) -> list[tuple[str, Histogram, Mapping[str, Value]]]:
    tokens = [
        (names.TOKEN_USAGE, seen, {names.TOKEN_TYPE: kind})
        for kind, seen in zip(("input", "output"), series.tokens, strict=True)
    ]
    return [
        *tokens,
        (names.OPERATION_DURATION, series.operation, {}),
        (names.REQUEST_DURATION, series.request, {}),
        (names.FIRST_TOKEN, series.first_token, {}),
        (names.PER_TOKEN, series.per_token, {}),
    ]
