"""Looks at a model server without costing it a generation: is it there, what is it, how much has it to do?

What each kind is asked stands in `core.reports.LOOKS`. A page that a server lacks, it is asked for once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from treq.client import HTTPClient
from twisted.internet.interfaces import IReactorTime

from .core import wire
from .core.backend_settings import Kind
from .core.endpoints import CHAT
from .core.errors import UNDECODABLE, BackendFailed
from .core.load import Load
from .core.reports import LOOKS, MAX_MODELS, SIGNS, Facts, Parse, Report, kind_of
from .exchange import Exchange, Timeouts, Timers
from .net.headers import RawHeaders

TIMEOUTS: Final = Timeouts(first_byte=5.0, idle=5.0, total=5.0)
LOAD_TIMEOUTS: Final = Timeouts(first_byte=2.0, idle=2.0, total=2.0)
"""The load is good to know, but no reason to wait long: llama-server tells it between two batches."""

MODELS: Final = "/v1/models"
MODELS_EVERY: Final = 10
"""A server that has a health page is asked for its models at every so many looks."""

MAX_PAGE: Final = 4 * 1024 * 1024
RATE_LIMITED: Final = 10.0
"""Seconds of patience with a 429 that does not say how long."""


class Page(NamedTuple):
    """An answer to a GET."""

    status: int
    headers: list[tuple[bytes, bytes]]
    server: bytes
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


class _NotHealthy(Exception):
    """It answered, but not so that requests could be sent there."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.reason)
        self.report = report


