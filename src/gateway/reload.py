"""Takes changed settings over while requests run: all of those that can be, or none if one is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from twisted.logger import Logger
from twisted.python.failure import Failure

from .core.changes import Change, Picture, changes, picture, taken_over
from .core.readers import SettingsError
from .core.settings import Settings
from .notify import Notify
from .process import StartError
from .watched import InThread, Reading

RESULTS: Final = ("applied", "unchanged", "refused")
SALT_BYTES: Final = 16

_log: Final = Logger("gateway.settings")


class Reload:
    """Reads the settings again when called; Prometheus collects how often, and with what result.

    ``read`` gives the new ones, checked, or raises `SettingsError` or `StartError`; ``apply`` makes them hold for requests that
    begin from then on, or raises the same and changes nothing; ``in_thread`` runs a function beside the reactor. ``generation``
    counts the settings that have held so far.
    """

    def __init__(
        self,
        settings: Settings,
        read: Callable[[], Settings],
        apply: Callable[[Settings], None],
        notify: Notify,
        in_thread: InThread,
    ) -> None:
        self.settings = settings
        self.generation = 1
        self._apply = apply
        self._notify = notify
        self._reading = Reading(in_thread, read, self._use, self._refused, notify.reloading, self._done)
        self._results = dict.fromkeys(RESULTS, 0)
        self._salt = os.urandom(SALT_BYTES)
        self._stopped = False

    def stop(self) -> None:
        """From now on nothing changes any more."""
        self._stopped = True
        self._reading.stop()

    def __call__(self) -> None:
        """Read them; once more if that is under way."""
        if not self._stopped:
            self._reading()

    def _use(self, wanted: Settings) -> None:
        found = changes(picture(self.settings, self._salt), picture(wanted, self._salt))
        later = [change for change in found if not change.live]
        now = [change for change in found if change.live]
        if now:
            settings = taken_over(self.settings, wanted)
            self._apply(settings)
            self.settings = settings
            self.generation += 1
        self._results["applied" if now else "unchanged"] += 1
        self._tell(now, later)

    def _tell(self, now: list[Change], later: list[Change]) -> None:
        for change in now:
            _log.info("settings: {change}", change=str(change))
        if later:
            names = ", ".join(change.name for change in later)
            _log.warn("settings that wait for a restart (SIGUSR2 loses no request): {names}", names=names)
        what = "holds" if now else "holds on: nothing that a reload takes over has changed"
        _log.info("settings: generation {generation} {what}", generation=self.generation, what=what)

    def _refused(self, failure: Failure) -> None:
        failure.trap(SettingsError, StartError)
        self._results["refused"] += 1
        _log.error(
            "settings: {problem}; generation {generation} holds on",
            problem=failure.getErrorMessage(),
            generation=self.generation,
        )

    def _done(self) -> None:
        if not self._stopped:
            self._notify.say("READY=1")

    def picture(self) -> dict[str, Any]:
        """The settings that hold, for whoever wants to compare others with them; secrets are fingerprints."""
        held: Picture = picture(self.settings, self._salt)
        return {"generation": self.generation, "salt": self._salt.hex(), "settings": held}

    def collect(self) -> Iterator[Metric]:
        """What Prometheus sees."""
        text = "Which settings hold: 1 those of the start, and one more for each reload that changed some."
        yield GaugeMetricFamily("gateway_settings_generation", text, self.generation)
        results = CounterMetricFamily("gateway_settings_reloads", "How often settings were read again.", labels=["result"])
        for result, count in self._results.items():
            results.add_metric([result], count)
        yield results
