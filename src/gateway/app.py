"""Routes. Each request gets a record, an id and, whatever happens to it, an answer in the form of the API that it speaks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import count
from random import getrandbits
from typing import Any, Final
from urllib.parse import unquote_to_bytes
from uuid import uuid4

import msgspec
from klein import Klein
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.resource import IResource
from twisted.web.server import Request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import PathConverter

from . import __version__
from .backend import Answer
from .core import endpoints, openapi, wire
from .core.error_forms import ANTHROPIC, OPENAI, RESPONSES, ErrorForm
from .core.errors import UNDECODABLE, BackendFailed, GatewayError, internal_error
from .core.forwarded import UNIX, Proxies
from .core.messages import COUNT_TOKENS, MESSAGES
from .core.model_settings import NO_MODELS, Models, listed
from .core.record import Record
from .core.status import Status
from .core.trace_context import Following, Trace, Tracing
from .dashboard import HEADERS, PAGE, Dashboard
from .dispatch import Dispatcher
from .guard import Guard
from .inference import Inference
from .logs import QUIET
from .metrics import Metrics
from .net.channel import Refusal
from .net.headers import last_of, pairs_of
from .net.request import Handle, body_of
from .relay import connected, cut, relay

_log: Final = Logger("gateway.app")
_DRAINING: Final = "The gateway is shutting down: send the request again."

_EVERYWHERE: Final = frozenset(["/healthz", "/readyz"])


def _is_admin(route: str) -> bool:
    """Whether a route is for who operates the gateway."""
    return route == "/metrics" or route.startswith(("/admin", "/dashboard"))


UNTRACED: Final = frozenset(["/healthz", "/readyz", "/metrics", *QUIET])
"""Asked all the time, by probes, scrapes and who watches: part of a caller's trace, but never a trace of their own."""

MAX_PATH: Final = 256

Work = Callable[[Request, Record], Awaitable[None]]
Observer = Callable[[Record], None]


class _ModelId(PathConverter):
    """Anything: ``org/model``, and also llama-server's own ids, which are paths with a slash in front."""

    part_isolating = False
    regex = ".+"


