"""The GenAI conventions' histograms, counted from records: in plain additions, as each request pays for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from . import otel_names as names
from .histogram import Histogram
from .record import Record
from .spans import Attributes, Place, at, given

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


class Key(NamedTuple):
    """What the series of a histogram are told apart by; each comes from a bounded set."""

    operation: str
    model: str
    provider: str
    backend: str
    code: str


OVERFLOW: Final = Key("other", "other", "", "", "")


class Point(NamedTuple):
    """One series of a histogram, as it stood: ``counts`` has one more place than ``bounds``, as in `Histogram`."""

    attributes: Attributes
    counts: tuple[int, ...]
    total: float
    bounds: Sequence[float]


class Seen(NamedTuple):
    """A histogram with all its series."""

    name: str
    description: str
    unit: str
    points: list[Point]


class _Series:
    """Everything that is counted of requests with the same attributes."""

    def __init__(self) -> None:
        self.tokens = (Histogram(TOKENS), Histogram(TOKENS))
        self.operation = Histogram(SECONDS)
        self.request = Histogram(SECONDS)
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.per_token = Histogram(PER_TOKEN_SECONDS)


class GenAIMetrics:
    """``backends``: where each is."""

    def __init__(self, backends: Mapping[str, Place]) -> None:
        self._backends = backends
        self._series: dict[Key, _Series] = {}

    def count(self, record: Record, model: str, provider: str) -> None:
        """One request that has ended; ``model`` is a name out of a bounded set."""
        operation = names.OPERATIONS.get(record.route)
        if operation is None:
            return
        series = self._of(Key(operation, model, provider, record.backend, record.code))
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

    def _of(self, key: Key) -> _Series:
        found = self._series.get(key)
        if found is None:
            if len(self._series) >= MAX_SERIES:
                key = OVERFLOW
            found = self._series.setdefault(key, _Series())
        return found

    def forget_gone(self) -> None:
        """Backends that have no place any more are counted no more."""
        for key in [one for one in self._series if one.backend and one.backend not in self._backends]:
            del self._series[key]

    def seen(self) -> list[Seen]:
        """What was counted so far, which does not change any more."""
        found: dict[str, list[Point]] = {name: [] for name in _TEXTS}
        for key, series in self._series.items():
            attributes = self._attributes(key)
            for name, histogram, more in _histograms(series):
                if any(histogram.counts):
                    found[name].append(
                        Point({**attributes, **more}, tuple(histogram.counts), histogram.total, histogram.bounds)
                    )
        return [Seen(name, *_TEXTS[name], points) for name, points in found.items() if points]

    def _attributes(self, key: Key) -> Attributes:
        return given(
            {
                names.OPERATION: key.operation,
                names.PROVIDER: key.provider or None,
                names.REQUEST_MODEL: key.model or None,
                **at(key.backend, self._backends),
                names.ERROR_TYPE: key.code or None,
            }
        )


_TEXTS: Final = {
    names.TOKEN_USAGE: ("Tokens of a request.", "{token}"),
    names.OPERATION_DURATION: ("From a backend being asked for to the end of its answer.", "s"),
    names.REQUEST_DURATION: ("From the whole request in to its answer out.", "s"),
    names.FIRST_TOKEN: ("From the whole request in to the first token of a stream.", "s"),
    names.PER_TOKEN: ("Mean time between the tokens of one stream.", "s"),
}


def _histograms(series: _Series) -> Iterator[tuple[str, Histogram, Attributes]]:
    yield names.TOKEN_USAGE, series.tokens[0], {names.TOKEN_TYPE: "input"}
    yield names.TOKEN_USAGE, series.tokens[1], {names.TOKEN_TYPE: "output"}
    yield names.OPERATION_DURATION, series.operation, {}
    yield names.REQUEST_DURATION, series.request, {}
    yield names.FIRST_TOKEN, series.first_token, {}
    yield names.PER_TOKEN, series.per_token, {}
