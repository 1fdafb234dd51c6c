"""Stand-ins for the network: an agent whose answers a test gives by hand, and the app around it."""

from __future__ import annotations

import json
from typing import Any

from treq.testing import StubTreq
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone, ResponseNeverReceived
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent
from zope.interface import implementer

from gateway.answering import Answering
from gateway.app import App
from gateway.backend import Backend, HTTPBackend
from gateway.calls import Calls
from gateway.core.backend_settings import Kind
from gateway.core.endpoints import CHAT
from gateway.core.live import Live
from gateway.core.model_settings import NO_MODELS, Models
from gateway.core.policy import ExpectedCompletion
from gateway.core.principal import NO_LIMITS, Limits
from gateway.core.record import Record
from gateway.core.reports import Report
from gateway.core.retry_budget import RetryBudget
from gateway.core.scheduler import Scheduler
from gateway.core.settings import Settings
from gateway.core.status import Status
from gateway.dashboard import Dashboard
from gateway.dispatch import Dispatcher
from gateway.exchange import Timeouts
from gateway.guard import Guard
from gateway.inference import Inference
from gateway.limiter import Limiting, LocalLimiter
from gateway.metrics import Metrics
from gateway.net.agent import BackendClient
from gateway.pool import Pool

TIMEOUTS = Timeouts(first_byte=60.0, idle=30.0, total=300.0)
HELLO = b'{"messages":[{"role":"user","content":"hello"}]}'
STREAM = b'{"messages":[{"role":"user","content":"hello"}],"stream":true}'
ANSWER = json.dumps({"choices": [{"finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}).encode()


class FakeTransport:
    """A body's transport, as far as the gateway uses one."""

    def __init__(self) -> None:
        self.closed = False
        self.paused = False

    def stopProducing(self) -> None:
        self.closed = True

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False


class FakeResponse:
    """An IResponse whose body comes when the test says so."""

    def __init__(self, code: int = 200, content_type: str = "application/json", **headers: str) -> None:
        self.code = code
        self.headers = Headers({"content-type": [content_type]})
        for name, value in headers.items():
            self.headers.setRawHeaders(name.replace("_", "-"), [value])
        self.length = 1
        self.transport = FakeTransport()
        self.protocol: Any = None

    def deliverBody(self, protocol: Protocol) -> None:
        self.protocol = protocol
        protocol.makeConnection(self.transport)

    def data(self, data: bytes) -> None:
        self.protocol.dataReceived(data)

    def end(self, reason: Exception | None = None) -> None:
        self.protocol.connectionLost(Failure(reason or ResponseDone()))


@implementer(IAgent)
class FakeAgent:
    """Takes requests; the test answers or fails them."""

    def __init__(self) -> None:
        self.requests: list[tuple[bytes, bytes, Headers, bytes | None]] = []
        self.waiting: list[Deferred[Any]] = []
        self.cancelled = 0

    def request(self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: Any = None) -> Deferred[Any]:
        def cancel(waiting: Deferred[Any]) -> None:
            self.cancelled += 1
            waiting.errback(Failure(ResponseNeverReceived([Failure(CancelledError())])))  # as the real one says it

        self.requests.append((method, uri, headers or Headers(), getattr(bodyProducer, "body", None)))
        waiting: Deferred[Any] = Deferred(cancel)
        self.waiting.append(waiting)
        return waiting

    def answer(self, response: FakeResponse, body: bytes | None = None) -> FakeResponse:
        """Answer the oldest request; with ``body``, whole."""
        self.waiting.pop(0).callback(response)
        if body is not None:
            if body:
                response.data(body)
            response.end()
        return response

    def fail(self, reason: Exception) -> None:
        self.waiting.pop(0).errback(Failure(reason))

    def sent(self) -> dict[str, Any]:
        """The JSON of the newest request."""
        body: dict[str, Any] = json.loads(self.requests[-1][3] or b"null")
        return body


class Gateway:
    """The app on a stopped clock and, but for a given backend, before a fake agent; clients reach it through treq."""

    def __init__(
        self,
        backend: Backend | None = None,
        *,
        kind: Kind | None = "openai",
        looked_at: bool = True,
        guard: Guard | None = None,
        slots: int | None = None,
        models: Models = NO_MODELS,
        limits: Limits = NO_LIMITS,
        **settings: Any,
    ) -> None:
        self.clock = Clock()
        self.agent = FakeAgent()
        client = BackendClient(self.agent)
        self.backend = backend or HTTPBackend("b", "http://b:1", client, self.clock, TIMEOUTS, kind=kind, **settings)
        self.pool = Pool([self.backend], Settings(probe_down=1), self.clock, random=lambda: 0.5)
        if looked_at:
            self.pool._reported(self.backend.name, Report(kind or "openai", slots=slots))  # as if a look had found it in order
        scheduler = Scheduler(ExpectedCompletion())
        self.dispatcher = Dispatcher(scheduler, self.pool, {self.backend.name: self.backend}, self.clock)
        self.limiter = LocalLimiter(self.clock.seconds, lambda: 1_700_000_000.0)
        self.limiting = Limiting(self.limiter, self.clock.seconds, limits)
        self.records: list[Record] = []
        self.metrics = Metrics(self.status, self.clock.seconds)
        inference = Inference(
            self.dispatcher, self.clock.seconds, RetryBudget(0.1), self.limiting, Calls(scheduler, models=models)
        )
        live = Live(self.clock.seconds())
        self.dashboard = Dashboard(live, self.status, scheduler.policy.name, self.clock)
        self.pool.watch_states(self.dashboard.changed)
        observers = (self.metrics, live, self.records.append)
        self.app = App(
            Answering(observers, self.clock.seconds, guard=guard),
            inference,
            self.dispatcher,
            self.status,
            self.metrics,
            self.clock.seconds,
            models=models,
            dashboard=self.dashboard,
        )
        self.client: Any = StubTreq(self.app.resource())

    def status(self) -> Status:
        """How things stand."""
        return Status(
            self.dispatcher.scheduler.snapshot(), 0, 0, self.app.draining, self.pool.snapshot(), self.limiting.state()
        )

    def post(self, body: bytes = HELLO, path: str = CHAT.path, **headers: str) -> Deferred[Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response: Deferred[Any] = self.client.post(f"http://g{path}", data=body, headers=named)
        self.client.flush()
        return response

    def done(self, response: Deferred[Any]) -> Any:
        """The response, once what happened since has reached the client."""
        self.client.flush()
        return now_of(response)

    def get(self, path: str, **headers: str) -> Deferred[Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response: Deferred[Any] = self.client.get(f"http://g{path}", headers=named)
        self.client.flush()
        return response


def now_of(deferred: Deferred[Any]) -> Any:
    """The result that a Deferred already has; raises what it failed with."""
    results: list[Any] = []
    deferred.addBoth(results.append)
    assert results, "nothing has happened yet"
    if isinstance(results[0], Failure):
        results[0].raiseException()
    return results[0]


def body_of(gateway: Gateway, response: Any) -> bytes:
    """The body of a response that has ended."""
    content = response.content()
    gateway.client.flush()
    result: bytes = now_of(content)
    return result


def error_of(gateway: Gateway, response: Any) -> dict[str, Any]:
    """The OpenAI error of a response that has ended."""
    error: dict[str, Any] = json.loads(body_of(gateway, response))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
