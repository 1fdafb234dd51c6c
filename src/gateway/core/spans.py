"""A request's spans, made of its record when it has ended: SERVER, then the operation on a model, then each attempt.

They are plain tuples: whoever exports them makes of them what OpenTelemetry's SDK wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from . import otel_names as names
from .record import CANCELLED, Record, Try
from .trace_context import MAX_TEXT, Trace, attempt_id

SERVER: Final = "SERVER"
CLIENT: Final = "CLIENT"
"""Kinds of span."""

Value = str | bool | int | float | tuple[str, ...]
Attributes = dict[str, Value]


class Event(NamedTuple):
    """Something within a span, at a ``time`` in nanoseconds since 1970."""

    name: str
    time: int
    attributes: Attributes


class Span(NamedTuple):
    """One span. ``parent_id`` is 0 at a trace's root, and ``remote`` if it is somebody else's span; ``start`` and ``end`` are
    nanoseconds since 1970; ``state`` is the tracestate that the request came with."""

    kind: str
    name: str
    trace_id: int
    span_id: int
    parent_id: int
    start: int
    end: int
    attributes: Attributes
    failed: bool = False
    events: tuple[Event, ...] = ()
    remote: bool = False
    state: str = ""


class Place(NamedTuple):
    """Where a server is; ``host`` of one on a UNIX socket is its path, and there is no ``port``."""

    host: str
    port: int | None
    url: str = ""


def place_of(url: str) -> Place:
    """Where a URL without credentials leads."""
    parts = urlsplit(url)
    return Place(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), url)


class Spans:
    """Makes spans. ``here`` is the gateway's own address, ``backends`` where each backend is."""

    def __init__(self, here: Place, backends: Mapping[str, Place]) -> None:
        self._here = here
        self._backends = backends

    def of(self, record: Record, trace: Trace, offset: float, provider: str) -> list[Span]:
        """The spans. ``offset`` is added to the record's times to make them seconds since 1970; ``provider`` is the kind of
        server that its backend is."""
        trace_id = int(trace.trace_id, 16)
        operation = names.OPERATIONS.get(record.route) if record.model or record.tries else None
        made = [self._server(record, trace, trace_id, offset)]
        if operation is not None:
            made.append(self._operation(record, trace, trace_id, offset, operation, provider))
        parent_id = trace.first + (operation is not None)
        winner = next((one for one in record.tries if one.replied and one.backend == record.backend), None)
        for number, attempt in enumerate(record.tries):
            ids = (trace_id, attempt_id(trace.first, number), parent_id)
            made.append(self._attempt(record, ids, offset, number, attempt, winner))
        return made

    # --- the three kinds

    def _server(self, record: Record, trace: Trace, trace_id: int, offset: float) -> Span:
        """By the HTTP conventions a 4xx is no error of the server's."""
        known = record.method in names.METHODS
        method = record.method if known else names.OTHER_METHOD
        route = record.route if record.route.startswith("/") else None
        broke = record.status < 400 and record.fault in ("backend", "gateway")
        return Span(
            SERVER,
            f"{method if known else 'HTTP'} {route or ''}".rstrip(),
            trace_id,
            trace.first,
            int(trace.parent_id or "0", 16),
            _ns(record.started + offset),
            _ns(record.ended + offset),
            given(
                {
                    names.METHOD: method,
                    names.METHOD_AS_SENT: None if known else record.method,
                    names.ROUTE: route,
                    names.STATUS_CODE: record.status or None,
                    names.URL_SCHEME: "http",
                    names.URL_PATH: trace.path or None,
                    names.CLIENT_ADDRESS: record.client or None,
                    names.SERVER_ADDRESS: self._here.host,
                    names.SERVER_PORT: self._here.port,
                    names.ERROR_TYPE: record.code or None,
                    names.REQUEST_ID: record.request_id,
                }
            ),
            failed=record.status >= 500 or broke,
            remote=bool(trace.parent_id),
            state=trace.state,
        )

    def _operation(self, record: Record, trace: Trace, trace_id: int, offset: float, operation: str, provider: str) -> Span:
        model = _clean(record.model)
        return Span(
            CLIENT,
            f"{operation} {model}".rstrip(),
            trace_id,
            trace.first + 1,
            trace.first,
            _ns((record.tries[0].asked if record.tries else record.started) + offset),
            _ns(record.ended + offset),
            given(
                {
                    names.OPERATION: operation,
                    names.PROVIDER: provider or None,
                    names.REQUEST_MODEL: model or None,
                    **_asked_and_answered(record, trace),
                    **at(record.backend, self._backends),
                    names.ATTEMPTS: record.attempts or None,
                    names.DECISION: record.decision or None,
                    names.ERROR_TYPE: record.code or None,
                }
            ),
            failed=bool(record.code),
            events=_events(record, offset),
        )

    def _attempt(
        self, record: Record, ids: tuple[int, int, int], offset: float, number: int, attempt: Try, winner: Try | None
    ) -> Span:
        lost, code, ended = False, attempt.code, attempt.ended
        if attempt is winner:
            whole = not record.stream and record.code != "rejected_by_backend"
            code = "" if whole else record.code
            ended = record.ended if record.stream else attempt.replied
        elif code in {"", CANCELLED}:
            lost = winner is not None
            code = "" if lost else record.code
            ended = ended or attempt.replied
        place = self._backends.get(attempt.backend)
        return Span(
            CLIENT,
            "POST",
            *ids,
            _ns(attempt.sent + offset),
            _ns(ended + offset),
            given(
                {
                    names.METHOD: "POST",
                    names.STATUS_CODE: (record.status or None) if attempt is winner else None,
                    names.RESEND_COUNT: number or None,
                    names.URL_FULL: f"{place.url}{record.route}" if place and place.url else None,
                    **at(attempt.backend, self._backends),
                    names.HEDGE_LOST: lost or None,
                    names.ERROR_TYPE: code or None,
                }
            ),
            failed=bool(code),
        )