class App:
    """The HTTP face of the gateway.

    ``leaving``: balancers are told to go elsewhere; ``draining``: new requests for backends are refused.
    ``now`` gives seconds on the monotonic clock. ``observers`` see every record once. ``admin``: the dashboard and the routes
    under /admin are there. ``split``: they and /metrics are on a `Server` of their own, for admin, and all else is not there.
    ``proxies`` are believed whose request it is that they pass on. ``guard`` asks who sends a request; without one, nobody is
    asked. ``models``: what the settings say of models. ``tracing`` says which requests have spans; without it none has.
    ``settings`` gives those that hold, to be shown.
    """

    router = Klein()
    router.url_map.strict_slashes = False
    router.url_map.merge_slashes = False
    router.url_map.converters["model"] = _ModelId

    def __init__(
        self,
        inference: Inference,
        dispatcher: Dispatcher,
        status: Callable[[], Status],
        metrics: Metrics,
        observers: Sequence[Observer],
        now: Callable[[], float],
        *,
        dashboard: Dashboard,
        admin: bool = True,
        split: bool = False,
        proxies: Proxies | None = None,
        guard: Guard | None = None,
        models: Models = NO_MODELS,
        tracing: Tracing | None = None,
        settings: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.leaving = self.draining = False
        self._dashboard = dashboard
        self._inference = inference
        self._dispatcher = dispatcher
        self._admin = admin
        self._split = split
        self._proxies = proxies
        self.guard = guard
        self._named = models
        self._tracing = tracing or Following()
        self._settings = settings
        self._status = status
        self._metrics = metrics
        self._observers = observers
        self._now = now
        self._request_ids = _request_ids()
        self._running: dict[Record, Deferred[None]] = {}
        self._finished: Deferred[None] | None = None

    def use(self, inference: Inference, models: Models, *, admin: bool) -> None:
        """These answer the requests that come from now on."""
        self._inference, self._named, self._admin = inference, models, admin

    def resource(self) -> IResource:
        return self.router.resource()

    def known(self) -> dict[tuple[bytes, bytes], Handle]:
        """What answers each (method, path) whose route has no variable: such a request needs no router."""
        found: dict[tuple[bytes, bytes], Handle] = {}
        for rule in self.router.url_map.iter_rules():
            if not rule.arguments:
                answer: Handle = getattr(self, rule.endpoint)  # Klein names an endpoint after its method
                found |= {(method.encode("ascii"), rule.rule.encode("ascii")): answer for method in rule.methods or ()}
        return found

    # --- routes

    @router.route(endpoints.CHAT.path, methods=["POST"])
    def chat_completions(self, request: Request) -> Deferred[None]:
        return self._run(request, endpoints.CHAT.path, self._infer)

    @router.route(endpoints.COMPLETIONS.path, methods=["POST"])
    def completions(self, request: Request) -> Deferred[None]:
        return self._run(request, endpoints.COMPLETIONS.path, self._infer)

    @router.route(endpoints.EMBEDDINGS.path, methods=["POST"])
    def embeddings(self, request: Request) -> Deferred[None]:
        return self._run(request, endpoints.EMBEDDINGS.path, self._infer)

    @router.route(endpoints.RESPONSES.path, methods=["POST"])
    def responses(self, request: Request) -> Deferred[None]:
        return self._run(request, endpoints.RESPONSES.path, self._infer, RESPONSES)

    @router.route(endpoints.RERANK.path, methods=["POST"])
    def rerank(self, request: Request) -> Deferred[None]:
        return self._run(request, endpoints.RERANK.path, self._infer)

    @router.route(endpoints.RERANK_OF_OLD.path, methods=["POST"])
    def rerank_of_old(self, request: Request) -> Deferred[None]:
        return self._run(request, endpoints.RERANK_OF_OLD.path, self._infer)

    @router.route(endpoints.TOKENIZE.path, methods=["POST"])
    def tokenize(self, request: Request) -> Deferred[None]:
        return self._run(request, endpoints.TOKENIZE.path, self._infer)

    @router.route(endpoints.DETOKENIZE.path, methods=["POST"])
    def detokenize(self, request: Request) -> Deferred[None]:
        return self._run(request, endpoints.DETOKENIZE.path, self._infer)

    @router.route(MESSAGES, methods=["POST"])
    def messages(self, request: Request) -> Deferred[None]:
        return self._run(request, MESSAGES, self._infer_message, ANTHROPIC)

    @router.route(COUNT_TOKENS, methods=["POST"])
    def count_tokens(self, request: Request) -> Deferred[None]:
        return self._run(request, COUNT_TOKENS, self._count_tokens, ANTHROPIC)

    @router.route("/v1/models", methods=["GET"])
    def models(self, request: Request) -> Deferred[None]:
        return self._run(request, "/v1/models", self._models)

    @router.route("/v1/models/<model:id>", methods=["GET"])
    def model(self, request: Request, id: str) -> Deferred[None]:
        async def answer(request: Request, record: Record) -> None:
            listing = await self._list_models(request, record)
            if listing.status < 400:
                listing = listing._replace(body=wire.find_model(listing.body, id))
            await relay(listing, request, record, self._now)

        return self._run(request, "/v1/models/{id}", answer)

    @router.route("/healthz", methods=["GET"])
    def healthz(self, request: Request) -> Deferred[None]:
        return self._run(request, "/healthz", self._healthz)

    @router.route("/readyz", methods=["GET"])
    def readyz(self, request: Request) -> Deferred[None]:
        return self._run(request, "/readyz", self._readyz)

    @router.route("/metrics", methods=["GET"])
    def metrics(self, request: Request) -> Deferred[None]:
        return self._run(request, "/metrics", self._metrics_page)

    @router.route("/openapi.json", methods=["GET"])
    def openapi(self, request: Request) -> Deferred[None]:
        return self._run(request, "/openapi.json", self._openapi)

    @router.route("/admin/explain", methods=["POST"])
    def explain(self, request: Request) -> Deferred[None]:
        return self._run(request, "/admin/explain", self._explain)

    @router.route("/admin/backends/<name>", methods=["POST"])
    def change_backend(self, request: Request, name: str) -> Deferred[None]:
        async def change(request: Request, record: Record) -> None:
            self._change_backend(request, record, name)

        return self._run(request, "/admin/backends/{name}", change)

    @router.route("/admin/settings", methods=["GET"])
    def settings(self, request: Request) -> Deferred[None]:
        return self._run(request, "/admin/settings", self._settings_page)

    @router.route("/dashboard", methods=["GET"])
    def dashboard(self, request: Request) -> Deferred[None]:
        return self._run(request, "/dashboard", self._dashboard_page)

    @router.route("/dashboard/state", methods=["GET"])
    def dashboard_state(self, request: Request) -> Deferred[None]:
        return self._run(request, "/dashboard/state", self._dashboard_state)

    @router.route("/dashboard/events", methods=["GET"])
    def dashboard_events(self, request: Request) -> Deferred[None]:
        return self._run(request, "/dashboard/events", self._dashboard_events)

    @router.handle_errors(HTTPException)  # type: ignore[arg-type]  # klein wants IRequest, and gives what Server makes
    def no_route(self, request: Request, failure: Failure) -> bytes:
        """No route, or not with this method. Klein itself writes what this returns, and finishes the request."""
        anthropic = request.path.rstrip(b"/") in (MESSAGES.encode("ascii"), COUNT_TOKENS.encode("ascii"))
        record = self._begin(request, "other", ANTHROPIC if anthropic else OPENAI)
        here = not self._split or _is_here(request, unquote_to_bytes(request.path).decode("latin-1"))
        error = _no_route(request, failure.value if here else None)
        record.failed(error)
        self._observe(record)
        return _head_of_error(request, record, error)

    # --- their work

    def _infer(self, request: Request, record: Record) -> Awaitable[None]:
        self._check_open()
        return self._inference.infer(request, record)

    def _infer_message(self, request: Request, record: Record) -> Awaitable[None]:
        self._check_open()
        return self._inference.infer_message(request, record)

    def _count_tokens(self, request: Request, record: Record) -> Awaitable[None]:
        self._check_open()
        return self._inference.count_tokens(request, record)

    def _check_open(self) -> None:
        if self.draining:
            raise GatewayError("draining", _DRAINING, retry_after=1.0)

    async def _models(self, request: Request, record: Record) -> None:
        await relay(await self._list_models(request, record), request, record, self._now)

    async def _list_models(self, request: Request, record: Record) -> Answer:
        """The union of what the backends serve; of backends that tell only their clients, what they tell this one. Models
        that the caller may not use are left out."""
        entries, principal = self._dispatcher.pool.models(), record.principal
        if not entries and self._dispatcher.pool.known_models() is None:
            answer = await self._dispatcher.ask_models(self._inference.calls.forwardable(request))
            if (principal.models is None and not self._named) or answer.status >= 400:
                return answer
            try:
                entries = wire.models(answer.body)
            except UNDECODABLE as problem:
                message = "The backend's list of models is none."
                raise BackendFailed("backend_protocol_error", message, detail=str(problem)) from None
        entries = [*entries, *listed(self._named, entries)]
        if principal.models is not None:
            entries = [entry for entry in entries if any(map(principal.may_use, wire.names_of(entry)))]
        return Answer(200, [(b"Content-Type", b"application/json")], wire.listing(entries))

    async def _explain(self, request: Request, record: Record) -> None:
        """Where a request would go, and why; it is not sent."""
        self._check_admin(request)
        candidates = self._dispatcher.explain(self._inference.planned(request, record))
        answer = {"policy": self._dispatcher.scheduler.policy.name, "candidates": [one._asdict() for one in candidates]}
        _reply(request, record, msgspec.json.encode(answer))

    def _change_backend(self, request: Request, record: Record, name: str) -> None:
        """Take a backend out of service (``{"draining": true}``), or back."""
        self._check_admin(request)
        change = wire.CHANGE.read(body_of(request))
        pool = self._dispatcher.pool
        try:
            pool.drain(name) if change.draining else pool.undrain(name)
        except KeyError:
            known = ", ".join(state.name for state in pool.snapshot())
            raise GatewayError("unknown_url", f"There is no backend '{name[:200]}'; there are {known}.") from None
        state = next(state for state in pool.snapshot() if state.name == name)
        _reply(request, record, msgspec.json.encode({"name": name, "state": state.state, "in_flight": state.held}))

    async def _settings_page(self, request: Request, record: Record) -> None:
        """What `inference-gateway check --diff` compares with."""
        self._check_admin(request)
        _reply(request, record, msgspec.json.encode(self._settings()))

    def _check_admin(self, request: Request) -> None:
        if not self._admin:
            raise _no_route(request, None)

    async def _dashboard_page(self, request: Request, record: Record) -> None:
        self._check_admin(request)
        for name, value in HEADERS.items():
            request.setHeader(name, value)
        _reply(request, record, PAGE, "text/html; charset=utf-8")

    async def _dashboard_state(self, request: Request, record: Record) -> None:
        self._check_admin(request)
        request.setHeader(b"cache-control", b"no-store")
        _reply(request, record, self._dashboard.state())

    async def _dashboard_events(self, request: Request, record: Record) -> None:
        self._check_admin(request)
        record.status = 200
        await self._dashboard.watch(request)

    async def _healthz(self, request: Request, record: Record) -> None:
        _reply(request, record, b'{"status": "ok"}')

    async def _readyz(self, request: Request, record: Record) -> None:
        if self.leaving or self.draining:
            raise GatewayError("draining", "The gateway is shutting down.")
        status = self._status()
        if status.unanswered:
            raise GatewayError("no_backend", f"It is not known yet what backends there are of {', '.join(status.unanswered)}.")
        if not status.ready:
            raise GatewayError("no_backend", "No backend is reachable.")
        _reply(request, record, b'{"status": "ready"}')

    async def _metrics_page(self, request: Request, record: Record) -> None:
        accept = request.getHeader(b"accept") or b""
        content_type, body = self._metrics.page(accept.decode("latin-1"))
        _reply(request, record, body, content_type)

    async def _openapi(self, request: Request, record: Record) -> None:
        _reply(request, record, openapi.document(__version__, strict=self._inference.calls.strict))

    # --- one request

    def _run(self, request: Request, route: str, work: Work, form: ErrorForm = OPENAI) -> Deferred[None]:
        if self._split and not _is_here(request, route):
            _write(request, self.no_route(request, Failure(NotFound())))
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
                _fail(request, record, GatewayError("draining", _DRAINING, retry_after=1.0))
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


def _is_here(request: Request, route: str) -> bool:
    """Whether a route is to be found on the `Server` that the request came to. By its route, not its path, which has many
    spellings."""
    return route in _EVERYWHERE or _is_admin(route) is request.site.admin  # type: ignore[union-attr]  # one of ours


def _no_route(request: Request, problem: BaseException | None) -> GatewayError:
    path = request.path.decode("utf-8", "replace")[:200]
    method = request.method.decode("ascii", "replace")[:20]
    if not isinstance(problem, MethodNotAllowed):
        return GatewayError("unknown_url", f"Unknown request URL: {method} {path}.")
    allow = tuple(sorted(problem.valid_methods or ()))
    return GatewayError("method_not_allowed", f"{path} takes {', '.join(allow)}, not {method}.", allow=allow)


def _reply(request: Request, record: Record, body: bytes, content_type: str = "application/json") -> None:
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
