"""The backends that are found while the gateway runs, by the sources among those of the settings; see docs/discovery.md.

A source tells what it has found whenever it looks, or that it could not. What it had found stays until it finds something else:
that a name server or an API server is away is no reason to send no more requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList
from twisted.logger import Logger

from .core import sources
from .core.backend_settings import BackendSettings
from .core.sources import Endpoint

PATIENCE: Final = 15.0
"""Seconds after the start within which each source has to have answered before the gateway counts as ready."""

LONGEST_WAIT: Final = 30.0
"""Seconds until a look that failed is tried again, at most."""

_log: Final = Logger("gateway.discovery")


def wait_after(failures: int, first: float, chance: float) -> float:
    """Seconds until a source that has failed so often before looks again: twice as long each time, from ``first`` on, and up to
    half of that less, as ``chance`` (0 to 1) says, so that gateways do not march in step."""
    return min(first * 2.0 ** min(failures, 10), LONGEST_WAIT) * (0.5 + 0.5 * chance)


class Source(Protocol):
    """Looks for backends, again and again."""

    def start(self) -> None: ...

    def stop(self) -> Deferred[None]:
        """Nothing is told any more. Fires when it has ended."""


Found = Callable[[Sequence[Endpoint]], object]
Failed = Callable[[str], object]
Make = Callable[[str, Found, Failed], Source]
"""Makes the source of a URL, which is to call one of the two whenever it has looked. Raises `SettingsError`."""


class _Watched:
    """One source, and what it has found; None: nothing yet."""

    def __init__(self, row: BackendSettings, make: Make, changed: Callable[[], object]) -> None:
        self.row = row
        self.found: tuple[Endpoint, ...] | None = None
        self.failures = 0
        self._problem = ""
        self._changed = changed
        self.source = make(row.url, self._tell, self._fail)

    @property
    def is_new(self) -> bool:
        """It may be about to find some."""
        return self.found is None and not self._problem

    def _tell(self, found: Sequence[Endpoint]) -> None:
        if self._problem:
            self._problem = ""
            _log.info("{source} answers again", source=self.row.name)
        before, self.found = self.found, tuple(sorted(set(found)))
        if before != self.found:
            added, removed = set(self.found) - set(before or ()), set(before or ()) - set(self.found)
            text = "{source} has found {count} backends: {added} new, {removed} gone"
            _log.info(text, source=self.row.name, count=len(self.found), added=_listed(added), removed=_listed(removed))
            self._changed()

    def _fail(self, why: str) -> None:
        self.failures += 1
        if self._problem:
            return
        self._problem = why
        text = "{source} could not be looked up: {why}; the {count} backends found before stay"
        _log.warn(text, source=self.row.name, why=why, count=len(self.found or ()))
        if self.found is None:
            self._changed()


def _listed(found: Iterable[Endpoint]) -> str:
    return ", ".join(map(str, sorted(found))) or "none"


class Discovery(Service):
    """All sources. ``now`` gives seconds of the monotonic clock."""

    name = "discovery"

    def __init__(self, make: Make, now: Callable[[], float]) -> None:
        self._make = make
        self._now = now
        self._watched: dict[str, _Watched] = {}
        self._changed: Callable[[], object] = lambda: None
        self._started = now()
        self._complete = False

    def watch(self, changed: Callable[[], object]) -> None:
        """Calls it when a source has found others than before, or has failed before it has found any."""
        self._changed = changed

    def use(self, wanted: Iterable[BackendSettings]) -> None:
        """These are the sources from now on; a source whose URL stays keeps what it has found. Raises `SettingsError`, and
        then nothing has changed."""
        rows = {row.name: row for row in wanted if sources.is_source(row.url)}
        new = {name: _Watched(row, self._make, self._told) for name, row in rows.items() if not self._has(row)}
        for name in [name for name in self._watched if name not in rows or name in new]:
            self._watched.pop(name).source.stop()
        self._watched |= new
        for name, row in rows.items():
            self._watched[name].row = row
        if self.running:
            for watched in new.values():
                watched.source.start()

    def _has(self, row: BackendSettings) -> bool:
        known = self._watched.get(row.name)
        return known is not None and known.row.url == row.url

    def _told(self) -> None:
        self._changed()

    def members(self, wanted: Iterable[BackendSettings]) -> list[BackendSettings]:
        """The backends among these, and those that the sources among these have found."""
        found = []
        for row in wanted:
            watched = self._watched.get(row.name)
            found += [row] if watched is None else sources.members(row, watched.found or ())
        return found

    def coming(self) -> list[BackendSettings]:
        """The sources that may be about to find backends for the first time."""
        return [watched.row for watched in self._watched.values() if watched.is_new]

    def empty(self) -> list[BackendSettings]:
        """The sources without any backend."""
        return [watched.row for watched in self._watched.values() if not watched.found]

    def unanswered(self) -> tuple[str, ...]:
        """The sources that have told nothing yet since the start. Once none is left, or `PATIENCE` is over, that is past."""
        if not self._complete:
            missing = tuple([name for name, watched in self._watched.items() if watched.found is None])
            if missing and self._now() - self._started < PATIENCE:
                return missing
            self._complete = True
        return ()

    def collect(self) -> Iterator[Metric]:
        """What Prometheus sees of it."""
        backends = GaugeMetricFamily("gateway_discovery_backends", "Backends that a source has found.", labels=["source"])
        failures = CounterMetricFamily("gateway_discovery_failures", "Looks that found out nothing.", labels=["source"])
        for name, watched in self._watched.items():
            backends.add_metric([name], len(watched.found or ()))
            failures.add_metric([name], watched.failures)
        yield from (backends, failures)

    def startService(self) -> None:
        super().startService()
        self._started = self._now()
        for watched in list(self._watched.values()):
            watched.source.start()

    def stopService(self) -> Deferred[None]:
        """Fires when all of them have ended."""
        super().stopService()
        ended: Deferred[None] = Deferred()
        DeferredList([watched.source.stop() for watched in self._watched.values()]).addCallback(lambda _: ended.callback(None))
        return ended
