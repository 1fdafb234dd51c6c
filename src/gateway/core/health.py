"""What becomes of one backend by what its probes report, by how requests to it end, and by what an operator wants.

Events come in with the time, `state` and `offer` say how things stand. `offers` looks at all backends together:
when nothing that is in order serves a model, those that are not are offered too (panic, as Envoy calls it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

from .backend_settings import BackendSettings
from .breaker import Breaker
from .concurrency import ConcurrencyLimit
from .errors import BACKENDS_DOING
from .load import fresh
from .ranges import Window
from .reports import Report, window_of
from .status import BackendState, Offer, State

SLOT_KINDS: Final = frozenset(["llamacpp", "vllm", "sglang", "tgi"])
"""Servers of one model: another list of models, or another number of slots, is another process."""


class Rules(NamedTuple):
    """The settings of the same names; seconds."""

    probe_interval: float
    probe_up: int
    probe_down: int
    breaker_failures: int
    breaker_open: float
    slow_first_byte: float
    adaptive_concurrency: bool


class Health:
    """One backend."""

    def __init__(self, own: BackendSettings, rules: Rules, now: float) -> None:
        self.name = own.name
        self.report = Report("openai" if own.kind == "auto" else own.kind)
        self.held = 0
        self.draining = False
        self.leaving = False
        """It is no longer among the backends, and ends what it has."""
        self._own = own
        self._rules = rules
        self.breaker = Breaker(rules.breaker_failures, rules.breaker_open)
        self._limit = ConcurrencyLimit()
        self._probed: tuple[State, str] = ("warming", "not yet probed")
        self._good = self._bad = 0
        self._seen_up = False
        self._was_away = False
        self._restarts = 0
        self._limited_until = -math.inf
        self._last_failure = ""
        self._state: State = "warming"
        self._since = now

    def use(self, own: BackendSettings) -> None:
        """It has other settings from now on; what is known of it stays."""
        self._own = own

    # --- what happens

    def reported(self, report: Report, now: float) -> None:
        """A probe was answered."""
        before, self.report = self.report, _keeping(self.report, report)
        self._bad = 0
        if report.state in ("warming", "config_error"):
            self._good = 0
            self._was_away |= report.state == "warming"
            self._probed = (report.state, report.reason)
            return
        if report.state == "rate_limited":
            self._limited_until = now + report.retry_after
        self._good += 1
        if self._seen_up and (self._was_away or _another_process(before, self.report)):
            self._restarted()
        self._was_away = False
        if not self._seen_up or self._good >= self._rules.probe_up:
            self._probed = ("healthy", "")
            self._seen_up = True

    def unreachable(self, why: str, *, gone: bool) -> None:
        """A probe failed; ``gone``: there was nobody, so who comes back is a new process."""
        self._was_away |= gone
        self._good = 0
        self._bad += 1
        if self._probed[0] != "healthy" or self._bad >= self._rules.probe_down:
            self._probed = ("unhealthy", why)

    def _restarted(self) -> None:
        self._restarts += 1
        self.breaker.reset()
        self._limit = ConcurrencyLimit()

    def sent(self, now: float) -> int:
        """A request goes there; returns the breaker's era, which its end is told with."""
        self.held += 1
        breaker = self.breaker
        return breaker.era if breaker.until is None else breaker.sent(now)

    def first_token(self, seconds: float, expected: float) -> None:
        """A request had its first token after ``seconds``; an idle backend would take ``expected``, in any unit."""
        if self._adapts():
            self._limit.observe(seconds, seconds / max(expected, 1e-9), self.held)

    def succeeded(self, era: int, first_byte: float, now: float) -> None:
        """A request was answered, with the first byte after so many seconds."""
        self.held -= 1
        slow = self._rules.slow_first_byte
        if slow and first_byte > slow:
            self._held_against(era, f"a first byte after {first_byte:.1f} s", now)
        elif self.breaker.row or self.breaker.until is not None:  # else it has nothing to learn
            self.breaker.succeeded(era)

    def failed(self, era: int, code: str, now: float) -> None:
        """A request failed, with a code of `core.errors`; what is not the backend's doing counts as cancelled."""
        if code not in BACKENDS_DOING:
            self.cancelled(era)
            return
        self.held -= 1
        self._held_against(era, code, now)

    def _held_against(self, era: int, why: str, now: float) -> None:
        self._last_failure = why
        self.breaker.failed(era, now)

    def cancelled(self, era: int) -> None:
        """A request ended without a word about the backend."""
        self.held -= 1
        self.breaker.cancelled(era)

    def rate_limited(self, era: int, seconds: float, now: float) -> None:
        """A request got a 429, which asks for so much patience."""
        self.held -= 1
        self.breaker.succeeded(era)
        self._limited_until = max(self._limited_until, now + seconds)

    # --- how things stand

    def changes_at(self, now: float) -> float:
        """When something changes by the passing of time alone; infinity if nothing does."""
        return min([when for when in (self._limited_until, self.breaker.reopens_at()) if when > now], default=math.inf)

    def mark(self) -> tuple[object, ...]:
        """Two marks differ if a request's sending or end has changed what may be sent."""
        breaker = self.breaker
        held = 0 if breaker.until is None else self.held  # half-open it offers one more than it holds
        return breaker.changes, self._limit.value, self._limited_until, held

    def state(self, now: float) -> BackendState:
        """As it is shown."""
        state, reason = self._judged(now)
        if state != self._state:
            self._state, self._since = state, now
        report = self.report
        return BackendState(
            self.name,
            report.kind,
            state,
            reason,
            self._since,
            self.models,
            self._slots_of_its_own(),
            report.kv_tokens,
            fresh(report.load, now, self._rules.probe_interval),
            self.breaker.state(now),
            self.held,
            self._restarts,
            self.breaker.opened,
            self.breaker.half_opened,
            self.breaker.closed,
        )

    def _judged(self, now: float) -> tuple[State, str]:
        if self.leaving:
            return "draining", "it is no longer among the backends"
        if self.draining:
            return "draining", "by an operator"
        if self._probed[0] != "healthy":
            return self._probed
        if now < self._limited_until:
            return "rate_limited", f"it asks to wait {self._limited_until - now:.1f} s"
        if self.breaker.state(now) != "closed":
            return "unhealthy", f"requests failed, the last with {self._last_failure}"
        return ("busy", "all its slots are taken") if self._is_busy(now) else ("healthy", "")

    def _is_busy(self, now: float) -> bool:
        load, slots = fresh(self.report.load, now, self._rules.probe_interval), self._slots_of_its_own()
        return load is not None and slots is not None and load.running >= slots

    @property
    def models(self) -> frozenset[str] | None:
        """The ids of its models, as it is told or has told; None: it may have any."""
        if self._own.models:
            return frozenset(self._own.models)
        listed = self.report.models
        return None if listed is None else frozenset([entry["id"] for entry in listed])

    @property
    def takes(self) -> frozenset[str] | None:
        """The models that requests may ask it for, their aliases too; None: any. An echo is as good as any model."""
        models = self.models
        if self.report.kind == "echo" or models is None:
            return None
        aliases = [alias for entry in self.report.models or () if entry["id"] in models for alias in _aliases(entry)]
        return models.union(aliases) if aliases else models

    def windows(self) -> dict[str, Window]:
        """The window of each model that it tells one of, by all its names."""
        found: dict[str, Window] = {}
        for entry in self.report.models or ():
            tokens = window_of(entry) or self.report.context
            if tokens is not None:
                window = Window(tokens, whole=self.report.kind in ("vllm", "sglang"))
                found |= dict.fromkeys([entry["id"], *_aliases(entry)], window)
        return found

    @property
    def warming(self) -> bool:
        return self._probed[0] == "warming" and not self.draining

    def entries(self) -> list[dict[str, Any]]:
        """Its models as ``/v1/models`` lists them."""
        listed = {entry["id"]: entry for entry in self.report.models or ()}
        wanted = self._own.models or listed
        return [listed.get(id) or {"id": id, "object": "model", "created": 0, "owned_by": self.name} for id in wanted]

    def _slots_of_its_own(self) -> int | None:
        return self._own.slots or self.report.slots

    def _slots(self, now: float) -> int | None:
        if self.breaker.state(now) == "half_open":
            return self.held + 1
        return self._limit.value if self._adapts() else self._slots_of_its_own()

    def _adapts(self) -> bool:
        """Neither slots nor load are told, so the limit is found out."""
        return self._rules.adaptive_concurrency and self.report.load is None and self._slots_of_its_own() is None

    def offer(self, now: float) -> Offer:
        """As the scheduler needs it. A half-open breaker offers one slot more than is held."""
        own, report = self._own, self.report
        in_order = not self.draining and self._probed[0] == "healthy" and now >= self._limited_until
        load = fresh(report.load, now, self._rules.probe_interval)
        return Offer(
            self.name,
            in_order and self.breaker.allows(now),
            self.takes,
            self._slots(now),
            report.kv_tokens,
            own.weight,
            own.device,
            own.cost_factor,
            load,
            self._restarts,
        )

    def last_resort(self) -> Literal["never", "wait", "yes"]:
        """Whether to try it though it is out of order; ``wait``: it will be in order before long."""
        if self.draining or (self._probed[0] == "config_error" and self.report.key_refused):
            return "never"
        return "wait" if self._probed[0] == "warming" else "yes"


