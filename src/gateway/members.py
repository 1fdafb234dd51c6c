"""Which backends there are, while the gateway runs.

`Members.use` is told which backends are wanted, all of them, as the settings have them, and makes it so: at the start, and
whenever the settings are read again. It returns what that has changed, by names.

- A backend that is added is looked at first, as at a start; requests for its models wait for that.
- One that is removed gets no new requests. Those that it has end as they would have, by the settings that they began with;
  it is shown as draining until then, and then nothing of it is left but its metrics, for some minutes.
- One with other settings, but the same URL, keeps what has been learnt: its health, its breaker, what its cache holds, how
  fast it is. One with another URL, or another address, is a new backend under the name: how requests to the old one end is
  not held against it.
- A row whose URL is a source's (``dns+http://...``) stands for the backends that `discovery` finds, which come and go by
  themselves.
- Waiting requests whose model nobody is left to serve are told so (404 model_not_found or 503 no_backend).
- Without any, there is the echo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final, NamedTuple

from twisted.logger import Logger

from .backend import Backend
from .core.backend_settings import MAX_BACKENDS, BackendSettings
from .core.spans import Place, place_of
from .discovery import Discovery
from .echo import MODEL
from .pool import Pool

ECHO: Final = BackendSettings(name=MODEL, url="", kind="echo")

_log: Final = Logger("gateway.members")


class Made(NamedTuple):
    """A backend. ``close``: its connections are not kept any longer than they are in use."""

    backend: Backend
    close: Callable[[], object]


class Change(NamedTuple):
    """Names of backends. ``changed``: they have other settings, perhaps another URL."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]

    def __str__(self) -> str:
        words = zip(("added", "removed", "changed"), self, strict=True)
        return "; ".join([f"{word} {', '.join(names)}" for word, names in words if names]) or "nothing has changed"


class Members:
    """``make`` makes a backend of its settings. The ``pool`` is told; ``backends`` and ``places`` are tables that others
    look into: who has a name now, and where that is or was while a request may still be there."""

    def __init__(
        self,
        make: Callable[[BackendSettings], Made],
        pool: Pool,
        backends: dict[str, Backend],
        places: dict[str, Place],
        discovery: Discovery,
        changed: Callable[[], object] = lambda: None,
    ) -> None:
        """``changed`` is called when ``places`` has changed."""
        self._make = make
        self._pool = pool
        self._backends = backends
        self._places = places
        self._discovery = discovery
        self._changed = changed
        self._wanted: tuple[BackendSettings, ...] = ()
        self._surplus = 0
        self._own: dict[str, BackendSettings] = {}
        self._made: dict[str, Made] = {}
        discovery.watch(self._apply)

    def use(self, wanted: Sequence[BackendSettings]) -> Change:
        """These are the backends from now on. Raises `SettingsError` if a source cannot be, and then nothing has changed."""
        self._discovery.use(wanted)
        self._wanted = tuple(wanted) or (ECHO,)
        return self._apply()

    def _rows(self) -> dict[str, BackendSettings]:
        """The backends by name, as many as there may be; of equal names the first counts."""
        rows: dict[str, BackendSettings] = {}
        for own in self._discovery.members(self._wanted):
            rows.setdefault(own.name, own)
        surplus = len(rows) - MAX_BACKENDS
        if surplus > 0 and surplus != self._surplus:
            _log.warn("{surplus} backends more than {most} are not used", surplus=surplus, most=MAX_BACKENDS)
        self._surplus = surplus
        return dict(islice(rows.items(), MAX_BACKENDS))

    def _apply(self) -> Change:
        """Make it so."""
        rows = self._rows()
        change = self._difference(rows)
        made = {name: self._make(rows[name]) for name in (*change.added, *change.changed)}
        moved = [name for name in change.changed if _where(rows[name]) != _where(self._own[name])]
        before = [self._made[name] for name in (*change.removed, *change.changed)]
        for name in change.removed:
            del self._own[name], self._made[name], self._backends[name]
        for name, one in made.items():
            self._own[name], self._made[name], self._backends[name] = rows[name], one, one.backend
            self._places[name] = _where(rows[name])
        self._pool.coming, self._pool.empty = self._discovery.coming(), self._discovery.empty()
        self._pool.change((*change.removed, *moved), [(rows[name], one.backend) for name, one in made.items()])
        self._forget_places()
        if made or before:
            self._changed()
        for one in before:
            one.close()
        return change

    def _difference(self, rows: dict[str, BackendSettings]) -> Change:
        return Change(
            tuple([name for name in rows if name not in self._own]),
            tuple([name for name in self._own if name not in rows]),
            tuple([name for name, own in rows.items() if name in self._own and own != self._own[name]]),
        )

    def _forget_places(self) -> None:
        """Of those that are gone, and hold no request any more."""
        shown = {state.name for state in self._pool.snapshot()}
        for name in self._places.keys() - shown:
            del self._places[name]

    def close(self) -> None:
        """The gateway stops: no connection is kept."""
        for one in self._made.values():
            one.close()


def _where(own: BackendSettings) -> Place:
    place = place_of(own.url)
    return place._replace(host=own.address) if own.address else place
