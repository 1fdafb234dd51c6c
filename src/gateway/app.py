"""Routes, and what those answer that are not for models."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from klein import Klein
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from twisted.web.resource import IResource
from twisted.web.server import Request
from werkzeug.exceptions import HTTPException
from werkzeug.routing import PathConverter

from . import __version__
from .answering import DRAINING, Answering, reply, unknown_route
from .backend import Answer
from .core import endpoints, openapi, wire
from .core.error_forms import ANTHROPIC, RESPONSES
from .core.errors import UNDECODABLE, BackendFailed, GatewayError
from .core.messages import COUNT_TOKENS, MESSAGES
from .core.model_settings import NO_MODELS, Models, listed
from .core.record import Record
from .core.status import Status
from .dashboard import HEADERS, PAGE, Dashboard
from .dispatch import Dispatcher
from .inference import Inference
from .metrics import Metrics
from .net.request import Handle, body_of
from .relay import relay


class _ModelId(PathConverter):
    """Anything: ``org/model``, and also llama-server's own ids, which are paths with a slash in front."""

    part_isolating = False
    regex = ".+"


class App:
    """The HTTP face of the gateway.

    ``leaving``: balancers are told to go elsewhere; ``draining``: new requests for backends are refused.
    ``now`` gives seconds on the monotonic clock. ``admin``: the dashboard and the routes under /admin are there. ``models``:
    what the settings say of models. ``settings`` gives those that hold, to be shown.
    """

    router = Klein()
    router.url_map.strict_slashes = False
    router.url_map.merge_slashes = False
    router.url_map.converters["model"] = _ModelId

    def __init__(
        self,
        answering: Answering,
        inference: Inference,
        dispatcher: Dispatcher,
        status: Callable[[], Status],
        metrics: Metrics,
        now: Callable[[], float],
        *,
        dashboard: Dashboard,
        admin: bool = True,
        models: Models = NO_MODELS,
        settings: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.leaving = self.draining = False
        self.answering = answering
        self._run = answering.run
        self._dashboard = dashboard
        self._inference = inference
        self._dispatcher = dispatcher
        self._admin = admin
        self._named = models
        self._settings = settings
        self._status = status
        self._metrics = metrics
        self._now = now

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
        return self.answering.no_route(request, failure.value)

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
            raise GatewayError("draining", DRAINING, retry_after=1.0)

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
        reply(request, record, msgspec.json.encode(answer))

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
        reply(request, record, msgspec.json.encode({"name": name, "state": state.state, "in_flight": state.held}))

    async def _settings_page(self, request: Request, record: Record) -> None:
        """What `inference-gateway check --diff` compares with."""
        self._check_admin(request)
        reply(request, record, msgspec.json.encode(self._settings()))

    def _check_admin(self, request: Request) -> None:
        if not self._admin:
            raise unknown_route(request)

    async def _dashboard_page(self, request: Request, record: Record) -> None:
        self._check_admin(request)
        for name, value in HEADERS.items():
            request.setHeader(name, value)
        reply(request, record, PAGE, "text/html; charset=utf-8")

    async def _dashboard_state(self, request: Request, record: Record) -> None:
        self._check_admin(request)
        request.setHeader(b"cache-control", b"no-store")
        reply(request, record, self._dashboard.state())

    async def _dashboard_events(self, request: Request, record: Record) -> None:
        self._check_admin(request)
        record.status = 200
        await self._dashboard.watch(request)

    async def _healthz(self, request: Request, record: Record) -> None:
        reply(request, record, b'{"status": "ok"}')

    async def _readyz(self, request: Request, record: Record) -> None:
        if self.leaving or self.draining:
            raise GatewayError("draining", "The gateway is shutting down.")
        status = self._status()
        if status.unanswered:
            raise GatewayError("no_backend", f"It is not known yet what backends there are of {', '.join(status.unanswered)}.")
        if not status.ready:
            raise GatewayError("no_backend", "No backend is reachable.")
        reply(request, record, b'{"status": "ready"}')

    async def _metrics_page(self, request: Request, record: Record) -> None:
        accept = request.getHeader(b"accept") or b""
        content_type, body = self._metrics.page(accept.decode("latin-1"))
        reply(request, record, body, content_type)

    async def _openapi(self, request: Request, record: Record) -> None:
        reply(request, record, openapi.document(__version__, strict=self._inference.calls.strict))
