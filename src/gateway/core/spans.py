"""A request's spans, made of its record when it has ended: SERVER, then the operation on a model, then each attempt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from . import otel_names as names
from . import otlp
from .otlp import Value
from .record import CANCELLED, Record, Try
from .trace_context import MAX_TEXT, Trace, attempt_id

MAX_KEPT: Final = 2048
"""Encoded sets of attributes that are kept; what many requests have in common is encoded once."""


class Place(NamedTuple):
    """Where a server is."""

    host: str
    port: int
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
        self._kept: dict[tuple[object, ...], bytes] = {}

    def of(self, record: Record, trace: Trace, offset: float, provider: str) -> list[bytes]:
        """The spans, encoded. ``offset`` is added to the record's times to make them seconds since 1970; ``provider`` is the
        kind of server that its backend is."""
        trace_id = bytes.fromhex(trace.trace_id)
        operation = names.OPERATIONS.get(record.route) if record.model or record.tries else None
        made = [self._server(record, trace, trace_id, offset)]
        if operation is not None:
            made.append(self._operation(record, trace, trace_id, offset, operation, provider))
        parent = (trace.first + (operation is not None)).to_bytes(8, "big")
        winner = next((one for one in record.tries if one.replied and one.backend == record.backend), None)
        for number, attempt in enumerate(record.tries):
            ids = (trace_id, attempt_id(trace.first, number).to_bytes(8, "big"), parent)
            made.append(self._attempt(record, ids, offset, number, attempt, winner))
        return made

    def count(self, record: Record) -> int:
        """How many `of` would make."""
        return 1 + len(record.tries) + (record.route in names.OPERATIONS and bool(record.model or record.tries))

    # --- the three kinds

    def _server(self, record: Record, trace: Trace, trace_id: bytes, offset: float) -> bytes:
        common = (record.method, record.route, record.status, record.code, trace.path, record.client)
        fields = self._kept.get(common) or self._keep(common, self._of_server(record, trace.path))
        return otlp.span(
            (trace_id, trace.first.to_bytes(8, "big"), bytes.fromhex(trace.parent_id)),
            otlp.SERVER,
            (_ns(record.started + offset), _ns(record.ended + offset)),
            fields,
            _of_request_id(record.request_id),
            state=trace.state,
            remote=bool(trace.parent_id),
        )

    def _of_server(self, record: Record, path: str) -> bytes:
        """Name and attributes that every such request has. By the HTTP conventions a 4xx is no error of the server's."""
        known = record.method in names.METHODS
        method = record.method if known else names.OTHER_METHOD
        route = record.route if record.route.startswith("/") else None
        values: dict[str, Value | None] = {
            names.METHOD: method,
            names.METHOD_AS_SENT: None if known else record.method,
            names.ROUTE: route,
            names.STATUS_CODE: record.status or None,
            names.URL_SCHEME: "http",
            names.URL_PATH: path or None,
            names.CLIENT_ADDRESS: record.client or None,
            names.SERVER_ADDRESS: self._here.host,
            names.SERVER_PORT: self._here.port,
            names.ERROR_TYPE: record.code or None,
        }
        name = f"{method if known else 'HTTP'} {route or ''}".rstrip()
        broke = record.status < 400 and record.fault in ("backend", "gateway")
        failed = record.status >= 500 or broke
        return otlp.span_name(name) + otlp.span_attributes(values) + (otlp.ERROR if failed else b"")

    def _operation(self, record: Record, trace: Trace, trace_id: bytes, offset: float, operation: str, provider: str) -> bytes:
        model, finish_reason = record.model[:MAX_TEXT], (record.finish_reason or "")[:MAX_TEXT]
        common = (operation, provider, model, record.backend, record.stream, finish_reason, record.code)
        fields = self._kept.get(common) or self._keep(common, self._of_operation(common))
        used = record.usage
        choice = (*trace.asked, trace.answer_model, record.attempts, record.decision)
        return otlp.span(
            (trace_id, (trace.first + 1).to_bytes(8, "big"), trace.first.to_bytes(8, "big")),
            otlp.CLIENT,
            (_ns((record.tries[0].asked if record.tries else record.started) + offset), _ns(record.ended + offset)),
            fields,
            self._kept.get(choice) or self._keep(choice, _of_choice(*choice)),
            self._number(names.INPUT_TOKENS, used.prompt_tokens),
            self._number(names.OUTPUT_TOKENS, used.completion_tokens),
            self._number(names.CACHED_TOKENS, used.cached_tokens) if used.cached_tokens else b"",
            _of_answer_id(trace.answer_id) if trace.answer_id else b"",
            _ESTIMATED if used.estimated and used.completion_tokens else b"",
            *_events(record, offset),
        )

    def _number(self, name: str, number: int) -> bytes:
        return self._kept.get((name, number)) or self._keep((name, number), otlp.span_attributes({name: number or None}))

    def _of_operation(self, common: tuple[str, str, str, str, bool, str, str]) -> bytes:
        operation, provider, model, backend, stream, finish_reason, code = common
        place = self._backends.get(backend)
        values: dict[str, Value | None] = {
            names.OPERATION: operation,
            names.PROVIDER: provider or None,
            names.REQUEST_MODEL: model or None,
            names.REQUEST_STREAM: stream or None,
            names.FINISH_REASONS: (finish_reason,) if finish_reason else None,
            names.SERVER_ADDRESS: place.host if place else None,
            names.SERVER_PORT: place.port if place else None,
            names.BACKEND: backend or None,
            names.ERROR_TYPE: code or None,
        }
        return otlp.span_name(f"{operation} {model}".rstrip()) + otlp.span_attributes(values) + _error(code)

    def _attempt(
        self, record: Record, ids: tuple[bytes, bytes, bytes], offset: float, number: int, attempt: Try, winner: Try | None
    ) -> bytes:
        lost, code, ended = False, attempt.code, attempt.ended
        if attempt is winner:
            whole = not record.stream and record.code != "rejected_by_backend"
            code = "" if whole else record.code
            ended = record.ended if record.stream else attempt.replied
        elif code in {"", CANCELLED}:
            lost = winner is not None
            code = "" if lost else record.code
            ended = ended or attempt.replied
        common = (attempt.backend, record.route, number, record.status if attempt is winner else 0, code, lost)
        fields = self._kept.get(common) or self._keep(common, self._of_attempt(common))
        return otlp.span(ids, otlp.CLIENT, (_ns(attempt.sent + offset), _ns(ended + offset)), fields)

    def _of_attempt(self, common: tuple[str, str, int, int, str, bool]) -> bytes:
        backend, route, number, status, code, lost = common
        place = self._backends.get(backend)
        values: dict[str, Value | None] = {
            names.METHOD: "POST",
            names.STATUS_CODE: status or None,
            names.RESEND_COUNT: number or None,
            names.URL_FULL: f"{place.url}{route}" if place and place.url else None,
            names.SERVER_ADDRESS: place.host if place else None,
            names.SERVER_PORT: place.port if place else None,
            names.BACKEND: backend,
            names.HEDGE_LOST: lost or None,
            names.ERROR_TYPE: code or None,
        }
        return otlp.span_name("POST") + otlp.span_attributes(values) + _error(code)

    def _keep(self, common: tuple[object, ...], made: bytes) -> bytes:
        if len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        self._kept[common] = made
        return made