class Prober:
    """Looks at one server, whose ``kind`` it finds out unless told.

    ``headers`` go along with each look. ``own_key``: requests go there with the gateway's own key, or without one, so
    that a refused key is an error of the settings; if not, the clients bring theirs, and it means nothing.
    """

    def __init__(
        self,
        url: bytes,
        client: HTTPClient,
        clock: IReactorTime,
        *,
        kind: Kind | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
        own_key: bool = True,
    ) -> None:
        self.kind = kind
        self._detects = kind is None
        self._url = url
        self._client = client
        self._clock = clock
        self._headers = list(headers)
        self._own_key = own_key
        self._timers = Timers(clock, TIMEOUTS)
        self._load_timers = Timers(clock, LOAD_TIMEOUTS)
        self._forget()

    def _forget(self) -> None:
        """Who answers the next look may be another."""
        self._settled = not self._detects
        self._looks = 0
        self._models: tuple[dict[str, Any], ...] | None = None
        self._facts: Facts | None = None
        self._lacks: set[str] = set()

    async def look(self) -> Report:
        """What there is to tell. Raises `BackendFailed`."""
        try:
            report = await self._look()
        except _NotHealthy as told:
            self._forget()
            return told.report
        except BackendFailed:
            self._forget()
            raise
        self._looks += 1
        return report

    async def _look(self) -> Report:
        if not self._settled:
            await self._identify()
        kind = self.kind or "openai"
        health = LOOKS[kind].health
        if health is not None and health not in self._lacks:
            self._has(health, await self._get(health))
        if health is None or health in self._lacks or self._looks % MODELS_EVERY == 0:
            self._note_models(await self._get(MODELS))
        return await self._reported(kind)

    async def ask_kind(self) -> Kind:
        """What it is, by one page if it is not known yet, as far as sending a request needs. Raises `BackendFailed` if
        there is nobody; a server that will not tell is a plain OpenAI server."""
        if self.kind is None:
            try:
                page = await self._get(MODELS)
            except BackendFailed as failure:
                if failure.code in ("backend_unreachable", "connect_timeout"):
                    raise
                return self.kind or "openai"
            self.kind = self.kind or kind_of(page.server, _entries(page) or []) or "openai"
        return self.kind

    async def _identify(self) -> None:
        """By its list of models; if that does not tell, by the pages that only one kind has. Where there is none of them,
        a GET of the endpoint itself mostly says that it takes POST."""
        listing = await self._get(MODELS)
        kind = kind_of(listing.server, _entries(listing) or [])
        self.kind = kind or self.kind
        silent = not self._has(MODELS, listing) and listing.status == 404
        for path, parse, sign in SIGNS:
            if kind is not None:
                break
            page = await self._get(path)
            silent = silent and page.status == 404
            kind = sign if page.ok and parse(page.body) is not None else None
        if kind is None and silent and (await self._get(CHAT.path)).status == 404:
            reason = "there is nothing under its URL: whatever it was asked, it answered 404"
            raise _NotHealthy(Report(self.kind or "openai", "config_error", reason))
        self._lacks.clear()
        self.kind, self._settled = kind or self.kind or "openai", True

    def _has(self, path: str, page: Page) -> bool:
        """Whether it has this page. Raises `_NotHealthy` or `BackendFailed` if the answer says that it is not well."""
        kind, status = self.kind or "openai", page.status
        if page.ok:
            return True
        if status in (401, 403) and self._own_key:
            reason = f"it answered {status} to GET {path}: give it the right key (backend_api_key, api_key_env)"
            raise _NotHealthy(Report(kind, "config_error", reason, key_refused=True))
        if status == 429:
            wait = retry_after(page.headers)
            raise _NotHealthy(Report(kind, "rate_limited", retry_after=RATE_LIMITED if wait is None else wait))
        if status == 503 and kind == "llamacpp":
            raise _NotHealthy(Report(kind, "warming", "it loads its model"))
        if 400 <= status < 500 or status == 501:
            self._lacks.add(path)
            return False
        code = "backend_error" if status >= 500 else "backend_protocol_error"
        raise BackendFailed(code, f"The backend answered GET {path} with status {status}.")

    def _note_models(self, page: Page) -> None:
        if not self._has(MODELS, page):
            return
        entries = _entries(page)
        if entries is None:
            raise BackendFailed("backend_protocol_error", "The backend's list of models is not in OpenAI's form.")
        self._models = tuple(entries[:MAX_MODELS])

    async def _reported(self, kind: Kind) -> Report:
        if self._facts is None:
            self._facts = await self._first(LOOKS[kind].facts, self._timers, must=True)
        known = self._facts or Facts()
        told = await self._first(LOOKS[kind].loads, self._load_timers, must=False) or Facts()
        load = Load(told.running, told.waiting, told.kv_usage, self._clock.seconds()) if told.running is not None else None
        return Report(
            kind,
            models=self._models if known.model is None or self._models else (_entry(known.model, kind),),
            slots=known.slots or told.slots,
            kv_tokens=known.kv_tokens or told.kv_tokens,
            load=load,
            started=told.started,
            context=known.context,
        )

    async def _first(self, pages: Iterable[tuple[str, Parse]], timers: Timers, *, must: bool) -> Facts | None:
        """What the first page that it has tells. ``must``: a refusal is one of all requests."""
        for path, parse in pages:
            if path in self._lacks:
                continue
            try:
                page = await self._get(path, timers)
            except BackendFailed:
                return None  # its health has been told already; it may tell this another time
            if must:
                self._has(path, page)
            found = parse(page.body) if page.ok else None
            if found is not None:
                return found
            self._lacks.add(path)
        return None

    async def _get(self, path: str, timers: Timers | None = None) -> Page:
        exchange = Exchange(self._client, timers or self._timers, MAX_PAGE)
        headers = RawHeaders([*self._headers, (b"accept-encoding", b"identity")])
        await exchange.open("GET", self._url + path.encode("ascii"), headers, None)
        return Page(exchange.status, exchange.headers, exchange.server, await exchange.content())


def _entries(page: Page) -> list[dict[str, Any]] | None:
    try:
        return wire.models(page.body) if page.ok else None
    except UNDECODABLE:
        return None


def _entry(id: str, kind: Kind) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": 0, "owned_by": kind}


def retry_after(headers: Iterable[tuple[bytes, bytes]]) -> float | None:
    """The seconds of a Retry-After header (RFC 9110 section 10.2.3); a date is not understood."""
    wait = next((value for name, value in headers if name.lower() == b"retry-after"), b"")
    return float(wait) if wait.isdigit() and len(wait) < 6 else None
