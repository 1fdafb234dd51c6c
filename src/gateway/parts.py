"""The parts that only some settings ask for: who asks for keys, who counts limits, the ledger, telemetry, who looks for
backends. What they need in addition is imported when they are made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from random import getrandbits
from typing import TYPE_CHECKING, Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from .core import otel_settings
from .core.auth import Auth
from .core.auth_settings import asks_for_keys, takes_tokens
from .core.readers import SettingsError
from .core.record import Record
from .core.settings import Settings
from .core.sources import read_url
from .core.spans import Place
from .core.status import Status
from .core.trace_context import Tracing
from .delivery import DAY, Delivery
from .discovery import Failed, Found, Make, Source
from .edge import Edge, check_files
from .guard import Guard
from .jwks import Jwks
from .keys_file import KeysFile, read_keys
from .ledger import Ledger
from .ledger_place import database_at, journal_at
from .limiter import Limiter, LocalLimiter
from .metrics import INFERENCE_ROUTES
from .net.agent import BackendClient
from .net.server import Server
from .process import StartError, is_open, start_errors

if TYPE_CHECKING:
    from .core.jwt_tokens import Verifier
    from .redis_limiter import RedisLimiter
    from .telemetry import Telemetry

_log: Final = Logger("gateway.service")


def ledger_of(settings: Settings, reactor: Any, *, spare: bool = False) -> Ledger | None:
    """The ledger, if there is to be one. Nothing is asked of its database yet: it may be away. ``spare``: the journal may be
    in use, and then this is another one. Raises `StartError`."""
    if not settings.ledger:
        return None
    with start_errors():
        database = database_at(settings.ledger)
        journal = journal_at(settings.ledger, settings.ledger_journal_file, settings.ledger_journal, spare=spare)

    def tell(problem: str) -> None:
        reactor.callFromThread(_log.warn, "{problem}", problem=problem)

    delivery = Delivery(database, journal, settings.ledger_keep * DAY, time.time, tell)
    return Ledger(delivery, reactor, time.time, flush=settings.ledger_flush, routes=INFERENCE_ROUTES, prices=settings.prices)


def limiter_of(settings: Settings, reactor: Any) -> Limiter:
    """Who counts what limits allow. Raises `StartError`."""
    if settings.redis_url is None:
        return LocalLimiter(reactor.seconds, time.time)
    fail_open = settings.limits_fail == "open"
    return _redis_limiter()(settings.redis_url, reactor, time.time, settings.redis_timeout, fail_open=fail_open)


def _redis_limiter() -> type[RedisLimiter]:
    try:
        from .redis_limiter import RedisLimiter  # noqa: PLC0415 - an optional part
    except ImportError:
        raise StartError("GATEWAY_REDIS_URL needs txredisapi: pip install 'inference-gateway[redis]'") from None
    return RedisLimiter


def in_thread(reactor: Any, call: Callable[[], Any]) -> Deferred[Any]:
    """Run this beside the reactor."""
    return deferToThreadPool(reactor, reactor.getThreadPool(), call)


def edge_of(settings: Settings, server: Server, admin: Server, reactor: Any) -> Edge:
    """How clients reach the servers. Raises `StartError`."""
    with start_errors("GATEWAY_TLS_..."):
        return Edge(settings, server, admin, reactor, time.time, partial(in_thread, reactor))


def telemetry_of(
    settings: Settings,
    environ: Mapping[str, str],
    reactor: Any,
    here: Place,
    backends: Mapping[str, Place],
    status: Callable[[], Status],
    model_label: Callable[[Record], str],
) -> tuple[Telemetry | None, Tracing | None]:
    """The observer that exports, and what says which requests it has spans of; neither where nobody wants any. ``here`` is
    where the gateway listens, ``backends`` where those are. Raises `StartError`."""
    if not otel_settings.is_wanted(settings.otel, environ):
        return None, None
    try:
        from .otel_export import has_grpc  # noqa: PLC0415 - an optional part
        from .telemetry import Telemetry  # noqa: PLC0415 - the same
    except ImportError:
        raise StartError("OTEL_EXPORTER_OTLP_ENDPOINT, GATEWAY_OTEL: pip install 'inference-gateway[otel]'") from None
    found = otel_settings.read(environ)
    if "grpc" in (found.traces, found.metrics) and not has_grpc():
        raise StartError("OTEL_EXPORTER_OTLP_PROTOCOL: grpc needs pip install opentelemetry-exporter-otlp-proto-grpc")
    made = Telemetry(found, reactor, time.time, here, backends, status, model_label)
    return made, Tracing(found.ratio, getrandbits, by_parent=found.by_parent) if found.traces else None


def guard_of(settings: Settings, reactor: Any, client: BackendClient) -> tuple[Guard | None, list[Service]]:
    """Who asks for keys, if there are any, and what must run for it; ``client`` fetches an issuer's. Raises `StartError`."""
    check_open(settings)
    if not asks_for_keys(settings):
        return None, []
    verifier = _make_verifier(settings) if takes_tokens(settings) else None
    auth = Auth(verifier)
    jwks, running = None, list[Service]()
    if settings.jwt_jwks_url and verifier is not None:
        use = partial(_use_signers, verifier, auth)
        jwks = Jwks(settings.jwt_jwks_url, client, reactor, use)
        running.append(jwks)
    if settings.keys:
        with start_errors("GATEWAY_KEYS"):
            running.append(KeysFile(Path(settings.keys), reactor, auth.use_keys, partial(in_thread, reactor)))
    return Guard(auth, time.time, jwks=jwks, metrics_open=settings.metrics_open), running


def check_open(settings: Settings) -> None:
    """Nobody is asked for a key only where that was meant. Raises `StartError`."""
    opened = is_open(settings)
    if opened and not (asks_for_keys(settings) or settings.insecure_open):
        raise StartError(
            f"{opened} is not loopback, and nobody is asked for a key: "
            "set GATEWAY_KEYS or GATEWAY_JWT_..., or say --insecure-open"
        )


def check(settings: Settings) -> None:
    """What a start would find out: of the files and the packages that the settings need. Raises `StartError`."""
    check_open(settings)
    if takes_tokens(settings):
        _make_verifier(settings)
    if settings.redis_url is not None:
        _redis_limiter()
    with start_errors("GATEWAY_TLS_..."):
        check_files(settings)
    if settings.keys:
        with start_errors("GATEWAY_KEYS"):
            read_keys(Path(settings.keys))
    with start_errors():
        if settings.ledger:
            database_at(settings.ledger)
        for own in settings.backends:
            if own.url.startswith("k8s+"):
                _kubernetes(own.url)


def sources_of(settings: Settings, reactor: Any) -> Make:
    """Who looks for backends where a URL of the settings says so."""

    @cache
    def resolver() -> Any:
        from .dns_source import resolver_of  # noqa: PLC0415 - most need none

        return resolver_of(settings.dns_server, reactor)

    def make(url: str, found: Found, failed: Failed) -> Source:
        asked = read_url(url)
        if asked.kind != "k8s":
            from .dns_source import DNSSource  # noqa: PLC0415 - most need none

            return DNSSource(asked, resolver(), reactor, found, failed)
        kubernetes = _kubernetes(url)
        source: Source = kubernetes.KubernetesSource(asked, kubernetes.api_of(url), reactor, found, failed)
        return source

    return make


def _kubernetes(url: str) -> Any:
    try:
        kubernetes_source = import_module(".kubernetes_source", __package__)  # an optional part
    except ImportError:
        raise SettingsError(f"{url}: kubernetes is not installed: pip install 'inference-gateway[kubernetes]'") from None
    return kubernetes_source


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
