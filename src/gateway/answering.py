"""Each request gets a record, an id and, whatever happens to it, an answer in the form of the API that it speaks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import count
from random import getrandbits
from typing import Final
from urllib.parse import unquote_to_bytes
from uuid import uuid4

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, succeed
from twisted.logger import Logger
from twisted.web.http_headers import Headers
from twisted.web.server import Request
from werkzeug.exceptions import MethodNotAllowed, NotFound

from .core import wire
from .core.error_forms import ANTHROPIC, OPENAI, ErrorForm
from .core.errors import GatewayError, internal_error
from .core.forwarded import UNIX, Proxies
from .core.messages import COUNT_TOKENS, MESSAGES
from .core.record import Record
from .core.trace_context import Following, Trace, Tracing
from .guard import Guard
from .logs import QUIET
from .net.channel import Refusal
from .net.headers import last_of, pairs_of
from .relay import connected, cut

_log: Final = Logger("gateway.answering")

DRAINING: Final = "The gateway is shutting down: send the request again."

UNTRACED: Final = frozenset(["/healthz", "/readyz", "/metrics", *QUIET])
"""Asked all the time, by probes, scrapes and who watches: part of a caller's trace, but never a trace of their own."""

MAX_PATH: Final = 256

_EVERYWHERE: Final = frozenset(["/healthz", "/readyz"])

Work = Callable[[Request, Record], Awaitable[None]]
Observer = Callable[[Record], None]


