"""The composition root: options, the parts and how they are joined, start, and drain.

Only this module knows the process: its files, environment, signals, clocks and reactor.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred, ensureDeferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.threads import deferToThreadPool
from twisted.logger import ILogObserver, Logger
from twisted.web.server import Request

from . import __version__
from .app import App
from .backend import Backend, HTTPBackend
from .core.auth import Auth
from .core.backend_settings import BackendSettings
from .core.policy import POLICIES
from .core.principal import NO_LIMITS
from .core.principal import Limits as KeyLimits
from .core.readers import SettingsError
from .core.record import Record
from .core.retry_budget import RetryBudget
from .core.scheduler import Scheduler
from .core.settings import Settings
from .core.status import Status
from .core.tickets import Bounds
from .dispatch import Dispatcher
from .echo import EchoBackend
from .exchange import Timeouts
from .guard import Guard
from .hedge import Hedge
from .inference import Inference
from .jwks import Jwks
from .keys_file import KeysFile
from .limiter import Limiter, Limiting, LocalLimiter
from .logs import LineObserver, RotatedFile, StandardOutput, access_log
from .metrics import Metrics
from .net.agent import Agent, BackendClient
from .net.channel import Limits
from .net.server import Server
from .pool import Pool
from .relay import Heartbeat, no_heartbeat
from .windows import Windows

if TYPE_CHECKING:
    from .core.jwt_tokens import Verifier

BACKLOG: Final = 4096
SPARE_FILES: Final = 100

FLUSH_SECONDS: Final = 2.0
"""How long answers that are complete may take to leave, at the very end."""

_log: Final = Logger("gateway.service")


class StartError(Exception):
    """The gateway cannot start, for a reason that is one line."""


def make_gateway(settings: Settings, twistd: Mapping[str, Any]) -> Gateway:
    """The whole gateway, its socket bound and its log open; ``twistd`` has twistd's own options. Raises `StartError`."""
    from twisted.internet import reactor  # noqa: PLC0415 - which one it is has been decided by now

    _check_pidfile(twistd.get("pidfile"))
    listening = _listen(settings.host, settings.port)
    _allow_files(2 * settings.max_connections + SPARE_FILES)
    return Gateway(settings, reactor, listening, _observer(twistd, settings))


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening on the reactor."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        listening = socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as problem:
        # create_server puts the address into strerror, which this line already names; a look-up has words of its own.
        own_words = isinstance(problem, socket.gaierror)
        why = os.strerror(problem.errno) if problem.errno and not own_words else problem.strerror or problem
        raise StartError(f"cannot listen on {host} port {port} (--host, --port): {why}") from None
    listening.setblocking(False)
    return listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _allow_files(wanted: int) -> None:
    """Each client and each backend connection is an open file; many systems allow 1,024 unless asked for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _observer(twistd: Mapping[str, Any], settings: Settings) -> LineObserver | None:
    """Where log lines go: as twistd was told, but in lines of ours. None: twistd was told to log elsewhere."""
    if "nodaemon" not in twistd or twistd.get("syslog") or twistd.get("logger"):
        return None
    path = twistd.get("logfile") or ("-" if twistd.get("nodaemon") else "twistd.log")
    if path == "-":
        if not twistd.get("nodaemon"):
            raise StartError("a daemon cannot log to standard output: give twistd --logfile a path, or -n")
        return LineObserver(StandardOutput(), settings.log_format)
    try:
        file = RotatedFile(Path(path), settings.log_file_size, settings.log_files)
    except OSError as problem:
        raise StartError(f"cannot write the log file {path}: {problem.strerror}") from None
    return LineObserver(file, settings.log_format)


def _check_pidfile(path: str | None) -> None:
    """twistd itself would find out only as a daemon."""
    if path and not os.access(Path(path).absolute().parent, os.W_OK):
        raise StartError(f"cannot write the pidfile {path} (twistd --pidfile)")


def _make_verifier(settings: Settings) -> Verifier:
    """Verifies tokens by the key that the settings name; by none yet if it is to be fetched. Raises `StartError`."""
    try:
        from .core import jwt_tokens  # noqa: PLC0415 - an optional part
    except ImportError:
        raise StartError("GATEWAY_JWT_...: PyJWT is not installed: pip install 'inference-gateway[jwt]'") from None
    rules = jwt_tokens.Rules(
        settings.jwt_algorithms, settings.jwt_issuer, settings.jwt_audience, settings.jwt_leeway, dict(settings.jwt_claims)
    )
    if settings.jwt_key:
        return jwt_tokens.Verifier(rules, [jwt_tokens.secret_signer(settings.jwt_key)])
    if settings.jwt_key_file:
        try:
            return jwt_tokens.Verifier(rules, jwt_tokens.read_signers(Path(settings.jwt_key_file).read_bytes()))
        except (OSError, ValueError) as problem:
            why = problem.strerror if isinstance(problem, OSError) else problem
            raise StartError(f"GATEWAY_JWT_KEY_FILE: {settings.jwt_key_file}: {why}") from None
    return jwt_tokens.Verifier(rules)


def _use_signers(verifier: Verifier, auth: Auth, body: bytes) -> None:
    """Verify by what a JWK set says from now on. Raises ValueError."""
    if verifier.use(body):
        auth.forget_tokens()


def _limiter(settings: Settings, reactor: Any) -> Limiter:
    """Who counts what limits allow. Raises `StartError`."""
    if settings.redis_url is None:
        return LocalLimiter(reactor.seconds, time.time)
    try:
        from .redis_limiter import RedisLimiter  # noqa: PLC0415 - an optional part
    except ImportError:
        raise StartError("GATEWAY_REDIS_URL needs txredisapi: pip install 'inference-gateway[redis]'") from None
    fail_open = settings.limits_fail == "open"
    return RedisLimiter(settings.redis_url, reactor, time.time, settings.redis_timeout, fail_open=fail_open)


class Gateway(Service):
    """The whole gateway as one service: its stop is one sequence, in which each step waits for the one before."""

    name = "inference-gateway"

    def __init__(
        self, settings: Settings, reactor: Any, listening: socket.socket, observer: LineObserver | None = None
    ) -> None:
        self._settings = settings
        self._reactor = reactor
        self._listening = listening
        self._observer = observer
        self._port: IListeningPort | None = None
        self._stopping = False
        self._hurry: Deferred[None] = Deferred()
        self._agents: dict[float, Agent] = {}
        self._watching: list[Service] = []
        guard = self._make_guard()
        self._asks = guard is not None
        self.backends = [self._make_backend(own) for own in settings.backends] or [EchoBackend(reactor, time.time)]
        self.pool = Pool(self.backends, settings, reactor)
        scheduler = Scheduler(
            POLICIES[settings.policy](), Bounds(settings.queue_requests, settings.queue_bytes, settings.priority_aging)
        )
        self.limiter = _limiter(settings, reactor)
        default = KeyLimits(settings.limit_requests, settings.limit_tokens, settings.limit_concurrency)
        default = NO_LIMITS if default == NO_LIMITS else default
        self.limiting = Limiting(self.limiter, reactor.seconds, default, settings.prices)
        self.dispatcher = Dispatcher(scheduler, self.pool, {one.name: one for one in self.backends}, reactor)
        metrics = Metrics(self.status, reactor.seconds, settings.models)
        observers = (metrics, access_log if observer is None else observer.access(reactor))
        self.app = App(
            self._make_inference(),
            self.dispatcher,
            self.status,
            metrics,
            observers,
            reactor.seconds,
            admin=settings.admin == "on" or (settings.admin == "auto" and (self._asks or _is_loopback(settings.host))),
            guard=guard,
            models=settings.models,
        )
        limits = Limits(settings.max_body, settings.max_connections, settings.client_timeout, settings.idle_timeout)
        self.server = Server(self.app.resource(), limits, reactor, self.app.refused, self.app.known())

    def _make_guard(self) -> Guard | None:
        """Who asks for keys, if there are any. Raises `StartError`."""
        settings, reactor = self._settings, self._reactor
        verified = settings.jwt_key or settings.jwt_key_file or settings.jwt_jwks_url
        if not settings.keys and not verified:
            if not _is_loopback(settings.host) and not settings.insecure_open:
                raise StartError(
                    f"--host {settings.host} is not loopback, and nobody is asked for a key: "
                    "set GATEWAY_KEYS or GATEWAY_JWT_..., or say --insecure-open"
                )
            return None
        verifier = _make_verifier(settings) if verified else None
        auth = Auth(verifier)
        jwks = None
        if settings.jwt_jwks_url and verifier is not None:
            use = partial(_use_signers, verifier, auth)
            jwks = Jwks(settings.jwt_jwks_url, BackendClient(self._agent(settings.connect_timeout)), reactor, use)
            self._watching.append(jwks)
        if settings.keys:
            try:
                in_thread = partial(deferToThreadPool, reactor, reactor.getThreadPool())
                self._watching.append(KeysFile(Path(settings.keys), reactor, auth.use_keys, in_thread))
            except SettingsError as problem:
                raise StartError(f"GATEWAY_KEYS: {problem}") from None
        return Guard(auth, time.time, jwks=jwks, metrics_open=settings.metrics_open)

    def _agent(self, connect_timeout: float) -> Agent:
        """Who connects to servers within this time; there is one for each such time."""
        agent = self._agents.get(connect_timeout)
        if agent is None:
            agent = self._agents[connect_timeout] = Agent(self._reactor, connect_timeout)
        return agent

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

        return Inference(
            self.dispatcher,
            reactor.seconds,
            RetryBudget(settings.retry_budget),
            self.limiting,
            forward_authorization=settings.forward_authorization,
            queue_timeout=settings.queue_timeout,
            max_attempts=settings.max_attempts,
            heartbeat=heartbeat if interval else no_heartbeat,
            hedge=Hedge(reactor) if settings.hedge else None,
            strict=settings.validation == "strict",
            windows=Windows(self.pool, {one.name: one for one in self.backends}) if settings.count_tokens else None,
            models=settings.models,
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
        self.pool.stopService()
        for watching in self._watching:
            watching.stopService()
        self.dispatcher.close()
        await self._first_of(FLUSH_SECONDS, self.limiter.settled())
        self.limiter.stop()
        for agent in self._agents.values():
            agent.close()
        super().stopService()
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