def _error(code: str) -> bytes:
    return otlp.ERROR if code else b""


def _of_choice(
    max_tokens: int | None, temperature: float | None, top_p: float | None, model: str, attempts: int, decision: str
) -> bytes:
    """What was asked for, and what was made of it."""
    return otlp.span_attributes(
        {
            names.REQUEST_MAX_TOKENS: max_tokens,
            names.REQUEST_TEMPERATURE: temperature,
            names.REQUEST_TOP_P: top_p,
            names.RESPONSE_MODEL: model or None,
            names.ATTEMPTS: attempts or None,
            names.DECISION: decision or None,
        }
    )


_ESTIMATED: Final = otlp.span_attributes({names.ESTIMATED: True})
_of_answer_id: Final = otlp.texts(names.RESPONSE_ID)
_of_request_id: Final = otlp.texts(names.REQUEST_ID)


def _events(record: Record, offset: float) -> list[bytes]:
    found = []
    for attempt in record.tries:
        if attempt.sent > attempt.asked:
            waited: dict[str, Value] = {names.QUEUE_SECONDS: attempt.sent - attempt.asked, names.BACKEND: attempt.backend}
            found.append(otlp.event(names.QUEUED, _ns(attempt.sent + offset), waited))
    if record.first_token is not None:
        since = {names.FIRST_TOKEN: record.first_token - record.started}
        found.append(otlp.event(names.FIRST_TOKEN_EVENT, _ns(record.first_token + offset), since))
    return found


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