class Answering:
    """Requests from their first line to their last byte.

    ``now`` gives seconds on the monotonic clock. ``observers`` see every record once. ``split``: what is for who operates the
    gateway is on a `Server` of its own, for admin, and all else is not there. ``proxies`` are believed whose request it is that
    they pass on. ``guard`` asks who sends a request; without one, nobody is asked. ``tracing`` says which requests have spans;
    without it none has.
    """

    def __init__(
        self,
        observers: Sequence[Observer],
        now: Callable[[], float],
        *,
        split: bool = False,
        proxies: Proxies | None = None,
        guard: Guard | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.guard = guard
        self._split = split
        self._proxies = proxies
        self._tracing = tracing or Following()
        self._observers = observers
        self._now = now
        self._request_ids = _request_ids()
        self._running: dict[Record, Deferred[None]] = {}
        self._finished: Deferred[None] | None = None

    def run(self, request: Request, route: str, work: Work, form: ErrorForm = OPENAI) -> Deferred[None]:
        """Do a route's work; what it raises becomes an answer. Fires when the request is over."""
        if self._split and not _is_here(request, route):
            _write(request, self.no_route(request, NotFound()))
            return succeed(None)
        record = self._begin(request, route, form)
        running = ensureDeferred(self._answered(request, record, work))
        if not running.called:
            self._running[record] = running
        return running

    def _begin(self, request: Request, route: str, form: ErrorForm) -> Record:
        method = request.method.decode("ascii", "replace")
        client = getattr(request.getClientAddress(), "host", UNIX)
        if self._proxies is not None:
            client = self._client(client, request.requestHeaders)
        record = self._record(request.getHeader(b"x-request-id"), method, route, client)
        if self._tracing.ratio or b"traceparent" in last_of(request.requestHeaders):
            record.trace = self._trace(request.requestHeaders, route, request.path)
        request.setHeader(b"x-request-id", record.request_id.encode("ascii"))
        if form is not OPENAI:
            record.error_form = form
            request.setHeader(b"request-id", record.request_id.encode("ascii"))  # as Anthropic's API has it
        return record

    def _record(self, given_id: bytes | None, method: str, route: str, client: str) -> Record:
        request_id = wire.accepted_request_id(given_id) or next(self._request_ids)
        return Record(request_id, method[:20], route, self._now(), client)

    def _client(self, peer: str, headers: Headers) -> str:
        """Whose request it is, if ``peer`` may say so."""
        given = [value for name, value in pairs_of(headers) if name == b"x-forwarded-for"]
        return self._proxies.client(peer, given) if self._proxies is not None else peer

    def _trace(self, headers: Headers, route: str, path: bytes = b"") -> Trace | None:
        given = b"traceparent" in last_of(headers)
        if not given and (not self._tracing.ratio or route in UNTRACED):
            return None
        trace = self._tracing.begin(pairs_of(headers) if given else ())
        if trace is not None and trace.sampled:
            trace.path = path[:MAX_PATH].decode("utf-8", "replace")
        return trace

    async def _answered(self, request: Request, record: Record, work: Work) -> None:
        """Whatever ends the request, it ends with an answer if somebody waits for one, and is observed once."""
        try:
            if self.guard is not None and (admitted := self.guard.admit(request, record)) is not None:
                await admitted
            await work(request, record)
        except CancelledError:
            if connected(request):
                _fail(request, record, GatewayError("draining", DRAINING, retry_after=1.0))
            else:
                record.left = getattr(request, "left", 0.0)
                record.failed(GatewayError("client_cancelled", "The client went away."))
        except GatewayError as error:
            _fail(request, record, error)
        except Exception:
            _log.failure("{id}: a bug in the gateway", id=record.request_id)
            _fail(request, record, internal_error())
        finally:
            self._observe(record)
            self._ran(record)

    def _observe(self, record: Record) -> None:
        record.ended = self._now()
        for observe in self._observers:
            try:
                observe(record)
            except Exception:
                _log.failure("{id}: a bug in an observer", id=record.request_id)

    def no_route(self, request: Request, problem: BaseException | None) -> bytes:
        """What a request is told for which there is no route, or none with its method; whoever calls this writes it."""
        anthropic = request.path.rstrip(b"/") in (MESSAGES.encode("ascii"), COUNT_TOKENS.encode("ascii"))
        record = self._begin(request, "other", ANTHROPIC if anthropic else OPENAI)
        here = not self._split or _is_here(request, unquote_to_bytes(request.path).decode("latin-1"))
        error = unknown_route(request, problem if here else None)
        record.failed(error)
        self._observe(record)
        return _head_of_error(request, record, error)

    def refused(self, refusal: Refusal) -> str:
        """A request that was turned away before it had a route; returns its id."""
        given_id = refusal.headers.getRawHeaders(b"x-request-id", [None])[-1]
        client = self._client(refusal.client, refusal.headers)
        record = self._record(given_id, refusal.method, "other", client)
        record.trace = self._trace(refusal.headers, record.route)
        record.failed(refusal.error)
        self._observe(record)
        return record.request_id

    # --- the end

    def _ran(self, record: Record) -> None:
        self._running.pop(record, None)
        if not self._running and self._finished is not None:
            finished, self._finished = self._finished, None
            finished.callback(None)

    def finished(self) -> Deferred[None]:
        """Fires when no request is running."""
        if not self._running:
            return succeed(None)
        if self._finished is None:
            self._finished = Deferred()
        return self._finished

    def cut(self) -> int:
        """End the requests that still run, each with an error its client can read; how many there were."""
        left = list(self._running.values())
        for running in left:
            running.cancel()
        return len(left)


def _request_ids() -> Iterator[str]:
    """UUIDs (RFC 9562) of which the last 48 bits count up. They name requests and guard nothing: random once is enough."""
    head = str(uuid4())[:24]
    for number in count(getrandbits(47)):
        yield f"{head}{number:012x}"


def _is_admin(route: str) -> bool:
    """Whether a route is for who operates the gateway."""
    return route == "/metrics" or route.startswith(("/admin", "/dashboard"))


def _is_here(request: Request, route: str) -> bool:
    """Whether a route is to be found on the `Server` that the request came to. By its route, not its path, which has many
    spellings."""
    return route in _EVERYWHERE or _is_admin(route) is request.site.admin  # type: ignore[union-attr]  # one of ours


def unknown_route(request: Request, problem: BaseException | None = None) -> GatewayError:
    """There is nothing here, or nothing for this method; ``problem`` is what the router said."""
    path = request.path.decode("utf-8", "replace")[:200]
    method = request.method.decode("ascii", "replace")[:20]
    if not isinstance(problem, MethodNotAllowed):
        return GatewayError("unknown_url", f"Unknown request URL: {method} {path}.")
    allow = tuple(sorted(problem.valid_methods or ()))
    return GatewayError("method_not_allowed", f"{path} takes {', '.join(allow)}, not {method}.", allow=allow)


def reply(request: Request, record: Record, body: bytes, content_type: str = "application/json") -> None:
    """Answer 200 with this body, and finish."""
    record.status = 200
    _write(request, _head(request, 200, content_type, body))


def _fail(request: Request, record: Record, error: GatewayError) -> None:
    """Tell the client, if its answer has not begun; else cut it short, which a client can see."""
    begun = request.startedWriting or not connected(request)
    record.status = record.status if begun else error.status
    record.failed(error)
    if begun:
        cut(request)
        return
    body = _head_of_error(request, record, error)
    record.sent_bytes = len(body)
    _write(request, body)


def _head_of_error(request: Request, record: Record, error: GatewayError) -> bytes:
    for name, value in error.headers():
        request.setHeader(name.encode("ascii"), value.encode("ascii"))
    return _head(request, error.status, "application/json", record.error_form.body(error, record.request_id))


def _head(request: Request, status: int, content_type: str, body: bytes) -> bytes:
    request.setResponseCode(status)
    request.setHeader(b"content-type", content_type.encode("ascii"))
    request.setHeader(b"content-length", b"%d" % len(body))
    return body


def _write(request: Request, body: bytes) -> None:
    request.write(body)
    request.finish()
