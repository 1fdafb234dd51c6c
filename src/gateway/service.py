"""The composition root: the parts and how they are joined, start, and drain.

Only this module knows the reactor; with `process` and `parts` it is the only one that knows the process: its files,
environment, signals and clocks.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from random import getrandbits
from typing import TYPE_CHECKING, Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred, ensureDeferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.logger import ILogObserver, Logger
from twisted.web.server import Request

from . import __version__
from .app import App, Observer
from .backend import Backend, HTTPBackend
from .calls import Calls
from .core import otel_settings
from .core.backend_settings import BackendSettings
from .core.live import Live
from .core.policy import POLICIES
from .core.principal import NO_LIMITS
from .core.principal import Limits as KeyLimits
from .core.record import Record
from .core.retry_budget import RetryBudget
from .core.scheduler import Scheduler
from .core.settings import Settings
from .core.spans import Place, place_of
from .core.status import Status
from .core.tickets import Bounds
from .core.trace_context import Tracing
from .dashboard import Dashboard
from .dispatch import Dispatcher
from .echo import EchoBackend
from .exchange import Timeouts
from .hedge import Hedge
from .inference import Inference
from .ledger import Ledger
from .limiter import Limiting
from .logs import LineObserver, RotatedFile, access_log
from .loop_delay import LoopDelay
from .metrics import Metrics
from .net.agent import Agent, BackendClient
from .net.channel import Limits
from .net.server import Server
from .parts import guard_of, ledger_of, limiter_of
from .pool import Pool
from .process import allow_files, check_pidfile, is_loopback, listen, log_observer
from .relay import Heartbeat, no_heartbeat
from .windows import Windows

if TYPE_CHECKING:
    from .telemetry import Telemetry

FLUSH_SECONDS: Final = 2.0
"""How long answers that are complete may take to leave, at the very end."""

_log: Final = Logger("gateway.service")


def make_gateway(settings: Settings, twistd: Mapping[str, Any]) -> Gateway:
    """The whole gateway, its socket bound and its log open; ``twistd`` has twistd's own options. Raises `StartError`."""
    from twisted.internet import reactor  # noqa: PLC0415 - which one it is has been decided by now

    check_pidfile(twistd.get("pidfile"))
    listening = listen(settings.host, settings.port)
    allow_files(2 * settings.max_connections)
    return Gateway(settings, reactor, listening, log_observer(twistd, settings), ledger_of(settings, reactor))