def _keeping(before: Report, report: Report) -> Report:
    """A report that leaves out what was known, as one of a server that still loads, does not take it away. A load that
    is not told this time becomes stale by itself."""
    if report.load is None:
        report = report._replace(load=before.load)
    if report.state == "healthy":
        return report
    kept = report._replace(slots=before.slots, kv_tokens=before.kv_tokens, started=before.started, context=before.context)
    return kept if report.models is not None else kept._replace(models=before.models)


def _another_process(before: Report, now: Report) -> bool:
    if before.started is not None and now.started is not None and before.started != now.started:
        return True
    told = before.models is not None and now.models is not None
    return now.kind in SLOT_KINDS and told and (_ids(before), before.slots) != (_ids(now), now.slots)


def _aliases(entry: dict[str, Any]) -> list[str]:
    aliases = entry.get("aliases")
    return [alias for alias in aliases if isinstance(alias, str)] if isinstance(aliases, list) else []


def _ids(report: Report) -> list[str]:
    return [entry["id"] for entry in report.models or ()]


def windows(backends: Sequence[Health]) -> dict[str, Window]:
    """The widest window of each model, if all backends that may have it tell theirs. Of several, one that ends answers where
    the window ends makes sure that no answer is too long."""
    told = [one.windows() for one in backends]
    found: dict[str, Window] = {}
    for model in {model for windows in told for model in windows}:
        having = [own.get(model) for one, own in zip(backends, told, strict=True) if one.takes is None or model in one.takes]
        known = [window for window in having if window is not None]
        if known and len(known) == len(having):
            found[model] = Window(max(one.tokens for one in known), whole=all(one.whole for one in known))
    return found


def offers(backends: Sequence[Health], now: float, *, panic: bool) -> list[Offer]:
    """What may be sent where. With ``panic``, a model that no backend in order serves, and none that will be soon, is
    offered by all that know it."""
    found = [one.offer(now) for one in backends]
    if not panic or all(offer.accepting for offer in found):
        return found
    resorts = ["no" if offer.accepting else one.last_resort() for one, offer in zip(backends, found, strict=True)]
    served = [offer.models for offer, resort in zip(found, resorts, strict=True) if resort in ("no", "wait")]
    if None in served:
        return found
    covered = frozenset[str]().union(*[models for models in served if models is not None])
    return [
        _desperate(offer, covered, alone=not served) if resort == "yes" else offer
        for offer, resort in zip(found, resorts, strict=True)
    ]


def _desperate(offer: Offer, covered: frozenset[str], *, alone: bool) -> Offer:
    """The offer of a backend that is out of order, for the models that nobody else has."""
    if offer.models is None:
        return offer._replace(accepting=alone)
    missing = offer.models - covered
    return offer._replace(accepting=True, models=missing) if missing else offer
