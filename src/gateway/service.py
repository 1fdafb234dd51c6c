"""The composition root: the parts and how they are joined, start, and drain.

Only this module knows the reactor; with `process` and `parts` it is the only one that knows the process: its files,
environment, signals and clocks.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from twisted.application.service import Service
from twisted.internet.defer import Deferred, ensureDeferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.web.server import Request

from .answering import Answering, Observer
from .app import App
from .backend import Backend, HTTPBackend
from .calls import Calls
from .core.auth_settings import asks_for_keys
from .core.backend_settings import BackendSettings
from .core.changes import LIVE
from .core.forwarded import Proxies
from .core.live import Live
from .core.policy import POLICIES
from .core.principal import NO_LIMITS
from .core.principal import Limits as KeyLimits
from .core.record import Record
from .core.retry_budget import RetryBudget
from .core.scheduler import Scheduler
from .core.settings import Settings
from .core.spans import Place
from .core.status import Status
from .core.tickets import Bounds
from .dashboard import Dashboard
from .discovery import Discovery
from .dispatch import Dispatcher
from .echo import EchoBackend
from .exchange import Timeouts
from .hedge import Hedge
from .inference import Inference
from .inherited import Inherited, inherit
from .ledger import Ledger
from .lifecycle import HANDOVER_SETTLE, Lifecycle
from .limiter import Limiting
from .logs import access_log
from .loop_delay import LoopDelay
from .members import Made, Members
from .metrics import Metrics
from .net.agent import Agent, BackendClient
from .net.channel import Limits
from .net.reactor import adopt
from .net.server import Server
from .net.shares import Shares
from .parts import check, edge_of, guard_of, in_thread, ledger_of, limiter_of, sources_of, telemetry_of
from .pool import Pool
from .process import (
    StartError,
    allow_files,
    check_pidfile,
    is_open,
    listening,
    log_observer,
    remove_unix,
    stands_at,
    start_errors,
    tell_running,
)
from .relay import Heartbeat, no_heartbeat
from .reload import Reload
from .watched import Poll
from .windows import Windows
from .workers import Workers

GUARDED: Final = tuple(name for name in LIVE if name.startswith(("jwt_", "keys", "metrics_open")))
"""Settings of who is let in."""

FLUSH_SECONDS: Final = 2.0
"""How long answers that are complete may take to leave, at the very end."""

_log: Final = Logger("gateway.service")


class Told(Protocol):
    """What the gateway is told at its start: ``arguments`` is its command line; `read` reads all sources again, which may raise
    `SettingsError`; ``files`` are those that settings come from; `stand_at` overrules them all."""

    settings: Settings
    arguments: Sequence[str]

    def read(self) -> Settings: ...

    def files(self) -> Sequence[Path]: ...

    def stand_at(self, places: Mapping[str, Any]) -> None: ...


def make_gateway(told: Told, twistd: dict[str, Any]) -> Service:
    """The whole gateway, its sockets bound and its log open; with several workers, their parent. ``twistd`` has twistd's own
    options. Raises `StartError`."""
    from twisted.internet import reactor  # noqa: PLC0415 - which one it is has been decided by now

    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they mean nothing until it runs, and would end it
    try:
        inherited = inherit(os.environ, reactor)
    except ValueError as problem:
        raise StartError(str(problem)) from None
    check_pidfile(twistd.get("pidfile"))
    sockets = listening(told.settings, inherited)
    if inherited.sockets:
        told.stand_at(stands_at(sockets))
    settings = told.settings
    lifecycle = Lifecycle(reactor, twistd, told.arguments, inherited, log_observer(twistd, settings))
    if settings.workers > 1 and inherited.worker is None:
        check(settings)
        return Workers(settings, reactor, sockets, lifecycle)
    allow_files(2 * settings.max_connections)
    return Gateway(told, reactor, sockets, lifecycle, ledger_of(settings, reactor, spare=inherited.is_started))


def _checked(told: Told) -> Settings:
    settings = told.read()
    check(settings)
    return settings


def _shares_of(inherited: Inherited) -> Shares | None:
    if inherited.shares is None or inherited.worker is None:
        return None
    shares = Shares(inherited.shares, inherited.workers, inherited.worker)
    os.close(inherited.shares)
    return shares


def _default_limits(settings: Settings) -> KeyLimits:
    found = KeyLimits(settings.limit_requests, settings.limit_tokens, settings.limit_concurrency)
    return NO_LIMITS if found == NO_LIMITS else found


class Gateway(Service):
    """The whole gateway as one service: its stop is one sequence, in which each step waits for the one before."""

    name = "inference-gateway"

    def __init__(
        self,
        told: Told,
        reactor: Any,
        sockets: dict[str, socket.socket],
        lifecycle: Lifecycle,
        ledger: Ledger | None = None,
    ) -> None:
        self._settings = settings = told.settings
        self._reactor = reactor
        self._sockets = dict(sockets)
        self._lifecycle = lifecycle
        self._ledger = ledger
        self._ports: dict[str, IListeningPort] = {}
        self._agent = Agent(reactor, settings.connect_timeout)
        guard, self._watching = guard_of(settings, reactor, BackendClient(self._agent))
        self.backends: dict[str, Backend] = {}
        self._places: dict[str, Place] = {}
        self.pool = Pool([], settings, reactor)
        self.discovery = Discovery(sources_of(settings, reactor), reactor.seconds)
        scheduler = Scheduler(
            POLICIES[settings.policy](),
            Bounds(settings.queue_requests, settings.queue_bytes, settings.priority_aging),
            shared=settings.shared_backends or settings.workers > 1 or settings.redis_url is not None,
        )
        self.limiter = limiter_of(settings, reactor)
        self.limiting = Limiting(self.limiter, reactor.seconds, _default_limits(settings), settings.prices)
        self.dispatcher = Dispatcher(scheduler, self.pool, self.backends, reactor)
        self._metrics = metrics = Metrics(self.status, reactor.seconds, settings.models)
        live = Live(reactor.seconds())
        self._dashboard = Dashboard(live, self.status, settings.policy, reactor)
        self.pool.watch_states(self._dashboard.changed)
        self.loop_delay = LoopDelay(reactor)
        metrics.registry.register(self.loop_delay)
        metrics.registry.register(self.discovery)
        self.reload = Reload(settings, partial(_checked, told), self._apply, lifecycle.notify, partial(in_thread, reactor))
        self._files = Poll(told.files(), reactor, self.reload)
        metrics.registry.register(self.reload)
        log = access_log if lifecycle.observer is None else lifecycle.observer.access(reactor)
        observers: list[Observer] = [metrics, live, log]
        if ledger is not None:
            observers.append(ledger)
            metrics.registry.register(ledger)
        self.telemetry, tracing = telemetry_of(
            settings, os.environ, reactor, self._place(), self._places, self.status, metrics.model_label
        )
        if self.telemetry is not None:
            metrics.registry.register(self.telemetry)
            observers.append(self.telemetry)
        changed = self.telemetry.backends_changed if self.telemetry is not None else lambda: None
        self.members = Members(self._make_backend, self.pool, self.backends, self._places, self.discovery, changed)
        """Its `use` takes other backends while the gateway runs."""
        with start_errors():
            self.members.use(settings.backends)
        answering = Answering(
            observers,
            reactor.seconds,
            split=settings.admin_port is not None,
            proxies=Proxies(settings.trusted_proxies) if settings.trusted_proxies else None,
            guard=guard,
            tracing=tracing,
        )
        self.app = App(
            answering,
            self._make_inference(),
            self.dispatcher,
            self.status,
            metrics,
            reactor.seconds,
            dashboard=self._dashboard,
            admin=self._has_admin(),
            models=settings.models,
            settings=self.reload.picture,
        )
        limits = Limits(settings.max_body, settings.max_connections, settings.client_timeout, settings.idle_timeout)
        resource, known = self.app.resource(), self.app.known()
        self.server = Server(resource, limits, reactor, answering.refused, known)
        self._admin_server = Server(resource, limits, reactor, answering.refused, known, admin=True)
        self.server.shares = _shares_of(lifecycle.inherited)
        self._edge = edge_of(settings, self.server, self._admin_server, reactor)
        metrics.registry.register(self._edge)

    def _has_admin(self) -> bool:
        settings = self._settings
        safe = asks_for_keys(settings) or not is_open(settings)
        return settings.admin == "on" or (settings.admin == "auto" and safe)

    def _place(self) -> Place:
        """Where clients find the gateway."""
        if "http" not in self._sockets:
            return Place(self._sockets["unix"].getsockname(), None)
        host, port = self._sockets["http"].getsockname()[:2]
        return Place(host, port)

    def _make_backend(self, own: BackendSettings) -> Made:
        if own.kind == "echo":
            return Made(EchoBackend(self._reactor, time.time), lambda: None)
        agent = Agent(self._reactor, own.connect_timeout, own.address)
        backend = HTTPBackend(
            own.name,
            own.url,
            BackendClient(agent),
            self._reactor,
            Timeouts(own.first_byte_timeout, own.idle_timeout, own.total_timeout),
            kind=None if own.kind == "auto" else own.kind,
            api_key=own.api_key,
            own_key=own.api_key is not None or not self._settings.forward_authorization,
            stream_usage=own.stream_usage,
            messages=own.messages,
            max_answer=self._settings.max_answer,
        )
        return Made(backend, agent.close)

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
            windows=Windows(self.pool, self.backends) if settings.count_tokens else None,
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
            self.discovery.unanswered(),
        )

    # --- start

    def setServiceParent(self, parent: Any) -> None:
        self._lifecycle.log_for(parent)
        super().setServiceParent(parent)

    def startService(self) -> None:
        super().startService()
        for name, bound in self._sockets.items():
            shares = self.server.shares if name != "admin" else None
            self._ports[name] = adopt(self._reactor, bound, self._edge.factories[name], shares)
        if self.server.shares is not None:
            self.server.shares.tell(0)
        self.pool.startService()
        self.discovery.startService()
        for watching in self._watching:
            watching.startService()
        self.limiter.start()
        if self._ledger is not None:
            self._ledger.startService()
        self.loop_delay.startService()
        self._files.startService()
        self._edge.start()
        if self.telemetry is not None:
            self.telemetry.startService()
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not look at it again and again
        self._reactor.callWhenRunning(self._is_running)

    def _is_running(self) -> None:
        inherited = self._lifecycle.inherited
        self._lifecycle.run(self._sockets, self.reload)
        if inherited.worker is None:
            tell_running(self._settings, self._sockets)
        else:
            _log.info("worker {number} of {count} runs", number=inherited.worker + 1, count=inherited.workers)

    def _apply(self, settings: Settings) -> None:
        """What begins from now on goes by these; what runs goes on by those that it began with. Raises `StartError` or
        `SettingsError`, and then nothing has changed."""
        before, guarded = self._settings, None
        if any(getattr(before, name) != getattr(settings, name) for name in GUARDED):
            guarded = guard_of(settings, self._reactor, BackendClient(self._agent))
        self.members.use(settings.backends)
        self._settings = settings
        if guarded is not None:
            self._watch(guarded[1])
            self.app.answering.guard = guarded[0]
        self.limiting.use(_default_limits(settings), settings.prices)
        if self._ledger is not None:
            self._ledger.prices = settings.prices
        self._metrics.models = settings.models
        self.app.use(self._make_inference(), settings.models, admin=self._has_admin())

    def _watch(self, watching: list[Service]) -> None:
        """These files and key sets, and no longer those of before."""
        for before in self._watching:
            before.stopService()
        self._watching = watching
        for one in watching:
            one.startService()

    # --- stop

    def stopService(self) -> Deferred[None]:
        return ensureDeferred(self._drain())

    async def _drain(self) -> None:
        """Refuse new work, finish what is in flight, say goodbye to what is left, close everything."""
        lifecycle, hurry, grace = self._lifecycle, self._lifecycle.hurry, self._settings.grace
        lifecycle.closing()
        if self.server.shares is not None:
            self.server.shares.leave()
        self._files.stopService()
        self.reload.stop()
        self._edge.stop()
        await self._settle()
        end = time.monotonic() + grace
        self.app.draining = True
        self._dashboard.stop()
        self.server.drain()
        _log.info("stopping: requests in flight get {grace:g} s", grace=grace)
        await self._first_of(grace, self.app.answering.finished(), hurry)
        left = self.app.answering.cut()
        if left:
            _log.warn("ended {left} requests that were still in flight", left=left)
        await self._close("http", "unix")
        drained = self.server.drain()
        if not hurry.called:
            await self._first_of(max(end - time.monotonic(), 0.0), drained, hurry)
        await self._first_of(FLUSH_SECONDS, drained)
        self.server.abort()
        await self._close("admin")
        await self._first_of(FLUSH_SECONDS, self._admin_server.drain())
        self._admin_server.abort()
        await self._close_parts()
        super().stopService()
        lifecycle.closed()
        _log.info("stopped")

    async def _settle(self) -> None:
        """Go on for a while, but let each client know with its answer that its connection ends.

        Balancers need the time to notice. Who has handed the sockets over needs it for the connections that it still has: what
        a client sends on one just when it is closed would be lost.
        """
        handed_over, seconds = self._lifecycle.handed_over, self._settings.drain_settle
        if handed_over:
            self._dashboard.stop()  # its viewers connect anew
            await self._close("http", "unix", "admin")
            seconds = max(seconds, HANDOVER_SETTLE)
        elif seconds:
            self.app.leaving = True
        if seconds:
            _log.info("stopping: for {seconds:g} s all goes on as before", seconds=seconds)
            gone = self.server.settle()
            await self._first_of(seconds, self._lifecycle.hurry, *([gone] if handed_over else []))

    async def _close_parts(self) -> None:
        self.loop_delay.stopService()
        if self.telemetry is not None:
            await self._first_of(FLUSH_SECONDS, self.telemetry.finish())
            self.telemetry.stopService()
        await self._first_of(FLUSH_SECONDS, self.discovery.stopService())
        self.pool.stopService()
        for watching in self._watching:
            watching.stopService()
        self.dispatcher.close()
        await self._first_of(FLUSH_SECONDS, self.limiter.settled())
        self.limiter.stop()
        self.members.close()
        self._agent.close()
        if self._ledger is not None:
            await self._ledger.stopService()

    async def _close(self, *names: str) -> None:
        """Listen there no longer. The file of a UNIX socket is left to a successor, and to the parent of a worker."""
        alone = not self._lifecycle.handed_over and self._lifecycle.inherited.worker is None
        for name in names:
            port = self._ports.pop(name, None)
            if port is not None:
                await maybeDeferred(port.stopListening)
                bound = self._sockets.pop(name)
                if name == "unix" and alone:
                    remove_unix(bound)
                bound.close()

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