def at(backend: str, backends: Mapping[str, Place]) -> dict[str, Value | None]:
    """A backend's name, and where it is."""
    place = backends.get(backend)
    return {
        names.SERVER_ADDRESS: place.host if place else None,
        names.SERVER_PORT: place.port if place else None,
        names.BACKEND: backend or None,
    }


def _asked_and_answered(record: Record, trace: Trace) -> dict[str, Value | None]:
    max_tokens, temperature, top_p = trace.asked
    finish_reason = _clean(record.finish_reason or "")
    used = record.usage
    return {
        names.REQUEST_STREAM: record.stream or None,
        names.REQUEST_MAX_TOKENS: max_tokens,
        names.REQUEST_TEMPERATURE: temperature,
        names.REQUEST_TOP_P: top_p,
        names.RESPONSE_ID: _clean(trace.answer_id) or None,
        names.RESPONSE_MODEL: _clean(trace.answer_model) or None,
        names.FINISH_REASONS: (finish_reason,) if finish_reason else None,
        names.INPUT_TOKENS: used.prompt_tokens or None,
        names.OUTPUT_TOKENS: used.completion_tokens or None,
        names.CACHED_TOKENS: used.cached_tokens or None,
        names.ESTIMATED: (used.estimated and used.completion_tokens > 0) or None,
    }


def spans_of(record: Record) -> int:
    """How many spans `Spans.of` makes of it."""
    return 1 + len(record.tries) + (record.route in names.OPERATIONS and bool(record.model or record.tries))


def _clean(text: str) -> str:
    """The start of a text that others may invent, as protobuf takes it: half a surrogate pair is a question mark."""
    text = text[:MAX_TEXT]
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def given(values: Mapping[str, Value | None]) -> Attributes:
    """Those that there are."""
    return {name: value for name, value in values.items() if value is not None}


def _events(record: Record, offset: float) -> tuple[Event, ...]:
    found = []
    for attempt in record.tries:
        if attempt.sent > attempt.asked:
            waited: Attributes = {names.QUEUE_SECONDS: attempt.sent - attempt.asked, names.BACKEND: attempt.backend}
            found.append(Event(names.QUEUED, _ns(attempt.sent + offset), waited))
    if record.first_token is not None:
        since: Attributes = {names.FIRST_TOKEN: record.first_token - record.started}
        found.append(Event(names.FIRST_TOKEN_EVENT, _ns(record.first_token + offset), since))
    return tuple(found)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