class Gateway(Service):
    """The whole gateway as one service: its stop is one sequence, in which each step waits for the one before."""

    name = "inference-gateway"

    def __init__(
        self,
        settings: Settings,
        reactor: Any,
        listening: socket.socket,
        observer: LineObserver | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._settings = settings
        self._reactor = reactor
        self._listening = listening
        self._observer = observer
        self._ledger = ledger
        self._port: IListeningPort | None = None
        self._stopping = False
        self._hurry: Deferred[None] = Deferred()
        self._agents: dict[float, Agent] = {}
        guard, self._watching = guard_of(settings, reactor, BackendClient(self._agent(settings.connect_timeout)))
        self._asks = guard is not None
        self.backends = [self._make_backend(own) for own in settings.backends] or [EchoBackend(reactor, time.time)]
        self.pool = Pool(self.backends, settings, reactor)
        scheduler = Scheduler(
            POLICIES[settings.policy](), Bounds(settings.queue_requests, settings.queue_bytes, settings.priority_aging)
        )
        self.limiter = limiter_of(settings, reactor)
        default = KeyLimits(settings.limit_requests, settings.limit_tokens, settings.limit_concurrency)
        default = NO_LIMITS if default == NO_LIMITS else default
        self.limiting = Limiting(self.limiter, reactor.seconds, default, settings.prices)
        self.dispatcher = Dispatcher(scheduler, self.pool, {one.name: one for one in self.backends}, reactor)
        metrics = Metrics(self.status, reactor.seconds, settings.models)
        live = Live(reactor.seconds())
        self._dashboard = Dashboard(live, self.status, settings.policy, reactor)
        self.pool.watch_states(self._dashboard.changed)
        self.loop_delay = LoopDelay(reactor)
        metrics.registry.register(self.loop_delay)
        observers: list[Observer] = [metrics, live, access_log if observer is None else observer.access(reactor)]
        if ledger is not None:
            observers.append(ledger)
            metrics.registry.register(ledger)
        self.telemetry, tracing = self._make_telemetry(metrics, os.environ)
        if self.telemetry is not None:
            metrics.registry.register(self.telemetry)
            observers.append(self.telemetry)
        self.app = App(
            self._make_inference(),
            self.dispatcher,
            self.status,
            metrics,
            observers,
            reactor.seconds,
            dashboard=self._dashboard,
            admin=settings.admin == "on" or (settings.admin == "auto" and (self._asks or is_loopback(settings.host))),
            guard=guard,
            models=settings.models,
            tracing=tracing,
        )
        limits = Limits(settings.max_body, settings.max_connections, settings.client_timeout, settings.idle_timeout)
        self.server = Server(self.app.resource(), limits, reactor, self.app.refused, self.app.known())

    def _agent(self, connect_timeout: float) -> Agent:
        """Who connects to servers within this time; there is one for each such time."""
        agent = self._agents.get(connect_timeout)
        if agent is None:
            agent = self._agents[connect_timeout] = Agent(self._reactor, connect_timeout)
        return agent

    def _make_telemetry(self, metrics: Metrics, environ: Mapping[str, str]) -> tuple[Telemetry | None, Tracing | None]:
        """Its observer, and what says which requests it has spans of; neither where nobody wants any."""
        if not otel_settings.is_wanted(self._settings.otel, environ):
            return None, None
        from .telemetry import Telemetry  # noqa: PLC0415 - a part that most do not use

        settings = otel_settings.read(environ, __version__)
        host, port = self._listening.getsockname()[:2]
        here, backends = Place(host, port), {own.name: place_of(own.url) for own in self._settings.backends}
        client = BackendClient(self._agent(self._settings.connect_timeout))
        made = Telemetry(settings, client, self._reactor, time.time, here, backends, self.status, metrics.model_label)
        return made, Tracing(settings.ratio, getrandbits, by_parent=settings.by_parent) if settings.traces else None

    def _make_backend(self, own: BackendSettings) -> Backend:
        return HTTPBackend(
            own.name,
            own.url,
            BackendClient(self._agent(own.connect_timeout)),
            self._reactor,
            Timeouts(own.first_byte_timeout, own.idle_timeout, own.total_timeout),
            kind=None if own.kind == "auto" else own.kind,
            api_key=own.api_key,
            own_key=own.api_key is not None or not self._settings.forward_authorization,
            stream_usage=own.stream_usage,
            messages=own.messages,
            max_answer=self._settings.max_answer,
        )

    def _make_inference(self) -> Inference:
        settings, reactor = self._settings, self._reactor
        interval = settings.queue_comments

        def heartbeat(request: Request, record: Record, scheduler: Scheduler) -> Heartbeat:
            return Heartbeat(request, record, scheduler, reactor, interval)

        calls = Calls(
            self.dispatcher.scheduler,
            forward_authorization=settings.forward_authorization,
            queue_timeout=settings.queue_timeout,
            strict=settings.validation == "strict",
            models=settings.models,
        )
        return Inference(
            self.dispatcher,
            reactor.seconds,
            RetryBudget(settings.retry_budget),
            self.limiting,
            calls,
            max_attempts=settings.max_attempts,
            heartbeat=heartbeat if interval else no_heartbeat,
            hedge=Hedge(reactor) if settings.hedge else None,
            windows=Windows(self.pool, {one.name: one for one in self.backends}) if settings.count_tokens else None,
        )

    def status(self) -> Status:
        """How things stand."""
        return Status(
            self.dispatcher.scheduler.snapshot(),
            self.server.connections,
            self.server.refused_connections,
            self.app.draining,
            self.pool.snapshot(),
            self.limiting.state(),
        )

    # --- start

    def setServiceParent(self, parent: Any) -> None:
        if self._observer is not None:
            parent.setComponent(ILogObserver, self._observer)
        super().setServiceParent(parent)

    def startService(self) -> None:
        super().startService()
        self._port = self._reactor.adoptStreamPort(self._listening.fileno(), self._listening.family, self.server)
        self._listening.close()
        self.pool.startService()
        for watching in self._watching:
            watching.startService()
        self.limiter.start()
        if self._ledger is not None:
            self._ledger.startService()
        self.loop_delay.startService()
        if self.telemetry is not None:
            self.telemetry.startService()
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not look at it again and again
        self._reactor.callWhenRunning(self._is_running)

    def _is_running(self) -> None:
        """Said last: who reads it may send requests, and signals."""
        self._install_signals()
        if not self._asks:
            _log.warn("nobody is asked for a key: whoever reaches {host} may use all of it", host=self._settings.host)
        address: Any = self._port.getHost()  # type: ignore[union-attr]  # it listens
        host = f"[{address.host}]" if ":" in address.host else address.host
        _log.info(
            "inference-gateway {version} listens on http://{host}:{port}, backend {backend}",
            version=__version__,
            host=host,
            port=address.port,
            backend=", ".join(own.url for own in self._settings.backends) or "none: requests are echoed",
        )

    def _install_signals(self) -> None:
        """twistd's own handlers would end the process with the signal's status, or without a drain."""

        def on(number: int, act: Callable[[], object]) -> None:
            signal.signal(number, lambda *_: self._reactor.callFromThread(act))

        on(signal.SIGTERM, self._stop)
        on(signal.SIGINT, self._stop)
        # Hanging up ends a program at its terminal, and is for a daemon a word about its settings.
        on(signal.SIGHUP, self._stop if sys.stdin is not None and sys.stdin.isatty() else self._nothing_to_reload)
        write = self._observer.write if self._observer is not None else None
        on(signal.SIGUSR1, write.rotate if isinstance(write, RotatedFile) else self._nothing_to_rotate)

    def _nothing_to_reload(self) -> None:
        _log.warn("SIGHUP: settings are read at the start; restart to change them")

    def _nothing_to_rotate(self) -> None:
        _log.warn("SIGUSR1: there is no log file to rotate")

    # --- stop

    def _stop(self) -> None:
        """The first signal lets requests finish; a second one does not."""
        if not self._stopping:
            self._stopping = True
            self._reactor.stop()
        elif not self._hurry.called:
            _log.warn("second signal: requests in flight are ended now")
            self._hurry.callback(None)

    def stopService(self) -> Deferred[None]:
        return ensureDeferred(self._drain())

    async def _drain(self) -> None:
        """Refuse new work, finish what is in flight, say goodbye to what is left, close everything."""
        grace = self._settings.grace
        end = time.monotonic() + grace
        self.app.draining = True
        self._dashboard.stop()
        self.server.drain()
        _log.info("stopping: requests in flight get {grace:g} s", grace=grace)
        await self._first_of(grace, self.app.finished(), self._hurry)
        left = self.app.cut()
        if left:
            _log.warn("ended {left} requests that were still in flight", left=left)
        if self._port is not None:
            await maybeDeferred(self._port.stopListening)
        drained = self.server.drain()
        if not self._hurry.called:
            await self._first_of(max(end - time.monotonic(), 0.0), drained, self._hurry)
        await self._first_of(FLUSH_SECONDS, drained)
        self.server.abort()
        self.loop_delay.stopService()
        if self.telemetry is not None:
            await self._first_of(FLUSH_SECONDS, ensureDeferred(self.telemetry.finish()))
            self.telemetry.stopService()
        self.pool.stopService()
        for watching in self._watching:
            watching.stopService()
        self.dispatcher.close()
        await self._first_of(FLUSH_SECONDS, self.limiter.settled())
        self.limiter.stop()
        for agent in self._agents.values():
            agent.close()
        if self._ledger is not None:
            await self._ledger.stopService()
        super().stopService()
        if self._observer is not None:
            self._observer.close()
        _log.info("stopped")

    async def _first_of(self, seconds: float, *events: Deferred[None]) -> None:
        """Wait for one of the events, but no longer than this."""
        enough: Deferred[None] = Deferred()

        def happened(_: object = None) -> None:
            if not enough.called:
                enough.callback(None)

        timer = self._reactor.callLater(seconds, happened)
        for event in events:
            event.addBoth(happened)
        await enough
        if timer.active():
            timer.cancel()
